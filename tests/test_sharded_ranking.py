"""Target ranks and lists over rows spread over real processes: the numbers of one process."""

from typing import Any

import numpy as np
import pytest
import torch

from lrurec_dist.errors import LrurecError
from lrurec_dist.evaluate import ranking
from lrurec_dist.evaluate.ranking import target_ranks, top_k
from lrurec_dist.evaluate.sharded_ranking import rows_of, sharded_target_ranks, sharded_top_k
from tests.processes import run_ranks
from tests.sharded import own, sharded

USERS = (5, 0, 3)  # of each rank
# whole numbers up to so many, exact in float32, 0 to tie all scores; None: drawn from a normal distribution
LEVELS = (0, 1, 3, None)
SEEDS, K, TILE = range(8), (1, 4, 40), 60

Users = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # vectors, targets, pairs of excluded rows and ids


def draw(seed: int, levels: int | None) -> tuple[torch.Tensor, torch.Tensor, list[Users]]:
    generator = torch.Generator().manual_seed(seed)
    num_items = 3 + 4 * seed

    def numbers(*shape: int) -> torch.Tensor:
        if levels is None:
            return torch.randn(shape, generator=generator)
        return torch.randint(-levels, levels + 1, shape, generator=generator).float()

    weight, bias = numbers(num_items + 1, 3), numbers(num_items + 1)
    users = []
    for count in USERS:
        excluded = (torch.rand(count, num_items + 1, generator=generator) < 0.2).nonzero()
        excluded = excluded[excluded[:, 1] > 0]
        targets = torch.randint(1, num_items + 1, (count,), generator=generator)
        users.append((numbers(count, 3), targets, excluded[:, 0], excluded[:, 1]))
    return weight, bias, users


def on_ranks() -> tuple[list[list[np.ndarray]], str]:
    ranking.TILE_ELEMENTS = TILE  # several tiles of users, each of which the ranks meet after
    found = []
    for levels in LEVELS:
        for seed in SEEDS:
            weight, bias, users = draw(seed, levels)
            vectors, targets, rows, ids = own(users)
            table = sharded(weight, bias)
            place = (table.weight.detach(), table.bias.detach(), rows_of(table))
            lists = [part for k in K for part in sharded_top_k(vectors, *place, k, rows, ids)]
            found.append([part.numpy() for part in (sharded_target_ranks(vectors, *place, targets, rows, ids), *lists)])
    return found, rank_with_a_nan()


@pytest.fixture(scope="module")
def found() -> dict[int, list[Any]]:
    return {world_size: run_ranks(world_size, on_ranks) for world_size in (1, 2, 3)}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_lists_are_those_of_one_process(found: dict[int, list[Any]], world_size: int) -> None:
    draws = [(levels, seed) for levels in LEVELS for seed in SEEDS]
    for number, (levels, seed) in enumerate(draws):
        weight, bias, users = draw(seed, levels)
        for rank in range(world_size):
            vectors, targets, rows, ids = users[rank]
            ranks, *lists = found[world_size][rank][0][number]
            assert ranks.tolist() == target_ranks(vectors, weight, bias, targets, rows, ids).tolist()
            for k, best, scores in zip(K, lists[::2], lists[1::2], strict=True):
                expected, expected_scores = top_k(vectors, weight, bias, k, rows, ids)
                assert best.tolist() == expected.tolist()
                # products of other shapes may round otherwise
                np.testing.assert_allclose(scores, expected_scores.numpy(), rtol=1e-6, atol=1e-6)


def rank_with_a_nan() -> str:
    weight, bias, users = draw(4, 1)
    vectors, targets, rows, ids = own(users)
    table = sharded(weight, torch.full_like(bias, torch.nan))
    with pytest.raises(LrurecError) as caught:
        sharded_target_ranks(vectors, table.weight.detach(), table.bias.detach(), rows_of(table), targets, rows[:0], ids[:0])
    return str(caught.value)


def test_a_nan_score_is_an_error_on_every_rank(found: dict[int, list[Any]]) -> None:
    assert all("nan" in message for _, message in found[3])
