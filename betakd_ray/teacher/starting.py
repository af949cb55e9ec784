"""Teachers that are no members of the pool: they load, prove themselves, finish their groups, or are leased."""

import math
import time
from dataclasses import dataclass, field

from betakd_ray.teacher.ports import Pending, Teacher, Unanswered


@dataclass(frozen=True)
class Starting:
    """A teacher that is no member, and a Pending: that its model is loaded, or that it has finished its groups."""

    teacher: Teacher
    ready: Pending
    until: float = math.inf
    """Time at which it counts as dead if it is not ready, on the monotonic clock in seconds."""

    def is_ready(self) -> bool:
        """Return whether the teacher is ready. Raises Unanswered if it has died."""
        try:
            self.ready.result(timeout_s=0.0)
        except TimeoutError:
            # A teacher that hangs at a group never finishes, and no client may be left to report it.
            if time.monotonic() > self.until:
                raise Unanswered("it did not finish its groups within teacher.timeout_s") from None
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
