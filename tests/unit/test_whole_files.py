"""Files that are written whole: what a loss of power, a full disk or an error in the middle leaves of them."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError

from betakd_ray.errors import OutputError
from betakd_ray.output import disk_errors, full_disk, output_errors
from betakd_ray.run.checkpoint import CheckpointStore, Manifest
from betakd_ray.run.files import write_text
from betakd_ray.run.folder import MANIFEST
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import put_file, replace_file, whole_file, whole_folder
from betakd_ray.train.export import _upload

LOCAL = LocalFileSystem()
CONTENT = bytes(range(256)) * 100


class Disk:
    """Record of what has reached the disk under `root`: contents of files, and names in folders, only by fsync."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._fsync, self._rename = os.fsync, os.rename
        self.renamed: list[str] = []
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.rename)
        monkeypatch.setattr(os, "rename", self.rename)

    def fsync(self, file: int) -> None:
        self._fsync(file)
        path, found = os.readlink(f"/proc/self/fd/{file}"), os.fstat(file)
        if stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._contents[found.st_ino] = Path(path).read_bytes()
            os.dup(file)  # kept open, so that no other file gets this inode

    def rename(self, source: Any, target: Any) -> None:
        files = [path for path in (Path(source), *Path(source).rglob("*")) if path.is_file()]
        assert all(self._contents[path.stat().st_ino] == path.read_bytes() for path in files), "renamed before synced"
        self.renamed.append(os.fspath(target))
        self._rename(source, target)

    def after_power_loss(self, path: str | os.PathLike[str]) -> bytes | None:
        """Return the content of a file after a loss of power; None if it, or a folder of it, is gone."""
        inode = self.root.stat().st_ino
        for part in Path(path).relative_to(self.root).parts:
            if part not in self._names.get(inode, {}):
                return None
            inode = self._names[inode][part]
        return self._contents.get(inode, b"")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------------- a loss of power


@pytest.mark.parametrize("folder", ["", "new/", "new/and/deeper/"])
def test_a_written_file_survives_a_loss_of_power(disk, tmp_path, folder):
    for content in (b"before", CONTENT):
        replace_file(LOCAL, f"{tmp_path}/{folder}replaced", content)
        assert disk.after_power_loss(f"{tmp_path}/{folder}replaced") == content
    (tmp_path / "source").write_bytes(CONTENT)
    put_file(LOCAL, tmp_path / "source", f"{tmp_path}/{folder}copied")
    assert disk.after_power_loss(f"{tmp_path}/{folder}copied") == CONTENT
    write_text(f"{tmp_path}/{folder}plan.json", StorageSpec(), "{}")
    assert disk.after_power_loss(f"{tmp_path}/{folder}plan.json") == b"{}"
    assert disk.after_power_loss(tmp_path / "source") != CONTENT  # written without


def test_every_file_of_a_checkpoint_is_on_the_disk_before_its_manifest(disk, tmp_path, monkeypatch):
    local, store = tmp_path / "local", CheckpointStore(f"{tmp_path}/run", StorageSpec())
    (local / "deepspeed").mkdir(parents=True)
    for file in ("beta.pt", "deepspeed/optimizer.pt"):
        (local / file).write_bytes(CONTENT)
    files = store.upload(local, "step-1-a")
    stored = {file: f"{store.root}/step-1-a/{file}" for file in files}
    assert {file: disk.after_power_loss(path) for file, path in stored.items()} == dict.fromkeys(stored, CONTENT)
    store.commit(Manifest("step-1-a", 1, 1, files))
    assert disk.renamed[-1] == f"{store.root}/step-1-a/{MANIFEST}"
    assert disk.after_power_loss(disk.renamed[-1])


def test_an_exported_model_survives_a_loss_of_power(disk, tmp_path):
    model = tmp_path / "temporary"
    model.mkdir()
    (model / "model.safetensors").write_bytes(CONTENT)
    _upload(model, f"{tmp_path}/run/model", StorageSpec())
    assert disk.after_power_loss(f"{tmp_path}/run/model/model.safetensors") == CONTENT


def test_a_folder_is_on_the_disk_before_it_gets_its_name(disk, tmp_path):
    with whole_folder(tmp_path / "models" / "new") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(CONTENT)
        assert not (tmp_path / "models" / "new").exists()
    assert disk.after_power_loss(tmp_path / "models" / "new" / "inner" / "weights") == CONTENT


def test_a_file_system_without_fsync_of_folders_is_no_error(tmp_path, monkeypatch):
    real = os.fsync

    def refuse_folders(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(file)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    replace_file(LOCAL, f"{tmp_path}/file", CONTENT)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_an_error_of_fsync_is_an_error_and_the_former_file_stays(tmp_path, monkeypatch):
    replace_file(LOCAL, f"{tmp_path}/file", b"before")

    def refuse(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        replace_file(LOCAL, f"{tmp_path}/file", b"after")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"before"}


# ------------------------------------------------------------------------------------------- errors in the middle


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), MemoryError()])
def test_an_error_in_the_middle_leaves_the_former_file_and_nothing_beside_it(tmp_path, error):
    replace_file(LOCAL, f"{tmp_path}/file", b"before")

    def write_half(path: Path) -> None:
        path.write_bytes(b"aft")
        raise error

    with pytest.raises(type(error)), whole_file(LOCAL, f"{tmp_path}/file") as path:
        write_half(Path(path))
    with pytest.raises(type(error)), whole_folder(tmp_path / "folder") as folder:
        write_half(folder / "weights")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"before"}


def test_a_folder_with_files_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "own").write_bytes(b"own")
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "folder"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "own"]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    contents = [bytes([number]) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as executor:  # threads: they have one process id
        for _ in executor.map(lambda content: replace_file(LOCAL, f"{tmp_path}/file", content), contents * 5):
            assert (tmp_path / "file").read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", ["replaced", "copied", "folder"])
def test_a_full_disk_is_named_with_its_folder_whatever_is_written(tmp_path, kind, number):
    (tmp_path / "source").write_bytes(CONTENT)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    def write() -> None:
        if kind == "replaced":
            replace_file(LOCAL, f"{tmp_path}/out/file", CONTENT)
        elif kind == "copied":
            put_file(LOCAL, tmp_path / "source", f"{tmp_path}/out/file")
        else:
            with whole_folder(tmp_path / "out" / "file"):
                fail()

    with pytest.MonkeyPatch.context() as patch:
        for name in ("pipe_file", "put_file"):
            patch.setattr(LocalFileSystem, name, fail)
        with pytest.raises(OutputError, match=rf"disk is full: free some space in {tmp_path}/out"):
            write()
    assert list((tmp_path / "out").iterdir()) == []


SAID_BY_SAFETENSORS = f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is full")
@pytest.mark.parametrize("errors", [full_disk, output_errors])
def test_a_full_device_is_recognised(errors):
    with pytest.raises(OutputError, match=r"disk is full.*free some\s+space"), errors("/dev/full"):
        Path("/dev/full").write_bytes(CONTENT)


@pytest.mark.parametrize("errors", [full_disk, disk_errors])
def test_a_full_disk_is_recognised_in_the_words_of_a_library(errors, tmp_path):
    with pytest.raises(OutputError, match="disk is full"), errors(tmp_path / "model.safetensors"):
        raise SafetensorError(SAID_BY_SAFETENSORS)


def test_another_error_is_not_a_full_disk(tmp_path):
    for error in (OSError(errno.EACCES, "Permission denied"), RuntimeError("of torch"), OutputError("said already")):
        for errors in (full_disk, disk_errors):
            with pytest.raises(type(error), match=str(error.args[-1])) as caught, errors(tmp_path / "file"):
                raise error
            assert caught.value is error
    with pytest.raises(OutputError, match=r"Permission denied.*credentials"), output_errors("run"):
        raise OSError(errno.EACCES, "Permission denied")
