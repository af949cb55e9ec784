"""Samples as they stand in a shard: the members of a tar, and the conversation, images and fields that they hold."""

import json
from dataclasses import dataclass, field
from typing import Any

from betakd_ray.data.conversations import CAPTIONS, QUESTIONS, TURNS, Turn, check_conversation, read_conversation
from betakd_ray.data.media import IMAGE_NAME, STILL, require_media_read, unread_members


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample with its conversation checked and its images still encoded."""

    key: str
    index: int
    id: str
    conversation: list[Turn]
    images: list[bytes]
    extra: dict[str, Any] = field(default_factory=dict)  # the record's other fields
    system: str | None = None
    """The record's own system prompt."""


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


def parse_sample(group: TarMembers) -> RawSample | BadSample:
    """Return the sample of a group of members, or the reason why it cannot be used."""
    try:
        if group.fault:
            raise ValueError(group.fault)
        record = _record(group.members)
        if unread := unread_members(list(group.members)):
            raise ValueError(
                f"the member{'s' if len(unread) > 1 else ''} {', '.join(f'{group.key}.{name}' for name in unread)} "
                f"would not be read; images are members KEY.jpg, or KEY.0.jpg, KEY.1.jpg … ({', '.join(STILL)})"
            )
        images = _images(group.members)
        found = read_conversation(record)
        require_media_read(found.rest, len(images))
        conversation = check_conversation(found.turns, len(images))
        named = found.rest.pop("id", None)
        sample_id = group.key if named is None or named == "" else str(named)
        # JSON may hold half of a surrogate pair, which cannot be encoded. It is found here, where the sample can be
        # refused.
        sample_id.encode()
        (found.system or "").encode()
    except ValueError as error:
        return BadSample(group.key, group.index, str(error))
    return RawSample(group.key, group.index, sample_id, conversation, images, found.rest, found.system)


def _record(members: dict[str, bytes]) -> dict[str, Any]:
    """Return the record of a sample: its json member, and its txt member as a caption if there is no other."""
    if "json" not in members and "txt" not in members:
        raise ValueError(f"there is no json member; the members are {_listed(members)}{_dots(members)}")
    record: Any = _json(members["json"]) if "json" in members else {}
    if isinstance(record, list) and all(isinstance(turn, dict) for turn in record):
        record = {"conversations": record}  # as Energon has it
    if not isinstance(record, dict):
        raise ValueError(f"the json member holds a {type(record).__name__}, not an object")
    if "txt" in members and not any(record.get(key) for key in (*TURNS, *QUESTIONS, *CAPTIONS, "texts")):
        try:
            record["caption"] = members["txt"].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"the txt member is not UTF-8: {error.reason} at byte {error.start}") from error
    return record


def _json(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"the json member is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the json member is not JSON: {error}") from error


def _listed(members: dict[str, bytes]) -> str:
    names = sorted(members)
    return repr(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _dots(members: dict[str, bytes]) -> str:
    """Return what to do if dots within the names hide the extensions, e.g. in `img_v1.5_000.json`."""
    if not any(name.endswith(".json") for name in members):
        return ""
    return (
        ". A key ends at the first dot of a name, as in webdataset: the names have dots before their extension. Rename "
        "the members without these dots, or let `betakd pack SHARD --out FOLDER` do it"
    )


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
