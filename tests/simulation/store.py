"""An object store in memory, with the faults of real ones. Its protocol is `simulated://`, so fsspec finds it."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import fsspec
from fsspec.spec import AbstractFileSystem

from betakd_ray.run.folder import LEASES
from tests.simulation.scheduler import STALL_S, Process, Scheduler

T = TypeVar("T")
LATENCIES_S = (0.002, 0.01, 0.05, 0.2, 1.0)
"""Seconds that an operation may take without a fault."""
LATE_S = (10.0, 45.0, 150.0)
"""Seconds that an operation takes which is late."""
FAULTS = ("kill", "stall", "late", "lost reply", "failure", "cut off", "clock", "damage")
"""Kinds of faults that an operation may meet."""


class Objects:
    """Content of the store, and what a schedule does to an operation on it."""

    def __init__(self, scheduler: Scheduler, changed: Callable[[str], None]) -> None:
        self.files: dict[str, bytes] = {}
        self.scheduler = scheduler
        self._changed = changed
        self.damage: Callable[[], None] = lambda: None
        """Function that changes a byte of a checkpoint."""

    def operation(self, kind: str, path: str, effect: Callable[[], T], writes: bool = False) -> T:
        """Carry out one operation of the thread that runs, after other threads had a turn."""
        scheduler = self.scheduler
        if not scheduler.is_in_thread:  # a check looks at the store: no time passes
            return effect()
        fault = self._fault(writes)
        if is_look := kind == "list" and path.endswith(LEASES):
            scheduler.thread.is_told = is_replaced(scheduler.thread.process)
        scheduler.pause(scheduler.random.choice(LATE_S if fault == "late" else LATENCIES_S))
        if fault == "failure":
            scheduler.note(f"{kind} {path}: fails")
            raise ConnectionError("simulated: not done")
        if fault == "cut off":
            scheduler.start(scheduler.process("the network", ""), "the network", self._later(kind, path, effect), 20.0)
            scheduler.note(f"{kind} {path}: fails, and is done later")
            raise ConnectionError("simulated: done later")
        try:
            done = effect()
        except OSError as error:
            scheduler.note(f"{kind} {path}: {type(error).__name__}")
            raise
        if is_look:
            scheduler.thread.is_told |= scheduler.thread.process.token_held < highest_token(self.files)
        if writes or fault:
            scheduler.note(f"{kind} {path}" + (f": {fault}" if fault else ""))
        if writes:
            self._changed(path)
        if fault == "lost reply":
            raise ConnectionError("simulated: done")
        return done

    def _later(self, kind: str, path: str, effect: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            try:
                effect()
            except OSError:
                return
            self.scheduler.note(f"{kind} {path}: arrives late")
            self._changed(path)

        return run

    def _fault(self, writes: bool) -> str:
        """Return what befalls this operation of the thread that runs, or an empty text."""
        scheduler, faults = self.scheduler, self.scheduler.faults
        if not faults.left or scheduler.random.random() > faults.rate:
            return ""
        fault = scheduler.random.choice(faults.kinds)
        if fault in ("cut off",) and not writes:
            return ""
        faults.left -= 1
        process = scheduler.thread.process
        if fault == "kill":
            scheduler.kill(process)
        elif fault == "stall":
            scheduler.note(f"{process.name} stands still")
            process.stalled_until = scheduler.now + STALL_S
        elif fault == "clock":
            scheduler.clocks[process.machine] = scheduler.clocks.get(process.machine, 0.0) + STALL_S
            scheduler.note(f"the clock of {process.machine} is moved")
        elif fault == "damage":
            self.damage()
        return fault


def is_replaced(process: Process) -> bool:
    """Return whether other workers have been started in the place of this one."""
    return process.monitor is not None and process.monitor.starts_from.remote() != process.start


def highest_token(files: Iterable[str]) -> int:
    """Return the token of the driver that has the run."""
    leases = [path.rpartition("/")[2].partition(".")[0] for path in files if f"/{LEASES}/" in path]
    return max(map(int, leases), default=0)


class SimulatedStore(AbstractFileSystem):
    """The methods of a filesystem that this package calls, for the objects of the schedule that runs."""

    protocol = "simulated"
    objects: ClassVar[Objects]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: an object store has no folders."""

    def find(self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **_: Any) -> Any:
        files, start = self.objects.files, path.rstrip("/") + "/"

        def listed() -> dict[str, Any]:
            return {name: {"size": len(files[name])} for name in sorted(files) if name.startswith(start)}

        found = self.objects.operation("list", path, listed)
        return found if detail else list(found)

    def size(self, path: str) -> int:
        return self.objects.operation("size", path, lambda: len(self._content(path)))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        return self.objects.operation("get", path, lambda: self._content(path))

    def exists(self, path: str, **_: Any) -> bool:
        return self.objects.operation("look", path, lambda: path in self.objects.files)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        def put() -> None:
            if mode == "create" and path in self.objects.files:
                raise FileExistsError(path)
            self.objects.files[path] = value

        self.objects.operation("put", path, put, writes=True)

    def put_file(self, lpath: str, rpath: str, callback: Any = None, mode: str = "overwrite", **_: Any) -> None:
        from tests.simulation.folders import CONTENTS

        self.pipe_file(rpath, CONTENTS[lpath])

    def get_file(self, rpath: str, lpath: str, callback: Any = None, outfile: Any = None, **_: Any) -> None:
        from tests.simulation.folders import CONTENTS

        CONTENTS[lpath] = self.objects.operation("get", rpath, lambda: self._content(rpath))

    def rm_file(self, path: str) -> None:
        # S3 removes what is not there without an error.
        self.objects.operation("remove", path, lambda: self.objects.files.pop(path, None), writes=True)

    def rm(self, path: str, recursive: bool = False, maxdepth: Any = None) -> None:
        for file in self.find(path):
            self.rm_file(file)

    def open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        raise FileNotFoundError(path)  # only metrics.jsonl is opened, and the simulated job has no metrics

    def _content(self, path: str) -> bytes:
        try:
            return self.objects.files[path]
        except KeyError:
            raise FileNotFoundError(path) from None


fsspec.register_implementation("simulated", SimulatedStore, clobber=True)
