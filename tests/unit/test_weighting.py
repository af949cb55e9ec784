"""β against plain loops, at its start, at its fixed point, at its bounds, and sample by sample."""

import math

import pytest
import torch
from pydantic import TypeAdapter
from torch.utils._python_dispatch import TorchDispatchMode

from betakd_ray.spec import Weighting
from betakd_ray.weighting import BetaWeighting

WIDTH = 6
each_positivity = pytest.mark.parametrize("positivity", ["softplus", "exp"])
each_learned = pytest.mark.parametrize("kind", ["task", "instance"])


def build(channels=("fkl",), *, ce=True, **options):
    spec = TypeAdapter(Weighting).validate_python(options)
    return BetaWeighting(spec, channels, ce=ce, feature_sizes={"teacher_vision": WIDTH, "teacher_answer": WIDTH})


def inputs(batch=3, images=None):
    features = {"teacher_vision": torch.randn(batch, WIDTH), "teacher_answer": torch.randn(batch, WIDTH)}
    return features, torch.ones(batch, dtype=torch.bool) if images is None else torch.tensor(images)


def at(weighting, u):
    with torch.no_grad():
        weighting.u.fill_(u)
    return weighting


def fit(weighting, loss, steps, lr=0.05):
    optimizer = torch.optim.Adam(weighting.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


# ---- start, fixed point, bounds ----------------------------------------------------------------------------------


@each_positivity
@each_learned
@pytest.mark.parametrize("weight_ce", [False, True])
def test_every_beta_starts_at_one(kind, positivity, weight_ce):
    weighting = build(("fkl", "rkl"), kind=kind, positivity=positivity, weight_ce=weight_ce)
    torch.testing.assert_close(weighting.beta(*inputs()), torch.ones(3, 3))


@each_positivity
@each_learned
@pytest.mark.parametrize(("d", "energy"), [(1.0, 0.05), (1.0, 3.0), (4.0, 0.7)])
def test_beta_of_a_constant_energy_settles_at_its_fixed_point(kind, positivity, d, energy):
    weighting = build(kind=kind, positivity=positivity, d=d)
    features, has_image = inputs(2)
    energies = torch.tensor([[1.0, energy]]).expand(2, -1)
    fit(weighting, lambda: weighting.loss(weighting.beta(features, has_image), energies).mean(), 1500, lr=0.2)
    beta = weighting.beta(features, has_image)
    assert beta[:, 1].tolist() == pytest.approx([d / (2 * energy)] * 2, rel=1e-3)
    assert (beta[:, 0] == 1).all(), "the cross-entropy keeps weight 1"


@each_positivity
@pytest.mark.parametrize("u", [-1e6, -200.0, -30.0, -1.0, 1.0, 30.0, 200.0, 1e6])
def test_beta_stays_inside_its_bounds_and_its_gradient_is_finite(positivity, u):
    weighting = at(build(kind="task", positivity=positivity, log_bound=5.0), u)
    beta = weighting.beta(*inputs(1))[0, 1]
    beta.backward()
    assert math.exp(-5) * (1 - 1e-6) <= beta.item() <= math.exp(5) * (1 + 1e-6)
    assert weighting.u.grad.isfinite().all()


def test_saturation_is_the_share_of_samples_at_the_bounds():
    weighting = build(kind="task", log_bound=5.0)
    betas = torch.tensor([[1.0, 1.0], [1.0, 147.0], [1.0, 0.0068], [1.0, 100.0]])
    assert weighting.saturated(betas).tolist() == [0.0, 0.5]
    betas[0, 1] = math.nan  # a sample without the channel
    assert weighting.saturated(betas)[1].item() == pytest.approx(2 / 3)
    assert build(kind="equal").saturated(betas).tolist() == [0.0, 0.0]


@each_positivity
@each_learned
@pytest.mark.parametrize(("first", "then"), [(0.0, 1.0), (1e3, 0.5)])
def test_a_beta_that_was_driven_to_a_bound_comes_back(kind, positivity, first, then):
    """Adam with clipped gradients moves it, as in training."""
    weighting = build(kind=kind, positivity=positivity)
    features, has_image = inputs(1)
    optimizer = torch.optim.AdamW(weighting.parameters(), lr=1e-2 if kind == "instance" else 0.5, weight_decay=0.0)
    reached = []
    for energy, steps in ((first, 600), (then, 1200)):
        for _ in range(steps):
            optimizer.zero_grad()
            energies = torch.tensor([[1.0, energy]])
            weighting.loss(weighting.beta(features, has_image), energies).sum().backward()
            torch.nn.utils.clip_grad_norm_(weighting.parameters(), 1.0)
            optimizer.step()
        reached.append(weighting.beta(features, has_image)[0, 1].item())
    assert abs(math.log(reached[0])) > 3
    assert 0.25 / then < reached[1] < 1 / then, "about d/(2ℓ); it still swings, as the rate does not decay"


@pytest.mark.parametrize("u", [-1e4, -46.0, 46.0, 1e4])
def test_far_outside_the_bounds_a_gradient_leads_back_and_none_farther_out(u):
    weighting = at(build(kind="task", positivity="exp"), u)
    gradients = []
    for energy in (0.0, 1e9):
        weighting.u.grad = None
        weighting.loss(weighting.beta(*inputs(1)), torch.tensor([[0.0, energy]])).sum().backward()
        gradients.append(weighting.u.grad.item())
    grows, shrinks = gradients
    back, out = (shrinks, grows) if u > 0 else (grows, shrinks)
    assert back * u > 0, "descent lowers |u|"
    assert out == 0


@each_positivity
@pytest.mark.parametrize("u", [-20.0, -0.5, 0.5, 20.0])
@pytest.mark.parametrize("energies", [(0.004, 0.0), (0.002, 0.004), (140.0, 10.0)])
def test_the_gradient_is_the_same_however_the_batch_is_cut(positivity, u, energies):
    """The same holds if one sample moves β towards its bound and another one away from it."""
    weighting = at(build(kind="task", positivity=positivity), u)
    values = torch.tensor([[1.0, each] for each in energies])
    found = []
    for batch in (1, 2):
        weighting.u.grad = None
        for part in values.split(batch):
            weighting.loss(weighting.beta(*inputs(batch)), part).sum().backward()
        found.append(weighting.u.grad.item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != 0


@each_positivity
@each_learned
def test_a_vanishing_energy_stays_finite_for_ten_thousand_steps(kind, positivity):
    weighting = build(kind=kind, positivity=positivity)
    features, has_image = inputs(1)
    optimizer = torch.optim.AdamW(weighting.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(10_000):
        energies = torch.tensor([[1.0, math.exp(-step / 50)]])  # in float32 it is zero half of the time
        optimizer.zero_grad(set_to_none=True)
        loss = weighting.loss(weighting.beta(features, has_image), energies).sum()
        loss.backward()
        optimizer.step()
    beta = weighting.beta(features, has_image)[0, 1].item()
    assert math.isfinite(loss.item())
    assert loss.item() < 0
    assert 1 < beta <= math.exp(5) * (1 + 1e-6)


# ---- the loss ----------------------------------------------------------------------------------------------------


def loss_oracle(beta, energies, present, learned, d):
    rows = []
    for b_row, e_row, p_row in zip(beta.tolist(), energies.tolist(), present.tolist(), strict=True):
        total = 0.0
        for b, e, here, learns in zip(b_row, e_row, p_row, learned, strict=True):
            if here:
                total += b * e - (d / 2 * math.log(b) if learns else 0.0)
        rows.append(total)
    return torch.tensor(rows, dtype=torch.float64)


@each_learned
@pytest.mark.parametrize("weight_ce", [False, True])
def test_the_loss_is_a_plain_sum_over_channels_in_float64(kind, weight_ce):
    weighting = build(("fkl", "fd"), kind=kind, weight_ce=weight_ce, d=3.0)
    beta = torch.rand(5, 3, dtype=torch.float64) + 0.1
    energies = torch.rand(5, 3, dtype=torch.float64)
    present = torch.rand(5, 3) > 0.3
    expected = loss_oracle(beta, energies, present, [weight_ce, True, True], 3.0)
    torch.testing.assert_close(weighting.loss(beta, energies, present), expected, rtol=1e-12, atol=1e-12)


def test_equal_is_the_plain_sum():
    weighting = build(("fkl", "rkl"), kind="equal")
    energies = torch.rand(4, 3)
    torch.testing.assert_close(weighting.loss(weighting.beta(*inputs(4)), energies), energies.sum(1))
    assert not list(weighting.parameters())


@each_learned
@each_positivity
def test_the_gradient_splits_into_the_student_s_and_the_betas(kind, positivity):
    weighting = build(("fkl", "rkl"), kind=kind, positivity=positivity, weight_ce=True)
    with torch.no_grad():
        for parameter in weighting.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    weighting.double()
    features, has_image = inputs(4, [True, False, True, True])
    energies = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    raw = weighting.u.expand(4, -1) if kind == "task" else None
    if raw is None:
        raw = weighting.net(weighting._features(features, has_image).double())
    beta = weighting._positive(raw)
    parameters = [energies, *weighting.parameters()]

    def gradients(loss):
        return torch.autograd.grad(loss.sum(), parameters, retain_graph=True, allow_unused=True)

    whole = gradients(weighting.loss(beta, energies))
    split = gradients((beta.detach() * energies).sum(1) + weighting.loss(beta, energies.detach()))
    for expected, actual in zip(whole, split, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ---- instances ---------------------------------------------------------------------------------------------------


def test_beta_is_per_instance_and_samples_of_opposite_noise_move_apart():
    """Multiplied by the batch mean (2.05 in both), both β would settle at 1/4.1 instead of at 5 and 1/8."""
    weighting = build(kind="instance", hidden_size=16)
    features, has_image = inputs(2)
    energies = torch.tensor([[1.0, 0.1], [1.0, 4.0]])
    fit(weighting, lambda: weighting.loss(weighting.beta(features, has_image), energies).mean(), 1500)
    beta = weighting.beta(features, has_image)[:, 1]
    assert beta.tolist() == pytest.approx([5.0, 0.125], rel=1e-2)


def test_beta_s_gradient_of_one_sample_sees_only_that_sample_s_energy():
    weighting = build(kind="instance")
    beta = torch.ones(2, 2, requires_grad=True)
    energies = torch.tensor([[1.0, 0.1], [1.0, 4.0]])
    (gradient,) = torch.autograd.grad(weighting.loss(beta, energies).sum(), beta)
    assert gradient[:, 1].tolist() == pytest.approx([0.1 - 0.5, 4.0 - 0.5])


def test_beta_follows_the_entropy_and_not_only_which_of_its_two_numbers_is_larger():
    spec = TypeAdapter(Weighting).validate_python({"kind": "instance", "features": ["teacher_entropy"]})
    weighting = BetaWeighting(spec, ["fkl"], feature_sizes={"teacher_entropy": 2})
    torch.nn.init.normal_(weighting.net[-1].weight)
    features = {"teacher_entropy": torch.tensor([[0.1, 0.2], [2.0, 4.0]])}
    sure, unsure = weighting.beta(features, torch.ones(2, dtype=torch.bool))[:, 1].tolist()
    assert sure != pytest.approx(unsure, rel=1e-2)


def test_a_text_only_sample_takes_the_learned_vector_and_not_its_features():
    weighting = build(kind="instance", features=["teacher_answer", "teacher_vision"])
    torch.nn.init.normal_(weighting.net[-1].weight)
    features, has_image = inputs(3, [True, False, True])
    features["teacher_vision"][1] = math.nan
    before = weighting.beta(features, has_image)
    assert before.isfinite().all()
    (gradient,) = torch.autograd.grad(before.sum(), weighting.text_only)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        weighting.text_only.add_(torch.randn(WIDTH))
    after = weighting.beta(features, has_image)
    assert (before != after)[:, 1].tolist() == [False, True, False]


@each_learned
def test_an_absent_channel_gives_neither_its_energy_nor_its_log_beta(kind):
    weighting = build(("fkl", "fd"), kind=kind)
    beta = torch.full((2, 3), 2.0, requires_grad=True)
    energies = torch.tensor([[1.0, 0.5, 0.25], [1.0, 0.5, math.nan]], requires_grad=True)
    present = torch.tensor([[True, True, True], [True, True, False]])
    loss = weighting.loss(beta, energies, present)
    half_log = 0.5 * math.log(2)
    assert loss.tolist() == pytest.approx([3.5 - 2 * half_log, 3.0 - half_log])
    loss.sum().backward()
    assert beta.grad[1, 2] == 0
    assert energies.grad[1, 2] == 0


def test_a_text_only_sample_has_no_fd_in_a_loop_of_your_own():
    weighting = at(build(("fd",), kind="task"), 1.0)
    energies = {"ce": torch.tensor([1.0, 3.0]), "fd": torch.tensor([0.5, math.nan])}
    loss, log = weighting(energies, has_image=torch.tensor([True, False]))
    beta = weighting.beta({}, torch.ones(1, dtype=torch.bool))[0, 1].item()
    assert loss.item() == pytest.approx((1 + beta * 0.5 - 0.5 * math.log(beta) + 3) / 2)
    assert log["energy/fd"].item() == 0.5
    assert log["energy/ce"].item() == 2.0
    assert log["beta/fd"].item() == pytest.approx(beta)


def test_features_carry_no_gradient_to_the_teacher():
    weighting = build(kind="instance")
    torch.nn.init.normal_(weighting.net[-1].weight)
    features, has_image = inputs()
    features["teacher_vision"].requires_grad_()
    weighting.beta(features, has_image).sum().backward()
    assert features["teacher_vision"].grad is None


@each_learned
def test_without_an_energy_there_is_nothing_to_learn_and_no_feature_is_asked_for(kind):
    weighting = BetaWeighting(TypeAdapter(Weighting).validate_python(kind), ())
    assert weighting.beta({}, torch.ones(2, dtype=torch.bool)).tolist() == [[1.0], [1.0]]


@each_learned
def test_beta_is_float32_for_half_precision_features(kind):
    features, has_image = inputs()
    halves = {name: feature.bfloat16() for name, feature in features.items()}
    assert build(kind=kind).beta(halves, has_image).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "instance", "features": ["teacher_entropy"]}, "feature_sizes has no .*teacher_entropy"),
        ({"kind": "manual", "weights": {"rlk": 2.0}}, "names .*rlk.*the energies are .*fkl"),
        ({"kind": "manual", "weights": "auto", "ce": False}, "ce is false"),
        ({"kind": "task", "weight_ce": True, "ce": False}, "ce is false"),
        ({"kind": "task", "channels": ("fkl", "fkl")}, "name each energy once"),
        ({"kind": "task", "channels": ("ce", "fkl")}, "name each energy once"),
    ],
)
def test_what_does_not_go_together_is_said_at_once(options, match):
    with pytest.raises(ValueError, match=match):
        build(**options)


@pytest.mark.parametrize("names", [("ce",), ("ce", "fkl", "rkl"), ("fkl",)])
def test_a_loop_of_your_own_gives_the_energies_of_the_channels(names):
    energies = {name: torch.rand(2) for name in names}
    with pytest.raises(ValueError, match=r"energies are .*give one for each of the channels \['ce', 'fkl'\]"):
        build(kind="task")(energies)


def test_a_loop_of_your_own_gives_the_features_that_beta_needs():
    energies = {"ce": torch.rand(2), "fkl": torch.rand(2)}
    with pytest.raises(ValueError, match=r"features has no .*teacher_vision"):
        build(kind="instance")(energies)


class Unasked(TorchDispatchMode):
    """Torch mode that fails if the host would wait for the device to read a number or a size."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward", "is_nonzero"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["equal", "manual", "task", "instance"])
def test_the_host_never_waits_for_the_device(kind):
    weighting = build(("fkl", "fd"), kind=kind)
    features, has_image = inputs(2, [True, False])
    energies = torch.rand(2, 3, requires_grad=True)
    present = torch.tensor([[True, True, True], [True, True, False]])
    with Unasked():
        weighting.loss(weighting.beta(features, has_image), energies, present).sum().backward()
        weighting.observe(energies.detach().mean(0))
    with pytest.raises(AssertionError), Unasked():
        energies.sum().item()


@each_learned
def test_beta_is_float32_also_under_autocast(kind):
    weighting = build(kind=kind)
    with torch.no_grad():
        for parameter in weighting.parameters():
            parameter.normal_()
    features = inputs(4)
    plain = weighting.beta(*features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weighting.beta(*features), plain)


# ---- manual ------------------------------------------------------------------------------------------------------


def test_manual_weights_are_the_given_ones_and_take_no_log():
    weighting = build(("fkl", "rkl"), kind="manual", weights={"rkl": 0.5, "fkl": 2.0})
    energies = torch.rand(2, 3)
    beta = weighting.beta(*inputs(2))
    assert beta.tolist() == [[1.0, 2.0, 0.5]] * 2
    torch.testing.assert_close(weighting.loss(beta, energies), energies @ torch.tensor([1.0, 2.0, 0.5]))
    weighting.observe(torch.rand(3))
    assert weighting.weights.tolist() == [1.0, 2.0, 0.5]


def test_auto_weights_come_from_the_first_steps_and_stay():
    weighting = build(("fkl", "fd"), kind="manual", weights="auto", auto_steps=2)
    weighting.observe(torch.tensor([2.0, 1.0, 0.0]))
    assert weighting.weights.tolist() == [1.0, 1.0, 1.0]
    weighting.observe(torch.tensor([4.0, 0.5, 0.0]))
    assert weighting.weights.tolist() == [1.0, 4.0, 1.0], "6 / 1.5; an energy without a scale keeps 1"
    weighting.observe(torch.tensor([100.0, 1.0, 1.0]))
    assert weighting.weights.tolist() == [1.0, 4.0, 1.0]


def test_auto_weights_do_not_count_a_step_in_which_no_sample_had_the_channel():
    weighting = build(("fd",), kind="manual", weights="auto", auto_steps=4)
    for distance in (2.0, 0.0, 2.0, 0.0):
        weighting.observe(torch.tensor([1.0, distance]))
    assert weighting.weights.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("ce", [2.0, 0.0])
def test_auto_weights_are_finite_whatever_the_scales(ce):
    weighting = build(("fkl",), kind="manual", weights="auto", auto_steps=1)
    weighting.observe(torch.tensor([ce, 1e-39]))
    assert weighting.weights.log().abs() == pytest.approx([0.0, 20.0])


def test_auto_weights_survive_a_checkpoint():
    weighting, other = (build(kind="manual", weights="auto", auto_steps=2) for _ in range(2))
    weighting.observe(torch.tensor([2.0, 1.0]))
    other.load_state_dict(weighting.state_dict())
    other.observe(torch.tensor([4.0, 0.5]))
    assert other.weights.tolist() == [1.0, 4.0]
