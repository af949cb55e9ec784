"""The soak's schedule, its measures and its means, without a cluster."""

import io
import itertools
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from betakd_ray.data.pack import pack
from betakd_ray.data.plan import Pass, Plan
from betakd_ray.data.reader import KeptRows, Reader
from betakd_ray.data.render import Renderer
from betakd_ray.errors import DataError
from betakd_ray.on_ray.stream import BLOCK_BYTES, BLOCK_ROWS
from tests.chaos.jobs import altered
from tests.chaos.long_job import REPLACED, LongJob
from tests.chaos.means import Clock, WatchedS3
from tests.chaos.soak import SAMPLES, SAMPLES_A_SHARD, Soak, parsed
from tests.chaos.tally import (
    DAY_S,
    KINDS,
    PARTS,
    WORK_S,
    Attempt,
    Fault,
    Recovery,
    Round,
    first_difference,
    real_time,
    recovery,
    schedule,
    step_seconds,
    tally,
)
from tests.tiny import numbered_samples, tiny_processor

REPOSITORY = Path(__file__).parents[2]
DECK = sum(KINDS.values())

# ------------------------------------------------------------------------------------------------ schedule


def test_a_seed_gives_one_schedule_which_can_be_taken_up_anywhere() -> None:
    planned = list(itertools.islice(schedule(7), 3 * DECK))
    assert planned == list(itertools.islice(schedule(7), 3 * DECK))
    assert planned[40:] == list(itertools.islice(schedule(7, first=40), 3 * DECK - 40))
    assert [each.kind for each in planned] != [each.kind for each in itertools.islice(schedule(8), 3 * DECK)]
    assert len({each.seed for each in planned}) == len(planned)


def test_every_deck_has_every_kind_as_often_as_its_weight_says() -> None:
    planned = list(itertools.islice(schedule(0), 2 * DECK))
    for deck in (planned[:DECK], planned[DECK:]):
        assert Counter(each.kind for each in deck) == KINDS
    assert [each.kind for each in planned[:DECK]] != [each.kind for each in planned[DECK:]]
    assert all(WORK_S[0] <= each.work_s <= WORK_S[1] for each in planned)


def test_every_kind_is_an_event_of_the_job() -> None:
    assert [kind for kind in KINDS if not callable(getattr(LongJob, kind, None))] == []
    assert set(REPLACED) <= set(KINDS)


# ----------------------------------------------------------------------------------------------- recovery


def steps(first: int, last: int, begin: float, every: float = 0.1) -> list[tuple[int, float]]:
    return [(step, begin + every * (step - first)) for step in range(first, last + 1)]


def fault(
    kind: str = "kill_worker", began: float = 110.05, back: float | None = 113.05, ended: float = 110.05
) -> Fault:
    return Fault(0, kind, began, ended, back, kills=True)


def test_a_restart_has_parts_that_add_up_to_the_time_until_the_next_new_step() -> None:
    before = Attempt(90.0, 0, steps(1, 100, 100.0))  # the last at 109.9
    after = Attempt(115.0, 80, steps(81, 140, 118.0))
    found = recovery(fault(), [before, after], step_s=0.1, unseen=80)
    assert found.total == pytest.approx(10.05)  # step 102, at 120.1: 100 is stored, and 101 is estimated
    assert (found.back, found.loaded, found.first) == pytest.approx((3.0, 1.95, 3.0))
    assert found.redone == 21
    assert found.total == pytest.approx(sum(getattr(found, part) for part in PARTS))


def test_steps_whose_records_were_lost_are_no_new_steps() -> None:
    before = Attempt(90.0, 0, steps(1, 60, 100.0))  # stored up to 105.9, and killed at 110
    after = Attempt(115.0, 60, steps(61, 140, 118.0))
    assert recovery(fault(), [before, after], 0.1, unseen=80).redone == 41
    assert recovery(fault(), [before, after], 0.1, unseen=30).redone == 30


def test_a_pause_before_the_fault_is_no_lost_step_if_the_workers_live_on() -> None:
    only = Attempt(90.0, 0, steps(1, 60, 100.0) + steps(61, 120, 117.0))
    assert recovery(fault("kill_teacher"), [only], 0.1, unseen=80).total == pytest.approx(6.95)


def test_workers_that_live_on_have_no_part_for_loading() -> None:
    only = Attempt(90.0, 0, steps(1, 105, 100.0) + steps(106, 120, 117.0))  # five steps were prepared already
    found = recovery(fault("kill_teacher"), [only], 0.1, unseen=80)
    assert (found.total, found.back, found.first) == pytest.approx((6.95, 3.0, 3.95))
    assert (found.loaded, found.again, found.redone) == (None, None, 0)


def test_a_fault_that_ends_no_process_is_measured_to_the_first_step_after_its_end() -> None:
    only = Attempt(90.0, 0, steps(1, 200, 100.0))
    found = recovery(fault("jump_clock", back=None, ended=110.07), [only], 0.1, unseen=80)
    assert found.total == pytest.approx(0.05)
    assert found.back is None


def test_a_fault_without_a_new_step_is_not_measured() -> None:
    with pytest.raises(ValueError, match="expected one beyond step 101"):
        recovery(fault(), [Attempt(90.0, 0, steps(1, 100, 100.0)), Attempt(115.0, 80, steps(81, 101, 118.0))], 0.1, 80)


def test_a_clock_that_jumps_by_days_still_tells_the_time() -> None:
    now = 1_790_000_000.0
    for days in (-3, -1, 0, 2):
        for ago in (0.0, 40_000.0):
            assert real_time(now - ago + days * DAY_S, now) == pytest.approx(now - ago, abs=1e-3)


# -------------------------------------------------------------------------------------------------- tally


def test_the_share_of_training_counts_each_step_once_at_its_time_without_faults() -> None:
    figures = tally([], [Round(100.0, 300), Round(300.0, 500)], step_s=0.1)
    assert figures["ettr"] == pytest.approx(800 * 0.1 / 400)
    assert (figures["steps"], figures["hours"]) == (800, pytest.approx(400 / 3600))
    assert tally([], [], 0.1)["ettr"] == 0.0


def test_the_tally_has_medians_by_kind_and_over_all_kills() -> None:
    kills = [Recovery("kill_worker", True, float(total), back=1.0, loaded=2.0, redone=3) for total in range(10, 21)]
    rest = [Recovery("jump_clock", False, 0.1), Recovery("kill_pool", True, 100.0)]
    figures = tally([*kills, *rest], [Round(100.0, 300)], 0.1)
    assert figures["kinds"]["kill_worker"] == {
        "count": 11, "median_s": 15.0, "p90_s": 19.0, "parts_s": {"back": 1.0, "loaded": 2.0}, "redone_steps": 33,
    }  # fmt: skip
    assert figures["kills"]["count"] == 12
    assert figures["kills"]["median_s"] == 15.5
    assert (figures["faults"], figures["redone_steps"]) == (13, 33)


def test_the_time_of_a_step_is_that_between_neighbours() -> None:
    shown = [{"step": step, "time": time} for step, time in [(1, 0.0), (2, 0.1), (3, 0.2), (7, 50.0), (8, 50.3)]]
    assert step_seconds(shown) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({2: 0.5 * (1 + 9e-6)}, None),
        ({2: 0.5 * (1 + 2e-5)}, "step 2: its loss is 0.50001"),
        ({2: float("nan")}, "step 2: its loss is nan"),
        ({2: None}, "step 2 was not logged: after step 1 comes step 3"),
        ({1: None}, "step 1 was not logged"),
        ({4: 0.1}, "step 4: the undisturbed run has no such step"),
    ],
)
def test_the_first_step_that_differs_is_named(change: dict[int, float | None], said: str | None) -> None:
    undisturbed = {1: 1.0, 2: 0.5, 3: 0.25}
    losses = {step: loss for step, loss in {**undisturbed, **change}.items() if loss is not None}
    found = first_difference(losses, undisturbed)
    assert found is None if said is None else found is not None and found.startswith(said)


# -------------------------------------------------------------------------------------------------- means


def test_a_clock_jumps_in_a_process_that_runs(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    code = "import time\nwhile True:\n input(); print(time.time(), time.time_ns() / 1e9, flush=True)"
    environment = {**os.environ, **clock.environment}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def shown() -> list[float]:
            cast(Any, process.stdin).write("\n")
            cast(Any, process.stdin).flush()
            return [float(each) for each in cast(Any, process.stdout).readline().split()]

        first = shown()
        clock.jump(2)
        clock.jump(-1)
        later = shown()
        process.kill()
    assert [after - before for before, after in zip(first, later, strict=True)] == pytest.approx([DAY_S] * 2, abs=60)


def test_a_class_that_knows_the_clock_can_be_sent_to_another_process(tmp_path: Path) -> None:
    """Send it by value, as Ray sends an actor's class."""
    code = "import time\nfrom ray import cloudpickle\nclass Actor:\n now = time.time\ncloudpickle.dumps(Actor)"
    environment = {**os.environ, **Clock(tmp_path / "clock").environment}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_clock_keeps_what_it_shows_for_the_next_soak(tmp_path: Path) -> None:
    Clock(tmp_path / "clock").jump(3)
    before = (tmp_path / "clock").read_bytes()
    Clock(tmp_path / "clock")
    assert (tmp_path / "clock").read_bytes() == before


FILLED = """
import errno, shutil, sys, time
from pathlib import Path
from tests.chaos.small_disk import SmallDisk, on_small_disk
folder = Path(sys.argv[1])
if not on_small_disk(folder):
    sys.exit("no mounts here")
(folder / "freed").write_bytes(bytes(4 << 20))
def is_full():
    try:
        (folder / "file").write_bytes(bytes(1 << 16))
    except OSError as error:
        return error.errno == errno.ENOSPC
    (folder / "file").unlink()
    return False
with SmallDisk(folder).full():
    assert is_full()
    (folder / "freed").unlink()
    end = time.monotonic() + 30
    while not is_full():
        assert time.monotonic() < end
assert not is_full()
print(shutil.disk_usage(folder).total)
"""


def test_a_full_disk_is_full_for_every_process_until_it_has_room_again(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-c", FILLED, str(tmp_path / "disk")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "no mounts here" in ended.stderr:
        pytest.skip("neither root nor a user namespace may mount a file system here")
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) == 64 << 20
    assert list((tmp_path / "disk").iterdir()) == []  # nobody else sees it


def watched() -> WatchedS3:
    proxy = WatchedS3(cast(Any, SimpleNamespace(port=1)), rate=0.0)
    proxy._listener.server_close()
    return proxy


def test_checkpoints_and_metrics_are_seen_on_their_way_to_the_store() -> None:
    proxy = watched()
    for request in (
        "PUT /betakd/runs/soak/checkpoints/step-00000040-ab12/ledger.json",
        "PUT /betakd/runs/soak/checkpoints/step-00000040-ab12/manifest.json",
        "PUT /betakd/runs/soak/checkpoints/step-00000040-ab12/deepspeed_universal/manifest.json",
        "GET /betakd/runs/soak/checkpoints/step-00000040-ab12/manifest.json",
        "PUT /betakd/runs/soak/metrics/00000003-2-0f.jsonl?x-id=PutObject",
        "PUT /betakd/runs/soak/metrics.jsonl",
    ):
        proxy.draw(request)
    assert [(commit.run, commit.step) for commit in proxy.commits] == [("soak", 40)]
    assert [(part.run, part.path) for part in proxy.parts] == [("soak", "betakd/runs/soak/metrics/00000003-2-0f.jsonl")]


@pytest.mark.parametrize(("kind", "stored"), [("error", 0), ("reset", 0), ("cut", 1), ("silence", 1)])
def test_a_checkpoint_counts_only_if_the_server_got_it(kind: str, stored: int) -> None:
    proxy = watched()
    proxy.inject(kind)
    proxy.draw("PUT /betakd/runs/soak/checkpoints/step-00000040-ab12/manifest.json")
    assert len(proxy.commits) == stored


def test_a_swapped_shard_is_a_whole_tar_of_the_same_size_with_other_answers(tmp_path: Path) -> None:
    (shard,) = pack(numbered_samples(12), str(tmp_path))
    whole = Path(shard.url).read_bytes()
    other = altered(whole)
    assert len(other) == len(whole)
    with tarfile.open(fileobj=io.BytesIO(other)) as changed, tarfile.open(fileobj=io.BytesIO(whole)) as unchanged:
        assert changed.getnames() == unchanged.getnames()
    assert b"It is 3" in whole
    assert b"It is 6" in other
    with pytest.raises(ValueError, match="not one of numbered_samples"):
        altered(bytes(1024))


@pytest.mark.parametrize("number", [2, 3])
def test_no_sample_of_a_swapped_shard_is_used_in_the_soak(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the losses would differ, as those of a job with larger groups do."""
    monkeypatch.setattr("betakd_ray.data.shards.BACKOFF.wait_funcs", ())  # no pauses
    monkeypatch.setattr("betakd_ray.data.reader._KEPT", KeptRows())
    options = parsed(["--folder", str(tmp_path / "soak")])
    spec = Soak(options, cast(Any, SimpleNamespace(bucket="betakd", disk=None))).spec("soak")
    shards = pack(numbered_samples(SAMPLES), str(tmp_path), samples_per_shard=SAMPLES_A_SHARD)
    plan = Plan.of(
        [Pass(shard, shard.samples) for shard in shards], spec.training.epochs, spec.training.seed, spec.data.shuffle
    )
    reader = Reader(plan, spec.data, {"student": Renderer(tiny_processor(), spec.data)}, len, lambda error: None)
    first, last = plan.bounds()[number // 2 : number // 2 + 2].tolist()
    assert first <= number < last

    def rows() -> Iterator[int]:
        for block in reader.blocks(0, first, last, plan.empty_ledger(), BLOCK_ROWS, BLOCK_BYTES):
            yield block.num_rows

    assert list(rows()) == [2 * SAMPLES_A_SHARD]
    monkeypatch.setattr("betakd_ray.data.reader._KEPT", KeptRows())
    swapped = Path(shards[number].url)
    swapped.write_bytes(altered(swapped.read_bytes()))
    with pytest.raises(DataError, match=swapped.name):
        next(rows())


# ------------------------------------------------------------------------------------------------ a folder


def test_a_folder_keeps_its_seed_and_its_length(tmp_path: Path) -> None:
    folder = ["--folder", str(tmp_path / "soak")]
    first = parsed([*folder, "--seed", "5", "--hours", "3"])
    assert first.steps == 60_000
    assert replace(parsed([*folder, "--hours", "1"]), hours=3.0) == first
    with pytest.raises(SystemExit):
        parsed([*folder, "--seed", "6"])
    with pytest.raises(SystemExit):
        parsed([*folder, "--steps", "6"])
    assert parsed([*folder, "--only", "kill_pool"]).kinds == {"kill_pool": KINDS["kill_pool"]}
