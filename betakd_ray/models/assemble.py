"""Assembly of a LLaVA or a MobileVLM from a language model and a vision tower: configuration, processor, vocabulary."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AddedToken, LlavaConfig, LlavaProcessor, PretrainedConfig, PreTrainedTokenizerFast

from betakd_ray.batch.sample import IMAGE
from betakd_ray.errors import ModelError
from betakd_ray.models.mobilevlm import MobileVLMConfig, mobilevlm_processor

PAD_ROWS_TO = 64
"""A vocabulary that grows gets a multiple of this many rows, so that the product with the head stays fast."""
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1}
"""Model type of a vision tower → number of its tokens that represent no patch."""


def assembled(
    text: PretrainedConfig,
    vision: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    image_processor: Any,
    *,
    projector: str,
    layer: int,
    select: str,
) -> tuple[LlavaConfig, LlavaProcessor]:
    """Return the configuration and the processor of the assembled model.

    `select` has the values of transformers: `default` drops the first image token. The tokenizer must know `<image>`,
    and `text` must have a row for it. Raises ModelError.
    """
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.get_vocab()[IMAGE],
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": select,
    }
    if projector == "ldpnetv2":
        config = MobileVLMConfig(**common)
        return config, mobilevlm_processor(config, image_processor, tokenizer)
    class_tokens = CLASS_TOKENS[vision.model_type]
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=class_tokens,
    )
    patches = (_pixels(image_processor) // vision.patch_size) ** 2
    return LlavaConfig(**common, image_seq_length=patches + class_tokens - (select == "default")), processor


def _pixels(image_processor: Any) -> int:
    """Return the height in pixels of the images that the processor makes.

    The vision tower may have been trained on another size.
    """
    cropped = getattr(image_processor, "do_center_crop", False)
    return (image_processor.crop_size if cropped else image_processor.size)["height"]


def require_tower(path: str, config: PretrainedConfig) -> None:
    """Raise ModelError for a vision tower that is not in `CLASS_TOKENS`."""
    if config.model_type not in CLASS_TOKENS:
        raise ModelError(f"{path}: is a {config.model_type!r}; a vision tower must be one of {', '.join(CLASS_TOKENS)}")


def with_image_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Add `<image>` to the tokenizer at the first free id, unless the tokenizer knows it; return the tokenizer."""
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def rows_for(index: int, rows: int) -> int:
    """Return the number of rows that an embedding or head of `rows` rows needs to have a row `index`."""
    return rows if index < rows else -(-(index + 1) // PAD_ROWS_TO) * PAD_ROWS_TO


def with_row(weight: Float[Tensor, "vocab width"], index: int) -> Float[Tensor, "rows width"]:
    """Return an embedding or head that has a row `index`; missing rows are copies of its mean row.

    The logit of a mean row is the mean logit. So it is never the largest, and by Jensen's inequality no new id gets
    more than 1/vocab of the probability.
    """
    if index < len(weight):
        return weight
    mean = weight.float().mean(0).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows_for(index, len(weight)) - len(weight), -1)])
