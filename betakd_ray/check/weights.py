"""Check that training made the weights: every tensor of a model by itself, and each part beside the others."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from betakd_ray.check.finding import Finding
from betakd_ray.models.vlm import part_parameters

RANDOM = 1.12
"""Largest spectral ratio (`spectral_ratio`) of a matrix that counts as random.

Measured by benchmarks/check_thresholds.py: independent entries (normal or uniform, 16 to 512 rows) give at most 1.10.
In the shipped easy-VQA teacher every matrix of the language model and the projector gives at least 1.66, and in the
tower all but its three smallest give 1.29 or more.
"""
SMALLEST = 16
"""Smallest number of rows and columns of a matrix from which its randomness is judged."""
MOST = 1024
"""Largest number of rows and columns of which the ratio is computed."""
ITERATIONS = 12
"""Steps of power iteration; the ratio of a trained matrix converges from below in fewer."""
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_weights(model: nn.Module, *, part: str = "teacher", new: Sequence[str] = ()) -> list[Finding]:
    """Return findings on the weights of a loaded model.

    `new` has the beginnings of names of parameters that are legitimately new, e.g. a student's projector.
    """
    ratios = spectral_ratios(model)
    named = [(name, each) for name, each in _tensors(model) if not name.startswith(tuple(new))]
    checks: tuple[Callable[[], tuple[str, str, str]], ...] = (
        lambda: _not_finite(named),
        lambda: _constant(model, named),
        lambda: _untied(model),
        lambda: _repeated(model),
        lambda: _random_among_trained(model, ratios, new),
    )
    expected = "finite, varied weights that are as the checkpoint's training left them, tied where the config says so"
    found = [
        Finding("weights", seen, expected, "fail", cause, remedy, part)
        for seen, cause, remedy in (check() for check in checks)
        if seen
    ]
    if found:
        return found
    count = len(named)
    if not _is_trained(model, ratios):
        return [
            Finding(
                "weights",
                f"{count} finite tensors, whose matrices are like random numbers",
                expected,
                "ok" if new and part == "student" else "doubt",
                "the model was never trained, or all of its weights were initialised again",
                "Name the folder of the trained checkpoint.",
                part,
            )
        ]
    return [Finding("weights", f"{count} tensors; new: {', '.join(new) or 'none'}", expected, "ok", part=part)]


def is_trained(model: Any) -> bool:
    """Return whether the language model's matrices have structure that random numbers lack."""
    return _is_trained(model, spectral_ratios(model))


def spectral_ratios(model: nn.Module) -> dict[Tensor, float]:
    """Return the spectral ratio of each matrix of a model that is large enough to judge."""
    return {each: spectral_ratio(each) for each in _matrices(model.parameters())}


def _is_trained(model: Any, of: Mapping[Tensor, float]) -> bool:
    ratios = [of[each] for each in part_parameters(model)["language_model"] if each in of]
    # Training changes nearly every matrix. A quarter, because a short training may leave the others as they were.
    return not ratios or sum(ratio > RANDOM for ratio in ratios) >= max(1, len(ratios) // 4)


def spectral_ratio(matrix: Tensor) -> float:
    """Return a matrix's largest singular value, in units of that of independent entries of the same size.

    That is σ (√m + √n) for an m × n matrix whose entries have the standard deviation σ (Marčenko and Pastur 1967), so
    1.0 for any random initialisation. Training adds directions of larger singular values.
    """
    flat = matrix.detach().reshape(len(matrix), -1)
    # A part of a random matrix is random too, and a part of a trained one shows its structure.
    flat = flat[:: -(-len(flat) // MOST), :: -(-flat.shape[1] // MOST)].float()
    rows, columns = flat.shape
    generator = torch.Generator(flat.device).manual_seed(0)
    direction = torch.randn(columns, generator=generator, device=flat.device)
    for _ in range(ITERATIONS):
        direction = torch.nn.functional.normalize(flat.t() @ (flat @ direction), dim=0)
    scale = flat.pow(2).mean().sqrt() * (rows**0.5 + columns**0.5)
    return float((flat @ direction).norm() / scale.clamp(min=1e-30))


def _not_finite(named: Iterable[tuple[str, Tensor]]) -> tuple[str, str, str]:
    bad = [name for name, each in named if each.is_floating_point() and not each.isfinite().all()]
    if not bad:
        return "", "", ""
    return (
        f"{len(bad)} tensors with NaN or infinite numbers, e.g. {bad[0]}",
        "the checkpoint is damaged, or its training diverged",
        "Fetch it again, or name an earlier checkpoint.",
    )


def _constant(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> tuple[str, str, str]:
    """Report layers whose weights are all one number. A bias or a norm may be, and so may a new parameter by itself."""
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    bad = [name for name, each in named if name in matrices and each.numel() > 1 and _is_constant(each)]
    if not bad:
        bad = [f"the norm {name}" for name, each in named if _is_norm(name) and each.numel() > 1 and not each.any()]
    if not bad:
        return "", "", ""
    return (
        f"{len(bad)} weights that are zero or one number throughout, e.g. {bad[0]}",
        f"the weights of {bad[0]} were lost, so what comes before it has no effect",
        "Convert or fetch the checkpoint again.",
    )


def _untied(model: Any) -> tuple[str, str, str]:
    """Report a head that should be the embedding and is not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weights = getattr(head, "weight", None), getattr(embedding, "weight", None)
    if not _says_tied(model.config) or not all(isinstance(each, Tensor) for each in weights):
        return "", "", ""
    first, second = weights
    if first is second or (first.shape == second.shape and torch.equal(first, second)):  # pyright: ignore
        return "", "", ""
    return (
        "an lm_head that differs from the embedding, though the config ties them",
        "tie_word_embeddings belongs to another checkpoint, or one of the two was changed alone",
        "Correct tie_word_embeddings in config.json.",
    )


def _says_tied(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _repeated(model: nn.Module) -> tuple[str, str, str]:
    """Report two layers of one stack with the same weights: a file that was read twice in place of another."""
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList) or len(stack) < 2:
            continue
        seen: dict[tuple[Any, ...], int] = {}
        for at, layer in enumerate(stack):
            own = [each.detach() for each in _plain(layer.parameters()) if each.ndim > 1]
            if not own:
                continue
            key = tuple((tuple(each.shape), float(each.double().sum()), float(each.flatten()[-1])) for each in own)
            if key in seen:
                return (
                    f"{name}.{at} has the same weights as {name}.{seen[key]}",
                    "one layer was stored in place of another",
                    "Convert or fetch the checkpoint again.",
                )
            seen[key] = at
    return "", "", ""


def _random_among_trained(model: Any, of: Mapping[Tensor, float], new: Sequence[str]) -> tuple[str, str, str]:
    """Report a part, or a layer, all of whose matrices are random in a model that was trained."""
    if not _is_trained(model, of):
        return "", "", ""
    groups = {name.replace("_", " "): each for name, each in part_parameters(model).items()}
    groups |= {
        f"layer {name}": [*layer.parameters()] for name, layer in _layers(model) if not name.startswith(tuple(new))
    }
    groups |= {"lm_head": [*model.get_output_embeddings().parameters()]}
    groups |= {"embedding": [*model.get_input_embeddings().parameters()]}
    fresh = {parameter for name, parameter in model.named_parameters() if new and name.startswith(tuple(new))}
    for name, parameters in groups.items():
        ratios = [of[each] for each in parameters if each in of and each not in fresh]
        if ratios and max(ratios) <= RANDOM:
            return (
                f"the {name} has only matrices like random numbers (spectral ratio {max(ratios):.2f}, trained: "
                f"above {RANDOM}), the rest of the model has not",
                f"the weights of the {name} were initialised again after training",
                "Name the checkpoint that has them.",
            )
    return "", "", ""


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, stack in model.named_modules():
        if isinstance(stack, nn.ModuleList):
            yield from ((f"{name}.{at}", layer) for at, layer in enumerate(stack))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers that can be read as numbers."""
    for named in (model.named_parameters(), model.named_buffers()):
        yield from ((name, each) for name, each in named if _is_plain(each))


def _plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    yield from filter(_is_plain, tensors)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1 and not is_traceable_wrapper_subclass(tensor)


def _matrices(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    for each in _plain(parameters):
        if each.ndim > 1 and min(len(each), each.numel() // len(each)) >= SMALLEST:
            yield each


def _is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _is_norm(name: str) -> bool:
    return "norm" in name and name.endswith(".weight")
