"""The figure of the energies shows the values of the energies."""

import pytest
import torch

from betakd_ray.energies import ENERGIES
from betakd_ray.report.simplex import COARSE, FINE, TEACHER, draw, landscape, simplex

each_energy = pytest.mark.parametrize("name", ENERGIES)


@each_energy
def test_the_landscape_s_minimum_is_zero_and_at_the_teacher(name):
    students = simplex(FINE)
    values, pull = landscape(name, students)
    at_teacher = (students - torch.tensor(TEACHER)).abs().amax(dim=1) < 1e-6
    assert at_teacher.sum() == 1
    assert values[at_teacher].item() == pytest.approx(0, abs=1e-12)
    assert (values[~at_teacher] > 1e-9).all()
    assert pull[at_teacher].norm() == pytest.approx(0, abs=1e-7)


@each_energy
def test_a_step_along_the_arrow_lowers_the_energy(name):
    students = simplex(COARSE)
    values, pull = landscape(name, students)
    moved, _ = landscape(name, torch.softmax(students.log() + 1e-3 * pull, dim=1))
    assert (moved < values).all()


@each_energy
def test_a_confidently_wrong_student_is_pulled_back_by_the_energies_of_which_the_docs_say_so(name):
    _, pull = landscape(name, torch.tensor([[1e-9, 1e-9, 1 - 2e-9]], dtype=torch.float64))
    assert (pull.norm() > 1e-2) == (name in {"fkl", "adaptive_kl", "ctkd", "mse_logits", "cosine_logits"})


def test_the_figure_is_written(tmp_path):
    draw(str(tmp_path / "energies.svg"))
    text = (tmp_path / "energies.svg").read_text()
    assert text.rstrip().endswith("</svg>")
    assert 100_000 < len(text) < 300_000
