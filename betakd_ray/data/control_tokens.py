"""Control tokens: strings such as `</s>` that a tokenizer makes into one token, which ends an answer or begins a turn.

Only a template may write them. In the text of data they would be learned as part of an answer, or would end a turn that
somebody else wrote. They are found by their ids in the tokenized text, not by their strings in the data: a tokenizer
may normalise, and a template may join the two halves of one (`<|im_<image>end|>` without its image).
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from betakd_ray.batch.sample import IMAGE

WORD = "Text"
PIPED = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
BRACKETED = re.compile(r"<.*>|\[.*\]|\{.*\}", re.DOTALL)


def control_tokens(tokenizer: Any, template: object, allowed: Collection[str]) -> dict[int, str]:
    """Return id → text of the tokens that only a template may write.

    These are the special tokens. Other added tokens may be ordinary text: runs of spaces, `<b>`, a domain's words.
    Of these, tokens are included that have the form `<|…|>`, that the tokenizer names as `chat_control_tokens`, or that
    are in brackets and stand in `template`, the source of the chat template that is used.
    """
    source, named = str(template or ""), tokenizer.chat_control_tokens or ()
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        written = text in source and BRACKETED.fullmatch(text)
        if token.special or text in named or PIPED.fullmatch(text) or written:
            found[token_id] = text
    return {token_id: text for token_id, text in found.items() if text not in allowed}


def counted(tokenizer: Any, control: dict[int, str], text: str) -> Counter[str]:
    """Return how often each control token occurs in a text."""
    # Without the tokenizer's own start token: it would hide one that the data begin with.
    encoded = tokenizer(text, add_special_tokens=False)
    found: Counter[str] = Counter()
    for at, token_id in enumerate(encoded["input_ids"]):
        if token_id not in control:
            continue
        if token_id == tokenizer.unk_token_id:
            # It also stands for a character that the vocabulary lacks, which is no fault of the text.
            start, end = encoded.token_to_chars(at)
            if control[token_id] not in text[start:end]:
                continue
        found[control[token_id]] += 1
    return found


def neutral(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return turns with the same images and one ordinary word each. So all their control tokens are the template's.

    A blank turn stays blank, because templates may leave it out.
    """
    return [
        {"from": turn["from"], "value": IMAGE * turn["value"].count(IMAGE) + _word(turn["value"])} for turn in turns
    ]


def neutral_system(system: str | None) -> str | None:
    """Return a system prompt of one ordinary word; none stays none."""
    return system and _word(system)


def _word(text: str) -> str:
    return WORD if text.replace(IMAGE, "").strip() else ""


def contained(found: Mapping[str, int]) -> str:
    """Return what is wrong with a text that has these control tokens."""
    return (
        f"the text contains the control token {', '.join(map(repr, found))}, which only the template may write. Remove "
        "it from the text, or keep it with data.special_tokens"
    )
