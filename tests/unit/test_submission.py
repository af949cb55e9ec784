"""`betakd status` and `betakd logs`, against a client that answers as Ray's does."""

from typing import Any

import pytest
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobDetails, JobStatus
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.errors import ClusterError
from betakd_ray.on_ray import submission
from betakd_ray.on_ray.submission import Submissions

JOBS = [
    ("first", "python jobs/distill.py --spec a.yaml", 10),
    ("newest", "betakd distill b.yaml", 30),
    ("stranger", "python train.py", 40),
    (None, "python jobs/distill.py", 50),  # a driver that was not submitted
]


class Client:
    """Fake client with two of our jobs and one job of another user."""

    def __init__(self, address: str | None) -> None:
        if address == "http://nowhere:8265":
            raise ConnectionError("Failed to connect to Ray at address: http://nowhere:8265.")

    def list_jobs(self) -> list[JobDetails]:
        return [
            JobDetails(
                type=JobType.SUBMISSION if name else JobType.DRIVER,
                submission_id=name,
                entrypoint=entrypoint,
                start_time=start_time,
                status=JobStatus.RUNNING,
                message="Job is currently running.",
            )
            for name, entrypoint, start_time in JOBS
        ]

    def get_job_logs(self, job_id: str) -> str:
        return f"all of {job_id}\n"

    async def tail_job_logs(self, job_id: str) -> Any:
        for part in ("first of ", f"{job_id}\n"):
            yield part


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "JobSubmissionClient", Client)


def test_the_newest_of_our_jobs_is_meant_unless_one_is_named() -> None:
    jobs = Submissions()
    assert jobs.find().submission_id == "newest"
    assert jobs.find("stranger").submission_id == "stranger"
    with pytest.raises(
        ClusterError, match="no job third was submitted to this cluster; it knows first, newest, stranger"
    ):
        jobs.find("third")


def test_logs_come_at_once_or_as_they_are_printed() -> None:
    jobs = Submissions()
    assert list(jobs.logs("first")) == ["all of first\n"]
    assert "".join(jobs.logs("first", follow=True)) == "first of first\n"


def test_a_cluster_that_does_not_answer_is_a_users_error() -> None:
    with pytest.raises(ClusterError, match=r"no job server answers at http://nowhere:8265: .* Give --address"):
        Submissions("http://nowhere:8265")


def test_the_commands_print_them() -> None:
    run = CliRunner().invoke
    assert "newest: RUNNING" in run(app, ["status"]).output
    assert run(app, ["logs", "first"]).output == "all of first\n"
    assert run(app, ["logs", "--follow"]).output == "first of newest\n"
    assert run(app, ["status", "--address", "http://nowhere:8265"]).exit_code == 2
