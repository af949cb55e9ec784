"""Export of the trained student as a Hugging Face folder for `from_pretrained`.

Only a MobileVLM needs this package in order to be loaded.
"""

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
from betakd_ray.run.folder import CARD, MODEL
from betakd_ray.run.lease import Permit
from betakd_ray.run.records import ModelRecord
from betakd_ray.spec import JobSpec, StorageSpec, StudentSpec
from betakd_ray.storage import join, open_store, put_file
from betakd_ray.train.card import Snippet, model_card
from betakd_ray.train.check_files import read_checks
from betakd_ray.train.distiller import Distiller
from betakd_ray.train.prompt import generation_settings, save_prompt

PREFIX = "student."


def export_student(
    engine: Any, spec: JobSpec, permit: Permit, metrics: dict[str, Any], group: Any = None, *, step: int = 0
) -> None:
    """Write a DeepSpeedEngine's student to RUN/model (collective: every rank must call it).

    The folder has weights (safetensors), config, processor with the prompt of training, generation settings and model
    card. The other ranks wait in `group` for rank 0's upload; by default this is the group of all ranks. `step` is the
    model's; `metrics` may be of an earlier one, which was logged. Raises RunTaken if another driver has taken the run
    over.
    """
    state = _student_state(engine, spec)
    if dist.get_rank() == 0 and state is not None:
        distiller = cast(Distiller, engine.module)
        with temporary_folder("export") as folder:
            with disk_errors(folder):
                record = ModelRecord(permit.token, step)
                _write_beside(distiller.student, spec, folder, metrics, record, permit)
                _save(distiller.student, state, spec.student, str(folder))
            permit.check()
            _upload(folder, join(permit.run, MODEL), permit.storage)
    dist.barrier(group=group)


def _write_beside(
    model: PreTrainedModel, spec: JobSpec, folder: Path, metrics: dict[str, Any], record: ModelRecord, permit: Permit
) -> None:
    """Write what a model's folder has beside weights and configuration; set the model's generation settings."""
    processor = student_processor(spec.student)
    own = getattr(model, "generation_config", None)
    # In place of those that the student started with: transformers refuses to save some of them, e.g. a temperature
    # without sampling, and then the whole result would be lost.
    model.generation_config = generation_settings(processor, spec.data, model.config, own)
    record = save_prompt(folder, processor, spec.data, record)
    checks = read_checks(permit) if spec.teacher else None
    snippet = Snippet.of(processor, model.config, record, sees_images=takes_images(model))
    card = model_card(spec, metrics, checks, snippet=snippet)
    (folder / CARD).write_text(card, encoding="utf-8")


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
