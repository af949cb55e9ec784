"""ctkd's temperature and taid's t: against plain loops, and what must hold over a whole job."""

import math

import pytest
import torch

from betakd_ray.curriculum import Curriculum, reversal
from betakd_ray.energies.on_logits import curriculum_temperature
from betakd_ray.spec import CurriculumTemperature, ForwardKL, TemporallyAdaptiveInterpolation
from betakd_ray.spec.energies import SECTIONS

LOSSES = [2.0, 1.5, 1.6, 0.9, 0.9, 0.4, 0.0, 0.3]


def taid(losses, **schedule):
    """Return the values of t before the first step and after each step."""
    curriculum = Curriculum([TemporallyAdaptiveInterpolation(schedule=schedule)])
    seen = [curriculum.values()["taid"].item()]
    for step, loss in enumerate(losses, start=1):
        curriculum.observe({"taid": torch.tensor(loss), "ce": torch.tensor(9.0)}, step / len(losses))
        seen.append(curriculum.values()["taid"].item())
    return seen


def test_t_is_the_plain_loop():
    t, m, previous, expected = 0.2, 0.0, None, [0.2]
    for step, loss in enumerate(LOSSES, start=1):
        change = 0.0 if previous is None else (previous - loss) / (previous + 1e-15)
        m = 0.9 * m + 0.1 * change
        t = min(0.8, max(0.2 + 0.6 * step / len(LOSSES), t + 0.3 * 0.5 * (1 + math.tanh(m / 2)) * (1 - t)))
        previous = loss
        expected.append(t)
    seen = taid(LOSSES, start=0.2, end=0.8, rate=0.3, momentum=0.9)
    # A loss of zero makes the next change 1e15 times the loss: all the same, a number.
    assert seen == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("losses", [[1.0 / n for n in range(1, 50)], [float(n) for n in range(50)], [0.0] * 20])
def test_t_starts_at_its_start_never_falls_and_ends_at_its_end(losses):
    seen = taid(losses)
    assert seen[0] == pytest.approx(0.4)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)


def test_state_survives_a_checkpoint():
    energies = [TemporallyAdaptiveInterpolation(), CurriculumTemperature()]
    before, after = Curriculum(energies), Curriculum(energies)
    with torch.no_grad():
        before.moving["ctkd"].theta += 1.5
    before.observe({"taid": torch.tensor(2.0)}, 0.3)
    after.load_state_dict(before.state_dict())
    for curriculum in (before, after):
        curriculum.observe({"taid": torch.tensor(1.0)}, 0.4)
    assert {name: value.item() for name, value in before.values().items()} == {
        name: value.item() for name, value in after.values().items()
    }


def test_the_temperature_begins_where_theta_says_and_stays_in_its_range():
    curriculum = Curriculum([CurriculumTemperature()])
    assert curriculum.values()["ctkd"].item() == pytest.approx(1 + 3 / (1 + math.exp(2)))
    for theta in (-100.0, 100.0):
        with torch.no_grad():
            curriculum.moving["ctkd"].theta.fill_(theta)
        assert 1 <= curriculum.values()["ctkd"].item() <= 4


def test_the_reversal_grows_from_nothing_to_minus_one_and_turns_theta_s_gradient_round():
    strengths = [reversal(step / 100) for step in range(101)]
    assert strengths[0] == 0
    assert strengths[50] == pytest.approx(-0.5)
    assert strengths[100] == pytest.approx(-1)
    assert strengths == sorted(strengths, reverse=True)
    teacher, student = torch.randn(5, 7), torch.randn(5, 7)

    def gradient(strength):
        curriculum = Curriculum([CurriculumTemperature()])
        temperature = curriculum.values()["ctkd"]
        at = temperature.detach().requires_grad_()
        (slope,) = torch.autograd.grad(curriculum_temperature(teacher, student, temperature=at).mean(), at)
        temperature.backward(strength * slope)
        return curriculum.moving["ctkd"].theta.grad.item()

    assert gradient(-1.0) == -gradient(1.0) != 0


def test_most_jobs_have_nothing_that_moves():
    curriculum = Curriculum([ForwardKL()])
    assert curriculum.values() == {}
    assert list(curriculum.parameters()) == []


def test_every_energy_with_a_moving_argument_has_a_number() -> None:
    moving = [section() for section in SECTIONS if getattr(section, "moving", None)]
    assert set(Curriculum(moving).values()) == {energy.name for energy in moving} == {"ctkd", "taid"}
