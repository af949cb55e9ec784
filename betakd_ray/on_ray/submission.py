"""Access to jobs that were submitted with `ray job submit`, through Ray's own client.

The address and the token come from the same places as for `ray job submit`: RAY_ADDRESS, and RAY_AUTH_MODE with
RAY_AUTH_TOKEN or its file.
"""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.job_submission import JobDetails, JobSubmissionClient

from betakd_ray.errors import ClusterError

OURS = re.compile(r"\bbetakd\b|\bjobs/(distill|sft|sweep|evaluate|pack)\.py\b")
"""Pattern of the entry points of this package."""
_LINES = (r": step \d+/\d+ ", r": checkpoint at step \d+")
"""Patterns of the lines that `betakd_ray.train.view` prints."""


class Submissions:
    """Submitted jobs of one cluster. Every method raises ClusterError if the job server does not answer."""

    def __init__(self, address: str | None = None) -> None:
        with _errors(address):
            self._client: Any = JobSubmissionClient(address)
        self._address = address

    def find(self, submission_id: str | None = None) -> JobDetails:
        """Return a job by its submission id; without an id, the newest job of this package.

        Raises ClusterError if there is no such job.
        """
        with _errors(self._address):
            jobs = [job for job in self._client.list_jobs() if job.submission_id]
        if submission_id:
            found = [job for job in jobs if job.submission_id == submission_id]
        else:
            found = [job for job in jobs if OURS.search(job.entrypoint or "")]
        if not found:
            ids = ", ".join(job.submission_id for job in jobs) or "none"
            raise ClusterError(f"no job {submission_id or 'of betakd'} was submitted to this cluster; it knows {ids}")
        return max(found, key=lambda job: job.start_time or 0)

    def logs(self, submission_id: str, *, follow: bool = False) -> Iterator[str]:
        """Yield what the job has printed; with `follow`, also what it prints until it ends."""
        with _errors(self._address):
            if not follow:
                yield self._client.get_job_logs(submission_id)
                return
            lines = self._client.tail_job_logs(submission_id)
            # One event loop for all lines: the connection belongs to the loop in which it was opened.
            with asyncio.Runner() as runner:
                while (text := runner.run(_next(lines))) is not None:
                    yield text


def newest_lines(log: str) -> list[str]:
    """Return the last line of a job's log about its steps, and the last about a checkpoint."""
    lines = log.splitlines()
    found = (next((line for line in reversed(lines) if re.search(kind, line)), None) for kind in _LINES)
    return [line for line in found if line is not None]


async def _next(lines: Any) -> str | None:
    # A coroutine around `anext`, because `Runner.run` takes no other awaitable.
    return await anext(lines, None)


@contextmanager
def _errors(address: str | None) -> Iterator[None]:
    """Turn errors of Ray's client into ClusterError."""
    try:
        yield
    except (RuntimeError, ConnectionError, OSError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ClusterError(
            f"no job server answers at {address or 'RAY_ADDRESS'}: {said}. Give --address http://HEAD:8265, and the "
            "token, if the cluster has one (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)."
        ) from error
