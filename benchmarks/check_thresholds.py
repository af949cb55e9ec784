"""What honest teachers show in the checks of `betakd_ray.check`: `python -m benchmarks.check_thresholds`, some minutes.

Each threshold of a check lies between these numbers and those of the sabotaged teachers in tests/unit/test_sabotage.py.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from betakd_ray.check.batching import noise
from betakd_ray.check.keeping import KeepingRenderer
from betakd_ray.check.measures import relative_difference
from betakd_ray.check.parity import full_logits
from betakd_ray.check.sight import effect_of_images
from betakd_ray.check.subject import HIDDEN, Subject, local_score
from betakd_ray.check.weights import SMALLEST, spectral_ratio, spectral_ratios
from betakd_ray.models.load import load_model
from betakd_ray.models.vlm import lm_head
from betakd_ray.spec import DataSpec, TeacherSpec
from tests.families import FAMILIES, build
from tests.sabotage import conversations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEACHER = Path(__file__).parents[1] / "jobs/easy_vqa/teacher"


def subject(name: str, dtype: torch.dtype, seed: int, samples: int) -> Subject:
    """Return a random model of a family with samples of several forms."""
    family = FAMILIES[name]
    model, processor = build(family.config(), seed=seed).to(dtype), family.processor()
    system = None if family.template == "chat" else ""
    data = DataSpec(train=("/x",), template=family.template, system_prompt=system, pad_to_square=False)
    renderer, drawn = KeepingRenderer(processor, data), tuple(conversations(samples, seed))
    renderings = tuple(map(renderer.render, drawn))
    score, head = local_score(model, HIDDEN, renderer.image_processor), lm_head(model).weight.detach()
    return Subject(model, renderer, data, drawn, renderings, HIDDEN, score, head, 8192)


def rounding(given: Subject) -> tuple[float, float, float]:
    """Return the largest difference of logits from the model's own, the noise, and an image's effect, in nats."""
    gaps = []
    for _, rendering, hidden in given.few:
        ours, full = given.logits(hidden), full_logits(given, rendering)
        gaps.append(relative_difference(ours - ours.mean(-1, keepdim=True), full - full.mean(-1, keepdim=True)))
    return max(gaps), noise(given), effect_of_images(given)


def rows(seeds: int, samples: int, names: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield one row of the table for each family and dtype."""
    for name, dtype in product(names, DTYPES):
        found = [rounding(subject(name, dtype, seed, samples)) for seed in range(seeds)]
        worst, loudest = max(each[0] for each in found), max(each[1] for each in found)
        yield (
            name,
            str(dtype).removeprefix("torch."),
            f"{worst:.1e}",
            f"{loudest:.1e}",
            f"{min(f[2] for f in found):.1e}",
        )


def random_ratio(draws: int) -> float:
    """Return the largest spectral ratio of matrices of independent entries."""
    generator = torch.Generator().manual_seed(0)
    shapes = product((SMALLEST, 32, 128), (SMALLEST, 64, 512))
    return max(
        spectral_ratio(made)
        for shape in shapes
        for _ in range(draws)
        for made in (torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) - 0.5)
    )


def main(*, miniature: bool = False) -> None:
    """Print the table."""
    names = ["llava", "qwen3_vl"] if miniature else list(FAMILIES)
    table = Table("family", "dtype", "logits", "noise (nats)", "an image (nats)")
    for row in rows(1 if miniature else 5, 4 if miniature else 8, names):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"spectral ratio of random matrices: at most {random_ratio(3 if miniature else 100):.2f}")
    trained = sorted(spectral_ratios(load_model(TeacherSpec(path=str(TEACHER)))).values())
    console.print(
        f"of the trained easy-VQA teacher: {trained[0]:.2f}, {trained[1]:.2f}, {trained[2]:.2f} … {trained[-1]:.2f}"
    )


if __name__ == "__main__":
    main()
