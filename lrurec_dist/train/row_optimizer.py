"""Optimizers of an item table's rows, whose state lives with the rows they belong to."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw as functional_adamw

from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.item_table import ItemTable
from lrurec_dist.model.sharded_table import ShardedItemTable

RowOptimizerKind = Literal["adamw", "lazy_adam", "rowwise_adagrad"]

_BETAS = (0.9, 0.999)
_ROWS_AT_A_TIME = 1 << 16  # touched rows that are copied out, changed, and written back at once


class RowOptimizer(ABC):
    """Updates the rows and biases this rank holds from the gradients they have, dense or sparse.

    Args:
        table: whose `weight` and `bias` are trained.
        learning_rate, epsilon: of the update.
        weight_decay: decoupled, of rows; biases do not decay.
    """

    def __init__(self, table: ItemTable | ShardedItemTable, *, learning_rate: float, weight_decay: float, epsilon: float) -> None:
        self.learning_rate, self.epsilon = learning_rate, epsilon
        self._parameters = {"weight": table.weight, "bias": table.bias}
        self._decay = {"weight": weight_decay, "bias": 0.0}
        self._steps = torch.zeros(())
        self._rows = {
            f"{moment}/{name}": value for name, parameter in self._parameters.items() for moment, value in self._new(parameter)
        }

    @abstractmethod
    def _new(self, parameter: Tensor) -> list[tuple[str, Tensor]]:
        """Named state of a parameter before the first step, one entry a row."""

    @abstractmethod
    def _update(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """One step of one parameter."""

    @torch.no_grad()
    def step(self) -> None:
        """One update; parameters without a gradient stay as they are."""
        self._steps += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._update(name, parameter, parameter.grad)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def sq_norm(self) -> Tensor:
        """() float64: sum of squares of this rank's gradients; over all ranks, the table's share of the global norm, squared."""
        total = torch.zeros((), dtype=torch.float64, device=self._parameters["weight"].device)
        for parameter in self._parameters.values():
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # what several ranks sent for a row is added first
            total += torch.linalg.vector_norm(_values(parameter.grad), dtype=torch.float64).square()
        return total

    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiply the gradients, in place, by a number or a scalar."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                _values(parameter.grad).mul_(factor)

    def state(self) -> dict[str, Tensor]:
        """`<moment>/<weight or bias>`, of this rank's rows in their order, and the scalar `step`; the tensors in use, not copies."""
        return {"step": self._steps, **self._rows}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave for the same rows.

        Raises:
            CheckpointError: a name or a shape does not fit this optimizer.
        """
        own = self.state()
        expected, found = ({name: tuple(x.shape) for name, x in each.items()} for each in (own, state))
        if expected != found:
            name, shape = sorted(set(expected.items()) ^ set(found.items()))[0]
            raise CheckpointError(
                f"state {name} {shape} of the item rows is not in both checkpoint and optimizer; the optimizer, the catalogue or the ranks differ"
            )
        for name, value in state.items():
            own[name].copy_(value)


class RowAdamW(RowOptimizer):
    """torch.optim.AdamW, fused, as the replicated table has it: every row moves and decays in every step."""

    def _new(self, parameter: Tensor) -> list[tuple[str, Tensor]]:
        return [(moment, torch.zeros_like(parameter)) for moment in ("exp_avg", "exp_avg_sq")]

    def _update(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        functional_adamw(
            [parameter],
            [gradient.to_dense() if gradient.is_sparse else gradient],
            [self._rows[f"exp_avg/{name}"]],
            [self._rows[f"exp_avg_sq/{name}"]],
            [],
            [(self._steps - 1).to(parameter.device)],  # it counts this step itself
            fused=True,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=self.learning_rate,
            weight_decay=self._decay[name],
            eps=self.epsilon,
            maximize=False,
        )


class LazyAdam(RowOptimizer):
    """AdamW on touched rows only; where all are touched in every step it is AdamW.

    Touched are the rows of a sparse gradient, and those of a dense one that are not all zero. A row moves, its moments fade and
    its weight decays only in a step that touches it; bias correction counts all steps.
    """

    def _new(self, parameter: Tensor) -> list[tuple[str, Tensor]]:
        return [(moment, torch.zeros_like(parameter)) for moment in ("exp_avg", "exp_avg_sq")]

    def _update(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        mean, square = self._rows[f"exp_avg/{name}"], self._rows[f"exp_avg_sq/{name}"]
        mean_share, square_share = (1 - beta ** self._steps.item() for beta in _BETAS)
        for rows, part in _touched(gradient):
            mean[rows] = moved = mean[rows].lerp_(part, 1 - _BETAS[0])
            square[rows] = spread = square[rows].mul_(_BETAS[1]).addcmul_(part, part, value=1 - _BETAS[1])
            value = parameter[rows].mul_(1 - self.learning_rate * self._decay[name])
            scale = spread.div(square_share).sqrt_().add_(self.epsilon)
            parameter[rows] = value.addcdiv_(moved, scale, value=-self.learning_rate / mean_share)


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one number a row, the sum of its mean squared gradients: 1 / (2 dim) of Adam's state.

    Only touched rows move and decay, as in `LazyAdam`. This is the row-wise Adagrad of DLRM and FBGEMM, decay decoupled.
    """

    def _new(self, parameter: Tensor) -> list[tuple[str, Tensor]]:
        return [("sum_sq", parameter.new_zeros(len(parameter)))]

    def _update(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        sums = self._rows[f"sum_sq/{name}"]
        for rows, part in _touched(gradient):
            per_row = part.view(len(part), *(part.shape[1:] or (1,)))  # a bias is a row of one
            sums[rows] = reached = sums[rows] + per_row.square().mean(1)
            move = per_row / (reached.sqrt().add_(self.epsilon)[:, None])
            value = parameter[rows].mul_(1 - self.learning_rate * self._decay[name])
            parameter[rows] = value.sub_(move.view_as(value), alpha=self.learning_rate)


def row_optimizer(
    kind: RowOptimizerKind,
    table: ItemTable | ShardedItemTable,
    *,
    learning_rate: float,
    weight_decay: float,
    epsilon: float,
) -> RowOptimizer:
    """The optimizer of a table's rows by its name in the configuration."""
    kinds: dict[str, type[RowAdamW | LazyAdam | RowwiseAdagrad]] = {
        "adamw": RowAdamW,
        "lazy_adam": LazyAdam,
        "rowwise_adagrad": RowwiseAdagrad,
    }
    return kinds[kind](table, learning_rate=learning_rate, weight_decay=weight_decay, epsilon=epsilon)


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def _touched(gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows,) and their gradients, a part at a time."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        yield from zip(rows.split(_ROWS_AT_A_TIME), values.split(_ROWS_AT_A_TIME), strict=True)
        return
    for part, values in enumerate(gradient.split(_ROWS_AT_A_TIME)):
        rows = (values != 0).view(len(values), -1).any(1).nonzero().squeeze(1)
        yield rows + part * _ROWS_AT_A_TIME, values[rows]
