"""Histories of any length into states, a bounded number of events at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.model.lrurec import LRURec

EVENTS_AT_ONCE = 1 << 15  # of all users together; what lies between two layers is some 8 KB an event at width 64


@torch.inference_mode()
def extend_states(model: LRURec, states: Tensor, vectors: Tensor, histories: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """States and user vectors after more events of each user.

    Args:
        model: whose states they are.
        states: (users, blocks, 2, hidden), of the type of the model's parameters.
        vectors: (users, dim).
        histories: (events,) int64 item ids of each user, oldest first; a user may have none, and stays as it is.

    Both are those of the whole history within float32 rounding, wherever a history is cut into pieces. Memory is that of
    `EVENTS_AT_ONCE` events, or of one a user.
    """
    states, vectors = states.transpose(0, 1).clone(), vectors.clone()
    lengths = torch.tensor([len(history) for history in histories], dtype=torch.int64)
    done = torch.zeros_like(lengths)
    while len(users := (lengths > done).nonzero().squeeze(1)):
        room = max(1, EVENTS_AT_ONCE // len(users))
        taken = (lengths - done)[users].clamp(max=room)
        width = int(taken.max())
        item_ids = torch.full((len(users), width), PAD_ID)
        for row, (user, count) in enumerate(zip(users.tolist(), taken.tolist(), strict=True)):
            item_ids[row, width - count :] = histories[user][done[user] : done[user] + count]
        found, after = model(item_ids, item_ids != PAD_ID, state=states[:, users])
        states[:, users] = after
        vectors[users] = found[taken.cumsum(0) - 1].to(vectors.dtype)
        done[users] += taken
    return states.transpose(0, 1).contiguous(), vectors


@torch.inference_mode()
def initial_states(model: LRURec, users: int) -> tuple[Tensor, Tensor]:
    """States (users, blocks, 2, hidden) and vectors (users, dim) before the first event, as `extend_states` takes them."""
    vector = model.encode(torch.full((1, 1), PAD_ID))
    return model.init_state(users).transpose(0, 1).contiguous(), vector.expand(users, -1)
