"""What every training worker runs: batches in, steps, validations, checkpoints, one report each.

Free of Ray but for the feed: the process group exists, and `report` is whatever the launcher gives.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lrurec_dist import collectives, storage
from lrurec_dist.config import Config
from lrurec_dist.data.batches import TrainingBatch, read_for_training
from lrurec_dist.data.feed import iter_training_batches
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import DivergenceError, LrurecError
from lrurec_dist.evaluate.evaluation import RankingProtocol, rank_shard, training_counts
from lrurec_dist.evaluate.metrics import RankCounts
from lrurec_dist.model.loss import softmax_loss
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.sampling import NegativeSampler, sampled_softmax_loss
from lrurec_dist.reporting import METRICS, MetricsFile
from lrurec_dist.train.checkpoint_writer import CheckpointWriter
from lrurec_dist.train.engine import Engine
from lrurec_dist.train.order import data_order
from lrurec_dist.train.pieces import pieces_of_rank
from lrurec_dist.train.resume import begin, describe_subject

RANKING_REPORT_S = 10.0  # between records of how far a validation is


def train(config: Config, device: torch.device, report: Callable[[dict[str, float]], None]) -> str:
    """Train until early stopping or the end of the budget; the same call on every rank.

    Args:
        config: the run.
        device: where this rank computes.
        report: called by every rank after each validation, with its metrics.

    Returns:
        Why training ended. The best and the last checkpoint lie in the run directory.
    """
    return _Worker(config, device).run(report)


class _Worker:
    """One rank's side of a training run."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self.dataset = SequenceDataset(config.dataset_url)
        self.order = data_order(config, self.dataset)
        mine = self.dataset.shard_names[self.rank :: self.world_size]
        self.validation_shards = [read_for_training(self.dataset, name, self.order) for name in mine]
        self.shape: dict[str, Any] = {
            "num_items": self.dataset.num_items,
            "dim": config.model.dim,
            "hidden": config.model.hidden,
            "blocks": config.model.blocks,
            "dropout": config.model.dropout,
            "ring": [config.model.ring_min, config.model.ring_max],
            "temperature": config.model.temperature,
        }
        torch.manual_seed(config.seed)
        options = config.train
        # None: products in the parameters' own type
        self.product_dtype = None if options.precision == "float32" else torch.bfloat16
        self.sampler = self._sampler() if config.loss.negatives else None
        self.engine = Engine(
            LRURec(**self.shape, compute_dtype=self.product_dtype).to(device),
            device=device,
            zero_stage=options.zero_stage,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            decay_recurrence=options.decay_recurrence,
            epsilon=options.epsilon,
            clip_norm=options.clip_norm,
        )
        self.metrics_file = MetricsFile(storage.join(config.run_dir, METRICS))
        group, subject = collectives.new_group(), describe_subject(config, self.dataset, self.shape)
        self.progress, damaged = begin(config, self.dataset, self.engine, subject, group, self._note)
        self.checkpoints = CheckpointWriter(
            config.run_dir, subject=subject, keep=options.keep_checkpoints, damaged=damaged, group=group, record=self._write
        )

    def _note(self, text: str) -> None:
        self._write("note", text=text)

    def _write(self, kind: str, **values: object) -> None:
        if self.rank == 0:
            self.metrics_file.write(kind, **values)

    def _batches(self) -> Iterator[TrainingBatch]:
        return iter_training_batches(
            self.dataset,
            self.order,
            epoch=self.progress.epoch,
            first_batch=self.progress.batches_into_epoch,
            rank=self.rank,
            world_size=self.world_size,
            feed=self.config.batch.feed,
        )

    def run(self, report: Callable[[dict[str, float]], None]) -> str:
        with self.checkpoints:  # the end waits for what is being written
            stop = self._train(report)
        self._note(f"ended after {self.progress.step:,} steps: {stop}")
        return stop

    def _train(self, report: Callable[[dict[str, float]], None]) -> str:
        options = self.config.train
        window = _Window(self.device)
        stop = self._exhausted()
        waited_from = time.perf_counter()
        for batch in self._batches() if not stop else ():
            window.waiting_s += time.perf_counter() - waited_from
            window.add(*self._step(batch))
            moved_on = batch.epoch != self.progress.epoch
            self.progress = replace(
                self.progress,
                step=self.progress.step + 1,
                epoch=batch.epoch,
                batches_into_epoch=1 if moved_on else self.progress.batches_into_epoch + 1,
            )
            step = self.progress.step
            if step % options.report_every == 0 or step == options.max_steps:
                self._report_window(window)
                stop = self._exhausted()
                window = _Window(self.device)
            validates = step % options.validate_every == 0 or bool(stop)
            if validates or (options.checkpoint_every and step % options.checkpoint_every == 0):
                started = time.perf_counter()
                if validates:
                    report(self._validate())
                    stop = stop or self._exhausted()
                else:
                    self._save(None)
                window.leave_out(time.perf_counter() - started)
                self.progress = replace(self.progress, seconds=self.progress.seconds + time.perf_counter() - started)
            if stop:
                break
            waited_from = time.perf_counter()
        return stop

    def _step(self, batch: TrainingBatch) -> tuple[torch.Tensor, int, int, int]:
        """One update; returns the loss sum and targets of this rank, and its real and padded positions."""
        # Dropout masks are a function of (seed, step, rank), so a resumed run repeats them.
        torch.manual_seed(hash((self.config.seed, self.progress.step, self.rank)))
        item_ids = torch.from_numpy(batch.item_ids).to(self.device)
        targets = torch.from_numpy(batch.targets).to(self.device)
        keep = (targets > 0) | (item_ids > 0)  # what is input alone drives the recurrence
        try:
            vectors = self.engine(item_ids, keep)
        except LrurecError as error:  # a batch of ours is sound, so it is the parameters that ran away
            raise DivergenceError(
                f"loss is nan before step {self.progress.step + 1}, train.learning_rate={self.config.train.learning_rate:g}: {error}; "
                "lower the rate, or resume from the last checkpoint"
            ) from error
        targets = targets[keep]
        if self.order.windows == "sliding":  # the others keep nothing without a target
            predicted = targets > 0
            vectors, targets = vectors[predicted], targets[predicted]
        loss_sum, num_targets = self._loss(vectors, targets)
        self.engine.step(loss_sum, batch.num_targets)
        return loss_sum.detach(), num_targets, int(keep.sum()), keep.numel()

    def _loss(self, vectors: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        model, options = self.engine.model, self.config.loss
        if self.sampler is None:
            return softmax_loss(
                vectors,
                model.table.weight,
                model.table.bias,
                targets,
                include_padding_class=options.include_padding_class,
                unit_rows=bool(model.temperature),
                product_dtype=self.product_dtype,
            )
        # one sample for all ranks, so that the loss does not depend on how many there are
        negatives = self.sampler.draw(options.negatives, hash((self.config.seed, self.progress.step)) % 2**63)
        log_probability = self.sampler.log_probability
        rows, bias = model.item_rows(), model.table.bias
        return sampled_softmax_loss(vectors, rows, bias, targets, negatives, log_probability, product_dtype=self.product_dtype)

    def _sampler(self) -> NegativeSampler:
        """Counts what trains, each rank its own shards: the catalogue's counts know the held-out interactions too."""
        mine = training_counts(self.validation_shards, self.order.split, self.dataset.num_items)
        counts = collectives.all_reduce_sum(torch.from_numpy(mine).to(self.device))
        return NegativeSampler(counts, self.config.loss.sampling)

    def _report_window(self, window: "_Window") -> None:
        loss_sum, num_targets, real, padded, waiting_s = collectives.all_reduce_sum(window.totals()).tolist()
        step, loss = self.progress.step, loss_sum / max(1.0, num_targets)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise DivergenceError(
                f"loss is {loss} within {window.steps} steps before step {step}, train.learning_rate={self.config.train.learning_rate:g}; "
                "lower the rate, or resume from the last checkpoint"
            )
        self.progress = replace(self.progress, seconds=self.progress.seconds + window.seconds)
        self._write(
            "train",
            step=step,
            epoch=self.progress.epoch,
            loss=loss,
            targets_per_s=num_targets / window.seconds,
            padded_per_real=padded / max(1.0, real),
            waiting_share=waiting_s / self.world_size / window.seconds,
            seconds_left=self._time_left(window),
            **{"best_recall@10": max(self.progress.best_recall, 0.0)},
        )

    def _time_left(self, window: "_Window") -> float:
        options = self.config.train
        left = (options.max_steps - self.progress.step) * window.seconds / window.steps
        return max(0.0, min(left, options.max_minutes * 60 - self.progress.seconds) if options.max_minutes else left)

    def _exhausted(self) -> str:
        """Why training should end now, the same on every rank; empty to go on."""
        options = self.config.train
        if self.progress.step >= options.max_steps:
            return f"train.max_steps={options.max_steps:,} reached"
        if self.progress.validations_since_best >= options.patience:
            return f"recall@10 has not improved in train.patience={options.patience} validations"
        overtime = bool(options.max_minutes) and self.progress.seconds >= options.max_minutes * 60
        if collectives.any_rank(overtime, self.device):  # clocks differ, so the ranks agree first
            return f"train.max_minutes={options.max_minutes:g} reached"
        return ""

    def _validate(self) -> dict[str, float]:
        """Rank the validation targets, keep the checkpoint, and say how it went."""
        started = time.perf_counter()
        model, options = self.engine.model, self.config.evaluate
        protocol = RankingProtocol(
            split=self.order.split,
            part="validation",
            max_length=self.config.batch.max_length,
            batch_size=options.batch_size,
            exclude_history=options.exclude_history,
            deepest=max(options.ks),
        )
        model.eval()
        counts = RankCounts(protocol.deepest)
        told = started
        for done, shard in enumerate(self.validation_shards, start=1):
            counts.counts += rank_shard(model, shard, protocol).counts
            if time.perf_counter() - told >= RANKING_REPORT_S:
                told = time.perf_counter()
                self._write("ranking", step=self.progress.step, shards_done=done, shards=len(self.validation_shards))
        model.train()
        counts.counts = collectives.all_reduce_sum(counts.counts.to(self.device)).cpu()
        metrics = counts.metrics(options.ks)
        is_best = metrics["recall@10"] > self.progress.best_recall
        self.progress = replace(
            self.progress,
            best_recall=max(metrics["recall@10"], self.progress.best_recall),
            validations_since_best=0 if is_best else self.progress.validations_since_best + 1,
            curve=[*self.progress.curve, {"step": self.progress.step, **metrics}],
        )
        self._save(metrics)
        self._write(
            "validation",
            step=self.progress.step,
            users=counts.users,
            seconds=time.perf_counter() - started,
            is_best=is_best,
            **{"best_recall@10": self.progress.best_recall},
            **metrics,
        )
        return {"step": self.progress.step, **metrics}

    def _save(self, validation: dict[str, float] | None) -> None:
        pieces = pieces_of_rank(self.engine.tensors(), self.rank, self.world_size)
        self.checkpoints.save(pieces, self.progress, validation)


class _Window:
    """Sums since the last report."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.steps = 0
        self.waiting_s = 0.0
        self._started = time.perf_counter()

    def add(self, loss_sum: torch.Tensor, num_targets: int, real: int, padded: int) -> None:
        """Count one step."""
        self._sums += torch.stack([loss_sum.double(), *self._sums.new_tensor([num_targets, real, padded])])
        self.steps += 1

    def totals(self) -> torch.Tensor:
        """(5,): loss sum, targets, real positions, positions with padding, seconds spent waiting for data."""
        return torch.cat([self._sums, self._sums.new_tensor([self.waiting_s])])

    def leave_out(self, seconds: float) -> None:
        """Do not count the last so many seconds: they were not spent on steps."""
        self._started += seconds

    @property
    def seconds(self) -> float:
        """Since the window began."""
        return max(1e-9, time.perf_counter() - self._started)
