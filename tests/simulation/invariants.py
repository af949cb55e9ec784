"""What must hold after each change of the store, and at the end of a schedule."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from betakd_ray.data.ledger import Ledger
from betakd_ray.data.plan import Quarantined, ids_of
from betakd_ray.run.audit import audit
from betakd_ray.run.checkpoint import CheckpointStore
from betakd_ray.run.folder import (
    CHECKPOINTS,
    DAMAGED,
    LEDGER,
    MANIFEST,
    MODEL,
    MODEL_RECORD,
    PROGRESS,
    QUARANTINE,
    RESULT,
    TAIL,
)
from betakd_ray.run.manifest import Manifest
from betakd_ray.spec import StorageSpec
from tests.simulation.job import BATCH, RUN, ids
from tests.simulation.scheduler import Thread, Violation
from tests.simulation.store import Objects, highest_token, is_replaced

ROOT = RUN.removeprefix("simulated://")
OUTCOME = (RESULT, TAIL, QUARANTINE, f"{MODEL}/{MODEL_RECORD}")
"""Files in which the audit may find a problem if a driver that was replaced has written one of them late."""


@dataclass
class Invariants:
    """The invariants of one schedule, and what they need to know of its past."""

    objects: Objects
    newest: Manifest | None = None
    checked: set[str] = field(default_factory=set)
    """Checkpoints whose content was compared once; their files do not change without a check."""
    touched: set[str] = field(default_factory=set)
    """Checkpoints in which a schedule has changed a byte."""
    committed: dict[str, Manifest] = field(default_factory=dict)
    """Manifests as they were written."""
    late: list[str] = field(default_factory=list)
    """Files of the outcome that a driver has written after it was replaced."""

    def check(self, path: str) -> None:
        """Check what the change of `path` may have broken."""
        name = path.removeprefix(f"{ROOT}/")
        with self.objects.scheduler.standing_still() as thread:
            if name.startswith(f"{CHECKPOINTS}/"):
                self._check_checkpoints(name.split("/")[1], name.rpartition("/")[2])
            if thread and (name in OUTCOME or name.endswith(f"/{MANIFEST}")):
                self._note_writer(name, thread)

    def _check_checkpoints(self, name: str, file: str) -> None:
        is_of_newest = self.newest is not None and name == self.newest.name
        if file not in (MANIFEST, DAMAGED) and not is_of_newest:
            return
        before, now = self.newest, self._latest()
        if before and before.name not in self.touched and before.name not in self._rejected():
            if now is None:
                raise Violation(f"{before.name} was the newest checkpoint, and now there is none")
            if (now.token, now.step) < (before.token, before.step):
                raise Violation(f"the newest checkpoint went back from {_named(before)} to {_named(now)}")
        self.newest = now
        if now and now != self.committed.setdefault(now.name, now):
            raise Violation(f"a damaged manifest counts: {_named(now)} was another when it was committed")
        if now and now.name not in self.touched:
            self._require_whole(now)

    def _latest(self) -> Manifest | None:
        committed = CheckpointStore(RUN, StorageSpec()).committed()
        return committed[-1] if committed else None

    def _rejected(self) -> set[str]:
        found = CheckpointStore(RUN, StorageSpec()).survey().damaged
        if unexpected := found.keys() - self.touched:
            raise Violation(f"a checkpoint was rejected that was never damaged: {found[min(unexpected)]}")
        return set(found)

    def _content(self, manifest: Manifest, file: str) -> bytes | None:
        return self.objects.files.get(f"{ROOT}/{CHECKPOINTS}/{manifest.name}/{file}")

    def _require_whole(self, manifest: Manifest) -> None:
        """Raise Violation unless every file of a checkpoint is as it was written, and its samples add up."""
        for file, stored in manifest.files.items():
            content = self._content(manifest, file)
            if content is None or len(content) != stored.size:
                raise Violation(f"{_named(manifest)} is the newest checkpoint, and {file} is not whole")
            if manifest.name not in self.checked and hashlib.sha256(content).hexdigest() != stored.sha256:
                raise Violation(f"{_named(manifest)} is the newest checkpoint, and {file} has another content")
        if manifest.name not in self.checked:
            self.checked.add(manifest.name)
            self._require_exact(manifest)

    def _require_exact(self, manifest: Manifest) -> None:
        """Raise Violation unless the ledger has each sample that the student was trained on, and each once."""
        trained = [
            tuple(place)
            for file in manifest.files
            if file.startswith("trained-")
            for place in json.loads(self._content(manifest, file) or b"")
        ]
        if again := [place for place, times in Counter(trained).items() if times > 1]:
            raise Violation(f"{_named(manifest)}: trained twice on {again}")
        ledger = Ledger.from_json(self._content(manifest, LEDGER) or b"")
        if ledger.count != len(trained) or not ledger.holds(ids(trained)).all():
            raise Violation(f"{_named(manifest)}: {ledger.count} samples in its ledger, {len(trained)} trained")
        lines = (self._content(manifest, QUARANTINE) or b"").splitlines()
        bad = [Quarantined(**json.loads(line)) for line in lines]
        if ledger.holds(ids_of(bad)).any():
            raise Violation(f"{_named(manifest)}: a sample is in quarantine and was trained on")
        dropped = json.loads(self._content(manifest, PROGRESS) or b"")["dropped"]
        if len(trained) + dropped != manifest.step * BATCH or dropped > len(bad):
            raise Violation(f"{_named(manifest)}: {len(trained)} trained, {dropped} dropped: not {BATCH} a step")

    def _note_writer(self, name: str, thread: Thread) -> None:
        """Note a write by a driver or a worker that was replaced. Raise Violation if it had been told before."""
        process = thread.process
        if process.token_held < highest_token(self.objects.files) or is_replaced(process):
            self.late.append(name)
            if thread.is_told:
                raise Violation(f"{thread.name} writes {name}, though it had found that it was replaced")

    # ---------------------------------------------------------------------------------------------- the end

    def check_end(self) -> list[str]:
        """Check a finished run with the audit; return problems that only a late write explains."""
        found = audit(RUN, StorageSpec())
        if not found.is_finished:
            raise Violation("a driver has finished the job, and there is no result")
        damaged = tuple(f"{RUN}/{CHECKPOINTS}/{name} is damaged" for name in self.touched)
        problems = [text for text in found.problems if not text.startswith(damaged)]
        unexplained = [text for text in problems if not (self.late and text.startswith(OUTCOME))]
        if unexplained:
            raise Violation(f"the audit finds: {'; '.join(unexplained)}")
        return problems


def _named(manifest: Manifest) -> Any:
    return f"{manifest.name} (token {manifest.token})"
