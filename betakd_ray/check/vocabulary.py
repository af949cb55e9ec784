"""Check that tokenizer, embedding and head belong together."""

from typing import Any

import torch

from betakd_ray.check.finding import Finding
from betakd_ray.check.subject import Subject
from betakd_ray.errors import VocabularyMismatch
from betakd_ray.models.compatibility import check_vocabularies


def check_vocabulary(subject: Subject, student_processor: Any = None) -> list[Finding]:
    """Return findings on token ids: that each has a row, that rows in use are not empty, and that names agree."""
    expected = "a row of embedding and head for each token id, and the same ids in tokenizer, config and student"
    seen = _fault(subject)
    if seen:
        cause = "tokenizer and weights are not of one checkpoint, or a vocabulary was resized in one of them only"
        remedy = "Take tokenizer, config.json and weights from one checkpoint."
        return [Finding("vocabulary", seen, expected, "fail", cause, remedy, subject.part)]
    if student_processor is not None:
        try:
            check_vocabularies(subject.renderer.processor, student_processor)
        except VocabularyMismatch as error:
            return [Finding("vocabulary", str(error), expected, "fail", "two vocabularies", part=subject.part)]
    rows, tokens = len(subject.head), len(subject.renderer.tokenizer)
    return [Finding("vocabulary", f"{tokens} tokens, {rows} rows", expected, "ok", part=subject.part)]


def _fault(subject: Subject) -> str:
    """Return what is wrong with the ids; empty if nothing is."""
    embedding = subject.model.get_input_embeddings().weight
    tokenizer, config = subject.renderer.tokenizer, subject.model.config
    largest = max(tokenizer.get_vocab().values())
    rows = {"embedding": len(embedding), "lm_head": len(subject.head)}
    for name, count in rows.items():
        if largest >= count:
            return f"the tokenizer has id {largest}, but the {name} only {count} rows"
    if rows["embedding"] != rows["lm_head"]:
        return f"the embedding has {rows['embedding']} rows, the head's copy {rows['lm_head']}"
    image = getattr(config, "image_token_id", None)
    if subject.renderer.image_processor is not None and image != subject.renderer.image_token_id:
        return f"the config's image token is {image}, the processor's {subject.renderer.image_token_id}"
    text = config.get_text_config()
    # Not a set: a model with several end-of-sequence tokens has a list of them.
    ends = [getattr(each, "eos_token_id", None) for each in (text, subject.model.generation_config) if each is not None]
    known = {token for each in ends for token in (each if isinstance(each, list) else [each]) if token is not None}
    if any(token >= len(embedding) for token in known):
        return f"the config's end-of-sequence token {max(known)} has no row"
    if not subject.samples:
        return ""
    used = sorted({int(token) for each in subject.renderings for token in each.input_ids} - {image})
    empty = [
        token
        for token, row in zip(used, embedding[torch.tensor(used, device=embedding.device)], strict=True)
        if not row.any()
    ]
    if empty:
        name = tokenizer.convert_ids_to_tokens(empty[0])
        return (
            f"{len(empty)} of {len(used)} tokens of the samples have an embedding of zeros, e.g. {name!r} ({empty[0]})"
        )
    return ""
