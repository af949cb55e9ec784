"""Claims on a folder of shards: one process at a time packs a prefix, and one at a time changes the manifest.

    FOLDER / manifest.jsonl.claims / NAME / 00000003.json       claim number 3: who holds it, how often it was renewed

A store makes a file only if there is none of that name, so no two processes have one number. The highest number counts.
Its holder renews it every `RENEW_S` and removes it at the end. A claim whose process is surely dead, or that was not
renewed for `EXPIRE_S`, is taken over with the next number. The last is measured with the clock of the process that
waits, because clocks of machines differ. A holder that stood still learns from `require` that it was replaced.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import cast

from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter, ValidationError

from betakd_ray.data.files import store_errors
from betakd_ray.errors import DataError, UserError
from betakd_ray.holder import Holder
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import create_file, join, open_store, replace_file

CLAIMS = ".claims"
"""Ending of the folder of claims; what is before it is the name of the manifest."""
RENEW_S = 5.0
"""Seconds between two renewals of a claim."""
EXPIRE_S = 30.0
"""Seconds without a renewal after which a claim is taken over."""
POLL_S = 0.2
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """Content of a claim's file."""

    holder: Holder
    nonce: str
    """Random text, which tells whether a file is still the one that its holder made."""
    renewals: int = 0


_CONTENT = TypeAdapter(Content)
Newest = tuple[int, Content | None]
"""Highest number of a claim and its content: (0, None) if there is none, (N, None) if its file is unreadable."""


class Claims:
    """All claims of one name, each file under its number. Errors of the store are raised as DataError."""

    def __init__(self, url: str, storage: StorageSpec) -> None:
        self.url, self._storage = url, storage
        with store_errors(url, storage):
            self._filesystem, self._folder = open_store(url, storage)

    def newest(self) -> Newest:
        """Return the claim that counts."""
        with store_errors(self.url, self._storage):
            number = max(self._numbers(), default=0)
            if not number:
                return 0, None
            try:
                return number, _CONTENT.validate_json(cast(bytes, self._filesystem.cat_file(self._path(number))))
            except (ValidationError, FileNotFoundError):  # its holder writes or removes it at this moment
                return number, None

    def create(self, number: int, content: Content) -> bool:
        """Make the claim of that number; return whether this call made it. Claims of lower numbers are removed."""
        with store_errors(self.url, self._storage):
            try:
                if not create_file(self._filesystem, self._path(number), _encoded(content)):
                    return False
            except FileNotFoundError:  # another process has removed the folder of claims, which it found empty
                return False
            for lower in (each for each in self._numbers() if each < number):
                with suppress(FileNotFoundError):
                    self._filesystem.rm_file(self._path(lower))
        # A store that cannot make a file conditionally has overwritten the claim of a process that was as fast.
        return self.newest() == (number, content)

    def renew(self, number: int, content: Content) -> None:
        """Write a claim again."""
        with store_errors(self.url, self._storage):
            replace_file(self._filesystem, self._path(number), _encoded(content))

    def remove(self, number: int) -> None:
        """Remove a claim, and the local folders that are empty without it."""
        with store_errors(self.url, self._storage):
            self._filesystem.rm_file(self._path(number))
            if isinstance(self._filesystem, LocalFileSystem):
                with suppress(OSError):  # another claim is there
                    self._filesystem.rmdir(self._folder)
                    self._filesystem.rmdir(self._folder.rpartition("/")[0])

    def _numbers(self) -> list[int]:
        stems = [file.rpartition("/")[2].partition(".") for file in self._filesystem.find(self._folder)]
        return [int(stem) for stem, _, ending in stems if stem.isdecimal() and ending == "json"]

    def _path(self, number: int) -> str:
        return join(self._folder, f"{number:08d}.json")


@dataclass(frozen=True)
class Claim:
    """A claim that this process made."""

    claims: Claims
    number: int
    content: Content

    def is_held(self) -> bool:
        """Return whether no other process has taken it over."""
        number, there = self.claims.newest()
        return number == self.number and there is not None and there.nonce == self.content.nonce

    def require(self) -> None:
        """Raise DataError if another process has taken it over."""
        if not self.is_held():
            _, other = self.claims.newest()
            raise DataError(
                f"{self.claims.url}: {other.holder if other else 'another process'} has taken over what this process "
                f"was doing here, because it did not answer for {EXPIRE_S:g} s. Nothing of it was kept. See that only "
                "one `betakd pack` writes there, and run it again."
            )


@contextmanager
def claimed(manifest: str, name: str, storage: StorageSpec, *, waits: bool) -> Iterator[Claim]:
    """Hold the claim of that name beside a manifest in the block.

    If another process holds it and `waits` is false, raise DataError, which says who it is; otherwise wait for it.
    """
    claim = _acquired(Claims(join(f"{manifest}{CLAIMS}", name), storage), waits=waits)
    ended = threading.Event()
    renewing = threading.Thread(target=_keep, args=(claim, ended), name="claim", daemon=True)
    renewing.start()
    try:
        yield claim
    except DataError:
        claim.require()  # otherwise the message is that of a file which another process has removed
        raise
    finally:
        ended.set()
        renewing.join()
        with suppress(DataError):  # without this the next process waits until the claim expires
            if claim.is_held():
                claim.claims.remove(claim.number)


def _acquired(claims: Claims, *, waits: bool) -> Claim:
    mine = Content(Holder.this_process(), secrets.token_hex(8))
    seen, since = claims.newest(), time.monotonic()
    while True:
        number, there = seen
        if not number or (there and there.holder.is_dead()) or time.monotonic() - since > EXPIRE_S:
            if claims.create(number + 1, mine):
                return Claim(claims, number + 1, mine)
        else:
            time.sleep(POLL_S)
        now = claims.newest()
        if now == seen:
            continue
        seen, since = now, time.monotonic()
        # It changed, so a living process has made or renewed it.
        if not waits and now[1] and not now[1].holder.is_dead():
            raise DataError(
                f"{claims.url.partition(CLAIMS)[0]}: another `betakd pack`, {now[1].holder}, is writing these shards "
                "now. Wait until it ends, or give another `prefix` or `output`."
            )


def _keep(claim: Claim, ended: threading.Event) -> None:
    """Renew a claim until `ended`, or until another process has taken it over."""
    renewals = 0
    while not ended.wait(RENEW_S):
        renewals += 1
        try:
            if not claim.is_held():
                return
            claim.claims.renew(claim.number, replace(claim.content, renewals=renewals))
        except UserError as error:  # it is lost only if another process asks for it meanwhile
            _LOG.warning("a claim could not be renewed: %s", error)


def _encoded(content: Content) -> bytes:
    return json.dumps(asdict(content)).encode()
