"""Target ranks and lists over rows spread over real processes: the numbers of one process, and of a sort in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from lrurec_dist.errors import LrurecError
from lrurec_dist.evaluate import ranking
from lrurec_dist.evaluate.ranking import target_ranks, top_k
from lrurec_dist.evaluate.sharded_ranking import rows_of, sharded_target_ranks, sharded_top_k
from lrurec_dist.model import native
from tests.processes import run_ranks
from tests.reference import rank_of
from tests.sharded import own, sharded

USERS = (5, 0, 3, 1, 2)  # of each rank
# whole numbers up to so many, exact in float32, 0 to tie all scores; None: drawn from a normal distribution
LEVELS = (0, 1, 3, None)
SEEDS, K, TILE = range(8), (1, 4, 40), 60

Users = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # vectors, targets, pairs of excluded rows and ids


def draw(seed: int, levels: int | None) -> tuple[torch.Tensor, torch.Tensor, list[Users]]:
    generator = torch.Generator().manual_seed(seed)
    num_items = 5 + 4 * seed

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


def on_ranks(form: str) -> tuple[list[list[np.ndarray]], str]:
    if form == "tiles":
        native.load = lambda: None  # type: ignore[assignment]
    assert (native.load() is not None) == (form == "kernels")
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


WORLDS = ((1, "kernels"), (2, "kernels"), (3, "kernels"), (5, "kernels"), (3, "tiles"))


@pytest.fixture(scope="module")
def found() -> dict[tuple[int, str], list[Any]]:
    return {world: run_ranks(world[0], on_ranks, world[1]) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_and_lists_are_those_of_one_process(found: dict[tuple[int, str], list[Any]], world: tuple[int, str]) -> None:
    draws = [(levels, seed) for levels in LEVELS for seed in SEEDS]
    for number, (levels, seed) in enumerate(draws):
        weight, bias, users = draw(seed, levels)
        for rank in range(world[0]):
            vectors, targets, rows, ids = users[rank]
            ranks, *lists = found[world][rank][0][number]
            if levels is not None:
                scores = (vectors.double() @ weight.double().T + bias.double()).tolist()
                excluded = [set(ids[rows == user].tolist()) for user in range(len(vectors))]
                expected_ranks = [rank_of(scores[user], target, excluded[user]) for user, target in enumerate(targets.tolist())]
                assert ranks.tolist() == expected_ranks
            assert ranks.tolist() == target_ranks(vectors, weight, bias, targets, rows, ids).tolist()
            for k, best, found_scores in zip(K, lists[::2], lists[1::2], strict=True):
                expected, expected_scores = top_k(vectors, weight, bias, k, rows, ids)
                assert best.tolist() == expected.tolist()
                # products of other shapes may round otherwise, but in the kernels
                tolerance = 0 if world[1] == "kernels" else 1e-6
                np.testing.assert_allclose(found_scores, expected_scores.numpy(), rtol=tolerance, atol=tolerance)


def rank_with_a_nan() -> str:
    weight, bias, users = draw(4, 1)
    vectors, targets, rows, ids = own(users)
    table = sharded(weight, torch.full_like(bias, torch.nan))
    with pytest.raises(LrurecError) as caught:
        sharded_target_ranks(vectors, table.weight.detach(), table.bias.detach(), rows_of(table), targets, rows[:0], ids[:0])
    return str(caught.value)


@pytest.mark.parametrize("world", WORLDS)
def test_a_nan_score_is_an_error_on_every_rank(found: dict[tuple[int, str], list[Any]], world: tuple[int, str]) -> None:
    assert all("nan" in message for _, message in found[world])
