"""Objects that a spec names as module:name: nobody has to change this package to extend it (docs/extending.md)."""

import inspect
from importlib import import_module
from typing import Any

from betakd_ray.errors import SpecError, did_you_mean


def load(reference: str, field: str) -> Any:
    """Return the object that module:name names. Raises SpecError, which says `field`, if there is no such object."""
    module, _, name = reference.partition(":")
    try:
        found = import_module(module)
    except Exception as error:  # the module's own code may raise anything
        raise SpecError(
            f"{field}: {reference}: {module} cannot be imported ({type(error).__name__}: {error}). It must be "
            "importable on every node: install it there, or put it into the folder that the job is started from"
        ) from error
    if not hasattr(found, name):
        hint = did_you_mean(name, dir(found))
        raise SpecError(f"{field}: {reference}: {module} has no {name}" + (hint and f"; {hint}"))
    return getattr(found, name)


def source_of(reference: str) -> str:
    """Return the source of the module of module:name, because what is cached depends on it."""
    return inspect.getsource(import_module(reference.partition(":")[0]))


def load_class(reference: str, base: type, field: str) -> type:
    """Return the class that module:name names. Raises SpecError if it is not a subclass of `base`."""
    found = load(reference, field)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SpecError(f"{field}: {reference} is not a subclass of {base.__module__}.{base.__name__}; make it one")
    return found
