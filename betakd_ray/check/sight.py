"""Check that the teacher sees: its answers move with the image, and towards the truth with the right one."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from betakd_ray.batch.sample import Rendering
from betakd_ray.check.answers import Answers, answers_of, right
from betakd_ray.check.batching import noise
from betakd_ray.check.finding import Finding
from betakd_ray.check.measures import divergence, is_negative, is_positive
from betakd_ray.check.subject import Subject, with_images
from betakd_ray.data.samples import Unrenderable
from betakd_ray.models.vlm import parts, takes_images

ABOVE_NOISE = 10.0
"""Factor by which the effect of an image must exceed the numerical noise of one sample alone and in a group."""
FAINT = 1e-3
"""Nats of mean effect of another image under which a trained teacher hardly looks. Honest: 2.0 nats (easy-VQA)."""
SHARE = 0.4
"""Smallest share of its expected gain that the right image brings to a teacher that sees.

A calibrated teacher gains exactly what it expects: 1. Wrong labels lower the share by their fraction, so half of the
labels may be wrong: 0.47 in the easy-VQA job with 50% noise. A tower whose features mean something else: 0 or less.
"""


def check_sight(subject: Subject) -> list[Finding]:
    """Return findings on the effect of a sample's image, beside another sample's, a blank one and none."""
    expected = "answers to image questions that depend on the image, towards the true ones with the right image"
    if not takes_images(subject.model) or not subject.with_images:
        why = "no sample has an image" if takes_images(subject.model) else "a language model"
        return [Finding("sight", why, expected, "skipped", part=subject.part)]
    if not all(each.isfinite().all() for each in subject.hidden):
        return [Finding("sight", "states are not finite", expected, "skipped", part=subject.part)]
    stage, seen = dead_stage(subject)
    if stage:
        cause = f"{stage}: images make no difference after it (weights lost, zero, or outputs overwritten)"
        remedy = f"Fetch the checkpoint again; look at the weights of the {stage}."
        return [Finding("sight", seen, expected, "fail", cause, remedy, subject.part)]
    return [_effect(subject, expected)]


def _effect(subject: Subject, expected: str) -> Finding:
    swapped = _swapped(subject)
    at = [*swapped] or subject.with_images
    own = [subject.hidden[each] for each in at]
    other = subject.ask([*swapped.values()]) if swapped else _asked(subject, at, _blank)
    moved = _moved(subject, own, other)
    floor = ABOVE_NOISE * noise(subject) + 1e-9
    seen = f"another image moves the answers by {float(moved.mean()):.2g} nats, noise {floor / ABOVE_NOISE:.1g}"
    trained = subject.is_trained
    remedy = "Compare its files with the source's; try the teacher on a few images yourself."

    def finding(verdict: Any, cause: str = "", more: str = "") -> Finding:
        return Finding("sight", seen + more, expected, verdict, cause, remedy if cause else "", subject.part)

    if not float(moved.max()) > floor:
        return finding("fail" if trained else "doubt", "the teacher is blind: its answers do not depend on the image")
    if not trained:
        return finding("doubt", "a model with random weights: what it sees cannot be judged")
    if float(moved.mean()) < FAINT:
        return finding("doubt", "the image has hardly an effect: the questions need none, or the tower is weak")
    if not swapped or not subject.knows_answers:
        return finding("ok")
    of_own = answers_of(subject, [subject.renderings[each] for each in at], own)
    of_other = answers_of(subject, [*swapped.values()], other)
    gain, expects = right(of_own) - right(of_other), _expected(of_own, of_other)
    gains = f"{float(gain.nanmean()):+.3f}, expected {float(expects.nanmean()):+.3f}"
    more = f"; the right image raises the probability of the true answers by {gains}"
    if is_negative(gain - SHARE * expects, sigmas=3.0):
        return finding("fail", "the teacher sees something, but not what is in the image: projector or tower belong to "
                       "another model, or images and questions are not paired", more)  # fmt: skip
    if not is_positive(gain):
        return finding("doubt", "the right image is no better than another one", more)
    return finding("ok", more=more)


def effect_of_images(subject: Subject) -> float:
    """Return the mean divergence in nats between answers with the own image and with another sample's."""
    swapped = _swapped(subject)
    return float(_moved(subject, [subject.hidden[at] for at in swapped], subject.ask([*swapped.values()])).mean())


def _moved(subject: Subject, own: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Return the mean divergence in nats between the answers of each sample [samples]."""
    pairs = zip(subject.each_logits(own), subject.each_logits(other), strict=True)
    return torch.stack([divergence(*_same(a, b)).mean() for a, b in pairs]).cpu()


def _swapped(subject: Subject) -> dict[int, Rendering]:
    """Return the samples with another sample's images, by their positions; without those for which there are none."""
    found = {at: _with_other_images(subject, at) for at in subject.with_images}
    return {at: each for at, each in found.items() if each is not None}


def _with_other_images(subject: Subject, at: int) -> Rendering | None:
    """Return a sample with the images of the next one that has as many, and others; None if there is none."""
    images, samples = subject.samples[at].images, subject.samples
    for step in range(1, len(samples)):
        other = samples[(at + step) % len(samples)].images
        if len(other) == len(images) and other != images:
            try:
                return subject.renderer.render(with_images(samples[at], other))
            except Unrenderable:  # longer than max_length with this image
                continue
    return None


def _asked(subject: Subject, at: Sequence[int], change: Callable[[bytes], bytes]) -> list[Tensor]:
    changed = [with_images(subject.samples[each], [*map(change, subject.samples[each].images)]) for each in at]
    return subject.ask([subject.renderer.render(each) for each in changed])


def _blank(image: bytes) -> bytes:
    """Return a grey image of the same size."""
    with Image.open(BytesIO(image)) as opened:
        size = opened.size
    buffer = BytesIO()
    Image.new("RGB", size, (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def _same(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    count = min(len(first), len(second))
    return first[:count], second[:count]


def _expected(own: Sequence[Answers], swapped: Sequence[Answers]) -> Tensor:
    return torch.stack([a.expected_gain(b) for a, b in zip(own, swapped, strict=True)])


# ------------------------------------------------------------------------------------------- where images are lost


def dead_stage(subject: Subject) -> tuple[str, str]:
    """Return the first stage whose output is the same for a sample's image and a noise image, and what was seen."""
    at = subject.with_images[0]
    sample = subject.samples[at]
    noisy = with_images(sample, [_noise(image) for image in sample.images])
    first, second = subject.renderer.render(sample).images, subject.renderer.render(noisy).images
    if _equal(first, second):
        return "image processor", "the pixels of two different images are the same"
    inside = parts(subject.model)
    outputs = []
    for rendering in (subject.renderings[at], replace(subject.renderings[at], images=second)):
        with _caught([inside["vision_tower"][0], inside["projector"][-1]]) as caught:
            try:
                subject.own_ask([rendering])
            except (ValueError, RuntimeError):  # the other image has another number of tokens
                return "", ""
        outputs.append(caught)
    for stage, one, other in zip(("vision tower", "projector"), *outputs, strict=True):
        if one and other and all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(one, other, strict=False)):
            return stage, f"the output of the {stage} is the same for two different images"
    return "", ""


def _equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(first[name].shape == second[name].shape and bool((first[name] == second[name]).all()) for name in first)


def _noise(image: bytes) -> bytes:
    """Return an image of noise of the same size."""
    with Image.open(BytesIO(image)) as opened:
        size = opened.size
    buffer = BytesIO()
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(1))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _caught(modules: Sequence[torch.nn.Module]) -> Any:
    """Yield a list for each module, which gets the tensors that it returns in the block."""
    caught: list[list[Tensor]] = [[] for _ in modules]
    handles = [
        module.register_forward_hook(lambda _m, _i, output, found=found: found.extend(_tensors(output)))
        for module, found in zip(modules, caught, strict=True)
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    return [each for each in values if isinstance(each, Tensor)]
