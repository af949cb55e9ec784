"""Floating-point operations of a student's step, and the peak rate of a device; their ratio gives the utilisation.

The count follows the usual convention (PaLM, appendix B): only operations that the mathematics needs. A multiply–add
counts as 2, and attention counts as if it were not causal. Recomputation by gradient checkpointing, norms, embeddings
and elementwise operations count as zero.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from betakd_ray.batch.images import PIXELS
from betakd_ray.batch.normalization import Normalization
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
"""Words in a device's name, and its dense bfloat16 operations per second by its maker. The first match counts."""


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
    """Number of elements in the weight matrices that multiply every token of a part."""

    trained: int
    frozen: int

    @classmethod
    def of(cls, *modules: nn.Module, without: nn.Module | None = None) -> "Matrices":
        """Return the matrices of all linear layers in `modules`, except `without`.

        Sizes come from the layers' feature counts, because ZeRO-3 leaves the weights themselves empty.
        """
        found = {layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)} - {without}
        sizes = [(layer.in_features * layer.out_features, layer.weight.requires_grad) for layer in found]
        return cls(sum(size for size, learns in sizes if learns), sum(size for size, learns in sizes if not learns))

    @property
    def size(self) -> int:
        return self.trained + self.frozen

    def flops(self, tokens: int, has_gradient: bool) -> float:
        """Return the operations of forward and backward for `tokens` tokens.

        `has_gradient` is true if a gradient flows back through these matrices, for them or for a part before them.
        """
        # One product for the output, one for the gradient of the input, one for the gradient of the trained weights.
        return 2.0 * tokens * (self.size + (self.size if has_gradient else 0) + self.trained)


@dataclass(frozen=True)
class StudentFlops:
    """Counts from which the operations of a student's step follow; they are known when the student is built."""

    language: Matrices
    attention: int
    """Width of the queries × number of layers: the forward pass on L tokens takes 4·L²·attention operations."""
    head: Matrices
    teacher_head: int
    """Elements of the teacher's lm_head if the student worker computes the teacher's logits, otherwise 0."""
    tower: float
    """Operations of the vision tower's forward pass per number in `pixel_values`."""
    projector: Matrices
    tower_learns: bool
    reaches_language: bool
    """True if gradients flow through the language model, for itself or for a part before it."""

    @classmethod
    def of(
        cls,
        student: PreTrainedModel,
        normalize: Normalization,
        blank: dict[str, Tensor] | None,
        teacher_head: int = 0,
    ) -> "StudentFlops":
        """Count a student's weights. Its vision tower, of any family, is run on `blank` to count its operations.

        Call this before DeepSpeed takes over the model. A mixture of experts counts as if each token used all experts.
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
            tower_learns=_learns(of_parts["vision_tower"], but=of_parts["projector"]),  # Qwen's is inside the tower
            reaches_language=any(learns.values()),
        )

    def step(self, tokens: int, squares: int, rows: int, image_tokens: int, pixels: int) -> float:
        """Return the number of operations of a step, over all its micro-batches.

        `tokens` is the number of text and image tokens in the language model, without padding. `squares` is Σ L² over
        the samples' lengths L. `rows` is the number of answer rows. `pixels` is the number of values in
        `pixel_values`.
        """
        # The backward pass of attention costs twice its forward: each product has a gradient for both of its factors.
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
    """Return whether a parameter of `modules` that is not in `but` is trained."""
    other = {parameter for module in but or () for parameter in module.parameters()}
    return any(p.requires_grad and p not in other for module in modules for p in module.parameters())


@torch.no_grad()
def _tower(model: Any, normalize: Normalization, blank: dict[str, Tensor], projector: Matrices) -> float:
    """Return the operations of the vision tower per number in `pixel_values`, without those of the projector."""
    images = normalize.of_images(blank, model.dtype)
    with FlopCounterMode(display=False) as counter:
        features = base_model(model).get_image_features(**images, return_dict=True)
    tokens = sum(len(each) for each in features.pooler_output)
    return max(0.0, counter.get_total_flops() - 2.0 * tokens * projector.size) / images[PIXELS].numel()
