"""The files of a run: whatever one of them is made into, each of its readers gets a value, or an error with a remedy.

The seed of a mutation is its file, its kind and its number, so a failure names what to repeat.
"""

import base64
import copy
import json
import random
import re
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from betakd_ray.data.ledger import MAX_PLACES, Ledger
from betakd_ray.data.plan import Pass, Plan, Quarantined
from betakd_ray.data.shards import Shard
from betakd_ray.errors import DataError, OutputError, OutputUnreachable, UserError
from betakd_ray.job import BetaKDJob
from betakd_ray.on_ray.source import _done
from betakd_ray.run.audit import audit
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.claim import was_here
from betakd_ray.run.files import stored_spec
from betakd_ray.run.folder import (
    CHECKPOINTS,
    CHECKS,
    DAMAGED,
    LEDGER,
    LOGGED,
    MANIFEST,
    METRICS,
    METRICS_PARTS,
    PLAN,
    PROGRESS,
    QUARANTINE,
    RESULT,
    SKIPPED,
    SPEC,
    TAIL,
    UNIVERSAL,
)
from betakd_ray.run.lease import Permit
from betakd_ray.run.manifest import Manifest
from betakd_ray.run.metrics import RESUMED, read_metrics, to_jsonl
from betakd_ray.run.plan import write_plan
from betakd_ray.run.records import LOGGED_FILE, PROGRESS_FILE, SKIPPED_FILE, CheckRecord, Checks
from betakd_ray.spec import JobSpec
from betakd_ray.train.check_files import read_checks
from tests.mutations import BYTES
from tests.unit.test_audit import A_PLAN, CONSUMED, LOCAL, NAME, Run, ledger_of

COMMITTED = f"{CHECKPOINTS}/{NAME}"
PART = f"{METRICS_PARTS}/00000002-0a0b0c0d.jsonl"
FILES = (
    SPEC,
    PLAN,
    CHECKS,
    RESULT,
    QUARANTINE,
    TAIL,
    METRICS,
    PART,
    *(f"{COMMITTED}/{name}" for name in (MANIFEST, LEDGER, QUARANTINE, PROGRESS, SKIPPED, LOGGED)),
    f"{COMMITTED}/{UNIVERSAL}/{MANIFEST}",
)
MEMORY_BYTES, SECONDS = 200 << 20, 5
"""Limits of the additional memory of a test, and of the CPU time of one read of all files."""


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY_BYTES


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a finished run that has every file."""
    run = Path(Run(ledger=ledger_of(CONSUMED)).write(tmp_path))
    (tmp_path / "asked.json").write_bytes((run / SPEC).read_bytes())
    records = [{"step": step, "loss": 1.0, "queue_depth": 0} for step in (1, 2, 3)]
    found = [
        CheckRecord("sight", "blind", "sight", "doubt", "no tower", "Fetch it."),
        CheckRecord("weights", "9", "9", "ok"),
    ]
    (run / CHECKS).write_text(json.dumps(asdict(Checks(3, "node-a (cpu)", {"teacher": "0a", "plan": "0b"}, found))))
    (run / METRICS_PARTS).mkdir()
    (run / METRICS_PARTS / "00000001-0a0b0c0d.jsonl").write_text(to_jsonl([{RESUMED: 0}, records[0]]))
    (run / PART).write_text(to_jsonl(records[1:]))
    committed, manifest = run / COMMITTED, json.loads((run / COMMITTED / MANIFEST).read_text())
    (committed / LOGGED).write_text(json.dumps({"step": 3, "records": 3}))
    sample = {"epoch": 0, "shard": "/data/a.tar", "index": 1, "key": "01"}
    (committed / SKIPPED).write_text(to_jsonl([{"step": 2, "samples": [sample, sample]}]))
    (committed / UNIVERSAL).mkdir()
    # As in versions that stored no digests: with them, every change below would be found before the content is read.
    for file in (committed / MANIFEST, committed / UNIVERSAL / MANIFEST):
        file.write_text(json.dumps({**manifest, "files": {}, "sha256": ""}))
    return run


def readers(run: Path) -> dict[str, Callable[[], Any]]:
    """Return what a job and the commands read of a run, by name."""
    store = CheckpointStore(str(run), LOCAL)

    def newest() -> Manifest:
        found = store.latest()
        assert found
        return found

    spec = JobSpec.model_validate_json((run.parent / "asked.json").read_bytes())
    return {
        "audit": lambda: audit(str(run), LOCAL).table(by_shard=True),
        "spec": lambda: stored_spec(str(run), LOCAL),
        "claim": lambda: was_here(str(run), spec),
        "plan": lambda: write_plan(str(run), LOCAL, A_PLAN),
        "checks": lambda: read_checks(Permit(str(run), LOCAL)),
        "result": lambda: BetaKDJob(spec)._finished(),
        "metrics": lambda: read_metrics(str(run)),
        "rows": lambda: _done(store, A_PLAN),
        "resume": lambda: [
            store.parsed(newest(), PROGRESS_FILE),
            store.parsed(newest(), SKIPPED_FILE),
            store.parsed(newest(), LOGGED_FILE),
        ],
        "universal": lambda: store.universal(newest()),
    }


def read_all(run: Path) -> dict[str, UserError]:
    """Read everything; return the errors, by reader. Any error of another class fails the test."""
    errors = {}
    begun = time.process_time()
    for name, reader in readers(run).items():
        try:
            reader()
        except UserError as error:
            errors[name] = error
        (run / COMMITTED / DAMAGED).unlink(missing_ok=True)  # a resume rejects a damaged checkpoint for good
    assert time.process_time() - begun < SECONDS
    return errors


def test_a_whole_run_is_read(run: Path) -> None:
    assert read_all(run) == {}


# ---- mutations ---------------------------------------------------------------------------------------------------

RAW = [
    "[" * 50_000,
    '{"a":' * 50_000,
    "9" * 5000,
    "-" + "9" * 400,
    "NaN",
    "-Infinity",
    "1e999",
    '"\\ud800"',
    '"\\u0000"',
    "[[[[]]]]",
    "{}",
    "[]",
    "null",
    "true",
    "-1",
    "3.0",
    '"1"',
    '""',
    str(2**31),
    str(2**63),
    str(10**9),
]


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value in the tree."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from nodes(value)


def in_a_tree(content: bytes, rng: random.Random, change: Callable[[Any, random.Random], None]) -> bytes:
    """Return the content with a change to its JSON, or to one of its lines."""
    lines = [content] if content.startswith(b"{\n") or content.count(b"\n") < 2 else content.splitlines()
    at = rng.randrange(len(lines))
    tree = json.loads(lines[at])
    change(tree, rng)
    text = json.dumps(tree)
    for number, raw in enumerate(RAW):
        text = text.replace(f'"raw {number}"', raw)
    return b"\n".join([*lines[:at], text.encode(), *lines[at + 1 :]]) + b"\n"


def value(content: bytes, rng: random.Random) -> bytes:
    def change(tree: Any, rng: random.Random) -> None:
        node, key = rng.choice(list(nodes(tree)))
        other, elsewhere = rng.choice(list(nodes(tree)))
        node[key] = rng.choice([f"raw {rng.randrange(len(RAW))}"] * 4 + [copy.deepcopy(other[elsewhere])])

    return in_a_tree(content, rng, change)


def keys(content: bytes, rng: random.Random) -> bytes:
    def change(tree: Any, rng: random.Random) -> None:
        sections = [tree, *(node[key] for node, key in nodes(tree) if isinstance(node[key], dict) and node[key])]
        section = rng.choice(sections)
        key = rng.choice(list(section))
        what = rng.choice(["drop", "add", "rename"])
        value = section[key] if what == "add" else section.pop(key)
        if what != "drop":
            section[rng.choice([f"{key}s", "x", "step", RESUMED, "", "k" * 100_000, "1", "-1", "é"])] = value

    return in_a_tree(content, rng, change)


def lists(content: bytes, rng: random.Random) -> bytes:
    """Return the content with something put into a list, or taken out of it; a file of lines is one."""

    def change(tree: Any, rng: random.Random) -> None:
        found = [node[key] for node, key in nodes(tree) if isinstance(node[key], list)]
        if found:
            rng.choice(found).insert(0, f"raw {rng.randrange(len(RAW))}")

    lines = content.splitlines()
    if rng.random() < 0.5:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice([b"", b"[]", b"null", b"\xff", lines[0], b"[" * 50_000]))
        return b"\n".join(lines) + b"\n"
    return in_a_tree(content, rng, change)


def arrays(content: bytes, rng: random.Random) -> bytes:
    """Return the content with other bytes in an array that is compressed, and a checksum that fits them."""

    def change(tree: Any, rng: random.Random) -> None:
        found = [(node, key) for node, key in nodes(tree) if isinstance(node[key], str) and node[key].startswith("eA")]
        if found:
            node, key = rng.choice(found)
            node[key] = packed(rng.choice(BYTES)(zlib.decompress(base64.b64decode(node[key])), rng))

    return in_a_tree(content, rng, change)


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode()


MUTATIONS = {change.__name__: change for change in [*BYTES, value, keys, lists, arrays]}
EACH = {**dict.fromkeys(MUTATIONS, 8), "value": 40, "keys": 20, "lists": 12, "arrays": 20}


@pytest.mark.parametrize("file", FILES)
def test_a_mutated_file_is_read_or_refused_with_a_remedy(run: Path, file: str) -> None:
    path = run / file
    content = path.read_bytes()
    if file != METRICS and METRICS_PARTS in file:
        (run / METRICS).unlink()  # otherwise its parts are not read
    refusals = 0
    for kind, change in MUTATIONS.items():
        for number in range(EACH[kind] if content and (kind != "arrays" or LEDGER in file) else 0):
            path.write_bytes(change(content, random.Random(f"{file} {kind} {number}")))
            errors = read_all(run)
            refusals += bool(errors)
            assert not any(isinstance(error, DataError | OutputUnreachable) for error in errors.values())
            for error in errors.values():
                said = str(error)
                assert len(said) < 2000, (kind, number)
                assert path.name in said or "holds another job" in said or PLAN in said, (kind, number, said)
    assert refusals > 30 or UNIVERSAL in file  # a damaged universal form is made again
    path.write_bytes(content)
    assert read_all(run) == {}


# ---- what each of them is ----------------------------------------------------------------------------------------


def refused(run: Path, reader: str, file: str, match: str) -> None:
    """Check that this reader refuses the file with an error that names it, and that no reader raises another class."""
    error = read_all(run)[reader]
    assert isinstance(error, OutputError)
    assert not isinstance(error, OutputUnreachable)
    assert file in str(error)
    with pytest.raises(OutputError, match=match):
        raise error


DEEP = b"[" * 100_000
REMEDIES = {
    SPEC: ("claim", "Restore it, or start a new run under another `name`"),
    PLAN: ("plan", "Restore it, or start a new run under another `name`"),
    CHECKS: ("checks", "Remove checks.json and run the job again"),
    RESULT: ("result", "Remove result.json and run the job again"),
    QUARANTINE: ("audit", "Remove result.json and run the job again"),
    TAIL: ("audit", "Remove result.json and run the job again"),
    METRICS: ("metrics", "If the run has parts in metrics/, remove this file"),
    # It is the only one: with another before it, the job would go on from that.
    f"{COMMITTED}/{MANIFEST}": ("rows", "every checkpoint is damaged.*Restore one of these folders"),
    f"{COMMITTED}/{LEDGER}": ("rows", "every checkpoint is damaged.*Restore one of these folders"),
    f"{COMMITTED}/{QUARANTINE}": ("rows", "every checkpoint is damaged.*Restore one of these folders"),
    f"{COMMITTED}/{PROGRESS}": ("resume", f"{NAME} is damaged: "),
    f"{COMMITTED}/{SKIPPED}": ("resume", f"{NAME} is damaged: "),
    f"{COMMITTED}/{LOGGED}": ("resume", f"{NAME} is damaged: "),
}


@pytest.mark.parametrize("content", [b"{", DEEP, b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"null", b'"text"', b"7"])
@pytest.mark.parametrize("file", REMEDIES)
def test_a_damaged_file_is_named_with_what_to_do(run: Path, file: str, content: bytes) -> None:
    (run / file).write_bytes(content)
    refused(run, REMEDIES[file][0], Path(file).name, REMEDIES[file][1])


@pytest.mark.parametrize("file", [file for file in REMEDIES if file != METRICS])
def test_an_enormous_file_is_refused_without_being_read(run: Path, file: str) -> None:
    with (run / file).open("ab") as opened:
        opened.truncate(20 << 30)
    refused(run, REMEDIES[file][0], Path(file).name, "bytes")


def test_an_enormous_line_of_metrics_is_refused(run: Path) -> None:
    with (run / METRICS).open("ab") as opened:
        opened.truncate(20 << 30)
    refused(run, "metrics", METRICS, "a line of more than 1048576 bytes")


def test_a_damaged_part_of_the_metrics_is_named_with_its_line(run: Path) -> None:
    (run / METRICS).unlink()
    (run / PART).write_text('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    refused(run, "metrics", PART, "line 2: .*EOF.*Remove this line, or the file")
    (run / PART).write_text('{"step": 2, "loss": 1.0}\n')
    assert [record["step"] for record in read_metrics(str(run))] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        '{"loss": 1.0}',
        '{"step": -1}',
        '{"step": 2.5}',
        '{"step": true}',
        '{"step": 4, "loss": "x"}',
        '{"step": 4, "loss": [1]}',
        '{"resumed_after": 1, "step": 2}',
        '{"resumed_after": 1}',
        "[4]",
    ],
)
def test_a_record_without_a_step_or_with_another_value_than_numbers_is_refused(run: Path, line: str) -> None:
    (run / METRICS).write_text(f'{{"step": 1, "loss": 1.0}}\n{line}\n')
    refused(run, "metrics", METRICS, "line 2: ")


def test_a_loss_that_is_not_finite_is_read(run: Path) -> None:
    (run / METRICS).write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 3, "loss": -0.0}\n')
    result = json.loads((run / RESULT).read_text())
    (run / RESULT).write_text(json.dumps({**result, "metrics": {"loss": float("nan")}}))
    assert read_all(run) == {}
    assert len(read_metrics(str(run))) == 3


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epochs": 10**9}, f"1000000000 epochs.*{MAX_PLACES} in all"),
        ({"epochs": 10**6}, "epochs: 1000000, but training.epochs is 2 in the spec"),
        ({"epochs": 0}, "no shard, or no epoch"),
        ({"epochs": 2.0}, "epochs: .*integer"),
        ({"epochs": True}, "epochs: .*integer"),
        ({"shards": []}, "no shard, or no epoch"),
        ({"shards": [7]}, r"shards\.0: "),
        ({"shards": [{"url": 1, "samples": 1, "bytes": 1, "checksum": "0"}]}, r"shards\.0\.url: .*string"),
        ({"shards": [{"url": "a", "samples": 2**31, "bytes": 1, "checksum": "0"}]}, "a: 2147483648 samples"),
        ({"shards": [{"url": "a", "samples": 0, "bytes": 1, "checksum": "0"}]}, "a: 0 samples"),
        ({"parts": [[0, 5]]}, "parts: 5 samples of shard 0"),
        ({"parts": [[0, 2], [0, 2]]}, "parts: 2 samples of shard 0"),
        ({"parts": [[2, 1]]}, "parts: 1 samples of shard 2"),
        ({"parts": [[0]]}, r"parts\.0\.1: .*required"),
        ({"seed": "0"}, "seed: .*integer"),
        ({"more": 1}, "more: "),
    ],
)
def test_a_plan_of_impossible_numbers_is_refused_before_arrays_are_made(run: Path, changes: Any, match: str) -> None:
    edited(run / PLAN, **changes)
    refused(run, "audit", PLAN, match)


def test_more_epochs_than_can_be_counted_are_refused_when_they_are_planned() -> None:
    passes = [Pass(Shard("/a.tar", 5, 10240, "0"), 5)]
    assert Plan.of(passes, 10**8, seed=0, shuffle=False).epochs == 10**8
    with pytest.raises(DataError, match=r"data\.train: 1 passes .* 1000000000 epochs.*Correct .* training\.epochs"):
        Plan.of(passes, 10**9, seed=0, shuffle=False)


def array(*numbers: int, kind: str) -> str:
    return packed(np.array(numbers, kind).tobytes())


BITS = {"partial": array(0, 0, kind="<i4"), "done": array(0b10100000, kind="u1"), "complete": {}}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sizes": array(5, 4, kind="<i8")}, "not those of the plan"),
        ({"sizes": array(5, -3, kind="<i8")}, "sizes: "),
        ({"sizes": packed(bytes(15))}, "buffer size"),
        ({"sizes": packed(bytes(8 * 5_000_001))}, "more than 40000000 bytes"),
        ({"sizes": "eA"}, "padding"),
        ({"sizes": "é"}, "ASCII"),
        ({"sizes": base64.b64encode(zlib.compress(bytes(16))[:-3]).decode()}, "are cut"),
        ({"sizes": base64.b64encode(zlib.compress(bytes(16)) + b"x").decode()}, "are cut"),
        ({"sizes": 7}, "sizes: .*string"),
        ({"complete": {"0": packed(bytes(2))}}, "more than 1 bytes"),
        ({"complete": {"0": packed(b"")}}, "complete: 0 bytes for 2 shards"),
        ({"complete": {"2": array(0b10000000, kind="u1")}}, "epochs after the last of 2"),
        ({"complete": {"-1": array(0, kind="u1")}}, "'-1' is not an epoch"),
        ({"complete": {"00": array(0, kind="u1")}}, "'00' is not an epoch"),
        ({"complete": {"9" * 5000: array(0, kind="u1")}}, "is not an epoch"),
        ({"complete": {"0": array(0b10000000, kind="u1")}, **BITS, "complete ": 1}, "complete : "),
        ({**BITS, "complete": {"0": array(0b10000000, kind="u1")}}, "a shard that is finished in epoch 0"),
        ({**BITS, "partial": array(0, 2, kind="<i4")}, "a place outside of 2 shards"),
        ({**BITS, "partial": array(-1, 0, kind="<i4")}, "a place outside of 2 shards"),
        ({**BITS, "partial": array(7, 0, kind="<i4")}, "epochs after the last of 2"),
        ({**BITS, "partial": array(0, kind="<i4")}, "an epoch has no shard"),
        ({**BITS, "partial": array(0, 0, 0, 0, kind="<i4"), "done": array(128, 64, kind="u1")}, "stand twice"),
        ({**BITS, "partial": array(1, 0, 0, 0, kind="<i4"), "done": array(128, 64, kind="u1")}, "not in order"),
        ({**BITS, "done": array(0b10100100, kind="u1")}, "a sample after the last of its shard"),
        ({**BITS, "done": array(0, kind="u1")}, "with no sample done"),
        ({**BITS, "done": array(0b11111000, kind="u1")}, "or with all"),
        ({**BITS, "done": array(1, 1, kind="u1")}, "more than 1 bytes"),
        ({**BITS, "done": packed(b"")}, "done: 0 bytes, not 1"),
    ],
)
def test_a_ledger_that_contradicts_itself_or_the_plan_is_refused(run: Path, changes: Any, match: str) -> None:
    path = run / COMMITTED / LEDGER
    edited(path, **BITS)
    assert "rows" not in read_all(run)
    edited(path, **changes)
    refused(run, "rows", LEDGER, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epoch": 2}, "line 1: sample 0 of shard 0 is not in the plan"),
        ({"shard": 2}, "line 1: sample 0 of shard 2 is not in the plan"),
        ({"index": -1}, "line 1: sample -1 of shard 0 is not in the plan"),
        ({"index": 2**31}, "no number of 32 bits"),
        ({"epoch": 10**30}, "no number of 32 bits"),
        ({"shard": "0"}, "line 1: shard: .*integer"),
        ({"shard": 0.0}, "line 1: shard: .*integer"),
        ({"reason": ["x"]}, "line 1: reason: .*string"),
        ({"more": 1}, "line 1: more: "),
    ],
)
def test_a_quarantine_of_other_samples_or_types_is_refused(run: Path, change: Any, match: str) -> None:
    record = asdict(Quarantined(0, 0, 0, "key", "reason")) | change
    (run / COMMITTED / QUARANTINE).write_text(json.dumps(record) + "\n")
    refused(run, "rows", QUARANTINE, match)


def test_a_reason_is_short_whatever_it_quotes() -> None:
    assert len(Quarantined(0, 0, 0, "key", "x" * 10_000_000).reason) == 1000


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"step": -1}, "negative"),
        ({"step": 3.0}, "step: .*integer"),
        ({"world_size": 0}, "negative"),
        ({"files": {"a": -1}}, "negative"),
        ({"files": {"a": "1"}}, "files.a: .*object"),
        ({"files": {"a": [1]}}, "files.a: .*object"),
        ({"files": {"a": {"size": "1"}}}, "files.a.size: .*integer"),
        ({"name": "x" * 100_000}, r"the manifest of x+\.\.\."),
        ({"more": 1}, "more: "),
    ],
)
def test_a_manifest_of_impossible_numbers_or_types_is_refused(
    run: Path, changes: Any, match: str, caplog: pytest.LogCaptureFixture
) -> None:
    edited(run / COMMITTED / UNIVERSAL / MANIFEST, **changes)
    assert "universal" not in read_all(run)
    assert re.search(f"the universal form is made again: .*{match}", caplog.text)
    edited(run / COMMITTED / MANIFEST, **changes)
    refused(run, "universal", MANIFEST, match)


def test_a_universal_form_of_another_checkpoint_is_made_again(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    edited(run / COMMITTED / UNIVERSAL / MANIFEST, world_size=2)
    assert read_all(run) == {}
    assert "belongs to another checkpoint" in caplog.text


def test_a_file_that_a_checkpoint_lost_is_said_to_be_missing(run: Path) -> None:
    (run / COMMITTED / PROGRESS).unlink()
    error = read_all(run)["resume"]
    assert isinstance(error, OutputUnreachable)  # its checkpoint may have been pruned: a reader looks again
    assert f"{NAME}/{PROGRESS}: no such file" in str(error)


def test_a_large_plan_and_its_ledger_are_read_in_seconds(tmp_path: Path) -> None:
    shards = tuple(
        Shard(f"s3://bucket/data/train-{number:06}.tar", 10_000, 1 << 30, "0a1b2c3d") for number in range(50_000)
    )
    plan = Plan(shards, 10, seed=0, shuffle=True)
    write_plan(str(tmp_path), LOCAL, plan)
    ledger = plan.empty_ledger()
    ledger._completed(0)[::2] = True
    for shard in range(1, 2000, 2):
        ledger._partial[0, shard] = np.packbits(np.arange(10_000) < 5000)
    text = ledger.to_json()
    begun = time.process_time()
    write_plan(str(tmp_path), LOCAL, plan)
    again = Ledger.from_json(text)
    again.require_of(plan.sizes, 10)
    assert time.process_time() - begun < SECONDS
    assert again.to_json() == text
