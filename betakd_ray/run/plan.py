"""The plan that a run keeps, and the samples that were left over at its end."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import numpy as np
from pydantic import FailFast

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Plan, Quarantined, ids_of
from betakd_ray.data.shards import Shard
from betakd_ray.errors import OutputError
from betakd_ray.run.files import ANOTHER_NAME, MAX_LARGE_BYTES, File, required, stored, whole, write_text
from betakd_ray.run.folder import PLAN, TAIL
from betakd_ray.run.metrics import to_jsonl
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join


def write_plan(run: str, storage: StorageSpec, plan: Plan) -> None:
    """Write plan.json at the first start of a run. Raises OutputError if a later start has another plan.

    A plan with more epochs is no other one; `run.extension` writes it.
    """
    url = join(run, PLAN)
    before = stored(run, storage, PLAN_FILE)
    if before is None:
        write_text(url, storage, plan_to_json(plan))
    elif replace(before, epochs=max(before.epochs, plan.epochs)) != plan:
        raise OutputError(
            f"{url}: the data changed during the run: {_first_difference(before, plan)}. So it is not known which "
            "samples are done. Restore the shards as they were, or start a new run under another `name`."
        )


def plan_digest(plan: Plan) -> str:
    """Return a digest of the order of reading and of every shard's samples, bytes and checksum."""
    # The fields are named one by one: a field that a later version adds must not change the digest of a plan.
    shards = [(shard.url, shard.samples, shard.bytes, shard.checksum) for shard in plan.shards]
    content = [shards, plan.epochs, plan.seed, plan.shuffle, plan.parts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def tail_of(
    plan: Plan, ledger: Ledger, quarantined: Sequence[Quarantined], global_batch_size: int
) -> list[dict[str, Any]]:
    """Return the open samples of a finished job; [] if they are a global batch or more.

    A sample is {"epoch", "shard": URL, "index": number in the shard}, with "pass" from the second pass over a shard on.
    If `training.max_steps` ended the job, most of the plan may be open. It is then not listed.
    """
    settled = settled_samples(plan, ledger, quarantined)
    if plan.samples - settled.count >= global_batch_size:
        return []
    left = np.argwhere(settled.counts(plan.epochs) < plan.sizes).tolist()
    return [
        place_of(plan, epoch, number, member)
        for epoch, number in left
        for member in plan.members(epoch, number)[~settled.done(epoch, number)].tolist()
    ]


def place_of(plan: Plan, epoch: int, number: int, member: int) -> dict[str, Any]:
    """Return where a sample is, for a human reader. "pass" is given from an epoch's second pass over the shard on."""
    place = {"epoch": epoch, "shard": plan.shards[number].url, "index": member}
    return place | ({"pass": int(plan.repeats[number])} if plan.repeats[number] > 1 else {})


def write_tail(run: str, storage: StorageSpec, samples: Iterable[dict[str, Any]]) -> None:
    """Write the open samples of a finished job to tail.jsonl, one per line."""
    write_text(join(run, TAIL), storage, to_jsonl(samples))


def settled_samples(plan: Plan, ledger: Ledger, quarantined: Sequence[Quarantined]) -> Ledger:
    """Return the samples that are consumed or in quarantine."""
    settled = plan.empty_ledger()
    settled.merge(ledger)
    settled.include(ids_of(quarantined))
    return settled


def _first_difference(before: Plan, now: Plan) -> str:
    # strict=False: a different number of shards is reported after the first shard that differs.
    for number, (was, is_now) in enumerate(zip(before.shards, now.shards, strict=False)):
        if was != is_now:
            return f"shard {number} was {_described(was)} and is {_described(is_now)}"
    if len(before.shards) != len(now.shards):
        number = min(len(before.shards), len(now.shards))
        change = "is gone" if number == len(now.shards) else "is new"
        shard = max(before.shards, now.shards, key=len)[number]
        return f"shard {number}, {shard.url}, {change} ({len(before.shards)} shards before, {len(now.shards)} now)"
    if (differing := np.flatnonzero(before.sizes != now.sizes)).size:
        number = differing[0]
        return (
            f"an epoch took {before.sizes[number]} samples of shard {number}, {now.shards[number].url}, and now takes "
            f"{now.sizes[number]}: its weight in data.train changed"
        )
    changed = [name for name in ("epochs", "seed", "shuffle") if getattr(before, name) != getattr(now, name)]
    return ", ".join(f"{name} was {getattr(before, name)} and is {getattr(now, name)}" for name in changed)


def plan_to_json(plan: Plan) -> str:
    """Return the plan as JSON: {"shards": one per pass, "epochs", "seed", "shuffle", "parts": list of [pass, samples]}.

    "parts" has the passes that read only a part of their shard.
    """
    names = [each.name for each in fields(Shard)]
    shards = [{name: getattr(shard, name) for name in names} for shard in plan.shards]
    return json.dumps({**{each.name: getattr(plan, each.name) for each in fields(Plan)}, "shards": shards})


def _described(shard: Shard) -> str:
    return f"{shard.url} ({shard.samples} samples, {shard.bytes} bytes, crc32 {shard.checksum})"


@dataclass(frozen=True)
class _Stored:
    """Content of plan.json."""

    # FailFast: a damaged list of a million shards would otherwise give a million errors.
    shards: Annotated[tuple[Shard, ...], FailFast()]
    epochs: int
    seed: int
    shuffle: bool
    parts: Annotated[tuple[tuple[int, int], ...], FailFast()] = ()
    """Empty in a run that began before data.train had weights."""


_STORED = whole(_Stored)


def _plan_from_json(content: bytes) -> Plan:
    found = _STORED(content)
    if not found.shards or found.epochs < 1:
        raise ValueError("there is no shard, or no epoch")
    plan = Plan(found.shards, found.epochs, found.seed, found.shuffle, found.parts)
    plan.require_sound()
    return plan


PLAN_FILE = File(PLAN, _plan_from_json, ANOTHER_NAME, MAX_LARGE_BYTES)


def stored_plan(run: str, storage: StorageSpec) -> Plan:
    """Return the plan of a run. Raises OutputError if there is none, or if it is damaged."""
    return required(run, storage, PLAN_FILE)
