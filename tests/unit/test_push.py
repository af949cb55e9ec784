"""Publishing: the card and the files that others see."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.errors import DataError, ModelError, OutputError
from betakd_ray.evaluation.ask import open_conversation
from betakd_ray.publish import push, wilson
from betakd_ray.run.records import CheckRecord, Checks
from betakd_ray.spec import StorageSpec
from betakd_ray.train.card import PLACE, Score, Snippet, model_card, with_scores, without_local_paths
from tests.hub import Hub, running_hub
from tests.results import spec_of, write_result
from tests.tiny import save_tiny, tiny_model, tiny_processor

STORAGE = StorageSpec()
REPO = "someone/small"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with all that could be published by mistake."""
    run = tmp_path_factory.mktemp("secret-user") / "my-run"
    save_tiny(run / "student")
    (run / "student" / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/base\n---\n# Base\n")
    (run / "checkpoints" / "step-7").mkdir(parents=True)
    (run / "checkpoints" / "step-7" / "weights.safetensors").write_bytes(b"checkpoint")
    (run / "metrics.jsonl").write_text("{}")
    folder = write_result(run, tiny_model(), tiny_processor(), {})
    (folder / "notes.txt").write_text("secret-user")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": str(run / "student")}))
    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_accepted")
        yield hub


# ------------------------------------------------------------------------------------------ push


def test_a_run_s_model_is_published_and_nothing_else(run: Path, hub: Hub) -> None:
    done = push(str(run), REPO, storage=STORAGE)
    files = hub.files[REPO]
    assert hub.repositories[REPO]["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_accepted"}
    assert hub.messages == ["Upload my-run"]
    assert done.url.endswith(REPO)
    assert set(done.files) == files.keys() >= {
        "model.safetensors", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "README.md",
    }  # fmt: skip
    assert set(done.left_out) == {"notes.txt", "optimizer.pt"}
    assert files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    for name, content in files.items():
        for part in run.parts[1:-1]:
            assert part.encode() not in content, f"{name} has {part}"


def test_the_published_model_is_asked_like_the_run(run: Path, hub: Hub, tmp_path: Path) -> None:
    push(str(run), REPO, storage=STORAGE)
    for name, content in hub.files[REPO].items():
        (tmp_path / name).write_bytes(content)
    said = [open_conversation(str(place), storage=STORAGE, max_new_tokens=4).ask("Which?") for place in (run, tmp_path)]
    assert said[0] == said[1]


def test_the_command_says_what_it_did(run: Path, hub: Hub) -> None:
    done = CliRunner().invoke(app, ["push", str(run), REPO, "--public", "--message", "First"])
    assert done.exit_code == 0, done.output
    assert hub.repositories[REPO]["visibility"] == "public"
    assert hub.messages == ["First"]
    assert f"{REPO}: README.md" in done.output
    assert "not uploaded: notes.txt, optimizer.pt" in done.output


def test_a_model_s_folder_is_published_too_into_a_repository_that_exists(run: Path, hub: Hub) -> None:
    hub.repositories[REPO] = {}
    push(f"{run}/model/", REPO, storage=STORAGE)
    assert f'from_pretrained("{REPO}"' in hub.files[REPO]["README.md"].decode()


def test_a_result_of_an_earlier_version_gets_its_prompt_and_a_card(run: Path, hub: Hub, tmp_path: Path) -> None:
    old = tmp_path / "old"
    save_tiny(old / "model")
    (old / "model" / "chat_template.jinja").unlink()
    (old / "model" / "betakd.json").write_text('{"token": 1, "step": 2}')
    (old / "model" / "README.md").write_text(f"# old\n\n## The whole job\n\n{run}/student\n")
    (old / "spec.json").write_text(spec_of(run, {}).model_dump_json())
    push(str(old), REPO, storage=STORAGE)
    files = hub.files[REPO]
    assert b"USER: " in files["chat_template.jinja"]
    assert json.loads(files["generation_config.json"])["do_sample"] is False
    assert b"## Ask it" in files["README.md"]
    assert str(run).encode() not in files["README.md"]


@pytest.mark.parametrize(
    ("place", "repo", "error", "said"),
    [
        ("run", "nobody", OutputError, "org/name"),
        ("run", "a/b/c", OutputError, "org/name"),
        ("empty", REPO, ModelError, "no model there"),
        ("missing", REPO, ModelError, "no model there"),
    ],
)
def test_what_cannot_be_published_is_refused(
    run: Path, hub: Hub, tmp_path: Path, place: str, repo: str, error: type[Exception], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=said):
        push(str(run if place == "run" else tmp_path / place), repo, storage=STORAGE)
    assert not hub.repositories


def test_a_refused_token_is_explained(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "refused")
    with pytest.raises(OutputError, match="hf auth login"):
        push(str(run), REPO, storage=STORAGE)


def test_adapters_belong_to_the_weights_beside_them(run: Path, hub: Hub) -> None:
    adapter = {"base_model_name_or_path": str(run / "student"), "r": 4}
    (run / "model" / "adapter_config.json").write_text(json.dumps(adapter))
    try:
        push(str(run), REPO, storage=STORAGE)
    finally:
        (run / "model" / "adapter_config.json").unlink()
    assert json.loads(hub.files[REPO]["adapter_config.json"]) == {"base_model_name_or_path": REPO, "r": 4}


# ------------------------------------------------------------------------------------------ scores


def evaluation(folder: Path, scores: dict[str, Any], right: int = 8, count: int = 10) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps({"scores": scores, "subject": {}}))
    lines = [{"text": "yes" if at < right else "no", "metadata": {"type": "open"}} for at in range(count)]
    for label in scores:
        (folder / f"answers-{label}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_scores_are_in_the_card_with_intervals(run: Path, hub: Hub, tmp_path: Path) -> None:
    ours = {"accuracy": 0.8, "accuracy[open]": 0.8, "unanswerable": 0.0}
    folder = evaluation(tmp_path / "held-out", {"teacher": {"accuracy": 1.0}, "my-run": ours})
    push(str(run), REPO, storage=STORAGE, scores=str(folder))
    card = ModelCard(hub.files[REPO]["README.md"].decode())
    assert "| accuracy | 0.8 | 0.4902 … 0.9433 |" in card.text
    assert "unanswerable" not in card.text
    assert [each.metric_value for each in card.data.eval_results] == [0.8, 0.8]


def test_an_evaluation_s_own_intervals_are_used(run: Path, hub: Hub, tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "held-out", {"one": {"f1": {"value": 0.5, "low": 0.4, "high": 0.6}}})
    push(str(run), REPO, storage=STORAGE, scores=f"{folder}/evaluation.json")
    assert b"| f1 | 0.5 | 0.4 \xe2\x80\xa6 0.6 |" in hub.files[REPO]["README.md"]


def test_scores_on_benchmarks_have_their_intervals_and_no_counts(run: Path, hub: Hub, tmp_path: Path) -> None:
    folder = evaluation(
        tmp_path / "table4", {"my-run": {"gqa/accuracy": 61.2, "gqa/questions": 12578, "average": 64.5}}
    )
    content = json.loads((folder / "evaluation.json").read_text())
    ends = {"gqa/accuracy": [60.3, 62.1], "average": [63.9, 65.0]}
    (folder / "evaluation.json").write_text(json.dumps(content | {"intervals": {"my-run": ends}}))
    push(str(run), REPO, storage=STORAGE, scores=str(folder))
    card = ModelCard(hub.files[REPO]["README.md"].decode())
    assert "| gqa/accuracy | 61.2 | 60.3 … 62.1 |" in card.text
    assert "| average | 64.5 | 63.9 … 65 |" in card.text
    assert "questions |" not in card.text


def test_a_label_is_asked_for_if_there_are_several(run: Path, hub: Hub, tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "held-out", {"one": {"accuracy": 0.5}, "two": {"accuracy": 0.6}})
    with pytest.raises(DataError, match="--label"):
        push(str(run), REPO, storage=STORAGE, scores=str(folder))
    push(str(run), REPO, storage=STORAGE, scores=str(folder), label="two")
    assert b"| accuracy | 0.6 |" in hub.files[REPO]["README.md"]
    with pytest.raises(DataError, match="no such file"):
        push(str(run), REPO, storage=STORAGE, scores=str(tmp_path))


@pytest.mark.parametrize(("share", "count", "low", "high"), [(0.8, 10, 0.4902, 0.9433), (0.0, 20, 0.0, 0.1611)])
def test_wilson_s_interval_is_that_of_the_tables(share: float, count: int, low: float, high: float) -> None:
    assert wilson(share, count) == pytest.approx((low, high), abs=1e-4)


def test_new_scores_replace_old_ones() -> None:
    card = "---\nlicense: mit\n---\n# small\n\n## Made from\n\ntable\n"
    once = with_scores(card, "a", [Score("accuracy", 0.5, (0.4, 0.6))])
    twice = with_scores(once, "b", [Score("accuracy", 0.7)])
    assert "0.5" not in twice
    assert twice.count("## Scores") == 1
    assert twice.index("## Scores") < twice.index("## Made from")
    assert "| accuracy | 0.7 | not known |" in twice
    assert ModelCard(twice).data.license == "mit"


# ------------------------------------------------------------------------------------------ card


def test_the_card_s_lines_run(run: Path, tmp_path: Path) -> None:
    card = (run / "model" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    Image.new("RGB", (60, 20), "red").save(tmp_path / "photo.jpg")
    assert code.count(PLACE) == 2
    code = code.replace(PLACE, str(run / "model")).replace("**inputs", "**inputs, max_new_tokens=4")
    blocked = f"import sys\nsys.modules['betakd_ray'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", blocked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    conversation = open_conversation(str(run), storage=STORAGE, max_new_tokens=4)
    conversation.show((tmp_path / "photo.jpg").read_bytes())
    assert done.stdout.strip() == conversation.ask("What is in the image?")


def test_the_card_names_the_image_processing_where_transformers_can_be_told() -> None:
    assert '("FOLDER-OR-HUB-ID", backend="torchvision")  # ' in Snippet(backend="torchvision").code()
    assert 'AutoProcessor.from_pretrained("FOLDER-OR-HUB-ID")\n' in Snippet(backend=None).code()
    assert "betakd_ray.models.mobilevlm" in Snippet(needs_package=True).code()
    assert "AutoTokenizer" in Snippet(sees_images=False).code()


def test_the_document_shows_the_card_s_lines() -> None:
    shown = (Path(__file__).parents[2] / "docs/models.md").read_text()
    assert f"```python\n{Snippet().code().replace(PLACE, 'runs/my-run/model')}```" in shown


def test_the_card_says_what_the_model_was_made_from(run: Path) -> None:
    card = ModelCard((run / "model" / "README.md").read_text())
    assert card.data.license == "apache-2.0"
    assert card.data.base_model in ("org/base", ["org/base"])
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "`student` (not from a hub), licence: apache-2.0" in card.text
    assert "| loss | 0.5 |" in card.text
    assert "zero_stage: 0" in card.text, "it was set"
    assert "shuffle_buffer" not in card.text, "a default is no news"
    assert str(run.parent) not in card.content


def test_a_licence_that_no_card_names_is_unknown(run: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "student")
    card = ModelCard(model_card(spec_of(tmp_path, {}), {}))
    assert card.data.license == "unknown"
    assert "base_model" not in card.data.to_dict()


def test_parts_of_two_licences_have_an_other_one(tmp_path: Path) -> None:
    for name, licence in (("words", "mit"), ("eyes", "apache-2.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    init = {"kind": "parts", "language_model": str(tmp_path / "words"), "vision_tower": str(tmp_path / "eyes")}
    card = model_card(spec_of(tmp_path, {}, student={"init": init}), {})
    assert ModelCard(card).data.license == "other"
    assert "licence: mit" in card
    assert "licence: apache-2.0" in card


def test_findings_and_paths_of_the_checks_are_public(run: Path) -> None:
    spec = spec_of(run, {}, teacher={"path": str(run / "student")}, objective={"energies": "fkl"})
    record = CheckRecord("files", "/home/someone/teacher/model.safetensors has 3", "s3://bucket/a/b", "ok")
    card = model_card(spec, {}, Checks(1, "node-17 (cpu; torch 2)", {}, [record]))
    assert "| teacher | files | model.safetensors has 3 | s3://bucket/a/b | ok |" in card
    assert "Teacher on cpu; torch 2." in card
    assert "node-17" not in card


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("see /home/me/runs/a.json.", "see a.json."),
        ("'/data/x y' and file:///data/z/w", "'x y' and w"),
        ("https://host/a/b/c and s3://bucket/a/b", "https://host/a/b/c and s3://bucket/a/b"),
        ("1/2, and/or, a / b, /single, org/name/x", "1/2, and/or, a / b, /single, org/name/x"),
        ("~/secret/models/m", "m"),
    ],
)
def test_local_paths_lose_their_folders(text: str, public: str) -> None:
    assert without_local_paths(text) == public
