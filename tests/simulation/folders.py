"""Local folders in memory, because a schedule writes hundreds of files."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONTENTS: dict[str, bytes] = {}
"""Path → content of every local file of the schedule that runs."""
_NUMBERS = count()


class MemoryPath(type(Path())):  # the class of this system, as Path itself cannot be subclassed in Python 3.11
    """A path whose file is in `CONTENTS`."""

    def open(self, *_: Any, **__: Any) -> Any:
        return io.BytesIO(CONTENTS[str(self)])

    def stat(self, **_: Any) -> Any:
        return SimpleNamespace(st_size=len(CONTENTS[str(self)]))

    def exists(self, **_: Any) -> bool:
        return str(self) in CONTENTS

    def is_file(self) -> bool:
        return str(self) in CONTENTS

    def write_text(self, data: str, *_: Any, **__: Any) -> int:
        CONTENTS[str(self)] = data.encode()
        return len(data)

    def read_text(self, *_: Any, **__: Any) -> str:
        return CONTENTS[str(self)].decode()

    def rglob(self, *_: Any, **__: Any) -> Any:
        start = f"{self}/"
        return [type(self)(path) for path in list(CONTENTS) if path.startswith(start)]

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Do nothing: these folders exist."""

    def replace(self, target: Any) -> Any:
        CONTENTS[str(target)] = CONTENTS.pop(str(self))
        return target


@contextmanager
def folder(purpose: Any) -> Iterator[MemoryPath]:
    """Yield a new folder, in place of `temporary_folder` and `owned`."""
    # In a folder that exists, because the code asks how much space is left there.
    made = MemoryPath(f"/tmp/{Path(str(purpose)).name}-{next(_NUMBERS)}")
    try:
        yield made
    finally:
        for path in made.rglob("*"):
            del CONTENTS[str(path)]
