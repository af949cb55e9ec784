"""WebDataset shards and their manifest: finding them, reading them, and noticing when one is not whole.

A folder of shards holds `manifest.jsonl`, one line a shard: {"shard": name, "samples": n, "bytes": b, "crc32": hex}.
Within a shard, members with one key make a sample, in webdataset's sense (the key ends at the first dot of the base
name):

    000000012.json     {"id": …, "conversations": [{"from": "human" | "gpt", "value": …}, …], …}
    000000012.jpg      its image (jpg, jpeg, png, webp), or 000000012.0.jpg, 000000012.1.jpg … in order

The members are read with `tarfile` and not with webdataset's `tar_file_iterator`, which leaves header checks to
`tarfile` as it comes: there a broken header counts as the end of the archive, and what follows is lost without a word.
"""

import json
import os
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from glob import has_magic
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem
from numpy.typing import NDArray
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random
from tenacity.wait import wait_base

from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store

MANIFEST = "manifest.jsonl"
PLACEHOLDER = "<image>"
BLOCK_BYTES = 8 << 20  # one request to the store, and what a reader holds besides the sample at hand
TAR_BUFFER_BYTES = 1 << 16  # tarfile copies the rest of its buffer at each read: a larger one is slower
MAX_MEMBER_BYTES = 256 << 20
PICKLED = frozenset({"pkl", "pickle", "pt", "pth"})  # loading one runs what its author wrote
BACKOFF = wait_exponential(multiplier=2, max=30) + wait_random(0, 2)  # 2, 4, 8 s: a store may restart meanwhile
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

_IMAGE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp)")
_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")

Turn = dict[str, str]
Skip = Callable[[int], bool] | Set[int] | NDArray[np.bool_]
"""Samples of a shard that are not wanted: a predicate or a set of indexes, or a mask over the shard."""


class ShardDamaged(DataError):
    """A shard does not hold what its manifest says, or is no whole tar."""


class StoreError(DataError):
    """The store, not the shard, failed, and another attempt may succeed."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard as its manifest describes it."""

    url: str
    samples: int
    bytes: int
    # crc32 of the whole file, 8 hex digits. It guards against accidents and costs 0.4 ms per MB, where parsing the
    # tar costs several; a cryptographic hash would add nothing, as who can swap a shard can swap its manifest.
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
    """A sample nobody can train on, and why."""

    key: str
    index: int
    reason: str


# ------------------------------------------------------------------------------------------------- finding


def find_shards(patterns: Sequence[str], storage: StorageSpec) -> list[Shard]:
    """The shards that paths or URLs with {00..07} braces and * globs name, sorted by URL, each once.

    Raises DataError when nothing matches, a named shard is missing, the store refuses or stays silent (half a
    minute), or a shard and its manifest disagree.
    """
    sizes = _locate(patterns, storage)
    manifests = {folder: read_manifest(folder, storage) for folder in sorted({_folder(url) for url in sizes})}
    return [_checked(url, size, manifests[_folder(url)]) for url, size in sizes.items()]


def index_shards(patterns: Sequence[str], storage: StorageSpec) -> list[Shard]:
    """Read shards from elsewhere whole, and enter them into the manifest of their folder.

    Raises ShardDamaged for one that is no whole tar, DataError as `find_shards` does.
    """
    by_folder: dict[str, list[Shard]] = defaultdict(list)
    for url, size in _locate(patterns, storage).items():
        by_folder[_folder(url)].append(_index(url, size, storage))
    for folder, shards in by_folder.items():
        merge_manifest(folder, shards, storage)
    return sorted((shard for shards in by_folder.values() for shard in shards), key=lambda shard: shard.url)


def read_manifest(folder: str, storage: StorageSpec) -> dict[str, Shard]:
    """Base name → shard; empty where there is no manifest. Raises DataError for a line that is none."""
    url = join(folder, MANIFEST)
    with _store_errors(url, storage):
        filesystem, path = _planning_store(url, storage)
        try:
            lines = filesystem.cat_file(path).splitlines()
        except FileNotFoundError:
            return {}
    shards = [_manifest_entry(folder, f"{url}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    return {_name(shard.url): shard for shard in shards}


def merge_manifest(folder: str, shards: Iterable[Shard], storage: StorageSpec, dropped: Container[str] = ()) -> None:
    """Add shards to a folder's manifest, by base name, after taking out the names in `dropped`.

    The manifest changes at once or not at all; of two writers at the same time, one loses its entries.
    """
    entries = {name: shard for name, shard in read_manifest(folder, storage).items() if name not in dropped}
    entries |= {_name(shard.url): shard for shard in shards}
    rows = [
        {"shard": name, "samples": shard.samples, "bytes": shard.bytes, "crc32": shard.checksum}
        for name, shard in sorted(entries.items())
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    url = join(folder, MANIFEST)
    with _store_errors(url, storage):
        filesystem, path = _planning_store(url, storage)
        _replace_file(filesystem, path, content)


def remove_shards(folder: str, names: Iterable[str], storage: StorageSpec) -> None:
    """Delete shards; one that is gone already is fine."""
    for url in (join(folder, name) for name in names):
        with _store_errors(url, storage):
            filesystem, path = open_store(url, storage)
            if filesystem.exists(path):
                filesystem.rm_file(path)


def _locate(patterns: Sequence[str], storage: StorageSpec) -> dict[str, int]:
    """URL → size in bytes, sorted by URL."""
    urls = [url for pattern in patterns for url in _expand_braces(pattern)]
    by_folder: dict[str, list[str]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for url in urls:
        if has_magic(url):
            sizes |= _glob(url, storage)
        else:
            by_folder[_folder(url)].append(url)
    for folder, named in by_folder.items():
        sizes |= _sizes_in(folder, named, storage)
    return dict(sorted(sizes.items()))


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{pattern}: its braces do not pair ({error}). Write them as train-{{00..07}}.tar.") from error


def _glob(pattern: str, storage: StorageSpec) -> dict[str, int]:
    with _store_errors(pattern, storage):
        filesystem, path = _planning_store(pattern, storage)
        found: dict[str, Any] = filesystem.glob(path, detail=True)  # pyright: ignore[reportAssignmentType]
    sizes = {
        _url_like(pattern, filesystem, name): info["size"]
        for name, info in found.items()
        if info["type"] == "file" and not _name(name).startswith(MANIFEST)
    }
    if not sizes:
        raise DataError(f"{pattern}: no shard matches. Check the path, or write shards there with `betakd pack`.")
    return sizes


def _sizes_in(folder: str, urls: list[str], storage: StorageSpec) -> dict[str, int]:
    """Sizes of shards named one by one: a single listing of their folder, whatever their number."""
    with _store_errors(folder, storage):
        filesystem, folder_path = _planning_store(folder, storage)
        try:
            listing = {info["name"]: info["size"] for info in filesystem.ls(folder_path, detail=True)}
        except FileNotFoundError:
            listing = {}
        paths = {url: open_store(url, storage)[1] for url in urls}
    missing = [url for url, path in paths.items() if path not in listing]
    if missing:
        raise DataError(
            f"{missing[0]}: no such shard ({len(missing)} of {len(urls)} named in {folder} are missing, which holds "
            f"{len(listing)} files). Correct the name or its braces, or write it with `betakd pack`."
        )
    return {_url_like(url, filesystem, path): listing[path] for url, path in paths.items()}


def _checked(url: str, size: int, manifest: dict[str, Shard]) -> Shard:
    shard = manifest.get(_name(url))
    remedy = f"Run `betakd index {url}`, which reads it whole and enters it"
    if shard is None:
        state = "has no entry in" if manifest else "there is no"
        raise DataError(f"{url}: {state} {MANIFEST} of its folder, so a cut shard would go unnoticed. {remedy}.")
    if shard.bytes != size:
        raise ShardDamaged(
            f"{url}: {size} bytes in the store, {shard.bytes} in {MANIFEST}: it was cut or written anew. "
            f"Copy or pack it again. {remedy}, if the file is right."
        )
    return Shard(url, shard.samples, shard.bytes, shard.checksum)


def _manifest_entry(folder: str, where: str, line: bytes | str) -> Shard:
    try:
        row = json.loads(line)
        return Shard(join(folder, str(row["shard"])), int(row["samples"]), int(row["bytes"]), str(row["crc32"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{where}: {line[:80]!r} is not {{"shard", "samples", "bytes", "crc32"}}. '
            f"Delete the manifest and run `betakd index` on the folder's shards."
        ) from error


def _replace_file(filesystem: AbstractFileSystem, path: str, content: bytes) -> None:
    """An object store's PUT replaces at once; a local file is written aside and renamed."""
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, content)
        return
    aside = f"{path}.{os.getpid()}.tmp"
    filesystem.pipe_file(aside, content)
    os.replace(aside, path)


def _planning_store(url: str, storage: StorageSpec) -> tuple[AbstractFileSystem, str]:
    """The store with little patience: a person waits to hear whether it answers, before the job starts."""
    filesystem, path = open_store(url, storage)
    if "config_kwargs" not in filesystem.storage_options:
        return filesystem, path
    patience = {"connect_timeout": 3, "read_timeout": 8, "retries": {"mode": "standard", "total_max_attempts": 3}}
    impatient: Any = type(filesystem)(**{**filesystem.storage_options, "config_kwargs": patience})
    impatient.retries = 1  # s3fs repeats botocore's attempts, five times unless told
    return impatient, path


def _url_like(given: str, filesystem: AbstractFileSystem, path: str) -> str:
    """One spelling for one file: a URL where a URL was given, or an absolute path."""
    return filesystem.unstrip_protocol(path) if "://" in given else path


def _folder(url: str) -> str:
    return url.rpartition("/")[0] if "/" in url else "."


def _name(url: str) -> str:
    return url.rpartition("/")[2]


# ------------------------------------------------------------------------------------------------- reading


def read_shard(shard: Shard, storage: StorageSpec, skip: Skip | None = None) -> Iterator[RawSample | BadSample]:
    """Stream a shard's samples in order, one for each of `shard.samples` indexes not in `skip`.

    A sample that cannot be used comes out as BadSample, and the reading goes on. Where a conversation has images and
    no `<image>` at all, one placeholder for each image is put before the first human turn. Images are not decoded.

    Raises ShardDamaged when samples, bytes or checksum differ from the manifest's. Damage shows where it breaks the
    tar, or at the end, after samples were yielded. Raises StoreError when the store fails.
    """
    skipped = _predicate(skip)
    samples = 0
    with opened(shard.url, "rb", storage) as stream, _tar_errors(shard.url):
        for group in _groups(stream, lambda index: index < shard.samples and not skipped(index)):
            samples += 1
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
    """`read_shard`, begun again after damage or a failing store, without yielding an index twice.

    Raises the last reading's error when `attempts` of them failed: ShardDamaged or StoreError, both DataError. A
    missing shard or refused credentials are not tried again.
    """
    skipped, resume_at = _predicate(skip), 0
    for attempt in _retrying(attempts, wait):
        with attempt:
            begin = resume_at
            for sample in read_shard(shard, storage, lambda index, begin=begin: index < begin or skipped(index)):
                resume_at = sample.index + 1
                yield sample


def check_conversation(turns: Any, images: int) -> list[Turn]:
    """The turns of a LLaVA conversation, with a placeholder for each image. Raises ValueError saying what is wrong."""
    if not isinstance(turns, list) or not turns:
        raise ValueError('"conversations" is not a list of turns')
    checked = [_turn(number, turn) for number, turn in enumerate(turns)]
    if not any(turn["from"] == "gpt" and turn["value"].strip() for turn in checked):
        raise ValueError("the conversation has no answer (no gpt turn with text)")
    placeholders = sum(turn["value"].count(PLACEHOLDER) for turn in checked)
    if images and not placeholders:
        return _with_placeholders(checked, images)
    if placeholders != images:
        raise ValueError(f"{placeholders} {PLACEHOLDER} placeholders and {images} images")
    return checked


class ChecksumStream:
    """A file object that counts and checksums the bytes that pass. `url` is absolute."""

    def __init__(self, raw: Any, url: str, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self.url = url
        self.size = 0
        self._crc = 0
        self._raw = raw
        self._errors = errors

    @property
    def checksum(self) -> str:
        return f"{self._crc:08x}"

    def read(self, size: int = -1) -> bytes:
        with self._errors():
            data = self._raw.read(size)
        self._count(data)
        return data

    def write(self, data: bytes) -> int:
        with self._errors():
            self._raw.write(data)
        self._count(data)
        return len(data)

    def _count(self, data: bytes) -> None:
        self.size += len(data)
        self._crc = zlib.crc32(data, self._crc)


@contextmanager
def opened(url: str, mode: str, storage: StorageSpec) -> Iterator[ChecksumStream]:
    """A file of the store, whose errors come out as StoreError or DataError."""
    errors = partial(_store_errors, url, storage)
    with errors():
        filesystem, path = open_store(url, storage)
        if "w" in mode and isinstance(filesystem, LocalFileSystem):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        raw = filesystem.open(path, mode, block_size=BLOCK_BYTES)
    try:
        yield ChecksumStream(raw, _url_like(url, filesystem, path), errors)
    finally:
        with errors():
            raw.close()


class _StrictTarInfo(tarfile.TarInfo):
    """A member whose broken or missing header is an error; as it comes, `tarfile` takes it for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # a block of zeros: the mark that does end an archive
                raise
            raise tarfile.ReadError(f"no header at byte {tar.offset} ({error})") from None


@dataclass(slots=True)
class _Group:
    """The members that share a key: extension → content, and what is wrong with them."""

    key: str
    index: int
    wanted: bool
    members: dict[str, bytes] = field(default_factory=dict)
    fault: str | None = None


def _groups(stream: ChecksumStream, wanted: Callable[[int], bool]) -> Iterator[_Group]:
    """Neighbouring members with one key, as groups; the contents only of wanted ones. Reads `stream` to its end."""
    group: _Group | None = None
    open_tar = cast(Any, tarfile.open)  # its stub asks a stream for seek and tell, which "r|" never calls
    with open_tar(fileobj=stream, mode="r|*", bufsize=TAR_BUFFER_BYTES, tarinfo=_StrictTarInfo) as tar:
        while member := tar.next():
            tar.members.clear()  # else tarfile keeps every header it saw
            key, extension = _split(member.name)
            if member.isdir() or key is None:
                continue
            if group is None or group.key != key:
                if group is not None:
                    yield group
                index = 0 if group is None else group.index + 1
                group = _Group(key, index, wanted(index))
            group.fault = group.fault or _fault(member, extension, group)
            reads = group.wanted and not group.fault and _is_read(extension)
            group.members[extension] = tar.extractfile(member).read() if reads else b""
        if group is not None:
            yield group
        _read_rest(tar, stream)


def _read_rest(tar: Any, stream: ChecksumStream) -> None:
    """Behind the end mark stand zeros and nothing else; a header wiped out by zeros looks like that mark."""
    while rest := tar.fileobj.read(TAR_BUFFER_BYTES):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"data behind the end-of-archive mark at byte {tar.offset}")
    while stream.read(TAR_BUFFER_BYTES):  # what a compressed tar may have behind its end
        pass


def _split(name: str) -> tuple[str | None, str]:
    """Key and lower-case extension by webdataset's rule; (None, "") for what it passes over, such as README."""
    name = name.encode("utf-8", "backslashreplace").decode()  # tarfile leaves surrogates for bytes that are no UTF-8
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
    if member.size > MAX_MEMBER_BYTES:
        return f"member {member.name!r} has {member.size} bytes, above the limit of {MAX_MEMBER_BYTES}"
    return None


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
        record = json.loads(members["json"].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the json member is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the json member is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"the json member holds a {type(record).__name__}, not an object")
    return record


def _images(members: dict[str, bytes]) -> list[bytes]:
    """Images in the order of their numbers; an unnumbered one comes first."""
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


def _index(url: str, size: int, storage: StorageSpec) -> Shard:
    with opened(url, "rb", storage) as stream, _tar_errors(url):
        samples = sum(1 for _ in _groups(stream, lambda index: False))
    if stream.size != size:
        raise ShardDamaged(f"{url}: {stream.size} bytes could be read of {size}. Copy it again.")
    if not samples:
        raise DataError(f"{url}: holds no sample (members KEY.json, KEY.jpg). Write it with `betakd pack`.")
    return Shard(url, samples, stream.size, stream.checksum)


def _retrying(attempts: int, wait: wait_base) -> Retrying:
    again = retry_if_exception_type((StoreError, ShardDamaged))
    return Retrying(stop=stop_after_attempt(attempts), wait=wait, retry=again, reraise=True)


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


# -------------------------------------------------------------------------------------------------- errors


@contextmanager
def _store_errors(url: str, storage: StorageSpec) -> Iterator[None]:
    """What a store raises, as StoreError, or DataError where waiting would not help.

    fsspec passes on OSError, botocore's and aiohttp's classes, which share no base but Exception.
    """
    try:
        yield
    except Exception as error:
        permanent = isinstance(error, (FileNotFoundError, ValueError, ImportError)) or _is_refusal(error)
        raise (DataError if permanent else StoreError)(_explain(url, storage, error)) from error


@contextmanager
def _tar_errors(url: str) -> Iterator[None]:
    """Broken headers make `tarfile` raise nearly anything: TarError, ValueError, EOFError, zlib.error, OSError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise ShardDamaged(f"{url}: is not a whole tar: {error}. Copy or pack it again.") from error


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__


def _explain(url: str, storage: StorageSpec, error: Exception) -> str:
    """What the store said and what to do; values of credentials are blanked."""
    said = f"{type(error).__name__}: {error}"
    for value in (os.environ.get(name, "") for name in CREDENTIALS):
        if len(value) > 4:  # a shorter one hides nothing, and would be blanked out of common words
            said = said.replace(value, "***")
    if not url.startswith(("s3://", "s3a://")):
        return f"{url}: cannot be opened ({said}). Check the path and its permissions."
    if _is_refusal(error):
        return (
            f"{url}: the store at {_endpoint(storage)} refuses access ({said}). Credentials are read from "
            f"{', '.join(CREDENTIALS)}, AWS_PROFILE or the machine's role: set them where the job runs, or "
            f"storage.anonymous for a public bucket."
        )
    return (
        f"{url}: the store at {_endpoint(storage)} gives no usable answer ({said}). Check storage.endpoint_url (or "
        f"AWS_ENDPOINT_URL), storage.region, the bucket's name and the network."
    )


def _endpoint(storage: StorageSpec) -> str:
    """Without user and password, should the URL hold them."""
    parts = urlsplit(storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL", ""))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.hostname else "AWS"
