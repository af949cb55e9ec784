"""Commands on a job before it runs, and on many of them: validate, plan, check, sweep."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from betakd_ray.check.open_mappings import check_open_mappings
from betakd_ray.cli.app import Overrides, SpecPath, app, exit_codes
from betakd_ray.cli.console import print_sections, print_table
from betakd_ray.cli.init import Kind
from betakd_ray.spec import JobSpec, SweepSpec, load_spec, parse_spec
from betakd_ray.spec.advice import advice
from betakd_ray.spec.grid import cells_of
from betakd_ray.spec.loading import KINDS, kind_of, read_spec


@app.command()
def validate(
    spec: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    kind: Annotated[Kind | None, typer.Option(help="kind of spec; default: told by its fields")] = None,
) -> None:
    """Check the fields of a spec of any kind, without touching data, models or a cluster."""
    with exit_codes():
        tree, origin = read_spec(spec, overrides)
        found = kind or kind_of(tree)
        parsed = parse_spec(tree, KINDS[found], origin)
        jobs = [parsed] if isinstance(parsed, JobSpec) else []
        if isinstance(parsed, SweepSpec):
            jobs = [cell.job for cell in cells_of(parsed, parsed.output.path)]
            found = f"{found} of {len(jobs)} cells"
        for each in jobs:
            check_open_mappings(each)
    print(f"{spec}: valid ({found})")


@app.command()
def plan(
    spec: SpecPath,
    overrides: Overrides = [],  # noqa: B006
    samples: Annotated[
        int | None, typer.Option(min=1, help="assume this number of samples, and do not read the data")
    ] = None,
    tokens_per_answer: Annotated[int, typer.Option(min=1, help="assumed with --samples")] = 128,
    tokens_per_prompt: Annotated[
        int, typer.Option(min=0, help="assumed with --samples, in addition to image and template")
    ] = 64,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="assumed with --samples")] = 10_000,
    tflops: Annotated[
        float | None, typer.Option(help="assume these sustained TFLOP/s per GPU, and print speeds")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="check for room on the cluster at HOST:6379, instead of cluster.address")
    ] = None,
) -> None:
    """Say what a job will take, and what is wrong with it; with --address also whether that cluster has room for it."""
    with exit_codes():
        parsed = load_spec(spec, [*overrides, f"cluster.address={address}"] if address else overrides)

        # After the spec was read: they take seconds, and an error in it takes none.
        from betakd_ray.forecast.forecast import feasibility, forecast
        from betakd_ray.forecast.samples import AssumedData
        from betakd_ray.job import BetaKDJob

        job = BetaKDJob(parsed)
        assumed = samples and AssumedData(samples, tokens_per_prompt, tokens_per_answer, samples_per_shard)
        found = forecast(job, assumed or None, tflops)
        print_sections(found.rows())
        for text in advice(parsed, found.plan.samples):
            print(f"betakd: note: {text}", file=sys.stderr)
        if address:
            print_sections(feasibility(job.spec))


@app.command()
def check(spec: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Check that the teacher's signal is right, and the student's weights, before a job; exit code 2 if not."""
    with exit_codes():
        run_check(spec, overrides)


def run_check(spec: str, overrides: list[str]) -> None:
    """Check the models of a job, print the table, and raise ModelUnfit with the causes if a check failed."""
    parsed = load_spec(spec, overrides)

    from betakd_ray.check.finding import as_table, require_fit
    from betakd_ray.job import BetaKDJob

    findings = BetaKDJob(parsed).check_models()
    Console(width=None if sys.stdout.isatty() else 1000).print(as_table(findings))
    require_fit(findings)


@app.command()
def sweep(spec: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Run a grid of jobs on one cluster; cells that are done are not done again."""
    with exit_codes():
        run_sweep(spec, overrides)


def run_sweep(spec: str, overrides: list[str]) -> None:
    """Run the grid and print the table."""
    parsed = load_spec(spec, overrides, SweepSpec)
    cells_of(parsed, parsed.output.path)  # names what is wrong before Ray is imported

    from betakd_ray.sweep import Sweep

    grid = Sweep(parsed)
    print_table(grid.table(grid.run()))
