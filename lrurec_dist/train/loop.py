"""What every training worker runs: batches in, steps, validations, checkpoints, one report each.

Free of Ray but for the feed: the process group exists, and `report` is whatever the launcher gives.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from lrurec_dist import collectives
from lrurec_dist.config import Config
from lrurec_dist.config_file import to_dict
from lrurec_dist.data.batches import read_for_training
from lrurec_dist.data.feed import iter_training_batches
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import DivergenceError, LrurecError
from lrurec_dist.evaluate.evaluation import RankingProtocol, rank_shards, training_counts
from lrurec_dist.evaluate.metrics import RankCounts
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.run_directory import run_metrics
from lrurec_dist.train.assembly import new_engine, new_model, product_dtype
from lrurec_dist.train.bad_batches import BAD_BATCHES, BadBatches
from lrurec_dist.train.carried import CarriedState
from lrurec_dist.train.checkpoint_writer import CheckpointWriter
from lrurec_dist.train.objective import Objective
from lrurec_dist.train.order import data_order
from lrurec_dist.train.presence import ENDED, LEFT, TRAINING, VALIDATING, WAITING, Agreement, Presence
from lrurec_dist.train.resume import begin
from lrurec_dist.train.schedule import learning_rate_schedule
from lrurec_dist.train.subject import describe_subject, model_arguments
from lrurec_dist.train.trackers import Trackers
from lrurec_dist.train.transfer import MicroBatch, StepBatch, iter_step_batches
from lrurec_dist.train.window import Window

RANKING_REPORT_S = 10.0  # between records of how far a validation is


def train(
    config: Config, device: torch.device, report: Callable[[dict[str, float]], None], presence: Presence | None = None
) -> str:
    """Train until early stopping or the end of the budget; the same call on every rank.

    Args:
        config: the run.
        device: where this rank computes.
        report: called by every rank after each validation, with its metrics.
        presence: told where this rank stands, and asked whether all should leave.

    Returns:
        Why training ended; empty if the ranks left before. The best and the last checkpoint lie in the run directory.
    """
    return _Worker(config, device, presence or Presence()).run(report)


class _Worker:
    """One rank's side of a training run."""

    def __init__(self, config: Config, device: torch.device, presence: Presence) -> None:
        self.config, self.device, self.presence = config, device, presence
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        self.dataset = SequenceDataset(config.dataset_url)
        self.order = data_order(config, self.dataset)
        mine = self.dataset.shard_names[self.rank :: self.world_size]
        self.validation_shards = [read_for_training(self.dataset, name, self.order) for name in mine]
        torch.manual_seed(config.seed)
        options = config.train
        self.engine = new_engine(config, self.dataset.num_items, device)
        self.learning_rate = learning_rate_schedule(
            schedule=options.schedule,
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup_steps,
            max_steps=options.max_steps,
            final_share=options.final_learning_rate_share,
        )
        self.metrics_file, self.bad_batches = run_metrics(config, "train", self.rank), BadBatches(config.run_dir)
        self.trackers = Trackers(config.run_dir, options.track if self.rank == 0 else [], to_dict(config), self._note)
        lanes = {"num_lanes": self.order.global_batch_size, "rank": self.rank, "world_size": self.world_size}
        self.carried = CarriedState(self.engine.model, **lanes) if self.order.windows == "carried" else None
        self.objective = Objective(
            self.engine.model,
            config.loss,
            seed=config.seed,
            product_dtype=product_dtype(config),
            carried=self.carried,
            counts=self._training_counts() if config.loss.negatives else None,
        )
        subject = describe_subject(config, self.dataset, model_arguments(config, self.dataset.num_items))
        group = collectives.new_group()
        self.progress, damaged = begin(config, self.dataset, self.engine, self.carried, subject, group, self._note)
        self.checkpoints = CheckpointWriter(
            config.run_dir, subject=subject, keep=options.keep_checkpoints, damaged=damaged, group=group, record=self._write
        )

    def _note(self, text: str) -> None:
        self._write("note", text=text)

    def _write(self, kind: str, **values: object) -> None:
        if self.rank == 0:
            self.metrics_file.write(kind, **values)
            self.trackers.write(kind, values)

    def _batches(self) -> Iterator[StepBatch]:
        batches = iter_training_batches(
            self.dataset,
            self.order,
            epoch=self.progress.epoch,
            first_batch=self.progress.batches_into_epoch,
            rank=self.rank,
            world_size=self.world_size,
            feed=self.config.batch.feed,
            resources=self.config.dataset.resources,
        )
        return iter_step_batches(batches, accumulation=self.engine.accumulation, device=self.device)

    def run(self, report: Callable[[dict[str, float]], None]) -> str:
        with self.checkpoints:  # the end waits for what is being written
            stop = self._train(report)
        self.presence.at(self.progress.step, ENDED if stop else LEFT)
        if stop:
            self._note(f"ended after {self.progress.step:,} steps: {stop}")
        self.trackers.close()
        return stop

    def _train(self, report: Callable[[dict[str, float]], None]) -> str:
        options = self.config.train
        window, agreement = Window(self.device), Agreement(self.presence, self.device)
        stop = self._exhausted()
        batches = self._batches()
        while not stop:
            self.presence.at(self.progress.step, WAITING)
            with window.phase("waiting"):
                batch = next(batches)
            step = self.progress.step + 1
            reported = step % options.report_every == 0 or step == options.max_steps
            window.sampled = reported
            self.presence.at(self.progress.step, TRAINING)
            self._step(batch, window)
            moved_on = batch.epoch != self.progress.epoch
            self.progress = replace(
                self.progress,
                step=step,
                epoch=batch.epoch,
                batches_into_epoch=1 if moved_on else self.progress.batches_into_epoch + 1,
            )
            if reported:
                self._report_window(window)
                stop = self._exhausted()
                window = Window(self.device)
            validates = step % options.validate_every == 0 or bool(stop)
            leaves = not stop and agreement.to_leave()
            if leaves or validates or (options.checkpoint_every and step % options.checkpoint_every == 0):
                self.presence.at(step, VALIDATING)
                started = time.perf_counter()
                if validates:
                    report(self._validate())
                    stop = stop or self._exhausted()
                else:
                    self._save(None)
                window.leave_out(time.perf_counter() - started)
                self.progress = replace(self.progress, seconds=self.progress.seconds + time.perf_counter() - started)
            if leaves:
                break
        return stop

    def _step(self, batch: StepBatch, window: Window) -> None:
        """One update, counted in the window."""
        # Dropout masks are a function of (seed, step, rank), so a resumed run repeats them.
        torch.manual_seed(hash((self.config.seed, self.progress.step, self.rank)))
        self.engine.set_learning_rate(self.learning_rate(self.progress.step))
        loss_sum, counts = torch.zeros((), device=self.device), [0, 0, 0]
        for micro in batch.micro_batches:
            with window.phase("forward"):
                micro_loss = self._forward(micro)
            with window.phase("backward"):
                self.engine.backward(micro_loss, batch.num_targets)
            loss_sum += micro_loss.detach()
            seen = (micro.targets.numel(), micro.kept.numel(), micro.keep.numel())
            counts = [sum(pair) for pair in zip(counts, seen, strict=True)]
        with window.phase("communication"):
            self.engine.reduce()
        with window.phase("update"):
            clipped = self.engine.update()
        self.bad_batches.remember(batch, loss_sum)
        # Looking at it makes the host wait for a GPU: only who wants to go on after such a step pays.
        if self.config.train.max_skipped_steps and bool(clipped.skipped):
            self._skip()
        else:
            window.add(loss_sum, clipped, *counts)

    def _skip(self) -> None:
        """Count a step that left the parameters of all ranks as they were; too many end training."""
        step, count, limit = self.progress.step + 1, self.progress.skipped + 1, self.config.train.max_skipped_steps
        self.progress = replace(self.progress, skipped=count)
        self.bad_batches.keep_first()
        self._note(f"step {step:,} changed nothing, its gradient is not finite: {count} of train.max_skipped_steps={limit}")
        if count > limit:
            raise DivergenceError(
                f"train.max_skipped_steps={limit}: the gradient of step {step:,} is not finite, {count} steps by now; "
                f"{BAD_BATCHES} names the batches, and the last checkpoint is sound"
            )

    def _forward(self, micro: MicroBatch) -> torch.Tensor:
        try:
            loss: torch.Tensor = self.engine(self.objective.loss, micro, self.progress.step)
        except LrurecError as error:  # a batch of ours is sound, so it is the parameters that ran away
            self.bad_batches.keep_first()
            raise DivergenceError(
                f"loss is nan before step {self.progress.step + 1}, train.learning_rate={self.config.train.learning_rate:g}: {error}; "
                "lower the rate, or resume from the last checkpoint"
            ) from error
        return loss

    def _training_counts(self) -> torch.Tensor:
        """Of what trains, each rank its own shards: the catalogue's counts know the held-out interactions too."""
        mine = training_counts(self.validation_shards, self.order.split, self.dataset.num_items)
        return collectives.all_reduce_sum(torch.from_numpy(mine).to(self.device))

    def _report_window(self, window: Window) -> None:
        totals = window.totals()
        step, loss = self.progress.step, totals["loss_sum"] / max(1.0, totals["num_targets"])
        rate, skipped_steps = self.config.train.learning_rate, round(totals["skipped_steps"])
        if not math.isfinite(loss) or 0 < skipped_steps == window.steps:
            self.bad_batches.keep_first()
            what = f"loss is {loss}" if not math.isfinite(loss) else f"no gradient is finite, loss is {loss:.4f}"
            raise DivergenceError(
                f"{what} within {window.steps} steps before step {step}, train.learning_rate={rate:g}; "
                "lower the rate, or resume from the last checkpoint"
            )
        self.bad_batches.forget()
        self.progress = replace(self.progress, seconds=self.progress.seconds + window.seconds)
        norm = window.gradient_norm.item()
        self._write(
            "train",
            step=step,
            epoch=self.progress.epoch,
            loss=loss,
            learning_rate=self.learning_rate(step - 1),
            gradient_norm=norm if math.isfinite(norm) else None,  # JSON has no word for it
            skipped_steps=skipped_steps,
            targets_per_s=totals["num_targets"] / window.seconds,
            padded_per_real=totals["padded"] / max(1.0, totals["real"]),
            padding_share=1 - totals["real"] / max(1.0, totals["padded"]),
            **{name: value for name, value in totals.items() if name.endswith("_share")},
            seconds_left=self._time_left(window),
            **{"best_recall@10": max(self.progress.best_recall, 0.0)},
        )

    def _time_left(self, window: Window) -> float:
        options = self.config.train
        left = (options.max_steps - self.progress.step) * window.seconds / max(1, window.steps)
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

    def _whole_model(self) -> LRURec:
        """What ranks users: the model itself, or a whole copy where the ranks hold parts of it."""
        if self.config.train.zero_stage < 3:
            return self.engine.model
        whole = new_model(self.config, self.dataset.num_items, self.device)
        whole.load_state_dict(self.engine.parameters())
        return whole

    def _validate(self) -> dict[str, float]:
        """Rank the validation targets, keep the checkpoint, and say how it went."""
        started = told = time.perf_counter()
        model, options = self._whole_model(), self.config.evaluate
        protocol = RankingProtocol(
            split=self.order.split,
            part="validation",
            max_length=self.config.batch.max_length,
            batch_size=options.batch_size,
            exclude_history=options.exclude_history,
            deepest=max(options.ks),
            product_dtype=getattr(torch, options.precision),
            list_k=options.list_k if self.config.train.validate_lists else 0,
        )
        model.eval()
        counts = RankCounts(protocol.deepest)
        listed = torch.zeros(self.dataset.num_items + 1, dtype=torch.bool, device=self.device) if protocol.list_k else None
        for done, of_shard in enumerate(rank_shards(model, self.validation_shards, protocol, listed), start=1):
            counts.counts += of_shard.counts
            if time.perf_counter() - told >= RANKING_REPORT_S:
                told = time.perf_counter()
                self._write("ranking", step=self.progress.step, shards_done=done, shards=len(self.validation_shards))
        model.train()
        counts.counts = collectives.all_reduce_sum(counts.counts.to(self.device)).cpu()
        metrics = counts.metrics(options.ks)
        if listed is not None:
            on_some_list = collectives.all_reduce_sum(listed[1:].int()).count_nonzero().item()
            metrics[f"coverage@{protocol.list_k}"] = on_some_list / self.dataset.num_items
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
        self.progress = replace(self.progress, updates=self.engine.updates)
        carried = self.carried.pieces() if self.carried else ()
        self.checkpoints.save(itertools.chain(self.engine.pieces(), carried), self.progress, validation)
