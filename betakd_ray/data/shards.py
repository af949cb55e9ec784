"""Reading of WebDataset shards, and detection of incomplete ones.

A shard is a tar, plain or gzipped. Neighbouring members with the same key form a sample. As in webdataset, the key ends
at the first dot of the base name:

    000000012.json     {"id": …, "conversations": [{"from": "human" | "gpt", "value": …}, …], …}
    000000012.jpg      its image (jpg, jpeg, png, webp), or 000000012.0.jpg, 000000012.1.jpg … in order

The members are read with a stricter `tarfile` and not with webdataset's `tar_file_iterator`, which uses `tarfile`
unchanged: there a broken header counts as the end of the archive, and all members after it are lost without an error.
"""

import gzip
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random
from tenacity.wait import wait_base

from betakd_ray.data.files import ChecksumStream, opened
from betakd_ray.errors import DataError, DataUnreachable
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import StoreSilent

PLACEHOLDER = "<image>"
TAR_BUFFER_BYTES = 1 << 16  # tarfile copies the rest of its buffer at each read, so a larger buffer is slower
MAX_SAMPLE_BYTES = 256 << 20
MAX_SAMPLE_MEMBERS = 1000
MAX_EXTENDED_HEADER_BYTES = 8 << 10  # tarfile searches it with regular expressions in quadratic time
MAX_READS_BEHIND_END = 10
MAX_UNPACKED_RATIO = 100  # limit against gzip bombs: deflate reaches 1000, tars of images 1, and of short texts 20
PICKLED = frozenset({"pkl", "pickle", "pt", "pth"})  # loading a pickle can run any code
BACKOFF = wait_exponential(multiplier=2, max=30) + wait_random(0, 2)  # 2, 4, 8 s: enough for a store to restart

_IMAGE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp)")
_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")

Turn = dict[str, str]
Skip = Callable[[int], bool] | Set[int] | NDArray[np.bool_]
"""Samples of a shard to leave out: a predicate on indexes, a set of indexes, or a mask over the shard."""


class ShardDamaged(DataError):
    """A shard differs from its manifest, or is not a complete tar."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard as its manifest describes it."""

    url: str
    samples: int
    bytes: int
    # crc32 of the whole file, 8 hex digits. It detects accidents and costs 0.4 ms per MB; parsing the tar costs several
    # ms. A cryptographic hash would not help: an attacker who can replace a shard can also replace its manifest.
    checksum: str


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


def read_shard(shard: Shard, storage: StorageSpec, skip: Skip | None = None) -> Iterator[RawSample | BadSample]:
    """Yield a shard's samples in order, one for each of `shard.samples` indexes that is not in `skip`.

    A sample that cannot be used is yielded as BadSample, and reading goes on. If a conversation has images but no
    `<image>`, one placeholder for each image is put before the first human turn. Images are not decoded.

    Raises ShardDamaged if samples, bytes or checksum differ from the manifest. It raises where the damage breaks the
    tar, or only at the end, after samples were yielded. Raises DataUnreachable if the store fails.
    """
    skipped = _predicate(skip)
    samples, places = 0, dict[str, int]()
    with opened(shard.url, "rb", storage) as stream, _tar_errors(shard.url):
        for group in _groups(stream, lambda index: index < shard.samples and not skipped(index)):
            samples += 1
            first = places.setdefault(group.key, group.index) if group.index < shard.samples else group.index
            if first < group.index:
                group.fault = f"key {group.key!r} stands twice, first as sample {first}"
            if group.wanted:
                yield _parse(group)
    found = Shard(shard.url, samples, stream.size, stream.checksum)
    if found != shard:
        raise ShardDamaged(
            f"{shard.url}: expected {_contents(shard)}, found {_contents(found)}. Copy or pack it again."
        )


def read_shard_with_retry(
    shard: Shard, storage: StorageSpec, skip: Skip | None = None, *, attempts: int = 4, wait: wait_base = BACKOFF
) -> Iterator[RawSample | BadSample]:
    """Yield what `read_shard` does, and read again after damage or a failing store. No index is yielded twice.

    Raises the last error if all `attempts` fail: ShardDamaged or DataUnreachable, both DataError. There is
    no retry for a missing shard, refused credentials, or a store that was silent for two minutes (`open_store`).
    """
    skipped, resume_at = _predicate(skip), 0
    for attempt in _retrying(attempts, wait):
        with attempt:
            begin = resume_at
            for sample in read_shard(shard, storage, lambda index, begin=begin: index < begin or skipped(index)):
                resume_at = sample.index + 1
                yield sample


def scan_shard(url: str, storage: StorageSpec) -> Shard:
    """Read a shard that no manifest describes, and return its entry for the manifest.

    Raises ShardDamaged or DataUnreachable.
    """
    with opened(url, "rb", storage) as stream, _tar_errors(url):
        samples = sum(1 for _ in _groups(stream, lambda index: False))
    return Shard(url, samples, stream.size, stream.checksum)


def _retrying(attempts: int, wait: wait_base) -> Retrying:
    return Retrying(stop=stop_after_attempt(attempts), wait=wait, retry=retry_if_exception(_may_pass), reraise=True)


def _may_pass(error: BaseException) -> bool:
    """Return whether to read again. Not from a silent store, which was tried for two minutes already."""
    is_silent = isinstance(error.__cause__, StoreSilent)
    return isinstance(error, ShardDamaged) or (isinstance(error, DataUnreachable) and not is_silent)


def _contents(shard: Shard) -> str:
    return f"{shard.samples} samples, {shard.bytes} bytes, crc32 {shard.checksum}"


def _predicate(skip: Skip | None) -> Callable[[int], bool]:
    if isinstance(skip, np.ndarray):
        if skip.dtype != np.bool_:
            raise TypeError(
                f"skip is an array of {skip.dtype}; give a boolean mask over the shard, or a set of indexes"
            )
        return lambda index: bool(skip[index])
    if isinstance(skip, Set):
        return skip.__contains__
    return skip or (lambda index: False)


# -------------------------------------------------------------------------------------------------------------- the tar


_EXTENDED_HEADERS = frozenset(
    {
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    }
)


class _StrictTarInfo(tarfile.TarInfo):
    """Member whose broken or missing header is an error. Unchanged, `tarfile` treats it as the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # a block of zeros: the real end-of-archive mark
                raise
            raise tarfile.ReadError(f"no header at byte {tar.offset} ({error})") from None

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Limit the size of extended headers, which `tarfile` reads into memory. It calls this hook for each header."""
        if self.type in _EXTENDED_HEADERS and not 0 <= self.size <= MAX_EXTENDED_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes at byte {tar.offset}")
        return super()._proc_member(tar)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(slots=True)
class _Group:
    """Members that share a key: extension → content, and the first fault found in them."""

    key: str
    index: int
    wanted: bool
    members: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    fault: str | None = None


def _groups(stream: ChecksumStream, wanted: Callable[[int], bool]) -> Iterator[_Group]:
    """Yield neighbouring members with one key as groups, with contents only if wanted. Reads `stream` to its end."""
    group: _Group | None = None
    open_tar = cast(Any, tarfile.open)  # Any: the type stub requires seek and tell, which "r|" never calls
    with open_tar(fileobj=_unpacked(stream), mode="r|", bufsize=TAR_BUFFER_BYTES, tarinfo=_StrictTarInfo) as tar:
        while member := tar.next():
            tar.members.clear()  # otherwise tarfile keeps every header in memory
            key, extension = _split(member.name)
            if member.isdir() or key is None:
                continue
            if group is None or group.key != key:
                if group is not None:
                    yield group
                index = 0 if group is None else group.index + 1
                group = _Group(key, index, wanted(index))
            group.size += member.size
            group.fault = group.fault or _fault(member, extension, group)
            if not group.fault:
                reads = group.wanted and _is_read(extension)
                group.members[extension] = tar.extractfile(member).read() if reads else b""
        if group is not None:
            yield group
        _read_rest(tar)


def _read_rest(tar: Any) -> None:
    """Raise if data follows the end mark: a header overwritten by zeros looks like that mark."""
    while rest := tar.fileobj.read(TAR_BUFFER_BYTES):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"data behind the end-of-archive mark at byte {tar.offset}")


class _Rejoined:
    """Stream whose first bytes were read already and are returned again."""

    def __init__(self, head: bytes, stream: ChecksumStream) -> None:
        self._head, self._stream = head, stream

    def read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head or self._stream.read(size)


class _Guarded:
    """Tar stream with limits on its unpacked size and on the number of reads after its end.

    A gzip bomb would unpack without limit. A damaged header may give any size, and `tarfile` then skips that many
    bytes, one read at a time.
    """

    def __init__(self, tar: _Rejoined | gzip.GzipFile, stream: ChecksumStream) -> None:
        self._tar, self._stream = tar, stream
        self._size = self._reads_behind_end = 0

    def read(self, size: int) -> bytes:
        data = self._tar.read(size)
        self._size += len(data)
        self._reads_behind_end += not data
        if self._size > MAX_UNPACKED_RATIO * self._stream.size + MAX_SAMPLE_BYTES:
            raise tarfile.ReadError(f"the first {self._stream.size} bytes of gzip unpack to {self._size}")
        if self._reads_behind_end > MAX_READS_BEHIND_END:
            raise tarfile.ReadError("it ends within a member")
        return data


def _unpacked(stream: ChecksumStream) -> _Guarded:
    """Return the tar, unpacked if gzipped. `tarfile` itself unpacks without a limit, and only one gzip member."""
    head = stream.read(6)
    if head.startswith((b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise tarfile.ReadError("compressed by another program than gzip, the one that is read")
    whole = _Rejoined(head, stream)
    tar = gzip.GzipFile(fileobj=cast(Any, whole)) if head.startswith(b"\x1f\x8b") else whole
    return _Guarded(tar, stream)


def _split(name: str) -> tuple[str | None, str]:
    """Return key and lower-case extension by webdataset's rule; (None, "") for what it ignores, e.g. README."""
    name = name.encode("utf-8", "backslashreplace").decode()  # tarfile uses surrogates for bytes that are not UTF-8
    match = _MEMBER.fullmatch(name)
    if _is_unsafe(name):
        return name, ""
    return (None, "") if match is None or _META.match(name) else (match[1], match[2].lower())


def _is_unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in re.split(r"[/\\]", name)


def _is_read(extension: str) -> bool:
    return extension == "json" or _IMAGE.fullmatch(extension) is not None


def _fault(member: tarfile.TarInfo, extension: str, group: _Group) -> str | None:
    if _is_unsafe(member.name):
        return f"member {member.name!r} points outside of the archive"
    if not member.isreg() or member.issparse():
        return f"member {member.name!r} is a link or a special file; store the content itself"
    if extension.rpartition(".")[2] in PICKLED:
        return f"member {member.name!r} is a pickle, which is refused: loading it would run code"
    if extension in group.members:
        return f"member {member.name!r} stands twice"
    if group.size > MAX_SAMPLE_BYTES:
        return f"member {member.name!r} makes it {group.size} bytes, above the limit of {MAX_SAMPLE_BYTES} a sample"
    if len(group.members) >= MAX_SAMPLE_MEMBERS:
        return f"more than {MAX_SAMPLE_MEMBERS} members"
    return None


@contextmanager
def _tar_errors(url: str) -> Iterator[None]:
    """Turn errors of `tarfile` into ShardDamaged. For broken headers it raises almost any class of error."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise ShardDamaged(f"{url}: is not a whole tar: {error}. Copy or pack it again.") from error


# ------------------------------------------------------------------------------------------------------------- a sample


def check_conversation(turns: Any, images: int) -> list[Turn]:
    """Return the turns of a LLaVA conversation, with a placeholder per image. Raises ValueError with the reason."""
    if not isinstance(turns, list) or not turns:
        raise ValueError('"conversations" is not a list of turns')
    checked = [_turn(number, turn) for number, turn in enumerate(turns)]
    for number, (before, turn) in enumerate(pairwise(checked), 1):
        if turn["from"] == before["from"]:
            raise ValueError(f"turn {number} is from {turn['from']}, as the one before: human and gpt take turns")
    if not any(turn["from"] == "gpt" and turn["value"].strip() for turn in checked):
        raise ValueError("the conversation has no answer (no gpt turn with text)")
    placeholders = sum(turn["value"].count(PLACEHOLDER) for turn in checked)
    if images and not placeholders:
        return _with_placeholders(checked, images)
    if placeholders != images:
        raise ValueError(f"{placeholders} {PLACEHOLDER} placeholders and {images} images")
    return checked


def _parse(group: _Group) -> RawSample | BadSample:
    try:
        if group.fault:
            raise ValueError(group.fault)
        record = _record(group.members)
        images = _images(group.members)
        conversation = check_conversation(record.pop("conversations", None), len(images))
        sample_id = str(record.pop("id", group.key))
        sample_id.encode()
    except ValueError as error:
        return BadSample(group.key, group.index, str(error))
    return RawSample(group.key, group.index, sample_id, conversation, images, extra=record)


def _record(members: dict[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        raise ValueError(f"no json member; there are {sorted(members)}")
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
        raise ValueError(f"a name stands twice in {[name for name, _ in pairs]}")
    return made


def _images(members: dict[str, bytes]) -> list[bytes]:
    """Return the images in the order of their numbers; an unnumbered image comes first."""
    matches = [(match, content) for name, content in members.items() if (match := _IMAGE.fullmatch(name))]
    numbered = sorted(((int(match[1] or -1), content) for match, content in matches), key=lambda pair: pair[0])
    numbers = [number for number, _ in numbered]
    if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError(f"images {sorted(match[0] for match, _ in matches)} are not numbered 0, 1, 2 …")
    return [content for _, content in numbered]


def _turn(number: int, turn: Any) -> Turn:
    if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
        raise ValueError(f'turn {number} is not {{"from": "human" or "gpt", "value": text}}')
    if turn["from"] == "gpt" and PLACEHOLDER in turn["value"]:
        raise ValueError(f"turn {number}: an answer cannot hold {PLACEHOLDER}")
    try:
        turn["value"].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"turn {number} has half of a surrogate pair at character {error.start}") from error
    return {"from": turn["from"], "value": turn["value"]}


def _with_placeholders(turns: list[Turn], images: int) -> list[Turn]:
    first = next((number for number, turn in enumerate(turns) if turn["from"] == "human"), None)
    if first is None:
        raise ValueError("there are images and no human turn to put them in")
    front = {"from": "human", "value": f"{PLACEHOLDER}\n" * images + turns[first]["value"]}
    return [*turns[:first], front, *turns[first + 1 :]]
