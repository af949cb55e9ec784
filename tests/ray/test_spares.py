"""A worker that dies is replaced in a process that has imported everything before."""

import os
import signal
import sys
import time
from typing import Any

import ray

from betakd_ray.on_ray import spares
from betakd_ray.on_ray.spares import importing, keep_spare, processes_like_this

MODULE = "colorsys"  # of the standard library, and imported by nobody else


@ray.remote(num_cpus=0)
class Actor:
    def __init__(self) -> None:
        self.had_imported = MODULE in sys.modules

    def seen(self) -> tuple[int, bool]:
        return os.getpid(), self.had_imported

    def keep_spare(self) -> None:
        spares.SETTLED_S = 0.0
        keep_spare()

    def processes(self) -> tuple[list[int], list[int]]:
        return processes_like_this()


def placed() -> Any:
    return Actor.options(runtime_env={"env_vars": importing("no_such_module", MODULE)}).remote()


def spare_of(actor: Any) -> int:
    """Return the one spare process once it is there."""
    while not (spare := ray.get(actor.processes.remote())[1]):
        time.sleep(0.1)
    return spare[0]


def test_a_successor_is_placed_in_the_spare_process(ray_cluster: str) -> None:
    actor = placed()
    pid, had_imported = ray.get(actor.seen.remote())
    assert had_imported
    for _ in range(2):  # also the successor has one
        ray.get([actor.keep_spare.remote(), actor.keep_spare.remote()])
        spare = spare_of(actor)
        os.kill(pid, signal.SIGKILL)
        actor = placed()
        pid, had_imported = ray.get(actor.seen.remote())
        assert (pid, had_imported) == (spare, True)
    ray.kill(actor)
