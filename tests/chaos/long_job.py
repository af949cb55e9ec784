"""One long job under faults, seen from outside: it causes a fault, waits for new steps, and says what it cost."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from betakd_ray.run.metrics import RESUMED, from_jsonl
from betakd_ray.spec import JobSpec, StorageSpec
from betakd_ray.storage import open_store
from tests.chaos.jobs import SHARDS, altered
from tests.chaos.means import Clock, StoredPart, WatchedS3
from tests.chaos.small_disk import SmallDisk
from tests.chaos.storm import MONITOR, PATIENCE_S, POOL, RESUME_ME, STUDENT, TEACHER, Storm
from tests.chaos.tally import Attempt, Fault, Planned, Recovery, real_time, recovery
from tests.nodes import Nodes

REPLACED = {
    "kill_worker": STUDENT,
    "kill_teacher": TEACHER,
    "kill_pool": POOL,
    "kill_monitor": MONITOR,
    "kill_driver": STUDENT,
    "end_driver": STUDENT,
    "stop_worker": STUDENT,
    "lose_student_node": STUDENT,
    "lose_teacher_node": TEACHER,
    "reclaim_student_node": STUDENT,
}
"""Kinds of faults that end a process for sure, and the role of the process whose return is waited for."""
WRONG_INPUT = 2
"""Exit code of a driver that has found something the user has to mend."""
MAY_END = {"lose_store": (WRONG_INPUT,)}
"""Exit codes that may follow a fault: a store that is away ends a driver that reads it (docs/reliability.md)."""
LOOK_S = 0.5
"""Seconds between two looks at the processes of the cluster; a look takes some milliseconds of a core."""


@dataclass(frozen=True)
class Surroundings:
    """The cluster of a soak, and what its faults are made with."""

    nodes: Nodes
    proxy: WatchedS3
    clock: Clock
    disk: SmallDisk | None
    """None where no small disk can be made."""
    bucket: str
    storage: StorageSpec
    """Storage without the proxy, for this process."""


class LongJob(Storm):
    """A job that is started again whenever its driver ends, until it is done. Used as a context manager."""

    store: WatchedS3

    def __init__(self, spec: JobSpec, around: Surroundings, folder: Path) -> None:
        self._around = around
        folder.mkdir(parents=True, exist_ok=True)
        self._allowed: tuple[int, ...] = (RESUME_ME,)
        self._exits: list[int] = []
        self._said_from = 0
        self._history = _History(spec.name, around)
        super().__init__(spec, around.nodes, 0, around.proxy, folder=folder, storage=around.storage)
        self._first_step = super()._step()

    @property
    def committed(self) -> int:
        """Return the step of the newest checkpoint."""
        return self._step()

    def advance(self) -> bool:
        """Wait for another checkpoint; return whether there will be one, false if the job is done."""
        before = self._step()
        return self._until(lambda: self._step() > before)

    def work(self, seconds: float) -> bool:
        """Let the job work for so long; return whether it is not done yet."""
        end = time.monotonic() + seconds
        return self._until(lambda: time.monotonic() >= end)

    def suffer(self, planned: Planned) -> Fault:
        """Cause a fault, and wait until a checkpoint has new steps again, or until the job is done."""
        self._random = random.Random(planned.seed)
        role = REPLACED.get(planned.kind)
        if role:  # a fault without a victim would be none
            self._until(lambda: bool(self.nodes.processes(role)))
        before = set(self.nodes.processes(role or STUDENT))
        self._exits, self._allowed = [], (RESUME_ME, *MAY_END.get(planned.kind, ()))
        began = time.time()
        getattr(self, planned.kind)()
        ended, back = time.time(), None
        returned, newest = self._looking(role or STUDENT, before), self._step()

        def has_come() -> bool:
            nonlocal back, newest
            if back is None and returned():
                back, newest = time.time(), self._step()
            return (back is not None or role is None) and self._step() > newest

        self._until(has_come)
        self._allowed = (RESUME_ME,)
        return Fault(planned.number, planned.kind, began, ended, back, bool(role), tuple(self._exits))

    def recovery(self, fault: Fault, step_s: float) -> Recovery:
        """Return what a fault has cost, by the metrics that were stored since this object was made."""
        # Records of the steps since the last checkpoint, which flushes them, and of those while it is stored.
        # A driver that is asked to end loses none.
        unseen = 0 if fault.kind == "end_driver" else 2 * self.spec.training.checkpoint_every
        return recovery(fault, self._history.attempts(), step_s, unseen)

    def reach(self, step: int) -> None:
        """Let the job work until a checkpoint has that step, or it is done."""
        while self._step() < step and self.advance():
            pass

    def end(self) -> bool:
        """Ask the driver to save and end; return whether the job is done."""
        return self._driver.poll() == 0 or self._ask_to_end() == 0

    # --------------------------------------------------------------------------------------------- events

    def fail_requests(self) -> None:
        """Make some of the next requests to the store fail, each in one way."""
        for _ in range(self._random.randint(1, 5)):
            self.store.inject(self._random.choice(self.store.faults), self._random.choice([None, 0, 100]))

    def jump_clock(self) -> None:
        """Set the clock of all Python processes of the cluster and the driver forward or back."""
        self._around.clock.jump(self._random.choice([-2, -1, 1, 2]))

    def fill_disk(self) -> None:
        """Fill the disk with the temporary folders until the driver has ended with an error that says so."""
        assert self._around.disk is not None
        with self._around.disk.full():
            self._require_end(WRONG_INPUT, "disk is full")
        self._driver = self._start()

    def swap_shard(self) -> None:
        """Replace a shard by one of the same size, until the driver has ended with an error that names it.

        The driver is killed as well: processes keep the rows of a small set, and would not read the shard again.
        Samples of a shard are used before its end is read, where its checksum is compared, if they fill a block
        (`on_ray.stream.BLOCK_ROWS`). The job has small groups, which are one block each, so none of these is used.
        """
        filesystem, folder = open_store(f"s3://{self._around.bucket}/{SHARDS}", self._around.storage)
        path = self._random.choice(sorted(filesystem.glob(f"{folder}/*.tar")))
        whole: Any = filesystem.cat_file(path)
        filesystem.pipe_file(path, altered(whole))
        try:
            self.kill_driver()
            self._require_end(WRONG_INPUT, path.rpartition("/")[2])
        finally:
            filesystem.pipe_file(path, whole)
        self._driver = self._start()

    # ---------------------------------------------------------------------------------------------- means

    def _looking(self, role: str, before: set[int]) -> Callable[[], bool]:
        """Return a function that says whether there is a process with that role which was not there before."""
        looked = 0.0

        def has_returned() -> bool:
            nonlocal looked
            if time.monotonic() - looked < LOOK_S:
                return False
            looked = time.monotonic()
            return bool(set(self.nodes.processes(role)) - before)

        return has_returned

    def _start(self) -> Any:
        log = self._folder / "log"
        self._said_from = log.stat().st_size if log.exists() else 0
        return super()._start()

    @property
    def log(self) -> str:
        """Return the end of what the newest driver has printed."""
        with (self._folder / "log").open("rb") as file:
            file.seek(self._said_from)
            return file.read().decode(errors="replace")[-4000:]

    def _step(self) -> int:
        """Return the newest committed step. No request is made: every one passes through the proxy."""
        steps = [commit.step for commit in self.store.commits if commit.run == self.spec.name]
        return max(self._first_step, *steps[-3:]) if steps else self._first_step

    def _until(self, come: Callable[[], bool]) -> bool:
        """Wait until `come`; start the driver again as often as it ends. Return false if the job is done."""
        while not self._wait(come):
            code = self._driver.wait()
            if code == 0:
                return False
            assert code in self._allowed, f"the driver ended with {code}, expected one of {self._allowed}: {self.log}"
            self._exits.append(code)
            self._driver = self._start()
        return True

    def _require_end(self, code: int, words: str) -> None:
        """Wait until the driver ends, and require that exit code, and `words` in what it printed."""
        try:
            found = self._driver.wait(timeout=PATIENCE_S)
        except TimeoutExpired:
            raise AssertionError(
                f"the driver did not end within {PATIENCE_S:g} s, expected {words!r}: {self.log}"
            ) from None
        self._exits.append(found)
        assert (found, words in self.log) == (code, True), (
            f"the driver ended with {found}, expected {code} and {words!r}: {self.log}"
        )


class _History:
    """The starts of a run's workers, by the parts of its metrics that were stored since this object was made."""

    def __init__(self, run: str, around: Surroundings) -> None:
        self._run, self._around = run, around
        self._filesystem = open_store(f"s3://{around.bucket}", around.storage)[0]
        self._read = len(around.proxy.parts)
        self._known: set[str] = set()
        self._attempts: dict[str, Attempt] = {}

    def attempts(self) -> list[Attempt]:
        """Return the starts so far; new parts are read first."""
        new = self._around.proxy.parts[self._read :]
        self._read += len(new)
        for part in new:
            if part.run == self._run and part.path not in self._known:  # a request may have been repeated
                self._known.add(part.path)
                self._add(part)
        return list(self._attempts.values())

    def _add(self, part: StoredPart) -> None:
        content: Any = self._filesystem.cat_file(part.path)
        # NUMBER-TOKEN-ATTEMPT.jsonl
        name = part.path.rpartition("/")[2].partition("-")[2]
        for record in from_jsonl(content.decode()):
            if RESUMED in record:
                self._attempts[name] = Attempt(part.time, record[RESUMED])
            elif name in self._attempts:
                self._attempts[name].steps.append((record["step"], real_time(record["time"], part.time)))
