"""Data of easy-VQA for this folder and jobs/smollm: question sets, packed once, and an evaluation of models on them.

`python -m jobs.easy_vqa.data` packs them all.
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import groupby, product
from typing import Any

from betakd_ray.data.manifest import read_manifest
from betakd_ray.data.pack import pack
from betakd_ray.spec import EvaluationSpec, StorageSpec, parse_spec
from jobs.easy_vqa.samples import SHAPES, easy_vqa_samples

SHARDS = "runs/easy-vqa/shards"
TEST = f"{SHARDS}/test-*.tar"
COLOURS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def clean() -> list[dict[str, Any]]:
    """Return every training question with its correct answer, shuffled.

    Unshuffled, neighbours are about the same image, and so would be the samples of a batch, which come from one shard.
    """
    samples = list(easy_vqa_samples("train"))
    random.Random(0).shuffle(samples)
    return samples


def captions() -> Iterator[dict[str, Any]]:
    """Yield training images with a caption such as "a red circle".

    Only images whose open questions and answers name both the colour and the shape are used.
    """
    for (image,), samples in groupby(easy_vqa_samples("train"), key=lambda sample: sample["images"]):
        turns = [turn["value"] for sample in samples if sample["type"] == "open" for turn in sample["conversations"]]
        told = set(" ".join(turns).replace("?", "").split())
        for colour, shape in product(told & COLOURS, told.intersection(SHAPES)):
            yield {
                "id": f"caption-{image.rpartition('/')[2]}",
                "conversations": [
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": f"a {colour} {shape}"},
                ],
                "images": [image],
            }


SETS = {
    "captions": captions,
    "noisy": partial(easy_vqa_samples, "train", limit=6000, wrong_answers=0.5),
    "symmetric": partial(easy_vqa_samples, "train", limit=6000, wrong_answers=0.5, instead="any"),
    "noiseless": partial(easy_vqa_samples, "train", limit=6000),
    "clean": clean,
    "test": partial(easy_vqa_samples, "test", limit=3000),
}
"""Prefix of a set's shards → function that returns its samples."""


def pack_once(*prefixes: str) -> None:
    """Write the sets that do not exist yet."""
    packed = {name.rpartition("-")[0] for name in read_manifest(SHARDS, StorageSpec())}
    for prefix in prefixes:
        if prefix not in packed:
            samples = list(SETS[prefix]())
            pack(samples, SHARDS, prefix=prefix, total=len(samples))


def evaluation(models: dict[str, str], output: str, **changed: Any) -> EvaluationSpec:
    """Return an evaluation of `models` (label → path) on easy-VQA's test questions, whose answers are correct.

    Agreement is measured with the first model. `changed` replaces fields of the spec.
    """
    usual = {
        "name": "evaluation",
        "models": {label: {"path": path} for label, path in models.items()},
        "data": {"train": TEST, "system_prompt": ""},
        "agreement_with": next(iter(models)),
        "max_new_tokens": 3,
        "batch_size": 250,
        "output": output,
    }
    return parse_spec(usual | changed, EvaluationSpec)


if __name__ == "__main__":
    pack_once(*SETS)
