"""Gradients sum up as in float32, whatever the precision, the ZeRO stage, the ranks and the micro-batches of a step."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from betakd_ray.engine.checkpoint import load_engine, make_universal
from betakd_ray.engine.config import deepspeed_config
from betakd_ray.run.folder import ENGINE
from betakd_ray.spec import JobSpec, parse_spec
from tests.learning import spawned

pytestmark = pytest.mark.timeout(600)
TINY = 2.0**-9
"""Added to 1 in bfloat16 it is lost: 1 + 2⁻⁹ is half of the way to the next number, and rounds to even."""
MICRO_BATCHES = (129, 3, 1, 40)
"""Number of micro-batches of each step."""
Gradients = list[list[float]]
"""Distinct values in a parameter's gradient, per step; exactly one if the sum is correct."""


class Toy(nn.Module):
    """Parameters of odd sizes whose gradient is the number that the forward was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, 3) for size in (5, 7, 11))

    def forward(self, gradient: Tensor) -> Tensor:
        total = gradient.new_zeros(())
        for layer in self.layers:
            # Through the layer's own forward, where ZeRO-3 gathers its parameters.
            ones = torch.ones(1, layer.in_features, dtype=layer.weight.dtype)
            total = total + layer(ones).sum().float() * gradient
        return total


def _spec(stage: int, precision: str, ranks: int) -> JobSpec:
    return parse_spec(
        {
            "name": "sums",
            "data": {"train": "unused.tar"},
            "student": {"init": {"kind": "checkpoint", "path": "unused"}},
            "objective": {"weighting": "equal"},
            "optimizer": {"max_grad_norm": 1e9},
            "training": {
                "global_batch_size": 8 * ranks,
                "micro_batch_size": 2,
                "workers": ranks,
                "zero_stage": stage,
                "precision": precision,
                # Smaller than a layer, than all of them, and larger: each is another path through DeepSpeed.
                "deepspeed": {"zero_optimization": {"reduce_bucket_size": 30, "stage3_param_persistence_threshold": 0}},
            },
        }
    )


def _as_shipped_by_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    ours = {"data_types", "communication_data_type"}
    return {key: value for key, value in config.items() if key not in ours}


def terms(step: int, rank: int) -> list[float]:
    """Return the gradient of each micro-batch: 1 in the first of rank 0, and a very small number in all others."""
    return [1.0 if (micro, rank) == (0, 0) else TINY for micro in range(MICRO_BATCHES[step])]


def _exact(step: int, ranks: int) -> float:
    return sum(sum(terms(step, rank)) for rank in range(ranks)) / ranks


def _sum(stage: int, precision: str, is_default: bool) -> Gradients:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    ranks, rank = dist.get_world_size(), dist.get_rank()
    config = deepspeed_config(_spec(stage, precision, ranks), ranks)
    torch.manual_seed(0)
    model = Toy().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=_as_shipped_by_deepspeed(config) if is_default else config,
        dist_init_required=False,
    )
    found = []
    for step in range(len(MICRO_BATCHES)):
        gradients = terms(step, rank)
        for number, gradient in enumerate(gradients, start=1):
            engine.set_gradient_accumulation_boundary(number == len(gradients))
            engine.backward(engine(torch.tensor(gradient)), scale_wrt_gas=False)
        full = [safe_get_full_grad(parameter) for parameter in engine.module.parameters()]
        found.append(sorted({value for each in full if each is not None for value in each.flatten().tolist()}))
        engine.step()
        assert engine.was_step_applied()
        assert engine.global_steps == step + 1
    return found


def _all(cases: list[tuple[int, str, bool]]) -> dict[tuple[int, str, bool], Gradients]:
    found = {case: _sum(*case) for case in cases}
    _unname_shared_memory()
    return found


def _unname_shared_memory() -> None:
    """Remove the names of shared memory that DeepSpeed leaves, as the learner does."""
    dist.barrier()
    for left in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_{dist.get_rank()}"):
        left.unlink()


CASES = [(0, "fp32", False)] + [(stage, precision, False) for precision in ("fp32", "bf16") for stage in (1, 2, 3)]
AS_SHIPPED = [(stage, "bf16", True) for stage in (1, 2, 3)]


@pytest.fixture(scope="module", params=[1, 2])
def summed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any]:
    folder: Path = tmp_path_factory.mktemp("sums")
    return request.param, spawned(_all, folder, [*CASES, *AS_SHIPPED], ranks=request.param)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_small_gradients_sum_up_exactly(summed: tuple[int, Any], case: tuple[int, str, bool]) -> None:
    ranks, found = summed
    assert found[case] == [[_exact(step, ranks)] for step in range(len(MICRO_BATCHES))]


@pytest.mark.parametrize("case", AS_SHIPPED, ids=str)
def test_in_bfloat16_they_are_lost(summed: tuple[int, Any], case: tuple[int, str, bool]) -> None:
    """The test above would find this with DeepSpeed's own choice of dtype."""
    ranks, found = summed
    assert found[case][0][0] < 0.9 * _exact(0, ranks)


def _learn_on(folder: Path, is_first: bool) -> list[Tensor]:
    """Take two steps, save and take a third; or load that and take the third. Return the weights in float32."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    ranks = dist.get_world_size()
    torch.manual_seed(0 if is_first else 1)  # what is loaded shall not be there before
    model = Toy().to(torch.bfloat16)
    config = deepspeed_config(_spec(1, "bf16", ranks), ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if not is_first:
        load_engine(engine, folder)
    for gradient in (1.0, -3.0, 0.5) if is_first else (0.5,):
        if is_first and gradient == 0.5:
            engine.save_checkpoint(str(folder), tag=ENGINE, exclude_frozen_parameters=True)
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(torch.tensor(gradient)), scale_wrt_gas=False)
        engine.step()
    weights = [safe_get_full_fp32_param(parameter) for parameter in engine.module.parameters()]
    _unname_shared_memory()
    return [each.detach().clone() for each in weights if each is not None]


def test_bf16_at_stage_1_goes_on_from_its_checkpoint_on_any_number_of_ranks(tmp_path: Path) -> None:
    """It is another optimizer of DeepSpeed's than at stage 2, with a checkpoint of its own."""
    folder = tmp_path / "saved"
    folder.mkdir()
    expected = spawned(_learn_on, tmp_path, folder, True, ranks=2)
    (tmp_path / "store-_learn_on-2").unlink()
    assert len(expected) == 6
    torch.testing.assert_close(spawned(_learn_on, tmp_path, folder, False, ranks=2), expected, rtol=0, atol=0)
    make_universal(folder)
    torch.testing.assert_close(spawned(_learn_on, tmp_path, folder, False, ranks=1), expected, rtol=0, atol=0)
