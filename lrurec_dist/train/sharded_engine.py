"""The engine of a model whose item table is spread over the ranks: DeepSpeed steps the rest, each rank its rows."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lrurec_dist import collectives
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.sharded_table import ShardedItemTable
from lrurec_dist.train.engine import ClipResult, Engine
from lrurec_dist.train.pieces import Piece
from lrurec_dist.train.row_optimizer import RowOptimizer, RowOptimizerKind, row_optimizer

TABLE = "table."  # how the names of the table's parameters begin


class ShardedEngine(Engine):
    """An engine that keeps the item table from DeepSpeed, which would copy rank 0's rows over everybody's.

    Args:
        model: with `table`, on its device; the same on every rank but for the rows.
        table_optimizer: of rows and biases.
        learning_rate, weight_decay, epsilon: of both optimizers; biases take no decay.
        options: as `Engine`; ZeRO stages 0 to 2.

    The rows count in the gradient norm; they are clipped, and left alone in a skipped update, with everything else. `tensors`,
    `parameters` and `optimizer_state` are those of the rest, `pieces` and `load` those of both.
    """

    def __init__(
        self,
        model: LRURec,
        table: ShardedItemTable,
        *,
        table_optimizer: RowOptimizerKind,
        learning_rate: float,
        weight_decay: float,
        epsilon: float,
        **options: Any,
    ) -> None:
        common: dict[str, Any] = {"learning_rate": learning_rate, "weight_decay": weight_decay, "epsilon": epsilon}
        super().__init__(model, apart=table, **common, **options)
        self._table = table
        self._rows: RowOptimizer = row_optimizer(table_optimizer, table, **common)
        mine = slice(table.rank, None, table.world_size)
        self._held = {f"{TABLE}{name}": mine for name, _ in table.named_parameters()}

    def update(self, outside_sq_norm: float | Tensor = 0.0) -> ClipResult:
        # the loss is times world_size, for DeepSpeed to average; rows already have the sum over ranks
        self._rows.scale_gradients(1 / collectives.world_size())
        clipped = super().update(collectives.all_reduce_sum(self._rows.sq_norm()) + outside_sq_norm)
        if not clipped.skipped:
            self._rows.scale_gradients(clipped.factor)
            self._rows.step()
        self._rows.zero_grad()
        return clipped

    def set_learning_rate(self, learning_rate: float) -> None:
        super().set_learning_rate(learning_rate)
        self._rows.learning_rate = learning_rate

    def pieces(self) -> Iterator[Piece]:
        yield from super().pieces()
        everything = self._table.num_items + 1
        parameters = {f"{TABLE}{name}": parameter.detach() for name, parameter in self._table.named_parameters()}
        for name, values in {**parameters, **self._row_state()}.items():
            held = range(everything)[self.rows_of(name)]
            yield Piece(name, (everything, *values.shape[1:]), held, values)

    def load(self, parameters: dict[str, Tensor], optimizer_state: dict[str, Tensor] | None, step: int) -> None:
        super().load(parameters, optimizer_state, step)
        with torch.no_grad():
            for name, parameter in self._table.named_parameters():
                parameter.copy_(parameters[f"{TABLE}{name}"])
        state = (
            {name: torch.zeros_like(own) for name, own in self._row_state().items()}
            if optimizer_state is None
            else optimizer_state
        )
        steps = {"step": torch.tensor(float(step))}
        self._rows.load(steps | {name.replace(TABLE, ""): state[name] for name in self._row_state()})

    def _state_names(self) -> set[str]:
        return super()._state_names() | self._row_state().keys()

    def _row_state(self) -> dict[str, Tensor]:
        """What the optimizer keeps for each row, named as in a checkpoint: `<moment>/<parameter>`."""
        state = [(name.partition("/"), values) for name, values in self._rows.state().items()]
        return {f"{moment}/{TABLE}{parameter}": values for (moment, _, parameter), values in state if parameter}
