"""How a model sees a question: its template, the way its image is prepared, and what a command line says of it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from betakd_ray.batch.sample import Rendering
from betakd_ray.cli.evaluate import tree_of
from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.errors import ModelError, SpecError
from betakd_ray.evaluation.asking import data_spec, renderers, rendering_of, sample_of
from betakd_ray.evaluation.benchmark import Question
from betakd_ray.evaluation.generate import prompt_of
from betakd_ray.spec import BenchmarksSpec, DataSpec, EvaluationSpec, ModelSpec, parse_spec
from betakd_ray.spec.tasks import label_of
from tests.families import FAMILIES
from tests.tiny import job_tree, tiny_processor


def spec(**changed: Any) -> BenchmarksSpec:
    return parse_spec({"models": {"m": {"path": "/m"}}, "benchmarks": "gqa", "data": "/d"} | changed, BenchmarksSpec)


def question(text: str = "What colour?", **changed: Any) -> Question:
    return Question(**{"key": "1", "text": text, "image": None, "question_id": 1, "prompt": text, "truth": "",
                       "max_new_tokens": 4} | changed)  # fmt: skip


def picture() -> bytes:
    buffer = io.BytesIO()
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    wide.save(buffer, "PNG")
    return buffer.getvalue()


def template_of(processor: Any, model: str = "/m", **changed: Any) -> str:
    return data_spec(spec(**changed), ModelSpec(path=model), processor).template


def test_the_template_is_llava_s_the_model_s_own_or_the_chosen_one() -> None:
    assert template_of(tiny_processor(chat_template=None)) == "vicuna_v1"
    of_transformers = "{% for message in messages %}USER: {{ message['content'] }} ASSISTANT:{% endfor %}"
    assert template_of(tiny_processor(chat_template=of_transformers)) == "vicuna_v1"
    assert template_of(tiny_processor()) == "chat"
    assert template_of(FAMILIES["qwen2_5_vl"].processor()) == "chat"
    assert template_of(tiny_processor(), template="plain") == "plain"


def test_a_model_of_a_job_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    model = tmp_path / "job" / "model"
    model.mkdir(parents=True)
    assert template_of(tiny_processor(), str(model)) == "chat", "a folder called model may be of another tool"
    tree = job_tree(tmp_path, tmp_path)
    tree["data"] |= {"template": "vicuna_v1", "system_prompt": "", "pad_to_square": False}
    (tmp_path / "job" / "spec.json").write_text(parse_spec(tree).model_dump_json())
    found = data_spec(spec(), ModelSpec(path=str(model)), tiny_processor())
    assert (found.template, found.system_prompt, found.pad_to_square) == ("vicuna_v1", "", False)
    assert data_spec(spec(system_prompt="Hm."), ModelSpec(path=str(model)), tiny_processor()).system_prompt == "Hm."
    (tmp_path / "job" / "spec.json").write_text("[]")
    with pytest.raises(ModelError, match=r"spec.json: does not say how .* was trained"):
        data_spec(spec(), ModelSpec(path=str(model)), tiny_processor())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
def test_only_llava_sees_a_padded_image_or_its_centre_by_the_benchmark(name: str) -> None:
    processor = FAMILIES[name].processor()
    views = renderers(spec(template=FAMILIES[name].template), ModelSpec(path="/m"), processor)
    padded, cut = (
        rendering_of(question(image="x", processing=processing), picture(), views) for processing in ("pad", "crop")
    )
    assert isinstance(padded, Rendering)
    assert isinstance(cut, Rendering)
    assert padded.pixels is not None
    assert cut.pixels is not None
    assert np.array_equal(padded.pixels, cut.pixels) == (name != "llava")
    if name == "llava":
        assert (cut.pixels[0, 2, 6:10, 6:10] > 240).all(), "the centre is blue"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_that_of_training_up_to_the_answer(name: str) -> None:
    processor, template = FAMILIES[name].processor(), FAMILIES[name].template
    views = renderers(spec(template=template), ModelSpec(path="/m"), processor)
    for image in (picture(), None):
        asked = question(image=None if image is None else "x")
        trained = Renderer(processor, DataSpec.model_validate({"train": "a.tar", "template": template})).render(
            sample_of(asked, image)
        )
        found = rendering_of(asked, image, views)
        assert isinstance(found, Rendering)
        answer = int(np.argmax(trained.answer_mask))
        assert found.input_ids.tolist() in (
            trained.input_ids[:answer].tolist(),
            trained.input_ids[: answer - 1].tolist(),
        )


def test_a_control_token_in_a_question_is_asked_as_it_stands_and_a_placeholder_too_many_is_not() -> None:
    views = renderers(spec(template="vicuna_v1"), ModelSpec(path="/m"), tiny_processor())
    assert isinstance(rendering_of(question("Is </s> a token?"), None, views), Rendering)
    reason = rendering_of(question("Is <image> a token?"), None, views)
    assert isinstance(reason, Unrenderable)
    assert "placeholder" in str(reason)
    assert prompt_of(views["pad"], sample_of(question("Is <image> a token?"), None)) is None


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/models/llava-7b/", "llava-7b"),
        ("runs/easy/model", "easy"),
        ("org/name", "name"),
        ("s3://bucket/a b/model", "a-b"),
        ("model", "model"),
        (".", "model"),
    ],
)
def test_a_model_has_the_name_of_its_folder_or_run(path: str, label: str) -> None:
    assert label_of(path) == label


def test_models_on_the_command_line_need_no_yaml() -> None:
    given = {"benchmarks": ["gqa"], "data": "/d"}
    tree, _ = tree_of(["/a/one", "two=/b/one", "org/three=4"], given)
    assert {label: model["path"] for label, model in tree["models"].items()} == {
        "one": "/a/one", "two": "/b/one", "three-4": "org/three=4",
    }  # fmt: skip
    assert parse_spec(tree, BenchmarksSpec).benchmarks == ("gqa",)
    with pytest.raises(SpecError, match="two models have one label"):
        tree_of(["/a/one", "/b/one"], given)
    for lacking in ({"benchmarks": ["gqa"]}, {}):
        with pytest.raises(SpecError, match="--benchmarks"):
            tree_of(["/a/one"], lacking)


def test_a_yaml_of_a_job_names_the_model_that_it_made_and_options_go_before_a_yaml(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(job_tree(tmp_path, tmp_path / "runs")))
    tree, _ = tree_of([str(job)], {"benchmarks": ["gqa"], "data": "/d"})
    assert parse_spec(tree, BenchmarksSpec).models["job"].path == str(tmp_path / "runs" / "job" / "model")
    with pytest.raises(SpecError, match="--data"):
        tree_of([str(job)], {})
    file = tmp_path / "table.yaml"
    file.write_text(json.dumps({"models": {"m": {"path": "/m"}}, "benchmarks": ["gqa"], "data": "/d", "limit": 3}))
    tree, _ = tree_of([str(file)], {"limit": 5, "endpoint_url": "http://store"})
    found = parse_spec(tree, BenchmarksSpec)
    assert (found.limit, found.data.path, found.data.storage.endpoint_url) == (5, "/d", "http://store")
    with pytest.raises(SpecError, match="one YAML, or models"):
        tree_of([str(file), "/a/one"], {})


def test_packed_shards_are_asked_as_the_models_were_trained(tmp_path: Path) -> None:
    models = []
    for name, template in (("one", "vicuna_v1"), ("two", "vicuna_v1"), ("three", "plain")):
        tree = job_tree(tmp_path, tmp_path)
        tree["data"] |= {"template": template, "system_prompt": "Be brief."}
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "spec.json").write_text(parse_spec(tree).model_dump_json())
        models.append(str(tmp_path / name / "model"))
    tree, _ = tree_of(models[:2], {"data": "/shards/*.tar", "batch_size": 3, "gpus": 0.5, "out": "/x/table"})
    found = parse_spec(tree, EvaluationSpec)
    assert [each.path for each in found.data.train] == ["/shards/*.tar"]
    assert (found.data.template, found.data.system_prompt, found.batch_size) == ("vicuna_v1", "Be brief.", 3)
    assert (found.name, found.output.path, found.cluster.student.gpus) == ("table", "/x", 0.5)
    with pytest.raises(SpecError, match="one and three were trained with other settings"):
        tree_of([models[0], models[2]], {"data": "/shards/*.tar"})
    tree, _ = tree_of(["org/other"], {"data": "/shards/*.tar"})
    assert parse_spec(tree, EvaluationSpec).data.template == DataSpec.model_fields["template"].default


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"benchmarks": ["gqa"], "limit": 0}, "--limit 0: limit: "),
        ({"benchmarks": ["gqa", "gqa"]}, "--benchmarks gqa,gqa"),
        ({"rule": "strict"}, "--rule strict: "),
        ({"benchmarks": ["gqa"], "gpus": -1}, "--gpus -1: cluster.student.gpus"),
    ],
)
def test_a_wrong_option_is_named_as_it_was_typed(given: dict[str, Any], said: str) -> None:
    tree, origin = tree_of(["/a/one"], {"data": "/d"} | given)
    with pytest.raises(SpecError) as error:
        parse_spec(tree, BenchmarksSpec if "benchmarks" in given else EvaluationSpec, origin)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("out", "path", "name"), [("x", ".", "x"), ("/x", "/", "x"), ("a/b/", "a", "b"), ("s3://b/c/d", "s3://b/c", "d")]
)
def test_the_folder_of_an_evaluation_is_the_one_that_was_named(out: str, path: str, name: str) -> None:
    tree, _ = tree_of(["/a/one"], {"benchmarks": ["gqa"], "data": "/d", "out": out})
    assert (tree["output"]["path"], tree["name"]) == (path, name)
