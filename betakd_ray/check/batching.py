"""Check that a sample gets the same signal whatever it is asked with, and whenever it is asked."""

from collections.abc import Sequence

import torch
from torch import Tensor

from betakd_ray.check.finding import Finding
from betakd_ray.check.measures import divergence, relative_difference
from betakd_ray.check.parity import TOLERANCE
from betakd_ray.check.subject import ALONE, Subject, with_images


def check_batching(subject: Subject) -> list[Finding]:
    """Return findings on samples asked alone, again, in the opposite order, and with their images in another order."""
    expected = f"one answer to one sample within {TOLERANCE[subject.dtype]:g} ({subject.dtype}), alone and among others"
    renderings = subject.renderings[:ALONE]
    alone = subject.alone
    for case, cause, other in (
        ("asked twice", "the teacher is in training mode (dropout), or its kernels are not deterministic", None),
        ("in a padded group", "padding or neighbours change a sample's states (attention mask, positions)", renderings),
        (
            "in a group in the opposite order",
            "images or rows are given to the wrong sample of a group",
            renderings[::-1],
        ),
    ):
        again = [subject.ask([each])[0] for each in renderings[:2]] if other is None else list(subject.ask(other))
        again = again[::-1] if other is not None and other is not renderings else again
        if seen := _differs(subject, alone, again):
            remedy = "Use engine: transformers, or correct the engine."
            return [Finding("batching", f"{case}: {seen}", expected, "fail", cause, remedy, subject.part)]
    checked = Finding("batching", f"the same for {len(alone)} samples", expected, "ok", part=subject.part)
    return [checked, *_image_order(subject)]


def noise(subject: Subject) -> float:
    """Return the largest divergence in nats between a sample asked alone and in a group: numerical noise."""
    pairs = zip(subject.alone, subject.hidden, strict=False)
    return max(float(divergence(*map(subject.logits, pair)).max()) for pair in pairs)


def _differs(subject: Subject, first: Sequence[Tensor], second: Sequence[Tensor]) -> str:
    for sample, one, other in zip(subject.samples, first, second, strict=False):
        if one.shape != other.shape:
            return f"sample {sample.key} has {len(other)} rows instead of {len(one)}"
        difference = relative_difference(subject.logits(other), subject.logits(one))
        if not difference <= TOLERANCE[subject.dtype]:
            return f"sample {sample.key} differs by {difference:.2g}"
    return ""


def _image_order(subject: Subject) -> list[Finding]:
    """Return a doubt if the order of several images has no effect at all, e.g. as only the first one is seen."""
    several = [sample for sample in subject.samples if len(set(sample.images)) > 1][:ALONE]
    if not several:
        return []
    render = subject.renderer.render
    own = subject.ask([render(each) for each in several])
    swapped = subject.ask([render(with_images(each, each.images[::-1])) for each in several])
    moved = [a.shape != b.shape or not torch.equal(a, b) for a, b in zip(own, swapped, strict=True)]
    expected = "other answers if a sample's images are in another order"
    if any(moved):
        return [Finding("batching", "the order of images matters", expected, "ok", part=subject.part)]
    cause = "only one of a sample's images is seen, or all are averaged"
    return [Finding("batching", "the order of images has no effect", expected, "doubt", cause, "", subject.part)]
