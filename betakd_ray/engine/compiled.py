"""DeepSpeed's compiled collective for CPUs: compiled once for a torch, then loaded without compiler and lock.

Left to itself, torch asks ninja at each start whether to compile again, and does so for another ninja on PATH, or for
another path to the same environment. Meanwhile a file in the folder keeps other processes waiting. It outlives a killed
owner, and then every later start waits for ever. Here each library has a folder of its own, named after all that it was
compiled from. What is in that folder is complete, because it is compiled aside and then renamed. Whoever compiles holds
a lock that the kernel releases.

Run as a program, this module compiles: `python -m betakd_ray.engine.compiled`.
"""

import fcntl
import hashlib
import importlib.util
import os
import platform
import secrets
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension, file_baton

from betakd_ray.errors import ClusterError
from betakd_ray.leftovers import owned, remove_abandoned

PATIENCE_S = 1200.0
"""Timeout in seconds for another process that compiles. It takes a minute or two, on a busy machine ten."""
COLLECTIVE = "ShareMemCommBuilder"
"""Name of DeepSpeed's class that compiles the collective."""
PROGRAM = "betakd_ray.engine.compiled"
"""Name of this module, also where it runs as a program."""


def load_collective() -> None:
    """Load the collective, so that DeepSpeed finds it loaded; compile it if nobody has. Call it before `initialize`.

    It does nothing where DeepSpeed uses none, as on GPUs. Raises ClusterError if this node cannot compile or load it,
    or if another process compiles for longer than `PATIENCE_S`.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.builder import OpBuilder

    bound_other_locks()
    accelerator: Any = get_accelerator()
    builder = accelerator.create_op_builder(COLLECTIVE)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    if installed_ops.get(builder.NAME, False) or builder.NAME in OpBuilder._loaded_ops:
        return
    OpBuilder._loaded_ops[builder.NAME] = _import(builder.NAME, compiled(builder))


def compiled(builder: Any) -> Path:
    """Return the library that `builder` (an OpBuilder) makes of its sources; compile it if it is not there."""
    folder = _root() / f"betakd-{_fingerprint(builder)}"
    library = folder / f"{builder.NAME}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "compiling"):
            remove_abandoned(folder, "aside-*")
            if not library.exists():  # another process may have compiled it meanwhile
                with owned(folder / f"aside-{secrets.token_hex(8)}") as aside:
                    _compile(builder, aside)
                    os.replace(aside / builder.NAME / library.name, library)
    except OSError as error:
        raise ClusterError(
            f"{folder}: cannot be written ({error}). DeepSpeed's collective for CPUs is compiled there. Set "
            "TORCH_EXTENSIONS_DIR to a folder that can be written, or compile when the node's image is made: "
            f"python -m {PROGRAM}"
        ) from error
    return library


def bound_other_locks() -> None:
    """Limit how long torch waits for the lock of any other extension; `training.deepspeed` may ask for one."""
    file_baton.FileBaton.wait = _wait_for_baton


def _wait_for_baton(self: file_baton.FileBaton) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while os.path.exists(self.lock_file_path):
        if time.monotonic() > deadline:
            raise ClusterError(
                _still_there(self.lock_file_path, "If none does, its owner was killed: remove the file.")
            )
        time.sleep(self.wait_seconds)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock in the block. The kernel releases it when the process dies, so the file itself can stay."""
    deadline = time.monotonic() + PATIENCE_S
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ClusterError(_still_there(lock, "If it hangs, end it.")) from None
                time.sleep(0.2)
        yield


def _still_there(lock: str | Path, remedy: str) -> str:
    return (
        f"{lock}: another process has held this lock for {PATIENCE_S:g} s, as one does that compiles a part of "
        f"DeepSpeed. Look for a compiler that runs on this machine (or on another that has this folder). {remedy}"
    )


def _compile(builder: Any, folder: Path) -> None:
    """Compile in a process of its own: torch and ninja are told what to do by the environment, which threads share."""
    command = [sys.executable, "-m", PROGRAM, type(builder).__name__]
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(folder),
        # torch calls ninja by name. A worker's PATH may have none, or that of the system.
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(sys.path),  # Ray extends a worker's sys.path, but not its environment
    }
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise ClusterError(
            "DeepSpeed's collective for CPUs cannot be compiled on this node, which needs a C++ compiler (g++). "
            f"Install one, or compile when the node's image is made: python -m {PROGRAM}. The compiler said: {said}"
        )


def _import(name: str, library: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ClusterError(
            f"{library}: cannot be loaded ({error}). Remove it: the next start compiles it again, on this machine."
        ) from error
    return module


def _root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def _fingerprint(builder: Any) -> str:
    """Return a hash of all that a library is compiled from, and of what it is linked with."""
    linked = [torch.__version__, sys.implementation.cache_tag, platform.machine(), *platform.libc_ver()]
    content = hashlib.sha256("\n".join([*linked, *builder.cxx_args()]).encode())
    for source in map(Path, map(builder.deepspeed_src_path, builder.sources())):
        for file in sorted([source, *source.parent.rglob("*.h")]):
            content.update(file.read_bytes())
    return content.hexdigest()[:16]


def main(arguments: list[str]) -> None:
    """Compile the collective. With the name of a builder (internal), let torch compile that where it always does."""
    from deepspeed.accelerator import get_accelerator

    if not arguments:
        load_collective()
    else:
        accelerator: Any = get_accelerator()
        accelerator.create_op_builder(arguments[0]).jit_load(verbose=False)


if __name__ == "__main__":
    main(sys.argv[1:])
