"""The model card of a result: what it is, how it is asked, and what it was made from, fit to be published."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from betakd_ray.models.padding import backend
from betakd_ray.run.records import Checks, ModelRecord
from betakd_ray.spec import CheckpointInit, JobSpec, PartsInit, StudentSpec
from betakd_ray.spec.base import is_plugin
from betakd_ray.train.origin import Origin, last_part, origin_of

PLACE = "FOLDER-OR-HUB-ID"
"""Text in a card that stands for the model's own address, which is known when it is pushed."""
SCORES = "## Scores"
_LOCAL = re.compile(r"(?<![\w/:.~])(?:file://)?~?(?:/[^\s/'\"|`<>:,;()]+)+/([^\s/'\"|`<>:,;()]*)")
"""Pattern of an absolute path of at least two parts."""
_SHOWN_METRICS = re.compile(r"step|samples|loss|(energy|beta)/.*|eval/(loss|top1_agreement|energy/.*)")
_HIDDEN_SECTIONS = {"name", "output", "cluster", "tracking"}
_HIDDEN_FIELDS = {"path", "storage", "cache", "train", "language_model", "vision_tower", "processor"}


@dataclass(frozen=True)
class Snippet:
    """What the lines of code need to know that ask a result with transformers."""

    sees_images: bool = True
    backend: str | None = "pil"
    """Which image processing training used (`models.padding.backend`); None for that which transformers chooses."""
    needs_package: bool = False
    """Whether transformers learns the family only from this package."""
    has_prompt: bool = True
    is_padded: bool = True

    @classmethod
    def of(cls, processor: Any, config: Any, record: ModelRecord, *, sees_images: bool) -> "Snippet":
        """Return what is needed for a model with this processor, configuration and record."""
        images = getattr(processor, "image_processor", None)
        # A processor that also takes videos cannot be told: it would ask for the same kind of video processing.
        is_chosen = images is None or getattr(processor, "video_processor", None) is not None
        return cls(
            sees_images=sees_images,
            backend=None if is_chosen else backend(images),
            needs_package=config.model_type == "mobilevlm_v2",
            has_prompt=record.has_prompt,
            is_padded=not record.pad_to_square,
        )

    def code(self) -> str:
        """Return the lines of Python, with `PLACE` for the model."""
        family = "import betakd_ray.models.mobilevlm  # pip install betakd-ray\n" if self.needs_package else ""
        chosen = f', backend="{self.backend}")  # the image processing of training' if self.backend else ")"
        return family + (_WITH_IMAGE.replace("BACKEND", chosen) if self.sees_images else _WITH_TEXT)


_WITH_IMAGE = f"""\
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{PLACE}"BACKEND
model = AutoModelForImageTextToText.from_pretrained("{PLACE}")
content = [{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": "What is in the image?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True).strip())
"""
_WITH_TEXT = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{PLACE}")
model = AutoModelForCausalLM.from_pretrained("{PLACE}")
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "What is a square?"}}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True).strip())
"""


@dataclass(frozen=True)
class Score:
    """One number of an evaluation, with its 95% interval if it is known."""

    metric: str
    value: float
    interval: tuple[float, float] | None = None


def model_card(
    spec: JobSpec, metrics: dict[str, Any], checks: Checks | None = None, *, snippet: Snippet | None = None
) -> str:
    """Return the model card of a run's result. It names no local path, only the last parts of them.

    `checks` are those of the models before the first step.
    """
    snippet = snippet or Snippet()
    bases = [origin_of(path, revision, spec.student.init.storage) for path, revision in _bases(spec.student)]
    teacher = spec.teacher and origin_of(spec.teacher.path, spec.teacher.revision, spec.teacher.storage)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if snippet.sees_images else "text-generation",
        tags=["knowledge-distillation", "beta-kd"],
        base_model=sorted({each for base in bases for each in base.hub_ids}) or None,
        license=_common_licence(bases),
    )
    kind = "vision–language" if snippet.sees_images else "language"
    sections = [
        f"---\n{data.to_yaml()}\n---\n# {spec.name}",
        f"A {kind} model trained with uncertainty-aware knowledge distillation (Beta-KD, arXiv 2603.21426).",
        _asked(snippet),
        _made_from(spec, bases, teacher or None),
        _last_step(metrics),
        _checked(spec, checks),
        f"## Settings other than the defaults\n\n```yaml\n{_settings(spec)}```",
    ]
    return without_local_paths("\n\n".join(each for each in sections if each) + "\n")


def with_scores(card: str, questions: str, scores: Sequence[Score]) -> str:
    """Return a card with a table of scores, in place of an earlier one, and with the scores in its metadata."""
    made = ModelCard(card, ignore_metadata_errors=True)
    task = made.data.get("pipeline_tag") or "text-generation"
    made.data.eval_results = [  # pyright: ignore[reportAttributeAccessIssue]
        EvalResult(
            task_type=task,
            dataset_type="other",
            dataset_name=questions,
            metric_type=each.metric,
            metric_value=round(each.value, 4),
        )
        for each in scores
    ]
    made.data.model_name = _title(made.text)  # pyright: ignore[reportAttributeAccessIssue]
    table = "\n".join(f"| {each.metric} | {each.value:.4g} | {_interval(each)} |" for each in scores)
    section = f"{SCORES}\n\nOn {questions}.\n\n| metric | value | 95% interval |\n|---|---|---|\n{table}\n\n"
    text = re.sub(rf"{SCORES}\n.*?(?=\n## |\Z)\n?", "", made.text, flags=re.DOTALL)
    before, heading, after = text.partition("## Made from")
    return f"---\n{made.data.to_yaml()}\n---\n{(before + section + heading + after).strip()}\n"


def without_local_paths(text: str) -> str:
    """Return a text with the last parts of its absolute paths only: the rest may name people and machines."""
    return _LOCAL.sub(lambda found: found[1] or "…", text)


def _asked(snippet: Snippet) -> str:
    if not snippet.has_prompt:
        return (
            "## Ask it\n\nIts prompt is made by a function of the training code, which transformers cannot run. Use "
            "`betakd ask` and the folder of the run."
        )
    note = "" if snippet.is_padded else "Pad an image to a square with the processor's mean colour first.\n\n"
    return f"## Ask it\n\n{note}```python\n{snippet.code()}```\n\nOr `betakd ask {PLACE}`."


def _made_from(spec: JobSpec, bases: Sequence[Origin], teacher: Origin | None) -> str:
    objective = spec.objective
    rows = {
        "student": "; ".join(map(str, bases)) or "random weights",
        "teacher": str(teacher) if teacher else "none (supervised fine-tuning)",
        "licence": _common_licence(bases) or "unknown",
        "data": ", ".join(f"`{_shown(str(entry))}`" for entry in spec.data.train),
        "prompt": f"`{spec.data.template}`" if not is_plugin(spec.data.template) else "a function of its own",
        "objective": ", ".join([*(["ce"] if objective.ce else []), *objective.channels]),
        "weighting": objective.weighting.kind,
        "trained parts": ", ".join(spec.student.train) + _adapted(spec.student),
        "global batch × epochs": f"{spec.training.global_batch_size} × {spec.training.epochs}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"## Made from\n\n| | |\n|---|---|\n{table}"


def _bases(student: StudentSpec) -> list[tuple[str, str | None]]:
    """Return path and revision of each model whose weights the student started with."""
    init = student.init
    if isinstance(init, CheckpointInit):
        return [(init.path, init.revision)]
    if isinstance(init, PartsInit):
        return [(init.language_model, None), (init.vision_tower, None)]
    return [(init.vision_tower, None)] if init.vision_tower else []


def _common_licence(bases: Sequence[Origin]) -> str:
    """Return the licence that all of the models have, `other` for several, `unknown` if one is not known."""
    licences = {base.licence for base in bases}
    if not licences or None in licences:
        return "unknown"
    return "other" if len(licences) > 1 else str(licences.pop())


def _last_step(metrics: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {value:.5g} |"
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and _SHOWN_METRICS.fullmatch(name)
    ]
    return "\n".join(["## Last logged step", "", "| metric | value |", "|---|---|", *rows]) if rows else ""


def _checked(spec: JobSpec, checks: Checks | None) -> str:
    """Return the section about the checks of the models; empty without a teacher."""
    if spec.teacher is None:
        return ""
    title = "## Checks before the first step\n\n"
    if spec.teacher.check == "off":
        return f"{title}None: the spec has `teacher.check: off`."
    if checks is None:
        return f"{title}None are noted in the run."
    rows = "\n".join(
        f"| {' | '.join(map(_cell, (each.part, each.check, each.seen, each.expected, each.verdict)))} |"
        for each in checks.findings
    )
    table = f"| model | check | seen | expected | verdict |\n|---|---|---|---|---|\n{rows}"
    # Without the name of the machine, which comes first.
    return f"{title}Teacher on {checks.teacher.partition(' ')[2].strip('()')}.\n\n{table}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _adapted(student: StudentSpec) -> str:
    if not student.lora:
        return ""
    place = "merged" if student.lora.merge else "in separate files: without peft, transformers does not load them"
    return f"; the language model with adapters of rank {student.lora.r} ({place})"


def _settings(spec: JobSpec) -> str:
    changed = spec.model_dump(mode="json", exclude_defaults=True, exclude=_HIDDEN_SECTIONS)
    return yaml.safe_dump(_published(changed), sort_keys=False, allow_unicode=True)


def _published(value: Any) -> Any:
    """Return settings without places, which are named elsewhere in the card or are nobody else's business."""
    if isinstance(value, dict):
        kept = {name: _published(each) for name, each in value.items() if name not in _HIDDEN_FIELDS}
        return {name: each for name, each in kept.items() if each not in ({}, [])}
    if isinstance(value, list):
        return [_published(each) for each in value]
    return _shown(value) if isinstance(value, str) else value


def _shown(place: str) -> str:
    """Return the last part of a local path; any other text as it is."""
    return last_part(place) if place.startswith(("/", "file://")) else place


def _interval(score: Score) -> str:
    return f"{score.interval[0]:.4g} … {score.interval[1]:.4g}" if score.interval else "not known"


def _title(text: str) -> str:
    found = re.search(r"^# (.+)$", text, flags=re.MULTILINE)
    return found[1] if found else "model"
