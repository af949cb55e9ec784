"""All checkpoints of a run at one moment, from one listing: the newest that is whole, and those that are damaged."""

import re
from dataclasses import dataclass

from betakd_ray.errors import OutputError
from betakd_ray.run.folder import DAMAGED
from betakd_ray.run.manifest import Manifest

_NAME = re.compile(r"step-(\d+)-.+")


@dataclass(frozen=True)
class Survey:
    """The checkpoints that were there when the store was asked."""

    url: str
    committed: list[Manifest]
    """Every committed checkpoint that is not known to be damaged, the newest last."""
    damaged: dict[str, str]
    """Checkpoints that are known to be damaged, and so do not count: name → what is wrong."""

    def newest(self) -> Manifest | None:
        """Return the checkpoint to resume from; None if none was committed. Raises OutputError if all are damaged."""
        if self.damaged and not self.committed:
            # To begin again at step 0, and overwrite what is left, is the user's decision.
            raise OutputError(
                f"{self.url}: every checkpoint is damaged: {'; '.join(self.damaged.values())}. Restore one of these "
                f"folders (without its {DAMAGED}), or start a new run under another `name`."
            )
        return self.committed[-1] if self.committed else None

    def loss(self) -> str:
        """Return a text about damaged checkpoints newer than the one to resume from; empty if there are none."""
        newest = self.committed[-1] if self.committed else None
        newer = {name: why for name, why in self.damaged.items() if newest and step_of(name) > newest.step}
        if not newest or not newer:
            return ""
        return (
            f"{self.url}: {'; '.join(newer.values())}. The job goes on from {newest.name}, the newest checkpoint that "
            f"is whole. The {max(map(step_of, newer)) - newest.step} steps after it are done again."
        )


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint's folder; -1 for another folder."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else -1
