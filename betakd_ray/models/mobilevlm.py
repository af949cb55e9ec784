"""MobileVLM V2 (arXiv 2402.03766) as a transformers model: a LLaVA whose projector is LDPv2.

Vision tower, language model, generation and saving are those of transformers' LLaVA. The import of this module
registers the family with transformers' Auto classes, under the model type `mobilevlm_v2`. `mobilevlm` is the type of
the original format, which betakd_ray.models.convert reads and betakd_ray.models.export writes.
"""

import math
from typing import Any, no_type_check

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from betakd_ray.errors import ModelError


@no_type_check  # transformers gives it an __init__ that takes more than its signature says
class MobileVLMConfig(LlavaConfig):
    """LLaVA's configuration, whose `image_seq_length` is the number of tokens per image after LDPv2, a square."""

    model_type = "mobilevlm_v2"

    # LLaVA also accepts dicts here; its __post_init__ turns them into configurations.
    vision_config: Any = None
    text_config: Any = None
    image_seq_length: int = 144
    mm_vision_tower: str = "openai/clip-vit-large-patch14-336"
    """Hub id or folder from which the original code loads its image processor; only an export reads this."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.side**2 != self.image_seq_length:
            raise ValueError(
                f"image_seq_length is {self.image_seq_length}; LDPv2 needs a square number of tokens, e.g. 144"
            )

    @property
    def side(self) -> int:
        """Return the number of image tokens along one side of an image."""
        return math.isqrt(self.image_seq_length)


class MobileVLMProjector(LlavaMultiModalProjector):
    """LDPv2: LLaVA's two linear layers, an average pool, and a position-encoding generator (PEG).

    PEG is a 3×3 convolution of each channel separately, added to its input. Its zero padding gives each token its
    position (MobileVLM V2 §3.3).
    """

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.side = config.side
        self.peg = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)

    def forward(
        self, image_features: Float[Tensor, "images patches vision_width"]
    ) -> Float[Tensor, "images tokens width"]:
        """Return the image tokens of each image. Raises ModelError if the number of patches is not a square."""
        patches = image_features.shape[1]
        rows = math.isqrt(patches)
        if rows**2 != patches:
            raise ModelError(
                f"the vision tower gives {patches} tokens an image, but LDPv2 needs a square number. Give square "
                "images. Set vision_feature_select_strategy to `default` for a tower with a class token, else `full`."
            )
        features = super().forward(image_features)
        pooled = adaptive_avg_pool2d(features.transpose(1, 2).unflatten(2, (rows, rows)), self.side)
        return (self.peg(pooled) + pooled).flatten(2).transpose(1, 2)


class MobileVLMModel(LlavaModel):
    """Vision tower, LDPv2 and language model, without the head."""

    config: MobileVLMConfig

    def __init__(self, config: MobileVLMConfig) -> None:
        # Not LlavaModel's own __init__: it would build the towers and LLaVA's projector, only to be replaced.
        super(LlavaModel, self).__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = MobileVLMProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()


class MobileVLMForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model, which is called, trained and saved like transformers' LLaVA."""

    config: MobileVLMConfig

    def __init__(self, config: MobileVLMConfig) -> None:
        # Not its own __init__, which would build a whole LLaVA first.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = MobileVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


def mobilevlm_processor(config: MobileVLMConfig, image_processor: Any, tokenizer: Any) -> LlavaProcessor:
    """Return LLaVA's processor with the patch size for which it counts `image_seq_length` tokens per image.

    LLaVA's processor computes the number of image tokens from their size in pixels; here this is the size of a pooled
    patch. Raises ModelError if no size gives `image_seq_length` tokens; for images of `side`² pixels a side or more,
    one always does.
    """
    pixels = config.vision_config.image_size
    size = pixels // config.side
    if size == 0 or pixels // size != config.side:
        raise ModelError(
            f"images of {pixels} pixels cannot be divided into {config.side} tokens a side (image_seq_length)"
        )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=size,
        vision_feature_select_strategy="full",
    )


AutoConfig.register(MobileVLMConfig.model_type, MobileVLMConfig)
AutoModel.register(MobileVLMConfig, MobileVLMModel)
AutoModelForImageTextToText.register(MobileVLMConfig, MobileVLMForConditionalGeneration)
AutoProcessor.register(MobileVLMConfig, LlavaProcessor)
