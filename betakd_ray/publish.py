"""Publishing of a result on a Hugging Face hub: what may be seen by others, and nothing else."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import GenerationConfig

from betakd_ray.data.files import store_errors
from betakd_ray.errors import DataError, ModelError, OutputError
from betakd_ray.evaluation.score_table import COUNTS
from betakd_ray.leftovers import temporary_folder
from betakd_ray.models.load import load_config, load_processor, sees_images
from betakd_ray.run.files import SPEC_FILE, stored
from betakd_ray.run.folder import CARD, MODEL, MODEL_RECORD
from betakd_ray.run.records import CHECKS_FILE, RESULT_FILE, ModelRecord
from betakd_ray.spec import JobSpec, ModelSpec, StorageSpec
from betakd_ray.storage import join, open_store
from betakd_ray.train.card import PLACE, Score, Snippet, model_card, with_scores, without_local_paths
from betakd_ray.train.origin import is_hub_id, last_part
from betakd_ray.train.prompt import generation_settings, save_prompt

PUBLISHED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer*.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "adapter_config.json", MODEL_RECORD, CARD, "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Patterns of the files that are uploaded, all of them directly in the model's folder."""
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer_config.json",
    "adapter_*.json",
)
_PLACES = ("name_or_path", "path", "vision_tower")
"""Ends of the names of settings that hold the place of a model."""
EVALUATION = "evaluation.json"
Z = 1.959964
"""Quantile of the normal distribution for an interval of 95%."""


@dataclass(frozen=True)
class Pushed:
    """What was uploaded."""

    url: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    """Files of the folder that are not published."""


def push(
    place: str,
    repo: str,
    *,
    storage: StorageSpec,
    is_private: bool = True,
    scores: str | None = None,
    label: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Upload the model of a run's folder, or of a model's folder, to the repository `repo`; create it if needed.

    Weights, configuration, processor and card are uploaded; no checkpoint, no data, and no local path in a file.
    `scores` is an evaluation.json or its folder; the numbers of the model `label` go into the card. Raises ModelError,
    DataError and OutputError.
    """
    _require_repo(repo)
    spec = stored(place, storage, SPEC_FILE) if _may_be_run(place) else None
    source = join(place, MODEL) if spec else place
    scored = _scores(scores or place, storage, label or (spec.name if spec else None), is_required=scores is not None)
    with temporary_folder("push") as folder:
        left_out = _copy(source, folder, storage)
        if spec and "has_prompt" not in _json(folder / MODEL_RECORD):  # a result of version 0.1.0
            _complete(folder, spec, place, storage)
        _write_public(folder, repo, scored)
        files = sorted(file.name for file in folder.iterdir())
        url = _upload(folder, repo, is_private, message or f"Upload {spec.name if spec else last_part(place)}")
    return Pushed(url, tuple(files), tuple(left_out))


def _require_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(f"{repo}: is no name of a repository ({error}). Give it as org/name.") from error
    if "/" not in repo:
        raise OutputError(
            f"{repo}: has no owner. Give the repository as org/name, with your user name or organisation."
        )


def _may_be_run(place: str) -> bool:
    return "://" in place or Path(place).is_dir()


def _copy(source: str, folder: Path, storage: StorageSpec) -> list[str]:
    """Copy the files that are published; return the names of the others. Large local files are only linked."""
    with store_errors(source, storage):
        filesystem, root = open_store(source, storage)
        found = [str(each) for each in filesystem.ls(root, detail=False)] if filesystem.isdir(root) else []
    names = {each.rstrip("/").rpartition("/")[2]: each for each in found}
    if "config.json" not in names:
        raise ModelError(
            f"{source}: no model there. Give the folder of a run that has ended, or a model's folder with config.json."
        )
    published = [name for name in names if any(fnmatchcase(name, pattern) for pattern in PUBLISHED)]
    for name in published:
        with store_errors(names[name], storage):
            if "://" not in source and name.endswith(".safetensors"):
                (folder / name).symlink_to(Path(names[name]).resolve())
            else:
                filesystem.get_file(names[name], str(folder / name))
    return sorted(names.keys() - set(published))


def _complete(folder: Path, spec: JobSpec, run: str, storage: StorageSpec) -> None:
    """Give a result of an earlier version its prompt, its generation settings and a card."""
    model = ModelSpec(path=str(folder))
    config, processor = load_config(model), load_processor(model)
    own = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
    generation_settings(processor, spec.data, config, own).save_pretrained(folder)
    known = _json(folder / MODEL_RECORD)
    record = save_prompt(folder, processor, spec.data, ModelRecord(known.get("token", 0), known.get("step", 0)))
    result = stored(run, storage, RESULT_FILE)
    checks = stored(run, storage, CHECKS_FILE) if spec.teacher else None
    snippet = Snippet.of(processor, config, record, sees_images=sees_images(config))
    card = model_card(spec, result.metrics if result else {}, checks, snippet=snippet)
    (folder / CARD).write_text(card, encoding="utf-8")


def _write_public(folder: Path, repo: str, scores: tuple[str, list[Score]] | None) -> None:
    """Put the repository's name and the scores into the card, and take local paths out of all files."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.exists() else f"---\nlibrary_name: transformers\n---\n# {repo}\n"
    text = without_local_paths(text.replace(PLACE, repo))
    card.write_text(with_scores(text, *scores) if scores else text, encoding="utf-8")
    for file in folder.iterdir():
        if any(fnmatchcase(file.name, pattern) for pattern in _SETTINGS):
            settings = _json(file)
            public = _without_places(settings, repo)
            if public != settings:
                file.write_text(json.dumps(public, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_places(value: Any, repo: str) -> Any:
    """Return settings in which a model's local place is replaced: adapters belong to the weights beside them."""
    if isinstance(value, list):
        return [_without_places(each, repo) for each in value]
    if not isinstance(value, dict):
        return value
    public = {}
    for name, each in value.items():
        if isinstance(each, str) and name.endswith(_PLACES) and each and not is_hub_id(each):
            public[name] = repo if name == "base_model_name_or_path" else last_part(each)
        else:
            public[name] = _without_places(each, repo)
    return public


def _upload(folder: Path, repo: str, is_private: bool, message: str) -> str:
    api = HfApi()
    try:
        url = api.create_repo(repo, private=is_private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise OutputError(
            f"{repo}: cannot be uploaded ({str(error).strip().splitlines()[0] if str(error).strip() else error!r}). "
            "Log in with `hf auth login` or set HF_TOKEN to a token that may write there."
        ) from error
    return str(url)


# ------------------------------------------------------------------------------------------ scores


def _scores(
    place: str, storage: StorageSpec, label: str | None, *, is_required: bool
) -> tuple[str, list[Score]] | None:
    """Return the name of the question set and a model's scores, with intervals; None if there is no evaluation."""
    url = place if place.endswith(".json") else join(place, EVALUATION)
    text = _text(url, storage)
    if text is None:
        if is_required:
            raise DataError(f"{url}: no such file. Give an {EVALUATION}, or the folder of an evaluation.")
        return None
    content = json.loads(text)
    found = content.get("scores", {})
    chosen = label if label in found else next(iter(found), None) if len(found) == 1 else None
    if chosen is None:
        raise DataError(f"{url}: has the models {', '.join(found)}. Choose this one by --label.")
    folder = url.rpartition("/")[0]
    counts = _counts(_text(join(folder, f"answers-{chosen}.jsonl"), storage) or "")
    ends = content.get("intervals", {}).get(chosen, {})
    scores = [made for name, value in found[chosen].items() if (made := _score(name, value, counts)) is not None]
    known = {name: (float(low), float(high)) for name, (low, high) in ends.items()}
    return last_part(folder), [replace(each, interval=known.get(each.metric, each.interval)) for each in scores]


def _score(name: str, value: Any, counts: Mapping[str, int]) -> Score | None:
    """Return a number with its interval: as the evaluation has it, or Wilson's for a share of the questions."""
    if isinstance(value, dict):
        interval = (float(value["low"]), float(value["high"])) if {"low", "high"} <= value.keys() else None
        return Score(name, float(value["value"]), interval) if "value" in value else None
    if (name == "unanswerable" and not value) or name.rpartition("/")[2] in COUNTS:
        return None
    kind = name.partition("[")[2].removesuffix("]")
    count = counts.get(kind, 0)
    is_share = name.partition("[")[0] in ("accuracy", "agreement")
    return Score(name, float(value), wilson(float(value), count) if is_share and count else None)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` independent questions (Wilson 1927)."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return centre - half, centre + half


def _counts(lines: str) -> Counter[str]:
    """Return the number of questions: of each type, and of all under the empty name."""
    counts: Counter[str] = Counter()
    for line in lines.splitlines():
        counts[""] += 1
        if kind := json.loads(line).get("metadata", {}).get("type"):
            counts[kind] += 1
    return counts


def _text(url: str, storage: StorageSpec) -> str | None:
    with store_errors(url, storage):
        filesystem, path = open_store(url, storage)
        try:
            return bytes(filesystem.cat_file(path)).decode("utf-8")  # pyright: ignore[reportArgumentType]
        except FileNotFoundError:
            return None


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
