"""Reading of WebDataset shards, and detection of incomplete ones.

A shard is a tar, plain or gzipped. Neighbouring members with the same key form a sample. As in webdataset, the key ends
at the first dot of the base name:

    000000012.json     {"id": …, "conversations": [{"from": "human" | "gpt", "value": …}, …], …}
    000000012.jpg      its image (media.STILL), or 000000012.0.jpg, 000000012.1.jpg … in order
    000000012.txt      its caption, if it has no conversation

`conversations` says which other forms of the json are read.

The members are read with a stricter `tarfile` and not with webdataset's `tar_file_iterator`, which uses `tarfile`
unchanged: there a broken header counts as the end of the archive, and all members after it are lost without an error.
"""

import gzip
import re
import tarfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random
from tenacity.wait import wait_base

from betakd_ray.data.files import ChecksumStream, opened
from betakd_ray.data.media import IMAGE_NAME
from betakd_ray.data.samples import BadSample, RawSample, TarMembers, parse_sample
from betakd_ray.errors import DataError, DataUnreachable
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import StoreSilent

TAR_BUFFER_BYTES = 1 << 16  # tarfile copies the rest of its buffer at each read, so a larger buffer is slower
MAX_SAMPLE_BYTES = 256 << 20
MAX_SAMPLE_MEMBERS = 1000
MAX_EXTENDED_HEADER_BYTES = 8 << 10  # tarfile searches it with regular expressions in quadratic time
MAX_READS_BEHIND_END = 10
MAX_UNPACKED_RATIO = 100  # limit against gzip bombs: deflate reaches 1000, tars of images 1, and of short texts 20
PICKLED = frozenset({"pkl", "pickle", "pt", "pth"})  # loading a pickle can run any code
BACKOFF = wait_exponential(multiplier=2, max=30) + wait_random(0, 2)  # 2, 4, 8 s: enough for a store to restart

_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")

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


def read_shard(shard: Shard, storage: StorageSpec, skip: Skip | None = None) -> Iterator[RawSample | BadSample]:
    """Yield a shard's samples in order, one for each of `shard.samples` indexes that is not in `skip`.

    A sample that cannot be used is yielded as BadSample, and reading goes on. If a conversation has images but no
    `<image>`, one placeholder for each image is put before the first human turn. Images are not decoded.

    Raises ShardDamaged if samples, bytes or checksum differ from the manifest. It raises where the damage breaks the
    tar, or only at the end, after samples were yielded. Raises DataUnreachable if the store fails.
    """
    skipped = _predicate(skip)
    samples, places = 0, dict[str, int]()
    with opened(shard.url, storage) as stream, tar_errors(shard.url):
        # Samples beyond the manifest's number are counted, but not yielded: neither the ledger nor `skip` has a place
        # for them. Their keys are not kept, because a wrong shard may have any number of them.
        for group in groups(stream, lambda index: index < shard.samples and not skipped(index)):
            samples += 1
            first = places.setdefault(group.key, group.index) if group.index < shard.samples else group.index
            if first < group.index:
                group.fault = f"key {group.key!r} occurs twice, first as sample {first}"
            if group.wanted:
                yield parse_sample(group)
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
    with opened(url, storage) as stream, tar_errors(url):
        samples = sum(1 for _ in groups(stream, lambda index: False))
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


def groups(stream: ChecksumStream, wanted: Callable[[int], bool]) -> Iterator[TarMembers]:
    """Yield neighbouring members with one key as groups, with contents only if wanted. Reads `stream` to its end."""
    group: TarMembers | None = None
    open_tar = cast(Any, tarfile.open)  # Any: the type stub requires seek and tell, which "r|" never calls
    with open_tar(fileobj=_unpacked(stream), mode="r|", bufsize=TAR_BUFFER_BYTES, tarinfo=_StrictTarInfo) as tar:
        while member := tar.next():
            tar.members.clear()  # otherwise tarfile keeps every header in memory
            key, extension = split_name(member.name)
            if member.isdir() or key is None:
                continue
            if group is None or group.key != key:
                if group is not None:
                    yield group
                index = 0 if group is None else group.index + 1
                group = TarMembers(key, index, wanted(index))
            group.size += member.size
            group.fault = group.fault or member_fault(member, extension, group)
            # The name is kept even if the content is not read, because `member_fault` looks for names that occur twice.
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
            raise tarfile.ReadError(f"there is data after the end-of-archive mark at byte {tar.offset}")


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
        raise tarfile.ReadError("it is compressed, but not by gzip; only gzip is read")
    whole = _Rejoined(head, stream)
    tar = gzip.GzipFile(fileobj=cast(Any, whole)) if head.startswith(b"\x1f\x8b") else whole
    return _Guarded(tar, stream)


def split_name(name: str) -> tuple[str | None, str]:
    """Return key and lower-case extension by webdataset's rule; (None, "") for what it ignores, e.g. README."""
    name = name.encode("utf-8", "backslashreplace").decode()  # tarfile uses surrogates for bytes that are not UTF-8
    match = _MEMBER.fullmatch(name)
    # It gets a key, so that it is reported as a bad sample. Without one it would be ignored.
    if _is_unsafe(name):
        return name, ""
    return (None, "") if match is None or _META.match(name) else (match[1], match[2].lower())


def _is_unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in re.split(r"[/\\]", name)


def _is_read(extension: str) -> bool:
    return extension in ("json", "txt") or IMAGE_NAME.fullmatch(extension) is not None


def member_fault(member: tarfile.TarInfo, extension: str, group: TarMembers) -> str | None:
    if _is_unsafe(member.name):
        return f"member {member.name!r} points outside of the archive"
    if not member.isreg() or member.issparse():
        return f"member {member.name!r} is a link or a special file; store the content itself"
    if extension.rpartition(".")[2] in PICKLED:
        return f"member {member.name!r} is a pickle, which is refused: loading it would run code"
    if extension in group.members:
        return f"member {member.name!r} occurs twice"
    if group.size > MAX_SAMPLE_BYTES:
        return f"with member {member.name!r}, the sample has {group.size} bytes, above the limit of {MAX_SAMPLE_BYTES}"
    if len(group.members) >= MAX_SAMPLE_MEMBERS:
        return f"more than {MAX_SAMPLE_MEMBERS} members"
    return None


@contextmanager
def tar_errors(url: str) -> Iterator[None]:
    """Turn errors of `tarfile` into ShardDamaged. For broken headers it raises almost any class of error."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise ShardDamaged(f"{url}: is not a whole tar: {error}. Copy or pack it again.") from error
