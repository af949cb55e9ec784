"""How a result generates: the greedy decoding of an evaluation, as transformers stores it beside a model."""

from typing import Any

from transformers import GenerationConfig

NEW_TOKENS = 512
"""Default length in tokens of an answer, if the model has room for it twice."""


def greedy(
    own: GenerationConfig | None, tokenizer: Any, max_new_tokens: int, *, learned_end: int | None = None
) -> GenerationConfig:
    """Return the settings for greedy decoding, which ends where an evaluation ends.

    `own` are the model's settings until now: only the tokens at which it ends are kept. `learned_end` is the token that
    ended the answers of training.
    """
    known = getattr(own, "eos_token_id", None)
    # All: a student learns to end with the tokenizer's token, but a chat model may end its turns with another one.
    ends = {tokenizer.eos_token_id, learned_end, *(known if isinstance(known, list) else [known])} - {None}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends) if len(ends) > 1 else min(ends),
        pad_token_id=pad,
    )


def default_length(config: Any) -> int:
    """Return the default length in tokens of an answer: at most half of what the model has positions for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(NEW_TOKENS, positions // 2) if positions else NEW_TOKENS
