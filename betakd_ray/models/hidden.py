"""Result of a forward pass.

It is not in `vlm`, so that processes which only pass it on do not import transformers.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Hidden:
    """Result of a forward pass up to the language model's last hidden states."""

    rows: Float[Tensor, "rows width"]
    """Last hidden states at the answer rows, in order."""
    visual: Float[Tensor, "image_tokens width"] | None
    """Image tokens from the projector, as the language model receives them."""
    visual_layer: Float[Tensor, "image_tokens width"] | None = None
    """Output of a layer of the language model at the image tokens."""
    attention: Float[Tensor, "pairs heads"] | None = None
    """Attention weights of the first layer, from each answer row to each image token of its sample."""
