"""The lease of a run: one driver at a time may change a run, and a driver that was replaced can change nothing more.

    RUN / leases / 00000007.json        lease number 7: who holds it, and how often it was renewed

A driver that begins makes the next number, which is its token. The store makes a file only if there is none of that
name, so no two drivers have one token. The highest token is the run's. Its holder renews it every `RENEW_S`. A lease
that was released, whose process is surely dead, or that was not renewed for `EXPIRE_S` is taken over. The last is
measured with the clock of the driver that waits, because clocks of machines differ.

A holder may stand still for an hour and then go on. So a lease proves nothing by itself: before a checkpoint, the model
or the result is written, its token is compared with the highest one (`Leases.require`). Between this look and the write
another driver may still take over. What is written then has the lower token, and readers prefer the higher one:
checkpoints are ordered by token before step, and the audit compares the token of the result and of the model.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import cast

from pydantic import TypeAdapter, ValidationError

from betakd_ray.errors import OutputError, RunTaken
from betakd_ray.holder import Holder
from betakd_ray.output import output_errors
from betakd_ray.run.folder import LEASES
from betakd_ray.sigterm import StopRequest
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import create_file, join, open_store, replace_file

RENEW_S = 5.0
"""Seconds between two renewals of a lease."""
EXPIRE_S = 30.0
"""Seconds without a renewal after which a lease is taken over."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """Content of a lease's file."""

    holder: Holder
    nonce: str
    """Random text, which tells whether a file is still the one that its holder made."""
    renewals: int = 0
    is_released: bool = False


_LEASE = TypeAdapter(Lease)


class Leases:
    """The leases of one run. Errors of the store are raised as OutputError."""

    def __init__(self, run: str, storage: StorageSpec) -> None:
        self.run = run
        self._filesystem, root = open_store(run, storage)
        self._folder = join(root, LEASES)

    def newest(self) -> tuple[int, Lease | None]:
        """Return the highest token and its lease: (0, None) if there is none, (N, None) if its file is unreadable."""
        with output_errors(join(self.run, LEASES)):
            token = max(self._tokens(), default=0)
            if not token:
                return 0, None
            try:
                return token, _LEASE.validate_json(cast(bytes, self._filesystem.cat_file(self._path(token))))
            except (ValidationError, FileNotFoundError):  # its holder writes it at this moment, or died while it did
                return token, None

    def require(self, token: int, nonce: str = "") -> None:
        """Raise RunTaken if a higher token than `token` was given out, or `token` to a lease without this nonce."""
        newest, lease = self.newest()
        if newest > token or (nonce and lease and lease.nonce != nonce):
            raise RunTaken(
                f"{self.run}: another driver ({lease.holder if lease else 'unknown'}) has taken this run over (its "
                f"token is {newest}, and this one's {token}). This driver ends, and writes nothing more."
            )

    def create(self, token: int, lease: Lease) -> bool:
        """Make the lease of that token; return whether this call made it. Leases of lower tokens are removed."""
        with output_errors(join(self.run, LEASES)):
            if not create_file(self._filesystem, self._path(token), _content(lease)):
                return False
            for lower in (each for each in self._tokens() if each < token):
                with suppress(OSError):  # another driver has removed it, or it stays: only the highest counts
                    self._filesystem.rm_file(self._path(lower))
        # A store that cannot make a file conditionally has overwritten the lease of a driver that was as fast.
        return self.newest() == (token, lease)

    def renew(self, token: int, lease: Lease) -> None:
        """Write a lease again."""
        with output_errors(join(self.run, LEASES)):
            replace_file(self._filesystem, self._path(token), _content(lease))

    def _tokens(self) -> list[int]:
        files = self._filesystem.find(self._folder)
        stems = [file.rpartition("/")[2].partition(".")[0] for file in files if file.endswith(".json")]
        return [int(stem) for stem in stems if stem.isdecimal()]

    def _path(self, token: int) -> str:
        return join(self._folder, f"{token:08d}.json")


@dataclass(frozen=True)
class Permit:
    """Permission of one driver, and of its workers, to write to a run."""

    run: str
    storage: StorageSpec
    token: int = 0
    require: Callable[[], None] | None = None
    """Function that raises an error if there is another reason to write nothing more."""

    def requiring(self, require: Callable[[], None]) -> "Permit":
        """Return this permission under one more condition."""
        return replace(self, require=require)

    def check(self) -> None:
        """Raise RunTaken if another driver has taken the run over, or what `require` raises."""
        if self.require:
            self.require()
        Leases(self.run, self.storage).require(self.token)


@contextmanager
def held_lease(run: str, storage: StorageSpec, stop: StopRequest, *, waits: bool) -> Iterator[Permit]:
    """Hold the lease of a run in the block; yield the permission to write to the run.

    If another driver holds it and `waits` is false, raise OutputError, which says who it is; otherwise wait until it
    ends. If the lease is taken over in the block, `stop` gets RunTaken as its failure.
    """
    leases = Leases(run, storage)
    token, lease = _acquired(leases, stop, waits=waits)
    ended = threading.Event()
    renewing = threading.Thread(target=_keep, args=(leases, token, lease, stop, ended), name="lease", daemon=True)
    renewing.start()
    try:
        yield Permit(run, storage, token)
    finally:
        ended.set()
        renewing.join()
        with suppress(OutputError):  # without this the next driver waits until the lease expires, and loses nothing
            leases.renew(token, replace(lease, is_released=True))


def _acquired(leases: Leases, stop: StopRequest, *, waits: bool) -> tuple[int, Lease]:
    mine = Lease(Holder.this_process(), secrets.token_hex(8))
    while True:
        token = _free_token(leases, stop, waits=waits)
        if leases.create(token, mine):
            return token, mine


def _free_token(leases: Leases, stop: StopRequest, *, waits: bool) -> int:
    """Return the token after the highest, once its lease has ended."""
    said, seen, since = False, leases.newest(), time.monotonic()
    while True:
        token, lease = seen
        is_over = not token or (lease is not None and (lease.is_released or lease.holder.is_dead()))
        if is_over or time.monotonic() - since > EXPIRE_S:
            return token + 1
        stop.pause(1.0)
        now = leases.newest()
        if now == seen:
            continue
        seen, since = now, time.monotonic()
        # It changed, so a living driver has renewed it, or another one has taken it over.
        _, lease = now
        if lease is None or lease.is_released:
            continue
        if not waits:
            raise OutputError(
                f"output.path: {leases.run} is being worked on by another driver, {lease.holder}. Two drivers cannot "
                "work on one run. Wait for it or end it, or give this job another `name`. With output.if_running: "
                "wait, a job waits by itself."
            )
        if not said:
            _LOG.warning("%s: waits until another driver ends, %s", leases.run, lease.holder)
            said = True


def _keep(leases: Leases, token: int, lease: Lease, stop: StopRequest, ended: threading.Event) -> None:
    """Renew a lease until `ended`; tell `stop` if it was taken over."""
    renewals = 0
    while not ended.wait(RENEW_S):
        renewals += 1
        try:
            leases.require(token, lease.nonce)
            leases.renew(token, replace(lease, renewals=renewals))
        except RunTaken as error:
            stop.fail(error)
            return
        except OutputError as error:
            # Not a failure of the job: it loses the lease only if another driver asks for it meanwhile.
            _LOG.warning("the lease could not be renewed: %s", error)


def _content(lease: Lease) -> bytes:
    return json.dumps(asdict(lease)).encode()
