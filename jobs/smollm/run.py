"""`make smollm`: make a teacher of a real language model and a real vision tower; distil it into 6 of its 30 layers.

The steps are: warm-up of the projector on captions, instruction tuning of the teacher, a student trained without the
teacher and one with it, and one table of the three. Steps that an earlier run finished are skipped. A step that it
began continues from its last checkpoint.
"""

import math
from pathlib import Path

from safetensors import safe_open

from betakd_ray.cli import exit_codes, print_result
from betakd_ray.evaluation.run import Evaluation
from betakd_ray.job import BetaKDJob
from betakd_ray.on_ray.cluster import connected
from betakd_ray.spec import load_spec
from jobs.easy_vqa.data import TEST, evaluation, pack_once
from jobs.easy_vqa.run import without_teacher
from jobs.smollm.parts import write_language_model, write_vision_tower, write_with_fewer_layers

HERE = Path(__file__).parent
PARTS = Path("runs/smollm/parts")
IMAGE_SIZE = 42
LAYERS = 6


def main() -> None:
    """Do all steps, from the two packages to the table."""
    pack_once("captions", "noiseless", "noisy", "test")
    write_language_model(PARTS / "language_model")
    write_vision_tower(PARTS / "vision_tower", IMAGE_SIZE)
    warmup, teacher, distilled = (load_spec(HERE / f"{name}.yaml") for name in ("warmup", "teacher", "distill"))
    with connected(distilled):
        BetaKDJob(warmup).fit()
        models = {"teacher": BetaKDJob(teacher).fit().model}
        write_with_fewer_layers(Path(models["teacher"]), LAYERS, PARTS / "student")
        models["CE only"] = BetaKDJob(without_teacher(distilled, "ce")).fit().model
        models["distilled"] = BetaKDJob(distilled).fit().model
        data = {"train": TEST, "template": "chat", "system_prompt": ""}
        asked = evaluation(models, "runs/smollm", data=data, limit=1000, batch_size=50)
        scored = Evaluation(asked).result()
    print_result(scored)
    for label, folder in models.items():
        print(f"  {label:10} {parameters(Path(folder)) / 1e6:.1f} M parameters, {folder}")


def parameters(model: Path) -> int:
    """Return the number of parameters of a saved model."""
    with safe_open(model / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)


if __name__ == "__main__":
    with exit_codes():
        main()
