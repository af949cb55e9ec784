"""Commands on a run, and on a submitted job: audit, status, logs."""

import sys
from typing import Annotated

import typer

from betakd_ray.cli.app import Endpoint, app, exit_codes
from betakd_ray.cli.console import print_table
from betakd_ray.spec import StorageSpec


@app.command()
def audit(
    run: Annotated[str, typer.Argument(help="folder of the run: output.path/name")],
    by_shard: Annotated[bool, typer.Option("--by-shard", help="print one line per shard, not per epoch")] = False,
    quarantined: Annotated[
        bool, typer.Option("--quarantined", help="print each quarantined sample and the reason, and no counts")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="read every file of the newest checkpoint, and compare it with its digest")
    ] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Say where every planned sample went, from a run's files; exit code 1 if they do not add up."""
    from betakd_ray.run import audit as accounts

    with exit_codes():
        found = accounts.audit(run, StorageSpec(endpoint_url=endpoint_url), verify=verify)
    print_table(found.reasons() if quarantined else found.table(by_shard))
    print(f"{run}: {found.state}")
    for problem in found.problems:
        print(f"betakd: {problem}", file=sys.stderr)
    if found.problems:
        raise SystemExit(1)


SubmissionId = Annotated[str | None, typer.Argument(help="default: the newest job of betakd")]
Address = Annotated[str | None, typer.Option(help="http://HEAD:8265; default: RAY_ADDRESS")]


@app.command()
def status(submission_id: SubmissionId = None, address: Address = None) -> None:
    """Say how a job does that was submitted with `ray job submit`."""
    from betakd_ray.on_ray.submission import Submissions

    with exit_codes():
        found = Submissions(address).find(submission_id)
    print(f"{found.submission_id}: {found.status.value}\n{found.message or ''}\n{found.entrypoint}")


@app.command()
def logs(
    submission_id: SubmissionId = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="print new output until the job ends")] = False,
) -> None:
    """Print what a submitted job has printed."""
    from betakd_ray.on_ray.submission import Submissions

    with exit_codes():
        jobs = Submissions(address)
        found = jobs.find(submission_id)
        assert found.submission_id
        for text in jobs.logs(found.submission_id, follow=follow):
            print(text, end="", flush=True)
