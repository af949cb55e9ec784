"""How a run does, from the files in its folder: whether a driver works on it, its step, its numbers, its checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from time import time

from betakd_ray.data.files import store_errors
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.files import stored, stored_spec
from betakd_ray.run.folder import CHECKPOINTS, METRICS_PARTS
from betakd_ray.run.lease import Leases
from betakd_ray.run.metrics import MetricsRecord, newest_records, stream_metrics
from betakd_ray.run.pace import WINDOW, Pace, beta_text, clock_text, progress_text, waits_text
from betakd_ray.run.plan import PLAN_FILE
from betakd_ray.run.records import RESULT_FILE
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store


@dataclass(frozen=True)
class RunStatus:
    """State of a run at one moment."""

    run: str
    state: str
    """`finished`, `running` with its driver, or `stopped`."""
    total_steps: int | None
    """None until the data were planned."""
    records: list[MetricsRecord]
    """The newest metrics, in order."""
    checkpoint: tuple[str, int] | None
    """Name and step of the newest checkpoint."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield what a user asks of a run, as (quantity, value)."""
        yield "state", self.state
        if self.records:
            yield from self._numbers(self.records[-1])
        else:
            yield "step", f"none is logged yet, of {self.total_steps or 'an unknown number'}"
        name, step = self.checkpoint or ("none", 0)
        where = join(self.run, CHECKPOINTS, name) if self.checkpoint else "none"
        yield "last checkpoint", f"step {step}, {where}" if self.checkpoint else where

    def _numbers(self, record: MetricsRecord) -> Iterator[tuple[str, str]]:
        step, total = record["step"], self.total_steps
        share = f" of {total} ({100 * step / total:.0f}%)" if total else ""
        yield "step", f"{step}{share}"
        yield "loss", f"{record.get('loss', float('nan')):.4f}"
        if betas := beta_text(record).removeprefix("beta "):
            yield "beta", betas
        yield "speed", f"{record.get('samples_per_second', float('nan')):.4g} samples/s"
        if waits := waits_text(record).removeprefix("waits "):
            yield "waits", waits
        if "time" in record:
            yield "logged", f"{timedelta(seconds=round(max(0.0, time() - record['time'])))} ago"
        if total and self.state.startswith("running"):
            yield "ETA", clock_text(Pace(self.records).seconds_left(total))


def status_of(run: str, storage: StorageSpec) -> RunStatus:
    """Return how a run does. Raises OutputError if the folder is not a run's, DataError if the store fails."""
    spec = stored_spec(run, storage)
    plan = stored(run, storage, PLAN_FILE)
    with store_errors(run, storage):
        records = newest_records(*open_store(run, storage), WINDOW)
    last = CheckpointStore(run, storage).latest()
    return RunStatus(
        run,
        _state(run, storage),
        spec.training.steps(plan.samples) if plan else None,
        records,
        (last.name, last.step) if last else None,
    )


def _state(run: str, storage: StorageSpec) -> str:
    if stored(run, storage, RESULT_FILE) is not None:
        return "finished"
    token, lease = Leases(run, storage).newest()
    if lease is None:
        return "running" if token else "not begun"
    if lease.is_released or lease.holder.is_dead():
        return "stopped: run the same command again to go on"
    return f"running, driver {lease.holder}"


def lines_of(run: str, storage: StorageSpec, after: int = -1) -> Iterator[tuple[int, str]]:
    """Yield (step, line) for each record of a run after step `after`, as a job prints it without a terminal."""
    spec, plan = stored_spec(run, storage), stored(run, storage, PLAN_FILE)
    total, pace = spec.training.steps(plan.samples) if plan else 0, Pace()
    with store_errors(join(run, METRICS_PARTS), storage):
        for record in stream_metrics(*open_store(run, storage)):
            pace.note(record)
            if record["step"] > after:
                yield record["step"], f"{spec.name}: {progress_text(record, total, pace)}"
