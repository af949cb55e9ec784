"""Benchmarks by name: each module of `betakd_ray.evaluation.benchmarks`, and objects of users' own modules."""

from importlib import import_module
from pkgutil import iter_modules

from betakd_ray.errors import SpecError, did_you_mean
from betakd_ray.evaluation import benchmarks
from betakd_ray.evaluation.benchmark import Benchmark
from betakd_ray.plugins import load
from betakd_ray.spec.base import is_plugin


def names() -> list[str]:
    """Return the names of the benchmarks that come with this package."""
    return sorted(module.name for module in iter_modules(benchmarks.__path__))


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of this package with this name, or the one that module:name names.

    Raises SpecError if there is none, or if the object is not a Benchmark.
    """
    if is_plugin(name):
        found = load(name, "benchmark")
        if not isinstance(found, Benchmark):
            raise SpecError(
                f"benchmark: {name} is a {type(found).__name__}; expected a {Benchmark.__module__}.Benchmark object"
            )
        return found
    if name not in names():
        hint = did_you_mean(name, names())
        raise SpecError(
            f"benchmark: there is no {name!r}" + (hint and f"; {hint}") + f" Known are {', '.join(names())}; your own "
            "is module:name."
        )
    return import_module(f"{benchmarks.__name__}.{name}").BENCHMARK
