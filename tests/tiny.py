"""A vision–language model that is small enough for a test: LLaVA with 4 tokens per image, and its processor.

Nothing is downloaded. The vocabulary is trained on a few lines of text, and is the same in every process.
"""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from betakd_ray.data.samples import RawSample

IMAGE_SIZE, PATCH = 16, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
IDS = {token: index for index, token in enumerate((PAD, BOS, EOS, UNK, IMAGE))}
VOCAB = 384
CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the image? ASSISTANT: A red circle on the left.",
    "USER: What color is the square? ASSISTANT: The square is blue, yes. no yes",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ '</s>\n' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def tiny_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, which begins a text with `<s>` and knows `<image>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(IDS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, IDS[BOS])]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=chat_template,
    )


def tiny_processor(*, image_size: int = IMAGE_SIZE, chat_template: str | None = CHAT_TEMPLATE) -> LlavaProcessor:
    """Return the tokenizer with CLIP's image processor at 16×16 pixels: (16 / 8)² = 4 tokens per image."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": image_size, "width": image_size},
            crop_size={"height": image_size, "width": image_size},
        ),
        tokenizer=tiny_tokenizer(chat_template=chat_template),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=chat_template,
    )


def tiny_config(*, hidden: int = 16, layers: int = 2, vocab: int = VOCAB, image_size: int = IMAGE_SIZE) -> LlavaConfig:
    """Return the configuration of a LLaVA of about 30,000 parameters."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=PATCH,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IDS[IMAGE],
        image_token_id=IDS[IMAGE],
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )


def raw_sample(number: int, answer: str, *, has_image: bool) -> RawSample:
    """Return a sample of one question, with or without an image, and its answer."""
    question = f"{IMAGE}\nWhich?" if has_image else "Which?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), (30 * number, 90, 200)).save(buffer, "PNG")
    return RawSample(str(number), number, str(number), turns, [buffer.getvalue()] if has_image else [])


def tiny_model(*, seed: int = 0, **config: Any) -> LlavaForConditionalGeneration:
    """Return a model with random weights that depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(tiny_config(**config)).eval()


def save_tiny(folder: str | Path, *, seed: int = 0, **config: Any) -> str:
    """Write model and processor into a folder, as in a hub snapshot; return its path."""
    tiny_model(seed=seed, **config).save_pretrained(folder)
    tiny_processor(image_size=config.get("image_size", IMAGE_SIZE)).save_pretrained(folder)
    return str(folder)


def numbered_samples(count: int, broken: int | None = None) -> list[dict[str, Any]]:
    """Return samples in the form that `pack` takes.

    Some samples are text only. The image of number `broken` is truncated.
    """
    samples = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 12), (number % 256, 90, 200)).save(buffer, "PNG")
        image = buffer.getvalue() if number != broken else buffer.getvalue()[:40]
        turns = [{"from": "human", "value": "<image>\nWhich number?"}, {"from": "gpt", "value": f"It is {number}."}]
        text_only = number % 7 == 3
        samples.append(
            {
                "id": str(number),
                "conversations": [{**turns[0], "value": "Which number?"}, turns[1]] if text_only else turns,
                "images": [] if text_only else [image],
            }
        )
    return samples


def job_tree(home: Path, output: Path) -> dict[str, Any]:
    """Return the tree of a spec: a small job with the models and shards that are in the folder `home`."""
    return {
        "name": "job",
        "data": {"train": str(home / "shards" / "train-*.tar")},
        "teacher": {"path": str(home / "teacher")},
        "student": {"init": {"kind": "checkpoint", "path": str(home / "student")}},
        "objective": {"energies": "fkl"},
        "training": {"global_batch_size": 4, "micro_batch_size": 4},
        "output": str(output),
    }
