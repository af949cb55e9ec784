"""Energies against plain loops over rows and ids, against finite differences, at agreement and at the extremes."""

import inspect
import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

import betakd_ray
from betakd_ray.energies import ENERGIES
from betakd_ray.energies.on_image_tokens import feature_distance, relation
from betakd_ray.energies.on_logits import curriculum_temperature, forward_kl, skew_forward_kl, taid, total_variation
from betakd_ray.energies.rows import cross_entropy, entropy, matching_distance

INF = math.inf
T, S = 2.0, 0.5
TEMPERATURES = {"teacher_temperature": T, "student_temperature": S}
REQUIRED = {"ctkd": {"temperature": 2.0}, "taid": {"t": 0.4}}
CALLS = {name: partial(function, **REQUIRED.get(name, {})) for name, function in ENERGIES.items()}
STANDARDIZED = {name: partial(ENERGIES[name], standardize=True) for name in ("mse_logits", "cosine_logits")}
ALL_CALLS = {**CALLS, **{f"{name}_standardized": call for name, call in STANDARDIZED.items()}}
ON_LOGITS = {name for name in ALL_CALLS if "_logits" in name}
REFERENCE = {
    "fkl": partial(forward_kl, **TEMPERATURES),
    "sfkl": partial(skew_forward_kl, **TEMPERATURES),
    "ctkd": CALLS["ctkd"],
    "taid": CALLS["taid"],
}

each_energy = pytest.mark.parametrize("energy", ALL_CALLS.values(), ids=ALL_CALLS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


def logits(rows=5, vocab=7, scale=2.0, dtype=torch.float64):
    return (torch.randn(rows, vocab, dtype=torch.float64) * scale).to(dtype)


def value_and_gradient(energy, teacher, student):
    student = student.detach().clone().requires_grad_()
    value = energy(teacher, student)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


# ---- oracles: one row, lists of floats, math.* -------------------------------------------------------------------


def softmax(z, temperature=1.0):
    weights = [math.exp(x / temperature - max(z) / temperature) for x in z]
    return [w / math.fsum(weights) for w in weights]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mix(weight, p, q):
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def z_scores(z):
    mean = math.fsum(z) / len(z)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in z) / (len(z) - 1))
    return [(x - mean) / deviation for x in z]


def cosine(a, b):
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.hypot(*a) / math.hypot(*b)


def mean_square(a, b):
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)


def on_probs(function):
    return lambda z_t, z_s, t=1.0, s=1.0: function(softmax(z_t, t), softmax(z_s, s))


def adaptive_weights(p, q, head_mass):
    head, tail, mass = 0.0, 0.0, 0.0
    for n, v in enumerate(sorted(range(len(p)), key=lambda v: -p[v])):
        gap = abs(p[v] - q[v])
        if n == 0 or mass < head_mass:
            head += gap
        else:
            tail += gap
        mass += p[v]
    return head / (head + tail), tail / (head + tail)


def adaptive_oracle(p, q, head_mass=0.5):
    head, tail = adaptive_weights(p, q, head_mass)
    return head * kl(p, q) + tail * kl(q, p)


def js_oracle(p, q, w=0.5):
    m = mix(w, p, q)
    return w * kl(p, m) + (1 - w) * kl(q, m)


def taid_oracle(z_t, z_s, t):
    return kl(softmax(mix(1 - t, z_s, z_t)), softmax(z_s))


ORACLES = {
    "fkl": (on_probs(kl), {}),
    "rkl": (on_probs(lambda p, q: kl(q, p)), {}),
    "sfkl": (on_probs(lambda p, q: kl(p, mix(0.1, p, q))), {}),
    "sfkl skew 0.7": (on_probs(lambda p, q: kl(p, mix(0.7, p, q))), {"skew": 0.7}),
    "srkl": (on_probs(lambda p, q: kl(q, mix(0.1, q, p))), {}),
    "srkl skew 0.7": (on_probs(lambda p, q: kl(q, mix(0.7, q, p))), {"skew": 0.7}),
    "js": (on_probs(js_oracle), {}),
    "js mixture 0.1": (on_probs(lambda p, q: js_oracle(p, q, 0.1)), {"mixture": 0.1}),
    "tvd": (on_probs(lambda p, q: math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2), {}),
    "adaptive_kl": (on_probs(adaptive_oracle), {}),
    "adaptive_kl head 0.9": (on_probs(lambda p, q: adaptive_oracle(p, q, 0.9)), {"head_mass": 0.9}),
    "adaptive_kl head 0.01": (on_probs(lambda p, q: adaptive_oracle(p, q, 0.01)), {"head_mass": 0.01}),
    "ctkd": (lambda z_t, z_s: 9 * kl(softmax(z_t, 3), softmax(z_s, 3)), {"temperature": 3.0}),
    "taid": (lambda z_t, z_s: taid_oracle(z_t, z_s, 0.4), {"t": 0.4}),
    "taid t 0.9": (lambda z_t, z_s: taid_oracle(z_t, z_s, 0.9), {"t": 0.9}),
    "mse_logits": (mean_square, {}),
    "mse_logits std": (lambda a, b: mean_square(z_scores(a), z_scores(b)), {"standardize": True}),
    "mse_probs": (on_probs(lambda p, q: mean_square(p, q) * len(p)), {}),
    "cosine_logits": (lambda a, b: 1 - cosine(a, b), {}),
    "cosine_logits std": (lambda a, b: 1 - cosine(z_scores(a), z_scores(b)), {"standardize": True}),
    "cosine_probs": (on_probs(lambda p, q: 1 - cosine(p, q)), {}),
}
HAS_TEMPERATURES = [name for name in ORACLES if name.split()[0] not in {"ctkd", "taid", "mse_logits", "cosine_logits"}]


def test_every_energy_has_an_oracle():
    assert {name.split()[0] for name in ORACLES} == set(ENERGIES)


@pytest.mark.parametrize("name", ORACLES)
def test_energy_equals_the_plain_loop(name):
    oracle, options = ORACLES[name]
    teacher, student = logits(rows=20), logits(rows=20)
    expected = [oracle(a, b) for a, b in zip(teacher.tolist(), student.tolist(), strict=True)]
    actual = ENERGIES[name.split()[0]](teacher, student, **options)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", HAS_TEMPERATURES)
def test_each_side_has_its_own_temperature(name):
    oracle, options = ORACLES[name]
    teacher, student = logits(rows=20), logits(rows=20)
    expected = [oracle(a, b, T, S) for a, b in zip(teacher.tolist(), student.tolist(), strict=True)]
    actual = ENERGIES[name.split()[0]](teacher, student, **options, **TEMPERATURES)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


# ---- gradients -----------------------------------------------------------------------------------------------------

WITH_CONSTANTS = {"adaptive_kl", "taid"}  # a part of each is detached, and finite differences would move it
DIFFERENTIABLE = {name: call for name, call in ALL_CALLS.items() if name not in WITH_CONSTANTS}


@pytest.mark.parametrize("energy", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradient_in_teacher_and_student_equals_finite_differences(energy):
    assert gradcheck(energy, (logits(2).requires_grad_(), logits(2).requires_grad_()))


@pytest.mark.parametrize("name", [name for name in HAS_TEMPERATURES if not name.startswith("adaptive_kl")])
def test_gradient_at_temperatures_equals_finite_differences(name):
    energy = partial(ENERGIES[name.split()[0]], **ORACLES[name][1], **TEMPERATURES)
    assert gradcheck(energy, (logits(2).requires_grad_(), logits(2).requires_grad_()))


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_adaptive_kl_takes_its_weights_as_constants(side):
    teacher, student = logits(), logits()
    pairs = zip(teacher.tolist(), student.tolist(), strict=True)
    weights = torch.tensor([adaptive_weights(softmax(a), softmax(b), 0.5) for a, b in pairs], dtype=torch.float64)
    variable = {"teacher": teacher, "student": student}[side].requires_grad_()
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    (expected,) = torch.autograd.grad((weights[:, 0] * forward + weights[:, 1] * reverse).sum(), variable)
    (actual,) = torch.autograd.grad(ENERGIES["adaptive_kl"](teacher, student).sum(), variable)
    torch.testing.assert_close(actual, expected)


def test_taid_draws_the_student_to_a_constant_target():
    teacher, student = logits(), logits()
    target = (0.6 * student + 0.4 * teacher).softmax(-1)
    _, gradient = value_and_gradient(CALLS["taid"], teacher, student)
    torch.testing.assert_close(gradient, student.softmax(-1) - target)


def test_taid_is_zero_at_the_student_and_forward_kl_at_the_teacher():
    teacher, student = logits(), logits()
    assert taid(teacher, student, t=0.0).abs().max() == 0
    torch.testing.assert_close(taid(teacher, student, t=1.0), forward_kl(teacher, student))


@pytest.mark.parametrize("reference", [False, True])
def test_ctkd_is_differentiable_in_its_temperature(reference):
    teacher, student = logits(2), logits(2)
    temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda z, t: curriculum_temperature(teacher, z, temperature=t, reference=reference),
        (student.requires_grad_(), temperature),
    )


def test_ctkd_follows_the_temperature_past_masked_out_ids():
    teacher, student = logits(), logits()
    gradients = []
    for pair in ((teacher, student), masked_out(teacher, student)):
        temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        gradients += torch.autograd.grad(curriculum_temperature(*pair, temperature=temperature).sum(), temperature)
    assert gradients[0] != 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_ctkd_takes_a_learned_and_a_fixed_temperature_alike():
    teacher, student = logits(dtype=torch.bfloat16), logits(dtype=torch.bfloat16)
    learned = curriculum_temperature(teacher, student, temperature=torch.tensor(2.5))
    torch.testing.assert_close(learned, curriculum_temperature(teacher, student, temperature=2.5))


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_adds_exactly_the_entropy_of_the_target_and_keeps_the_gradient(name):
    energy, teacher, student = REFERENCE[name], logits(), logits()
    value, gradient = value_and_gradient(energy, teacher, student)
    reference_value, reference_gradient = value_and_gradient(partial(energy, reference=True), teacher, student)
    target = {
        "fkl": teacher / T,
        "sfkl": teacher / T,
        "ctkd": teacher / 2,
        "taid": 0.6 * student + 0.4 * teacher,
    }[name]
    scale = 2.0**2 if name == "ctkd" else 1.0
    torch.testing.assert_close(reference_value - value, scale * entropy(target))
    torch.testing.assert_close(reference_gradient, gradient)


# ---- agreement and sign --------------------------------------------------------------------------------------------


@each_dtype
@each_energy
def test_energy_and_gradient_are_zero_at_agreement(energy, dtype):
    teacher = logits(vocab=1000, dtype=dtype)
    value, gradient = value_and_gradient(energy, teacher, teacher)
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    assert value.abs().max() <= rounding
    assert gradient.abs().max() <= rounding


@pytest.mark.parametrize("name", ["fkl", "rkl", "adaptive_kl", "ctkd", "taid", "tvd", "mse_probs", "cosine_probs"])
def test_agreement_costs_nothing_to_the_last_bit(name):
    teacher = logits(vocab=1000, dtype=torch.float32)
    assert CALLS[name](teacher, teacher.clone()).abs().max() == 0


@each_dtype
@pytest.mark.parametrize("distance", [1e-5, 1e-3, 1.0, 30.0])
@each_energy
def test_energy_is_never_negative(energy, distance, dtype):
    teacher = logits(rows=200, vocab=50)
    student = teacher + distance * logits(rows=200, vocab=50)
    value = energy(teacher.to(dtype), student.to(dtype))
    assert (value >= 0).all()
    if distance >= 1:
        assert (value > 0).all()


@pytest.mark.parametrize("name", ["fkl", "rkl", "js", "sfkl", "srkl", "ctkd", "taid"])
def test_lifting_rounding_noise_to_zero_keeps_the_gradient(name):
    teacher = logits(rows=500, vocab=50)
    student = teacher + 1e-4 * logits(rows=500, vocab=50)
    value, gradient = value_and_gradient(CALLS[name], teacher.float(), student.float())
    _, exact = value_and_gradient(CALLS[name], teacher.float().double(), student.float().double())
    assert (value == 0).any(), "no row has been lifted: the test says nothing"
    lifted = value == 0
    assert (gradient[lifted].abs().amax(-1) > 0).all()
    torch.testing.assert_close(gradient[lifted].double(), exact[lifted], rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("distance", [1.0, 100.0])
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("tvd", 1),
        ("mse_probs", 2),
        ("js", math.log(2)),
        ("cosine_probs", 1),
        ("cosine_logits", 2),
        ("sfkl", -math.log(0.1)),
        ("srkl", -math.log(0.1)),
    ],
)
def test_energy_stays_below_its_bound(name, bound, distance):
    value = CALLS[name](logits(500, scale=distance).float(), logits(500, scale=distance).float())
    assert value.max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize(("name", "bound"), [("tvd", 1), ("mse_probs", 2), ("js", math.log(2)), ("cosine_probs", 1)])
def test_energy_reaches_its_bound_where_supports_are_disjoint(name, bound):
    teacher, student = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([[0.0, 1e4, 0.0]])
    assert CALLS[name](teacher, student).item() == pytest.approx(bound)


def test_opposite_logits_have_cosine_distance_two():
    teacher = logits()
    torch.testing.assert_close(CALLS["cosine_logits"](teacher, -teacher), torch.full((5,), 2.0, dtype=torch.float64))


def test_standardized_mean_square_is_the_cosine_distance_times_a_constant():
    vocab = 11
    teacher, student = logits(vocab=vocab), logits(vocab=vocab) + 3
    mean_squares = ENERGIES["mse_logits"](teacher, student, standardize=True)
    cosines = ENERGIES["cosine_logits"](teacher, student, standardize=True)
    torch.testing.assert_close(mean_squares, 2 * (vocab - 1) / vocab * cosines)


@pytest.mark.parametrize("name", sorted(set(ALL_CALLS) - {"mse_logits", "cosine_logits"}))
def test_a_constant_added_to_a_row_changes_nothing(name):
    teacher, student = logits(), logits()
    torch.testing.assert_close(ALL_CALLS[name](teacher + 5, student - 3), ALL_CALLS[name](teacher, student))


# ---- extremes ------------------------------------------------------------------------------------------------------


def masked_out(*tensors):
    """Return the rows with two additional masked-out ids, one at the start and one at the end."""
    return tuple(torch.nn.functional.pad(tensor, (1, 1), value=-INF) for tensor in tensors)


def permuted(tensor):
    return tensor.roll(1, dims=-1)


def extremes(dtype):
    wide = logits(scale=1e4).clamp(-1e4, 1e4)
    peak = torch.zeros(3, 7)
    peak[:, 2] = 1e4
    one_hot = torch.full((3, 7), -INF)
    one_hot[:, 2] = 0.0
    return {
        "wide gaps": (wide, permuted(wide)),
        "flat student": (peak, torch.zeros(3, 7)),
        "flat teacher": (torch.zeros(3, 7), peak),
        "opposite peaks": (peak, permuted(peak)),
        "a single id": (logits(vocab=1), logits(vocab=1)),
        "masked-out ids": masked_out(logits(), logits()),
        "masked-out ids and wide gaps": masked_out(wide, permuted(wide)),
        "one id left": (one_hot, one_hot * 2),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extreme", extremes(torch.float32))
@each_energy
def test_value_and_gradient_are_finite_at_extremes(energy, extreme, dtype):
    teacher, student = (tensor.to(dtype).requires_grad_() for tensor in extremes(dtype)[extreme])
    value = energy(teacher, student)
    gradients = torch.autograd.grad(value.sum(), (teacher, student))
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert (value >= 0).all()
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)


@each_energy
def test_masked_out_ids_change_neither_value_nor_gradient(energy):
    teacher, student = logits(), logits()
    value, gradient = value_and_gradient(energy, teacher, student)
    padded_value, padded_gradient = value_and_gradient(energy, *masked_out(teacher, student))
    torch.testing.assert_close(padded_value, value)
    torch.testing.assert_close(padded_gradient[:, 1:-1], gradient)
    assert (padded_gradient[:, [0, -1]] == 0).all()


@pytest.mark.parametrize("name", sorted(set(CALLS) - ON_LOGITS - {"rkl", "adaptive_kl"}))
def test_a_teacher_of_minus_infinity_is_a_probability_of_zero(name):
    teacher, student = logits(), logits()
    floor = teacher.clone()
    teacher[:, 3], floor[:, 3] = -INF, -1e5
    value, gradient = value_and_gradient(CALLS[name], teacher, student)
    expected_value, expected_gradient = value_and_gradient(CALLS[name], floor, student)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("t", [0.0, 0.4, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("side", [0, 1])
def test_a_target_between_student_and_teacher_has_no_id_that_its_side_masks_out(side, t):
    pair = [logits(), logits()]
    floor = [each.clone() for each in pair]
    pair[side][:, 3], floor[side][:, 3] = -INF, -1e5
    value, gradient = value_and_gradient(partial(taid, t=t), *pair)
    if side and t == 1:  # all of the teacher's, which the student cannot reach
        assert (value == INF).all()
        return
    expected_value, expected_gradient = value_and_gradient(partial(taid, t=t), *floor)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", ["fkl", "rkl", "adaptive_kl"])
def test_a_divergence_that_is_infinite_says_so(name):
    teacher, student = logits(), logits()
    (teacher if name == "rkl" else student)[:, 3] = -INF
    assert (CALLS[name](teacher, student) == INF).all()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, INF])
@each_energy
def test_a_broken_logit_shows_in_its_row_and_nowhere_else(energy, bad, side):
    pair = [logits(), logits()]
    sound = energy(*pair)
    pair[side][2, 4] = bad
    value = energy(*pair)
    assert not value[2].isfinite()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(value[others], sound[others])


@each_energy
def test_half_precision_logits_are_computed_in_float32(energy):
    teacher, student = logits(dtype=torch.bfloat16), logits(dtype=torch.bfloat16)
    value, gradient = value_and_gradient(energy, teacher, student)
    expected, expected_gradient = value_and_gradient(energy, teacher.float(), student.float())
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient.bfloat16())


@each_energy
def test_one_side_may_be_of_another_dtype(energy):
    teacher, student = logits(dtype=torch.bfloat16), logits(dtype=torch.float32)
    torch.testing.assert_close(energy(teacher, student), energy(teacher.float(), student))
    assert energy(teacher, student.double()).dtype == torch.float64


@each_energy
def test_energies_leave_their_inputs_as_they_were(energy):
    pair = masked_out(logits(), logits())
    copies = [tensor.clone() for tensor in pair]
    value_and_gradient(energy, *pair)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(pair, copies, strict=True))


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, 1.5])
@pytest.mark.parametrize(("name", "option"), [("sfkl", "skew"), ("srkl", "skew"), ("js", "mixture")])
def test_a_weight_outside_zero_and_one_is_refused(name, option, weight):
    with pytest.raises(ValueError, match=f"{option} is {weight}, expected a number strictly between 0 and 1"):
        ENERGIES[name](logits(), logits(), **{option: weight})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fkl", {"teacher_temperature": 0.0}),
        ("tvd", {"student_temperature": -1.0}),
        ("ctkd", {"temperature": -2.0}),
        ("adaptive_kl", {"head_mass": 1.0}),
        ("taid", {"t": 1.5}),
        ("taid", {"t": -0.5}),
    ],
)
def test_an_option_out_of_its_range_is_refused(name, options):
    (value,) = options.values()
    with pytest.raises(ValueError, match=f"is {value}, expected a"):
        ENERGIES[name](logits(), logits(), **options)


def test_adaptive_kl_sends_tied_ids_to_the_head_in_their_order():
    teacher = torch.zeros(1, 1024, dtype=torch.float64)
    student = logits(1, 1024)
    expected = adaptive_oracle([1 / 1024] * 1024, softmax(student[0].tolist()))
    assert ENERGIES["adaptive_kl"](teacher, student).item() == pytest.approx(expected)


# ---- cross-entropy, statistics, features ----------------------------------------------------------------------------


def test_cross_entropy_is_the_negative_log_probability_of_the_target():
    student, targets = logits(), torch.tensor([0, 3, 6, 1, 1])
    expected = [-math.log(softmax(z)[y]) for z, y in zip(student.tolist(), targets.tolist(), strict=True)]
    torch.testing.assert_close(cross_entropy(student, targets), torch.tensor(expected, dtype=torch.float64))
    assert gradcheck(lambda z: cross_entropy(z, targets), student.requires_grad_())


def test_cross_entropy_is_forward_kl_from_a_one_hot_teacher():
    student, targets = logits(), torch.tensor([0, 3, 6, 1, 1])
    teacher = torch.full_like(student, -INF).scatter_(1, targets[:, None], 0.0)
    value, gradient = value_and_gradient(lambda z_t, z_s: forward_kl(z_t, z_s), teacher, student)
    expected, expected_gradient = value_and_gradient(lambda _, z_s: cross_entropy(z_s, targets), teacher, student)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_cross_entropy_refuses_the_label_of_rows_that_do_not_count():
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy(logits(2), torch.tensor([1, -100]))


def test_entropy_equals_the_plain_loop_and_its_finite_differences():
    rows = logits()
    expected = [-math.fsum(a * math.log(a) for a in softmax(z)) for z in rows.tolist()]
    torch.testing.assert_close(entropy(rows), torch.tensor(expected, dtype=torch.float64))
    assert gradcheck(entropy, rows.requires_grad_())


def test_entropy_runs_from_zero_to_the_log_of_the_vocabulary():
    rows = torch.tensor([[1e4, 0.0, 0.0, -INF], [2.0, 2.0, 2.0, -INF]], requires_grad=True)
    value, gradient = value_and_gradient(lambda _, z: entropy(z), None, rows)
    torch.testing.assert_close(value, torch.tensor([0.0, math.log(3)]))
    assert gradient.isfinite().all()


def test_matching_distance_centres_each_row_and_skips_masked_out_ids():
    teacher, student = logits(), logits()
    expected = []
    for a, b in zip(teacher.tolist(), student.tolist(), strict=True):
        gaps = [(x - math.fsum(a) / 7) - (y - math.fsum(b) / 7) for x, y in zip(a, b, strict=True)]
        expected.append(math.fsum(map(abs, gaps)) / 7)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(matching_distance(teacher, student), expected)
    torch.testing.assert_close(matching_distance(*masked_out(teacher + 4, student - 9)), expected)


def test_an_energy_is_found_by_its_name_in_a_spec():
    teacher, student = logits(), logits()
    assert torch.equal(betakd_ray.energy("fkl", teacher, student), forward_kl(teacher, student))
    assert torch.equal(
        betakd_ray.energy("ctkd", teacher, student, temperature=2.0),
        curriculum_temperature(teacher, student, temperature=2.0),
    )
    with pytest.raises(ValueError, match=r"no energy 'kl' .* fkl, rkl"):
        betakd_ray.energy("kl", teacher, student)
    unchecked = inspect.unwrap(betakd_ray.energy)  # as users have it, without the shape checks of these tests
    for other in (student[:1], student[:, :1], student[0]):  # all of them would broadcast
        with pytest.raises(ValueError, match=r"teacher_logits are \[5, 7\] and student_logits \["):
            unchecked("fkl", teacher, other)


def test_feature_distance_is_the_mean_over_channels():
    teacher, student = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    expected = [math.fsum((teacher[n, c].item() - student[n, c].item()) ** 2 for c in range(4)) / 4 for n in range(3)]
    torch.testing.assert_close(feature_distance(teacher, student), torch.tensor(expected, dtype=torch.float64))
    assert gradcheck(feature_distance, (teacher.requires_grad_(), student.requires_grad_()))


def test_relation_compares_the_flattened_gram_matrices():
    teacher, student = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    expected = []
    for f_t, f_s in zip(teacher.tolist(), student.tolist(), strict=True):
        grams = [[math.fsum(x * y for x, y in zip(a, b, strict=True)) for a in f for b in f] for f in (f_t, f_s)]
        expected.append(1 - cosine(*grams))
    torch.testing.assert_close(relation(teacher, student), torch.tensor(expected, dtype=torch.float64))
    assert gradcheck(relation, (teacher.requires_grad_(), student.requires_grad_()))


def test_relation_is_blind_to_scale_and_rotation():
    teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    value, gradient = value_and_gradient(relation, teacher, 3 * teacher @ rotation)
    assert value.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize(("energy", "shape"), [(feature_distance, (6, 5)), (relation, (2, 6, 5))])
def test_feature_energies_are_zero_at_agreement_and_finite_at_the_extremes(energy, shape):
    features = torch.randn(shape)
    value, gradient = value_and_gradient(energy, features, features.clone())
    assert (value == 0).all()
    assert (gradient == 0).all()
    for teacher, student in [
        (1e4 * features, -1e4 * features),
        (features, torch.zeros(shape)),
        (0 * features, features),
    ]:
        value, gradient = value_and_gradient(energy, teacher, student)
        assert value.isfinite().all()
        assert (value >= 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("energy", "shape"), [(feature_distance, (6, 5)), (relation, (2, 6, 5))])
def test_feature_energies_are_computed_in_float32_under_autocast(energy, shape):
    teacher, student = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = value_and_gradient(energy, teacher, student)
    assert torch.equal(value, energy(teacher.float(), student.float()))
    assert gradient.dtype == torch.bfloat16


def test_energies_of_a_row_depend_on_no_other_row():
    teacher, student = logits(), logits()
    for name, energy in ALL_CALLS.items():
        alone = torch.cat([energy(teacher[n : n + 1], student[n : n + 1]) for n in range(5)])
        torch.testing.assert_close(energy(teacher, student), alone, msg=name)


def test_total_variation_keeps_its_digits_over_a_large_vocabulary():
    teacher, student = logits(2, 150_000, dtype=torch.float32), logits(2, 150_000, dtype=torch.float32)
    torch.testing.assert_close(
        total_variation(teacher, student).double(),
        total_variation(teacher.double(), student.double()),
        rtol=1e-5,
        atol=0,
    )
