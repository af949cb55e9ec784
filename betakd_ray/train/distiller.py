"""The module that DeepSpeed wraps: student, feature map and objective, from a micro-batch to one scalar."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from betakd_ray.energies import feature_distance
from betakd_ray.models.inputs import TensorInputs
from betakd_ray.models.vlm import Hidden, Normalization, blank_image, hidden_rows, parts
from betakd_ray.objective import STATISTICS, RowObjective, segment_mean
from betakd_ray.spec import ObjectiveSpec
from betakd_ray.weighting import CE

FD = "fd"


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
        teacher_rows: Float[Tensor, "rows teacher_width"] | None,
        teacher_visual: Float[Tensor, "tokens teacher_width"] | None,
        weights: Float[Tensor, "batch channels"],
        statistics: bool = False,
    ) -> dict[str, Any]:
        """Σ_i Σ_k weights_ik · ℓ_ik as "loss", and ℓ [B, channels] as "energies", detached.

        ℓ_ik is the mean of energy k over sample i's answer rows (for `fd`: over its image tokens). "statistics" is
        [B, 4], the columns of objective.STATISTICS, if asked for.
        """
        hidden = hidden_rows(self.student, inputs, self.normalize, self.blank)
        counts = inputs.rows_per_sample
        on_rows = [self.channels.index(name) for name in self.rows.channels]
        row_weights = (weights[:, on_rows] / counts.clamp_min(1)[:, None])[inputs.row_sample]
        loss, values = self.rows(hidden.rows, teacher_rows, inputs.targets, row_weights, statistics=statistics)
        means = segment_mean(values, inputs.row_sample, counts)
        energies = weights.new_zeros(weights.shape)
        energies[:, on_rows] = means[:, : len(on_rows)].to(energies.dtype)
        if self.feature_map is not None:
            at = self.channels.index(FD)
            distance = self._feature_distance(hidden, teacher_visual, inputs)
            loss = loss + (distance * weights[:, at]).sum()
            energies[:, at] = distance.detach()
        return {
            "loss": loss,
            "energies": energies,
            "statistics": means[:, -len(STATISTICS) :] if statistics else None,
        }

    def _feature_distance(
        self, hidden: Hidden, teacher_visual: Tensor | None, inputs: TensorInputs
    ) -> Float[Tensor, " batch"]:
        """Mean over a sample's image tokens and channels of (W f_t − f_s)²; zero without an image."""
        assert self.feature_map is not None
        counts = torch.bincount(inputs.visual_sample, minlength=len(inputs.input_ids))
        if hidden.visual is None or teacher_visual is None:
            # Every rank must use the map in every step, or ranks disagree about which gradients to reduce.
            return 0.0 * self.feature_map(self.feature_map.weight.new_zeros(1, self.feature_map.in_features)).sum() + (
                torch.zeros(len(inputs.input_ids), device=counts.device)
            )
        mapped = self.feature_map(teacher_visual.to(self.feature_map.weight.dtype))
        per_token = feature_distance(mapped, hidden.visual)
        return segment_mean(per_token[:, None], inputs.visual_sample, counts)[:, 0]
