"""Check that what a student rebuilds equals what the model itself computes.

The reference is the model's own full forward pass over one sample, alone and without padding, with inputs that the
processor makes by itself. The other side has come all the way: rendering, group, hidden states, wire, head.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from betakd_ray.batch.inputs import TensorInputs
from betakd_ray.batch.sample import Rendering
from betakd_ray.check.finding import Finding
from betakd_ray.check.measures import divergence, relative_difference
from betakd_ray.check.subject import CPU, HIDDEN, Subject, local_score, rows_of
from betakd_ray.models.vlm import with_image_tokens
from betakd_ray.teacher.answers import to_tensor
from betakd_ray.teacher.compare import ROUNDING, differs
from betakd_ray.teacher.parts import Signal

TOLERANCE = {"float32": 1e-3, "float16": 8e-3, "bfloat16": 3e-2}
"""Largest relative difference of a sample's logits, by dtype.

Measured on all families with three layers (benchmarks/check_thresholds.py): at most 4.1e-7, 1.1e-3 and 6.6e-3. Rounding
grows with the root of the depth, so 32 layers have three times as much; a GPU's TF32 rounds float32 to 1e-3.
"""


def check_parity(subject: Subject) -> list[Finding]:
    """Return findings on the model's inputs, logits, and other parts of the signal."""
    return [*_inputs(subject), *_finite(subject), *_logits(subject), *_parts(subject)]


def _inputs(subject: Subject) -> Iterator[Finding]:
    """Yield a failure if the processor alone makes other token ids of the same text and images."""
    expected = "the token ids and the number of image tokens that the model's processor makes"
    compared = 0
    for sample, ours, _ in subject.few:
        theirs = subject.renderer.by_processor(sample)
        if theirs is None:
            continue
        compared += 1
        if not np.array_equal(theirs[: len(ours.input_ids)], ours.input_ids):
            image = subject.renderer.image_token_id
            counts = (int((ours.input_ids == image).sum()), int((theirs == image).sum()))
            yield Finding(
                "parity",
                f"sample {sample.key}: {len(ours.input_ids)} tokens, {counts[0]} of them for images; the processor "
                f"makes {len(theirs)} and {counts[1]}",
                expected,
                "fail",
                "image tokens are not where, or not as many as, the model expects",
                "Check processor_config.json (patch_size, num_additional_image_tokens, image size).",
                subject.part,
            )
            return
    if not compared:
        yield Finding("parity", "the processor cannot be asked for whole texts", expected, "skipped", part=subject.part)


def _finite(subject: Subject) -> Iterator[Finding]:
    """Yield a failure for samples whose hidden states are not finite, or the same at all rows of all samples."""
    bad = [
        sample.key for sample, rows in zip(subject.samples, subject.hidden, strict=True) if not rows.isfinite().all()
    ]
    rows = torch.cat([each.float() for each in subject.hidden])
    seen = cause = ""
    if bad:
        seen = f"not finite for {len(bad)} of {len(subject.samples)} samples, e.g. {bad[0]}"
        cause = "the teacher computes NaN or infinite numbers: damaged weights, or float16 where bfloat16 is needed"
    elif not rows.any():
        seen, cause = "all hidden states are zero", "the engine returns empty buffers in place of hidden states"
    elif len(rows) > 1 and bool((rows == rows[0]).all()):
        seen = f"all {len(rows)} answer rows have the same hidden state"
        cause = "the engine returns one row for all, or the language model's input has no effect"
    if seen:
        remedy = "Load the teacher in another dtype, or fetch its weights again."
        yield Finding("parity", seen, "finite hidden states that differ", "fail", cause, remedy, subject.part)


def _logits(subject: Subject) -> Iterator[Finding]:
    tolerance = TOLERANCE[subject.dtype]
    expected = f"the logits of the model's own forward pass, within {tolerance:g} ({subject.dtype})"
    worst, nats, at = 0.0, 0.0, ""
    for sample, rendering, hidden in subject.few:
        full = full_logits(subject, rendering)[: len(hidden)]
        ours = subject.logits(hidden)
        if ours.shape != full.shape:
            seen = f"logits {list(ours.shape)} for sample {sample.key}; the model itself has {list(full.shape)}"
            cause = "rows or ids of the vocabulary are lost on the way"
            yield Finding("parity", seen, expected, "fail", cause, "Use one head and one set of rows.", subject.part)
            return
        # Without their mean, which no softmax sees.
        ours, full = (each - each.mean(-1, keepdim=True) for each in (ours, full))
        difference = relative_difference(ours, full)
        if not difference <= worst:
            worst, nats, at = difference, float(divergence(full, ours).mean()), sample.key
    if worst <= tolerance:
        yield Finding("parity", f"relative difference {worst:.1e} at most", expected, "ok", part=subject.part)
        return
    seen = f"relative difference {worst:.2g}, {nats:.2g} nats (sample {at})"
    yield Finding("parity", seen, expected, "fail", _cause(subject), _REMEDY, subject.part)


_REMEDY = "Use engine: transformers, or correct the engine: it must return the last hidden states after the final norm."


def _cause(subject: Subject) -> str:
    """Return what explains best that the logits differ."""
    best, cause = 0.25, "hidden states are changed on their way, or the model changes logits after its head"
    for _, rendering, hidden in subject.few:
        ours, rows = subject.logits(hidden), rows_of(rendering)
        for shift in (-2, -1, 1, 2):
            moved = _logits_at(subject, rendering, np.clip(rows + shift, 0, len(rendering.input_ids) - 1))
            if (difference := relative_difference(ours, moved)) < best:
                best, cause = difference, f"the rows are off by {shift:+d}: a state is taken from another position"
    others = [full_logits(subject, rendering) for _, rendering, _ in subject.few]
    for at, (_, _, hidden) in enumerate(subject.few):
        ours = subject.logits(hidden)
        for other, full in enumerate(others):
            if other != at and full.shape == ours.shape and (gap := relative_difference(ours, full)) < best:
                best, cause = gap, "samples are mixed up: one sample gets the hidden states of another"
    local = local_hidden(subject)
    if best == 0.25 and all(
        each.shape == own.shape and relative_difference(each.float(), own.float()) < ROUNDING[subject.dtype]
        for (_, _, each), own in zip(subject.few, local, strict=True)
    ):
        return "the head's copy differs from the head, or the model changes its logits after it (a soft-cap, a scale)"
    return cause


def local_hidden(subject: Subject) -> list[Tensor]:
    """Return the hidden states that this process computes from the model, without a given `score`."""
    score = local_score(subject.model, HIDDEN, subject.renderer.image_processor)
    found = []
    for _, rendering, rows in subject.few:
        signal = score(subject.stacked([rendering])).signals()[0]
        found.append(to_tensor(signal["hidden"], CPU)[: len(rows)] if signal else torch.full_like(rows, torch.nan))
    return found


def full_logits(subject: Subject, rendering: Rendering) -> Tensor:
    """Return the logits [rows, vocab] of the model's own forward pass at a sample's answer rows, in float32."""
    return _logits_at(subject, rendering, rows_of(rendering))


@torch.inference_mode()
def _logits_at(subject: Subject, rendering: Rendering, rows: NDArray[np.int64]) -> Tensor:
    inputs = TensorInputs.of(subject.stacked([rendering]), subject.device)
    images = subject.normalize.of_images(inputs.images, subject.model.dtype) if inputs.images else {}
    beside = with_image_tokens(subject.model, inputs.input_ids, images) if images else {}
    output: Any = subject.model(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False, **beside
    )
    return output.logits[0][torch.from_numpy(rows)].float().cpu()


# --------------------------------------------------------------------------------------- parts besides the logits


def _parts(subject: Subject) -> Iterator[Finding]:
    """Yield findings on all needed parts: as they arrive in a group, beside those of the sample alone, in process."""
    names = sorted(subject.needs.parts - {"hidden"})
    if not names:
        return
    expected = f"{', '.join(names)} as the model gives them in this process, within rounding"
    score = local_score(subject.model, subject.needs, subject.renderer.image_processor)
    few = subject.renderings[: subject.close]
    for sample, rendering, ours in zip(subject.samples, few, subject.signals(few), strict=False):
        own = score(subject.stacked([rendering])).signals()[0]
        difference = _difference(own, ours, subject.dtype)
        if difference:
            cause = "a part of the signal is changed, cut or reordered on its way"
            seen = f"sample {sample.key}: {difference}"
            yield Finding("parity", seen, expected, "fail", cause, _REMEDY, subject.part)
            return
    yield Finding("parity", f"equal for {len(few)} samples", expected, "ok", part=subject.part)


def _difference(own: Signal | None, ours: Signal | None, dtype: str) -> str | None:
    if own is None or ours is None:
        return None if own is ours else "not finite on one side only"
    return differs(own, ours, dtype)
