"""Check that no other setting would make the teacher right: each is tried with its usual other values.

The weights of a trained model fit the settings that it was trained with. So a copy whose config.json or processor is
another model's gets better with the right value, and an honest model with none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from betakd_ray.batch.normalization import Normalization
from betakd_ray.check.answers import Truth
from betakd_ray.check.finding import Finding, Verdict
from betakd_ray.check.measures import is_positive
from betakd_ray.check.subject import HIDDEN, Subject, local_score
from betakd_ray.models.vlm import language_model, parts, takes_images

MUCH, SIGMAS = 0.03, 3.5
"""Gain in the mean probability of the true tokens, and its size in standard errors, from which a value is better."""
SLIGHTLY, SIGNS = 0.004, 3.6
"""The same for a value that is better for most samples, but only slightly: nats, and standard errors of a sign test.

Measured on 128 easy-VQA questions (benchmarks/check_thresholds.py), the best of 20 other values for the honest teacher:
0.000 and 0.0 standard errors; for one with half of the labels wrong 0.016 and 0.6; sign tests at most 2.0. With
rope_theta 100: 0.10 and 4.3. With relu or gelu for silu, which costs 0.01 or less: sign tests of 5.9 and 4.1.
"""
MAYBE, MAYBE_SIGMAS = 0.01, 2.3
"""Gain and standard errors, as `MUCH` and `SIGMAS`, from which there is a doubt."""
LEAST = 0.02
"""Probability under which a true token counts as unknown, so that wrong labels do not outweigh all others."""
MOST_SAMPLES = 128
"""Largest number of samples that are asked with each of about 20 other values."""
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu")
THETAS = (1e4, 1e5, 5e5, 1e6)
Trial = Callable[[Subject], Any]
"""Function that returns a context in which a changed subject is yielded."""


def check_settings(subject: Subject) -> list[Finding]:
    """Return a failure that names the setting with which the teacher knows the answers much better."""
    expected = "no other value of a setting that makes the true answers more probable"
    if not subject.is_trained or not subject.knows_answers:
        return [Finding("settings", "cannot be judged", expected, "skipped", "it knows no answers", part=subject.part)]
    base = replace(
        subject,
        samples=subject.samples[:MOST_SAMPLES],
        renderings=subject.renderings[:MOST_SAMPLES],
        needs=HIDDEN,
        score=local_score(subject.model, HIDDEN, subject.renderer.image_processor),
    )
    truth = Truth.of(base, base.renderings)
    own = truth.right(base, base.hidden)
    better: list[_Better] = []
    count = 0
    for name, trial in trials(base):
        with trial(base) as changed:
            other = truth.right(changed, changed.ask(changed.renderings))
        count += 1
        if (verdict := _verdict(own, other)) != "ok":
            better.append(_Better(verdict == "fail", float(_nats(own, other).nanmean()), name))
    seen = f"probability of the true answers {float(own.nanmean()):.3f}; {count} other values tried"
    if not better:
        return [Finding("settings", seen, expected, "ok", part=subject.part)]
    best = max(better)
    cause = f"the checkpoint was trained with another setting: {best.name} is {best.nats:.2g} nats better"
    remedy = "Restore config.json and the processor's files of this checkpoint."
    return [Finding("settings", seen, expected, "fail" if best.fails else "doubt", cause, remedy, subject.part)]


class _Better(NamedTuple):
    fails: bool
    nats: float
    name: str


def _verdict(own: Tensor, other: Tensor) -> Verdict:
    """Return `fail` if the other probabilities of the true answers are surely higher, `doubt` if they may be."""
    gain, nats = other - own, _nats(own, other)
    is_much = float(gain.nanmean()) > MUCH and is_positive(gain, SIGMAS)
    if is_much or (float(nats.nanmean()) > SLIGHTLY and is_positive(gain[gain != 0].sign(), SIGNS)):
        return "fail"
    return "doubt" if float(gain.nanmean()) > MAYBE and is_positive(gain, MAYBE_SIGMAS) else "ok"


def _nats(own: Tensor, other: Tensor) -> Tensor:
    """Return by how much the other log-probabilities are higher [samples], where both are at least `LEAST`."""
    return other.clamp(min=LEAST).log() - own.clamp(min=LEAST).log()


def trials(subject: Subject) -> Iterator[tuple[str, Trial]]:
    """Yield settings to try, by name: what the image processor, rope, activations, norms and rows could be instead."""
    model = subject.model
    if takes_images(model) and subject.with_images:
        yield from _of_images(subject)
        yield from _of_feature_layers(model)
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "default" and rope.get("rope_theta"):
        for theta in THETAS:
            if theta != rope["rope_theta"]:
                yield f"rope_theta {theta:g}", _rope(language_model(model), rope["rope_theta"], theta)
    for part, modules in parts(model).items():
        now = {type(child) for module in modules for child in module.modules()}
        for name in ACTIVATIONS if now & {type(ACT2FN[each]) for each in ACTIVATIONS} else ():
            if type(ACT2FN[name]) in now:
                continue
            yield f"activation {name} in the {part.replace('_', ' ')}", _activation(modules, name)
    yield "a norm's epsilon of 1e-6", _epsilon(language_model(model))
    for what, module in (("embedding", model.get_input_embeddings()), ("lm_head", model.get_output_embeddings())):
        for by in (1, -1):
            yield f"rows of the {what} moved by {by:+d}", _moved(module, by, is_head=what == "lm_head")


def _of_images(subject: Subject) -> Iterator[tuple[str, Trial]]:
    now = subject.normalize
    for name, (mean, std) in {"CLIP's": CLIP, "ImageNet's": IMAGENET, "one half as": HALF}.items():
        for scale in dict.fromkeys((now.scale, 1 / 255)):
            other = Normalization(scale, mean, std)
            if other != now:
                yield f"{name} image_mean and image_std, rescale_factor 1/{1 / scale:.0f}", _normalized(other)
    if now != (none := Normalization(1 / 255, (0.0,) * 3, (1.0,) * 3)):
        yield "no normalisation of images", _normalized(none)
    yield "images in BGR", _reversed_channels


def _of_feature_layers(model: Any) -> Iterator[tuple[str, Trial]]:
    now = getattr(model.config, "vision_feature_layer", None)
    if isinstance(now, int):
        for layer in (-1, -2, -3):
            if layer != now and getattr(model.config.vision_config, "num_hidden_layers", 0) >= -layer:
                yield f"vision_feature_layer {layer}", _feature_layer(layer)


def _normalized(other: Normalization) -> Trial:
    @contextmanager
    def trial(subject: Subject) -> Iterator[Subject]:
        yield replace(subject, score=local_score(subject.model, HIDDEN, None, normalize=other))

    return trial


@contextmanager
def _reversed_channels(subject: Subject) -> Iterator[Subject]:
    score = subject.score

    def reversed_score(inputs: Any) -> Any:
        pixels = inputs.images.get("pixel_values")
        if pixels is None or pixels.ndim < 4:
            return score(inputs)
        flipped = pixels[..., ::-1, :, :].copy()
        return score(replace(inputs, images={**inputs.images, "pixel_values": flipped}))

    yield replace(subject, score=reversed_score)


def _feature_layer(layer: int) -> Trial:
    @contextmanager
    def trial(subject: Subject) -> Iterator[Subject]:
        with _set((subject.model.config, "vision_feature_layer", layer)):
            yield subject

    return trial


def _rope(language: nn.Module, now: float, theta: float) -> Trial:
    @contextmanager
    def trial(subject: Subject) -> Iterator[Subject]:
        # A frequency is theta to the power of -2i/d, so its power log(theta') / log(theta) is that of theta'.
        power = log(theta) / log(now)
        modules = list(language.modules())
        frequencies = [getattr(each, "inv_freq", None) for each in modules]
        pairs = zip(modules, frequencies, strict=True)
        with _set(*((each, "inv_freq", old**power) for each, old in pairs if isinstance(old, torch.Tensor))):
            yield subject

    return trial


def _activation(modules: list[nn.Module], name: str) -> Trial:
    @contextmanager
    def trial(subject: Subject) -> Iterator[Subject]:
        kinds = tuple(type(ACT2FN[each]) for each in ACTIVATIONS)
        places = [
            (module, at, ACT2FN[name])
            for top in modules
            for module in top.modules()
            for at, child in module.named_children()
            if isinstance(child, kinds) and type(child) is not type(ACT2FN[name])
        ]
        with _set(*places):
            yield subject

    return trial


def _epsilon(language: nn.Module) -> Trial:
    @contextmanager
    def trial(subject: Subject) -> Iterator[Subject]:
        norms = [each for each in language.modules() if isinstance(getattr(each, "variance_epsilon", None), float)]
        with _set(*((each, "variance_epsilon", 1e-6) for each in norms)):
            yield subject

    return trial


def _moved(module: nn.Linear | nn.Embedding, by: int, *, is_head: bool) -> Trial:
    @contextmanager
    def trial(subject: Subject) -> Iterator[Subject]:
        other = nn.Parameter(module.weight.detach().roll(by, 0), requires_grad=False)
        is_tied = subject.model.get_input_embeddings().weight is subject.model.get_output_embeddings().weight
        # Students read a tied head from the same rows.
        head = other.detach().cpu() if is_head or is_tied else subject.head
        with _set((module, "weight", other)):
            yield replace(subject, head=head)

    return trial


@contextmanager
def _set(*values: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes, and set their former values at the end."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
