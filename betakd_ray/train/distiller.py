"""The module that DeepSpeed wraps: student, feature map and objective, from a micro-batch to one scalar."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from betakd_ray.energies import feature_distance, relation
from betakd_ray.models.inputs import TensorInputs
from betakd_ray.models.vlm import Hidden, Normalization, blank_image, hidden_rows, parts
from betakd_ray.objective import STATISTICS, RowObjective, TeacherRows, segment_mean
from betakd_ray.spec import ObjectiveSpec
from betakd_ray.weighting import CE

FD, RELATION = "fd", "relation"


class Distiller(nn.Module):
    """Student and objective in one forward.

    `teacher_head` and `teacher_visual_size` describe the teacher; both None without one.
    """

    blank: Tensor

    def __init__(
        self,
        student: PreTrainedModel,
        image_processor: Any,
        objective: ObjectiveSpec,
        teacher_head: Tensor | None,
        teacher_visual_size: int | None,
    ) -> None:
        super().__init__()
        self.student = student
        self.normalize = Normalization.of(image_processor)
        self.register_buffer("blank", blank_image(image_processor), persistent=False)
        head = student.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        self.rows = RowObjective(objective, head, teacher_head)
        self.channels: tuple[str, ...] = ((CE,) if objective.ce else ()) + objective.channels
        self.feature_map = None
        if FD in objective.channels:
            assert teacher_visual_size is not None
            self.feature_map = nn.Linear(teacher_visual_size, head.weight.shape[1], dtype=head.weight.dtype)

    def train(self, mode: bool = True) -> "Distiller":
        """Training mode for what learns. A frozen part stays in evaluation mode: its dropout is off, and its batch
        normalisation keeps the statistics it shares with the teacher."""
        super().train(mode)
        for modules in parts(self.student).values():
            for module in modules:
                if not any(parameter.requires_grad for parameter in module.parameters()):
                    module.eval()
        return self

    def forward(
        self,
        inputs: TensorInputs,
        teacher: TeacherRows | None,
        teacher_visual: Float[Tensor, "tokens teacher_width"] | None,
        weights: Float[Tensor, "batch channels"],
        moving: Mapping[str, Float[Tensor, ""]],
        statistics: bool = False,
    ) -> "Distilled":
        """Σ_i Σ_k weights_ik · ℓ_ik, and ℓ itself.

        ℓ_ik is the mean of energy k over sample i's answer rows (for energies on image tokens: over those). `moving`
        has the present number of each stateful channel.
        """
        hidden = hidden_rows(self.student, inputs, self.normalize, self.blank)
        counts = inputs.rows_per_sample
        on_rows = [self.channels.index(name) for name in self.rows.channels]
        row_weights = (weights[:, on_rows] / counts.clamp_min(1)[:, None])[inputs.row_sample]
        rows = self.rows(hidden.rows, teacher, inputs.targets, row_weights, moving=moving, statistics=statistics)
        means = segment_mean(rows.values, inputs.row_sample, counts)
        energies = weights.new_zeros(weights.shape)
        energies[:, on_rows] = means[:, : len(on_rows)].to(energies.dtype)
        loss = rows.total
        for name, distance in self._on_image_tokens(hidden, teacher_visual, inputs):
            at = self.channels.index(name)
            loss = loss + (distance * weights[:, at]).sum()
            energies[:, at] = distance.detach()
        return Distilled(loss, energies, rows.moving_gradients, means[:, -len(STATISTICS) :] if statistics else None)

    def _on_image_tokens(
        self, hidden: Hidden, teacher_visual: Tensor | None, inputs: TensorInputs
    ) -> Iterator[tuple[str, Float[Tensor, " batch"]]]:
        """Each of the objective's energies on image tokens, per sample; zero without an image."""
        nothing = torch.zeros(len(inputs.input_ids), device=inputs.input_ids.device)
        if self.feature_map is not None:
            # Every rank must use the map in every step, or ranks disagree about which gradients to reduce.
            blank = self.feature_map.weight.new_zeros(1, self.feature_map.in_features)
            mapped = self.feature_map(blank if teacher_visual is None else teacher_visual.to(blank.dtype))
            if hidden.visual is None or teacher_visual is None:
                yield FD, nothing + 0.0 * mapped.sum()
            else:
                per_token = feature_distance(mapped, hidden.visual)[:, None]
                yield FD, segment_mean(per_token, inputs.visual_sample, inputs.visual_per_sample)[:, 0]
        if RELATION in self.channels:
            if hidden.visual is None or teacher_visual is None:
                yield RELATION, nothing
            else:
                yield RELATION, relation(_by_sample(teacher_visual, inputs), _by_sample(hidden.visual, inputs))


class Distilled(NamedTuple):
    """What a micro-batch of B samples gives."""

    loss: Float[Tensor, ""]
    energies: Float[Tensor, "batch channels"]
    """Detached."""
    moving_gradients: Mapping[str, Float[Tensor, ""]]
    """∂loss/∂ each stateful channel's number."""
    statistics: Float[Tensor, "batch statistics"] | None
    """The columns of objective.STATISTICS, if asked for."""


def _by_sample(visual: Float[Tensor, "tokens width"], inputs: TensorInputs) -> Float[Tensor, "batch most width"]:
    """Image tokens as a table, with zeros where a sample has fewer: they add nothing to a Gram matrix."""
    table = visual.new_zeros(len(inputs.input_ids) * inputs.most_visual, visual.shape[1])
    return table.index_copy(0, inputs.visual_slot, visual).view(len(inputs.input_ids), inputs.most_visual, -1)
