"""Manifest of a checkpoint: its files with their sizes and digests."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BeforeValidator

from betakd_ray.run.files import MAX_BYTES, beginning, whole


@dataclass(frozen=True)
class StoredFile:
    """Size and digest of a file in a checkpoint."""

    size: int
    """Size in bytes."""
    sha256: str = ""
    """Hexadecimal digest; empty in checkpoints of versions that stored none. Such a file is compared by its size."""

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        """Read a local file."""
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        return cls(path.stat().st_size, digest)

    @classmethod
    def holding(cls, content: bytes) -> "StoredFile":
        """Return the size and digest of a file with this content."""
        return cls(len(content), hashlib.sha256(content).hexdigest())

    def difference(self, found: "StoredFile") -> str | None:
        """Return a text about how a found file differs from this one; None if it does not."""
        if found.size != self.size:
            return f"{found.size} of {self.size} bytes are there"
        if self.sha256 and found.sha256 != self.sha256:
            return f"its SHA-256 is {found.sha256}, and was {self.sha256} when it was written"
        return None


def _with_digest(value: Any) -> Any:
    """Return an entry of a manifest; in manifests of versions before digests, it is a size alone."""
    return {"size": value} if isinstance(value, int) else value


Files = dict[str, Annotated[StoredFile, BeforeValidator(_with_digest)]]
"""Relative path of each file of a checkpoint → its size and digest."""


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint."""

    name: str
    step: int
    world_size: int
    files: Files
    token: int = 0
    """Token of the lease under which it was written (`run.lease`)."""
    origins: dict[str, str] = field(default_factory=dict)
    """What the run was made from: name → digest or version (`run.claim`). Older versions stored none."""
    sha256: str = field(default="", compare=False)
    """Digest of all the above, as `to_json` stores it; empty in a manifest that was not read, or of an older version.

    Without it a changed bit could make another checkpoint the newest one.
    """

    def __post_init__(self) -> None:
        if self.step < 0 or self.world_size < 1 or any(file.size < 0 for file in self.files.values()):
            raise ValueError("a step, a number of ranks or a size is negative")
        # A download writes each file to folder/file. A manifest from the store must not lead it out of that folder.
        for file in map(PurePosixPath, self.files):
            if file.is_absolute() or ".." in file.parts:
                raise ValueError(f"{file} is outside of the checkpoint")

    @classmethod
    def parse(cls, name: str, content: bytes | None) -> "Manifest":
        """Return the stored manifest of the checkpoint `name`. Raises ValueError if it is none, or another's.

        `content` is None if the file is too large for one.
        """
        if content is None:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        manifest: Manifest = _PARSE(content)
        if manifest.name != name:
            raise ValueError(f"the manifest of {beginning(manifest.name)}")
        if manifest.sha256 and manifest.sha256 != manifest._digest():
            raise ValueError("its own SHA-256 is another than when it was written")
        return manifest

    def to_json(self) -> bytes:
        """Return the content of the manifest's file, with its digest."""
        return json.dumps(asdict(replace(self, sha256=self._digest()))).encode()

    def _digest(self) -> str:
        content = json.dumps(asdict(replace(self, sha256="")), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def missing(self, sizes: Mapping[str, int]) -> str | None:
        """Return the first file that is not in `sizes`, or has another size there; None if there is none.

        `sizes` is relative path → bytes. The returned text also says how many bytes of the file are there.
        """
        for name, file in self.files.items():
            if sizes.get(name) != file.size:
                return f"{name}: {sizes.get(name, 0)} of {file.size} bytes"
        return None


_PARSE = whole(Manifest)
