"""Sums over a global batch, on two ranks of which one has a text-only sample."""

import pytest
import torch
import torch.distributed as dist

from betakd_ray.train.sums import StepSums
from tests.learning import spawned

ENERGIES = torch.tensor([[1.0, 0.5], [3.0, 0.0], [2.0, 1.5], [4.0, 2.5]])
BETA = torch.tensor([[1.0, 2.0], [1.0, 99.0], [1.0, 4.0], [1.0, 6.0]])
PRESENT = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
SHARE = torch.tensor([0.4, 0.1, 0.3, 0.2])
"""Shares of samples with four, one, three and two tokens, if every token has the same weight."""
STATISTICS = torch.tensor([[1.0], [2.0], [3.0], [6.0]])


def _reduced():
    tally = StepSums(channels=2, statistics=1, device=torch.device("cpu"))
    tally.clear(most_samples=3)
    rank = dist.get_rank()
    mine = slice(2 * rank, 2 * rank + 2)
    tally.add(ENERGIES[mine], BETA[mine], PRESENT[mine], SHARE[mine], torch.tensor(0.25), STATISTICS[mine])
    totals = tally.reduced(applied=True)
    return totals, tally.betas()


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    return spawned(_reduced, tmp_path_factory.mktemp("tally"), ranks=2)


def test_means_are_over_the_samples_that_have_the_channel_each_with_its_share(reduced):
    totals, _ = reduced
    assert totals.loss.item() == 0.5
    assert totals.energies.tolist() == pytest.approx([0.4 + 0.3 + 0.6 + 0.8, (0.2 + 0.45 + 0.5) / 0.9])
    assert totals.beta.tolist() == pytest.approx([1.0, (0.8 + 1.2 + 1.2) / 0.9])
    assert totals.weighted.tolist() == pytest.approx([2.1, (0.4 + 1.8 + 3.0) / 0.9])
    assert totals.statistics.tolist() == pytest.approx([0.4 + 0.2 + 0.9 + 1.2])


def test_so_are_the_quantiles_of_beta(reduced):
    _, betas = reduced
    assert betas.shape == (6, 2)  # each rank has room for three, and has two
    assert betas.isnan().sum() == 5
    assert betas.isnan()[[1, 2, 2, 5, 5], [1, 0, 1, 0, 1]].all()
    assert betas.nanquantile(0.5, dim=0).tolist() == [1.0, 4.0]
