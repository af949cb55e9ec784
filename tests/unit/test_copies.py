"""A model of a URL is copied once for each state of its files, so that no stale copy is ever loaded."""

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from betakd_ray.errors import ModelError
from betakd_ray.models.source import local_folder
from betakd_ray.spec import StorageSpec

STORAGE = StorageSpec()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BETAKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a folder with a model of two files."""
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{1}")
    (folder / "deep" / "weights").write_bytes(b"old")
    return folder


def weights(url: str) -> bytes:
    return (Path(local_folder(url, STORAGE)) / "deep" / "weights").read_bytes()


def in_place(file: Path, content: bytes) -> None:
    """Write other bytes, and keep inode, size and time of change, as `rsync --inplace --times` does."""
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def renamed(file: Path, content: bytes) -> None:
    """Replace the file by another one with the same size and times."""
    before, aside = file.stat(), file.with_suffix(".new")
    aside.write_bytes(content)
    os.utime(aside, ns=(before.st_atime_ns, before.st_mtime_ns))
    aside.replace(file)


@pytest.mark.parametrize("replace", [Path.write_bytes, in_place, renamed])
def test_a_local_file_that_is_replaced_by_one_of_equal_size_is_copied_again(
    cache: Path, model: Path, replace: Any
) -> None:
    url = f"file://{model}"
    assert weights(url) == b"old"
    replace(model / "deep" / "weights", b"new")
    assert weights(url) == b"new"


def test_a_model_that_stays_the_same_is_copied_once(cache: Path, model: Path) -> None:
    url = f"file://{model}"
    assert local_folder(url, STORAGE) == local_folder(url, STORAGE)
    assert len(list(cache.iterdir())) == 1
    (model / "more").touch()
    local_folder(url, STORAGE)
    assert len(list(cache.iterdir())) == 2


def test_a_store_without_etags_is_known_by_the_time_of_change(cache: Path) -> None:
    store = fsspec.filesystem("memory")
    for content in (b"old", b"new"):
        store.pipe_file("/without-etags/deep/weights", content)
        assert weights("memory://without-etags") == content


def test_a_listing_without_marks_is_completed_file_by_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A web server lists only names."""
    store = fsspec.filesystem("memory")
    real, digest = MemoryFileSystem.info, {"value": "a"}

    def info(self: Any, path: str, **options: Any) -> dict[str, Any]:
        found = real(self, path, **options)
        return {**found, "created": None, "Content-MD5": digest["value"]}

    def find(self: Any, path: str, **options: Any) -> dict[str, Any]:
        return {name: {"name": name, "size": None, "type": "file"} for name in ("/bare/deep/weights",)}

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    monkeypatch.setattr(MemoryFileSystem, "find", find)
    for content in (b"old", b"new"):
        store.pipe_file("/bare/deep/weights", content)
        digest["value"] = content.decode()
        assert weights("memory://bare") == content
    digest["value"] = ""
    with pytest.raises(ModelError, match=r"neither an ETag, a checksum nor a time of change.*Copy the model"):
        weights("memory://bare")


def test_a_model_that_changes_while_it_is_copied_is_an_error_and_leaves_no_copy(
    cache: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    real = LocalFileSystem.get

    def meanwhile(self: Any, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        (model / "deep" / "weights").write_bytes(b"new")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "get", meanwhile)
        with pytest.raises(ModelError, match="its files changed while they were copied"):
            weights(f"file://{model}")
    assert list(cache.iterdir()) == []
    assert weights(f"file://{model}") == b"new"
