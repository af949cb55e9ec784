"""Commands on a run, and on a submitted job: audit, status, logs."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from betakd_ray.cli.app import Endpoint, app, exit_codes, storage_of
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
    with exit_codes():
        storage = storage_of(endpoint_url)

        from betakd_ray.run import audit as accounts

        found = accounts.audit(run, storage, verify=verify)
    print_table(found.reasons() if quarantined else found.table(by_shard))
    print(f"{run}: {found.state}")
    for problem in found.problems:
        print(f"betakd: {problem}", file=sys.stderr)
    if found.problems:
        raise SystemExit(1)


Which = Annotated[
    str | None,
    typer.Argument(
        help="folder or URL of a run (output.path/name), or the id of a job that was submitted with `ray job submit`; "
        "default: the newest submitted job",
        metavar="[RUN|ID]",
    ),
]
Address = Annotated[str | None, typer.Option(help="http://HEAD:8265; default: RAY_ADDRESS")]
FOLLOW_S = 5.0
"""Seconds between two looks at a run that is followed."""


@app.command()
def status(which: Which = None, address: Address = None, endpoint_url: Endpoint = None) -> None:
    """Say how a run or a submitted job does: its step, ETA, loss and last checkpoint."""
    with exit_codes():
        if _is_run(which):
            from betakd_ray.run.status import status_of

            assert which
            for quantity, value in status_of(which, storage_of(endpoint_url)).rows():
                print(f"{quantity:<16} {value}")
            return

        from betakd_ray.on_ray.submission import Submissions, newest_lines

        jobs = Submissions(address)
        found = jobs.find(which)
        assert found.submission_id
        print(f"{found.submission_id}: {found.status.value}\n{found.message or ''}\n{found.entrypoint}")
        for line in newest_lines("".join(jobs.logs(found.submission_id))):
            print(line)


@app.command()
def logs(
    which: Which = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="print what is new until the job ends")] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Print what a submitted job has printed; for the folder of a run, the lines of its metrics."""
    with exit_codes():
        if _is_run(which):
            assert which
            _print_lines(which, storage_of(endpoint_url), follow=follow)
            return

        from betakd_ray.on_ray.submission import Submissions

        jobs = Submissions(address)
        found = jobs.find(which)
        assert found.submission_id
        for text in jobs.logs(found.submission_id, follow=follow):
            print(text, end="", flush=True)


def _is_run(which: str | None) -> bool:
    """Return whether what was typed is a folder or URL, and not the id of a submitted job."""
    return which is not None and ("/" in which or Path(which).is_dir())


def _print_lines(run: str, storage: StorageSpec, *, follow: bool) -> None:
    from betakd_ray.run.status import lines_of, status_of

    step, goes_on = -1, True
    while goes_on:
        goes_on = follow and status_of(run, storage).state.startswith("running")
        for number, line in lines_of(run, storage, after=step):
            print(line, flush=True)
            step = number
        if goes_on:
            time.sleep(FOLLOW_S)
