"""Closed forms against autograd on the definitions, for every energy, option and dtype, and for hostile logits."""

import inspect
import math
from functools import partial

import pytest
import torch
from torch import nn

from betakd_ray.energies import ENERGIES
from betakd_ray.energies.block import BLOCK_BYTES, Channels
from betakd_ray.energies.closed_form import Gradient, Pair, Side
from betakd_ray.energies.partition import FIRST, head_of
from betakd_ray.energies.rows import cross_entropy
from betakd_ray.forecast.allocations import AllocationCounter
from betakd_ray.objective import CHUNK_BYTES, LEAST_CHUNK, RowObjective, TeacherRows
from betakd_ray.spec import ObjectiveSpec
from tests.autograd_energies import ORACLES, head_and_tail_gaps

INF = math.inf
HEATED = {"teacher_temperature": 2.0, "student_temperature": 0.7}
OPTIONS = {
    "fkl": [{}, HEATED, {"reference": True}, {**HEATED, "reference": True}],
    "rkl": [{}, HEATED],
    "sfkl": [{}, HEATED, {"skew": 0.7}, {"reference": True}],
    "srkl": [{}, HEATED, {"skew": 0.7}],
    "js": [{}, HEATED, {"mixture": 0.1}],
    "tvd": [{}, HEATED],
    "adaptive_kl": [{}, HEATED, {"head_mass": 0.9}, {"head_mass": 0.01}],
    "ctkd": [{"temperature": 2.5}, {"temperature": 1.0}, {"temperature": 2.5, "reference": True}],
    "taid": [{"t": 0.4}, {"t": 0.0}, {"t": 1.0}, {"t": 0.4, "reference": True}],
    "mse_logits": [{}, {"standardize": True}],
    "mse_probs": [{}, HEATED],
    "cosine_logits": [{}, {"standardize": True}],
    "cosine_probs": [{}, HEATED],
}
CALLS = [(name, options) for name, each in OPTIONS.items() for options in each]
MOVING = {"ctkd": "temperature", "taid": "t"}


def rows(count=6, vocab=300, scale=2.0, dtype=torch.float64):
    return (scale * torch.randn(count, vocab, dtype=torch.float64)).to(dtype)


def derivatives(function, teacher, student, options, weights, moving=None):
    """Return the value, and the gradients in teacher, student and the moving number, of a weighted sum."""
    leaves = [teacher.clone().requires_grad_(), student.clone().requires_grad_()]
    if moving:
        leaves.append(torch.tensor(options[moving], dtype=torch.float64, requires_grad=True))
        options = {**options, moving: leaves[-1]}
    value = function(*leaves[:2], **options)
    return value.detach(), torch.autograd.grad((value * weights).sum(), leaves)


def assert_same(name, teacher, student, options, rtol=1e-9, atol=1e-11, moving=None):
    weights = torch.randn(len(teacher), dtype=torch.float64).to(torch.promote_types(teacher.dtype, torch.float32))
    actual, gradients = derivatives(ENERGIES[name], teacher, student, options, weights, moving)
    expected, wanted = derivatives(ORACLES[name], teacher, student, options, weights, moving)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=rtol, atol=atol)


def test_every_energy_has_an_oracle_and_every_option_a_case():
    assert set(ORACLES) == set(ENERGIES) == set(OPTIONS)
    for name, cases in OPTIONS.items():
        known = inspect.signature(ORACLES[name]).parameters.keys() - {"teacher_logits", "student_logits"}
        assert known == {option for case in cases for option in case}, name


@pytest.mark.parametrize(("name", "options"), CALLS)
def test_value_and_gradients_are_those_of_autograd(name, options):
    assert_same(name, rows(), rows(), options, moving=MOVING.get(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ENERGIES)
def test_so_they_are_in_every_precision(name, dtype):
    rounding = {"rtol": 2e-4, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-5}
    assert_same(name, rows(dtype=dtype), rows(dtype=dtype), OPTIONS[name][0], **rounding)


def masked(*tensors):
    return tuple(nn.functional.pad(tensor, (1, 2), value=-INF) for tensor in tensors)


def hostile():
    a, b, zeros = rows(), rows(), torch.zeros(6, 300, dtype=torch.float64)
    peak = zeros.clone()
    peak[:, 7] = 1e4
    one_masked = a.clone()
    one_masked[:, 5] = -INF
    return {
        "equal": (a, a.clone()),
        "close": (a, a + 1e-4 * b),
        "flat": (zeros, zeros.clone()),
        "flat student": (a, zeros),
        "flat teacher": (zeros, b),
        "a peak": (peak, b),
        "opposite peaks": (peak, peak.roll(1, dims=1)),
        "huge": (1e4 * a, 1e4 * b),
        "tiny": (1e-8 * a, 1e-8 * b),
        "both mask ids": masked(a, b),
        "huge, and both mask ids": masked(1e4 * a, 1e4 * b),
        "the teacher masks an id": (one_masked, b),
        "the student masks an id": (b, one_masked),
        "few ids": (a[:, :2], b[:, :2]),
        "one id": (a[:, :1], b[:, :1]),
    }


@pytest.mark.parametrize("case", hostile())
@pytest.mark.parametrize("name", ENERGIES)
def test_hostile_logits_give_what_autograd_gives(name, case):
    """Infinite values and NaN included: none is replaced, and none is new."""
    teacher, student = hostile()[case]
    options = OPTIONS[name][0]
    actual, gradients = derivatives(ENERGIES[name], teacher, student, options, torch.ones(6))
    expected, wanted = derivatives(ORACLES[name], teacher, student, options, torch.ones(6))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11, equal_nan=True)
    for gradient, want in zip(gradients, wanted, strict=True):
        finite = want.isfinite()
        torch.testing.assert_close(gradient[finite], want[finite], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("name", ENERGIES)
def test_a_row_that_is_broken_changes_no_other_row_of_its_block(name, bad):
    teacher, student = rows(), rows()
    sound = ENERGIES[name](teacher, student, **OPTIONS[name][0])
    student[2, 3 if bad != -INF else slice(None)] = bad
    broken = ENERGIES[name](teacher, student, **OPTIONS[name][0])
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(broken[others], sound[others])
    assert not broken[2].isfinite()


# ---- the head of adaptive_kl -------------------------------------------------------------------------------------

DISTRIBUTIONS = {
    "peaked": lambda: (8 * torch.randn(20, 1000)).softmax(1),
    "mixed": lambda: (torch.linspace(0.1, 8, 20)[:, None] * torch.randn(20, 1000)).softmax(1),
    "nearly flat": lambda: (0.01 * torch.randn(20, 1000)).softmax(1),
    "flat": lambda: torch.full((20, 1024), 1 / 1024),
    "ties": lambda: (2 * torch.randint(0, 4, (20, 1000)).float()).softmax(1),
    "few ids": lambda: torch.randn(20, FIRST - 1).softmax(1),
    "zeros": lambda: nn.functional.pad(torch.randn(20, 70).softmax(1), (0, 500)),
}


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_head_without_a_sort_is_that_of_the_stable_sort(kind, mass):
    p, q = DISTRIBUTIONS[kind](), torch.randn(20, DISTRIBUTIONS[kind]().shape[1]).softmax(1)
    head = head_of(p, mass)
    assert head.any(dim=1).all()
    gap = (p - q).abs()
    expected, _ = head_and_tail_gaps(p, q, mass)
    torch.testing.assert_close((gap * head).sum(1), expected, rtol=1e-6, atol=1e-7)


def test_rows_whose_head_is_long_are_sorted_and_the_others_are_not(monkeypatch):
    sorted_rows = []
    monkeypatch.setattr(
        "betakd_ray.energies.partition.np.sort", lambda rows, axis: sorted_rows.append(len(rows)) or rows[:, ::-1]
    )
    p = torch.cat([(8 * torch.randn(5, 1000)).softmax(1), torch.full((3, 1000), 1e-3)])
    head_of(p, 0.5)
    assert sorted_rows == [3]


# ---- several energies on one block -------------------------------------------------------------------------------


def test_slopes_of_several_energies_and_temperatures_add_up():
    teacher, student, targets = rows(), rows(), torch.randint(300, (6,))
    weights = torch.randn(len(CALLS) + 1, 6, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    total = (weights[-1] * cross_entropy(leaf, targets)).sum()
    for weight, (name, options) in zip(weights, CALLS, strict=False):
        total = total + (weight * ORACLES[name](teacher, leaf, **options)).sum()
    (expected,) = torch.autograd.grad(total, leaf)
    pair = Pair(Side(teacher), Side(student))
    gradient = Gradient(pair.student)
    for weight, (name, options) in zip(weights, CALLS, strict=False):
        gradient.add(ENERGIES[name].closed_form(pair, **options).student(), weight)
    gradient.add_cross_entropy(targets, weights[-1])
    torch.testing.assert_close(gradient.write(student), expected)
    assert torch.equal(pair.student.logits, student), "the gradient is in the memory of the logits"


def test_a_softmax_is_computed_once_for_all_energies(monkeypatch):
    calls = []
    real = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda *a, **k: calls.append(1) or real(*a, **k))
    spec = ObjectiveSpec(energies=["fkl", "rkl", "js", "tvd", "adaptive_kl", "cosine_probs"], weighting="equal")
    objective = RowObjective(spec, nn.Linear(8, 11), torch.randn(11, 4))
    objective(torch.randn(5, 8), TeacherRows(torch.randn(5, 4)), torch.zeros(5).long(), torch.ones(5, 7))
    assert len(calls) == 2


# ---- memory and chunks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energies", [["fkl"], ["fkl", "rkl", "js", "cosine_probs", "mse_logits", "adaptive_kl"]])
def test_three_buffers_as_wide_as_the_vocabulary_suffice_for_any_number_of_energies(energies):
    count, vocab = 512, 8192
    spec = ObjectiveSpec(energies=energies, weighting="equal", chunk_rows=256)
    objective = RowObjective(spec, nn.Linear(4, vocab, bias=False), torch.randn(vocab, 4))
    student = torch.randn(count, 4, requires_grad=True)
    arguments = TeacherRows(torch.randn(count, 4)), torch.zeros(count).long(), torch.ones(count, len(energies) + 1)
    with AllocationCounter() as allocations:
        objective(student, *arguments)
    chunk = 256 * vocab * 4
    assert allocations.peak <= 3 * chunk + 16 * BLOCK_BYTES["cpu"]
    assert allocations.peak >= 2 * chunk


def test_chunks_are_of_equal_size_and_within_the_limit():
    objective = RowObjective(ObjectiveSpec(weighting="equal"), nn.Linear(2, 3), None)
    assert objective.chunk_size(10_000, 32_000, 4) * 32_000 * 4 <= CHUNK_BYTES
    assert objective.chunk_size(1100, 32_000, 4) == 550
    assert objective.chunk_size(7, 32_000, 4) == 7
    assert objective.chunk_size(10 * LEAST_CHUNK, 10**9, 4) == LEAST_CHUNK
    given = RowObjective(ObjectiveSpec(weighting="equal", chunk_rows=3), nn.Linear(2, 3), None)
    assert given.chunk_size(7, 3, 4) == 3


def test_the_head_s_gradient_is_handed_over_without_a_copy():
    objective = RowObjective(ObjectiveSpec(weighting="equal"), nn.Linear(8, 1000, bias=False), None)
    total, *_ = objective(torch.randn(5, 8, requires_grad=True), None, torch.zeros(5).long(), torch.ones(5, 1))
    made = total.grad_fn.gradients.weight.data_ptr()
    total.backward()
    assert objective.lm_head.weight.grad.data_ptr() == made


def test_a_gradient_that_was_handed_over_is_not_given_twice():
    objective = RowObjective(ObjectiveSpec(weighting="equal"), nn.Linear(8, 10), None)
    total, *_ = objective(torch.randn(5, 8, requires_grad=True), None, torch.zeros(5).long(), torch.ones(5, 1))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the objective again"):
        total.backward()


def test_an_energy_of_a_user_s_module_is_added_to_those_in_closed_form():
    spec = ObjectiveSpec(
        energies=["fkl", {"kind": "tests.plugins:brier", "scale": 2.0}, "mse_probs"], weighting="equal"
    )
    objective = RowObjective(spec, nn.Linear(8, 11).double(), torch.randn(11, 4).double())
    student, theirs = torch.randn(5, 8).double().requires_grad_(), torch.randn(5, 4).double()
    weights = torch.rand(5, 4).double()
    total, values, _ = objective(student, TeacherRows(theirs), torch.zeros(5).long(), weights)
    torch.testing.assert_close(values[:, 2], 2 * values[:, 3])
    (gradient,) = torch.autograd.grad(total, student)
    weights = torch.stack(
        [*weights[:, :2].unbind(1), torch.zeros(5), weights[:, 3] + 2 * weights[:, 2]], dim=1
    ).double()
    again, *_ = objective(student, TeacherRows(theirs), torch.zeros(5).long(), weights)
    torch.testing.assert_close(gradient, torch.autograd.grad(again, student)[0])


def test_without_a_gradient_no_logit_is_overwritten():
    made = partial(Channels, False, {}, {}, frozenset(), False)
    logits = rows()
    for needs, is_same in ((False, True), (True, False)):
        given = logits.clone()
        made(needs_gradient=needs).compute(given, None, torch.zeros(6).long(), torch.zeros(6, 0).double())
        assert torch.equal(given, logits) is is_same


@pytest.mark.parametrize("spread", [1.0, 1e-1, 1e-2, 1e-3])
def test_the_slope_in_a_learned_temperature_keeps_its_digits_near_agreement(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, noise = torch.randn(2, 50, 300, generator=generator, dtype=torch.float64)

    def slope(dtype: torch.dtype) -> float:
        temperature = torch.tensor(2.0, dtype=dtype, requires_grad=True)
        value = ENERGIES["ctkd"](teacher.to(dtype), (teacher + spread * noise).to(dtype), temperature=temperature)
        (gradient,) = torch.autograd.grad(value.sum(), temperature)
        return gradient.item()

    assert slope(torch.float32) == pytest.approx(slope(torch.float64), rel=1e-2)
