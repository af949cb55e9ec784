"""Sabotages of a saved model: small functions that change the files of a folder as real incidents did.

Each takes the folder of a copy, and changes its weights, its configuration or its processor. `SABOTAGES` has all that
make sense for any vision–language model, by kind.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Sabotage = Callable[[Path], None]
TOWER = ("vision_tower", "vision_model", "visual")
PROJECTOR = ("multi_modal_projector", "connector", "merger", "projector")


def copied(source: str | Path, target: Path, *sabotages: Sabotage) -> str:
    """Copy a model's folder and sabotage the copy; return its path."""
    shutil.copytree(source, target)
    for sabotage in sabotages:
        sabotage(target)
    return str(target)


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a folder by name."""
    return load_file(folder / "model.safetensors")


def put(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def is_in(name: str, marks: tuple[str, ...]) -> bool:
    if marks is TOWER and is_in(name, PROJECTOR):  # Qwen's projector is inside its tower
        return False
    return any(f".{mark}." in f".{name}." for mark in marks)


def changed(change: Callable[[str, Tensor], Tensor | None], where: Callable[[str], bool]) -> Sabotage:
    """Return a sabotage that changes each tensor whose name `where` accepts; None removes it."""

    def sabotage(folder: Path) -> None:
        kept, touched = {}, 0
        for name, tensor in weights(folder).items():
            new = change(name, tensor) if where(name) else tensor
            touched += where(name)
            if new is not None:
                kept[name] = new
        assert touched, "the sabotage touches nothing"
        put(folder, kept)

    return sabotage


def of_part(marks: tuple[str, ...], *, matrices: bool = False) -> Callable[[str], bool]:
    return lambda name: is_in(name, marks) and (not matrices or name.endswith("weight"))


def language(name: str) -> bool:
    return not is_in(name, TOWER) and not is_in(name, PROJECTOR) and "image_newline" not in name


def embedding(name: str) -> bool:
    return "embed_tokens" in name


def head(name: str) -> bool:
    return "lm_head" in name


def final_norm(name: str) -> bool:
    return name.endswith(("language_model.norm.weight", "text_model.norm.weight", "model.norm.weight"))


def layer(index: int, of: Callable[[str], bool] = language) -> Callable[[str], bool]:
    return lambda name: of(name) and f"layers.{index}." in name


def removed(_: str, __: Tensor) -> None:
    return None


def zeroed(_: str, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor)


def random(_: str, tensor: Tensor) -> Tensor:
    """Return numbers of the same mean size, as after an initialisation."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)).to(tensor.dtype) * tensor.float().std()


def noisy(share: float) -> Callable[[str, Tensor], Tensor]:
    def change(_: str, tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(8))
        return tensor + (share * tensor.float().std() * noise).to(tensor.dtype)

    return change


def rolled(_: str, tensor: Tensor) -> Tensor:
    return tensor.roll(1, 0)


def permuted(_: str, tensor: Tensor) -> Tensor:
    return tensor[torch.randperm(len(tensor), generator=torch.Generator().manual_seed(9))]


def negated(_: str, tensor: Tensor) -> Tensor:
    return -tensor


def scaled(factor: float) -> Callable[[str, Tensor], Tensor]:
    return lambda _, tensor: tensor * factor


def with_nan(_: str, tensor: Tensor) -> Tensor:
    new = tensor.clone()
    new.view(-1)[0] = torch.nan
    return new


def ones(_: str, tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor)


def configured(*path: str, to: Any) -> Sabotage:
    """Return a sabotage that sets one value of config.json."""
    return edited("config.json", path, to)


def processed(*path: str, to: Any) -> Sabotage:
    """Return a sabotage that sets one value of the processor's or the image processor's settings."""
    return edited("processor_config.json", path, to)


def edited(file: str, path: tuple[str, ...], to: Any) -> Sabotage:
    def sabotage(folder: Path) -> None:
        tree = json.loads((folder / file).read_text())
        place = tree
        for name in path[:-1]:
            place = place[name]
        assert place.get(path[-1]) != to, "the sabotage changes nothing"
        place[path[-1]] = to
        (folder / file).write_text(json.dumps(tree))

    return sabotage
