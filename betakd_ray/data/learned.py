"""What a model learns of a rendered sample, as text."""

from itertools import groupby
from typing import Any

from betakd_ray.batch.sample import Rendering


def learned_texts(tokenizer: Any, rendering: Rendering) -> list[str]:
    """Return the text of each run of answer tokens, with the control token that closes it."""
    pairs = zip(rendering.input_ids.tolist(), rendering.answer_mask.tolist(), strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for is_answer, run in runs if is_answer]
