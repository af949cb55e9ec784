"""A job on a cluster of several nodes, and a seeded schedule of failures.

The driver is a separate process, as under `ray job submit`. A process to kill is found among those of the cluster.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Self

from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.spec import JobSpec, StorageSpec
from betakd_ray.storage import join
from tests.nodes import Nodes
from tests.s3_proxy import FaultyS3

REPOSITORY = Path(__file__).parents[2]
TEACHER, POOL, STUDENT, MONITOR = "TeacherScorer", "TeacherPool", "RayTrainWorker", "ray::Monitor"
RESUME_ME = os.EX_TEMPFAIL
NOTICE_S = 15
"""Seconds between the notice and the end of a spot node; clouds give 30 to 120."""
OUTAGE_S = 90
"""Seconds that the store is down: twice the time for which requests are repeated."""
PATIENCE_S = 300.0
"""Longest wait in seconds for the next checkpoint; a job that needs longer hangs."""


class Storm(AbstractContextManager["Storm"]):
    """A job run under failures until its end. `befell` counts the failures. It kills its driver on exit."""

    def __init__(
        self,
        spec: JobSpec,
        nodes: Nodes,
        seed: int,
        store: FaultyS3 | None = None,
        *,
        folder: Path | None = None,
        storage: StorageSpec | None = None,
    ) -> None:
        """`folder` is for the spec and the drivers' log; `storage` is what this process reads the checkpoints with."""
        self.spec, self.nodes, self.store = spec, nodes, store
        self.befell: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._checkpoints = CheckpointStore(join(spec.output.path, spec.name), storage or spec.output.storage)
        self._folder = folder or Path(tempfile.mkdtemp(prefix="storm-"))
        self._file = self._folder / "spec.yaml"
        self._file.write_text(spec.model_dump_json())  # JSON is YAML
        self._driver = self._start()

    def run(self, events: Sequence[str]) -> None:
        """Cause each event after some progress since the last one, then run the job to its end."""
        for event in events:
            if not self._wait_for_progress():
                break  # the job was quicker
            time.sleep(self._random.uniform(0, 0.5))
            getattr(self, event)()
            self.befell[event] += 1
        while (code := self._end()) == RESUME_ME:
            self._driver = self._start()
        assert code == 0, f"the driver ended with {code}: {self.log}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.kill()
        self._driver.wait()

    @property
    def log(self) -> str:
        """Return the output of the drivers."""
        return (self._folder / "log").read_text()[-2000:]

    # --------------------------------------------------------------------------------------------- events

    def kill_teacher(self) -> None:
        self._signal(TEACHER, signal.SIGKILL)

    def kill_pool(self) -> None:
        self._signal(POOL, signal.SIGKILL)

    def kill_worker(self) -> None:
        self._signal(STUDENT, signal.SIGKILL)

    def kill_monitor(self) -> None:
        self._signal(MONITOR, signal.SIGKILL)

    def stop_worker(self) -> None:
        """Make a worker hang, as in a driver call that never returns; the others notice in their next collective."""
        self._signal(STUDENT, signal.SIGSTOP)

    def lose_teacher_node(self) -> None:
        self.nodes.lose("teacher-0")

    def lose_student_node(self) -> None:
        self.nodes.lose(self._random.choice(self.nodes.of("student")))

    def reclaim_student_node(self) -> None:
        """Announce the end of a spot node, and remove the node some seconds later."""
        node = self._random.choice(self.nodes.of("student"))
        self.nodes.announce(node, NOTICE_S)
        time.sleep(NOTICE_S)
        self.nodes.lose(node)

    def lose_store(self) -> None:
        """Make the store unreachable for longer than a request is repeated."""
        assert self.store is not None
        with self.store.outage():
            time.sleep(OUTAGE_S)

    def kill_driver(self) -> None:
        self._driver.kill()
        self._driver.wait()
        self._driver = self._start()

    def end_driver(self) -> None:
        """Send SIGTERM, as `ray job stop` and a drained node do; the driver saves and asks to be resumed."""
        if self._ask_to_end():
            self._driver = self._start()

    # ---------------------------------------------------------------------------------------------- means

    def _ask_to_end(self) -> int:
        """Send SIGTERM to the driver, and return its exit code."""
        self._wait(self._hears)
        self._driver.terminate()
        code = self._driver.wait(timeout=PATIENCE_S)
        assert code in (RESUME_ME, 0), f"the driver ended with {code}: {self.log}"
        return code

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(REPOSITORY / "jobs" / "distill.py"), "--spec", str(self._file)]
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(REPOSITORY)]))
        environment = {**os.environ, "RAY_ADDRESS": self.nodes.address, "PYTHONPATH": path}
        with open(self._folder / "log", "ab") as log:
            return subprocess.Popen(command, cwd=self._folder, env=environment, stdout=log, stderr=log)

    def _hears(self) -> bool:
        """Return whether the driver handles SIGTERM; Python does not handle it while it starts."""
        status = Path(f"/proc/{self._driver.pid}/status").read_text()
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    def _wait_for_progress(self) -> bool:
        """Wait for another checkpoint; return false if the job ends before."""
        before = self._step()
        return self._wait(lambda: self._step() > before)

    def _end(self) -> int:
        """Wait for the driver's end, and require progress until then; return its exit code."""
        while self._wait_for_progress():
            pass
        return self._driver.wait()

    def _step(self) -> int:
        newest = self._checkpoints.latest()
        return newest.step if newest else 0

    def _wait(self, come: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while self._driver.poll() is None:
            if come():
                return True
            assert time.monotonic() < deadline, f"no progress within {PATIENCE_S:g} s: {self.log}"
            time.sleep(0.1)
        return False

    def _signal(self, role: str, number: signal.Signals) -> None:
        """Send a signal to one process with the role, if the job has any at this moment."""
        if victims := sorted(self.nodes.processes(role)):
            with suppress(ProcessLookupError):  # it has gone meanwhile
                os.kill(self._random.choice(victims), number)
