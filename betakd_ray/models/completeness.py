"""Whether a checkpoint has exactly the weights of its model, from what transformers says of each loading.

transformers makes missing weights at random, leaves out weights that the configuration has no place for, and only warns
of both. A model that was loaded so answers nonsense, and training goes on.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn
from transformers import PreTrainedModel

from betakd_ray.errors import WeightsIncomplete

COUNTERS = ("num_batches_tracked",)
"""Last names of buffers that no forward pass reads."""
NAMED = 3
"""Number of names that an error lists."""


@contextmanager
def recorded_loading() -> Iterator[list[tuple[nn.Module, dict[str, Any]]]]:
    """Yield a list that gets each model that is loaded in the block, with its loading info.

    `output_loading_info` returns only that of the adapters for a model in whose folder there are adapters.
    """
    found: list[tuple[nn.Module, dict[str, Any]]] = []
    finalize = PreTrainedModel._finalize_model_loading

    def record(model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
        result = finalize(model, load_config, loading_info)
        found.append((model, result.to_dict()))
        return result

    with patch.object(PreTrainedModel, "_finalize_model_loading", staticmethod(record)):
        yield found


def require_complete(what: str, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Raise WeightsIncomplete unless every weight came from the checkpoint, in its shape, and none was left out.

    `what` names the checkpoint; `info` is transformers' loading info. Weights that the model has no part for, such as
    the text half of a CLIP whose tower is loaded, are no fault.
    """
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(COUNTERS))
    if missing:
        raise WeightsIncomplete(
            f"{what}: the checkpoint lacks {_listed(missing)}{_parts(missing)}; transformers would make them at "
            "random. Fetch or convert the checkpoint again, or name the one that has them."
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise WeightsIncomplete(
            f"{what}: {name} has shape {tuple(stored)} in the checkpoint but {tuple(expected)} by its config.json "
            f"({len(mismatched)} such weights); transformers would make them at random. The configuration belongs to "
            "another checkpoint, or a vocabulary was resized without its weights."
        )
    if errors := info.get("error_msgs"):
        raise WeightsIncomplete(f"{what}: {errors[0]}")
    left_out = sorted(_left_out(model, info["unexpected_keys"]))
    if left_out and getattr(model, "hf_quantizer", None) is None:  # quantised weights are stored with others beside
        raise WeightsIncomplete(
            f"{what}: the checkpoint has {_listed(left_out)}, but by its config.json the model has no place for them, "
            "and would be computed without them. Restore the config.json of this checkpoint (number of layers, biases)."
        )


def _left_out(model: nn.Module, unexpected: Iterable[str]) -> Iterator[str]:
    """Yield the weights of layers beyond a stack's end, and those of a layer that has no such weight."""
    modules = dict(model.named_modules())
    for name in unexpected:
        path = name.split(".")
        places = (".".join(path[:end]) for end in range(1, len(path)))
        stacks = [(modules[place], path[place.count(".") + 1]) for place in places if place in modules]
        if any(isinstance(stack, nn.ModuleList) and _is_beyond(stack, index) for stack, index in stacks):
            yield name
        owner = modules.get(".".join(path[:-1]))
        if owner is not None and not any(owner.children()) and [*owner.parameters(recurse=False)]:
            yield name


def _is_beyond(stack: nn.ModuleList, index: str) -> bool:
    return index.isdecimal() and int(index) >= len(stack)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} weights ({', '.join(names[:NAMED])}{rest})"


def _parts(names: list[str]) -> str:
    """Return the parts of the model that weights belong to, as a piece of a sentence."""
    # Qwen's projector is inside its tower, so it comes first.
    words = {"projector": ("projector", "connector", "merger"), "vision tower": ("vision", "visual")}
    words |= {"head": ("lm_head",), "language model": ("language_model", "text_model", "embed_tokens", "layers.")}
    found = {next((part for part, marks in words.items() if any(mark in name for mark in marks)), "") for name in names}
    known = sorted(found - {""})
    return f" of its {' and '.join(known)}" if known else ""
