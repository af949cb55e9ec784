"""`make teacher`: train easy-VQA's teacher from random weights, evaluate it and the shipped teacher, print one table.

Stage 1 is the vision tower (vision.py); stage 2 is a job without a teacher (teacher.yaml), which freezes the tower.
"""

from pathlib import Path
from typing import cast

import torch
import typer
from transformers import AutoModelForImageTextToText

from betakd_ray.cli import Overrides, exit_codes, print_result
from betakd_ray.evaluation.run import Evaluation
from betakd_ray.job import BetaKDJob
from betakd_ray.models.student import student_config
from betakd_ray.on_ray.cluster import connected
from betakd_ray.spec import ConfigInit, JobSpec, load_spec
from betakd_ray.storage import whole_folder
from jobs.easy_vqa.data import evaluation, pack_once
from jobs.easy_vqa.samples import easy_vqa_samples
from jobs.easy_vqa.vision import labels, make_processor, train_tower

HERE = Path(__file__).parent


def main(overrides: Overrides = []) -> None:  # noqa: B006 (typer's way)
    """Do all steps up to the table. Steps that an earlier run finished are skipped."""
    with exit_codes():
        spec = load_spec(HERE / "teacher.yaml", overrides)
        pack_once("clean", "test")
        make_vision(spec)
        with connected(spec):
            result = BetaKDJob(spec).fit()
            models = {"shipped": str(HERE / "teacher"), "new": result.model}
            scored = Evaluation(evaluation(models, output=result.path)).result()
        print_result(scored)
        print(f"The new teacher: {result.model}")


def make_vision(spec: JobSpec) -> None:
    """Write the folder that the spec starts from: processor, trained vision tower, and other weights still random."""
    folder = Path(cast(ConfigInit, spec.student.init).processor)
    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(spec.training.seed)
    samples = list(easy_vqa_samples("train"))
    processor = make_processor(samples)
    model = AutoModelForImageTextToText.from_config(student_config(spec.student))
    train_tower(model.model.vision_tower, processor, labels(samples))
    with whole_folder(folder) as written:
        processor.save_pretrained(written)
        model.save_pretrained(written)


if __name__ == "__main__":
    typer.run(main)
