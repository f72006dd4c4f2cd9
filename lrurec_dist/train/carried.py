"""The recurrent state that each lane's window leaves to its next one: back-propagation through time, truncated at windows.

A window goes on from the state in which the one before it ended, as if that were given: the state
is carried and no gradient is, so a step costs memory for its windows and not for the histories
before them. The weights have moved by a step meanwhile; the state is that of the weights then.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lrurec_dist.data.batches import rows_of_rank
from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.train.pieces import Piece

NAME = "carried/state"


class CarriedState:
    """The states of this rank's lanes between two steps.

    With the parameters, the moments and the place in the data order it decides what comes next, so
    it belongs into checkpoints; by number of the lane, as a lane's rank changes with how many there are.

    Args:
        model: whose state it is; it is kept on its device.
        num_lanes: of all ranks together, the rows of a global batch.
        rank: whose lanes,
        world_size: of how many.

    `lanes` are the numbers of this rank's lanes, row after row of its batches.
    """

    def __init__(self, model: LRURec, *, num_lanes: int, rank: int, world_size: int) -> None:
        self.lanes = rows_of_rank(num_lanes, rank, world_size)
        self._num_lanes = num_lanes
        self._state = model.init_state(len(self.lanes))

    def before(self, goes_on: Tensor, first_row: int = 0) -> Tensor:
        """The state for the forward pass of some of the rows: zero where a row begins a user.

        Args:
            goes_on: (rows,) bool, on the model's device.
            first_row: number of the first of them.

        Returns:
            (blocks, rows, 2, hidden).
        """
        state = self._state[:, first_row : first_row + len(goes_on)]
        return torch.where(goes_on[None, :, None, None], state, torch.zeros_like(state))

    def after(self, state: Tensor, first_row: int = 0) -> None:
        """Keep what the forward pass returned for these rows, without its graph."""
        self._state[:, first_row : first_row + state.shape[1]] = state.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """(lanes, blocks, 2, hidden): that of the state of all ranks together."""
        blocks, _, *planes = self._state.shape
        return self._num_lanes, blocks, *planes

    def tensors(self) -> dict[str, Tensor]:
        """By name, the rows `lanes` of the state of all ranks together, whose shape is `shape`."""
        return {NAME: self._state.transpose(0, 1).contiguous()}

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of the state of all ranks together; nothing where it has no lanes."""
        if self.lanes:
            yield Piece(NAME, self.shape, self.lanes, self.tensors()[NAME])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave: the rows `lanes` again, saved by whichever ranks.

        Raises:
            CheckpointError: they are not there, or not of this model and these lanes.
        """
        expected = (len(self.lanes), *self.shape[1:])
        found = tuple(tensors[NAME].shape) if NAME in tensors else None
        if found != expected:
            raise CheckpointError(
                f"{NAME}: is {found}, expected {expected}: lanes {self.lanes.start} to {self.lanes.stop - 1} of {self._num_lanes}; "
                "batch.* or model.* differ from those of the checkpoint"
            )
        self._state = tensors[NAME].transpose(0, 1).to(self._state, copy=True)
