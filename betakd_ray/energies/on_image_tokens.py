"""Energies on image tokens."""

from jaxtyping import Float
from torch import Tensor

from betakd_ray.energies.arithmetic import cosine_distance, gram, upcast


def feature_distance(
    mapped_teacher: Float[Tensor, "tokens width"], student: Float[Tensor, "tokens width"]
) -> Float[Tensor, " tokens"]:
    """Return the mean squared distance of the features per token, in squared feature units.

    D_n = mean over channels of (W f_t,n − f_s,n)²                   (Beta-KD §4.1, FD)

    `mapped_teacher` is W f_t: the teacher's features, already mapped to the student's width.
    """
    mapped_teacher, student = upcast(mapped_teacher, student)
    return (mapped_teacher - student).square().mean(dim=1)


def relation(
    teacher: Float[Tensor, "batch tokens t_width"], student: Float[Tensor, "batch tokens s_width"]
) -> Float[Tensor, " batch"]:
    """Return the cosine distance of the two token-by-token similarity matrices, from 0 to 1 per sample.

    D_i = 1 − cos(vec(F_t F_tᵀ), vec(F_s F_sᵀ))                      (Cai et al. 2024, LLaVA-KD)

    It does not depend on the width, scale or rotation of each side's features, so teacher and student need no map
    between their features.
    """
    return cosine_distance(gram(teacher).flatten(1), gram(student).flatten(1))
