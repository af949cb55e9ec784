"""One schedule of teachers: ranks that ask the real client for the signals of their steps, and faults of all kinds."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from random import Random
from typing import Any

import numpy as np
from ray.exceptions import RayActorError

from benchmarks.fakes import stacked
from betakd_ray.batch.sample import Sample
from betakd_ray.errors import BetaKDError, ClusterError, TeacherError
from betakd_ray.spec import TeacherPoolSpec
from betakd_ray.teacher.client import TeacherClient
from betakd_ray.teacher.signals import Said, SignalSource
from tests.simulation.cluster import Event, Group
from tests.simulation.scheduler import Faults, Process, Scheduler, Violation
from tests.simulation.teachers import FAULTS, FIRST_TOKEN, POOL_FAULTS, SPEC, PoolActor, World, numbered

STEPS, SHARE = 6, 6
"""Number of steps, and of samples that a rank has in each."""
TOKENS = 16
"""Token budget of a group."""
STEP_S = (0.1, 2.0, 30.0)
"""Seconds that a step takes."""
START_TIMEOUT_S = 600.0
LIMIT_S = 20_000.0
"""Seconds after which a schedule counts as one that waits for ever. The longest take a fifth."""


class Executor:
    """A ThreadPoolExecutor, each of whose calls has a simulated thread."""

    def __init__(self, scheduler: Scheduler, threads: int, thread_name_prefix: str) -> None:
        self._scheduler, self._name = scheduler, thread_name_prefix

    def submit(self, call: Callable[..., Any], *args: Any) -> None:
        process = self._scheduler.thread.process
        self._scheduler.start(process, f"{process.name}'s {self._name}", partial(call, *args))

    def shutdown(self, wait: bool, cancel_futures: bool) -> None: ...


class TeacherSchedule:
    """The teachers and the ranks of one seed."""

    def __init__(self, seed: int) -> None:
        self.scheduler = Scheduler(seed)
        self.random = self.scheduler.random
        self.world = World(self.scheduler)
        self.ranks = self.random.choice((1, 2))
        least = self.random.choice((1, 1, 2, 3))
        most = least + self.random.choice((0, 0, 1, 2))
        self.spec = TeacherPoolSpec(min=least, max=most, max_restarts=self.random.choice((2, 3)))
        self.done = 0
        """Number of steps that all ranks have done."""

    def run(self) -> None:
        """Run the schedule. Raises Violation, with the seed and the trace, if an invariant does not hold."""
        try:
            self._run()
        except Violation as error:
            trace = "\n".join(self.scheduler.trace)
            raise Violation(f"seed {self.scheduler.seed} of the teachers: {error}\n{trace}") from error
        finally:
            self.scheduler.close()

    def _run(self) -> None:
        scheduler, random = self.scheduler, self.random
        every = FAULTS + POOL_FAULTS
        kinds = tuple(random.sample(every, random.randint(1, len(every))))
        scheduler.faults = Faults(random.randint(0, 6), random.choice((0.005, 0.03, 0.1)), kinds)
        # At most one in a rank's share of a step: two in one group may end the job, as the teacher may be at fault.
        shares = random.sample(range(STEPS * self.ranks), random.choice((0, 0, 1, 2, 4)))
        bad = [FIRST_TOKEN + share * SHARE + random.randrange(SHARE) for share in shares]
        self.world.deadly, self.world.refused = set(bad[::2]), set(bad[1::2])
        driver = scheduler.start(scheduler.process("driver", ""), "driver", self._drive)
        scheduler.run(until=lambda: driver.is_done or scheduler.now > LIMIT_S)
        if not driver.is_done:
            raise Violation(f"step {self.done + 1} waits for ever, after {scheduler.now:.0f} s")

    # -------------------------------------------------------------------------------------------- the driver

    def _drive(self) -> None:
        """Do what a job does: start a pool and the ranks, and start again what has ended."""
        while self.done < STEPS:
            pool = PoolActor(self.world, self.spec)
            try:
                pool.wait_until_ready(START_TIMEOUT_S)
                while self.done < STEPS and not pool.process.is_dead:
                    self._attempt(pool)
            except (RayActorError, TeacherError, ClusterError) as error:
                self._require_reason(error)
            finally:
                if not self.scheduler.is_over:
                    pool.end()

    def _require_reason(self, error: Exception) -> None:
        """Raise Violation unless something has happened for which a job may end with this error."""
        self.scheduler.note(f"the job ends: {type(error).__name__}: {error}")
        world, text = self.world, str(error)
        if isinstance(error, RayActorError):
            return
        if "more often in a row" in text:
            is_due = world.deaths > self.spec.max_restarts * (self.spec.max or self.spec.min)
        elif "could not score any sample" in text:
            is_due = len(world.deadly | world.refused | world.unlucky) > 1
        elif "even a blank sample" in text:
            is_due = world.has_blanked
        else:
            is_due = False
        if not is_due:
            raise Violation(f"the job ends without a reason: {type(error).__name__}: {error}")

    def _attempt(self, pool: PoolActor) -> None:
        """Run the ranks until they have done all steps, or one of them has ended or died."""
        scheduler = self.scheduler
        group = Group(scheduler, self.ranks)
        errors: list[Exception] = []
        ranks = [self._rank(pool, group, rank, errors) for rank in range(self.ranks)]
        while self.done < STEPS and not errors and not any(process.is_dead for process in ranks):
            scheduler.pause(2.0)
        for process in ranks:
            if not process.is_dead:
                scheduler.kill(process)
        for error in errors:
            if isinstance(error, TeacherError):
                raise error

    def _rank(self, pool: PoolActor, group: Group, rank: int, errors: list[Exception]) -> Process:
        process = self.scheduler.process(f"rank {rank}", f"node {rank}", rank, group)

        def run() -> None:
            try:
                Rank(self, pool, group, rank).train()
            except (BetaKDError, RayActorError) as error:
                self.scheduler.note(f"ends: {type(error).__name__}: {error}")
                errors.append(error)

        self.scheduler.start(process, process.name, run)
        return process

    def samples(self, step: int, rank: int) -> list[Sample]:
        """Return the samples of a rank in a step, which are the same at each start."""
        random = Random(step)  # not the schedule's: the same lengths in each start
        first = (step * self.ranks + rank) * SHARE
        made = []
        for index in range(first, first + SHARE):
            rendering = numbered(FIRST_TOKEN + index, 1000 + index, random.choice((4, 4, 6, 8)))
            made.append(Sample(0, 0, index, index, str(index), rendering, rendering))
        return made


class Rank:
    """A student whose steps only take time, with the real client and the real source of signals."""

    def __init__(self, schedule: TeacherSchedule, pool: PoolActor, group: Group, rank: int) -> None:
        self.schedule, self.world, self.group, self.rank = schedule, schedule.world, group, rank
        self.client = TeacherClient(pool, rank, group.ranks, SPEC, START_TIMEOUT_S, stacked)
        self.source = SignalSource(self.client, TOKENS)
        self.seen: set[int] = set()

    def train(self) -> None:
        """Do the steps that are left, each with signals that were asked for a step ahead."""
        scheduler = self.schedule.scheduler
        self.client.head()
        ahead: list[list[tuple[Sample, Future[Said]]]] = []
        for step in range(self.schedule.done, STEPS):
            while len(ahead) < 2 and step + len(ahead) < STEPS:
                samples = self.schedule.samples(step + len(ahead), self.rank)
                ahead.append([(sample, self.source.add(sample).said) for sample in samples])
                self.source.flush()
            if self.world.fault("death of a rank"):
                scheduler.kill(scheduler.thread.process)
            begun = scheduler.now
            for sample, said in ahead.pop(0):
                self.check(sample, self.awaited(said))
            self.client.report_waiting(scheduler.now - begun)
            scheduler.pause(scheduler.random.choice(STEP_S))
            self.group.exchange(step)
            self.schedule.done = max(self.schedule.done, step + 1)
        if self.client.in_flight:
            raise Violation(f"{self.client.in_flight} groups count as sent after the last step")
        self.client.close()

    def awaited(self, said: Future[Said]) -> Said:
        """Wait for the future of another simulated thread."""
        has_come = Event(self.schedule.scheduler)
        said.add_done_callback(lambda _: has_come.set())
        has_come.wait()
        return said.result()

    def check(self, sample: Sample, said: Said) -> None:
        """Raise Violation unless this is the answer to this sample."""
        token, number = sample.index + FIRST_TOKEN, sample.index + 1000
        if sample.index in self.seen:
            raise Violation(f"sample {sample.index} is in two steps of one start")
        self.seen.add(sample.index)
        bad = self.world.deadly | self.world.refused
        if said.signal is None:
            if token not in bad | self.world.unlucky:
                raise Violation(f"sample {sample.index} is in quarantine beside another one: {said.reason}")
            return
        if token in bad:
            raise Violation(f"sample {sample.index}, which no teacher can score, has an answer")
        answer = said.signal["hidden"]
        rows = int(sample.teacher.answer_mask.sum())
        if not np.array_equal(answer, np.tile(np.array([token, number], np.float32), (rows, 1))):
            raise Violation(f"sample {sample.index} has the answer of another: {answer.tolist()}")
