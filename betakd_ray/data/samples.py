"""Samples as they stand in a shard: the members of a tar, and the conversation, images and fields that they hold."""

import json
import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from betakd_ray.batch.sample import IMAGE

Turn = dict[str, str]
IMAGE_NAME = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp)")


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample with its conversation checked and its images still encoded."""

    key: str
    index: int
    id: str
    conversation: list[Turn]
    images: list[bytes]
    extra: dict[str, Any] = field(default_factory=dict)  # the record's other fields


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be used for training, and the reason."""

    key: str
    index: int
    reason: str


class Unrenderable(Exception):
    """Error of a sample that cannot become a training example. Its message is the reason kept in quarantine."""


@dataclass(slots=True)
class TarMembers:
    """Members of a tar that share a key: extension → content, and the first fault found in them."""

    key: str
    index: int
    wanted: bool
    members: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    fault: str | None = None


def check_conversation(turns: Any, images: int) -> list[Turn]:
    """Return the turns of a LLaVA conversation, with a placeholder per image. Raises ValueError with the reason."""
    if not isinstance(turns, list) or not turns:
        raise ValueError('"conversations" is not a list of turns')
    checked = [_turn(number, turn) for number, turn in enumerate(turns)]
    for number, (before, turn) in enumerate(pairwise(checked), 1):
        if turn["from"] == before["from"]:
            raise ValueError(
                f"turn {number} is from {turn['from']}, like the turn before; human and gpt must alternate"
            )
    if not any(turn["from"] == "gpt" and turn["value"].strip() for turn in checked):
        raise ValueError("the conversation has no answer (no gpt turn with text)")
    placeholders = sum(turn["value"].count(IMAGE) for turn in checked)
    if images and not placeholders:
        return _with_placeholders(checked, images)
    if placeholders != images:
        raise ValueError(f"{placeholders} {IMAGE} placeholders, but {images} images")
    return checked


def parse_sample(group: TarMembers) -> RawSample | BadSample:
    try:
        if group.fault:
            raise ValueError(group.fault)
        record = _record(group.members)
        images = _images(group.members)
        conversation = check_conversation(record.pop("conversations", None), len(images))
        sample_id = str(record.pop("id", group.key))
        # JSON may hold half of a surrogate pair, which cannot be encoded. It is found here, where the sample can be
        # refused.
        sample_id.encode()
    except ValueError as error:
        return BadSample(group.key, group.index, str(error))
    return RawSample(group.key, group.index, sample_id, conversation, images, extra=record)


def _record(members: dict[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        raise ValueError(f"there is no json member; the members are {sorted(members)}")
    try:
        record = json.loads(members["json"].decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"the json member is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the json member is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"the json member holds a {type(record).__name__}, not an object")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises ValueError for a repeated name: `json` would keep the last value."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError(f"a name occurs twice in {[name for name, _ in pairs]}")
    return made


def _images(members: dict[str, bytes]) -> list[bytes]:
    """Return the images in the order of their numbers; an unnumbered image comes first."""
    matches = [(match, content) for name, content in members.items() if (match := IMAGE_NAME.fullmatch(name))]
    numbered = sorted(((int(match[1] or -1), content) for match, content in matches), key=lambda pair: pair[0])
    numbers = [number for number, _ in numbered]
    if numbers and (numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers)))):
        raise ValueError(f"images {sorted(match[0] for match, _ in matches)} are not numbered 0, 1, 2 … or 1, 2, 3 …")
    return [content for _, content in numbered]


def _turn(number: int, turn: Any) -> Turn:
    if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
        raise ValueError(f'turn {number} is not {{"from": "human" or "gpt", "value": text}}')
    if turn["from"] == "gpt" and IMAGE in turn["value"]:
        raise ValueError(f"turn {number}: an answer cannot contain {IMAGE}")
    try:
        turn["value"].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"turn {number} has half of a surrogate pair at character {error.start}") from error
    return {"from": turn["from"], "value": turn["value"]}


def _with_placeholders(turns: list[Turn], images: int) -> list[Turn]:
    first = next((number for number, turn in enumerate(turns) if turn["from"] == "human"), None)
    if first is None:
        raise ValueError("there are images, but no human turn to put them in")
    front = {"from": "human", "value": f"{IMAGE}\n" * images + turns[first]["value"]}
    return [*turns[:first], front, *turns[first + 1 :]]
