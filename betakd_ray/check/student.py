"""Checks of a student: its weights, where it was loaded from, and which of them are legitimately new."""

from collections.abc import Sequence

from torch import nn

from betakd_ray.check.finding import Finding
from betakd_ray.check.weights import check_weights
from betakd_ray.models.vlm import parts
from betakd_ray.spec import CheckpointInit, ConfigInit, PartsInit, StudentSpec


def check_student(model: nn.Module, student: StudentSpec) -> list[Finding]:
    """Return findings on a student's weights; parameters that its spec makes anew are named and allowed."""
    return check_weights(model, part="student", new=new_parameters(model, student))


def new_parameters(model: nn.Module, student: StudentSpec) -> Sequence[str]:
    """Return the beginnings of the names of a student's parameters that come from no checkpoint."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = [name for name, _ in model.named_parameters() if ".lora_" in name]
    init = student.init
    if isinstance(init, CheckpointInit):
        return found
    if isinstance(init, PartsInit):
        return [*found, *(names[module] for module in parts(model)["projector"])]  # pyright: ignore[reportArgumentType]
    assert isinstance(init, ConfigInit)
    of_parts = parts(model)  # pyright: ignore[reportArgumentType]
    fresh = ("language_model", "projector") if init.vision_tower else ("language_model", "projector", "vision_tower")
    return [*found, *(names[module] for part in fresh for module in of_parts[part])]
