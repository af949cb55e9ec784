"""`betakd ask`: the answers of an evaluation, one question at a time."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from betakd_ray.cli import app
from betakd_ray.cli.ask import parted
from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample
from betakd_ray.errors import DataError, ModelError
from betakd_ray.evaluation.ask import Conversation, open_conversation
from betakd_ray.spec import DataSpec, StorageSpec
from tests.families import FAMILIES, build, save_language_model
from tests.results import NEW_TOKENS, evaluated, samples, spec_of, write_result
from tests.tiny import save_tiny, tiny_model, tiny_processor

STORAGE = StorageSpec()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of a LLaVA with large weights: with the usual ones, every question would have the same answer."""
    run = tmp_path_factory.mktemp("runs") / "small"
    model = tiny_model()
    for weight in model.parameters():
        weight.data *= 25 if weight.ndim > 1 else 1
    write_result(run, model, tiny_processor(), {})
    return run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 20), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def invoked(*arguments: Any, lines: str | None = None) -> Any:
    return CliRunner().invoke(app, ["ask", *map(str, arguments), "--max-new-tokens", "8"], input=lines)


def said(place: Path, sample: RawSample) -> str:
    """Return the answer to the last question of a sample, by the conversation that it is."""
    conversation = open_conversation(str(place), storage=STORAGE, max_new_tokens=NEW_TOKENS)
    for image in sample.images:
        conversation.show(image)
    return conversation.ask(sample.conversation[0]["value"].replace("<image>\n", ""))


@pytest.mark.parametrize("place", ["", "model"])
def test_the_answers_are_those_of_an_evaluation(run: Path, place: str) -> None:
    asked = samples(6, turns=False)
    renderer = Renderer(tiny_processor(), DataSpec.model_validate({"train": "/x.tar"}))
    expected = evaluated(run / "model", renderer, asked)
    assert [said(run / place, each) for each in asked] == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3"])
def test_other_families_too_in_several_turns(name: str) -> None:
    family = FAMILIES[name]
    renderer = Renderer(family.processor(), DataSpec.model_validate({"train": "/x.tar", "template": family.template}))
    model = build(family.config())
    conversation = Conversation(model, renderer, NEW_TOKENS)
    first = samples(3)[1]
    pieces: list[str] = []
    for image in first.images:
        conversation.show(image)
    one = conversation.ask("What is it?", pieces.append)
    two = conversation.ask("And now?", pieces.append)
    assert "".join(pieces) == one + two
    fresh = Conversation(model, renderer, NEW_TOKENS)
    assert fresh.ask("And now?") != two, "the second answer depends on what was said before"


def test_one_question_prints_one_answer(run: Path, photo: Path) -> None:
    done = invoked(run, photo, "What is it?")
    assert done.exit_code == 0, done.output
    conversation = open_conversation(str(run), storage=STORAGE, max_new_tokens=8)
    conversation.show(photo.read_bytes())
    assert done.stdout == conversation.ask("What is it?") + "\n"
    assert invoked(run, photo, photo, "What is it?").stdout != done.stdout, "two images are not one"


def test_without_a_question_lines_are_answered_in_turn(run: Path, photo: Path) -> None:
    lines = ["What is it?", "", "And now?", "/new", "And now?", f"/image {photo}", "Which?"]
    lines += ["/image missing.png", "/help", "/quit", "Not asked"]
    done = invoked(run, photo, lines="\n".join(lines))
    assert done.exit_code == 0, done.output
    conversation = open_conversation(str(run), storage=STORAGE, max_new_tokens=8)
    conversation.show(photo.read_bytes())
    expected = [conversation.ask("What is it?"), conversation.ask("And now?")]
    conversation.restart()
    expected.append(conversation.ask("And now?"))
    conversation.show(photo.read_bytes())
    expected.append(conversation.ask("Which?"))
    assert done.stdout.split("\n") == [*expected, ""]
    assert "missing.png" in done.stderr
    assert "/new begins again" in done.stderr


def test_a_language_model_is_asked_by_text_alone(tmp_path: Path, photo: Path) -> None:
    place = save_language_model(tmp_path / "words")
    assert invoked(place, "What is a square?").exit_code == 0
    done = invoked(place, photo, "What is it?")
    assert done.exit_code == 2
    assert "accepts none" in done.stderr


def test_a_question_that_cannot_be_asked_counts_as_not_asked(run: Path) -> None:
    conversation = open_conversation(str(run), storage=STORAGE, max_new_tokens=8)
    first = conversation.ask("Why?")
    conversation.restart()
    with pytest.raises(DataError, match="cannot be decoded"):
        conversation.show(b"no image")
    with pytest.raises(DataError, match="control token"):
        conversation.ask("End </s> here")
    with pytest.raises(DataError, match="room for 512"):
        conversation.ask("Why? " * 400)
    assert conversation.ask("Why?") == first


def test_system_prompt_and_template_can_be_others(run: Path) -> None:
    answers = {
        (system, template): open_conversation(
            str(run), storage=STORAGE, max_new_tokens=8, system_prompt=system, template=template
        ).ask("What?")
        for system, template in ((None, None), ("Be brief.", None), (None, "chat"))
    }
    assert answers[None, None] != answers["Be brief.", None]
    assert answers[None, None] == answers[None, "chat"], "the result's chat template is that of training"


def test_a_run_without_a_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(spec_of(tmp_path, {}).model_dump_json())
    with pytest.raises(ModelError, match="Run the job until it ends"):
        open_conversation(str(tmp_path), storage=STORAGE)


def test_a_model_without_a_template_is_not_asked_by_guess(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="--template vicuna_v1"):
        open_conversation(str(tmp_path / "model"), storage=STORAGE)
    assert open_conversation(str(tmp_path / "model"), storage=STORAGE, template="vicuna_v1", max_new_tokens=2)


@pytest.mark.parametrize(
    ("words", "images", "question"),
    [
        ([], [], None),
        (["Why?"], [], "Why?"),
        (["a.png"], ["a.png"], None),
        (["a.JPEG", "https://host/b", "What is in c.png?"], ["a.JPEG", "https://host/b"], "What is in c.png?"),
    ],
)
def test_the_question_comes_last(words: list[str], images: list[str], question: str | None) -> None:
    assert parted(words) == (images, question)


def test_an_unquoted_question_is_explained() -> None:
    with pytest.raises(DataError, match="in quotes"):
        parted(["a.png", "What", "is", "it?"])


def test_a_missing_image_is_named_before_the_model_loads(run: Path) -> None:
    done = invoked("/nowhere/model", "missing.png", "What?")
    assert done.exit_code == 2
    assert "missing.png" in done.stderr


def test_an_image_of_another_mode_is_read_as_in_training(run: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (30, 20), (255, 0, 0, 128)).save(buffer, "PNG")
    conversation = open_conversation(str(run), storage=STORAGE, max_new_tokens=4)
    conversation.show(buffer.getvalue())
    assert conversation.ask("What?") is not None
