"""MobileVLM V2 (arXiv 2402.03766) as a transformers model: LLaVA whose projector is LDPv2.

Vision tower, language model, generation and saving are those of transformers' LLaVA. Importing this module makes the
family known to transformers' Auto classes, under the model type `mobilevlm_v2`; `mobilevlm` is the original's, whose
folders betakd_ray.models.convert reads and writes.
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
    """LLaVA's configuration; `image_seq_length` (a square number) is how many tokens LDPv2 makes of an image."""

    model_type = "mobilevlm_v2"

    # LLaVA also takes them as trees; they are configurations by the time anyone reads them.
    vision_config: Any = None
    text_config: Any = None
    image_seq_length: int = 144
    mm_vision_tower: str = "openai/clip-vit-large-patch14-336"
    """Where the original tool chain finds its image processor; only an export reads this."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.side**2 != self.image_seq_length:
            raise ValueError(f"image_seq_length is {self.image_seq_length}; LDPv2 makes a square of tokens, e.g. 144")

    @property
    def side(self) -> int:
        """Image tokens along one side of an image."""
        return math.isqrt(self.image_seq_length)


class MobileVLMProjector(LlavaMultiModalProjector):
    """LDPv2: LLaVA's two linear layers, an average pool, and a position-encoding generator (PEG).

    PEG is a 3×3 convolution of each channel by itself, added to what it saw; its zero padding tells a token where it
    is (MobileVLM V2 §3.3).
    """

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.side = config.side
        self.peg = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)

    def forward(
        self, image_features: Float[Tensor, "images patches vision_width"]
    ) -> Float[Tensor, "images tokens width"]:
        """Raises ModelError if the patches are no square."""
        patches = image_features.shape[1]
        rows = math.isqrt(patches)
        if rows**2 != patches:
            raise ModelError(
                f"the vision tower gives {patches} tokens an image, and LDPv2 pools a square of patches. Give square "
                "images; vision_feature_select_strategy is `default` for a tower with a class token, else `full`."
            )
        features = super().forward(image_features)
        pooled = adaptive_avg_pool2d(features.transpose(1, 2).unflatten(2, (rows, rows)), self.side)
        return (self.peg(pooled) + pooled).flatten(2).transpose(1, 2)


class MobileVLMModel(LlavaModel):
    """Vision tower, LDPv2 and language model, without the head."""

    config: MobileVLMConfig

    def __init__(self, config: MobileVLMConfig) -> None:
        super(LlavaModel, self).__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = MobileVLMProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()


class MobileVLMForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model; called, trained and saved as transformers' LLaVA is."""

    config: MobileVLMConfig

    def __init__(self, config: MobileVLMConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = MobileVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


def mobilevlm_processor(config: MobileVLMConfig, image_processor: Any, tokenizer: Any) -> LlavaProcessor:
    """LLaVA's processor, which counts image tokens by their size in pixels: here that of pooled patches.

    Raises ModelError where no size gives `image_seq_length` tokens; from `side`² pixels on there is always one.
    """
    pixels = config.vision_config.image_size
    size = pixels // config.side
    if size == 0 or pixels // size != config.side:
        raise ModelError(f"images of {pixels} pixels do not divide into {config.side} tokens a side (image_seq_length)")
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
