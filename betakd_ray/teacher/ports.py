"""What pool and client see of each other and of a teacher: plain objects with plain methods.

`remote` has them as Ray's actors; tests and benchmarks have them as threads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.teacher.parts import TeacherFacts

IN_HAND = 3
"""Groups that a teacher has in hand at a time: one on its way in, one being computed, one on its way out."""


class Unanswered(Exception):
    """A teacher died, stayed silent, or (then it is not `is_deadly`) raised; the message says which."""

    def __init__(self, reason: str, *, is_deadly: bool = True, detail: str = "") -> None:
        super().__init__(reason)
        self.is_deadly = is_deadly
        self.detail = detail or reason
        """All that is known of it; the last line says most."""


@runtime_checkable
class Pending(Protocol):
    """Something that a teacher was asked for."""

    def result(self, timeout_s: float) -> Any:
        """Return the answer. Raises TimeoutError while there is none, and Unanswered if there will be none."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """One teacher, wherever it runs. All but `health`, `facts`, `head` return at once."""

    @property
    def number(self) -> int:
        """Never given to another."""
        ...

    def submit(self, inputs: ModelInputs) -> Pending:
        """Send a group of samples; the answer is a GroupAnswer."""
        ...

    def health(self, timeout_s: float) -> float:
        """Return the seconds that it has worked on its present group, 0.0 without one. Raises as Pending.result."""
        ...

    def facts(self) -> TeacherFacts:
        """Raises Unanswered."""
        ...

    def head(self) -> NDArray[Any] | None:
        """Return the lm_head's weight, where hidden states travel. Raises Unanswered."""
        ...

    def ready(self) -> Pending:
        """Ask to be told when it is loaded."""
        ...

    def drain(self, quiet_s: float) -> Pending:
        """Ask to be told when nobody has asked it anything for so long."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


@dataclass(frozen=True)
class Roster:
    """Who is in the pool."""

    version: int
    """Another one for each change of the members."""
    members: Mapping[int, Teacher] | None
    """Teachers by number; None if the caller has this version already."""
    is_expecting: bool
    """Whether teachers are being placed, loaded, replaced or lent, so that there will be some who waits for them."""


@runtime_checkable
class Pool(Protocol):
    """The keeper of the teachers. Every method raises TeacherError once it has given up."""

    def roster(self, version: int) -> Roster:
        """Return who is in; `version` is the one that is known already."""
        ...

    def lost(self, number: int, reason: str) -> bool:
        """Take out a teacher that is dead or silent; returns whether that is news, or (false) it was told to leave."""
        ...

    def lease(self, holder: str) -> Teacher | None:
        """Return a teacher for `holder` alone; None while there is none: to be asked again and again."""
        ...

    def end_lease(self, holder: str, *, is_alive: bool) -> None:
        """Give it back, if there is one."""
        ...

    def heartbeat(self, client: str, waiting: float, answers: int, version: int) -> Roster:
        """Report the share of its time that a student waited for teachers, and how many answers it got."""
        ...
