"""The module that DeepSpeed wraps: the student, the maps from the teacher and the objective. Its output is one loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from betakd_ray.batch.images import Images
from betakd_ray.batch.inputs import Pairs, TensorInputs, to_device
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.processing import ImageProcessing
from betakd_ray.models.hidden import Hidden
from betakd_ray.models.vlm import attention_heads, hidden_rows, lm_head, part_parameters, parts, takes_images
from betakd_ray.objective import RowObjective, TeacherRows, segment_mean
from betakd_ray.plugins import load
from betakd_ray.spec import AlignTopK, FeatureDistance, ObjectiveSpec, VisualEnergy
from betakd_ray.spec.energies import BY_NAME, Relation
from betakd_ray.teacher.parts import TeacherFacts
from betakd_ray.weighting import CE

T = TypeVar("T")


@dataclass(frozen=True)
class TeacherView:
    """The teacher's output for a micro-batch, on the student's device. It has only what the objective needs."""

    parts: Mapping[str, Tensor]
    """Part → its values. The first axis is the micro-batch's places; `teacher.parts` defines places and shapes."""
    salient: "Selection | None" = None
    """The image tokens to which the teacher pays most attention."""

    @property
    def rows(self) -> TeacherRows:
        """Return the teacher's output for each answer row."""
        return TeacherRows(*(self.parts.get(name) for name in ("hidden", "top_ids", "top_log_probs")))


@dataclass(frozen=True)
class Selection:
    """Some image tokens of a micro-batch, in the order of the samples."""

    token: Int[Tensor, " selected"]
    """Index of the token among the micro-batch's image tokens."""
    sample: Int[Tensor, " selected"]
    """Index in the micro-batch of the token's sample."""
    per_sample: Int[Tensor, " batch"]
    """Number of selected tokens of each sample."""


class Distiller(nn.Module):
    """Student and objective in one forward pass."""

    on_rows: Tensor

    def __init__(
        self,
        student: PreTrainedModel,
        processor: Any,
        objective: ObjectiveSpec,
        facts: TeacherFacts | None,
        teacher_head: Float[Tensor, "vocab teacher_width"] | None = None,
        blank: Images | None = None,
    ) -> None:
        """Wrap a student.

        `facts` describe the teacher (None without a teacher). `teacher_head` is the teacher's lm_head; it is needed if
        the teacher sends hidden states. `blank` is the processor's black image; it is made here if not given.
        """
        super().__init__()
        self.student = student
        head = lm_head(student)
        device = head.weight.device
        self.normalize = Normalization.of(getattr(processor, "image_processor", None))
        self.blank: dict[str, Tensor] | None = None
        if takes_images(student):
            blank = blank or ImageProcessing(processor).blank()
            self.blank = {name: to_device(array, device) for name, array in blank.items()}
        self.rows = RowObjective(objective, head, teacher_head, facts.top_k_vocab if facts else 0)
        self.channels: tuple[str, ...] = ((CE,) if objective.ce else ()) + objective.channels
        on_rows = [self.channels.index(name) for name in self.rows.channels]
        self.register_buffer("on_rows", torch.tensor(on_rows, dtype=torch.long, device=device), persistent=False)
        self.feature_layer = objective.feature_layer
        # In the order of the table: the order in a spec must not change which weights a seed gives to which map.
        visual = {energy.name: energy for energy in objective.energies if isinstance(energy, VisualEnergy)}
        self.visual = {name: visual[name] for name in BY_NAME if name in visual}
        self.visual_functions = {name: load(energy.function, name) for name, energy in self.visual.items()}
        self.maps = nn.ModuleDict()
        """Channel → trained affine map from the teacher's width (or number of heads) to the student's, where needed."""
        if facts:
            sizes = {
                "width": (facts.width, head.weight.shape[1]),
                "heads": (facts.heads, attention_heads(student)),
            }
            for name, energy in self.visual.items():
                if energy.mapped:
                    self.maps[name] = nn.Linear(*sizes[energy.mapped], device=device, dtype=head.weight.dtype)

    def train(self, mode: bool = True) -> "Distiller":
        """Set training mode for the parts that learn, and evaluation mode for the frozen ones.

        A frozen part has its dropout off, and its batch normalisation keeps the statistics that it shares with the
        teacher.
        """
        super().train(mode)
        learns = {part: any(p.requires_grad for p in each) for part, each in part_parameters(self.student).items()}
        modules = parts(self.student)
        for part in ("language_model", "vision_tower", "projector"):  # Qwen's projector is inside its tower: it is last
            for module in modules[part]:
                module.train(mode and learns[part])
        return self

    def forward(
        self,
        inputs: TensorInputs,
        teacher: TeacherView | None,
        pairs: Pairs | None,
        weights: Float[Tensor, "batch channels"],
        moving: Mapping[str, Float[Tensor, ""]],
        statistics: bool = False,
    ) -> "Distilled":
        """Return the loss Σ_i Σ_k weights_ik · ℓ_ik, and the energies ℓ themselves.

        ℓ_ik is the mean of energy k over sample i's answer rows (or over its image tokens, for energies on those).
        `moving` has the current number of each stateful channel. Only `align_attention` needs `pairs`.
        """
        layer = self.feature_layer.student if self.feature_layer else None
        hidden = hidden_rows(self.student, inputs, self.normalize, self.blank, pairs, layer)
        counts = inputs.rows_per_sample
        row_weights = (weights[:, self.on_rows] / counts.clamp_min(1)[:, None])[inputs.row_sample]
        rows = self.rows(
            hidden.rows,
            teacher.rows if teacher else None,
            inputs.targets,
            row_weights,
            moving=moving,
            statistics=statistics,
        )
        means = segment_mean(rows.values, inputs.row_sample, counts)
        energies = weights.new_zeros(weights.shape)
        energies[:, self.on_rows] = means[:, : len(self.on_rows)].to(energies.dtype)
        # ZeRO needs a gradient for the same parameters on every rank. Without a channel on rows, a batch of images
        # would give gradients only to the parts that the images pass through; a batch of texts, through its black
        # image, to all of the language model. The zero term always reaches all of it.
        loss = rows.total if len(self.on_rows) else rows.total + 0.0 * hidden.rows.sum()
        for name in self.visual:
            distance = self._on_image_tokens(name, hidden, teacher, inputs, pairs)
            at = self.channels.index(name)
            loss = loss + (distance * weights[:, at]).sum()
            energies[:, at] = distance.detach()
        measured = means[:, len(self.on_rows) :] if statistics else None
        return Distilled(loss, energies, rows.moving_gradients, measured)

    def _on_image_tokens(
        self, name: str, hidden: Hidden, teacher: TeacherView | None, inputs: TensorInputs, pairs: Pairs | None
    ) -> Float[Tensor, " batch"]:
        """Return one energy on image tokens for each sample; zero for a sample without an image."""
        if hidden.visual is None or teacher is None:
            return self._unused(name, hidden, len(inputs.input_ids))
        function = self.visual_functions[name]
        match energy := self.visual[name]:
            case Relation():
                return function(_by_sample(teacher.parts["visual"], inputs), _by_sample(hidden.visual, inputs))
            case FeatureDistance():
                (part,) = energy.teacher_parts
                theirs, ours = teacher.parts[part], _required(getattr(hidden, part))
                sample, per_sample = inputs.visual_sample, inputs.visual_per_sample
            case AlignTopK():
                at = _required(teacher.salient)
                theirs, ours = teacher.parts["visual"][at.token], hidden.visual[at.token]
                sample, per_sample = at.sample, at.per_sample
            case _:  # AlignAttention
                at = _required(pairs)
                theirs, ours = teacher.parts["attention"], _required(hidden.attention)
                sample, per_sample = at.sample, at.per_sample
        to_student = cast(nn.Linear, self.maps[name])
        distance = function(to_student(theirs.to(to_student.weight.dtype)), ours)
        return segment_mean(distance[:, None], sample, per_sample)[:, 0]

    def _unused(self, name: str, hidden: Hidden, batch: int) -> Float[Tensor, " batch"]:
        """Return zeros that depend on all parameters that the channel uses.

        The ranks must have gradients for the same parameters, also when one rank's micro-batch has no image: with other
        gradients on each rank, ZeRO's collectives would not match.
        """
        nothing = torch.zeros(batch, device=hidden.rows.device)
        if name not in self.maps:
            return nothing
        to_student = cast(nn.Linear, self.maps[name])
        unused = to_student(to_student.weight.new_zeros(1, to_student.in_features)).sum()
        if self.visual[name].mapped == "heads" and hidden.attention is not None:
            unused = unused + hidden.attention.sum()
        return nothing + 0.0 * unused


class Distilled(NamedTuple):
    """Output of the distiller for a micro-batch of B samples."""

    loss: Float[Tensor, ""]
    energies: Float[Tensor, "batch channels"]
    """ℓ of each sample and channel, in nats or as the energy defines it; detached."""
    moving_gradients: Mapping[str, Float[Tensor, ""]]
    """Channel → ∂loss/∂ its number, for each stateful channel."""
    statistics: Float[Tensor, "batch statistics"] | None
    """One column for each of the objective's `measures`; None unless asked for."""


def _by_sample(visual: Float[Tensor, "tokens width"], inputs: TensorInputs) -> Float[Tensor, "batch most width"]:
    """Return the image tokens as one padded table. The padding is zero, so it adds nothing to a Gram matrix."""
    table = visual.new_zeros(len(inputs.input_ids) * inputs.most_visual, visual.shape[1])
    return table.index_copy(0, inputs.visual_slot, visual).view(len(inputs.input_ids), inputs.most_visual, -1)


def _required(part: T | None) -> T:
    """Return `part`, which cannot be None because the objective asked for it."""
    assert part is not None
    return part
