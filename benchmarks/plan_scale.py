"""Time from the start of the workers to their first block, for a job of millions of (epoch, shard) pairs.

    python -m benchmarks.plan_scale [--shards 200000] [--epochs 10]

The plan, the callable that Ray Train calls, the split and the reader are the real ones. Most shards are only entries of
a manifest; those of the groups that are read first are small tar files. The time is measured at the first start, and at
a restart with half of the work done.
"""

import argparse
import io
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
from ray.actor import ActorHandle

from betakd_ray.batch.sample import Rendering
from betakd_ray.data.ledger import SampleIds
from betakd_ray.data.manifest import index_shards
from betakd_ray.data.plan import Plan, Quarantined
from betakd_ray.data.reader import Reader
from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample
from betakd_ray.data.shards import Shard
from betakd_ray.on_ray.monitor import Monitor
from betakd_ray.on_ray.source import SplitOnce, rows
from betakd_ray.run.checkpoint import CheckpointStore, Manifest
from betakd_ray.run.folder import LEDGER, QUARANTINE
from betakd_ray.run.plan import write_plan
from betakd_ray.spec import JobSpec, StorageSpec, parse_spec

LOCAL = StorageSpec()
RANKS = 2
SAMPLES = 1000
"""Number of samples of a shard that is only in the manifest."""
SMALL = 20
"""Number of samples of a shard whose file exists."""


class Letters(Renderer):
    """Renderer without a tokenizer."""

    def __init__(self) -> None:
        pass

    @property
    def fingerprint(self) -> str:
        return "letters"

    def render(self, sample: RawSample) -> Rendering:
        """Return a rendering with one token per letter; all but the first are the answer."""
        ids = np.frombuffer(sample.conversation[-1]["value"].encode(), np.uint8).astype(np.int32)
        return Rendering(ids, np.arange(len(ids)) > 0)

    def count_image_tokens(self, rendering: Rendering) -> int:
        return 0


@dataclass
class Figures:
    """Measurements. Memory sizes are resident bytes; times (`_s`) are seconds."""

    pairs: int
    tasks: int
    driver_before: int
    plan_s: float = 0.0
    first_s: dict[str, float] = field(default_factory=dict)
    """Start or restart → seconds from the call of the callable to the first block of every rank."""
    callable_s: dict[str, float] = field(default_factory=dict)
    """Start or restart → seconds of the callable alone."""
    driver_peak: int = 0
    coordinator_peak: int = 0
    """Peak memory of the process in which Ray Data's executor runs."""


def run(shards: int = 200_000, epochs: int = 10) -> Figures:
    """Measure a start and a restart.

    Uses the running Ray. If there is none, starts one with a single CPU, so that only the first task reads its shards.
    """
    is_mine = not ray.is_initialized()
    if is_mine:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measured(Path(folder), shards, epochs)
    finally:
        if is_mine:
            ray.shutdown()


def _measured(folder: Path, shards: int, epochs: int) -> Figures:
    before = _memory(os.getpid())
    start = time.perf_counter()
    plan = _plan(folder, shards, epochs)
    figures = Figures(shards * epochs, plan.groups * epochs, before)
    spec, run_folder = _spec(folder), folder / "runs" / "job"
    run_folder.mkdir(parents=True)
    write_plan(str(run_folder), LOCAL, plan)
    write_plan(str(run_folder), LOCAL, plan)  # a restart reads and compares it
    monitor = cast(ActorHandle, ray.remote(Monitor).options(num_cpus=0).remote(plan.samples, [], 0))
    reader = ray.put(Reader(plan, spec.data, {"student": Letters()}, _report, _give_up))
    figures.plan_s = time.perf_counter() - start
    for name in ("start", "restart"):
        if name == "restart":
            _commit_half(run_folder, plan)
        began = time.perf_counter()
        dataset = rows(reader, spec, str(run_folder), plan, monitor)
        figures.callable_s[name] = time.perf_counter() - began
        splits: list[Any] = [split["train"] for split in SplitOnce().configure({"train": dataset}, RANKS, None, None)]
        ranks = [cast(ActorHandle, Rank.remote()) for _ in splits]
        counts = ray.get([rank.first.remote(split) for rank, split in zip(ranks, splits, strict=True)])
        figures.first_s[name] = time.perf_counter() - began
        assert all(counts), counts
        figures.coordinator_peak = max(figures.coordinator_peak, *map(_memory, _processes("SplitCoordinator")))
        for rank in ranks:
            ray.kill(rank)
        ray.kill(splits[0]._coord_actor)
        del dataset, splits
    figures.driver_peak = _memory(os.getpid())
    return figures


@ray.remote(num_cpus=0)
class Rank:
    """Fake student that reads one block."""

    def first(self, split: Any) -> int:
        """Return the number of rows of its first block."""
        self.blocks = split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        return int(next(iter(self.blocks)).num_rows)


def _report(bad: list[Quarantined]) -> float:
    return 0.0


def _give_up(error: Exception) -> None:
    raise error


def _plan(folder: Path, shards: int, epochs: int) -> Plan:
    """Return a plan. Only the shards of the first groups of the first and the middle epoch have files."""
    entries = [Shard(f"{folder}/data/{n:08}.tar", SAMPLES, 1 << 26, f"{n:08x}") for n in range(shards)]
    plan = Plan(tuple(entries), epochs, seed=0, shuffle=True)
    last = int(plan.bounds()[1]) if shards > 1000 else shards  # if there are few shards, all have files
    needed = {int(shard) for epoch in (0, epochs // 2) for shard in plan.order(epoch)[:last]}
    (folder / "data").mkdir()
    for number in needed:
        Path(entries[number].url).write_bytes(_tar())
    for shard in index_shards([f"{folder}/data/*.tar"], LOCAL):
        entries[int(Path(shard.url).stem)] = shard
    return Plan(tuple(entries), epochs, seed=0, shuffle=True)


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(SMALL):
            turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": f"number {number} " * 20}]
            content = json.dumps({"id": str(number), "conversations": turns}).encode()
            info = tarfile.TarInfo(f"{number:03}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _spec(folder: Path) -> JobSpec:
    return parse_spec(
        {
            "name": "job",
            "data": {"train": f"{folder}/data/*.tar"},
            "student": {"init": {"kind": "checkpoint", "path": "org/student"}},
            "training": {"workers": RANKS, "global_batch_size": 16, "micro_batch_size": 8},
            "output": str(folder / "runs"),
        }
    )


def _commit_half(run_folder: Path, plan: Plan) -> None:
    """Commit a checkpoint in which half of the epochs are done, and some shards of the next epoch are half read.

    In the first epoch one sample of every twentieth shard is missing from the ledger; it is in quarantine.
    """
    ledger, half = plan.empty_ledger(), plan.epochs // 2
    lacking = np.arange(0, len(plan.shards), 20)
    for epoch in range(half):
        whole = np.ones(len(plan.shards), dtype=bool)
        whole[lacking] = epoch > 0
        ledger._completed(epoch)[:] = whole
    for shard in lacking.tolist():
        ledger.add(_ids(0, shard, int(plan.sizes[shard]) - 1))
    quarantined = [Quarantined(0, shard, int(plan.sizes[shard]) - 1, "key", "bad") for shard in lacking.tolist()]
    for shard in plan.order(half)[-300:].tolist():
        ledger.include(_ids(half, shard, int(plan.sizes[shard]) // 2))
    local = run_folder.parent / "local"
    local.mkdir()
    (local / LEDGER).write_text(ledger.to_json())
    (local / QUARANTINE).write_text("".join(json.dumps(asdict(bad)) + "\n" for bad in quarantined))
    store, name = CheckpointStore(str(run_folder), LOCAL), "step-00000001-abcdef01"
    store.commit(Manifest(name, 1, RANKS, store.upload(local, name)))


def _ids(epoch: int, shard: int, samples: int) -> SampleIds:
    index = np.arange(samples, dtype=np.int32)
    return SampleIds(np.full_like(index, epoch), np.full_like(index, shard), index)


# ------------------------------------------------------------------------------------------------- memory


def _memory(process: int) -> int:
    """Return the peak resident memory of a process in bytes; 0 if the system does not give it."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else 0


def _processes(name: str) -> Iterator[int]:
    """Yield the ids of processes whose command line has `name` (Ray's processes of that actor class), and then 0."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if name in path.read_text():
                yield int(path.parent.name)
        except OSError:
            continue
    yield 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=10)
    print(json.dumps(asdict(run(**vars(parser.parse_args()))), indent=2))
