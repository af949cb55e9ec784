"""Commands on models: convert, export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from betakd_ray.cli.app import app, exit_codes


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
