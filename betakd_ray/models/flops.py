"""Floating-point operations of a student's step, and what a device could do at most: their ratio is the utilisation.

Counted is what the mathematics asks for, by the usual convention (PaLM, appendix B): 2 a multiply–add; attention as if
it were not causal; nothing for what gradient checkpointing does twice, for norms, embeddings and elementwise work.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from betakd_ray.batch.images import PIXELS, Normalization
from betakd_ray.models.vlm import base_model, lm_head, parts, takes_images

PEAKS = (
    ("B200", 2250e12),
    ("B100", 1750e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIE", 756e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A10G", 70e12),
    ("A40", 150e12),
    ("RTX A6000", 155e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
)
"""In a device's name → dense bfloat16 operations a second, by its maker. The first that fits counts."""


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 peak of a device as `torch.cuda.get_device_name` calls it; None if it is not known."""
    words = device_name.upper().replace("-", " ").split()
    for name, peak in PEAKS:
        wanted = name.split()
        if all(word in words for word in wanted):
            return peak
    return None


def device_peak(device: torch.device) -> float | None:
    """Return the dense bfloat16 peak of a device of this process; None if it is not known, or no GPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True)
class Matrices:
    """The weights that every token of a part is multiplied with, in elements."""

    trained: int
    frozen: int

    @classmethod
    def of(cls, *modules: nn.Module, without: nn.Module | None = None) -> "Matrices":
        """Return those of all linear layers. Their features are asked for, as ZeRO-3 leaves the weights empty."""
        found = {layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)} - {without}
        sizes = [(layer.in_features * layer.out_features, layer.weight.requires_grad) for layer in found]
        return cls(sum(size for size, learns in sizes if learns), sum(size for size, learns in sizes if not learns))

    @property
    def size(self) -> int:
        return self.trained + self.frozen

    def flops(self, tokens: int, has_gradient: bool) -> float:
        """Return forward and backward of so many tokens; `has_gradient` where something at or below them learns."""
        return 2.0 * tokens * (self.size + (self.size if has_gradient else 0) + self.trained)


@dataclass(frozen=True)
class StudentFlops:
    """What a student's step takes, known once it is built."""

    language: Matrices
    attention: int
    """Width of the queries times layers: with it, a sequence of L tokens takes 4·L²·attention in the forward."""
    head: Matrices
    teacher_head: int
    """Elements of the teacher's lm_head, where the student makes its logits."""
    tower: float
    """FLOPs of one number in `pixel_values`, in the vision tower's forward."""
    projector: Matrices
    tower_learns: bool
    reaches_language: bool
    """Whether gradients go through the language model: for itself, or for what is before it."""

    @classmethod
    def of(
        cls,
        student: PreTrainedModel,
        normalize: Normalization,
        blank: dict[str, Tensor] | None,
        teacher_head: int = 0,
    ) -> "StudentFlops":
        """Count a student's weights. Its vision tower, of any family, is run on `blank` and its operations counted.

        Call it before DeepSpeed takes the model. A mixture of experts is counted as if all of them took each token.
        """
        of_parts = parts(student)
        head = lm_head(student)
        text = student.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        language = Matrices.of(*of_parts["language_model"], without=head)
        learns = {part: _learns(modules) for part, modules in of_parts.items()}
        projector = Matrices.of(*of_parts["projector"])
        tower = _tower(student, normalize, blank, projector) if takes_images(student) and blank else 0.0
        return cls(
            language=language,
            attention=text.num_attention_heads * width * text.num_hidden_layers,
            head=Matrices.of(head),
            teacher_head=teacher_head,
            tower=tower,
            projector=projector,
            tower_learns=_learns(of_parts["vision_tower"], but=of_parts["projector"]),  # Qwen's is inside of it
            reaches_language=any(learns.values()),
        )

    def step(self, tokens: int, squares: int, rows: int, image_tokens: int, pixels: int) -> float:
        """Return the operations of a step over all its micro-batches.

        `tokens` go through the language model, text and image tokens without padding; `squares` is Σ L² over the
        samples' lengths; `rows` are answer rows, `pixels` the numbers in `pixel_values`.
        """
        attention = 4.0 * squares * self.attention * (3 if self.reaches_language else 1)
        return (
            self.language.flops(tokens, self.reaches_language)
            + attention
            + self.head.flops(rows, self.reaches_language)
            + 2.0 * rows * self.teacher_head
            + self.tower * pixels * (3 if self.tower_learns else 1)
            + self.projector.flops(image_tokens, self.tower_learns or self.projector.trained > 0)
        )


def _learns(modules: list[nn.Module], but: list[nn.Module] | None = None) -> bool:
    """Return whether a parameter of theirs, and of none `but`, is trained."""
    other = {parameter for module in but or () for parameter in module.parameters()}
    return any(p.requires_grad and p not in other for module in modules for p in module.parameters())


@torch.no_grad()
def _tower(model: Any, normalize: Normalization, blank: dict[str, Tensor], projector: Matrices) -> float:
    """Return the operations of one number in `pixel_values`, the projector's apart."""
    images = normalize.of_images(blank, model.dtype)
    with FlopCounterMode(display=False) as counter:
        features = base_model(model).get_image_features(**images, return_dict=True)
    tokens = sum(len(each) for each in features.pooler_output)
    return max(0.0, counter.get_total_flops() - 2.0 * tokens * projector.size) / images[PIXELS].numel()
