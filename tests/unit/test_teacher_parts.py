"""The parts that a job needs of its teacher, by the table of parts."""

import pytest
from pydantic import TypeAdapter

from betakd_ray.energies import ENERGIES
from betakd_ray.spec import VISUAL_ENERGIES, ObjectiveSpec, TeacherSpec
from betakd_ray.teacher.parts import FEATURES, PARTS, Needs

VOCAB = 100


def needs(teacher: dict | None = None, **objective) -> Needs:
    spec = TeacherSpec.model_validate({"path": "org/teacher", **(teacher or {})})
    return Needs.of(spec, TypeAdapter(ObjectiveSpec).validate_python(objective), VOCAB)


@pytest.mark.parametrize("kind", sorted(VISUAL_ENERGIES))
def test_every_energy_on_image_tokens_asks_for_a_part_on_them_and_for_no_logits(kind):
    asked = needs(energies=[kind], weighting="equal")
    assert asked.parts
    assert {PARTS[name].axis for name in asked.parts} <= {"token", "pair"}


@pytest.mark.parametrize("kind", sorted(set(ENERGIES) - {"ce"}))
def test_every_energy_on_logits_asks_for_hidden_states(kind):
    assert needs(energies=[kind], weighting="equal").parts == {"hidden"}


def test_a_top_k_signal_takes_the_place_of_hidden_states():
    asked = needs({"signal": {"kind": "top_k", "k": 8}}, energies=["fkl"], weighting="equal")
    assert asked.parts == {"top_ids", "top_log_probs"}
    assert (asked.top_k, asked.vocab, asked.tag) == (8, VOCAB, "top8of100")
    none = needs({"signal": "top_k"}, energies=["fd"], weighting="equal")
    assert (none.parts, none.choices) == ({"visual"}, (0, 0, 0))
    assert needs({"signal": {"kind": "top_k", "k": 500}}, energies=["fkl"]).top_k == VOCAB - 1


def test_a_layer_takes_the_place_of_the_projector_for_fd_alone():
    layer = {"kind": "fd", "layer": {"teacher": 3, "student": 2}}
    assert needs(energies=[layer], weighting="equal").tag == "layer3"
    assert needs(energies=[layer, "relation"], weighting="equal").parts == {"visual", "visual_layer"}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_weighting_asks_for_its_features(feature):
    weighting = {"kind": "instance", "features": [feature]}
    assert needs(energies=["fkl"], weighting=weighting).parts == {"hidden", feature}


def test_needs_of_two_jobs_are_joined_and_a_tag_does_not_depend_on_the_order():
    one, other = Needs(frozenset({"visual"})), Needs(frozenset({"teacher_entropy", "hidden"}))
    assert (one | other) == (other | one)
    assert (one | other).tag == "hidden+visual+teacher_entropy"
    with pytest.raises(AssertionError):
        _ = one | Needs(frozenset({"visual_layer"}), layer=2)
