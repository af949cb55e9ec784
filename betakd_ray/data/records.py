"""A record of a source → samples for `pack`: its keys mapped, its images read, its conversation checked."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from betakd_ray.batch.sample import IMAGE
from betakd_ray.data.conversations import Turn, check_conversation, decoded, read_conversation
from betakd_ray.data.files import opened
from betakd_ray.data.media import file_name, image_key, require_media_read
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join

_NAMED_IN_TEXT = re.compile(r"(?:Picture \d+: *)?<[Ii]mg>([^<>\n]+\.\w+)</[Ii]mg>")
"""Pattern of an image's name within a text, as Qwen-VL's first data had it."""


@dataclass(frozen=True)
class Reading:
    """How records are read."""

    images: str | None
    """Folder that names of images are relative to."""
    storage: StorageSpec = StorageSpec()
    keys: Mapping[str, str] = field(default_factory=dict)
    """Our name of a field → the record's key."""
    split_turns: bool = False
    """Whether each answer becomes a sample of its own, with the turns before it."""


def samples_of(record: Any, number: int, reading: Reading) -> Iterator[dict[str, Any]]:
    """Yield the samples of a record: {"id", "conversations", "images": [content, …], and its other fields}.

    `number` stands for an id that is missing. Raises ValueError with the reason if the record cannot be used.
    """
    if isinstance(record, str):  # its format could not read it, and says why
        raise ValueError(record)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with a conversation, found {repr(record)[:80]}")
    mapped = _mapped(record, reading.keys)
    names = [image for key in image_key(mapped) for image in file_name(mapped.pop(key))]
    found = read_conversation(mapped)
    turns, within = _named_in_text(found.turns)
    refs = _one_list(names, [*found.images, *within])
    require_media_read(found.rest, len(refs))
    turns = check_conversation(turns, len(refs))
    images = [_content(decoded(ref), reading) for ref in refs]
    system = [{"from": "system", "value": found.system}] if found.system else []
    given = found.rest.pop("id", None)
    name = str(number) if given is None or given == "" else str(given)
    if not reading.split_turns:
        yield {"id": name, "conversations": [*system, *turns], **found.rest, "images": images}
        return
    for at, until in enumerate((at for at, turn in enumerate(turns) if turn["from"] == "gpt"), 1):
        shown = turns[: until + 1]
        seen = sum(turn["value"].count(IMAGE) for turn in shown)
        yield {"id": f"{name}-{at}", "conversations": [*system, *shown], **found.rest, "images": images[:seen]}


def _mapped(record: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Return a record with the user's keys under our names. A field that not every record needs may be missing."""
    for target, key in keys.items():
        if key not in record and target not in ("image", "id", "system"):
            raise ValueError(f"has no key {key!r}, which is mapped to {target}; its keys are {list(record)}")
    taken = {*keys, *keys.values()}
    rest = {name: value for name, value in record.items() if name not in taken}
    return rest | {target: record[key] for target, key in keys.items() if record.get(key) is not None}


def _named_in_text(turns: list[Turn]) -> tuple[list[Turn], list[str]]:
    """Return turns with `<image>` in place of `<img>NAME</img>`, and the names."""
    names: list[str] = []

    def taken(match: re.Match[str]) -> str:
        names.append(match[1].strip())
        return IMAGE

    return [
        {**turn, "value": _NAMED_IN_TEXT.sub(taken, turn["value"]) if turn["from"] == "human" else turn["value"]}
        for turn in turns
    ], names


def _one_list(named: Sequence[Any], within: Sequence[Any]) -> Sequence[Any]:
    """Return the images of a record, which may be named by a key or within its turns."""
    if named and within and list(named) != list(within):
        raise ValueError(
            f"names {len(named)} images by a key, and {len(within)} others within its turns; name each in one place"
        )
    return named or within


def _content(image: Any, reading: Reading) -> bytes:
    """Return the content of an image. Raises ValueError for a name outside of the folder, or no such file."""
    if isinstance(image, bytes):
        return image
    name = str(image).removeprefix("file://")
    if "://" in name:
        raise ValueError(f"the image {name!r} is a URL; fetch it first (img2dataset does), and name the file")
    if reading.images is None:
        raise ValueError(f"names the image {name!r}; give `images`, the folder it is relative to (--images FOLDER)")
    name = name.removeprefix(reading.images.rstrip("/") + "/")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"image {name!r} is outside the folder `images`; name it relative to that folder")
    url = join(reading.images, name)
    try:
        with opened(url, reading.storage) as stream:
            return stream.read()
    except DataError as error:
        said = error.__cause__
        # A store that fails is no fault of this record. On a disk, it is: a folder, a name that is too long or locked.
        if isinstance(said, FileNotFoundError | ValueError) or (isinstance(said, OSError) and "://" not in url):
            raise ValueError(f"there is no image '{url}' ({type(said).__name__})") from error
        raise
