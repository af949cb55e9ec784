"""Checks of `teacher.options`, the further keywords for loading a teacher, before any weights are read."""

import difflib
import inspect
import re
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from betakd_ray.errors import ModelError
from betakd_ray.models.load import model_skeleton
from betakd_ray.models.pretrained import from_pretrained
from betakd_ray.models.quantization import check_quantization
from betakd_ray.spec import TeacherSpec

_RETIRED = {"from_flax", "from_tf", "low_cpu_mem_usage", "mirror", "offload_state_dict"}
"""Keywords that from_pretrained accepts and ignores."""


def check_options(spec: TeacherSpec, config: PretrainedConfig) -> None:
    """Raise ModelError for an unknown option and for a quantisation that cannot be used. No weights are read.

    An option is unknown if neither transformers nor the teacher's configuration has it. A quantisation cannot be used
    if its settings cannot be read, or if its package is not installed here.
    """
    given = {name: value for name, value in spec.options.items() if name != "quantization_config"}
    if given and not spec.trust_remote_code:  # a model with its own code may accept any keyword
        _check_keywords(spec, given, config)
    check_quantization(spec, config)


def _check_keywords(spec: TeacherSpec, given: dict[str, Any], config: PretrainedConfig) -> None:
    try:
        # from_pretrained does the same: an option that the configuration does not take is a keyword of from_pretrained
        # itself or of the model's __init__.
        _, others = from_pretrained(AutoConfig, spec, return_unused_kwargs=True, **given)
    except (ModelError, TypeError) as error:
        raise ModelError(f"teacher.options: {error}") from error
    known = loading_keywords()
    if not others.keys() <= known:
        with torch.device("meta"):
            known |= inspect.signature(type(model_skeleton(spec)).__init__).parameters.keys()
    if unknown := sorted(others.keys() - known):
        name = unknown[0]
        close = difflib.get_close_matches(name, known | config.to_dict().keys(), n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Leave it out."
        raise ModelError(
            f"teacher.options.{name}: is not a keyword of transformers' from_pretrained, and not a setting of a "
            f"{config.model_type!r}. {hint}"
        )


def loading_keywords() -> set[str]:
    """Return the keywords of transformers' from_pretrained.

    They are in its signature, or its source code pops them from **kwargs; transformers has no list of the latter.
    """
    function = inspect.unwrap(PreTrainedModel.from_pretrained)
    popped = re.findall(r'kwargs\.pop\(\s*"(\w+)"', inspect.getsource(function))
    return {*inspect.signature(function).parameters, *popped, *_RETIRED}
