"""Commands on data: pack, index, inspect."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from betakd_ray.cli.app import Anonymous, Endpoint, Overrides, Region, app, exit_codes, storage_of
from betakd_ray.errors import DataError, SpecError, did_you_mean, shortened
from betakd_ray.spec import DataSpec, ModelSpec, PackSpec, load_spec, parse_spec
from betakd_ray.spec.loading import apply_overrides, parse_options
from betakd_ray.spec.origin import FieldPath, Origin
from betakd_ray.spec.tasks import SOURCE_FORMATS

BAD_FRACTION = 0.01
"""Share of bad samples from which `index` writes no manifest by itself: the default of data.max_bad_fraction."""
SOURCES = {
    "scienceqa": "betakd_ray.evaluation.benchmarks.scienceqa:scienceqa_records",
    "scienceqa_img": "betakd_ray.evaluation.benchmarks.scienceqa:scienceqa_image_records",
}
"""Data set as published, for `pack --from` → its function of (folder, folder of the images, split)."""

KeepGoing = Annotated[bool, typer.Option("--keep-going", help="leave bad samples out, and go on with the good ones")]
Strict = Annotated[bool, typer.Option("--strict", help="stop if any sample is bad or any member is not read")]


@app.command()
def pack(
    source: Annotated[
        str | None,
        typer.Argument(help="YAML spec (path, URL or -), or the data: JSON, CSV, parquet, a folder of them, shards"),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="folder for the shards; with data in place of a spec")
    ] = None,
    images: Annotated[str | None, typer.Option(help="folder that names of images are relative to")] = None,
    form: Annotated[str | None, typer.Option("--format", help=f"one of {', '.join(SOURCE_FORMATS)}")] = None,
    keys: Annotated[str | None, typer.Option("--map", help="question=KEY,answer=KEY,image=KEY")] = None,
    origin: Annotated[str | None, typer.Option("--from", help=f"a data set as published: {', '.join(SOURCES)}")] = None,
    split: Annotated[str, typer.Option(help="with --from")] = "train",
    prefix: Annotated[str | None, typer.Option(help="first part of the shards' names; default: train")] = None,
    split_turns: Annotated[bool, typer.Option("--split-turns", help="make each answer a sample of its own")] = False,
    keep_going: KeepGoing = False,
    strict: Strict = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write records and their images as checked shards: from a spec, or from data with --out.

    All records are looked at first; without --keep-going, none is packed if one is bad.
    """
    with exit_codes():
        flags = {"output": out, "images": images, "format": form, "map": _mapping(keys), "prefix": prefix}
        flags |= {"split_turns": split_turns or None, "on_bad": _on_bad(keep_going, strict)}
        given = {name: value for name, value in flags.items() if value is not None}
        spec = _pack_spec(source, origin, given, overrides)
        _pack(spec, _records_of(origin, spec, split))


def run_pack(spec: str, overrides: list[str]) -> None:
    """Write the shards of a spec, and print their number and folder."""
    _pack(load_spec(spec, overrides, PackSpec))


def _pack(spec: PackSpec, rows: Any = None) -> None:
    from betakd_ray.data.pack import pack_from_spec

    def report(summary: Any) -> None:
        if summary.bad and spec.on_bad == "skip":
            print("\n".join(summary.lines()), file=sys.stderr)

    shards = pack_from_spec(spec, report, rows)
    print(f"{sum(shard.samples for shard in shards)} samples in {len(shards)} shards under {spec.output}")


def _pack_spec(source: str | None, origin: str | None, given: dict[str, Any], overrides: list[str]) -> PackSpec:
    """Return the spec of a YAML file with the flags in it, or one that is made of the flags alone."""
    if source is None:
        raise SpecError("name the data to pack, or a YAML spec: betakd pack train.json --images DIR --out DIR")
    is_spec = origin is None and (source == "-" or source.endswith((".yaml", ".yml")))
    if is_spec:
        parsed = load_spec(source, overrides, PackSpec)
        return parse_spec(parsed.model_dump(exclude_unset=True) | given, PackSpec, source=source) if given else parsed
    if "output" not in given:
        raise SpecError(f"{source}: give --out FOLDER, where the shards are written; or name a spec in YAML.")
    published = {"images": source} if origin else {}
    tree: dict[str, Any] = {"conversations": source, **published, **given}
    origin_of_values = apply_overrides(tree, overrides, Origin("betakd pack"))
    return parse_spec(tree, PackSpec, origin_of_values)


def _mapping(keys: str | None) -> dict[str, str] | None:
    if keys is None:
        return None
    pairs = [pair.partition("=") for pair in keys.split(",") if pair.strip()]
    if wrong := [name for name, separator, key in pairs if not (separator and name.strip() and key.strip())]:
        raise SpecError(f"--map: {wrong[0]!r} is not FIELD=KEY; write question=KEY,answer=KEY,image=KEY")
    return {name.strip(): key.strip() for name, _, key in pairs}


def _on_bad(keep_going: bool, strict: bool) -> str | None:
    if keep_going and strict:
        raise SpecError("--keep-going and --strict are opposites; give one of them")
    return "skip" if keep_going else "stop" if strict else None


def _records_of(origin: str | None, spec: PackSpec, split: str) -> Iterator[tuple[str, Any]] | None:
    """Return the records of a data set as published; None for one that is packed by its format."""
    if origin is None:
        return None
    if origin not in SOURCES:
        hint = did_you_mean(origin, SOURCES)
        raise SpecError(
            f"--from: there is no data set {origin!r}; "
            + (f"{hint} " if hint else "")
            + f"known are {', '.join(SOURCES)}"
        )

    from betakd_ray.evaluation.question_files import DataFolder
    from betakd_ray.plugins import load

    folder = DataFolder(spec.conversations, spec.storage)
    images = DataFolder(spec.images, spec.storage) if spec.images else folder
    records = load(SOURCES[origin], "--from")(folder, images, split)
    return ((f"{spec.conversations}, {split} {number}", record) for number, record in enumerate(records, 1))


@app.command()
def index(
    shards: Annotated[list[str], typer.Argument(help="paths, URLs, globs or folders")],
    endpoint_url: Endpoint = None,
    region: Region = None,
    anonymous: Anonymous = False,
    manifest: Annotated[
        str | None, typer.Option(help="write the manifest here, for a folder that cannot be written; see data.manifest")
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="write the manifest whatever the share of bad samples")
    ] = False,
    strict: Strict = False,
) -> None:
    """Look at all samples of shards that have no manifest, say what is wrong with them, and write the manifest.

    Bad samples stay in their shards and are put into quarantine by a job; more than 1% of them is an error.
    """
    from betakd_ray.data.manifest import index_shards

    def judge(survey: Any) -> None:
        said = list(survey.lines())
        is_bad = survey.bad_fraction > BAD_FRACTION and not keep_going
        if is_bad or (strict and (survey.bad or survey.unread)):
            raise DataError("\n".join([*said, "No manifest was written. " + _REMEDY]))
        for line in said[1:]:
            print(line, file=sys.stderr)

    with exit_codes():
        _on_bad(keep_going, strict)
        place = _location("--manifest", manifest) if manifest else None
        found = index_shards(shards, storage_of(endpoint_url, region, anonymous), place, judge)
        print(f"{len(found)} shards, {sum(shard.samples for shard in found)} samples")
        if place:
            print(f"manifest: {place}; name it in the spec as data.manifest")


_REMEDY = (
    "Repair the samples; or pack the good ones into new shards with `betakd pack SHARDS --out FOLDER --keep-going`; or "
    "write it all the same with --keep-going, and set data.max_bad_fraction in the spec."
)


def _location(option: str, path: str) -> str:
    return parse_options(DataSpec, {"train": (option, path)}).paths[0]


@app.command()
def inspect(
    shard: Annotated[str, typer.Argument(help="a shard, a glob or a folder; of several shards, the first is shown")],
    model: Annotated[str | None, typer.Option(help="model whose processor renders the prompts")] = None,
    template: Annotated[str, typer.Option(help="vicuna_v1, plain, chat or module:name")] = "vicuna_v1",
    limit: Annotated[int, typer.Option(min=1, help="number of samples that are shown")] = 3,
    overrides: Annotated[list[str], typer.Option("--set", help="field of the section data, e.g. max_length=512")] = [],  # noqa: B006
    endpoint_url: Endpoint = None,
    region: Region = None,
    anonymous: Anonymous = False,
    manifest: Annotated[str | None, typer.Option(help="see data.manifest")] = None,
) -> None:
    """Show a shard's samples: keys, sizes and, with --model, the prompt and what the model learns."""
    console = Console(highlight=False)
    with exit_codes():
        storage = storage_of(endpoint_url, region, anonymous)
        place = _location("--manifest", manifest) if manifest else None
        data = _data_of(shard, template, overrides)
        named = parse_options(ModelSpec, {"path": ("--model", model)}) if model else None

        from betakd_ray.data.manifest import find_shards
        from betakd_ray.data.shards import read_shard

        show = _renderings(named, data) if named else _conversation
        for sample in read_shard(find_shards(data.paths, storage, place)[0], storage):
            if sample.index >= limit:
                break
            _show(console, sample, show)


def _data_of(shard: str, template: str, overrides: list[str]) -> DataSpec:
    tree: dict[str, Any] = {"train": shard, "template": template}
    typed: dict[FieldPath, str] = {("train",): f"SHARD {shard}", ("template",): f"--template {shortened(template)}"}
    origin = apply_overrides(tree, [each.removeprefix("data.") for each in overrides], Origin("inspect", options=typed))
    return parse_spec(tree, DataSpec, origin)


def _show(console: Console, sample: Any, show: Any) -> None:
    from betakd_ray.data.samples import BadSample

    if isinstance(sample, BadSample):
        console.print(f"{sample.key}: bad: {sample.reason}", style="red", markup=False)
        return
    sizes = ", ".join(f"{len(image)} bytes" for image in sample.images) or "text only"
    console.print(f"{sample.key} ({sample.id}): {sizes}", style="bold", markup=False)
    show(console, sample)


def _conversation(console: Console, sample: Any) -> None:
    if sample.system:
        console.print(f"  system: {sample.system}", markup=False)
    for turn in sample.conversation:
        console.print(f"  {turn['from']}: {turn['value']}", markup=False)


def _renderings(model: ModelSpec, data: DataSpec) -> Any:
    """Return a function that shows a sample's tokens, and the text of those that are learned."""
    from betakd_ray.data.learned import learned_texts
    from betakd_ray.data.render import Renderer, Unrenderable
    from betakd_ray.models.load import load_processor

    renderer = Renderer(load_processor(model), data)

    def show(console: Console, sample: Any) -> None:
        try:
            rendering = renderer.render(sample)
        except Unrenderable as reason:
            console.print(f"  unrenderable: {reason}", style="red", markup=False)
            return
        tokens = renderer.tokenizer.convert_ids_to_tokens(rendering.input_ids.tolist())
        for token, is_answer in zip(tokens, rendering.answer_mask, strict=True):
            console.print(token, style="bold green" if is_answer else "dim", end=" ", markup=False)
        console.print()
        for learned in learned_texts(renderer.tokenizer, rendering):
            console.print(f"  learned: {learned!r}", style="green", markup=False)

    return show
