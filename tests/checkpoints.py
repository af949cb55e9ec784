"""Checkpoints that are committed when the call returns, as a test wants them; jobs store them in a thread."""

from collections.abc import Callable
from pathlib import Path

from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.train.checkpoint import Group, Saver


def save(
    store: CheckpointStore, step: int, attempt: str, keep: int, write: Callable[[Path], None], group: Group = None
) -> None:
    """Save a checkpoint and wait until it is committed. Collective; see `Saver.save`."""
    saver = Saver(store, attempt, keep, group)
    saver.save(step, write)
    saver.wait()
