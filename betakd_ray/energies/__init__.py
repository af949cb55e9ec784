"""Energies D(teacher, student): the distance of a student from its teacher, one number per row of logits.

Notation: z_t, z_s are the teacher's and the student's logits at one position, T a temperature, p = softmax(z_t/T_t)
and q = softmax(z_s/T_s). Energies built from p and q are in nats if they use a logarithm, otherwise they have no unit.
Every energy is zero where the two agree, with a zero gradient, and is never negative. Therefore a learned beta may
weight it. The only exception is `reference=True`, in the functions that have this argument.

Three rules hold for every function of logits here.

- Arithmetic is at least float32 (float64 stays float64); the gradient returns in the dtype of the input.
- A vocabulary id masked out on both sides (both logits are -inf) changes neither value nor gradient. A row that is not
  finite for another reason gives a result that is not finite: no function replaces such a value silently.
- Energies are differentiable once, in both sides: the derivative is computed in closed form (`closed_form`).
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from betakd_ray.plugins import load
from betakd_ray.spec.energies import BY_NAME, LogitsEnergy

ENERGIES: dict[str, Callable[..., Tensor]] = {
    name: load(section.function, name) for name, section in BY_NAME.items() if issubclass(section, LogitsEnergy)
}
"""Energies on logits: name in specs → function."""


def energy(
    name: str,
    teacher_logits: Float[Tensor, "rows vocab"],
    student_logits: Float[Tensor, "rows vocab"],
    **options: Any,
) -> Float[Tensor, " rows"]:
    """Return one energy per row, chosen by its name in a spec, with its options, for your own training loop.

    `ctkd` needs `temperature=`, `taid` needs `t=`. Raises ValueError for an unknown name, for logits whose shapes
    differ and for an option out of its range. Raises TypeError for an unknown option and for a missing one.
    """
    if name not in ENERGIES:
        raise ValueError(f"no energy {name!r} on logits; there are {', '.join(ENERGIES)}")
    if teacher_logits.ndim != 2 or teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits are {list(teacher_logits.shape)} and student_logits {list(student_logits.shape)}: give "
            "both as [rows, vocab], for the token ids that the models have in common"
        )
    return ENERGIES[name](teacher_logits, student_logits, **options)
