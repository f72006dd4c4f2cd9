"""One more event of a user, at the cost of its arithmetic: what does not change from event to event is computed once."""

from itertools import chain

import torch
from torch import Tensor, nn

from lrurec_dist import PAD_ID
from lrurec_dist.errors import LrurecError
from lrurec_dist.model import native
from lrurec_dist.model.checks import require
from lrurec_dist.model.lrurec import FeedForward, LRURec, RecurrentLayer


class Stepper:
    """Advances states as `LRURec.step` does, within float32 rounding.

    Args:
        model: on the CPU; its parameters as they are now, in float32, its item table as it is when asked.

    `LRURec.step` is made for sequences: one event of one user costs it some eighty operations that compute nothing. Here
    decay, gamma and the layout of all weights are made once, and a kernel takes a user through all blocks; without a
    compiler eleven operations a block do. A user's result does not depend on who is stepped beside it.
    """

    @torch.inference_mode()
    def __init__(self, model: LRURec) -> None:
        self._table, self._temperature = model.table, model.temperature
        self._blocks, self._hidden, self._epsilon = len(model.recurrent), model.hidden, model.norm.eps
        self._norm = [model.norm.weight.float(), model.norm.bias.float()]
        self._parts = [_parameters(*block) for block in model.layers()]
        self._packed = torch.cat([part.flatten() for part in chain(self._norm, *self._parts)])

    @torch.inference_mode()
    def step(self, item_ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """(users, dim) float32 user vectors and the states (users, blocks, 2, hidden) after one more event each.

        Args:
            item_ids: (users,) int64, in 1..num_items.
            states: (users, blocks, 2, hidden) float32; left as they are.

        Raises:
            LrurecError: an id is outside the catalogue, or shapes do not fit.
        """
        if states.shape != (len(item_ids), self._blocks, 2, self._hidden):
            raise LrurecError(
                f"step: states {tuple(states.shape)} have to be (users, blocks, 2, hidden) = "
                f"{(len(item_ids), self._blocks, 2, self._hidden)}"
            )
        require(
            (item_ids > PAD_ID) & (item_ids <= self._table.num_items), f"item_ids: an id is outside 1..{self._table.num_items}"
        )
        x, states = self._table.weight[item_ids].float(), states.clone(memory_format=torch.contiguous_format)
        if native.load() is None:
            x = self._portable(x, states)
        else:
            native.step_users(self._packed, states, x, self._epsilon)
        return (nn.functional.normalize(x, dim=1) / self._temperature if self._temperature else x), states

    def _portable(self, x: Tensor, states: Tensor) -> Tensor:
        x = self._normalise(x, *self._norm)
        for block, parts in enumerate(self._parts):
            decay, w_in, b_in, w_out, b_out, scale, shift, w_1, b_1, w_2, b_2, last_scale, last_shift = parts
            drive = torch.addmm(b_in, x, w_in).unflatten(1, (2, -1))
            real, imaginary = states[:, block].unbind(1)
            states[:, block] = drive + torch.stack(
                [decay[0] * real - decay[1] * imaginary, decay[0] * imaginary + decay[1] * real], dim=1
            )
            x = self._normalise(torch.addmm(b_out, states[:, block].flatten(1), w_out) + x, scale, shift)
            inner = nn.functional.gelu(torch.addmm(b_1, x, w_1))
            x = self._normalise(torch.addmm(b_2, inner, w_2) + x, last_scale, last_shift)
        return x

    def _normalise(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, scale.shape, scale, shift, self._epsilon)


def _parameters(recurrent: RecurrentLayer, feed_forward: FeedForward) -> list[Tensor]:
    """In the order of use, float32; weights (inputs, outputs), gamma within those of the recurrence."""
    gamma = torch.exp(recurrent.gamma_log).repeat(2)
    parts = [
        recurrent.decay(),
        (recurrent.in_proj.weight * gamma[:, None]).T,
        recurrent.in_proj.bias * gamma,
        recurrent.out_proj.weight.T,
        recurrent.out_proj.bias,
        recurrent.norm.weight,
        recurrent.norm.bias,
        feed_forward.w_1.weight.T,
        feed_forward.w_1.bias,
        feed_forward.w_2.weight.T,
        feed_forward.w_2.bias,
        feed_forward.norm.weight,
        feed_forward.norm.bias,
    ]
    return [part.float().contiguous() for part in parts]
