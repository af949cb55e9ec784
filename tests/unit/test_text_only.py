"""Teacher and student without images: causal language models, and the job is the same."""

import numpy as np
import pytest
import torch

from betakd_ray.batch.inputs import TensorInputs
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.packing import stack
from betakd_ray.data.pack import pack
from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.errors import ModelError
from betakd_ray.evaluation.generate import answers
from betakd_ray.job import BetaKDJob
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.student import build_student
from betakd_ray.models.vlm import hidden_rows, lm_head, part_parameters, takes_images
from betakd_ray.spec import DataSpec, ModelSpec, StudentSpec, TeacherSpec, parse_spec
from betakd_ray.teacher.answers import Answer
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.scorer import TeacherScorer
from tests.families import FAMILIES, save_language_model
from tests.tiny import numbered_samples, raw_sample, save_tiny

CPU = torch.device("cpu")
ANSWERS = ["yes", "It is a red circle.", "no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def renderer(folder):
    return Renderer(load_processor(ModelSpec(path=folder)), DataSpec(train=("/unused.tar",)))


@pytest.fixture(scope="module")
def batch(renderer):
    samples = [raw_sample(number, answer, has_image=False) for number, answer in enumerate(ANSWERS)]
    return stack([renderer.render(sample) for sample in samples], renderer.pad_token_id, renderer.image_token_id)


def test_logits_at_answer_rows_are_those_of_the_model_s_own_forward(folder, renderer, batch):
    model = load_model(ModelSpec(path=folder))
    assert not takes_images(model)
    with torch.no_grad():
        hidden = hidden_rows(model, TensorInputs.of(batch, CPU), Normalization.of(None))
        found = lm_head(model)(hidden.rows)
        whole = model(torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)).logits
    torch.testing.assert_close(found, whole.flatten(0, 1)[batch.answer_rows], rtol=1e-5, atol=1e-5)
    assert hidden.visual is None
    assert not batch.images


def test_a_teacher_answers_with_what_there_is_without_images(folder, batch):
    needs = Needs(frozenset({"hidden", "visual", "teacher_vision", "teacher_answer", "teacher_entropy"}))
    for signal in Answer.of(TeacherScorer(TeacherSpec(path=folder), needs).score(batch)).signals:
        assert signal is not None
        assert set(signal) == needs.parts - {"visual"}
        assert not signal["teacher_vision"].any()
        assert signal["teacher_answer"].any()


def test_the_language_model_is_all_there_is_to_train(folder):
    student = build_student(StudentSpec.model_validate({"init": {"kind": "checkpoint", "path": folder}}), torch.float32)
    assert all(parameter.requires_grad for parameter in student.parameters())
    owned = part_parameters(student)
    assert len(owned["language_model"]) == len(list(student.parameters()))
    assert not owned["projector"]
    assert not owned["vision_tower"]


def test_greedy_answers_are_those_of_the_model_s_own_generate(folder, renderer):
    model = load_model(ModelSpec(path=folder))
    samples = [raw_sample(number, answer, has_image=False) for number, answer in enumerate(ANSWERS)]
    (text, *others) = answers(model, renderer, samples, batch_size=3, max_new_tokens=5)
    ids = torch.from_numpy(renderer.prompt(samples[0]).input_ids.astype(np.int64))[None]
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert text == renderer.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert others == [text, text]  # the question is the same


def test_a_sample_with_an_image_is_refused(renderer):
    with pytest.raises(Unrenderable, match="has images, but the model accepts none"):
        renderer.render(raw_sample(0, "yes", has_image=True))


def test_a_renderer_s_identity_is_its_tokenizer_s_and_template_s(folder, renderer):
    same = Renderer(load_processor(ModelSpec(path=folder)), DataSpec(train=("/unused.tar",)))
    other = Renderer(load_processor(ModelSpec(path=folder)), DataSpec(train=("/unused.tar",), template="chat"))
    assert same.fingerprint == renderer.fingerprint != other.fingerprint


def _job(tmp_path, folder, **sections):
    pack(numbered_samples(8), str(tmp_path / "shards"), samples_per_shard=4)
    tree = {
        "name": "text",
        "data": {"train": str(tmp_path / "shards/*.tar")},
        "teacher": {"path": folder},
        "student": {"init": {"kind": "checkpoint", "path": folder}},
        "training": {"global_batch_size": 2, "micro_batch_size": 2},
        "objective": {"energies": ["fkl"]},
        "output": {"path": str(tmp_path / "runs")},
    }
    return BetaKDJob(parse_spec(tree | sections))


def test_a_job_of_language_models_passes_its_checks(tmp_path, folder):
    plan, renderers = _job(tmp_path, folder).check()
    assert plan.samples == 8
    assert list(renderers) == ["student"]


def test_energies_on_image_tokens_are_refused(tmp_path, folder):
    with pytest.raises(ModelError, match="fd compare image tokens, but a language model has none"):
        _job(tmp_path, folder, objective={"energies": ["fkl", "fd"]}).check()


def test_a_vision_language_model_with_a_tokenizer_alone_is_refused(tmp_path, folder):
    init = {"kind": "config", "config": FAMILIES["llava_next"].config(), "processor": folder}
    with pytest.raises(ModelError, match="only a tokenizer, which accepts no images"):
        _job(tmp_path, folder, student={"init": init}).check()


def test_a_vision_tower_has_no_place_in_a_language_model(tmp_path, folder):
    config = {"model_type": "llama", "vocab_size": 400, "hidden_size": 16, "num_attention_heads": 2}
    init = {"kind": "config", "config": config, "processor": folder, "vision_tower": save_tiny(tmp_path / "model")}
    with pytest.raises(ModelError, match="vision_tower: 'llama' has no vision tower"):
        _job(tmp_path, folder, student={"init": init}).check()
