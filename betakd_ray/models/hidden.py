"""What a forward pass gives, apart from `vlm`: processes that only hand it on do not load transformers for it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Hidden:
    """A forward pass up to the language model's last hidden states."""

    rows: Float[Tensor, "rows width"]
    """At the answer rows, in order."""
    visual: Float[Tensor, "image_tokens width"] | None
    """Projector tokens, as the language model receives them."""
    visual_layer: Float[Tensor, "image_tokens width"] | None = None
    """What a layer of the language model makes of them."""
    attention: Float[Tensor, "pairs heads"] | None = None
    """Attention weights of the first layer, from each answer row to each image token of its sample."""
