"""A checkpoint that another process prunes while it is read is gone, and not damaged."""

from pathlib import Path

import pytest

from betakd_ray.errors import CheckpointDamaged, OutputUnreachable
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.folder import CHECKPOINTS, MANIFEST
from betakd_ray.run.manifest import Manifest
from betakd_ray.spec import StorageSpec


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "run"), StorageSpec())


def committed(store: CheckpointStore, tmp_path: Path, step: int) -> Manifest:
    local = tmp_path / f"local-{step}"
    local.mkdir()
    for name in ("a.bin", "b.bin"):
        (local / name).write_bytes(bytes([step]) * 9)
    name = f"step-{step:08d}-a"
    manifest = store.manifest(name, step, 1, store.upload(local, name))
    store.commit(manifest)
    return manifest


def test_a_checkpoint_that_was_pruned_meanwhile_is_not_damaged(store: CheckpointStore, tmp_path: Path) -> None:
    first, _ = (committed(store, tmp_path, step) for step in (1, 2))
    store.prune(keep=1)
    with pytest.raises(OutputUnreachable, match="there is a newer checkpoint"):
        store.require_stored(first)


@pytest.mark.parametrize(
    ("removed", "error"),
    [((MANIFEST,), None), ((MANIFEST, "a.bin"), OutputUnreachable), (("a.bin",), CheckpointDamaged)],
)
def test_what_is_missing_tells_a_prune_that_has_begun_from_damage(
    store: CheckpointStore, tmp_path: Path, removed: tuple[str, ...], error: type[Exception] | None
) -> None:
    manifest = committed(store, tmp_path, 1)
    for file in removed:
        (tmp_path / "run" / CHECKPOINTS / manifest.name / file).unlink()
    if error is None:  # its files are whole, so it can be read
        store.require_stored(manifest)
        return
    with pytest.raises(error):
        store.require_stored(manifest)
