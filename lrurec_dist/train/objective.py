"""What training minimises: a micro-batch in, the summed loss of its targets out."""

import torch
from torch import Tensor

from lrurec_dist.config import LossConfig
from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.sampling import NegativeSampler, sampled_softmax_loss
from lrurec_dist.model.sharded_loss import sharded_sampled_softmax_loss, sharded_softmax_loss
from lrurec_dist.model.sharded_table import ShardedItemTable
from lrurec_dist.train.carried import CarriedState
from lrurec_dist.train.transfer import MicroBatch


class Objective:
    """The loss of a model as the settings have it.

    Args:
        model: whose loss it is.
        options: the full softmax over the catalogue, or a sampled one.
        seed: of the run; with the step, it decides the negatives.
        product_dtype: of the products of vectors and item rows; None for the parameters' own.
        carried: states between the windows of a history, if they go on from each other.
        counts: (num_items + 1,) how often each item trains; needed where negatives are sampled.
    """

    def __init__(
        self,
        model: LRURec,
        options: LossConfig,
        *,
        seed: int,
        product_dtype: torch.dtype | None,
        carried: CarriedState | None,
        counts: Tensor | None,
    ) -> None:
        self._model, self._options, self._seed = model, options, seed
        self._product_dtype, self._carried = product_dtype, carried
        self.sampler = NegativeSampler(counts, options.sampling) if counts is not None else None

    def loss(self, micro: MicroBatch, step: int) -> Tensor:
        """Sum over the targets of a micro-batch of the update after `step`; call it inside the engine.

        With a sharded table every rank has to call it, and its backward pass, with or without targets.
        """
        vectors = self._vectors(micro)
        if micro.predicted is not None:
            vectors = vectors[micro.predicted]
        table, unit_rows = self._model.table, bool(self._model.temperature)
        if self.sampler is None:
            padding = self._options.include_padding_class
            if isinstance(table, ShardedItemTable):
                return sharded_softmax_loss(
                    vectors,
                    table,
                    micro.targets,
                    include_padding_class=padding,
                    unit_rows=unit_rows,
                    product_dtype=self._product_dtype,
                )[0]
            return softmax_loss(
                vectors,
                table.weight,
                table.bias,
                micro.targets,
                include_padding_class=padding,
                unit_rows=unit_rows,
                product_dtype=self._product_dtype,
            )[0]
        # one sample for all ranks and micro-batches, so that the loss does not depend on how many there are
        negatives = self.sampler.draw(self._options.negatives, hash((self._seed, step)) % 2**63)
        log_probability = self.sampler.log_probability
        if isinstance(table, ShardedItemTable):
            return sharded_sampled_softmax_loss(
                vectors,
                table,
                micro.targets,
                negatives,
                log_probability,
                unit_rows=unit_rows,
                product_dtype=self._product_dtype,
            )[0]
        return sampled_softmax_loss(
            vectors,
            self._model.item_rows(),
            table.bias,
            micro.targets,
            negatives,
            log_probability,
            product_dtype=self._product_dtype,
        )[0]

    def _vectors(self, micro: MicroBatch) -> Tensor:
        if self._carried is None or micro.goes_on is None:
            vectors: Tensor = self._model(micro.item_ids, micro.keep, micro.kept)
            return vectors
        state = self._carried.before(micro.goes_on, micro.first_row)
        vectors, state = self._model(micro.item_ids, micro.keep, micro.kept, state)
        self._carried.after(state, micro.first_row)
        return vectors
