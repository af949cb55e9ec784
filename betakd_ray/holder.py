"""Who holds a lease or a claim: a process that others can name, and may know to be dead."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease or a claim."""

    host: str
    pid: int
    machine: str = ""
    """Name of the kernel's start and of the process namespace, in which the pid is valid; empty if unknown."""
    started: str = ""
    """Start of the process, in ticks of the kernel. A later process may have the same pid."""

    @classmethod
    def this_process(cls) -> "Holder":
        """Return this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _machine(), _start_of(pid) or "")

    def is_dead(self) -> bool:
        """Return whether the process has surely ended. It is seen only from the machine (or container) it runs in."""
        return (
            bool(self.machine and self.started) and self.machine == _machine() and _start_of(self.pid) != self.started
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _machine() -> str:
    """Return the name of this start of the kernel and of this process's namespace; empty where Linux has neither."""
    try:
        return f"{BOOT.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Return when a process began; None if it has ended, also if its parent has not taken note of that."""
    try:
        # The name of the program comes before, in parentheses, and may hold spaces.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
