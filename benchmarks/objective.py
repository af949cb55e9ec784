"""The objective beside its peers: time, memory, precision. `python -m benchmarks.objective`, an hour on two cores.

Cross-entropy and one energy, forward and backward, from hidden states to the gradients of rows and head, in float32.
Every contender runs once a round, in the same process; a ratio is the median of the rounds' ratios of CPU seconds, with
its range. On a busy machine set OMP_NUM_THREADS=1: two threads that wait for each other count as work. `--energies`,
`--vocabs`, `--rows` and `--rounds` make it shorter. The peers are those of `pip install '.[peers]'`; one that is not
installed is left out.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from betakd_ray.energies import ENERGIES
from betakd_ray.forecast.allocations import AllocationCounter
from betakd_ray.objective import RowObjective, TeacherRows
from betakd_ray.spec import ObjectiveSpec
from tests.autograd_energies import ORACLES

RESULTS = Path(__file__).parent / "results" / "objective.json"
MOVING = {"ctkd": torch.tensor(2.0), "taid": torch.tensor(0.5)}
SHARES = (1.0, 0.25)
"""Shares of answer rows. Without a mask of its own, a contender computes the other rows too."""
NOISES = (0.1, 0.03, 0.01)
"""Distances of the student's rows from the teacher's, for KLs of about 5e-2, 5e-3 and 5e-4 nats."""


class Problem(NamedTuple):
    """Hidden states, heads, targets and answer rows of one measurement."""

    student: Tensor
    teacher: Tensor
    head: Tensor
    teacher_head: Tensor
    targets: Tensor
    answers: Tensor


Contender = Callable[[Problem, str], tuple[Tensor, Tensor]]
"""Function of (problem, energy) → gradients of the student's rows and of its head."""


def problem(rows: int, vocab: int, widths: tuple[int, int], share: float = 1.0) -> Problem:
    """Return random numbers whose logits have the spread of a trained model's."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((rows, widths[0]), (rows, widths[1]), (vocab, widths[0]), (vocab, widths[1]))
    student, teacher, head, teacher_head = (torch.randn(*size, generator=generator) for size in sizes)
    targets = torch.randint(vocab, (rows,), generator=generator)
    answers = torch.rand(rows, generator=generator).argsort() < round(share * rows)
    return Problem(student, teacher, 3 * head / widths[0] ** 0.5, 3 * teacher_head / widths[1] ** 0.5, targets, answers)


def _learned(given: Problem) -> tuple[Tensor, Tensor]:
    return given.student.clone().requires_grad_(), given.head.detach().requires_grad_()


def ours(given: Problem, energy: str) -> tuple[Tensor, Tensor]:
    """Return the gradients by this package; the rows without an answer are dropped first, as in training."""
    rows, head = _learned(given)
    lm_head = torch.nn.Linear(*head.shape[::-1], bias=False, device="meta")
    lm_head.weight = torch.nn.Parameter(head)
    objective = RowObjective(ObjectiveSpec(energies=(energy,), weighting="equal"), lm_head, given.teacher_head)
    at = given.answers
    weights = torch.full((int(at.sum()), 2), 1 / int(at.sum()))
    teacher = TeacherRows(hidden=given.teacher[at])
    objective(rows[at], teacher, given.targets[at], weights, moving=MOVING).total.backward()
    assert rows.grad is not None
    assert lm_head.weight.grad is not None
    return rows.grad, lm_head.weight.grad


def _cosine(teacher: Tensor, student: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _js(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


PLAIN: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fkl": lambda t, s: _kl(t.log_softmax(-1), s.log_softmax(-1)),
    "rkl": lambda t, s: _kl(s.log_softmax(-1), t.log_softmax(-1)),
    "js": lambda t, s: _js(t.log_softmax(-1), s.log_softmax(-1)),
    "tvd": lambda t, s: (t.softmax(-1) - s.softmax(-1)).abs().sum(-1) / 2,
    "mse_logits": lambda t, s: (t - s).square().mean(-1),
    "mse_probs": lambda t, s: (t.softmax(-1) - s.softmax(-1)).square().sum(-1),
    "cosine_logits": _cosine,
    "cosine_probs": lambda t, s: _cosine(t.softmax(-1), s.softmax(-1)),
    "sfkl": ORACLES["sfkl"],
    "srkl": ORACLES["srkl"],
    "adaptive_kl": ORACLES["adaptive_kl"],
    "ctkd": lambda t, s: 4 * _kl((t / 2).log_softmax(-1), (s / 2).log_softmax(-1)),
    "taid": lambda t, s: _kl(torch.lerp(s.detach(), t, 0.5).log_softmax(-1), s.log_softmax(-1)),
}
"""Energies as one writes them for a loop of one's own, without masks."""


def naive(given: Problem, energy: str) -> tuple[Tensor, Tensor]:
    """Return the gradients by autograd on the logits of all rows."""
    rows, head = _learned(given)
    logits, theirs = (rows @ head.t()).float(), (given.teacher @ given.teacher_head.t()).float()
    loss = F.cross_entropy(logits, given.targets, reduction="none") + PLAIN[energy](theirs, logits)
    loss[given.answers].mean().backward()
    assert rows.grad is not None
    assert head.grad is not None
    return rows.grad, head.grad


BETAS = {"fkl": 0.0, "rkl": 1.0, "js": 0.5}
"""The peers' parameter for the three energies that they have."""


def trl(given: Problem, energy: str) -> tuple[Tensor, Tensor]:
    """Return the gradients by TRL, of the divergence alone: it has no cross-entropy beside it."""
    from trl.trainer.distillation_trainer import (  # pyright: ignore[reportMissingImports]
        _chunked_divergence_loss,
    )

    rows, head = _learned(given)
    loss, *_ = _chunked_divergence_loss(
        rows[None], given.teacher[None], head, given.teacher_head, given.answers[None].int(), BETAS[energy]
    )
    loss.backward()
    assert rows.grad is not None
    assert head.grad is not None
    return rows.grad, head.grad


def liger(given: Problem, energy: str) -> tuple[Tensor, Tensor]:
    """Return the gradients by Liger, with a weight of 0.5 for each term (it has no other)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    rows, head = _learned(given)
    targets = given.targets.masked_fill(~given.answers, -100)
    loss = LigerFusedLinearJSDLoss(beta=BETAS[energy], compiled=False)
    loss(rows, head, given.teacher, given.teacher_head, targets).backward()
    assert rows.grad is not None
    assert head.grad is not None
    return rows.grad, head.grad


def products(given: Problem, energy: str) -> tuple[Tensor, Tensor]:
    """Return the four matrix products that nobody can leave out, at the machine's rate."""
    at = given.answers
    rows = given.student[at]
    logits = rows @ given.head.t()
    given.teacher[at] @ given.teacher_head.t()
    return logits @ given.head, logits.t() @ rows


def contenders() -> dict[str, Contender]:
    """Return what is installed, by name."""
    found: dict[str, Contender] = {"ours": ours, "naive": naive}
    small = problem(8, 16, (4, 4))
    for peer in (trl, liger):
        try:
            peer(small, "fkl")
        except ImportError as error:
            Console().print(f"{peer.__name__} is left out: {error}")
        else:
            found[peer.__name__] = peer
    return found


def times(given: Problem, energy: str, rounds: int) -> dict[str, list[float]]:
    """Return each contender's CPU seconds over ours in each round; those of `products` are inverted: ours over it."""
    found = {**contenders_of(energy), "products": products}
    for run in found.values():  # the first calls prepare what later ones use again
        run(given, energy)
    ratios: dict[str, list[float]] = {name: [] for name in found if name != "ours"}
    for _ in range(rounds):
        seconds = {}
        for name, run in found.items():
            start = time.process_time()
            run(given, energy)
            seconds[name] = time.process_time() - start
        for name, each in ratios.items():
            ratio = seconds[name] / seconds["ours"]
            each.append(1 / ratio if name == "products" else ratio)
    return ratios


def contenders_of(energy: str) -> dict[str, Contender]:
    """Return the contenders that have an energy."""
    return {name: run for name, run in contenders().items() if energy in BETAS or name in ("ours", "naive")}


def peaks(given: Problem, energy: str) -> dict[str, float]:
    """Return each contender's peak of tensors that it makes beside those of `given`, in MiB."""
    found = {}
    for name, run in contenders_of(energy).items():
        with AllocationCounter() as allocations:
            given = Problem(*(each.view_as(each) for each in given))  # from here on they are known to the counter
            before = allocations.peak = allocations.live
            run(given, energy)
        found[name] = (allocations.peak - before) / 2**20
    return found


def errors(given: Problem, noise: float) -> dict[str, float]:
    """Return the relative error of each contender's gradient of fkl in bfloat16, against float64.

    The student is the teacher with noise on its rows. The cross-entropy, of order one, would hide the error.
    """
    same = given._replace(student=given.teacher + noise * given.student[:, :1], head=given.teacher_head)
    half = same._replace(**{name: getattr(same, name).bfloat16() for name in ("student", "teacher", "head")})
    half = half._replace(teacher_head=half.head)
    student, teacher, head = (each.double() for each in (half.student, half.teacher, half.head))
    logits, theirs = student @ head.t(), teacher @ head.t()
    exact = (logits.softmax(-1) - theirs.softmax(-1)) @ head / len(student)
    found = {"KL": _kl(theirs.log_softmax(-1), logits.log_softmax(-1)).mean().item()}
    lm_head = torch.nn.Linear(1, 1, bias=False)
    lm_head.weight = torch.nn.Parameter(half.head)
    objective = RowObjective(ObjectiveSpec(ce=False, energies=("fkl",), weighting="equal"), lm_head, half.head)
    rows = half.student.clone().requires_grad_()
    weights = torch.full((len(rows), 1), 1 / len(rows))
    objective(rows, TeacherRows(hidden=half.teacher), half.targets, weights).total.backward()
    gradients = {"ours": rows.grad}
    if "trl" in contenders():
        gradients["trl"] = trl(half, "fkl")[0]
    for name, gradient in gradients.items():
        assert gradient is not None
        found[name] = ((gradient.double() - exact).norm() / exact.norm()).item()
    return found


def measure(energies: list[str], vocabs: list[int], rounds: int, rows: int, widths: tuple[int, int]) -> dict[str, Any]:
    """Return all figures."""
    time_rows, memory = [], []
    for vocab in vocabs:
        count = rows if vocab <= 50_000 else max(1, rows // 4)
        for share in SHARES:
            given = problem(count, vocab, widths, share)
            for energy in energies:
                ratios = times(given, energy, rounds)
                cells = {name: (median(each), min(each), max(each)) for name, each in ratios.items()}
                time_rows.append({"energy": energy, "vocab": vocab, "rows": count, "share": share, "ratios": cells})
        given = problem(2 * count, vocab, widths)
        memory.append({"vocab": vocab, "rows": 2 * count, "mib": peaks(given, energies[0])})
    given = problem(64, min(vocabs), widths)
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "widths": widths,
        "time": time_rows,
        "memory": memory,
        "bf16": [errors(given, noise) for noise in NOISES],
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the figures as tables."""
    names = list(dict.fromkeys(name for row in figures["time"] for name in row["ratios"]))
    table = Table(
        "CE +", "vocabulary", "rows", "answers", *(n if n != "products" else "ours / products" for n in names)
    )
    for row in figures["time"]:
        cells = [row["ratios"].get(name) for name in names]
        shown = ["" if cell is None else f"{cell[0]:.2f} ({cell[1]:.2f}–{cell[2]:.2f})" for cell in cells]
        table.add_row(row["energy"], f"{row['vocab']}", f"{row['rows']}", f"{row['share']:.0%}", *shown)
    console.print(
        "CPU seconds over ours (more is better for us), and ours over its own matrix products (1 is the limit)"
    )
    console.print(table)
    for row in figures["memory"]:
        peers = " · ".join(f"{name} {mib:.0f}" for name, mib in row["mib"].items())
        console.print(f"peak memory, MiB, {row['rows']} rows, V = {row['vocab']}: {peers}")
    for row in figures["bf16"]:
        peers = " · ".join(f"{name} {error:.2%}" for name, error in row.items() if name != "KL")
        console.print(f"error of the gradient in bfloat16 at a KL of {row['KL']:.1e}: {peers}")


def main(miniature: bool = False) -> None:
    """Print the figures, and write them to benchmarks/results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--energies", nargs="+", choices=[*ENERGIES], default=[*ENERGIES])
    parser.add_argument("--vocabs", nargs="+", type=int, default=[32_000, 151_936])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1024)
    asked = parser.parse_args([] if miniature else None)
    if miniature:
        figures = measure(["fkl", "adaptive_kl"], [200], 1, 16, (8, 8))
    else:
        figures = measure(asked.energies, asked.vocabs, asked.rounds, asked.rows, (512, 1024))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    show(figures, Console(width=140))


if __name__ == "__main__":
    main()
