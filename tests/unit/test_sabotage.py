"""Sabotaged teachers: each is stopped, with the cause named; and honest ones pass."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from betakd_ray.check.finding import Finding, failures, require_fit
from betakd_ray.check.subject import local_score
from betakd_ray.check.teacher import check_teacher
from betakd_ray.errors import ModelUnfit, WeightsIncomplete
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.spec import CheckSpec, DataSpec, TeacherSpec
from betakd_ray.teacher.parts import Needs
from tests.families import FAMILIES, build
from tests.sabotage import (
    LIES,
    PROJECTOR,
    TOWER,
    changed,
    configured,
    conversations,
    copied,
    easy_vqa,
    embedding,
    fewer_layers,
    language,
    layer,
    moved_keys,
    negated,
    of_part,
    permuted,
    processed,
    random,
    removed,
    rolled,
    truncated,
    with_nan,
    zeroed,
)

SHIPPED = Path(__file__).parents[2] / "jobs/easy_vqa/teacher"
HIDDEN = Needs(frozenset({"hidden"}))
FEW = CheckSpec(samples=6, answers=6)


def data_of(name: str) -> DataSpec:
    family = FAMILIES[name]
    system = "" if family.template != "chat" else None
    return DataSpec(train=("/x.tar",), template=family.template, system_prompt=system, pad_to_square=False)


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    return build(FAMILIES[name].config(), seed=seed).to(dtype)


@cache
def processor_of(name: str):
    return FAMILIES[name].processor()


def checked(name: str, **options) -> list[Finding]:
    """Return the findings on a family's random model, on six samples of several forms."""
    model = options.pop("model", None) or model_of(name)
    needs = options.setdefault("needs", HIDDEN)
    processor = processor_of(name)
    if lie := options.pop("lie", None):
        options["score"] = lie(local_score(model, needs, processor.image_processor))
    samples = options.pop("samples", None) or conversations(6)
    return check_teacher(model, processor, samples, data_of(name), settings=FEW, **options)


# ------------------------------------------------------------------------------------- what a file lacks, or has twice

OF_FILES = {
    "the tower is missing": (changed(removed, of_part(TOWER)), r"the checkpoint lacks .* vision tower"),
    "the projector is missing": (changed(removed, of_part(PROJECTOR)), r"the checkpoint lacks .* projector"),
    "a layer is missing": (changed(removed, layer(1)), r"the checkpoint lacks .* of its language model"),
    "the embedding has less rows": (changed(truncated, embedding), r"has shape \(\d+, 32\) .* but \(\d+, 32\)"),
    "the config has fewer layers": (fewer_layers, r"the checkpoint has .* no place for them"),
    "the tower has other names": (moved_keys(of_part(TOWER), "of_another"), r"the checkpoint lacks .* vision tower"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family) / "honest"
    model_of(family).save_pretrained(path)
    FAMILIES[family].processor().tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("sabotage", OF_FILES)
def test_a_checkpoint_without_all_its_weights_is_refused_when_it_is_loaded(folder, tmp_path, sabotage):
    change, said = OF_FILES[sabotage]
    load_model(TeacherSpec(path=str(folder)))
    with pytest.raises(WeightsIncomplete, match=said):
        load_model(TeacherSpec(path=copied(folder, tmp_path / "copy", change)))


OF_WEIGHTS = {
    "the tower is zero": (changed(zeroed, of_part(TOWER)), "zero or one number"),
    "the projector is zero": (changed(zeroed, of_part(PROJECTOR)), "zero or one number"),
    "a layer holds NaN": (changed(with_nan, layer(0)), "NaN"),
    "a norm is zero": (changed(zeroed, lambda name: language(name) and "norm" in name), "zero or one number"),
}


@pytest.mark.parametrize("sabotage", OF_WEIGHTS)
def test_weights_that_training_cannot_have_made_are_named(family, folder, tmp_path, sabotage):
    change, said = OF_WEIGHTS[sabotage]
    model = load_model(TeacherSpec(path=copied(folder, tmp_path / "copy", change)))
    first = failures(checked(family, model=model))[0]
    assert first.check == "weights"
    assert said in first.seen


@pytest.mark.parametrize("lie", LIES)
def test_an_engine_whose_states_are_wrong_is_found(family, lie):
    failed = failures(checked(family, lie=LIES[lie]))
    assert failed
    assert failed[0].check in ("parity", "batching")
    cause = {"rows late": "off by -1|off by \\+1", "rows early": "off by", "nan states": "NaN", "zero states": "empty"}
    if lie in cause:
        assert any(word in failed[0].cause for word in cause[lie].replace("\\", "").split("|"))


# ---------------------------------------------------------------------------------------------------- false alarms

DRAWS = [(name, dtype, seed) for name in FAMILIES for dtype in (torch.float32, torch.bfloat16) for seed in range(13)]
NEEDS = (HIDDEN, Needs(frozenset({"top_ids", "top_log_probs"}), 8, 300), Needs(frozenset({"hidden", "visual"})))


@pytest.mark.parametrize(("name", "dtype", "seed"), DRAWS)
def test_an_honest_model_is_never_stopped(name, dtype, seed):
    model = build(FAMILIES[name].config(), seed=seed).to(dtype)
    found = checked(name, model=model, needs=NEEDS[seed % 3], samples=conversations(5, seed))
    assert not failures(found), [str(each) for each in failures(found)]
    assert {each.check for each in found if each.verdict == "ok"} >= {"vocabulary", "parity", "batching"}
    # With random weights nothing is known of sight and knowledge, and this is said.
    assert {each.check for each in found if each.verdict in ("doubt", "skipped")} >= {"weights", "template", "sight"}


def test_a_model_with_several_end_of_sequence_tokens_is_not_stopped():
    model = build(FAMILIES["llava"].config())
    model.generation_config.eos_token_id = [2, 1]
    assert "vocabulary" in {each.check for each in checked("llava", model=model) if each.verdict == "ok"}


@pytest.mark.parametrize("method", [{"quant_method": "quanto", "weights": "int8"}], ids=["quanto"])
def test_an_honest_quantised_model_is_never_stopped(folder, family, method):
    model = load_model(TeacherSpec(path=str(folder), options={"quantization_config": method}))
    found = checked(family, model=model)
    assert not failures(found), [str(each) for each in failures(found)]


# --------------------------------------------------------------------------------------------- a teacher that knows

TRAINED = {
    "tower random": (changed(random, of_part(TOWER)), {}, "weights", "vision tower were initialised again"),
    "a stage random": (changed(random, lambda n: "stages.2" in n), {}, "weights", "stages.2"),
    "projector random": (changed(random, of_part(PROJECTOR)), {}, "weights", "projector were initialised again"),
    "layer random": (changed(random, layer(1)), {}, "weights", "layers.1 were initialised again"),
    "projector negated": (changed(negated, lambda n: "linear_2.weight" in n), {}, "sight", "not what is in the image"),
    "embedding permuted": (changed(permuted, embedding), {}, "alignment", "knows nothing of these answers"),
    "embedding rolled": (changed(rolled, embedding), {}, "settings", "rows of the embedding moved by -1"),
    "rescale of 1": (processed("image_processor", "rescale_factor", to=1.0), {}, "settings", "rescale_factor 1/255"),
    "rope": (configured("text_config", "rope_parameters", "rope_theta", to=100.0), {}, "settings", "rope_theta"),
    "activation": (configured("text_config", "hidden_act", to="relu"), {}, "settings", "activation"),
    "epsilon": (configured("text_config", "rms_norm_eps", to=100.0), {}, "settings", "epsilon"),
    "template": (None, {"system_prompt": None}, "template", "no system prompt"),
    "another activation": (configured("text_config", "hidden_act", to="gelu"), {}, "settings", "activation silu"),
}


def taught(path: str | Path, *, wrong_answers: float = 0.0, seed: int = 0, settings=None, **data) -> list[Finding]:
    spec = TeacherSpec(path=str(path))
    given = DataSpec.model_validate({"train": "/x.tar", "system_prompt": "", **data})
    samples = easy_vqa(128, seed=seed, wrong_answers=wrong_answers)
    return check_teacher(load_model(spec), load_processor(spec), samples, given, settings=settings)


@pytest.mark.parametrize("name", TRAINED)
def test_a_sabotaged_easy_vqa_teacher_is_stopped_with_its_cause(tmp_path, name):
    change, data, check, cause = TRAINED[name]
    changes = (change,) if change else ()
    failed = failures(taught(copied(SHIPPED, tmp_path / "copy", *changes), **data))
    assert [(each.check, each.cause) for each in failed if each.check == check and cause in each.cause], failed
    with pytest.raises(ModelUnfit, match=r"seen: .*; expected: "):
        require_fit(failed)


@pytest.mark.parametrize("wrong_answers", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(2))
def test_the_easy_vqa_teacher_passes_also_on_data_half_of_whose_labels_are_wrong(wrong_answers, seed):
    found = taught(SHIPPED, wrong_answers=wrong_answers, seed=seed)
    assert not failures(found), [str(each) for each in failures(found)]
    if not wrong_answers:
        assert {each.verdict for each in found} == {"ok"}
