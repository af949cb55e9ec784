"""A sample whose answer is known: asked again later, and of every replica, it shows a teacher that has changed."""

from dataclasses import dataclass

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.packing import stack
from betakd_ray.batch.sample import Rendering
from betakd_ray.check.finding import Finding
from betakd_ray.check.subject import Score
from betakd_ray.teacher.compare import differs
from betakd_ray.teacher.parts import Signal


@dataclass(frozen=True)
class Canary:
    """One sample and the signal that a checked teacher gave for it."""

    inputs: ModelInputs
    signal: Signal


def canary_of(score: Score, rendering: Rendering, pad_token_id: int, image_token_id: int) -> Canary | None:
    """Return a canary that `score` has answered; None if its answer is not finite."""
    inputs = stack([rendering], pad_token_id, image_token_id)
    signal = ask_canary(score, inputs)
    return None if signal is None else Canary(inputs, signal)


def ask_canary(score: Score, inputs: ModelInputs) -> Signal | None:
    """Return the signal of the one sample of `inputs`; None if it is not finite."""
    return score(inputs).signals()[0]


def drift(canary: Canary, now: Signal | None, dtype: str, *, check: str = "canaries") -> Finding:
    """Return a finding on a later answer, or another replica's, to a canary. `dtype` is `TeacherFacts.dtype`.

    The sample is alone both times, so that only the device's kernels may round differently.
    """
    expected = f"the first answer to the same sample, within the rounding of {dtype}"
    difference = "the answer is not finite" if now is None else differs(now, canary.signal, dtype)
    if difference is None:
        return Finding(check, "the same answer", expected, "ok")
    cause = "the teacher's weights or kernels changed while the job ran, or its device is damaged"
    if check == "identity":
        cause = (
            "this replica is another model than the one that was checked (files, dtype, kernels or library versions)"
        )
    remedy = "Go on from the last checkpoint before it, with the teacher that was checked."
    return Finding(check, difference, expected, "fail", cause, remedy)
