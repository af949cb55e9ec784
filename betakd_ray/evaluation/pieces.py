"""Replies as they come in: small files that survive a kill, and from which an evaluation goes on.

Each piece is written whole and holds the replies to some questions. All pieces of a model are in one folder, whose name
is a digest of the model and of how it sees a question; a question is known by a digest too. So a reply is taken up by
every later evaluation that would get the same one, and by no other.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

from betakd_ray.output import output_errors
from betakd_ray.spec import StorageSpec
from betakd_ray.storage import join, make_folder, open_store, replace_file

REPLIES = "replies"
"""Folder of the pieces of all models, in the folder of an evaluation."""
_ENDING = ".json"


@dataclass(frozen=True)
class Reply:
    """What a model said to a question."""

    text: str | None
    """Answer; None if the question could not be asked."""
    reason: str | None = None
    """Reason why it could not be asked."""


_PIECE = TypeAdapter(dict[str, Reply])


class Pieces:
    """The replies of one model. The methods raise OutputError if these can be neither read nor written."""

    def __init__(self, folder: str, storage: StorageSpec, digest: str) -> None:
        self.url = join(folder, REPLIES, digest)
        with output_errors(self.url):
            self._filesystem, self._path = open_store(self.url, storage)
        self._names: list[str] = []

    def read(self) -> dict[str, Reply]:
        """Return digest of a question → reply, of all pieces. A piece that is damaged counts as not there."""
        replies: dict[str, Reply] = {}
        with output_errors(self.url):
            self._names = self._listed()
            for path in self._names:
                try:
                    replies |= _PIECE.validate_json(self._filesystem.cat_file(path))
                except ValidationError:  # its questions are asked again
                    continue
        return replies

    def add(self, replies: Mapping[str, Reply]) -> None:
        """Write a piece. After this call it outlives the process."""
        # A name of its own: two drivers that ask the same questions must not replace each other's pieces.
        path = join(self._path, f"{secrets.token_hex(8)}{_ENDING}")
        content = json.dumps({key: asdict(reply) for key, reply in replies.items()})
        with output_errors(self.url):
            make_folder(self._filesystem, self._path)
            replace_file(self._filesystem, path, content.encode())
        self._names.append(path)

    def join(self, replies: Mapping[str, Reply]) -> None:
        """Replace all known pieces by a single one with these replies."""
        if len(self._names) < 2:
            return
        before, self._names = self._names, []
        self.add(replies)  # first: a kill before the removal leaves the replies twice, and not never
        with output_errors(self.url):
            for path in before:
                if self._filesystem.exists(path):
                    self._filesystem.rm_file(path)

    def _listed(self) -> list[str]:
        try:
            listed = self._filesystem.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path) for path in listed if str(path).endswith(_ENDING))
