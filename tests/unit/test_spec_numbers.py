"""Numbers in a spec: whatever no job can use is refused with the spec, and not by a library after GPUs are taken."""

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import ValidationError

from betakd_ray.errors import SpecError
from betakd_ray.spec import BenchmarksSpec, EvaluationSpec, JobSpec, PackSpec, PluginEnergy, SweepSpec, parse_spec
from betakd_ray.spec.base import LONGEST_S, Spec
from betakd_ray.spec.energies import SECTIONS

NAN, INFINITE = float("nan"), float("inf")
SILLY = (NAN, INFINITE, -INFINITE, -1)
MAY_BE_NEGATIVE = {
    "PartsInit.vision_feature_layer": "counts layers from the last, as transformers does",
    "TemperatureSchedule.theta": "is the argument of a sigmoid",
}
MAY_BE_HUGE = {
    "OptimizerSpec.max_grad_norm": "means that nothing is clipped",
}


def sections(kind: type[Spec], found: dict[str, type[Spec]]) -> dict[str, type[Spec]]:
    """Return a section and all that are in it, by name."""
    if kind.__name__ not in found:
        found[kind.__name__] = kind
        for field in kind.model_fields.values():
            for inner in parts(field.annotation):
                if isinstance(inner, type) and issubclass(inner, Spec):
                    sections(inner, found)
    return found


def parts(annotation: Any) -> Iterator[Any]:
    """Yield a type and the types in it."""
    yield annotation
    for inner in get_args(annotation):
        yield from parts(inner)


def holding(annotation: Any, number: float) -> Any:
    """Return a value of that type which holds the number wherever the type has one; None if it has none."""
    if annotation in (int, float):
        return number
    if get_origin(annotation) is Annotated:
        return holding(get_args(annotation)[0], number)
    inner = [value for value in (holding(each, number) for each in get_args(annotation)) if value is not None]
    if not inner:
        return None
    if get_origin(annotation) is dict:
        return {"name": inner[0]}
    return inner if get_origin(annotation) is tuple else inner[0]


ALL: dict[str, type[Spec]] = {}
for each in (JobSpec, EvaluationSpec, BenchmarksSpec, SweepSpec, PackSpec, *SECTIONS):
    sections(each, ALL)
NUMBERS = [
    (section, field)
    for section, kind in sorted(ALL.items())
    for field, info in kind.model_fields.items()
    if holding(info.annotation, 1.0) is not None
]


def is_refused(section: str, field: str, number: float) -> bool:
    """Return whether a section refuses this number in this field, whatever else it lacks."""
    kind = ALL[section]
    try:
        kind.model_validate({field: holding(kind.model_fields[field].annotation, number)})
    except ValidationError as error:
        return any(issue["loc"][0] == field and issue["type"] != "missing" for issue in error.errors())
    return False


def test_the_walk_finds_the_numbers() -> None:
    named = {f"{section}.{field}" for section, field in NUMBERS}
    assert len(named) > 90
    assert {
        "TrainingSpec.seed", "SweepSpec.seeds", "PoolSpec.resources", "PoolSpec.gpus", "OptimizerSpec.adam_betas",
        "ManualWeighting.weights", "OptimizerSpec.projector_lr", "AlignTopK.tokens", "TopKSignal.k", "WorkersSpec.max",
    } <= named  # fmt: skip
    assert MAY_BE_NEGATIVE.keys() | MAY_BE_HUGE.keys() <= named
    assert not is_refused("TrainingSpec", "seed", 1)


@pytest.mark.parametrize(("section", "field"), NUMBERS, ids=".".join)
def test_a_number_that_no_job_can_use_is_refused(section: str, field: str) -> None:
    name = f"{section}.{field}"
    taken = {number for number in SILLY if not is_refused(section, field, number)}
    assert taken == ({-1} if name in MAY_BE_NEGATIVE else set())
    assert is_refused(section, field, 1e300) is (name not in MAY_BE_HUGE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training.deepspeed", {"zero_optimization": {"sub_group_size": INFINITE}}),
        ("student.init.config", {"model_type": "llava", "scale": [1.0, NAN]}),
        ("teacher.options", {"max_memory": {"cpu": INFINITE}}),
    ],
)
def test_settings_of_another_library_hold_finite_numbers(field: str, value: Any) -> None:
    tree: dict[str, Any] = {
        "name": "job",
        "data": {"train": "/x.tar"},
        "teacher": {"path": "org/teacher"},
        "student": {"init": {"kind": "config", "config": {"model_type": "llava"}, "processor": "org/p"}},
        "objective": {"energies": "fkl"},
    }
    *path, last = field.split(".")
    node = tree
    for each in path:
        node = node.setdefault(each, {})
    node[last] = value
    with pytest.raises(SpecError, match=rf"{field}: holds (inf|nan), but a spec is stored as JSON"):
        parse_spec(tree)


def test_options_of_a_function_of_the_user_s_are_finite_numbers() -> None:
    with pytest.raises(ValidationError, match="holds nan, but a spec is stored as JSON"):
        PluginEnergy.model_validate({"kind": "mine:huber", "delta": NAN})
    assert PluginEnergy.model_validate({"kind": "mine:huber", "delta": -1.0}).options == {"delta": -1.0}


def test_the_values_of_a_sweep_are_finite_numbers() -> None:
    tree = {"name": "sweep", "template": "/job.yaml", "axes": {"optimizer.lr": [1e-4, NAN]}}
    with pytest.raises(SpecError, match="axes: holds nan"):
        parse_spec(tree, SweepSpec)


@pytest.mark.parametrize("number", [-1, 2**63])
def test_a_seed_that_a_generator_does_not_take_is_refused_with_its_value(number: int) -> None:
    with pytest.raises(SpecError, match=rf"seed: must be (greater|less) than .*, got {number}"):
        parse_spec({"name": "job", "data": {"train": "/x.tar"}, "training": {"seed": number}})


def test_the_longest_times_are_times_for_every_library() -> None:
    assert LONGEST_S * 1000 < 2**31
