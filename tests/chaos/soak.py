"""One long job under hundreds of faults: `python -m tests.chaos.soak --hours 2 --folder runs/soak`.

A fault comes after every 5 to 20 s of work; a seed says which. The job is cut into rounds. After each the job is ended,
and an undisturbed job of the same spec goes on to the same step. Then the audit must be clean, and every step must have
the loss that it has without faults. The same command goes on in the same folder, with the faults that come next, until
the job is done. The tally is printed, and written to FOLDER/tally.json.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401 (the environment, before anything imports torch or Ray)

# isort: split
import pytest
from rich.console import Console
from rich.table import Table

from betakd_ray.data.pack import pack
from betakd_ray.run.audit import audit
from betakd_ray.run.metrics import MetricsRecord, read_metrics
from betakd_ray.spec import JobSpec, StorageSpec
from betakd_ray.storage import join, open_store
from tests.chaos.jobs import SHARDS, disturbed_job, save_models
from tests.chaos.long_job import LongJob, Surroundings
from tests.chaos.means import Clock, WatchedS3
from tests.chaos.small_disk import SmallDisk, on_small_disk
from tests.chaos.tally import (
    KINDS,
    PARTS,
    Planned,
    Recovery,
    Round,
    first_difference,
    schedule,
    step_seconds,
    tally,
)
from tests.nodes import nodes
from tests.s3 import REGION, SeaweedServer, served
from tests.tiny import numbered_samples

SAMPLES, SAMPLES_A_SHARD, BATCH = 1200, 120, 6
"""Size of the data. Two shards are one group of the plan and one block of rows: see `LongJob.swap_shard`."""
STEPS_AN_HOUR = 20_000
"""Number of steps that is more than a job makes in an hour of faults."""
ROUND_S = 1200.0
"""Seconds of a round; a wrong loss is found at its end."""
CALM_STEPS = 400
"""Number of steps that the undisturbed job makes before the first fault, to measure the time of a step."""
DISTURBED, CALM = "soak", "undisturbed"
FULL_DISK = "fill_disk"


@dataclass(frozen=True)
class Options:
    """What the soak was asked for."""

    hours: float
    folder: Path
    seed: int
    steps: int
    kinds: dict[str, int]


class Soak:
    """The state of a soak in its folder, which a later call goes on from."""

    def __init__(self, options: Options, around: Surroundings) -> None:
        self.options, self.around = options, around
        self.current: Planned | None = None
        self._recoveries = [Recovery(**line) for line in _lines(options.folder / "faults.jsonl")]
        self._rounds = [Round(**line) for line in _lines(options.folder / "rounds.jsonl")]
        self._step_s = 0.0
        kinds = options.kinds if around.disk else {kind: n for kind, n in options.kinds.items() if kind != FULL_DISK}
        self._faults = schedule(options.seed, kinds, first=len(self._recoveries))

    def run(self) -> bool:
        """Work for the hours that were asked for; return whether the job is done."""
        end, is_done = time.monotonic() + 3600 * self.options.hours, False
        self._go_on_calmly(CALM_STEPS)
        while not is_done and (left := end - time.monotonic()) > 0:
            begun = time.monotonic()
            is_done, step = self._round(min(ROUND_S, left))
            worked = time.monotonic() - begun
            self._go_on_calmly(step)
            end += time.monotonic() - begun - worked  # the hours are hours of faults
            self._judge()
            self.report()
        return is_done

    def report(self) -> dict[str, Any]:
        """Write and print the tally."""
        figures = tally(self._recoveries, self._rounds, self._step_s)
        (self.options.folder / "tally.json").write_text(json.dumps(figures, indent=2))
        _print(figures)
        return figures

    def spec(self, name: str) -> JobSpec:
        """Return the spec of one of the two jobs. One worker, and a teacher that answers one sample at a time.

        The order of samples is then fixed, and no sum depends on which samples happen to be in a group.
        """
        # Without an address of the store, which is another one at each call: it comes from the environment.
        return disturbed_job(
            name,
            self.around.bucket,
            self.options.folder / "models",
            {"region": REGION},
            lr=3e-4,
            batch_tokens=1,
            epochs=-(-self.options.steps * BATCH // SAMPLES),
            workers=1,
            checkpoint_every=40,
            global_batch_size=BATCH,
        )

    def _round(self, seconds: float) -> tuple[bool, int]:
        """Cause faults for so long; return whether the job is done, and its step."""
        with LongJob(self.spec(DISTURBED), self.around, self.options.folder / DISTURBED) as job:
            is_open = job.advance()
            begun, first = time.monotonic(), job.committed
            while is_open and time.monotonic() - begun < seconds:
                self.current = next(self._faults)
                is_open = self._befall(job, self.current)
                self.current = None
            worked, last = time.monotonic() - begun, job.committed
            is_done = job.end()
            # Without the end itself: it is not a fault.
            self._rounds.append(Round(worked, last - first))
            _append(self.options.folder / "rounds.jsonl", asdict(self._rounds[-1]))
            return is_done, job.committed

    def _befall(self, job: LongJob, planned: Planned) -> bool:
        """Let one fault happen, and the work after it; return whether the job is not done yet."""
        fault = job.suffer(planned)
        is_open = job.work(planned.work_s)
        try:
            cost = job.recovery(fault, self._step_s)
        except ValueError:  # all new steps since are in no checkpoint yet, or there are none: the job is done
            if not job.advance():
                return False
            cost = job.recovery(fault, self._step_s)
        self._recoveries.append(cost)
        _append(self.options.folder / "faults.jsonl", asdict(cost))
        print(f"fault {planned.number}: {planned.kind}, {cost.total:.1f} s to the next new step", flush=True)
        return is_open

    def _go_on_calmly(self, step: int) -> None:
        """Let the undisturbed job go on until it has that step, and measure the time of a step."""
        spec = self.spec(CALM)
        records = self._records(spec)
        if not records or records[-1]["step"] < step:
            with LongJob(spec, self.around, self.options.folder / CALM) as job:
                job.reach(step)
                job.end()
            records = self._records(spec)
        self._step_s = step_seconds(records)

    def _judge(self) -> None:
        """Require a clean audit, and for every step the loss that it has without faults."""
        run = self._run_of(self.spec(DISTURBED))
        problems = audit(run, self.around.storage, verify=True).problems
        assert not problems, f"the audit found {problems}"
        losses, undisturbed = (
            {record["step"]: record["loss"] for record in self._records(self.spec(name))} for name in (DISTURBED, CALM)
        )
        difference = first_difference(losses, undisturbed)
        assert difference is None, difference
        print(f"{len(losses)} steps have the losses of the undisturbed job; the audit is clean", flush=True)

    def _records(self, spec: JobSpec) -> list[MetricsRecord]:
        return read_metrics(self._run_of(spec), self.around.storage)

    def _run_of(self, spec: JobSpec) -> str:
        return join(spec.output.path, spec.name)


@contextmanager
def surroundings(options: Options, disk: SmallDisk | None) -> Iterator[Surroundings]:
    """Yield a cluster and a store with the data, as they were when an earlier call ended."""
    folder = options.folder
    clock = Clock(folder / "clock")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        server = stack.enter_context(served(folder / "store"))
        proxy = stack.enter_context(WatchedS3(server, seed=options.seed, rate=0.0))
        storage = StorageSpec(endpoint_url=server.endpoint_url, region=REGION)
        _make_data(folder, server, storage)
        tempfile.tempdir = tempfile.gettempdir()  # Ray's sessions are not to be on the small disk
        environment = {
            "AWS_ENDPOINT_URL": proxy.endpoint_url,
            "BETAKD_CACHE": str(folder / "cache"),
            **clock.environment,
        }
        if disk:
            (disk.folder / "ray").mkdir(exist_ok=True)  # Ray notes its newest cluster there, and does not make it
        for name, value in {**environment, **({"TMPDIR": str(disk.folder)} if disk else {})}.items():
            patch.setenv(name, value)
        cluster = stack.enter_context(nodes({"teacher": 1, "student": 1}))
        yield Surroundings(cluster, proxy, clock, disk, server.bucket, storage)


def _make_data(folder: Path, server: SeaweedServer, storage: StorageSpec) -> None:
    """Make models and shards, or restore a shard that was swapped when an earlier call was killed."""
    if not (folder / "models").exists():
        save_models(folder / "models")
    filesystem, root = open_store(f"s3://{server.bucket}/{SHARDS}", storage)
    copies = folder / SHARDS
    if not copies.exists():
        pack(numbered_samples(SAMPLES, broken=40), f"s3://{root}", samples_per_shard=SAMPLES_A_SHARD, storage=storage)
        filesystem.get(f"{root}/", str(copies), recursive=True)
    for shard in copies.glob("*.tar"):
        filesystem.put_file(str(shard), f"{root}/{shard.name}")


def main() -> int:
    """Run the soak; return the exit code."""
    options = parsed(sys.argv[1:])
    disk = options.folder / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    has_disk = on_small_disk(disk)
    if not has_disk:
        print(f"{FULL_DISK} is left out: neither root nor a user namespace may mount a file system here")
    with surroundings(options, SmallDisk(disk) if has_disk else None) as around:
        soak = Soak(options, around)
        try:
            is_done = soak.run()
        except Exception:
            traceback.print_exc()
            soak.report()
            print(_after_failure(options, soak.current), flush=True)
            _keep_logs(around, options.folder)
            return 1
    print(f"the job is done: {options.folder}" if is_done else f"To go on: {_command(options)}")
    return 0


def _after_failure(options: Options, current: Planned | None) -> str:
    fault = f"fault {current.number} ({current.kind})" if current else "no fault"
    return (
        f"The soak failed. Seed {options.seed}, {fault}. Its folder stays: {options.folder}\n"
        f"To go on, with this fault again: {_command(options)}\n"
        f"To repeat it from the start: remove the folder before"
    )


def _command(options: Options) -> str:
    only = "" if options.kinds == KINDS else f" --only {' '.join(options.kinds)}"
    return (
        f"python -m tests.chaos.soak --hours {options.hours:g} --folder {options.folder} --seed {options.seed} "
        f"--steps {options.steps}{only}"
    )


def _keep_logs(around: Surroundings, folder: Path) -> None:
    """Copy Ray's logs, which go with the cluster."""
    session = Path(around.nodes.folder, "session_latest").resolve()
    shutil.copytree(session / "logs", folder / "ray-logs", dirs_exist_ok=True)


def parsed(arguments: Sequence[str]) -> Options:
    """Return the options of a command line. A folder keeps the seed and the steps that its first call had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="hours of faults, without the undisturbed job")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, help="seed of the faults; default: that of the folder, or 0")
    parser.add_argument("--steps", type=int, help="steps of the whole job; default: those of the folder, or enough")
    parser.add_argument("--only", nargs="+", choices=sorted(KINDS), help="kinds of faults; default: all")
    given = parser.parse_args(arguments)
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "soak.json"
    begun = json.loads(file.read_text()) if file.exists() else {}
    asked = {name: value for name in ("seed", "steps") if (value := getattr(given, name)) is not None}
    if any(begun.get(name, value) != value for name, value in asked.items()):
        parser.error(f"{folder} has a soak with {begun}: give these, or another --folder")
    chosen = {"seed": 0, "steps": int(STEPS_AN_HOUR * max(1.0, given.hours))} | asked | begun
    file.write_text(json.dumps(chosen))
    kinds = {kind: times for kind, times in KINDS.items() if not given.only or kind in given.only}
    return Options(given.hours, folder, chosen["seed"], chosen["steps"], kinds)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def _print(figures: dict[str, Any]) -> None:
    print(
        f"{figures['faults']} faults in {figures['hours']:.2f} hours, {figures['steps']} steps of "
        f"{figures['step_s']:.3f} s, {figures['redone_steps']} of them done again. "
        f"Share of the time that was training (ETTR): {figures['ettr']:.1%}"
    )
    table = Table("kind", "faults", "median s", "p90 s", *(f"{part} s" for part in PARTS), "done again")
    for kind, row in {"all kills": figures["kills"], **figures["kinds"]}.items():
        if row["count"]:
            parts = [f"{row['parts_s'][part]:.1f}" if part in row["parts_s"] else "" for part in PARTS]
            numbers = [f"{row['median_s']:.1f}", f"{row['p90_s']:.1f}", *parts, str(row["redone_steps"])]
            table.add_row(kind, str(row["count"]), *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
