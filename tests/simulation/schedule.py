"""One schedule: drivers that compete for a run, the workers they start, and faults; the seed decides on all of it."""

import re
from functools import partial
from random import Random
from typing import Any

from betakd_ray import errors
from betakd_ray.errors import (
    BetaKDError,
    DataUnreachable,
    Interrupted,
    OutputError,
    OutputUnreachable,
    RunTaken,
    TrainingError,
)
from betakd_ray.on_ray import source
from betakd_ray.run import checkpoint
from betakd_ray.run.folder import CHECKPOINTS, MANIFEST
from betakd_ray.train import students, worker
from tests.simulation import job as simulated
from tests.simulation.cluster import Group
from tests.simulation.folders import CONTENTS
from tests.simulation.invariants import ROOT, Invariants
from tests.simulation.job import Attempt, SimulatedJob
from tests.simulation.scheduler import Faults, Process, Scheduler, Violation
from tests.simulation.store import FAULTS, Objects, SimulatedStore

EXPECTED = ("is being worked on by another driver", "were stored. The previous checkpoint stays the current one")
"""Words of an OutputError that a driver may end with. Any other is a violation."""
DRIVERS = 3
"""Largest number of drivers that compete."""
STARTS = 3
"""Number of times that a driver is started again after it has ended without a result."""
POLL_S = 2.0
SILENT_S = 60.0
"""Seconds without a heartbeat after which a rank counts as dead."""
_ORDER = re.compile(rb'"(?:step|token|world_size)": \d')
"""Pattern in a manifest that ends with a digit of what orders the checkpoints."""
LAST_DAMAGED = 3
"""Last step whose checkpoint may be damaged, so that the training goes on after it."""


class Schedule:
    """The cluster of one seed."""

    def __init__(self, seed: int) -> None:
        self.scheduler = Scheduler(seed)
        self.random = self.scheduler.random
        self.objects = Objects(self.scheduler, lambda path: self.invariants.check(path))
        self.objects.damage = self._damage
        self.invariants = Invariants(self.objects)
        self.results: list[Any] = []
        self.problems: list[str] = []

    def run(self) -> None:
        """Run the schedule. Raises Violation, with the seed and the trace, if an invariant does not hold."""
        SimulatedStore.objects = self.objects
        CONTENTS.clear()
        try:
            self._run()
        except Violation as error:
            trace = "\n".join(self.scheduler.trace)
            raise Violation(f"seed {self.scheduler.seed}: {error}\n{trace}") from error
        finally:
            self.scheduler.close()

    def _run(self) -> None:
        scheduler, random = self.scheduler, self.random
        kinds = tuple(random.sample(FAULTS, random.randint(1, len(FAULTS))))
        scheduler.faults = Faults(random.randint(0, 6), random.choice((0.005, 0.02, 0.08)), kinds)
        machines = ["a"] if random.random() < 0.3 else ["a", "b"]
        self.is_stopped_by_user = random.random() < 0.1
        scheduler.clocks.update({machine: random.uniform(0, 1e6) for machine in machines})
        slots = [
            scheduler.start(scheduler.process(f"user {number}", "u"), f"user {number}", partial(self._user, machines))
            for number in range(random.randint(1, DRIVERS))
        ]
        scheduler.run(until=lambda: all(slot.is_done for slot in slots))
        # From here on there are no faults, and one more driver: it must finish, whatever the others have left.
        scheduler.note("no more faults")
        scheduler.faults.left, self.is_stopped_by_user = 0, False
        last = scheduler.process("driver last", random.choice(machines))
        scheduler.start(last, last.name, partial(self._drive, last, is_last=True))
        scheduler.run()
        if not self.results:
            raise Violation("no driver has finished the job, though nothing stood in its way")
        self.problems = self.invariants.check_end()

    def _user(self, machines: list[str]) -> None:
        """Start a driver, and start it again if it ends without a result."""
        scheduler = self.scheduler
        for _ in range(STARTS):
            scheduler.pause(self.random.choice((0.0, 1.0, 20.0, 90.0)))
            process = scheduler.process(f"driver {len(scheduler.processes)}", self.random.choice(machines))
            thread = scheduler.start(process, process.name, partial(self._drive, process))
            while not (thread.is_done or process.is_dead):
                scheduler.pause(5.0)
                if process.stalled_until > scheduler.now and self.random.random() < 0.5:
                    break  # taken for dead, and replaced
            if thread.is_done and process.has_finished:
                return

    def _drive(self, process: Process, is_last: bool = False) -> None:
        """Run one driver to its end."""
        made = SimulatedJob(simulated.spec(self.random.choice((1, 2, 3)), self.random.choice((1, 2))))
        process.job = made
        try:
            result = made.fit()
        except BetaKDError as error:
            self.scheduler.note(f"ends: {type(error).__name__}: {error}")
            is_expected = type(error) in (Interrupted, RunTaken, OutputUnreachable, DataUnreachable, TrainingError) or (
                type(error) is OutputError and any(text in str(error) for text in EXPECTED)
            )
            if is_last or not is_expected:
                raise Violation(f"{process.name} ended with {type(error).__name__}: {error}") from error
        except Exception as error:
            raise Violation(f"{process.name} ended with {type(error).__name__}: {error}") from error
        else:
            self.scheduler.note(f"finishes at step {result.steps} with token {result.token}")
            process.has_finished = True
            self.results.append(result)

    def _damage(self) -> None:
        """Change a byte of the newest checkpoint, if there is another whole one, and training goes on after it."""
        found = checkpoint.CheckpointStore(simulated.RUN, simulated.spec(1, 1).output.storage)
        with self.scheduler.standing_still():
            committed = found.committed()
        if len(committed) < 2 or self.invariants.touched or committed[-1].step > LAST_DAMAGED:
            return
        name = committed[-1].name
        start = f"{ROOT}/{CHECKPOINTS}/{name}/"
        paths = sorted(path for path, content in self.objects.files.items() if content and path.startswith(start))
        path = start + MANIFEST if self.random.random() < 0.5 else self.random.choice(paths)
        content = bytearray(self.objects.files[path])
        # Of a manifest mostly a digit that decides which checkpoint is the newest.
        digits = [match.end() - 1 for match in _ORDER.finditer(content)] if path.endswith(MANIFEST) else []
        at = (
            self.random.choice(digits) if digits and self.random.random() < 0.7 else self.random.randrange(len(content))
        )
        content[at] ^= 1 << self.random.randrange(8)
        self.objects.files[path] = bytes(content)
        self.invariants.touched.add(name)
        self.scheduler.note(f"a bit of {path} is flipped")

    # ------------------------------------------------------------------------------------------ the workers

    def train(self, config: Any, reader: Any, stop: Any, update: Any) -> dict[str, Any]:
        """Do what Ray Train does for `train_students`: start the ranks, and start them again when one has died."""
        while True:
            try:
                rows = source.rows(reader, config.spec, config.run, config.plan, config.monitor)
            except errors.OutputUnreachable:
                rows = None
            if rows is not None:
                outcome = self._attempt(config, rows, stop)
                if outcome is not None:
                    students._raise_cause(config)
                    return outcome
            config.monitor.workers_died.remote("a worker died")
            students._raise_cause(config, is_failed=True) if config.monitor.failure.remote() else None

    def _attempt(self, config: Any, rows: Any, stop: Any) -> dict[str, Any] | None:
        """Run one start of the ranks; return rank 0's outcome, or None if a rank has died or counts as dead."""
        scheduler, ranks = self.scheduler, config.spec.training.workers.max
        group, host, save = (Group(scheduler, ranks) for _ in range(3))
        group.attempt = Attempt(rows, group, host, save, Random(self.random.getrandbits(32)), config.monitor)
        outcomes: dict[int, Any] = {}
        mine = [self._rank(config, group, rank, outcomes) for rank in range(ranks)]
        is_lost_at = scheduler.now + 20.0 if self._is_fault("lost") else float("inf")
        while len(outcomes) < ranks and not any(process.is_dead for process in mine):
            scheduler.pause(POLL_S)
            if self.is_stopped_by_user and not stop.is_made and self.random.random() < 0.05:
                self.is_stopped_by_user = False
                scheduler.note("is asked to stop")
                stop.make()
            if stop.is_made:
                config.monitor.stop.remote()
            if stop.failure:
                self._end(mine)
                stop.check()
            # A rank that stands still sends no heartbeats, and counts as dead.
            if any(process.stalled_until > scheduler.now + SILENT_S for process in mine):
                is_lost_at = min(is_lost_at, scheduler.now + SILENT_S)
            if scheduler.now > is_lost_at or any(isinstance(each, Exception) for each in outcomes.values()):
                break
        if len(outcomes) == ranks and not any(isinstance(each, Exception) for each in outcomes.values()):
            return outcomes[0]
        scheduler.note("starts its workers again")
        self._end(mine)
        return None

    def _is_fault(self, kind: str) -> bool:
        faults = self.scheduler.faults
        if not faults.left or self.random.random() > 0.15:
            return False
        faults.left -= 1
        return True

    def _end(self, ranks: list[Process]) -> None:
        """Kill ranks, or leave them alone: a worker that cannot be reached goes on."""
        if self.random.random() < 0.5:
            for process in ranks:
                if not process.is_dead:
                    self.scheduler.kill(process)

    def _rank(self, config: Any, group: Any, rank: int, outcomes: dict[int, Any]) -> Process:
        scheduler = self.scheduler
        attempt = config.monitor.starts_from.remote().attempt
        process = scheduler.process(f"rank {rank} of {attempt}", f"node {rank}", rank, group)
        process.token, process.monitor = config.permit.token, config.monitor
        process.start = config.monitor.starts_from.remote()

        def run() -> None:
            try:
                outcomes[rank] = worker.train_worker({"worker": config})
            except errors.SampleRepeated as error:
                raise Violation(f"{process.name}: {error}") from error
            except BetaKDError as error:
                scheduler.note(f"ends: {type(error).__name__}: {error}")
                outcomes[rank] = error
            except Exception as error:
                raise Violation(f"{process.name} ended with {type(error).__name__}: {error}") from error

        scheduler.start(process, process.name, run)
        return process
