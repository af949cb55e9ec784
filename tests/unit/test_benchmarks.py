"""Every benchmark still runs, here at a small size, because nobody runs the benchmarks every day."""

import inspect
from importlib import import_module
from pkgutil import iter_modules

import pytest

import benchmarks

NAMES = {module.name for module in iter_modules(benchmarks.__path__)} - {"fakes"}
"""Names of the benchmarks, without the modules that they share."""
ON_RAY = {"plan_scale", "stream_rate"}
"""Names of the benchmarks that need a cluster; tests/ray/test_data_benchmarks.py runs them."""


def test_there_are_benchmarks() -> None:
    assert {"recovery", "top_k_bias"} <= NAMES


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", sorted(NAMES - ON_RAY))
def test_a_benchmark_runs_in_miniature(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = import_module(f"benchmarks.{name}").main
    assert inspect.signature(main).parameters["miniature"].default is False
    main(miniature=True)
    assert capsys.readouterr().out.strip(), "a benchmark prints what it found"
