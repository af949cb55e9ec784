"""Figure of the energies: for one teacher over three tokens, the value and gradient of each energy at every student.

    python -m betakd_ray.report.simplex docs/energies.svg            (after Beta-KD Figure 3; needs the extra `report`)

The other reports read a run's files. This one computes the energies, so only this one needs torch.
"""

import argparse

import matplotlib
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from betakd_ray.energies import ENERGIES, energy

TEACHER = (0.55, 0.35, 0.10)
MOVING = {"ctkd": {"temperature": 2.0}, "taid": {"t": 0.5}}
"""Fixed values of the arguments that change during a job."""

FINE, COARSE = 100, 10
"""Number of grid steps along an edge, for the contours and for the arrows. The teacher is a point of the FINE grid."""
COLUMNS = 5
"""Number of panels in a row of the figure."""
ARROW, LONGEST = 0.3, 0.09
"""Length of an arrow for a gradient of norm 1, and largest length of an arrow; the triangle's side has length 1."""
CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
COLORS = matplotlib.colormaps["YlGnBu"](torch.linspace(0, 0.75, 13).tolist())
LEGEND = """Each triangle: students over three tokens a, b, c.
Dot: the teacher, {:.2f} a, {:.2f} b, {:.2f} c.
Colour: the energy; 2% of students lie above its range.
Arrow: minus the gradient in the student's logits;
towards a corner, that token's logit grows.
One scale for all triangles, cut at a norm of {cut:.1g}.
ctkd at T = {T:g}, taid at t = {t:g}."""


def simplex(steps: int) -> Float[Tensor, "points 3"]:
    """Return distributions over three tokens. All probabilities are multiples of 1/steps, and none is zero."""
    counts = [(i, j, steps - i - j) for i in range(1, steps - 1) for j in range(1, steps - i)]
    return torch.tensor(counts, dtype=torch.float64) / steps


def landscape(
    name: str, students: Float[Tensor, "points 3"]
) -> tuple[Float[Tensor, " points"], Float[Tensor, "points 3"]]:
    """Return an energy at each student, and minus its gradient with respect to the student's logits.

    The gradient sums to zero over the tokens. Logits are the centred log-probabilities. Without centring, the energies
    on logits would depend on an arbitrary constant.
    """
    teacher = _logits(torch.tensor(TEACHER, dtype=torch.float64).expand_as(students))
    student = _logits(students).requires_grad_()
    values = energy(name, teacher, student, **MOVING.get(name, {}))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient.mean(1, keepdim=True) - gradient


def _logits(probs: Float[Tensor, "points 3"]) -> Float[Tensor, "points 3"]:
    return probs.log() - probs.log().mean(1, keepdim=True)


def draw(path: str) -> None:
    """Draw all energies on logits as one SVG. Its coloured layers are images."""
    # No date and no random ids, so that the same code always writes the same file.
    with matplotlib.rc_context({"svg.hashsalt": "energies", "font.size": 9}):
        rows = -(-(len(ENERGIES) + 1) // COLUMNS)  # one panel more for the legend
        figure = Figure(figsize=(2.1 * COLUMNS, 2.27 * rows), facecolor="white", layout="constrained")
        panels: list[Axes] = figure.subplots(rows, COLUMNS).flatten().tolist()
        for panel in panels:
            panel.set_aspect("equal")
            panel.axis("off")
        for panel, name in zip(panels, ENERGIES, strict=False):
            _panel(panel, name)
        legend = LEGEND.format(*TEACHER, cut=LONGEST / ARROW, T=MOVING["ctkd"]["temperature"], t=MOVING["taid"]["t"])
        panels[len(ENERGIES)].text(0, 0.95, legend, va="top", linespacing=1.5, in_layout=False)
        figure.savefig(path, format="svg", dpi=130, metadata={"Date": None})


def _panel(axes: Axes, name: str) -> None:
    fine, coarse = simplex(FINE), simplex(COARSE)
    values, _ = landscape(name, fine)
    top = values.quantile(0.98).item()  # some energies grow without bound towards an edge
    levels = [top * step / 12 for step in range(13)]
    axes.tricontourf(*_xy(fine), values, levels, colors=COLORS, extend="max").set_rasterized(True)
    _, pull = landscape(name, coarse)
    pull = pull * (LONGEST / pull.norm(dim=1, keepdim=True)).clamp_max(ARROW)
    shape = {"width": 0.007, "headwidth": 3.5, "headlength": 4, "headaxislength": 3.5}
    axes.quiver(*_xy(coarse), *_xy(pull), angles="xy", scale_units="xy", scale=1, color="#222222", **shape)
    axes.plot(*_xy(torch.tensor([TEACHER])), "o", color="#d62728", markeredgecolor="white", markersize=7)
    axes.fill(*CORNERS.T, facecolor="none", edgecolor="#222222", linewidth=1.2)
    for token, corner, offset in zip("abc", CORNERS.tolist(), ((-2, -12), (-3, -12), (6, -5)), strict=True):
        axes.annotate(token, corner, offset, textcoords="offset points")
    axes.set_title(f"{name}   0 – {top:.2g}", fontsize=10)


def _xy(points: Tensor) -> tuple[Tensor, Tensor]:
    x, y = (points.to(CORNERS.dtype) @ CORNERS).T
    return x, y


def main() -> None:
    """Write the figure to the path in the command line."""
    parser = argparse.ArgumentParser(description="Draw every energy on the three-token simplex, as an SVG.")
    parser.add_argument("path", help="where to write it")
    draw(parser.parse_args().path)


if __name__ == "__main__":
    main()
