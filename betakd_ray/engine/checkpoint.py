"""DeepSpeed's part of a checkpoint: load it, and convert it to another number of ranks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from betakd_ray.engine import unpickling
from betakd_ray.errors import OutputError
from betakd_ray.run.folder import ENGINE, UNIVERSAL


def load_engine(engine: Any, folder: Path) -> None:
    """Load DeepSpeed's state from a checkpoint (collective: every rank must call it).

    The universal form is loaded if the folder has it. Raises OutputError if the checkpoint is incomplete, or would run
    code when loaded.
    """
    is_universal = (folder / UNIVERSAL).exists()
    tag = UNIVERSAL if is_universal else ENGINE
    # `load_checkpoint` has no argument for the form. The engine reads it from its configuration, which is made before
    # the checkpoint is known.
    engine._config.load_universal_checkpoint = is_universal
    # Not strict: frozen parameters are not in the checkpoint. They come from the models that the spec names.
    with unpickling.tensors_only(folder.name):
        path, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
    if path is None:
        raise OutputError(f"{folder}: DeepSpeed cannot read its part of the checkpoint")


def make_universal(folder: Path) -> None:
    """Add DeepSpeed's universal form, which any number of ranks can load, to a folder with every rank's files."""
    # DeepSpeed refuses to convert a checkpoint that lacks its version entry. The last option adds that entry.
    command = [sys.executable, "-m", unpickling.__name__, "--inject_missing_state"]
    command += ["--input_folder", str(folder / ENGINE), "--output_folder", str(folder / UNIVERSAL)]
    here = {"PYTHONPATH": os.pathsep.join(sys.path)}  # Ray extends a worker's sys.path, but not its environment
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | here)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OutputError(f"{folder.name}: DeepSpeed cannot convert the checkpoint to this number of ranks: {reason}")
