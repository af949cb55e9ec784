"""A record as people write it → the turns of a conversation, its system prompt and the images that it names.

Forms that are read, in the order in which they are looked for:

    conversations, messages, conversation   turns of {from, value} (LLaVA, ShareGPT) or {role, content} (OpenAI, TRL)
    prompt and completion                   both lists of such turns (TRL)
    texts                                   a list of {user, assistant} (The Cauldron)
    question and answer                     texts, under one of the names in QUESTIONS and ANSWERS
    caption                                 the text of an image without a question
"""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from betakd_ray.batch.sample import IMAGE
from betakd_ray.data.media import own_placeholders

Turn = dict[str, str]
TURNS = ("conversations", "messages", "conversation", "dialog")
QUESTIONS = ("question", "query", "instruction", "prompt", "problem")
ANSWERS = ("answer", "response", "output", "completion", "solution")
CAPTIONS = ("caption", "text")
SPEAKERS = {
    "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "chatgpt": "gpt", "model": "gpt", "bot": "gpt",
    "system": "system", "developer": "system",
}  # fmt: skip
"""Name of a speaker in other formats → the name in ours."""
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Conversation:
    """What a record says: its turns, its system prompt, the images named within the turns, and its other fields."""

    turns: list[Turn]
    system: str | None = None
    images: list[Any] = field(default_factory=list)
    """Names or contents of the images that stand within the turns."""
    rest: dict[str, Any] = field(default_factory=dict)


def read_conversation(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a record in any of the forms above. Raises ValueError with the reason."""
    rest = dict(record)
    images: list[Any] = []
    spoken = [_turn(number, turn, images) for number, turn in enumerate(_raw_turns(rest))]
    system = rest.pop("system", None) if isinstance(rest.get("system"), str) else None
    if spoken and spoken[0]["from"] == "system":
        system = spoken.pop(0)["value"]
    if any(turn["from"] == "system" for turn in spoken):
        raise ValueError("a later turn is from the system; only the first turn may be")
    return Conversation(spoken, system or None, images, rest)


def check_conversation(turns: Any, images: int) -> list[Turn]:
    """Return the turns of a LLaVA conversation, with a placeholder per image. Raises ValueError with the reason."""
    if not isinstance(turns, list) or not turns:
        raise ValueError('"conversations" is not a list of turns')
    checked = [_turn(number, turn, []) for number, turn in enumerate(turns)]
    for number, (before, turn) in enumerate(pairwise(checked), 1):
        if turn["from"] == before["from"]:
            raise ValueError(
                f"turn {number} is from {turn['from']}, like the turn before; human and gpt must alternate"
            )
    if not any(turn["from"] == "gpt" and turn["value"].strip() for turn in checked):
        raise ValueError("the conversation has no answer (no gpt turn with text)")
    questions = iter(own_placeholders([turn["value"] for turn in checked if turn["from"] == "human"], images))
    checked = [{**turn, "value": next(questions)} if turn["from"] == "human" else turn for turn in checked]
    placeholders = sum(turn["value"].count(IMAGE) for turn in checked)
    if images and not placeholders:
        return _with_placeholders(checked, images)
    if placeholders != images:
        raise ValueError(f"{placeholders} {IMAGE} placeholders, but {images} images")
    return checked


# --------------------------------------------------------------------------------------------------- forms


def _raw_turns(rest: dict[str, Any]) -> list[Any]:
    """Return the turns of a record as they are, and remove their fields from `rest`."""
    if key := _first(rest, TURNS):
        turns = rest.pop(key)
        if not isinstance(turns, list) or not turns:
            raise ValueError(f'"{key}" is not a list of turns')
        return turns
    if isinstance(rest.get("prompt"), list) and isinstance(rest.get("completion"), list):
        return [*rest.pop("prompt"), *rest.pop("completion")]
    if isinstance(rest.get("texts"), list) and rest["texts"]:
        return list(_user_and_assistant(rest.pop("texts")))
    if question := _first(rest, QUESTIONS):
        return _asked(rest, question)
    if caption := _first(rest, CAPTIONS):
        return [{"from": "human", "value": IMAGE}, {"from": "gpt", "value": _text(rest.pop(caption), caption)}]
    keys = ", ".join(map(repr, rest)) or "none"
    raise ValueError(
        'there is no conversation: expected "conversations" or "messages" (lists of turns), "question" and "answer", '
        f"or a caption; its keys are {keys[:200]}. Name other keys with --map question=KEY,answer=KEY,image=KEY"
    )


def _user_and_assistant(texts: list[Any]) -> Iterator[Turn]:
    for number, pair in enumerate(texts):
        if not isinstance(pair, dict):
            raise ValueError(f'"texts" {number} is not {{"user": text, "assistant": text}}')
        yield {"from": "human", "value": _text(pair.get("user"), f'"texts" {number}, "user"')}
        yield {"from": "gpt", "value": _text(pair.get("assistant"), f'"texts" {number}, "assistant"')}


def _asked(rest: dict[str, Any], question: str) -> list[Turn]:
    answer = _first(rest, ANSWERS)
    if answer is None:
        raise ValueError(
            f"there is a {question!r}, but no answer under any of the keys {', '.join(ANSWERS)}; name its key with "
            "--map answer=KEY"
        )
    asked, said = _text(rest.pop(question), question), _answer(rest.pop(answer), answer)
    if question == "instruction" and isinstance(rest.get("input"), str) and rest["input"].strip():
        asked = f"{asked}\n{rest.pop('input')}"
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


def _answer(value: Any, key: str) -> str:
    """Return an answer's text; of a list, its only different value."""
    if isinstance(value, list) and value:
        different = {_text(each, key) for each in value}
        if len(different) > 1:
            raise ValueError(
                f"{key!r} holds {len(different)} different answers; a sample has one. Choose one when the file is made"
            )
        return different.pop()
    return _text(value, key)


def _text(value: Any, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{key!r} is {repr(value)[:60]}; expected a text")
    return str(value)


def _first(record: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    return next((key for key in keys if record.get(key) is not None), None)


# --------------------------------------------------------------------------------------------------- turns


def _turn(number: int, turn: Any, images: list[Any]) -> Turn:
    """Return a turn in LLaVA's form; add the images within it to `images`."""
    if not isinstance(turn, dict):
        raise ValueError(f'turn {number} is not {{"from": "human" or "gpt", "value": text}}')
    name = turn.get("from", turn.get("role"))
    speaker = SPEAKERS.get(name.lower()) if isinstance(name, str) else None
    if speaker is None:
        raise ValueError(f"turn {number} is from {name!r}; the speakers that are read are {', '.join(SPEAKERS)}")
    value = turn.get("value", turn.get("content"))
    if isinstance(value, list):
        value = _joined(number, value, images)
    if not isinstance(value, str):
        raise ValueError(f'turn {number} is not {{"from": "human" or "gpt", "value": text}}')
    if speaker != "human" and IMAGE in value:
        raise ValueError(f"turn {number}: an answer cannot contain {IMAGE}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"turn {number} has half of a surrogate pair at character {error.start}") from error
    return {"from": speaker, "value": value}


def _joined(number: int, parts: list[Any], images: list[Any]) -> str:
    """Return the text of a content in parts, with a placeholder where an image stands."""
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        written = part.get("text") if isinstance(part, dict) else part
        if kind in ("text", "input_text", "output_text") or (kind is None and isinstance(written, str)):
            # Parts of text that follow one another are paragraphs; a text beside an image stands as it is.
            text += str(written)
        elif kind in ("image", "image_url", "input_image"):
            text += IMAGE
            if (named := _part_image(part)) is not None:
                images.append(named)
        else:
            raise ValueError(
                f"turn {number} has a part of the type {kind!r}; the types that are read are text, image and image_url"
            )
    return text


def _part_image(part: dict[str, Any]) -> Any:
    """Return the image that a part names or holds; None if it only marks the image's place."""
    value = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None), None)
    return value.get("url") if isinstance(value, dict) and "url" in value else value


def decoded(image: Any) -> Any:
    """Return the content of an image that is written as a data URL; any other value unchanged."""
    if not isinstance(image, str) or not (match := _DATA_URL.match(image)):
        return image
    try:
        return base64.b64decode(image[match.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image is a data URL that is not base64: {error}") from error


def _with_placeholders(turns: list[Turn], images: int) -> list[Turn]:
    first = next((number for number, turn in enumerate(turns) if turn["from"] == "human"), None)
    if first is None:
        raise ValueError("there are images, but no human turn to put them in")
    front = {"from": "human", "value": f"{IMAGE}\n" * images + turns[first]["value"]}
    return [*turns[:first], front, *turns[first + 1 :]]
