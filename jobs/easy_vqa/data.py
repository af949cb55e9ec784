"""easy-VQA for this folder and jobs/smollm: question sets, packed once, and how models are compared on them.

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
    """Every training question with its own answer, mixed: neighbours ask of one image, and a batch is of one shard."""
    samples = list(easy_vqa_samples("train"))
    random.Random(0).shuffle(samples)
    return samples


def captions() -> Iterator[dict[str, Any]]:
    """Training images with a caption such as "a red circle", where their open questions tell both words."""
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
"""A shard's prefix → what it holds."""


def pack_once(*prefixes: str) -> None:
    """Write the sets that are not there yet."""
    packed = {name.rpartition("-")[0] for name in read_manifest(SHARDS, StorageSpec())}
    for prefix in prefixes:
        if prefix not in packed:
            samples = list(SETS[prefix]())
            pack(samples, SHARDS, prefix=prefix, total=len(samples))


def evaluation(models: dict[str, str], output: str, **changed: Any) -> EvaluationSpec:
    """The package's own test questions, whose answers are right; agreement is with the first model.

    `changed` are fields of the spec in place of these.
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
