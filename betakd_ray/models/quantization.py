"""Quantised weights: stored in this form, or quantised at loading because a teacher's options request it."""

from copy import deepcopy
from typing import Any

from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from betakd_ray.errors import ModelError
from betakd_ray.spec import ModelSpec, TeacherSpec


def quantization(spec: ModelSpec, config: PretrainedConfig) -> str | None:
    """Return the quantisation method of a model's weights after loading; None if they are not quantised."""
    asked = spec.options.get("quantization_config") if isinstance(spec, TeacherSpec) else None
    found = asked or _own_quantization(config)
    # Only bitsandbytes settings may have no `quant_method`.
    return str(found.get("quant_method") or "bitsandbytes") if found else None


def check_quantization(spec: TeacherSpec, config: PretrainedConfig) -> None:
    """Raise ModelError for a quantisation whose settings cannot be read or whose package is not installed here.

    No weights are read.
    """
    asked = spec.options.get("quantization_config")
    settings, is_own = asked or _own_quantization(config), not asked
    if not settings:
        return
    where = f"{spec.path}: its quantization_config" if is_own else "teacher.options.quantization_config"
    try:
        quantizer = AutoHfQuantizer.from_config(deepcopy(settings), pre_quantized=is_own)
    except (ValueError, TypeError, KeyError, AssertionError, ImportError) as error:
        raise ModelError(f"{where}: transformers cannot read it: {error}") from error
    try:
        quantizer.validate_environment(device_map=None, weights_only=True)
    except ImportError as error:
        raise ModelError(f"{where}: {error}") from error
    except (RuntimeError, ValueError, NotImplementedError):
        pass  # about this process's devices, which are not the teacher's; if it is true there too, loading raises it


def _own_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the quantisation settings of the stored weights; None if they are not quantised."""
    found = (getattr(each, "quantization_config", None) for each in (config, config.get_text_config()))
    return next(filter(None, found), None)
