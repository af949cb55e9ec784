"""Check that the spec's template is the one that the teacher was trained with."""

from collections.abc import Iterator

import torch
from torch import Tensor

from betakd_ray.check.answers import Truth
from betakd_ray.check.finding import Finding
from betakd_ray.check.measures import is_positive
from betakd_ray.check.subject import Subject
from betakd_ray.data.samples import Unrenderable
from betakd_ray.errors import UserError
from betakd_ray.spec import DataSpec

MUCH = 0.1
"""Gain in the mean probability of the true tokens from which another template is much better."""
SIGMAS = 4.0


def check_template(subject: Subject) -> list[Finding]:
    """Return a finding on the true answers' probability under the spec's template beside others.

    The others are the processor's own chat template, `vicuna_v1` and `plain`, without a system prompt and with theirs.
    """
    own = Truth.of(subject, subject.renderings).right(subject, subject.hidden)
    expected = f"no other template with a probability of the true answers higher by {MUCH} or more"
    ours = _name(subject.data)
    seen, tried = f"{ours} {float(own.nanmean()):.2f}", 0
    if not subject.is_trained:
        return [Finding("template", seen, expected, "skipped", "a model with random weights", part=subject.part)]
    best, best_gain = "", 0.0
    for data in _others(subject.data):
        gain = _gain(subject, data, own)
        if gain is None:
            continue
        tried += 1
        seen += f", {_name(data)} {float((own + gain).nanmean()):.2f}"
        mean = float(gain.nanmean())
        if mean > max(MUCH, best_gain) and is_positive(gain, SIGMAS):
            best, best_gain = _name(data), mean
    if best:
        # `plain` is right for the warm-up of a projector, whatever the teacher was trained with.
        verdict = "doubt" if subject.data.template == "plain" or not subject.knows_answers else "fail"
        cause = f"the teacher was trained with another template: {best} is much better than {ours}"
        remedy = "Set data.template and data.system_prompt to it."
        return [Finding("template", seen, expected, verdict, cause, remedy, subject.part)]
    return [Finding("template", seen, expected, "ok" if tried else "skipped", part=subject.part)]


def _others(data: DataSpec) -> Iterator[DataSpec]:
    for template in ("chat", "vicuna_v1", "plain"):
        for system in dict.fromkeys((None, "", data.system_prompt)):
            if (template, system) != (data.template, data.system_prompt) and (template != "plain" or system is None):
                yield data.model_copy(update={"template": template, "system_prompt": system})


def _gain(subject: Subject, data: DataSpec, own: Tensor) -> Tensor | None:
    """Return by how much each sample's true tokens are more probable with another template; None if it fails."""
    try:
        renderer = subject.renderer.with_text_of(data)
        renderings = [renderer.render(each) for each in subject.samples]
    except (UserError, Unrenderable):  # the processor has no chat template, or the samples do not fit it
        return None
    if all((a.input_ids.tolist() == b.input_ids.tolist()) for a, b in zip(renderings, subject.renderings, strict=True)):
        return None
    gain = Truth.of(subject, renderings).right(subject, subject.ask(renderings)) - own
    return gain if torch.isfinite(gain).any() else None


def _name(data: DataSpec) -> str:
    system = {None: "its system prompt", "": "no system prompt"}.get(data.system_prompt, "your system prompt")
    return f"{data.template} ({system})"
