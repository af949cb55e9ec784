"""Every benchmark still runs: in miniature, as none is anybody's daily work."""

import inspect
from importlib import import_module
from pkgutil import iter_modules

import pytest

import benchmarks

NAMES = [module.name for module in iter_modules(benchmarks.__path__)]


def test_there_are_benchmarks() -> None:
    assert {"recovery", "top_k_bias"} <= set(NAMES)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_in_miniature(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = import_module(f"benchmarks.{name}").main
    assert inspect.signature(main).parameters["miniature"].default is False
    main(miniature=True)
    assert capsys.readouterr().out.strip(), "a benchmark prints what it found"
