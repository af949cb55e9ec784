"""The command that publishes a model."""

from typing import Annotated

import typer

from betakd_ray.cli.app import Endpoint, app, exit_codes, storage_of


@app.command()
def push(
    run: Annotated[str, typer.Argument(help="folder of a run, or of a model")],
    repo: Annotated[str, typer.Argument(help="repository on the hub: org/name")],
    public: Annotated[
        bool, typer.Option("--public", help="create it for everyone to see; default: a new repository is private")
    ] = False,
    scores: Annotated[
        str | None, typer.Option(help="evaluation.json, or its folder, for the card; default: that of the run")
    ] = None,
    label: Annotated[str | None, typer.Option(help="the model's label in that evaluation")] = None,
    message: Annotated[str | None, typer.Option(help="message of the commit")] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Upload a model with its card to a Hugging Face hub (HF_ENDPOINT, HF_TOKEN); no checkpoints, data or paths."""
    from betakd_ray.publish import push as upload

    with exit_codes():
        storage = storage_of(endpoint_url)
        done = upload(run, repo, storage=storage, is_private=not public, scores=scores, label=label, message=message)
    print(f"{done.url}: {', '.join(done.files)}")
    if done.left_out:
        print(f"not uploaded: {', '.join(done.left_out)}")
