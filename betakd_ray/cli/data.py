"""Commands on data: pack, index, inspect."""

from typing import Annotated

import typer
from rich.console import Console

from betakd_ray.cli.app import Endpoint, Overrides, SpecPath, app, exit_codes, storage_of
from betakd_ray.spec import DataSpec, ModelSpec, PackSpec, load_spec
from betakd_ray.spec.loading import parse_options


@app.command()
def pack(spec: SpecPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Write a LLaVA-style JSON and its images as checked shards."""
    with exit_codes():
        run_pack(spec, overrides)


def run_pack(spec: str, overrides: list[str]) -> None:
    """Write the shards, and print their number and folder."""
    parsed = load_spec(spec, overrides, PackSpec)

    from betakd_ray.data.pack import pack_from_spec

    shards = pack_from_spec(parsed)
    print(f"{sum(shard.samples for shard in shards)} samples in {len(shards)} shards under {parsed.output}")


@app.command()
def index(
    shards: Annotated[list[str], typer.Argument(help="paths or URLs of shards, with * and {0..9}")],
    endpoint_url: Endpoint = None,
) -> None:
    """Write the manifest of shards that have none."""
    with exit_codes():
        storage = storage_of(endpoint_url)

        from betakd_ray.data.manifest import index_shards

        found = index_shards(shards, storage)
    print(f"{len(found)} shards, {sum(shard.samples for shard in found)} samples")


@app.command()
def inspect(
    shard: Annotated[str, typer.Argument(help="path or URL of a shard")],
    model: Annotated[str | None, typer.Option(help="model whose processor renders the prompts")] = None,
    template: Annotated[str, typer.Option(help="chat template of the prompts")] = "vicuna_v1",
    limit: Annotated[int, typer.Option(help="number of samples that are shown")] = 3,
    endpoint_url: Endpoint = None,
) -> None:
    """Show a shard's samples: keys, sizes and, with --model, the rendered prompt with its answer tokens marked."""
    console = Console(highlight=False)
    with exit_codes():
        storage = storage_of(endpoint_url)
        data = parse_options(DataSpec, {"train": ("SHARD", shard), "template": ("--template", template)})
        named = parse_options(ModelSpec, {"path": ("--model", model)}) if model else None

        from betakd_ray.data.manifest import find_shards
        from betakd_ray.data.render import Renderer, Unrenderable
        from betakd_ray.data.samples import BadSample
        from betakd_ray.data.shards import read_shard
        from betakd_ray.models.load import load_processor

        renderer = Renderer(load_processor(named), data) if named else None
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
