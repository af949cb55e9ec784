"""Teachers that are no members of the pool: they load, prove themselves, finish their groups, or are leased."""

import time
from dataclasses import dataclass, field

from betakd_ray.teacher.ports import Pending, Teacher


@dataclass(frozen=True)
class Starting:
    """A teacher that is no member, and a Pending: that its model is loaded, or that it has finished its groups."""

    teacher: Teacher
    ready: Pending

    def is_ready(self) -> bool:
        """Return whether the teacher is ready. Raises Unanswered if it has died."""
        try:
            self.ready.result(timeout_s=0.0)
        except TimeoutError:
            return False
        return True


@dataclass
class Lease:
    """An exclusive teacher of one student."""

    holder: str
    """Client and number of the examination."""
    starting: Starting
    seen: float = field(default_factory=time.monotonic)
    """Time of the holder's last request or heartbeat, on the monotonic clock in seconds."""
