"""betakd …: parse, call, print."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from betakd_ray.errors import Interrupted, TrainingError, UserError
from betakd_ray.sigterm import answering_sigterm, on_sigterm
from betakd_ray.spec import DataSpec, EvaluationSpec, JobSpec, ModelSpec, PackSpec, StorageSpec, SweepSpec, load_spec

# Commands import what they need themselves: torch and Ray take seconds, and `betakd validate` needs neither.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

SpecPath = Annotated[str, typer.Argument(help="YAML spec: a path, a URL, or - for standard input")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.field=value")]
Endpoint = Annotated[str | None, typer.Option(help="S3 endpoint, for stores other than AWS")]


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error into one message and an exit code.

    The code is 2 for a user's error, 1 for a failed run, and 75 for an interrupted run that can be resumed.
    """
    try:
        yield
    except UserError as error:
        print(f"betakd: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except TrainingError as error:
        print(f"betakd: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as error:
        print(f"betakd: {error}", file=sys.stderr)
        raise SystemExit(os.EX_TEMPFAIL) from None


def job(call: Callable[..., Any]) -> None:
    """Run a `--spec PATH --set key=value` entry point of jobs/."""

    def main(
        spec: Annotated[str, typer.Option("--spec", help="YAML spec: a path, a URL, or - for standard input")],
        overrides: Overrides = [],  # noqa: B006 (typer's way)
    ) -> None:
        with exit_codes():
            call(spec, overrides)

    _make_working_folder_importable()
    with answering_sigterm():
        typer.run(main)


@app.command()
def distill(spec: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Run a distillation job (or fine-tuning, without a teacher) to the end; resumes by name."""
    with exit_codes():
        run_job(spec, overrides)


def run_job(spec: str, overrides: list[str]) -> None:
    """Run the job and print its result."""
    from betakd_ray.job import BetaKDJob

    result = BetaKDJob.from_yaml(spec, overrides).fit()
    Console().print_json(data={"model": result.model, "steps": result.steps, "consumed": result.consumed,
                               "quarantined": result.quarantined, "tail": result.tail,
                               "loss": result.metrics.get("loss")})  # fmt: skip


@app.command()
def validate(spec: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Check a spec's fields, without touching data, models or a cluster."""
    with exit_codes():
        load_spec(spec, overrides)
    print(f"{spec}: valid")


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
    from betakd_ray.forecast.forecast import feasibility, forecast
    from betakd_ray.forecast.samples import AssumedData
    from betakd_ray.job import BetaKDJob

    with exit_codes():
        job = BetaKDJob.from_yaml(spec, [*overrides, f"cluster.address={address}"] if address else overrides)
        assumed = samples and AssumedData(samples, tokens_per_prompt, tokens_per_answer, samples_per_shard)
        print_sections(forecast(job, assumed or None, tflops).rows())
        if address:
            print_sections(feasibility(job.spec))


@app.command()
def check(spec: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Check that the teacher's signal is right, and the student's weights, before a job; exit code 2 if not."""
    with exit_codes():
        run_check(spec, overrides)


def run_check(spec: str, overrides: list[str]) -> None:
    """Check the models of a job, print the table, and raise ModelUnfit with the causes if a check failed."""
    from betakd_ray.check.finding import as_table, require_fit
    from betakd_ray.job import BetaKDJob

    findings = BetaKDJob.from_yaml(spec, overrides).check_models()
    Console(width=None if sys.stdout.isatty() else 1000).print(as_table(findings))
    require_fit(findings)


@app.command()
def schema() -> None:
    """Print the JSON schema of a job spec, for editors."""
    print(json.dumps(JobSpec.model_json_schema(), indent=2))


@app.command()
def pack(spec: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Write a LLaVA-style JSON and its images as checked shards."""
    with exit_codes():
        run_pack(spec, overrides)


def run_pack(spec: str, overrides: list[str]) -> None:
    """Write the shards, and print their number and folder."""
    from betakd_ray.data.pack import pack_from_spec

    parsed = load_spec(spec, overrides, PackSpec)
    shards = pack_from_spec(parsed)
    print(f"{sum(shard.samples for shard in shards)} samples in {len(shards)} shards under {parsed.output}")


@app.command()
def index(shards: list[str], endpoint_url: Endpoint = None) -> None:
    """Write the manifest of shards that have none."""
    from betakd_ray.data.manifest import index_shards

    with exit_codes():
        found = index_shards(shards, StorageSpec(endpoint_url=endpoint_url))
    print(f"{len(found)} shards, {sum(shard.samples for shard in found)} samples")


@app.command()
def inspect(
    shard: str,
    model: Annotated[str | None, typer.Option(help="model whose processor renders the prompts")] = None,
    template: str = "vicuna_v1",
    limit: int = 3,
    endpoint_url: Endpoint = None,
) -> None:
    """Show a shard's samples: keys, sizes and, with --model, the rendered prompt with its answer tokens marked."""
    from betakd_ray.data.manifest import find_shards
    from betakd_ray.data.render import Renderer, Unrenderable
    from betakd_ray.data.samples import BadSample
    from betakd_ray.data.shards import read_shard
    from betakd_ray.models.load import load_processor

    storage = StorageSpec(endpoint_url=endpoint_url)
    console = Console(highlight=False)
    with exit_codes():
        renderer = None
        if model:
            data = DataSpec(train=(shard,), template=template)  # type: ignore[arg-type]
            renderer = Renderer(load_processor(ModelSpec(path=model)), data)
        for sample in read_shard(find_shards([shard], storage)[0], storage):
            if sample.index >= limit:
                break
            if isinstance(sample, BadSample):
                console.print(f"{sample.key}: bad: {sample.reason}", style="red", markup=False)
                continue
            sizes = ", ".join(f"{len(image)} bytes" for image in sample.images) or "text only"
            console.print(f"{sample.key} ({sample.id}): {sizes}", style="bold", markup=False)
            if renderer is None:
                for turn in sample.conversation:
                    console.print(f"  {turn['from']}: {turn['value']}", markup=False)
                continue
            try:
                rendering = renderer.render(sample)
            except Unrenderable as reason:
                console.print(f"  unrenderable: {reason}", style="red", markup=False)
                continue
            tokens = renderer.tokenizer.convert_ids_to_tokens(rendering.input_ids.tolist())
            for token, is_answer in zip(tokens, rendering.answer_mask, strict=True):
                console.print(token, style="bold green" if is_answer else "dim", end=" ", markup=False)
            console.print()


@app.command()
def evaluate(spec: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Answer a packed question set with several models and score them alike."""
    with exit_codes():
        run_evaluation(spec, overrides)


def run_evaluation(spec: str, overrides: list[str]) -> None:
    """Evaluate and print the table."""
    from betakd_ray.evaluation.run import Evaluation
    from betakd_ray.on_ray.cluster import connected

    parsed = load_spec(spec, overrides, EvaluationSpec)
    evaluation = Evaluation(parsed)  # names what is wrong before a cluster starts
    with on_sigterm(evaluation.stop), connected(parsed):
        print_scores(evaluation.run())


@app.command()
def sweep(spec: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Run a grid of jobs on one cluster; cells that are done are not done again."""
    with exit_codes():
        run_sweep(spec, overrides)


def run_sweep(spec: str, overrides: list[str]) -> None:
    """Run the grid and print the table."""
    from betakd_ray.sweep import Sweep

    grid = Sweep(load_spec(spec, overrides, SweepSpec))
    print_table(grid.table(grid.run()))


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


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="checkpoint of LLaVA, MobileVLM V2 or TinyLLaVA: folder, hub id or URL")
    ],
    target: Annotated[Path, typer.Argument(help="new folder")],
    vision_tower: Annotated[str | None, typer.Option(help="vision tower, instead of the one in config.json")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="read tensors from pytorch_model.bin")] = False,
) -> None:
    """Write a checkpoint in its authors' layout as a folder that `path:` in a spec can name."""
    from betakd_ray.models.convert import convert as write

    with exit_codes():
        model = write(source, target, vision_tower=vision_tower, allow_pickle=allow_pickle)
    print(f"{target}: {type(model).__name__}, {model.num_parameters():,} parameters")


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="trained model: folder, hub id or URL")],
    target: Annotated[Path, typer.Argument(help="new folder")],
    tokenizer: Annotated[str, typer.Option(help="original checkpoint whose tokenizer files are copied")],
    format: Annotated[Literal["mobilevlm"], typer.Option(help="layout of the exported model")] = "mobilevlm",
) -> None:
    """Write a MobileVLM as the original tool chain loads it."""
    from betakd_ray.models.export import export_mobilevlm

    with exit_codes():
        export_mobilevlm(source, target, tokenizer)
    print(f"{target}: in the layout of {format}")


def print_scores(scores: dict[str, dict[str, float]]) -> None:
    """Print one row per model and one column per metric; `unanswerable` only if there is such a sample."""
    names = list(dict.fromkeys(name for metrics in scores.values() for name in metrics))
    if not any(metrics.get("unanswerable") for metrics in scores.values()):
        names.remove("unanswerable")
    rows = [[f"{metrics[name]:.4g}" if name in metrics else "" for name in names] for metrics in scores.values()]
    print_table([["model", *names], *([label, *row] for label, row in zip(scores, rows, strict=True))])


def print_table(lines: list[list[str]]) -> None:
    """Print a table; the first of `lines` is its header."""
    table = Table(*(Column(escape(name), overflow="fold") for name in lines[0]))
    for line in lines[1:]:
        table.add_row(*map(escape, line))
    # Without a terminal rich would assume 80 columns, and fold the cells in a log file.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def print_sections(rows: Iterable[tuple[str, str, str]]) -> None:
    """Print rows of (section, quantity, value), with the name of each section above its rows."""
    for section, lines in groupby(rows, key=itemgetter(0)):
        print(section)
        for _, quantity, value in lines:
            print(f"  {quantity:<46} {value}")


def main() -> None:
    """Run the `betakd` command."""
    _make_working_folder_importable()
    with answering_sigterm():
        app()


def _make_working_folder_importable() -> None:
    """Let a spec name modules in the folder where the command is typed.

    Last on the path: a file there that has the name of an installed package, such as torch.py, must not be run for it.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
