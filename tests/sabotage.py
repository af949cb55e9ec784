"""Sabotages of a saved model: small functions that change the files of a folder as real incidents did.

Each takes the folder of a copy, and changes its weights, its configuration or its processor. `SABOTAGES` has all that
make sense for any vision–language model, by kind.
"""

import io
import json
import random as randomness
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.check.subject import Score
from betakd_ray.data.samples import RawSample
from betakd_ray.teacher.answers import GroupAnswer
from jobs.easy_vqa.samples import easy_vqa_samples
from tests.tiny import IMAGE

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


def fewer_layers(folder: Path) -> None:
    """Say in config.json that the language model has one layer only."""
    tree = json.loads((folder / "config.json").read_text())
    text = tree["text_config"]
    text["num_hidden_layers"] = 1
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][:1]
    (folder / "config.json").write_text(json.dumps(tree))


# ------------------------------------------------------------------------------------------------ teachers that lie


def lying(score: Score, change: Callable[[dict[str, Any], ModelInputs], None]) -> Score:
    """Return a teacher's `score` whose arrays `change` changes in place of sending them."""

    def lie(inputs: ModelInputs) -> GroupAnswer:
        answer = score(inputs)
        arrays = {name: array.copy() for name, array in answer.arrays.items()}
        change(arrays, inputs)
        return replace(answer, arrays=arrays)

    return lie


def moved_rows(score: Score, by: int) -> Score:
    """Return a teacher's `score` that takes each state from another position."""
    return lambda inputs: score(replace(inputs, answer_rows=np.maximum(inputs.answer_rows + by, 0)))


def zero_states(arrays: dict[str, Any], _: ModelInputs) -> None:
    arrays["hidden"][:] = 0


def same_states(arrays: dict[str, Any], _: ModelInputs) -> None:
    arrays["hidden"][:] = arrays["hidden"][:1]


def nan_states(arrays: dict[str, Any], _: ModelInputs) -> None:
    arrays["hidden"][0] = np.nan


def perturbed_states(arrays: dict[str, Any], _: ModelInputs) -> None:
    """Add noise that leaves most of the largest probabilities where they are."""
    hidden = arrays["hidden"]
    hidden += 0.03 * np.random.default_rng(1).normal(size=hidden.shape).astype(hidden.dtype) * hidden.std()


def scaled_states(arrays: dict[str, Any], _: ModelInputs) -> None:
    arrays["hidden"] *= 1.1


def states_of_batch(arrays: dict[str, Any], inputs: ModelInputs) -> None:
    """Make states depend on the number of samples in the group."""
    arrays["hidden"] *= 1 + 0.05 * (inputs.size - 1)


def states_of_neighbours(arrays: dict[str, Any], inputs: ModelInputs) -> None:
    """Give each sample the states of the next one of its group."""
    arrays["hidden"][:] = np.roll(arrays["hidden"], int(inputs.rows_per_sample[0]), axis=0)


def permuted_states(arrays: dict[str, Any], _: ModelInputs) -> None:
    arrays["hidden"][:] = arrays["hidden"][::-1]


def uncertain_states(arrays: dict[str, Any], _: ModelInputs) -> None:
    """Answer differently each time, as with dropout."""
    global _calls
    _calls += 1
    arrays["hidden"] *= 1 + 0.02 * (_calls % 3)


_calls = 0
LIES: dict[str, Callable[[Score], Score]] = {
    "rows late": lambda score: moved_rows(score, 1),
    "rows early": lambda score: moved_rows(score, -1),
} | {
    change.__name__.replace("_", " "): partial(lying, change=change)
    for change in (
        zero_states, same_states, nan_states, perturbed_states, scaled_states, states_of_batch, states_of_neighbours,
        permuted_states, uncertain_states,
    )
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- samples


def conversations(count: int, seed: int = 0) -> list[RawSample]:
    """Return samples of one image, none, several images and several turns, with images of noise and many sizes."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        images = (1, 1, 2, 0)[number % 4]
        asked = f"{IMAGE}\n" * images + f"Which of {draw.integers(100)}?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"It is {draw.integers(1000)}, blue."}]
        if number % 3 == 2:
            turns += [
                {"from": "human", "value": "And now?"},
                {"from": "gpt", "value": "yes " * int(draw.integers(1, 9))},
            ]
        pictures = [picture(draw, int(draw.integers(9, 48)), int(draw.integers(9, 48))) for _ in range(images)]
        found.append(RawSample(f"{seed}-{number}", number, str(number), turns, pictures))
    return found


def picture(draw: np.random.Generator, width: int, height: int) -> bytes:
    """Return a PNG of noise."""
    buffer = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def easy_vqa(count: int, *, seed: int = 0, wrong_answers: float = 0.0) -> list[RawSample]:
    """Return training samples of easy-VQA."""
    chosen = list(easy_vqa_samples("train", limit=count, wrong_answers=wrong_answers, seed=seed))
    randomness.Random(seed).shuffle(chosen)
    return [
        RawSample(
            each["id"], at, each["id"], each["conversations"], [Path(path).read_bytes() for path in each["images"]]
        )
        for at, each in enumerate(chosen)
    ]


def truncated(_: str, tensor: Tensor) -> Tensor:
    """Return all rows but the last 64, as of a vocabulary that was not padded."""
    return tensor[:-64]


def moved_keys(where: Callable[[str], bool], prefix: str) -> Sabotage:
    """Return a sabotage that stores tensors under names of another layout."""
    return lambda folder: put(
        folder, {f"{prefix}.{name}" if where(name) else name: each for name, each in weights(folder).items()}
    )
