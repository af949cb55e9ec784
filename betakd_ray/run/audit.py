"""Audit of a run from its files alone: what happened to every planned sample.

A planned sample has one of three states. Consumed: it took part in one committed step, and the ledger has it.
Quarantined: it will never take part, and quarantine.jsonl says why. Open: it is still to do; in a finished job, the
open samples are the tail.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os.path import commonprefix
from typing import Any

import numpy as np
from numpy.typing import NDArray

from betakd_ray.data.files import store_errors
from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan, Quarantined, ids_of
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.claim import PLAN_ORIGIN, changes
from betakd_ray.run.files import ANOTHER_NAME, SPEC_FILE, as_written, stored, stored_spec
from betakd_ray.run.folder import CHECKPOINTS, METRICS, MODEL, MODEL_RECORD, PLAN, QUARANTINE, RESULT, SPEC, TAIL
from betakd_ray.run.manifest import Manifest
from betakd_ray.run.metrics import stream_metrics
from betakd_ray.run.plan import place_of, plan_digest, settled_samples, stored_plan, tail_of
from betakd_ray.run.records import (
    MODEL_RECORD_FILE,
    PROGRESS_FILE,
    QUARANTINE_FILE,
    RESULT_FILE,
    TAIL_FILE,
    ModelRecord,
    Result,
)
from betakd_ray.spec import JobSpec, StorageSpec
from betakd_ray.storage import join, open_store

COLUMNS: tuple[str, ...] = ("planned", "consumed", "quarantined", "open")
REPORTED = ("steps", "planned", "consumed", "quarantined", "tail", "token")
"""Fields of result.json that the audit checks."""
NAMED = 3
"""Largest number of samples that the text of a problem names."""


@dataclass(frozen=True, eq=False)
class Audit:
    """States of a run's planned samples at its newest committed checkpoint."""

    step: int
    """Step of that checkpoint; 0 if there is none."""
    is_finished: bool
    shards: tuple[str, ...]
    samples: dict[str, NDArray[np.int64]]
    """Numbers of planned, consumed, quarantined and open samples, each [epochs, shards].

    The last three add up to the first. If the ledger belongs to another plan, it says nothing, and there are no epochs.
    """
    problems: list[str]
    """Contradictions between the run's files, one text each."""
    quarantined: list[Quarantined]
    """Samples of the plan that are in quarantine."""

    @property
    def totals(self) -> dict[str, int]:
        """Return the numbers of planned, consumed, quarantined and open samples over all epochs and shards."""
        return {name: int(counts.sum()) for name, counts in self.samples.items()}

    @property
    def state(self) -> str:
        """Return a text about how far the job is, and so what its open samples are."""
        if self.is_finished:
            return f"finished at step {self.step}: open samples are its tail"
        return f"not finished, step {self.step} is committed: open samples are still to do"

    def table(self, by_shard: bool) -> list[list[str]]:
        """Return a header, one line per epoch (or per epoch and shard), and the totals."""
        counts = np.stack([self.samples[name] for name in COLUMNS], axis=-1)
        if by_shard:
            shards = _without_common_folder(self.shards)
            names = [[str(epoch), shard] for epoch in range(len(counts)) for shard in shards]
            header, total, counts = ["epoch", "shard"], ["total", ""], counts.reshape(-1, len(COLUMNS))
        else:
            names = [[str(epoch)] for epoch in range(len(counts))]
            header, total, counts = ["epoch"], ["total"], counts.sum(axis=1)
        lines = [[*name, *_figures(row)] for name, row in zip(names, counts.tolist(), strict=True)]
        return [[*header, *COLUMNS], *lines, [*total, *_figures(self.totals.values())]]

    def reasons(self) -> list[list[str]]:
        """Return a header, and one line per quarantined sample: epoch, shard, number in the shard, key, reason."""
        lines = [
            [str(bad.epoch), self.shards[bad.shard], str(bad.index), bad.key, bad.reason] for bad in self.quarantined
        ]
        return [["epoch", "shard", "sample", "key", "reason"], *lines]


def audit(run: str, storage: StorageSpec, *, verify: bool = False) -> Audit:
    """Return the audit of a run. The job may still be running.

    With `verify`, every file of the newest checkpoint is read and compared with its digest.

    Raises OutputError if the folder is not a run's, or if a file in it is damaged. Raises DataError if the store fails.
    """
    spec, plan = _planned(run, storage)
    outcome = _outcome(run, storage)  # read before the checkpoint: a job that has an outcome commits no newer one
    last = _committed(CheckpointStore(run, storage), spec, plan, verify=verify)
    problems = [*last.problems, *_disordered(_logged(run, storage))]
    counts: dict[str, NDArray[np.int64]] = dict.fromkeys(COLUMNS, np.zeros((0, len(plan.shards)), np.int64))
    inside: list[Quarantined] = []
    if wrong := list(_of_another_plan(last, plan)):
        problems += wrong
    else:
        inside = [bad for bad in last.quarantined if plan.has(bad.epoch, bad.shard, bad.index)]
        counts = _counts(plan, last.ledger, inside)
        problems += [*_miscounted(last, plan, spec), *_misplaced(last, plan, inside)]
        if outcome:
            left = int(counts["open"].sum())
            tail = tail_of(plan, last.ledger, inside, spec.training.global_batch_size)
            problems += _misreported(outcome, last, plan, spec, left, tail)
    return Audit(last.step, outcome is not None, _names(plan), counts, problems, inside)


def _names(plan: Plan) -> tuple[str, ...]:
    """Return the URL of each pass's shard, with the number of the pass from the second on."""
    passes = zip(plan.shards, plan.repeats.tolist(), strict=True)
    return tuple(shard.url + (f" (pass {number})" if number > 1 else "") for shard, number in passes)


def _counts(plan: Plan, ledger: Ledger, quarantined: list[Quarantined]) -> dict[str, NDArray[np.int64]]:
    consumed = ledger.counts(plan.epochs)
    settled = settled_samples(plan, ledger, quarantined).counts(plan.epochs)
    planned = np.broadcast_to(plan.sizes, settled.shape)
    return dict(zip(COLUMNS, (planned, consumed, settled - consumed, planned - settled), strict=True))


def _figures(counts: Iterable[int]) -> list[str]:
    return [f"{count:,}" for count in counts]


def _without_common_folder(urls: Sequence[str]) -> list[str]:
    start = commonprefix(urls).rfind("/") + 1  # noqa: RUF071 (commonpath would take a slash out of "s3://")
    return [url[start:] for url in urls]


# ------------------------------------------------------------------------------------------ what must hold


def _disordered(logged: list[int]) -> Iterator[str]:
    """Yield a problem if steps are logged twice or out of order."""
    if back := [f"step {after} after step {before}" for before, after in pairwise(logged) if after <= before]:
        yield f"{METRICS}: {len(back)} steps are logged twice or out of order: {_few(back)}"


def _of_another_plan(last: "_Committed", plan: Plan) -> Iterator[str]:
    """Yield a problem if the ledger's shards are not the plan's."""
    sizes, planned = last.ledger.sizes, plan.sizes
    if len(sizes) != len(planned):
        yield f"{last.name}: its ledger has {len(sizes)} shards, but {PLAN} has {len(planned)}"
    elif (differing := np.flatnonzero(sizes != planned)).size:
        shards = [f"{plan.shards[at].url} with {sizes[at]} samples, not {planned[at]}" for at in differing]
        yield f"{last.name}: its ledger and {PLAN} differ in the size of {len(shards)} shards: {_few(shards)}"


def _miscounted(last: "_Committed", plan: Plan, spec: JobSpec) -> Iterator[str]:
    """Yield a problem if not every committed step used up one global batch of samples that no other step had."""
    size, consumed = spec.training.global_batch_size, last.ledger.count
    taken = last.step * size
    surplus = consumed + last.dropped - taken
    sums = f"{last.step} steps of {size} took {taken}; {consumed} are consumed and {last.dropped} dropped"
    if surplus > 0:
        yield f"{last.name}: {surplus} samples count as done, but were not in any step: {sums}"
    if surplus < 0:
        yield f"{last.name}: {-surplus} samples were in two steps: {sums}"
    if last.dropped > len(last.quarantined):
        yield (
            f"{last.name}: {last.dropped} samples were dropped from steps, but only {len(last.quarantined)} are "
            "quarantined"
        )
    if beyond := consumed - int(last.ledger.counts(plan.epochs).sum()):
        yield f"{last.name}: {beyond} samples are consumed in epochs after the last of {plan.epochs}"


def _misplaced(last: "_Committed", plan: Plan, inside: list[Quarantined]) -> Iterator[str]:
    """Yield a problem if quarantined samples are not in the plan, are listed twice, or are consumed as well."""
    where = f"{last.name}/{QUARANTINE}"
    named = Counter(_named(bad, plan) for bad in last.quarantined)
    if twice := [name for name, times in named.items() if times > 1]:
        yield f"{where}: {len(twice)} samples are listed twice: {_few(twice)}"
    if outside := [_named(bad, plan) for bad in last.quarantined if not plan.has(bad.epoch, bad.shard, bad.index)]:
        yield f"{where}: {len(outside)} samples are not in the plan: {_few(outside)}"
    if both := [_named(inside[at], plan) for at in np.flatnonzero(last.ledger.holds(ids_of(inside)))]:
        yield f"{where}: {len(both)} samples are also consumed: {_few(both)}"


def _misreported(
    outcome: "_Outcome", last: "_Committed", plan: Plan, spec: JobSpec, left: int, tail: list[dict[str, Any]]
) -> Iterator[str]:
    """Yield a problem if a finished job's files contradict its last checkpoint, or if a global batch is left over."""
    numbers = (last.step, plan.samples, last.ledger.count, len(last.quarantined), left, last.token)
    for name, number in zip(REPORTED, numbers, strict=True):
        if (said := getattr(outcome.result, name)) != number:
            yield f"{RESULT}: {name} is {said}, but according to {last.name} it is {number}"
    noted, known = (
        Counter(f"{_named(bad, plan)} ({bad.reason})" for bad in listed)
        for listed in (outcome.quarantined, last.quarantined)
    )
    for name in ("token", "step") if outcome.model else ():
        if (said := getattr(outcome.model, name)) != (number := getattr(last, name)):
            yield f"{MODEL}/{MODEL_RECORD}: {name} is {said}, but according to {last.name} it is {number}"
    yield from _unequal(QUARANTINE, noted, known)
    yield from _unequal(TAIL, Counter(outcome.tail), Counter(_name(**sample) for sample in tail))
    size = spec.training.global_batch_size
    if left >= size and last.step != spec.training.max_steps:
        yield (
            f"{RESULT}: {left} samples are left over, enough for another step of {size}, but training.max_steps did "
            "not end the job"
        )


def _unequal(file: str, listed: Counter[str], expected: Counter[str]) -> Iterator[str]:
    if missing := expected - listed:
        yield f"{file}: {missing.total()} samples are missing: {_few(list(missing))}"
    if surplus := listed - expected:
        yield f"{file}: {surplus.total()} samples should not be there: {_few(list(surplus))}"


def _named(bad: Quarantined, plan: Plan) -> str:
    if not plan.has(bad.epoch, bad.shard, bad.index):
        is_known = 0 <= bad.shard < len(plan.shards)
        return _name(bad.epoch, plan.shards[bad.shard].url if is_known else f"shard {bad.shard}", bad.index)
    return _name(**place_of(plan, bad.epoch, bad.shard, plan.member(bad.epoch, bad.shard, bad.index)))


def _name(epoch: int, shard: str, index: int, **again: int) -> str:
    return f"sample {index} of {shard} in epoch {epoch}" + (f", pass {again['pass']}" if again else "")


def _few(names: Sequence[str]) -> str:
    more = f"; and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return "; ".join(names[:NAMED]) + more


# ------------------------------------------------------------------------------------------ a run's files


@dataclass(frozen=True)
class _Committed:
    """Contents of the newest committed checkpoint."""

    name: str
    step: int
    ledger: Ledger
    quarantined: list[Quarantined]
    dropped: int
    """Number of samples that were taken for a step but took no part in it; they are quarantined."""
    token: int = 0
    problems: tuple[str, ...] = ()
    """What is wrong with the checkpoints themselves."""


@dataclass(frozen=True)
class _Outcome:
    """Contents of a finished job's result files."""

    result: Result
    model: ModelRecord | None
    """Where the model comes from; runs of older versions did not store it."""
    quarantined: list[Quarantined]
    tail: list[str]


def _planned(run: str, storage: StorageSpec) -> tuple[JobSpec, Plan]:
    spec, plan = stored_spec(run, storage), stored_plan(run, storage)
    if plan.epochs != spec.training.epochs:  # before there are arrays of so many epochs
        with as_written(join(run, PLAN), ANOTHER_NAME):
            raise ValueError(f"epochs: {plan.epochs}, but training.epochs is {spec.training.epochs} in the spec")
    return spec, plan


def _committed(store: CheckpointStore, spec: JobSpec, plan: Plan, *, verify: bool) -> _Committed:
    survey = store.survey()
    problems, last = list(survey.damaged.values()), survey.newest()
    if last is None:
        return _Committed(f"{CHECKPOINTS} (none is committed)", 0, plan.empty_ledger(), [], 0)
    if verify and (damage := store.verify(last)):
        problems.append(damage)
    problems += _of_another_job(store, last, spec, plan)
    dropped = store.parsed(last, PROGRESS_FILE).dropped
    # Without the plan: what is not in it is a problem that the audit lists.
    ledger, quarantined = store.ledger(last), store.quarantined(last)
    return _Committed(last.name, last.step, ledger, quarantined, dropped, last.token, tuple(problems))


def _of_another_job(store: CheckpointStore, last: Manifest, spec: JobSpec, plan: Plan) -> Iterator[str]:
    """Yield a problem if a checkpoint was made for another spec or plan than those in the run's folder."""
    there = store.parsed(last, SPEC_FILE) if SPEC in last.files else spec
    if differing := [str(each) for each in changes(there, spec) if not each.is_growth]:
        yield f"{SPEC}: is of another job than {last.name}: {_few(differing)}"
    # A job that became longer has more epochs than its older checkpoints.
    planned = replace(plan, epochs=min(plan.epochs, there.training.epochs))
    if (noted := last.origins.get(PLAN_ORIGIN)) and noted != plan_digest(planned):
        yield f"{PLAN}: is another than the one that {last.name} was made with"


def _outcome(run: str, storage: StorageSpec) -> _Outcome | None:
    """Return the result files of a job; None until it is finished."""
    result = stored(run, storage, RESULT_FILE)
    if result is None:
        return None
    tail = [
        _name(each.epoch, each.shard, each.index, **({"pass": each.repeat} if each.repeat else {}))
        for each in stored(run, storage, TAIL_FILE) or []
    ]
    model = stored(run, storage, MODEL_RECORD_FILE)
    return _Outcome(result, model, stored(run, storage, QUARANTINE_FILE) or [], tail)


def _logged(run: str, storage: StorageSpec) -> list[int]:
    """Return the steps that were logged."""
    with store_errors(join(run, METRICS), storage):
        return [record["step"] for record in stream_metrics(*open_store(run, storage))]
