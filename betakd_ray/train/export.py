"""Export of the trained student as a Hugging Face folder for `from_pretrained`.

Only a MobileVLM needs this package in order to be loaded.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from betakd_ray.engine.weights import whole_state
from betakd_ray.leftovers import temporary_folder
from betakd_ray.models.student import student_processor
from betakd_ray.models.vlm import takes_images
from betakd_ray.output import disk_errors, output_errors
from betakd_ray.run.folder import MODEL, MODEL_RECORD
from betakd_ray.run.lease import Permit
from betakd_ray.run.records import Checks, ModelRecord
from betakd_ray.spec import JobSpec, StorageSpec, StudentSpec
from betakd_ray.storage import join, open_store, put_file
from betakd_ray.train.check_files import read_checks
from betakd_ray.train.distiller import Distiller

PREFIX = "student."


def export_student(
    engine: Any, spec: JobSpec, permit: Permit, metrics: dict[str, Any], group: Any = None, *, step: int = 0
) -> None:
    """Write a DeepSpeedEngine's student to RUN/model (collective: every rank must call it).

    The folder has weights (safetensors), config, processor and model card. The other ranks wait in `group` for rank 0's
    upload; by default this is the group of all ranks. `step` is the model's; `metrics` may be of an earlier one, which
    was logged. Raises RunTaken if another driver has taken the run over.
    """
    state = _student_state(engine, spec)
    if dist.get_rank() == 0 and state is not None:
        distiller = cast(Distiller, engine.module)
        with temporary_folder("export") as folder:
            with disk_errors(folder):
                _save(distiller.student, state, spec.student, str(folder))
                student_processor(spec.student).save_pretrained(folder)
                checks = read_checks(permit) if spec.teacher else None
                card = model_card(spec, metrics, checks, sees_images=takes_images(distiller.student))
                (folder / "README.md").write_text(card, encoding="utf-8")
                record = ModelRecord(permit.token, step)
                (folder / MODEL_RECORD).write_text(json.dumps(asdict(record)))
            permit.check()
            _upload(folder, join(permit.run, MODEL), permit.storage)
    dist.barrier(group=group)


def _save(model: PreTrainedModel, state: dict[str, Tensor], student: StudentSpec, folder: str) -> None:
    """Write weights and configuration. Adapters are merged into the weights, or saved beside them."""
    if lora := student.lora:
        from betakd_ray.models.lora import save_adapters, without_adapters

        if not lora.merge:
            save_adapters(model, state, getattr(student.init, "path", None), folder)
        state = without_adapters(state, lora.alpha / lora.r if lora.merge else 0.0)
    model.save_pretrained(folder, state_dict=state)


def _upload(folder: Path, url: str, storage: StorageSpec) -> None:
    filesystem, root = open_store(url, storage)
    with output_errors(url):
        for file in (file for file in folder.rglob("*") if file.is_file()):
            put_file(filesystem, file, join(root, *file.relative_to(folder).parts))


def _student_state(engine: Any, spec: JobSpec) -> dict[str, Tensor] | None:
    """Return the student's own tensors. With ZeRO-3 they are gathered from all ranks, and only rank 0 gets them."""
    state = whole_state(engine, spec.training.zero_stage)
    if state is None:
        return None
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def model_card(
    spec: JobSpec, metrics: dict[str, Any], checks: Checks | None = None, *, sees_images: bool = True
) -> str:
    """Return the model card: what the model is, which models and data it comes from, and how it was trained.

    `checks` are those of the models before the first step.
    """
    kind, task = ("vision–language", "image-text-to-text") if sees_images else ("language", "text-generation")
    teacher = spec.teacher.path if spec.teacher else "none (supervised fine-tuning)"
    channels = ", ".join([*(["ce"] if spec.objective.ce else []), *spec.objective.channels])
    numbers = "\n".join(
        f"| {name} | {value:.5g} |" for name, value in metrics.items() if isinstance(value, (int, float))
    )
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [knowledge-distillation, beta-kd]
---
# {spec.name}

A {kind} model trained with uncertainty-aware knowledge distillation (Beta-KD, arXiv 2603.21426).

| | |
|---|---|
| teacher | `{teacher}` |
| channels | {channels} |
| weighting | {spec.objective.weighting.kind} |
| data | {", ".join(f"`{entry}`" for entry in spec.data.train)} |
| trained parts | {", ".join(spec.student.train)}{_adapted(spec.student)} |
| global batch × epochs | {spec.training.global_batch_size} × {spec.training.epochs} |

## Metrics of the last step

| metric | value |
|---|---|
{numbers}

{_checked(spec, checks)}## The whole job

```json
{spec.model_dump_json(indent=2)}
```
"""


def _checked(spec: JobSpec, checks: Checks | None) -> str:
    """Return the section about the checks of the models; empty without a teacher."""
    if spec.teacher is None:
        return ""
    if spec.teacher.check == "off":
        return "## Checks before the first step\n\nNone: the spec has `teacher.check: off`.\n\n"
    if checks is None:
        return "## Checks before the first step\n\nNone are noted in the run.\n\n"
    rows = "\n".join(
        f"| {' | '.join(map(_cell, (each.part, each.check, each.seen, each.expected, each.verdict)))} |"
        for each in checks.findings
    )
    return f"""## Checks before the first step

Teacher on {checks.teacher}.

| model | check | seen | expected | verdict |
|---|---|---|---|---|
{rows}

"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _adapted(student: StudentSpec) -> str:
    if not student.lora:
        return ""
    place = "merged" if student.lora.merge else "in separate files: without peft, transformers does not load them"
    return f"; the language model with adapters of rank {student.lora.r} ({place})"
