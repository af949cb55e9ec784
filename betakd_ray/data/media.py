"""Names under which records, members of shards and texts mention images, videos and sounds.

What is named and not read would be lost without a word: a model would be trained on a question about an image that it
does not get. So each such name is either read or refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from betakd_ray.batch.sample import IMAGE

STILL = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Extensions of the images that are read."""
UNREAD_IMAGES = ("avif", "heic", "heif", "ico", "jp2", "pbm", "pgm", "ppm", "psd", "svg", "raw", "dcm", "exr", "pdf")
VIDEOS = ("mp4", "avi", "mov", "mkv", "webm", "m4v", "mpg", "mpeg", "flv", "wmv")
SOUNDS = ("wav", "mp3", "flac", "ogg", "m4a", "opus", "aac")
MEDIA = frozenset((*STILL, *UNREAD_IMAGES, *VIDEOS, *SOUNDS))
"""Extensions of all files that are media."""

IMAGE_NAME = re.compile(rf"(?:(?:image|img)?[_-]?(\d+)?\.)?(?:{'|'.join(STILL)})")
"""Pattern of the extension of an image's member: `jpg`, or `0.jpg`, `1.jpg`, `image_0.jpg` … for several."""

IMAGE_KEYS = (
    "images", "image", "image_path", "image_paths", "img", "imgs", "img_path", "image_file", "image_files",
    "image_url", "picture", "photo", "file_name", "filename",
)  # fmt: skip
"""Keys of a record that name its image or images, in the order in which they are looked for."""
_NUMBERED_KEY = re.compile(r"(?:image|img)_?(\d+)")
_LIKE_AN_IMAGE = re.compile(
    r"(?:\w+_)?(?:image|img|picture|photo|frame|screenshot)s?(?:_(?:path|file|name|filename|uri|url|list)s?)?(?:_?\d+)?"
)
_OTHER_MEDIA = re.compile(r"(?:video|audio|speech)s?(?:_(?:path|file|name|filename|uri|url|list)s?)?(?:_?\d+)?")
_FILE = re.compile(rf"\S+\.(?:{'|'.join(sorted(MEDIA))})", re.IGNORECASE)

_IMAGE_MARK = re.compile(
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>|<\|image\|>"
    r"|<\|?[Ii]mage[ _-]?(?P<number>\d+)\|?>|<[Ii]mg>(?:(?!<[Ii]mg>).)*?</[Ii]mg>|<[Ii]mg>|<ImageHere>|<IMG_CONTEXT>"
    r"|<image_soft_token>|<start_of_image>|<image_placeholder>|<Image>|<IMAGE>|\[IMG\]|\[IMAGE\]",
    re.DOTALL,
)
"""Pattern of other projects' placeholders of an image."""
_MEDIA_MARK = re.compile(
    r"<\|?(?:video|audio|speech)(?:_pad|_token|[ _-]?\d+)?\|?>(?!.*</(?:video|audio|speech)>)|\[(?:VIDEO|AUDIO)\]",
    re.DOTALL | re.IGNORECASE,
)
"""Pattern of placeholders of videos and sounds; `<video>…</video>` is HTML."""


def unread_members(extensions: Sequence[str]) -> list[str]:
    """Return the extensions of members that are media and are not read, e.g. `mp4` or `left.png`."""
    return [name for name in extensions if name.rpartition(".")[2] in MEDIA and not IMAGE_NAME.fullmatch(name)]


def image_key(record: Mapping[str, Any]) -> list[str]:
    """Return the key of a record that names its images; several for `image_1`, `image_2` …; [] if it names none."""
    for key in IMAGE_KEYS:
        value = record.get(key)
        # A file's name alone may also be that of a document.
        if key.startswith("file") and not (isinstance(value, str) and _FILE.fullmatch(value)):
            continue
        if _is_given(value) or (key in ("image", "images") and value not in (None, "", [], {}, False)):
            return [key]
    numbered = [(int(match[1]), key) for key in record if (match := _NUMBERED_KEY.fullmatch(key))]
    return [key for _, key in sorted(numbered) if _is_given(record[key])]


def require_media_read(record: Mapping[str, Any], images: int) -> None:
    """Raise ValueError if a record names media beyond the images that the sample has."""
    for key, value in record.items():
        if not _is_given(value):
            continue
        if _OTHER_MEDIA.fullmatch(key):
            raise ValueError(f"the key {key!r} names {_short(value)}, but only images are read (keys image and images)")
        if not images and (_LIKE_AN_IMAGE.fullmatch(key) or _names_file(value)):
            raise ValueError(
                f"the key {key!r} names {_short(value)}, but the sample has no image; images are read from members "
                f"KEY.jpg, KEY.0.jpg … of a shard, and by `betakd pack` from the keys {', '.join(IMAGE_KEYS[:5])} …"
            )
    for key in ("images", "image"):
        value = record.get(key)
        if images and isinstance(value, list) and len(value) != images:
            raise ValueError(f"the key {key!r} names {len(value)} images, but the sample has {images}")


def _is_given(value: Any) -> bool:
    return isinstance(value, PathLike) or (isinstance(value, str | bytes | list | tuple | dict) and len(value) > 0)


def _names_file(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(each, str) and _FILE.fullmatch(each) for each in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def own_placeholders(texts: Sequence[str], images: int) -> list[str]:
    """Return a sample's questions with `<image>` in place of another project's placeholders of its images.

    Raises ValueError unless there is one for each image, in the images' order, and for a placeholder of other media.
    """
    for text in texts:
        if other := _MEDIA_MARK.search(text):
            raise ValueError(f"the text holds {other[0]!r}, but only images are read, with the placeholder {IMAGE}")
    marks = [mark for text in texts for mark in _IMAGE_MARK.finditer(text)]
    if not marks:
        return list(texts)
    numbers = [int(mark["number"]) for mark in marks if mark["number"]]
    in_order = numbers in ([], list(range(len(marks))), list(range(1, len(marks) + 1)))
    if any(IMAGE in text for text in texts) or len(marks) != images or not in_order:
        raise ValueError(
            f"the text holds {marks[0][0][:40]!r}, a placeholder that is read only if there is one for each image, in "
            f"order ({len(marks)} placeholders, {images} images); write {IMAGE} where each image belongs"
        )
    return [_IMAGE_MARK.sub(IMAGE, text) for text in texts]


def file_name(value: Any) -> Iterator[Any]:
    """Yield what a value of an image key holds: names, bytes, or {bytes, path} as data sets of Hugging Face have it."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from file_name(each)
    elif isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        yield value["bytes"]
    elif isinstance(value, dict) and ("path" in value or "url" in value):
        yield from file_name(value.get("path") or value.get("url"))
    elif isinstance(value, PathLike):
        yield str(value)
    elif isinstance(value, str | bytes) and value:
        yield value
    else:
        raise ValueError(f"an image is {_short(value)}; expected a file's name, its content, or a list of them")
