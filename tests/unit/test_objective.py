"""The chunked objective against the whole logits and autograd, in float64; and against loops."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from betakd_ray.energies import ENERGIES
from betakd_ray.energies.rows import cross_entropy
from betakd_ray.objective import STATISTICS, RowObjective, TeacherRows, energy_function, segment_mean, top_k
from betakd_ray.spec import ObjectiveSpec
from betakd_ray.spec.energies import BY_NAME, ProbabilitiesEnergy
from tests.autograd_energies import ORACLES

ROWS, WIDTH, TEACHER_WIDTH, VOCAB = 7, 5, 6, 11
NAMES = list(ENERGIES)
MOVING = {"ctkd": torch.tensor(2.5), "taid": torch.tensor(0.6)}
TOGETHER = [{"kind": "fkl", "student_temperature": 2.0}, "rkl", {"kind": "mse_logits", "standardize": True}]
CASES = {**{name: [name] for name in NAMES}, "together": [*TOGETHER, "cosine_probs"]}


OPTIONS = [
    ("fkl", {"teacher_temperature": 2.0, "student_temperature": 0.5, "reference": True}, {}),
    ("rkl", {"teacher_temperature": 2.0, "student_temperature": 0.5}, {}),
    ("sfkl", {"skew": 0.3, "student_temperature": 0.5, "reference": True}, {}),
    ("srkl", {"skew": 0.3, "teacher_temperature": 2.0}, {}),
    ("js", {"mixture": 0.3, "teacher_temperature": 2.0}, {}),
    ("tvd", {"teacher_temperature": 2.0}, {}),
    ("adaptive_kl", {"head_mass": 0.9, "student_temperature": 0.5}, {}),
    ("ctkd", {"reference": True}, {"temperature": MOVING["ctkd"]}),
    ("taid", {"reference": True}, {"t": MOVING["taid"]}),
    ("mse_logits", {"standardize": True}, {}),
    ("mse_probs", {"student_temperature": 0.5}, {}),
    ("cosine_logits", {"standardize": True}, {}),
    ("cosine_probs", {"teacher_temperature": 2.0}, {}),
]


@pytest.mark.parametrize(("name", "options", "moving"), OPTIONS)
def test_a_channel_is_the_energy_with_the_options_of_its_spec(name, options, moving):
    teacher, student = torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB)
    (energy,) = ObjectiveSpec(energies=[{"kind": name, **options}], weighting="equal").energies
    value = energy_function(energy)(teacher, student, MOVING)
    assert torch.equal(value, ENERGIES[name](teacher, student, **options, **moving))
    assert not torch.allclose(value, ENERGIES[name](teacher, student, **moving), rtol=1e-3)


class Case:
    """A head, a teacher's head, rows and weights, all random."""

    def __init__(
        self, energies=(), *, ce=True, chunk_rows=1000, vocab=VOCAB, teacher_vocab=VOCAB, bias=True, dtype=torch.float64
    ):
        self.spec = ObjectiveSpec(energies=energies, ce=ce, chunk_rows=chunk_rows, weighting="equal")
        self.head = nn.Linear(WIDTH, vocab, bias=bias, dtype=dtype)
        self.teacher_head = torch.randn(teacher_vocab, TEACHER_WIDTH, dtype=dtype) if energies else None
        self.rows = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
        self.teacher_rows = torch.randn(ROWS, TEACHER_WIDTH, dtype=dtype) if energies else None
        self.targets = torch.randint(vocab, (ROWS,))
        self.objective = RowObjective(self.spec, self.head, self.teacher_head)
        weights = torch.rand(ROWS, len(self.objective.channels), dtype=torch.float64)
        self.weights = weights if dtype == torch.float64 else weights.float()

    @property
    def teacher(self):
        return None if self.teacher_rows is None else TeacherRows(hidden=self.teacher_rows)

    @property
    def learned(self):
        return [self.rows, *self.head.parameters()]

    def chunked(self, **options):
        return self.objective(self.rows, self.teacher, self.targets, self.weights, moving=MOVING, **options)

    def whole(self):
        """Return (total, values), computed from all logits at once, for autograd."""
        logits = self.head(self.rows)
        values = [cross_entropy(logits, self.targets)] if self.spec.ce else []
        for energy in self.spec.energies:
            teacher_logits = self.teacher_rows @ self.teacher_head.t()
            common = min(logits.shape[1], teacher_logits.shape[1])
            at = {energy.moving: MOVING[energy.name]} if energy.moving else {}
            values.append(ORACLES[energy.name](teacher_logits[:, :common], logits[:, :common], **energy.options, **at))
        values = torch.stack(values, dim=1)
        return (values * self.weights).sum(), values


def assert_same(case, scale=1.0):
    total, values, _ = case.chunked()
    expected_total, expected_values = case.whole()
    torch.testing.assert_close(total, expected_total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values, expected_values, rtol=1e-12, atol=1e-12)
    assert not values.requires_grad
    actual = torch.autograd.grad(scale * total, case.learned)
    expected = torch.autograd.grad(scale * expected_total, case.learned)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
@pytest.mark.parametrize("energies", CASES.values(), ids=CASES)
def test_chunks_give_the_values_and_gradients_of_the_whole_logits(energies, chunk_rows):
    assert_same(Case(energies, chunk_rows=chunk_rows))


@pytest.mark.parametrize("ce", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_and_bias_may_be_absent(ce, bias):
    assert_same(Case(["fkl"], ce=ce, bias=bias, chunk_rows=3))


def test_without_a_teacher_only_the_cross_entropy_is_left():
    assert_same(Case())


@pytest.mark.parametrize("teacher_vocab", [VOCAB - 3, VOCAB + 3])
@pytest.mark.parametrize("energies", CASES.values(), ids=CASES)
def test_padded_vocabularies_are_compared_on_the_common_ids(energies, teacher_vocab):
    assert_same(Case(energies, teacher_vocab=teacher_vocab, chunk_rows=3))


def test_the_gradient_scales_with_what_comes_from_above():
    assert_same(Case(["fkl"]), scale=-2.5)


def test_cross_entropy_is_the_plain_loop():
    case = Case()
    _, values, _ = case.chunked()
    for row, target, value in zip(case.rows.tolist(), case.targets.tolist(), values[:, 0].tolist(), strict=True):
        weight, bias = case.head.weight.tolist(), case.head.bias.tolist()
        logits = [
            math.fsum(w * x for w, x in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)
        ]
        assert value == pytest.approx(math.log(math.fsum(map(math.exp, logits))) - logits[target], rel=1e-12)


@pytest.mark.parametrize("culprit", ["rows", "teacher_rows"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_weight_poisons_nothing_when_it_is_not_finite(culprit, bad):
    case = Case(["fkl", "cosine_probs"], chunk_rows=3)
    case.weights[2] = 0
    _, clean, _ = case.chunked()
    expected_total, _ = case.whole()
    expected = torch.autograd.grad(expected_total, case.learned)
    with torch.no_grad():
        getattr(case, culprit)[2] = bad
    total, values, _ = case.chunked()
    gradients = torch.autograd.grad(total, case.learned)
    torch.testing.assert_close(total, expected_total.detach(), check_stride=False)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    others = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(values[others], clean[others])


def test_a_row_with_weight_that_is_not_finite_is_not_hidden():
    case = Case(["fkl"])
    with torch.no_grad():
        case.rows[2] = math.nan
    total, *_ = case.chunked()
    assert not total.isfinite()


@pytest.mark.parametrize("chunk_rows", [2, 1000])
def test_the_gradient_of_a_moving_number_is_that_of_the_whole_logits(chunk_rows, monkeypatch):
    case = Case(["ctkd", "taid"], chunk_rows=chunk_rows)
    moving = {name: value.double().requires_grad_() for name, value in MOVING.items()}
    monkeypatch.setattr("tests.unit.test_objective.MOVING", moving)
    expected = torch.autograd.grad(case.whole()[0], moving["ctkd"])[0]
    gradients = case.chunked().moving_gradients
    assert set(gradients) == {"ctkd"}, "taid's t is not learned: its gradient would cost a backward pass"
    torch.testing.assert_close(gradients["ctkd"], expected)


@pytest.mark.parametrize("teacher", [None, TeacherRows()])
def test_energies_without_a_teacher_s_rows_are_an_error(teacher):
    """It must not become the cross-entropy with the weights of the energies."""
    case = Case(["fkl"])
    with pytest.raises(ValueError, match="compare with a teacher: give its rows"):
        case.objective(case.rows, teacher, case.targets, case.weights)


# ---- top-k signals -----------------------------------------------------------------------------------------------

ON_BUCKETS = [name for name, section in BY_NAME.items() if issubclass(section, ProbabilitiesEnergy)]


class Buckets(Case):
    """The teacher as its k largest probabilities and the rest."""

    def __init__(self, energies, k, **options):
        super().__init__(energies, **options)
        logits = self.teacher_rows @ self.teacher_head.t()
        top, self.ids, rest = top_k(logits.log_softmax(1), k)
        self.log_probs = torch.cat([top, rest], dim=1)
        self.objective.teacher_head = None

    @property
    def teacher(self):
        return TeacherRows(top_ids=self.ids.int(), top_log_probs=self.log_probs)

    def whole(self):
        """Return (total, values) on the same buckets, which a loop over the rows makes."""
        logits = self.head(self.rows)
        log_probs = logits.log_softmax(1)
        buckets = []
        for row, ids in zip(log_probs, self.ids.tolist(), strict=True):
            rest = [v for v in range(VOCAB) if v not in ids]
            buckets.append(torch.cat([row[ids], row[rest].exp().sum().log()[None]]))
        buckets = torch.stack(buckets)
        values = [cross_entropy(logits, self.targets)]
        values += [ORACLES[energy.name](self.log_probs, buckets, **energy.options) for energy in self.spec.energies]
        values = torch.stack(values, dim=1)
        return (values * self.weights).sum(), values


@pytest.mark.parametrize("chunk_rows", [3, 1000])
@pytest.mark.parametrize("name", ON_BUCKETS)
def test_a_top_k_signal_is_the_energy_on_k_ids_and_the_rest(name, chunk_rows):
    assert_same(Buckets([name], k=4, chunk_rows=chunk_rows))


@pytest.mark.parametrize("name", ON_BUCKETS)
def test_buckets_of_one_id_each_lose_nothing(name):
    torch.manual_seed(1)
    exact = Case([name])
    torch.manual_seed(1)
    bucketed = Buckets([name], k=VOCAB - 1)
    torch.testing.assert_close(bucketed.chunked().values, exact.chunked().values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ON_BUCKETS)
def test_ids_that_only_the_student_has_are_in_no_bucket(name):
    torch.manual_seed(1)
    padded = Buckets([name], k=4, teacher_vocab=VOCAB - 3)
    padded.objective.top_k_vocab = VOCAB - 3
    torch.manual_seed(1)
    cut = Buckets([name], k=4, teacher_vocab=VOCAB - 3)
    with torch.no_grad():
        cut.head.bias[-3:] = -math.inf
    torch.testing.assert_close(padded.chunked().values[:, 1], cut.chunked().values[:, 1])


@pytest.mark.parametrize("name", ["fkl", "rkl", "sfkl", "srkl", "js", "tvd"])
def test_a_divergence_of_buckets_is_never_negative_and_grows_to_the_exact_one(name):
    values = []
    for k in (1, 3, 6, VOCAB - 1):
        torch.manual_seed(1)
        values.append(Buckets([name], k=k).chunked().values[:, 1])
    assert (values[0] >= 0).all()
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-12).all()


# ---- statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [2, 1000])
@pytest.mark.parametrize("teacher_vocab", [VOCAB, VOCAB + 3])
def test_statistics_are_columns_after_the_channels(chunk_rows, teacher_vocab):
    case = Case(["fkl"], chunk_rows=chunk_rows, teacher_vocab=teacher_vocab)
    _, values, _ = case.chunked(statistics=True)
    assert values.shape == (ROWS, 2 + len(STATISTICS))
    columns = dict(zip(STATISTICS, values[:, 2:].t(), strict=True))
    student = case.head(case.rows).detach()
    teacher = (case.teacher_rows @ case.teacher_head.t())[:, :VOCAB]

    def entropy(logits):
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)

    torch.testing.assert_close(columns["student_entropy"], entropy(student))
    torch.testing.assert_close(columns["teacher_entropy"], entropy(teacher))
    centred = (teacher - teacher.mean(1, keepdim=True)) - (student - student.mean(1, keepdim=True))
    torch.testing.assert_close(columns["matching_distance"], centred.abs().mean(1))
    assert columns["top1_agreement"].tolist() == (teacher.argmax(1) == student.argmax(1)).double().tolist()


def test_without_a_teacher_the_student_s_entropy_is_all_there_is_to_measure():
    case = Case()
    _, values, _ = case.chunked(statistics=True)
    assert case.objective.measures == ("student_entropy",)
    assert values.shape == (ROWS, 2)
    assert (values[:, 1] > 0).all()


@pytest.mark.parametrize("statistics", [False, True])
def test_a_batch_without_answer_rows_has_the_same_columns(statistics):
    case = Case(["fkl"])
    total, values, _ = case.objective(
        case.rows[:0],
        TeacherRows(hidden=case.teacher_rows[:0]),
        case.targets[:0],
        case.weights[:0],
        statistics=statistics,
    )
    assert total.item() == 0
    assert values.shape == (0, 2 + len(STATISTICS) * statistics)
    total.backward()
    assert (case.head.weight.grad == 0).all()


def test_feature_distance_alone_leaves_nothing_to_do_here():
    case = Case(["fd"], ce=False)
    total, values, _ = case.chunked()
    total.backward()
    assert total.item() == 0
    assert values.shape == (ROWS, 0)


# ---- precision, freezing -----------------------------------------------------------------------------------------


def test_a_bf16_head_accumulates_its_gradient_in_float32_over_chunks():
    many, few = (Case(["fkl"], chunk_rows=chunk_rows, dtype=torch.bfloat16) for chunk_rows in (1, 1000))
    few.head.load_state_dict(many.head.state_dict())
    few.objective.teacher_head = many.teacher_head
    few.rows, few.teacher_rows, few.targets, few.weights = many.rows, many.teacher_rows, many.targets, many.weights
    exact = Case(["fkl"])
    exact.head.load_state_dict(many.head.state_dict())
    exact.teacher_head = many.teacher_head.double()
    exact.rows = many.rows.detach().double().requires_grad_()
    exact.teacher_rows, exact.targets = many.teacher_rows.double(), many.targets
    exact.weights = many.weights.double()
    expected = torch.autograd.grad(exact.whole()[0], exact.learned)
    for case in (many, few):
        total, values, _ = case.chunked()
        assert total.dtype == values.dtype == torch.float32
        gradients = torch.autograd.grad(total, case.learned)
        for actual, wanted in zip(gradients, expected, strict=True):
            assert actual.dtype == torch.bfloat16
            torch.testing.assert_close(actual.double(), wanted, rtol=2e-2, atol=1e-2)


def test_many_small_gradients_are_not_lost_in_bf16():
    """4,096 chunks that each add the same small gradient: added up in bf16 the sum would stop growing early."""
    count = 4096
    spec = ObjectiveSpec(chunk_rows=1, weighting="equal")
    head = nn.Linear(2, 3, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    rows = torch.ones(count, 2, dtype=torch.bfloat16)
    total, *_ = RowObjective(spec, head, None)(rows, None, torch.zeros(count, dtype=torch.long), torch.ones(count, 1))
    total.backward()
    expected = count * torch.tensor([-2 / 3, 1 / 3, 1 / 3])
    torch.testing.assert_close(head.weight.grad[:, 0].float(), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(head.bias.grad.float(), expected, rtol=1e-2, atol=0)


def test_a_frozen_head_gets_no_gradient_and_the_rows_do():
    case = Case(["fkl"], chunk_rows=3)
    expected = torch.autograd.grad(case.whole()[0], case.rows)[0]
    case.head.requires_grad_(False)
    case.chunked()[0].backward()
    assert case.head.weight.grad is None
    assert case.head.bias.grad is None
    torch.testing.assert_close(case.rows.grad, expected)


def test_nothing_requires_a_gradient_under_no_grad():
    case = Case(["fkl"])
    with torch.no_grad():
        total, *_ = case.chunked()
    assert not total.requires_grad


def test_the_teacher_s_head_is_in_no_checkpoint():
    case = Case(["fkl"])
    assert set(case.objective.state_dict()) == {"lm_head.weight", "lm_head.bias"}


# ---- samples -----------------------------------------------------------------------------------------------------


def test_segment_mean_is_the_plain_loop_and_zero_for_an_empty_segment():
    values = torch.randn(6, 2, dtype=torch.float64)
    segment = torch.tensor([0, 0, 0, 2, 2, 3])
    means = segment_mean(values, segment, torch.tensor([3, 0, 2, 1]))
    expected = [values[:3].mean(0), torch.zeros(2, dtype=torch.float64), values[3:5].mean(0), values[5]]
    torch.testing.assert_close(means, torch.stack(expected))


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_same_global_batch_gives_the_same_loss_and_gradient_however_it_is_split(micro_batches):
    """Samples of 1, 2, 1 and 3 answer rows; each sample weighs 1/N, each of its rows 1/L_i of that."""
    case = Case(["fkl", "cosine_probs"], chunk_rows=2)
    counts = torch.tensor([1, 2, 1, 3])
    sample = torch.repeat_interleave(torch.arange(4), counts)
    beta = torch.rand(4, 3, dtype=torch.float64)
    case.weights = (beta / counts[:, None] / 4)[sample]
    expected_total, expected_values = case.whole()
    per_sample = torch.stack([expected_values[sample == i].mean(0) for i in range(4)])
    torch.testing.assert_close(expected_total, (beta * per_sample).sum(1).mean())
    expected = torch.autograd.grad(expected_total, case.learned)

    total = 0.0
    for part in torch.arange(4).chunk(micro_batches):
        at = torch.isin(sample, part)
        loss, values, _ = case.objective(
            case.rows[at], TeacherRows(hidden=case.teacher_rows[at]), case.targets[at], case.weights[at]
        )
        means = segment_mean(values, sample[at] - part[0], counts[part])
        torch.testing.assert_close(means, per_sample[part])
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected_total.item(), rel=1e-12)
    for leaf, wanted in zip(case.learned, expected, strict=True):
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-10, atol=1e-12)
