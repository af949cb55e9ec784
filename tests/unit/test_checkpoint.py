"""After any failure of a checkpoint's upload or download, the one before stays current and a message says why."""

import errno
import itertools
import json
import os
import re
import shutil
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem

from betakd_ray import storage
from betakd_ray.data.ledger import Ledger, SampleIds
from betakd_ray.errors import CheckpointDamaged, OutputError
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.folder import CHECKPOINTS, DAMAGED, LEDGER, MANIFEST, UNIVERSAL
from betakd_ray.run.manifest import Manifest, StoredFile
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import ANSWERS
from betakd_ray.train import checkpoint
from betakd_ray.train.checkpoint import merge_ledgers
from tests.checkpoints import save
from tests.ranks import on_ranks
from tests.s3 import served
from tests.s3_proxy import FAULTS, NO_BUCKET, SHORT, FaultyS3, client_without_pauses

CONTENT = {"ledger.json": b"{}", "deepspeed/model.pt": bytes(range(256)) * 40, "deepspeed/optimizer.pt": b"adam" * 5000}


class Died(BaseException):
    """The simulated death of a process."""


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory):
    """Set up this process as the only rank on one node."""
    store = tmp_path_factory.mktemp("group") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Yield the folder of temporary files, which must be empty at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def local(tmp_path):
    return CheckpointStore(str(tmp_path / "run"), StorageSpec())


@pytest.fixture(scope="module")
def s3():
    with served() as server:
        yield server


@pytest.fixture
def proxy(s3, monkeypatch):
    client_without_pauses(monkeypatch)
    monkeypatch.setattr(storage, "TIMEOUT_S", 1.0)
    with FaultyS3(s3, rate=0.0, pause_s=0.05, silence_s=3.0) as faulty:
        yield faulty


@pytest.fixture
def remote(proxy, request):
    """Return a separate run in a bucket for the test."""
    run = re.sub(r"\W", "-", request.node.name)
    return CheckpointStore(f"s3://betakd/{run}", StorageSpec(endpoint_url=proxy.endpoint_url, region="us-east-1"))


@pytest.fixture(params=["local", "remote"])
def store(request, s3):  # the server starts before `temporary` does
    return request.getfixturevalue(request.param)


def write(folder):
    for file, content in CONTENT.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)


def saved(store, step, attempt="a", keep=2):
    save(store, step, attempt, keep, write)
    return f"step-{step:08d}-{attempt}"


def put(store, name, content=CONTENT):
    """Write files of a folder without a commit."""
    for file, each in content.items():
        path = f"{store.root}/{name}/{file}"
        store.filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        store.filesystem.pipe_file(path, each)


def uncommitted(store, name):
    """Write the files of a checkpoint without its commit."""
    put(store, name)
    return Manifest(name, int(name.split("-")[1]), 1, described(CONTENT))


def described(files):
    return {file: StoredFile.holding(content) for file, content in files.items()}


def names(store):
    return [manifest.name for manifest in store.committed()]


def folders(store):
    return sorted({path.split("/")[0] for path in store._stored()})


def is_whole(store, manifest):
    """Return whether the restored files are those saved; the ledger, which only rank 0 reads, is from the store."""
    with checkpoint.on_disk(store, manifest, "test") as folder:
        back = {file: (folder / file).read_bytes() for file in CONTENT if file != "ledger.json"}
    return back | {"ledger.json": store.read_text(manifest, "ledger.json").encode()} == CONTENT


# ------------------------------------------------------------------------------------------ to the store and back


def test_a_checkpoint_is_current_once_saved_and_comes_back_as_it_was(store):
    assert store.latest() is None
    name = saved(store, 7)
    manifest = store.latest()
    assert manifest == Manifest(name, 7, 1, described(CONTENT))
    assert is_whole(store, manifest)


def test_a_root_with_a_pattern_in_its_name_is_taken_literally(tmp_path):
    store = CheckpointStore(str(tmp_path / "run[1]*"), StorageSpec())
    name = saved(store, 1)
    assert names(store) == [name]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_checkpoint_gets_through_every_fault(remote, proxy, kind):
    proxy.rate, proxy.faults = 0.25, (kind,)
    for step in (1, 2, 3):
        name = saved(remote, step, keep=1)
        assert names(remote) == [name]
        assert is_whole(remote, remote.latest())
    assert proxy.faults_injected[kind]
    proxy.rate = 0.0
    assert folders(remote) == [name]


# ------------------------------------------------------------------------------------------- on the way to the store


CHANGES = ("makedirs", "put_file", "pipe_file", "rm_file", "rm")


@contextmanager
def dying(at):
    """Let the process die in the middle of the `at`th change to the local store. Counts the changes."""
    done = SimpleNamespace(changes=0)

    def half(change, real):
        def call(self, path, *arguments, **options):
            done.changes += 1
            if done.changes <= at:
                return real(self, path, *arguments, **options)
            if change == "put_file":
                real(self, path, *arguments, **options)
                os.truncate(arguments[0], os.path.getsize(path) // 2)
            if change == "pipe_file":
                real(self, path, arguments[0][: len(arguments[0]) // 2])
            if change == "rm":
                os.remove(next(os.path.join(folder, files[0]) for folder, _, files in os.walk(path) if files))
            raise Died

        return call

    with pytest.MonkeyPatch.context() as patch:
        for change in CHANGES:
            patch.setattr(LocalFileSystem, change, half(change, getattr(LocalFileSystem, change)))
        yield done


def dies(store, at):
    """Return whether the save of step 2 dies at that change."""
    with dying(at):
        try:
            saved(store, 2, keep=1)
        except Died:
            return True
    return False


def test_a_death_at_any_point_of_a_save_leaves_a_whole_checkpoint_current(tmp_path):
    current = []
    for at in itertools.count():
        store = CheckpointStore(str(tmp_path / f"run-{at}"), StorageSpec())
        saved(store, 1)
        died = dies(store, at)
        current.append(store.latest().step)
        assert all(is_whole(store, manifest) for manifest in store.committed())
        third = saved(store, 3, keep=1)
        assert folders(store) == [third]
        if not died:
            break
    assert current == sorted(current)
    assert current.count(1) > len(CONTENT)
    assert current.count(2) > 2  # while the first was removed


DAMAGE = {
    "cut": (lambda store, path: store.filesystem.pipe_file(path, b"ad"), "2 of 20000 bytes"),
    "gone": (lambda store, path: store.filesystem.rm_file(path), "0 of 20000 bytes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_partial_upload_is_not_committed(store, case):
    damage, found = DAMAGE[case]
    before = saved(store, 1)
    manifest = uncommitted(store, "step-2-b")
    damage(store, f"{store.root}/step-2-b/deepspeed/optimizer.pt")
    with pytest.raises(OutputError, match=rf"step-2-b/deepspeed/optimizer\.pt: {found} were stored"):
        store.commit(manifest)
    assert names(store) == [before]


@pytest.mark.parametrize("file", [*CONTENT, MANIFEST])
def test_a_full_store_leaves_the_checkpoint_before(local, monkeypatch, file):
    before = saved(local, 1)

    def full(real):
        def call(self, source, target, *arguments, **options):
            if file not in source + str(target):
                return real(self, source, target, *arguments, **options)
            raise OSError(errno.ENOSPC, "No space left on device")

        return call

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", full(LocalFileSystem.put_file))
        patch.setattr(LocalFileSystem, "pipe_file", full(LocalFileSystem.pipe_file))
        with pytest.raises(
            OutputError, match=rf"{file}: OSError.*disk is full: free some space in {re.escape(local.root)}"
        ):
            saved(local, 2, "b")
    assert names(local) == [before]
    assert is_whole(local, local.latest())
    after = saved(local, 2, "c")
    assert names(local) == [before, after]


def disk_with(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is full")
def test_a_full_disk_of_the_node_is_named_whatever_torch_calls_it(local, monkeypatch, temporary):
    before = saved(local, 1)
    tensors = {"weight": torch.zeros(100_000)}
    for free, error, message in ((0, OutputError, rf"{temporary}.*the disk is full"), (1 << 30, RuntimeError, "pos")):
        disk_with(monkeypatch, free)
        with pytest.raises(error, match=message):
            save(local, 2, "b", 2, lambda folder: torch.save(tensors, "/dev/full"))
    assert names(local) == [before]


def test_a_bucket_that_vanishes_is_an_error_and_not_an_empty_run(proxy, s3):
    root = s3.filesystem()
    root.mkdir("vanishing")
    store = CheckpointStore("s3://vanishing/run", StorageSpec(endpoint_url=proxy.endpoint_url, region="us-east-1"))
    assert store.latest() is None
    saved(store, 1)
    manifest = uncommitted(store, "step-2-b")
    root.rm("vanishing", recursive=True)
    for call in (store.latest, lambda: store.commit(manifest)):
        with pytest.raises(OutputError, match=r"s3://vanishing/run/checkpoints.*bucket does not exist.*output\.path"):
            call()


def test_a_bucket_that_vanishes_during_a_save_is_an_error(remote, proxy):
    before = saved(remote, 1)
    proxy.inject(NO_BUCKET, only=r"PUT .*optimizer\.pt")  # SeaweedFS would make it anew
    with pytest.raises(OutputError, match=r"optimizer\.pt: FileNotFoundError: injected.*output\.path"):
        saved(remote, 2)
    assert names(remote) == [before]


def test_a_store_that_goes_away_before_the_manifest_leaves_the_checkpoint_before(remote, proxy):
    before = saved(remote, 1)
    manifest = uncommitted(remote, "step-2-b")
    proxy.inject("reset", only=f"PUT .*{MANIFEST}", times=99)
    with pytest.raises(OutputError, match=rf"{MANIFEST}: ConnectionError.*run the job again"):
        remote.commit(manifest)
    proxy.planned.clear()
    assert names(remote) == [before]
    remote.commit(manifest)
    assert names(remote) == [before, "step-2-b"]


def test_a_manifest_whose_acknowledgement_is_lost_is_committed_once(remote, proxy):
    proxy.inject("cut", only=f"PUT .*{MANIFEST}")
    name = saved(remote, 1)
    assert names(remote) == [name]
    assert proxy.faults_injected["cut"] == 1


# ------------------------------------------------------------------------------------- while the training goes on


@pytest.fixture
def gate(monkeypatch):
    """Hold every upload until the gate is open; return the gate."""
    gate, upload = threading.Event(), CheckpointStore.upload

    def late(self, local, name):
        assert gate.wait(timeout=60)
        return upload(self, local, name)

    monkeypatch.setattr(CheckpointStore, "upload", late)
    yield gate
    gate.set()


def test_a_step_waits_for_the_copy_of_its_files_and_not_for_the_store(store, gate, temporary):
    commits, done = [], []
    saver = checkpoint.Saver(store, "a", 2, on_commit=lambda step, seconds: commits.append(seconds))
    saver.save(3, write, before_commit=lambda: done.append(names(store)))
    saver.check()
    assert (names(store), commits, done) == ([], [], [])
    assert len([path for path in temporary.iterdir() if path.is_dir()]) == 1
    gate.set()
    saver.wait()
    assert names(store) == ["step-00000003-a"]
    assert is_whole(store, store.latest())
    assert done == [[]]  # what the checkpoint refers to is stored before it counts
    assert len(commits) == 1
    assert commits[0] > 0


def test_one_checkpoint_is_stored_at_a_time_and_in_order(store, gate):
    saver, taken = checkpoint.Saver(store, "a", 9), []

    def noted(folder):
        taken.append(names(store))
        write(folder)

    saver.save(1, noted)
    opening = threading.Timer(0.3, gate.set)
    opening.start()
    saver.save(2, noted)  # waits: a node needs memory and disk for one
    saver.wait()
    opening.join()
    assert taken == [[], ["step-00000001-a"]]
    assert names(store) == ["step-00000001-a", "step-00000002-a"]


@pytest.mark.parametrize("look", ["check", "wait", "save"])
def test_an_error_of_the_store_is_raised_by_the_next_call_and_once(local, monkeypatch, look):
    before = saved(local, 1)
    saver = checkpoint.Saver(local, "b", 2)
    with monkeypatch.context() as patch:
        patch.setattr(local.filesystem, "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("away")))
        saver.save(2, write)
        while not saver._storing.done():
            time.sleep(0.01)
    calls = {"check": saver.check, "wait": saver.wait, "save": lambda: saver.save(3, write)}
    with pytest.raises(OutputError, match="away"):
        calls[look]()
    saver.check()
    assert names(local) == [before]


def test_an_error_of_writing_leaves_nothing_to_store(local):
    saver = checkpoint.Saver(local, "b", 2)

    def broken(folder):
        (folder / "half").write_bytes(b"half")
        raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        saver.save(1, broken)
    saver.wait()
    assert names(local) == []


# ------------------------------------------------------------------------------------------------------- pruning


def test_pruning_removes_what_is_superseded_and_nothing_else(store):
    for step in range(1, 5):
        store.commit(uncommitted(store, f"step-{step}-a"))
    put(store, "step-2-died")
    put(store, "step-4-writing")  # by workers that count as dead, or of another driver
    put(store, "step-5-writing")
    put(store, "notes", {"mine.txt": b"keep"})
    store.prune(keep=2)
    assert names(store) == ["step-3-a", "step-4-a"]
    assert folders(store) == ["notes", "step-3-a", "step-4-a", "step-4-writing", "step-5-writing"]
    store.prune(keep=9)
    assert names(store) == ["step-3-a", "step-4-a"]


def test_without_a_committed_checkpoint_nothing_is_pruned(store):
    put(store, "step-1-a")
    store.prune(keep=1)
    assert folders(store) == ["step-1-a"]


def test_a_prune_that_fails_is_a_warning_and_made_up_for_later(remote, proxy, caplog):
    saved(remote, 1, keep=1)
    proxy.inject("error", only="DELETE|POST .*delete", times=99)
    second = saved(remote, 2, keep=1)
    assert re.search(r"old checkpoints.*step-00000001-a.*InternalError|injected", caplog.text)
    assert remote.latest().name == second
    proxy.planned.clear()
    third = saved(remote, 3, keep=1)
    assert folders(remote) == [third]


def test_a_commit_that_fails_is_no_warning(remote, proxy):
    proxy.inject("error", only=f"PUT .*{MANIFEST}", times=99)
    with pytest.raises(OutputError, match=MANIFEST):
        saved(remote, 1)
    assert names(remote) == []


def test_a_reader_never_misses_the_newest_while_older_ones_are_pruned(local, monkeypatch):
    """Between its listing and its reading, a newer one is committed and those listed go."""
    saved(local, 1, keep=1)
    listed = LocalFileSystem.find

    def meanwhile(self, *arguments, **options):
        found = listed(self, *arguments, **options)
        monkeypatch.setattr(LocalFileSystem, "find", listed)
        saved(local, 2, keep=1)
        return found

    monkeypatch.setattr(LocalFileSystem, "find", meanwhile)
    assert local.latest().step == 2


# ----------------------------------------------------------------------------------------------- another writer


def test_of_two_attempts_at_a_step_both_are_whole_and_every_reader_takes_the_same(store):
    for attempt in ("b", "a"):
        store.commit(uncommitted(store, f"step-2-{attempt}"))
    assert names(store) == ["step-2-a", "step-2-b"]
    assert all(is_whole(store, manifest) for manifest in store.committed())


def test_an_attempt_that_is_behind_cannot_commit_what_another_has_pruned(store):
    slow = uncommitted(store, "step-2-slow")
    current = saved(store, 3)
    with pytest.raises(OutputError, match=r"0 of .*Find out what else writes or removes files there"):
        store.commit(slow)
    assert names(store) == [current]


def test_an_attempt_that_is_ahead_is_not_pruned(store):
    fast = uncommitted(store, "step-4-fast")
    current = saved(store, 3)
    store.commit(fast)
    assert names(store) == [current, "step-4-fast"]


# ------------------------------------------------------------------------------------------------------ damage

WHOLE = asdict(Manifest("step-2-b", 2, 1, {"ledger.json": StoredFile(2)}))
MANIFESTS = {
    "nothing": (b"", "Invalid JSON"),
    "cut": (json.dumps(WHOLE).encode()[:-5], "Invalid JSON"),
    "a web page": (b"<html>503</html>", "Invalid JSON"),
    "a list": (b"[]", "an object"),
    "no files": (json.dumps({**WHOLE, "files": None}).encode(), "an object"),
    "no step": (json.dumps({key: value for key, value in WHOLE.items() if key != "step"}).encode(), "required"),
    "a path upwards": (json.dumps({**WHOLE, "files": {"../../x": 1}}).encode(), r"\.\./\.\./x is outside"),
    "an absolute path": (json.dumps({**WHOLE, "files": {"/etc/x": 1}}).encode(), "/etc/x is outside"),
    "that of another": (json.dumps({**WHOLE, "name": "step-1-a"}).encode(), "the manifest of step-1-a"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_checkpoint_whose_manifest_is_damaged_does_not_count_and_is_told_of(local, case):
    content, reason = MANIFESTS[case]
    before = saved(local, 1)
    put(local, "step-2-b", {**CONTENT, MANIFEST: content})
    assert names(local) == [before]
    assert re.search(rf"step-2-b is damaged: {MANIFEST}.*{reason}", local.survey().damaged["step-2-b"])
    assert re.search(rf"step-2-b is damaged.* goes on from {before}.*The 1 steps after it", local.survey().loss())
    local.filesystem.rm(f"{local.root}/step-2-b", recursive=True)
    assert local.survey().loss() == ""


@pytest.mark.parametrize("case", DAMAGE)
def test_a_checkpoint_that_lost_a_part_is_not_loaded(store, case):
    damage, found = DAMAGE[case]
    name = saved(store, 1)
    damage(store, f"{store.root}/{name}/deepspeed/optimizer.pt")
    with pytest.raises(CheckpointDamaged, match=rf"{name} is damaged: deepspeed/optimizer\.pt: {found} are there"):
        is_whole(store, store.latest())


def flip(store, name, file, at=17):
    """Change one bit of a stored file, as a disk or a memory may."""
    path = f"{store.root}/{name}/{file}"
    content = bytearray(store.filesystem.cat_file(path))
    content[at] ^= 1
    store.filesystem.pipe_file(path, bytes(content))


@pytest.mark.parametrize("file", [file for file in CONTENT if file != LEDGER])
def test_one_flipped_bit_is_found_before_anything_is_loaded(store, file):
    name = saved(store, 1)
    flip(store, name, file)
    with pytest.raises(CheckpointDamaged, match=rf"{re.escape(file)}: its SHA-256 is"):
        is_whole(store, store.latest())
    assert re.search(r"SHA-256", store.verify(store.latest()))


def test_a_bit_of_a_manifest_that_flips_is_found(local):
    """The name of a file, a size, a digest, the step, the token: any of them would be believed otherwise."""
    before, name = saved(local, 1), saved(local, 2)
    size = len(local.filesystem.cat_file(f"{local.root}/{name}/{MANIFEST}"))
    for at in range(size):
        flip(local, name, MANIFEST, at)
        assert names(local) == [before], at
        flip(local, name, MANIFEST, at)
    assert names(local) == [before, name]


def test_a_flipped_bit_in_a_small_file_is_found_where_it_is_read(store):
    name = saved(store, 1)
    flip(store, name, LEDGER, at=0)
    with pytest.raises(CheckpointDamaged, match=rf"{LEDGER}: its SHA-256 is"):
        store.read_text(store.latest(), LEDGER)


def test_a_rejected_checkpoint_does_not_count_and_the_one_before_it_does(store):
    first, second = saved(store, 3), saved(store, 5)
    assert store.verify(store.latest()) is None
    store.reject(second, "weights: its SHA-256 is another")
    assert names(store) == [first]
    assert is_whole(store, store.latest())
    assert re.search(rf"SHA-256 is another\. The job goes on from {first}.*The 2 steps after it", store.survey().loss())
    third = saved(store, 6)
    assert store.survey().loss() == ""
    assert folders(store) == [first, third]  # and it goes with the next


def test_where_every_checkpoint_is_damaged_the_job_does_not_begin_again_by_itself(store):
    store.reject(saved(store, 3), "the reason")
    with pytest.raises(OutputError, match=rf"every checkpoint is damaged: the reason.*without its {DAMAGED}"):
        store.latest()


def test_a_copy_that_is_damaged_once_is_made_again(local, monkeypatch):
    saved(local, 1)
    copy, damaged = LocalFileSystem.get_file, []

    def once(self, source, target, **options):
        copy(self, source, target, **options)
        if source not in damaged:
            damaged.append(source)
            os.truncate(target, 2)

    monkeypatch.setattr(LocalFileSystem, "get_file", once)
    assert is_whole(local, local.latest())
    assert damaged


def test_a_manifest_of_a_version_without_digests_is_read(local):
    name = saved(local, 1)
    path = f"{local.root}/{name}/{MANIFEST}"
    tree = json.loads(local.filesystem.cat_file(path))
    old = {key: tree[key] for key in ("name", "step", "world_size")}
    local.filesystem.pipe_file(path, json.dumps(old | {"files": {f: len(c) for f, c in CONTENT.items()}}).encode())
    assert is_whole(local, local.latest())
    flip(local, name, "deepspeed/model.pt")
    assert local.verify(local.latest()) is None  # it has nothing to be compared with


def test_a_universal_form_that_is_damaged_is_made_again_and_the_checkpoint_stays(store, tmp_path):
    name = saved(store, 1)
    (tmp_path / UNIVERSAL).mkdir()
    (tmp_path / UNIVERSAL / "weight.pt").write_bytes(b"weight")
    universal = store.add_universal(store.latest(), tmp_path)
    assert store.universal(store.latest()) == universal
    flip(store, name, f"{UNIVERSAL}/weight.pt", at=0)
    with pytest.raises(CheckpointDamaged) as damage:
        store.fetch(universal, [f"{UNIVERSAL}/weight.pt"], tmp_path / "node", "0")
    store.reject(name, str(damage.value))
    assert store.universal(store.latest()) is None
    assert names(store) == [name]
    put(store, name, {f"{UNIVERSAL}/{MANIFEST}": b"{"})
    assert store.universal(store.latest()) is None


def test_a_download_that_is_short_is_begun_again_and_at_last_given_up(remote, proxy):
    saved(remote, 1)
    for times in (1, ANSWERS - 1):
        proxy.inject(SHORT, at=100, only=r"GET .*optimizer\.pt", times=times)
        assert is_whole(remote, remote.latest())
        assert not proxy.planned
    proxy.inject(SHORT, at=100, only=r"GET .*optimizer\.pt", times=ANSWERS)
    with pytest.raises(OutputError, match=r"optimizer\.pt: .*checksum"):
        is_whole(remote, remote.latest())


def test_a_copy_that_is_short_is_not_loaded(local, monkeypatch):
    saved(local, 1)
    copy = LocalFileSystem.get_file

    def cut(self, source, target, **options):
        copy(self, source, target, **options)
        os.truncate(target, 2)

    monkeypatch.setattr(LocalFileSystem, "get_file", cut)
    with pytest.raises(OutputError, match=r"deepspeed/\w+\.pt: 2 of \d+ bytes"):
        is_whole(local, local.latest())


def test_a_disk_that_fills_up_during_a_download_is_named(local, monkeypatch, temporary):
    saved(local, 1)

    def full(self, source, target, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "get_file", full)
    with pytest.raises(OutputError, match=rf"{temporary}.*the disk is full.*TMPDIR"):
        is_whole(local, local.latest())


@pytest.mark.parametrize("call", ["latest", "ledger", "on_disk"])
def test_a_store_that_is_away_is_named_with_a_remedy(remote, proxy, call):
    saved(remote, 1)
    manifest = remote.latest()
    proxy.rate, proxy.faults = 1.0, ("reset",)
    calls = {
        "latest": remote.latest,
        "ledger": lambda: remote.ledger(manifest),
        "on_disk": lambda: is_whole(remote, manifest),
    }
    with pytest.raises(OutputError, match=rf"^s3://betakd/.*/{CHECKPOINTS}.*ConnectionError.*output\.storage"):
        calls[call]()


def test_credentials_that_are_refused_are_named(remote, monkeypatch):
    def refused(*arguments, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(remote.filesystem, "put_file", refused)
    with pytest.raises(OutputError, match=r"PermissionError: Access Denied.*credentials"):
        saved(remote, 1)


# ------------------------------------------------------------------------------------- several ranks and nodes

SHARED, OPTIMIZER = "deepspeed/mp_rank_00_model_states.pt", "deepspeed/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
PARAMETER = f"{UNIVERSAL}/zero/weight/fp32.pt"


def two_nodes(run):
    """Set up this process, one of four, as one of two on its node; returns the store and the files it copies."""
    rank = dist.get_rank()
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
    folder = f"{run}-node-{rank // 2}"
    os.makedirs(folder, exist_ok=True)
    tempfile.tempdir = folder
    copied, copy = [], LocalFileSystem.get_file

    def get_file(self, source, target, **options):
        copied.append(name_of(source))
        return copy(self, source, target, **options)

    LocalFileSystem.get_file = get_file
    return CheckpointStore(f"{run}/run", StorageSpec()), copied


def write_rank(folder):
    """Write files as DeepSpeed does: each rank writes its own, and the first rank also those that all ranks read."""
    rank = dist.get_rank()
    (folder / "deepspeed").mkdir()
    (folder / OPTIMIZER.format(rank)).write_bytes(bytes([rank]) * 100)
    if rank == 0:
        (folder / SHARED).write_bytes(b"weights")
        (folder / "beta.pt").write_bytes(b"beta")
        (folder / "ledger.json").write_bytes(b"{}")


def name_of(path):
    return str(path).partition("step-")[2].partition("/")[2]


def resume(run):
    """Save with four ranks and resume; return this rank's copied files and what is on its node."""
    store, copied = two_nodes(run)
    save(store, 1, "a", 2, write_rank)
    copied.clear()
    with checkpoint.on_disk(store, store.named("step-00000001-a"), "b") as folder:
        found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(copied), found


def test_a_rank_copies_its_own_files_and_a_node_once_what_all_of_them_read(tmp_path):
    for rank, (copied, found) in enumerate(on_ranks(resume, tmp_path, str(tmp_path / "same"), ranks=4)):
        one_of_the_shared = SHARED if rank % 2 == 0 else "beta.pt"
        assert copied == sorted([OPTIMIZER.format(rank), one_of_the_shared])
        node = {SHARED, "beta.pt", *(OPTIMIZER.format(each) for each in (rank // 2 * 2, rank // 2 * 2 + 1))}
        assert found == sorted(node)


def convert(folder):
    """Convert the files as DeepSpeed's conversion does, on a node that has the files of every rank."""
    assert len(list((folder / "deepspeed").glob("*_optim_states.pt"))) == 3
    (folder / PARAMETER).parent.mkdir(parents=True)
    (folder / PARAMETER).write_bytes(b"parameter")
    (folder / UNIVERSAL / "mp_rank_00_model_states.pt").write_bytes(b"weights")
    (folder.parent / f"converted-{dist.get_rank()}").touch()


def resume_resized(run):
    """Resume twice from the checkpoint of three ranks; return this rank's copied files and what is on its node."""
    store, copied = two_nodes(run)
    checkpoint.make_universal = convert
    (manifest,) = store.committed()
    found = []
    for attempt in "bc":
        copied.clear()
        with checkpoint.on_disk(store, manifest, attempt) as folder:
            files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            found.append((sorted(copied), files))
    save(store, 2, "d", 1, write_rank)
    return found, folders(store)


def test_another_number_of_ranks_is_converted_to_once_and_the_others_copy_that(tmp_path):
    store = CheckpointStore(str(tmp_path / "resized" / "run"), StorageSpec())
    files = {OPTIMIZER.format(rank): b"part" for rank in range(3)}
    files |= {SHARED: b"all", "beta.pt": b"beta", "ledger.json": b"{}"}
    put(store, "step-1-a", files)
    store.commit(Manifest("step-1-a", 1, 3, described(files)))
    ranks = on_ranks(resume_resized, tmp_path, str(tmp_path / "resized"), ranks=4)
    assert [path.name for path in tmp_path.glob("resized-node-*/converted-*")] == ["converted-0"]
    wanted = sorted(["beta.pt", PARAMETER, f"{UNIVERSAL}/mp_rank_00_model_states.pt"])
    for rank, (((first, there), (second, there_again)), left) in enumerate(ranks):
        assert there == there_again == wanted
        # The first rank copies every part, to convert them; its neighbour then finds all there.
        assert len(first) == [len(files) - 1, 0, 2, 1][rank]
        assert len(second) == [2, 1, 2, 1][rank]
        assert left == ["step-00000002-d"]


def ledger_of(*indexes):
    ledger = Ledger([8, 8])
    if indexes:
        index = np.array(indexes, np.int32)
        ledger.add(SampleIds(np.zeros_like(index), np.ones_like(index), index))
    return ledger


def merge(already):
    """Each rank's delta is the sample of its own number; rank 0 has those that were done before."""
    whole = ledger_of(*already) if dist.get_rank() == 0 else None
    merge_ledgers(whole, ledger_of(dist.get_rank()))
    return whole.done(0, 1).nonzero()[0].tolist() if whole else None


def test_rank_0_adds_up_the_ledgers(tmp_path):
    assert on_ranks(merge, tmp_path, (6, 7), ranks=3) == [[0, 1, 2, 6, 7], None, None]


def test_a_checkpoint_is_found_by_its_name(store):
    first, second = saved(store, 1), saved(store, 2)
    assert [store.named(name).step for name in (first, second)] == [1, 2]
    with pytest.raises(OutputError, match=rf"step-00000003-a/{MANIFEST}: FileNotFoundError"):
        store.named("step-00000003-a")
