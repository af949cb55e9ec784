"""Where a model comes from, as far as a public card may say: its hub id, and the licence in its own card."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from huggingface_hub import ModelCard, hf_hub_download

from betakd_ray.data.files import store_errors
from betakd_ray.errors import DataError
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, open_store

README = "README.md"
SECONDS = 5.0
"""Limit in seconds of a question to the hub for a card."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Origin:
    """A model from which another was made."""

    name: str
    """Hub id, or the last part of a path or URL."""
    hub_ids: tuple[str, ...]
    """Ids on the hub: its own, or those that its card names as its base."""
    licence: str | None
    """Licence in its card; None if it has no card, or the card names none."""

    def __str__(self) -> str:
        place = f"`{self.name}`" if self.name in self.hub_ids else f"`{self.name}` (not from a hub)"
        return f"{place}, licence: {self.licence or 'unknown'}"


def origin_of(path: str, revision: str | None, storage: StorageSpec) -> Origin:
    """Return where the model at a folder, hub id or URL comes from. A card that cannot be read counts as none."""
    card = _card(path, revision, storage)
    licence = None
    if card is not None:
        data = card.data
        named = data.get("license")
        licence = data.get("license_name") or named if named == "other" else named
        licence = None if licence == "unknown" else licence
    if is_hub_id(path):
        return Origin(path, (path,), licence)
    bases = card.data.get("base_model") if card is not None else None
    ids = (bases,) if isinstance(bases, str) else tuple(bases or ())
    return Origin(last_part(path), tuple(each for each in ids if is_hub_id(each)), licence)


def is_hub_id(path: str) -> bool:
    """Return whether a model's path is the name of a repository, and not a folder or a URL."""
    return "://" not in path and not Path(path).is_absolute() and bool(_HUB_ID.fullmatch(path))


def last_part(path: str) -> str:
    """Return the last part of a path or URL: the rest may name people and machines."""
    return path.rstrip("/").rpartition("/")[2]


def _card(path: str, revision: str | None, storage: StorageSpec) -> ModelCard | None:
    text = _readme(path, revision, storage)
    if text is None:
        return None
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except ValueError:  # its metadata are not YAML
        return None


def _readme(path: str, revision: str | None, storage: StorageSpec) -> str | None:
    if is_hub_id(path):
        try:
            file = hf_hub_download(path, README, revision=revision, etag_timeout=SECONDS)
        # Whatever the network raises: a job must not fail at its end for want of a licence, and the card says that it
        # is unknown.
        except Exception:
            return None
        return Path(file).read_text(encoding="utf-8", errors="replace")
    url = join(path, README)
    try:
        with store_errors(url, storage):
            filesystem, place = open_store(url, storage)
            return cast(bytes, filesystem.cat_file(place)).decode("utf-8", errors="replace")
    except (FileNotFoundError, DataError):
        return None
