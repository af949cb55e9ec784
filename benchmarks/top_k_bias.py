"""Error of a top-k signal against the exact one: `python -m benchmarks.top_k_bias`, half a minute on one core.

The rows are like those of a language model: the logits fall with the logarithm of the rank (Zipf), and rows differ in
sharpness. The student's logits are the teacher's with noise on every one.
"""

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from betakd_ray.energies import energy
from betakd_ray.objective import rest_of, top_k

VOCAB, ROWS = 32_000, 64
KS = (8, 64, 512)
NAMES = ("fkl", "rkl", "sfkl", "srkl", "js", "tvd", "adaptive_kl", "mse_probs", "cosine_probs")


def rows(count: int = ROWS, vocab: int = VOCAB, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the logits of teacher and student, each [count, vocab]."""
    generator = torch.Generator().manual_seed(0)
    exponent = torch.linspace(1.0, 4.0, count)[:, None]
    ranks = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(count)]) + 1
    teacher = -exponent * ranks.log()
    return teacher, teacher + noise * torch.randn(count, vocab, generator=generator)


def with_gradient(name: str, teacher: Tensor, student: Tensor, k: int | None) -> tuple[float, Tensor]:
    """Return the mean energy, and its gradient with respect to the student's logits [rows, vocab].

    With `k`, the energy is on the teacher's top k tokens and one bucket for all others; None is exact.
    """
    student = student.clone().requires_grad_()
    if k is None:
        value = energy(name, teacher, student).mean()
    else:
        top, ids, rest = top_k(teacher.log_softmax(1), k)
        buckets = torch.cat([student.gather(1, ids), rest_of(student, ids)], dim=1)
        value = energy(name, torch.cat([top, rest], dim=1), buckets).mean()
    value.backward()
    assert student.grad is not None
    return value.item(), student.grad


def main(miniature: bool = False) -> None:
    """Print one row per energy with, for each k, the value's relative error and the gradient's cosine and length."""
    teacher, student = rows(4, 1000) if miniature else rows()
    mass = teacher.softmax(1).sort(dim=1, descending=True).values.cumsum(1)
    table = Table("energy", *(f"k = {k}: value · gradient cosine · length" for k in KS))
    table.add_row("teacher's mass in the k", *(f"{mass[:, k - 1].mean():.3f}" for k in KS))
    for name in NAMES:
        exact, gradient = with_gradient(name, teacher, student, None)
        cells = []
        for k in KS:
            value, approximate = with_gradient(name, teacher, student, k)
            cosine = torch.cosine_similarity(approximate.flatten(), gradient.flatten(), dim=0)
            length = approximate.norm() / gradient.norm()
            cells.append(f"{value / exact - 1:+.1%} · {cosine:.4f} · {length:.3f}")
        table.add_row(name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
