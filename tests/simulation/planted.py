"""Bugs that are planted into the real code, to show that the simulation finds them."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from betakd_ray.on_ray import source
from betakd_ray.run import lease
from betakd_ray.run.checkpoint import CheckpointStore, _files
from betakd_ray.run.folder import MANIFEST
from betakd_ray.run.lease import Leases, Permit
from betakd_ray.run.manifest import Manifest, StoredFile
from betakd_ray.storage import join, replace_file
from betakd_ray.train import checkpoint as saving
from betakd_ray.train import loop
from betakd_ray.train.loop import Worker

Plant = Callable[[pytest.MonkeyPatch], None]


def manifest_before_the_files(patch: pytest.MonkeyPatch) -> None:
    """Write the manifest of a checkpoint before its files are in the store."""

    def commit(self: saving.Saver, step: int, folder: Path, before_commit: Callable[[], None]) -> None:
        store, name = self._store, f"step-{step:08d}-{self._attempt}"
        parts = saving.gather({file: StoredFile.of(folder / file) for file in _files(folder)}, self._group)
        if saving.dist.get_rank() == 0:
            manifest = store.manifest(name, step, len(parts), {file: part[file] for part in parts for file in part})
            with store._errors(name):
                replace_file(store.filesystem, join(store.root, name, MANIFEST), manifest.to_json())
        store.upload(folder, name)
        saving.dist.barrier(self._group)

    patch.setattr(saving.Saver, "_commit", commit)


def by_step(patch: pytest.MonkeyPatch) -> None:
    """Let any driver commit, and order checkpoints by step alone."""
    survey = CheckpointStore._survey

    def ordered(self: CheckpointStore) -> Any:
        committed, damaged = survey(self)
        return sorted(committed, key=lambda each: (each.step, each.name)), damaged

    patch.setattr(Permit, "check", lambda self: None)
    patch.setattr(CheckpointStore, "_survey", ordered)


def ledger_not_subtracted(patch: pytest.MonkeyPatch) -> None:
    """Make the stream of the whole plan at each start."""
    patch.setattr(source, "settled_samples", lambda plan, ledger, quarantined: plan.empty_ledger())


def another_checkpoint_loaded(patch: pytest.MonkeyPatch) -> None:
    """Resume from the newest checkpoint, and not from the one that the rows were made for."""
    load = Worker.load

    def newest(self: Worker, name: str) -> None:
        last = self.store.latest()
        load(self, last.name if last else name)

    patch.setattr(Worker, "load", newest)


def copied_in_the_thread(patch: pytest.MonkeyPatch) -> None:
    """Copy the state of a checkpoint in the saver's thread, while the training goes on."""

    def save(self: saving.Saver, step: int, write: Any, before_commit: Any = lambda: None) -> None:
        self.wait()

        def store() -> None:
            with saving.temporary_folder("save") as folder:
                saving.time.sleep(2.0)  # a copy takes time
                write(folder)
                self._commit(step, folder, before_commit)

        self._storing = saving.in_background(store, "checkpoint")

    patch.setattr(saving.Saver, "save", save)


def one_group_for_two_threads(patch: pytest.MonkeyPatch) -> None:
    """Let the saver's thread use the process group of the training."""
    made = saving.Saver.__init__

    def init(self: saving.Saver, *args: Any) -> None:
        made(self, *args)
        self._group = None

    patch.setattr(saving.Saver, "__init__", init)


def newest_pruned(patch: pytest.MonkeyPatch) -> None:
    """Keep the oldest checkpoints instead of the newest."""

    def prune(self: CheckpointStore, keep: int) -> None:
        for manifest in self.committed()[keep:]:
            self._remove(manifest.name)

    patch.setattr(CheckpointStore, "_prune", prune)


def two_hold_the_lease(patch: pytest.MonkeyPatch) -> None:
    """Take a lease over before its holder can renew it, and ignore tokens."""
    by_step(patch)
    patch.setattr(lease, "EXPIRE_S", 1.0)
    patch.setattr(Leases, "require", lambda self, token, nonce="": None)


def lease_overwritten(patch: pytest.MonkeyPatch) -> None:
    """Use a store without conditional writes, and do not read the lease again."""

    def create(self: Leases, token: int, mine: lease.Lease) -> bool:
        self.renew(token, mine)
        return True

    require = Leases.require
    patch.setattr(Leases, "create", create)
    patch.setattr(Leases, "require", lambda self, token, nonce="": require(self, token))


def begun_folders_pruned(patch: pytest.MonkeyPatch) -> None:
    """Remove folders that other workers may be about to commit."""

    def prune(self: CheckpointStore, keep: int) -> None:
        committed = self.committed()
        kept = {manifest.name for manifest in committed[-keep:]}
        for name in sorted({path.partition("/")[0] for path in self._stored()} - kept):
            if committed and int(name.split("-")[1]) <= committed[-1].step:
                self._remove(name)

    patch.setattr(CheckpointStore, "_prune", prune)


def workers_not_replaced(patch: pytest.MonkeyPatch) -> None:
    """Let workers that were taken for dead commit and finish beside others of the same driver."""
    patch.setattr(loop, "require_current", lambda monitor, start, run: None)


def damaged_spec_refused(patch: pytest.MonkeyPatch) -> None:
    """End every driver if the spec in the newest checkpoint is damaged, instead of going on from the one before."""

    def newest_with(self: CheckpointStore, read: Callable[[Any], Any]) -> Any:
        last = self.latest()
        return (last, read(last)) if last else None

    patch.setattr(CheckpointStore, "newest_with", newest_with)


def step_of_the_last_log(patch: pytest.MonkeyPatch) -> None:
    """Store the step of the last metrics beside the exported model, and not that of the model."""
    export = loop.export_student

    def logged(engine: Any, spec: Any, permit: Permit, last: dict[str, Any], group: Any, *, step: int) -> None:
        export(engine, spec, permit, last, group, step=last.get("step", 0))

    patch.setattr(loop, "export_student", logged)


def last_checkpoint_of_another_driver(patch: pytest.MonkeyPatch) -> None:
    """Conclude a job whose last checkpoint another driver has taken, without one of this driver."""
    load = Worker.load

    def own(self: Worker, name: str) -> None:
        load(self, name)
        self.saved_token = self.config.permit.token

    patch.setattr(Worker, "load", own)


def manifest_without_digest(patch: pytest.MonkeyPatch) -> None:
    """Write manifests as versions did that stored no digest of them."""
    patch.setattr(Manifest, "to_json", lambda self: json.dumps(asdict(self)).encode())


PLANTED: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        manifest_before_the_files,
        by_step,
        ledger_not_subtracted,
        another_checkpoint_loaded,
        copied_in_the_thread,
        one_group_for_two_threads,
        newest_pruned,
        two_hold_the_lease,
        lease_overwritten,
        begun_folders_pruned,
        workers_not_replaced,
        damaged_spec_refused,
        manifest_without_digest,
        step_of_the_last_log,
        last_checkpoint_of_another_driver,
    )
}
"""Bug → how it is planted."""
