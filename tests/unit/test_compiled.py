"""DeepSpeed's collective is compiled once, whoever is killed meanwhile and whatever is first on PATH."""

import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension

from betakd_ray.engine import compiled
from betakd_ray.errors import ClusterError

NAME = "deepspeed_shm_comm"


class Builder:
    """DeepSpeed's OpBuilder, as far as `compiled` asks it: one C++ source."""

    NAME = NAME

    def __init__(self, folder: Path, flags: tuple[str, ...] = ("-O2",)) -> None:
        self.folder, self.flags = folder, flags

    def sources(self) -> list[str]:
        return ["shm.cpp"]

    def cxx_args(self) -> list[str]:
        return [*self.flags]

    def deepspeed_src_path(self, path: str) -> str:
        return str(self.folder / path)


class Compiler:
    """Stand-in for the compiler: writes the library, and counts how often."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, builder: Builder, folder: Path) -> None:
        self.runs += 1
        (folder / NAME).mkdir(parents=True)
        (folder / NAME / f"{NAME}.so").write_text("library")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    """Return the compiler that is used; libraries are in tmp_path/extensions."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    found = Compiler()
    monkeypatch.setattr(compiled, "_compile", found)
    return found


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "shm.cpp").write_text("int f();")
    (tmp_path / "src" / "shm.h").write_text("int g();")
    return Builder(tmp_path / "src")


def _compile_for_long(builder: Builder) -> None:
    def compile_for_long(builder: Builder, folder: Path) -> None:
        folder.mkdir()
        (folder / "shm.o").write_text("half")
        time.sleep(600)

    compiled._compile = compile_for_long  # in the child alone
    compiled.compiled(builder)


def one_that_compiles(builder: Builder, extensions: Path) -> Any:
    """Return a process that is compiling and will not finish."""
    process = multiprocessing.get_context("fork").Process(target=_compile_for_long, args=(builder,))
    process.start()
    while not list(extensions.glob("*/aside-*/shm.o")):
        time.sleep(0.02)
    return process


def test_the_lock_of_a_killed_compiler_is_in_nobodys_way(tmp_path: Path, builder: Builder, compiler: Compiler) -> None:
    process = one_that_compiles(builder, tmp_path / "extensions")
    process.kill()
    process.join()
    library = compiled.compiled(builder)
    assert library.read_text() == "library"
    assert not list(library.parent.glob("aside-*"))  # neither the killed process's nor ours


def test_a_living_compiler_is_waited_for_and_then_its_lock_is_named(
    tmp_path: Path, builder: Builder, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "PATIENCE_S", 0.5)
    process = one_that_compiles(builder, tmp_path / "extensions")
    begun = time.monotonic()
    with pytest.raises(ClusterError, match=rf"{tmp_path}/extensions/betakd-\w+/compiling: another process has held"):
        compiled.compiled(builder)
    assert time.monotonic() - begun > 0.5
    assert process.is_alive()
    assert list((tmp_path / "extensions").glob("*/aside-*/shm.o"))
    process.kill()
    process.join()


def test_ranks_that_start_together_compile_once(builder: Builder, compiler: Compiler) -> None:
    threads = [threading.Thread(target=compiled.compiled, args=(builder,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.runs == 1


def test_another_path_to_the_same_environment_compiles_nothing(
    tmp_path: Path, builder: Builder, compiler: Compiler
) -> None:
    library = compiled.compiled(builder)
    (tmp_path / "link").symlink_to(builder.folder)
    assert compiled.compiled(Builder(tmp_path / "link")) == library
    assert compiler.runs == 1


@pytest.mark.parametrize("change", ["torch", "source", "header", "flags"])
def test_what_was_compiled_of_something_else_is_not_loaded(
    change: str, builder: Builder, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = compiled.compiled(builder)
    if change == "torch":
        monkeypatch.setattr(compiled.torch, "__version__", "99.0")
    elif change == "flags":
        builder.flags = ("-O3",)
    else:
        (builder.folder / {"source": "shm.cpp", "header": "shm.h"}[change]).write_text("int h();")
    assert compiled.compiled(builder) != library
    assert compiler.runs == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, builder: Builder, compiler: Compiler) -> None:
    (tmp_path / "extensions").write_text("a file")
    with pytest.raises(ClusterError, match=rf"{tmp_path}/extensions/betakd-\w+: cannot be written .*TORCH_EXTENSIONS"):
        compiled.compiled(builder)


def test_the_ninja_of_this_environment_is_used_also_where_path_has_another_or_none(
    tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ninja").chmod(0o755)
    ours = Path(sys.prefix, "bin", "ninja").resolve()
    used = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        used.append(shutil.which("ninja", path=env["PATH"]))
        return subprocess.CompletedProcess(command, 1, "", "c++: command not found")

    monkeypatch.setattr(subprocess, "run", run)
    for path in (str(tmp_path), None):
        monkeypatch.setenv("PATH", path) if path else monkeypatch.delenv("PATH")
        with pytest.raises(ClusterError, match=r"needs a C\+\+ compiler .*c\+\+: command not found"):
            compiled._compile(builder, tmp_path / "aside")
    assert [Path(each or "none").resolve() for each in used] == [ours, ours]


@pytest.mark.parametrize("is_released", [True, False])
def test_the_lock_of_another_extension_is_not_waited_for_for_ever(
    is_released: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp_extension.FileBaton, "wait", cpp_extension.FileBaton.wait)  # put back after the test
    monkeypatch.setattr(compiled, "PATIENCE_S", 60.0 if is_released else 0.3)
    compiled.bound_other_locks()
    lock = tmp_path / "lock"
    lock.touch()
    baton = cpp_extension.FileBaton(str(lock))
    if is_released:
        threading.Timer(0.3, lock.unlink).start()
        baton.wait()
    else:
        with pytest.raises(ClusterError, match=rf"{lock}: .*remove the file"):
            baton.wait()
    assert lock.exists() != is_released


def test_deepspeed_starts_beside_a_lock_that_torch_left_and_a_ninja_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    library = compiled.compiled(ShareMemCommBuilder())
    shutil.copytree(library.parent, tmp_path / library.parent.name)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "lock").touch()
    (tmp_path / "ninja").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(cpp_extension.FileBaton, "wait", cpp_extension.FileBaton.wait)
    compiled.load_collective()
    monkeypatch.setattr(OpBuilder, "jit_load", lambda *_: pytest.fail("torch looks for its lock"))
    operations = importlib.import_module("deepspeed.comm.torch").build_shm_op()
    assert operations is not None
    assert callable(operations.initialize)
    assert not (tmp_path / "was-run").exists()
