"""Stage 1 of the teacher: a processor, and a vision tower that distinguishes colours and shapes.

The tower learns this in 1,600 steps, with a linear head on two labels per image; the head is then thrown away. Training
on answers, through a language model with random weights, had not taught it in about 500 steps.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, LevitModel, LlavaProcessor, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
COLOURS = ["green", "red", "gray", "teal", "black", "yellow", "brown", "blue"]
SHAPES = ["circle", "rectangle", "triangle"]
UNKNOWN = -100
"""Label that cross-entropy ignores."""
STEPS, BATCH = 1600, 64


def make_processor(samples: Iterable[dict[str, Any]]) -> LlavaProcessor:
    """Return a processor with a byte-level BPE tokenizer, for images of 64×64 pixels.

    Every word of easy-VQA is one token, and every image is one token.
    """
    turns = [[turn["value"].replace("<image>", "") for turn in sample["conversations"]] for sample in samples]
    questions, answers = (sorted(set(texts)) for texts in zip(*turns, strict=True))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,  # more than the training texts have merges for
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"USER: {q} ASSISTANT: {a}" for q in questions for a in answers), trainer)
    size = {"height": 64, "width": 64}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=64,
        vision_feature_select_strategy="full",
    )


def labels(samples: Iterable[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return image path → (index of its colour, index of its shape). UNKNOWN if no question and answer name it.

    A word in question or answer describes the image, unless it is denied, e.g. "is there a red shape?" – "no".
    """
    found: dict[str, list[int]] = {}
    for sample in samples:
        question, answer = (turn["value"] for turn in sample["conversations"])
        label = found.setdefault(sample["images"][0], [UNKNOWN, UNKNOWN])
        words = re.findall(r"\w+", f"{question} {answer}")
        negated = "not" in words or "no" in words[:-1]
        if answer not in ("yes", "no") or (answer == "yes") != negated:
            for kind, names in enumerate((COLOURS, SHAPES)):
                label[kind] = next((names.index(word) for word in words if word in names), label[kind])
    return {path: (colour, shape) for path, (colour, shape) in found.items()}


def train_tower(tower: LevitModel, processor: LlavaProcessor, labelled: dict[str, tuple[int, int]]) -> None:
    """Train the tower with AdamW on the sum of two cross-entropies, with random mirroring of the images.

    `labelled` is image path → (colour, shape). The tower is in evaluation mode afterwards.
    """
    pictures = [Image.open(path).convert("RGB") for path in labelled]
    images: Tensor = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    targets = torch.tensor(list(labelled.values()))
    head = nn.Linear(tower.config.hidden_sizes[-1], len(COLOURS) + len(SHAPES))
    learning = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, STEPS, pct_start=0.1, cycle_momentum=False)
    tower.train()
    for _ in track(range(STEPS), "vision tower"):
        chosen = torch.randperm(len(images))[:BATCH]
        mirrored = torch.rand(BATCH, 1, 1, 1) < 0.5
        batch = torch.where(mirrored, images[chosen].flip(-1), images[chosen])
        loss = label_loss(head(tower(batch).pooler_output), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
    tower.eval()


def label_loss(logits: Float[Tensor, "batch 11"], targets: Int[Tensor, "batch 2"]) -> Float[Tensor, ""]:
    """Return the cross-entropy of the colour plus that of the shape, in nats, as a mean over the batch."""
    colour, shape = logits.split([len(COLOURS), len(SHAPES)], dim=1)
    return F.cross_entropy(colour, targets[:, 0]) + F.cross_entropy(shape, targets[:, 1])
