"""The weights that DeepSpeed trains, whole."""

from typing import Any

from torch import Tensor


def whole_state(engine: Any, zero_stage: int) -> dict[str, Tensor] | None:
    """Return the state of the engine's module. Collective; with ZeRO-3, only rank 0 gets it and the others None."""
    if zero_stage == 3:
        # Private, because the public `save_16bit_model` writes a file of pickles, and the caller needs the tensors.
        return engine._zero3_consolidated_16bit_state_dict()
    return engine.module.state_dict()
