"""Public incidents of teachers whose signal was wrong while training went on, rebuilt small: each is stopped."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from betakd_ray.batch.packing import stack
from betakd_ray.check.canary import ask_canary, canary_of, drift
from betakd_ray.check.finding import Finding, failures
from betakd_ray.check.subject import local_score
from betakd_ray.check.teacher import check_teacher
from betakd_ray.data.render import Renderer
from betakd_ray.errors import WeightsIncomplete
from betakd_ray.models.load import load_model
from betakd_ray.models.vlm import lm_head
from betakd_ray.spec import CheckSpec, TeacherSpec
from betakd_ray.teacher.parts import Needs
from tests.families import FAMILIES, build
from tests.sabotage import (
    TOWER,
    changed,
    conversations,
    copied,
    lying,
    moved_rows,
    nan_states,
    of_part,
    perturbed_states,
    removed,
    states_of_batch,
    zero_states,
)
from tests.unit.test_sabotage import data_of

NAME = "llava"
HIDDEN = Needs(frozenset({"hidden"}))
FEW = CheckSpec(samples=6, answers=6)


@pytest.fixture(scope="module")
def processor():
    return FAMILIES[NAME].processor()


@pytest.fixture
def model():
    return build(FAMILIES[NAME].config())


def first_failure(model, processor, **options) -> Finding:
    found = check_teacher(model, processor, conversations(6), data_of(NAME), settings=FEW, **options)
    return failures(found)[0]


def score_of(model, processor):
    return local_score(model, HIDDEN, processor.image_processor)


def test_a_vision_tower_that_was_never_loaded(model, processor, tmp_path):  # KDFlow #9
    model.save_pretrained(tmp_path / "honest")
    path = copied(tmp_path / "honest", tmp_path / "copy", changed(removed, of_part(TOWER)))
    with pytest.raises(WeightsIncomplete, match=r"lacks \d+ weights .* of its vision tower"):
        load_model(TeacherSpec(path=path))


def test_all_zero_hidden_states_from_an_engine(model, processor):  # vllm #46301
    found = first_failure(model, processor, score=lying(score_of(model, processor), zero_states))
    assert (found.check, found.seen) == ("parity", "all hidden states are zero")


def test_perturbed_hidden_states_that_leave_nearly_all_top_1(model, processor):  # vllm #50815
    renderer = Renderer(processor, data_of(NAME))
    inputs = stack([renderer.render(each) for each in conversations(6)], renderer.pad_token_id, renderer.image_token_id)
    honest, lie = score_of(model, processor), lying(score_of(model, processor), perturbed_states)
    head = lm_head(model).weight.detach().numpy()
    top = [(score(inputs).arrays["hidden"] @ head.T).argmax(1) for score in (honest, lie)]
    assert np.mean(top[0] == top[1]) > 0.9
    found = first_failure(model, processor, score=lie)
    assert found.check == "parity"
    assert "changed on their way" in found.cause


def test_states_that_depend_on_the_batch(model, processor):  # speculators #279
    found = first_failure(model, processor, score=lying(score_of(model, processor), states_of_batch))
    assert found.check in ("parity", "batching")


@pytest.mark.parametrize("by", [-1, 1])
def test_rows_off_by_one(model, processor, by):  # TorchSpec #87, ms-swift #8436
    found = first_failure(model, processor, score=moved_rows(score_of(model, processor), by))
    assert f"the rows are off by {by:+d}" in found.cause


def test_all_zero_logits(model, processor):  # Megatron-Bridge #1422
    head = np.zeros_like(lm_head(model).weight.detach().numpy())
    found = first_failure(model, processor, head=head)
    assert found.check == "parity"
    assert "the head's copy differs" in found.cause


def test_image_tokens_that_are_not_where_their_features_go(model, processor):  # ms-swift #9414, #9429, #10073
    score = score_of(model, processor)

    def misaligned(inputs):
        ids = inputs.input_ids.copy()
        for row in ids:  # all image tokens one place to the right of where they belong
            at = np.flatnonzero(row == processor.image_token_id)
            if len(at):
                row[at[0] : at[-1] + 2] = np.roll(row[at[0] : at[-1] + 2], 1)
        return score(replace(inputs, input_ids=ids))

    assert first_failure(model, processor, score=misaligned).check == "parity"


def test_a_processor_that_counts_other_image_tokens_than_the_rendering(model, processor, monkeypatch):
    by_processor = Renderer.by_processor
    monkeypatch.setattr(
        Renderer,
        "by_processor",
        lambda self, sample: None if (ids := by_processor(self, sample)) is None else np.insert(ids, 5, ids[5]),
    )
    assert "image tokens are not where" in first_failure(model, processor).cause


def test_a_soft_cap_that_is_lost(model, processor):  # NeMo-RL #3978
    lm_head(model).register_forward_hook(lambda _module, _inputs, logits: torch.tanh(logits))
    found = first_failure(model, processor)
    assert found.check == "parity"
    assert "a soft-cap" in found.cause


def test_a_teacher_of_nan_that_trains_to_exit_0(model, processor):  # Soup #887
    found = first_failure(model, processor, score=lying(score_of(model, processor), nan_states))
    assert found.check == "parity"
    assert "NaN" in found.cause


def test_numbers_that_drift_while_the_job_runs(model, processor):  # verl #7540, TRL #4560
    renderer = Renderer(processor, data_of(NAME))
    rendering = renderer.render(conversations(1)[0])
    score = score_of(model, processor)
    canary = canary_of(score, rendering, renderer.pad_token_id, renderer.image_token_id)
    assert canary is not None
    assert drift(canary, ask_canary(score, canary.inputs), "float32").verdict == "ok"
    with torch.no_grad():
        next(iter(model.model.language_model.layers)).mlp.up_proj.weight.mul_(1.02)
    found = drift(canary, ask_canary(score, canary.inputs), "float32", check="identity")
    assert found.verdict == "fail"
    assert "another model" in found.cause
