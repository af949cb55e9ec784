"""Interfaces between the pool, its clients and the teachers: plain objects with plain methods.

`remote` implements them with Ray actors; tests and benchmarks implement them with threads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.teacher.parts import TeacherFacts

IN_HAND = 3
"""Number of groups that a teacher works on at a time: one is copied in, one is computed, one is copied out."""


class Unanswered(Exception):
    """A teacher died, was silent, or raised (then `is_deadly` is false). The message says which."""

    def __init__(self, reason: str, *, is_deadly: bool = True, detail: str = "") -> None:
        super().__init__(reason)
        self.is_deadly = is_deadly
        self.detail = detail or reason
        """Full text of the failure; its last line says most."""


@runtime_checkable
class Pending(Protocol):
    """Request to a teacher that may not be answered yet."""

    def result(self, timeout_s: float) -> Any:
        """Return the answer. Raises TimeoutError if none comes within `timeout_s`, Unanswered if none will come."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """One teacher, on any node. All methods but `health`, `facts` and `head` return at once.

    These three raise as Pending.result: a teacher may be silent for ever without being dead.
    """

    @property
    def number(self) -> int:
        """Return the number of this teacher; no other teacher of the pool ever gets it."""
        ...

    def submit(self, inputs: ModelInputs) -> Pending:
        """Send a group of samples; the answer is a GroupAnswer."""
        ...

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Pending:
        """Call `function(scorer, *arguments)` in its process; the answer is what the function returns."""
        ...

    def health(self, timeout_s: float) -> float:
        """Return the seconds that it has computed its present group; 0.0 without a group."""
        ...

    def facts(self, timeout_s: float) -> TeacherFacts:
        """Return the teacher's facts."""
        ...

    def head(self, timeout_s: float) -> NDArray[Any] | None:
        """Return the lm_head's weight; None if no hidden states are asked for."""
        ...

    def ready(self) -> Pending:
        """Return a Pending that is answered when the teacher is loaded."""
        ...

    def drain(self, quiet_s: float) -> Pending:
        """Return a Pending that is answered when the teacher has had no group for `quiet_s` seconds."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


@dataclass(frozen=True)
class Roster:
    """Members of the pool at one time."""

    version: int
    """Number that increases with each change of the members."""
    members: Mapping[int, Teacher] | None
    """Teachers by number; None if the client has this version already."""
    is_expecting: bool
    """Whether teachers are being placed, loaded, replaced or leased, so that waiting for a member makes sense."""


@runtime_checkable
class Pool(Protocol):
    """Keeper of the teachers. Its methods raise TeacherError once it has given up."""

    def roster(self, version: int) -> Roster:
        """Return the roster; `version` is the version that the client has already, or -1."""
        ...

    def lost(self, number: int, reason: str) -> bool:
        """Remove a dead or silent teacher; return false if the pool had told it to leave, otherwise true."""
        ...

    def lease(self, holder: str) -> Teacher | None:
        """Return an exclusive teacher for `holder`; None while there is none. To be polled."""
        ...

    def end_lease(self, holder: str, *, is_alive: bool) -> None:
        """Give back the teacher of `holder`, if it has one."""
        ...

    def heartbeat(self, client: str, waiting: float, answers: int, version: int) -> Roster:
        """Report a student's time since its last heartbeat; return the roster.

        `waiting` is the fraction of that time, 0 to 1, that it waited for teachers; `answers` is the number of answers.
        """
        ...
