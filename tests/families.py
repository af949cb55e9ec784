"""A small model and processor of each family of vision–language models, as transformers builds them, at random.

All have one tokenizer, that of tests.tiny with the families' special tokens after it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from tests.tiny import BOS, EOS, IDS, IMAGE, PAD, tiny_config, tiny_processor, tiny_tokenizer

SPECIAL = {
    "video_token": "<video>",
    "start": "<|im_start|>",
    "end": "<|im_end|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
    "video_pad": "<|video_pad|>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    **{f"row_{row}_col_{col}": f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)},
}
VOCAB = 448
SIDE, PATCH = 16, 8
"""Width and height in pixels of an image or of one of its crops, and of a patch."""
HIDDEN = 32

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}[[IMAGE]]{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Turns = Sequence[tuple[str, str]]
"""Pairs of question and answer; a question has `<image>` at the place of an image."""
Pieces = list[tuple[str, bool]]
"""Pairs of a text and a flag, which is true if the text is trained on."""


def tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the special tokens of all families; `named` gives one family's attributes for them."""
    made = tiny_tokenizer(chat_template=None)
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL.values())})
    for name, token in named.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def token_id(token: str) -> int:
    """Return the id of a special token."""
    return tokenizer().convert_tokens_to_ids(token)


def _with_video(kind: type, *arguments: Any, **options: Any) -> Any:
    """Return a processor for images and videos, without torchvision and num2words, which only videos need."""
    with (
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"),
        mock.patch.object(processing_smolvlm, "num2words", str),
    ):
        return kind(*arguments, None, **options)


def text_config(kind: str = "llama", **options: Any) -> dict[str, Any]:
    """Return the configuration of a language model, as a dict."""
    return {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "pad_token_id": IDS[PAD],
        "bos_token_id": IDS[BOS],
        "eos_token_id": IDS[EOS],
        **options,
    }


def vision_config(kind: str, **options: Any) -> dict[str, Any]:
    """Return the configuration of a vision tower, as a dict."""
    return {
        "model_type": kind,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        **options,
    }


def _qwen_vision(kind: str, **options: Any) -> dict[str, Any]:
    sizes = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    return {"model_type": kind, **sizes, "out_hidden_size": HIDDEN, **options}


def _qwen_ids() -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {f"vision_{end}_token_id": f"vision_{end}_token" for end in ("start", "end")}
    return {name: token_id(SPECIAL[token]) for name, token in names.items()}


GRID = [[16, 32], [32, 16], [32, 32]]
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def _llava() -> dict[str, Any]:
    return tiny_config(hidden=HIDDEN, vocab=VOCAB).to_dict()


def _llava_next() -> dict[str, Any]:
    return {
        "model_type": "llava_next",
        "text_config": text_config(),
        "vision_config": vision_config("clip_vision_model", projection_dim=16),
        "image_token_index": IDS[IMAGE],
        "image_grid_pinpoints": GRID,
    }


def _llava_onevision() -> dict[str, Any]:
    return {
        "model_type": "llava_onevision",
        "text_config": text_config("qwen2"),
        "vision_config": vision_config("siglip_vision_model", vision_use_head=False),
        "image_token_index": IDS[IMAGE],
        "video_token_index": token_id(SPECIAL["video_token"]),
        "image_grid_pinpoints": GRID,
    }


def _qwen2_5_vl() -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl",
        "text_config": text_config("qwen2_5_vl_text", rope_parameters=ROPE),
        "vision_config": _qwen_vision("qwen2_5_vl_vision", window_size=16, fullatt_block_indexes=[1]),
        **_qwen_ids(),
    }


def _qwen3_vl() -> dict[str, Any]:
    rope = ROPE | {"mrope_interleaved": True}
    return {
        "model_type": "qwen3_vl",
        "text_config": text_config("qwen3_vl_text", rope_parameters=rope, head_dim=16),
        "vision_config": _qwen_vision("qwen3_vl_vision", num_position_embeddings=16, deepstack_visual_indexes=[0]),
        **_qwen_ids(),
    }


def _idefics(kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "text_config": text_config(),
        "vision_config": vision_config(f"{kind}_vision"),
        "image_token_id": IDS[IMAGE],
        "scale_factor": 2,
    }


def _internvl() -> dict[str, Any]:
    return {
        "model_type": "internvl",
        "text_config": text_config("qwen2", tie_word_embeddings=True),
        "vision_config": vision_config("internvl_vision"),
        "image_token_id": token_id(SPECIAL["context_image_token"]),
        "image_seq_length": 1,
        "downsample_ratio": 0.5,
    }


def _llava_next_processor() -> Any:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=GRID
    )
    return LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _onevision_processor() -> Any:
    images = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=GRID)
    return _with_video(
        LlavaOnevisionProcessor,
        images,
        tokenizer(video_token=SPECIAL["video_token"]),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("[[IMAGE]]", f"{IMAGE}\n"),
    )


def _qwen_processor(kind: type) -> Any:
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    named = {"image_token": SPECIAL["image_pad"], "video_token": SPECIAL["video_pad"]}
    named |= {name: SPECIAL[name] for name in ("vision_start_token", "vision_end_token")}
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    return _with_video(kind, images, tokenizer(**named), chat_template=CHATML.replace("[[IMAGE]]", shown))


def _idefics3_processor() -> Any:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    template = processing_smolvlm.DEFAULT_CHAT_TEMPLATE
    return Idefics3Processor(images, tokenizer(), image_seq_len=1, chat_template=template)


def _smolvlm_processor() -> Any:
    images = SmolVLMImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    named = {name: SPECIAL[name] for name in ("fake_image_token", "end_of_utterance_token", "global_image_token")}
    return _with_video(
        SmolVLMProcessor,
        images,
        tokenizer(video_token=SPECIAL["video_token"], **named),
        image_seq_len=1,
        chat_template=processing_smolvlm.DEFAULT_CHAT_TEMPLATE,
    )


def _internvl_processor() -> Any:
    images = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_patches=4)
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    return _with_video(
        InternVLProcessor,
        images,
        tokenizer(**{name: SPECIAL[name] for name in names}),
        image_seq_length=1,
        chat_template=CHATML.replace("[[IMAGE]]", "<IMG_CONTEXT>\n"),
    )


def _asked(question: str) -> tuple[int, str]:
    return question.count(IMAGE), question.replace(IMAGE, "").strip()


def _vicuna(turns: Turns) -> Iterator[tuple[str, bool]]:
    for question, answer in turns:
        images, words = _asked(question)
        yield f"USER: {(IMAGE + chr(10)) * images}{words} ASSISTANT: ", False
        yield answer + EOS, True


def _chatml(image: str) -> Callable[[Turns], Iterator[tuple[str, bool]]]:
    def pieces(turns: Turns) -> Iterator[tuple[str, bool]]:
        yield "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False
        for question, answer in turns:
            images, words = _asked(question)
            yield f"<|im_start|>user\n{image * images}{words}<|im_end|>\n<|im_start|>assistant\n", False
            yield answer + "<|im_end|>", True
            yield "\n", False

    return pieces


def _utterances(turns: Turns) -> Iterator[tuple[str, bool]]:
    yield "<|im_start|>", False
    for question, answer in turns:
        images, words = _asked(question)
        colon = ":" if images else ": "
        yield f"User{colon}{IMAGE * images}{words}<end_of_utterance>\nAssistant:", False
        yield f" {answer}<end_of_utterance>", True
        yield "\n", False


@dataclass(frozen=True)
class Family:
    """One family: its processor, its configuration and its template."""

    processor: Callable[[], Any]
    config: Callable[[], dict[str, Any]]
    template: str
    """Value of `DataSpec.template`."""
    pieces: Callable[[Turns], Iterator[tuple[str, bool]]]
    """Rendering of a conversation without expanded image tokens, written again from the template's definition."""


def _llava_processor() -> Any:
    processor = tiny_processor(chat_template=None)
    processor.tokenizer = tokenizer()
    return processor


FAMILIES = {
    "llava": Family(_llava_processor, _llava, "vicuna_v1", _vicuna),
    "llava_next": Family(_llava_next_processor, _llava_next, "vicuna_v1", _vicuna),
    "llava_onevision": Family(_onevision_processor, _llava_onevision, "chat", _chatml(f"{IMAGE}\n")),
    "qwen2_5_vl": Family(
        lambda: _qwen_processor(Qwen2_5_VLProcessor),
        _qwen2_5_vl,
        "chat",
        _chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    ),
    "qwen3_vl": Family(
        lambda: _qwen_processor(Qwen3VLProcessor),
        _qwen3_vl,
        "chat",
        _chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    ),
    "idefics3": Family(_idefics3_processor, lambda: _idefics("idefics3"), "chat", _utterances),
    "smolvlm": Family(_smolvlm_processor, lambda: _idefics("smolvlm"), "chat", _utterances),
    "internvl": Family(_internvl_processor, _internvl, "chat", _chatml("<IMG_CONTEXT>\n")),
}


def save_language_model(folder: str | Path, *, seed: int = 0, **options: Any) -> str:
    """Write a causal language model and a tokenizer into a folder; return its path."""
    tree = text_config(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tree.pop("model_type"), **tree))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_llava_qwen(folder: str | Path, *, seed: int = 0) -> str:
    """Write a LLaVA of Qwen2 and SigLIP, whose patches are all image tokens, into a folder; return its path."""
    config = {
        "model_type": "llava",
        "text_config": text_config("qwen2"),
        "vision_config": vision_config("siglip_vision_model", vision_use_head=False),
        "image_token_index": IDS[IMAGE],
        "vision_feature_select_strategy": "full",
    }
    build(config, seed=seed).save_pretrained(folder)
    processor = _llava_processor()
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    processor.save_pretrained(folder)
    return str(folder)


def build(config: dict[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """Return a model with random weights that depend only on the seed, so large that logits differ between tokens."""
    tree = dict(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(tree.pop("model_type"), **tree))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
