"""Every setting: frozen dataclasses that check their values.

Those of the data plane are in `config_data.py`, those of the handoff in `config_serving.py`, those of nights in
`config_night.py`; `config_file.py` reads and writes all of them. Defaults are the paper's where the paper has one
(arXiv 2310.02367). A number is stated once; what follows from others (DeepSpeed's JSON, directories) is derived where
it is used.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lrurec_dist import storage
from lrurec_dist.config_data import BatchConfig, DatasetConfig, LogConfig, SplitConfig, SyntheticConfig, require, require_custom
from lrurec_dist.config_night import NightConfig
from lrurec_dist.config_serving import BundleConfig, PublishConfig, RecommendConfig, ServeConfig, StatesConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and regularisation of LRURec."""

    dim: int = 64
    hidden: int = 128  # recurrent state size, complex numbers per block
    blocks: int = 2
    dropout: float = 0.2
    ring_min: float = 0.8  # decay moduli start between these two
    ring_max: float = 0.99
    temperature: float = 0.0  # above 0: scores are cosine / temperature + bias, e.g. 0.05
    table: Literal["replicated", "sharded"] = "replicated"  # item rows: all on every worker, or dealt out to the workers

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "blocks"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "needs at least 1")
        require(0 <= self.temperature < math.inf, "model.temperature", self.temperature, "has to be 0 or positive and finite")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "is a probability below 1")
        require(
            0 <= self.ring_min < self.ring_max < 1,
            "model.ring_min, model.ring_max",
            (self.ring_min, self.ring_max),
            "decay moduli need 0 <= ring_min < ring_max < 1, or the recurrence grows without bound",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Softmax over the whole catalogue, or over a sample of it."""

    include_padding_class: bool = False  # True: PAD_ID is one more class of the full softmax, as in the original
    negatives: int = 0  # items sampled per step and shared by all its targets; 0: the whole catalogue
    sampling: Literal["counts", "log_uniform", "uniform"] = "counts"  # probability of a negative; corrected by logQ

    def __post_init__(self) -> None:
        require(self.negatives >= 0, "loss.negatives", self.negatives, "cannot be negative; 0 takes the whole catalogue")
        both = self.negatives and self.include_padding_class
        require(not both, "loss.negatives", self.negatives, "padding is never sampled; set loss.include_padding_class=false")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, its budget, and the processes that do it."""

    workers: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where this machine has it
    cpus_per_worker: float = 0.5  # logical CPUs Ray reserves; the rest is left to data tasks
    resources: dict[str, float] = field(default_factory=dict)  # what a worker reserves besides, e.g. {gpu_node: 1}
    threads_per_worker: int = 0  # torch threads on CPU; 0: this machine's cores / workers
    zero_stage: int = 1  # partitioned over workers: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too
    offload_optimizer: Literal["none", "cpu"] = "none"  # cpu: a GPU's optimizer state lies, and steps, in host memory
    offload_parameters: Literal["none", "cpu"] = "none"  # cpu: partitioned parameters wait in host memory; zero_stage=3
    activation_checkpointing: bool = False  # compute each block again on the way back instead of keeping what it made
    accumulation: int = 1  # micro-batches of a worker's part of a step; they divide memory, and nothing else changes
    deepspeed: dict[str, Any] = field(default_factory=dict)  # more of DeepSpeed's JSON, which is derived otherwise
    precision: Literal["float32", "bfloat16"] = "float32"  # of products; sums, recurrence and parameters stay float32
    learning_rate: float = 1e-3  # the highest one
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after warm-up; the others fall until max_steps
    warmup_steps: int = 0  # steps over which the rate rises linearly to learning_rate
    final_learning_rate_share: float = 0.0  # of learning_rate, at max_steps
    weight_decay: float = 0.01
    decay_recurrence: bool = False  # True: nu, theta and gamma take weight decay, as in the original
    epsilon: float = 1e-9
    table_optimizer: Literal["adamw", "lazy_adam", "rowwise_adagrad"] = "adamw"  # of item rows; the others: model.table=sharded
    clip_norm: float = 5.0
    max_steps: int = 100_000
    max_minutes: float = 0.0  # 0: no limit; otherwise training ends at the next report after so long
    report_every: int = 50  # steps between progress lines
    validate_every: int = 500  # steps between validations
    validate_lists: bool = False  # validations build lists of evaluate.list_k items too, and report their coverage
    patience: int = 10  # validations without a better recall@10 before training ends
    checkpoint_every: int = 0  # steps between checkpoints besides those at validations; 0: none
    keep_checkpoints: int = 2  # the latest so many; and the best
    resume: Literal["auto", "never"] = "auto"  # auto: from the newest whole checkpoint of an unfinished run
    warm_start: str = ""  # run directory or checkpoint to take parameters from, whose catalogue the dataset's extends
    warm_start_moments: bool = True  # False: without the optimizer's moments
    new_item_vectors: str = ""  # Parquet of item_key, vector: rows that items new to a warm start begin with
    max_failures: int = 3  # losses of workers without a new checkpoint in between that training survives
    min_workers: int = 0  # go on with so few when the cluster cannot give all; 0: only with all of train.workers
    wait_for_workers_s: float = 300.0  # how long to wait for all of train.workers, before each attempt
    collective_timeout_s: float = 600.0  # a rank that others wait for so long, or that is silent so long, is hung
    max_skipped_steps: int = 0  # updates without a finite gradient that are left out before training stops
    # Who gets the numbers of metrics.jsonl too: tensorboard, mlflow, wandb; under Ray its metrics export, ray, always does.
    track: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        counts = ("workers", "accumulation", "max_steps", "report_every", "validate_every", "patience", "keep_checkpoints")
        for name in counts:
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "needs at least 1")
        for name in ("learning_rate", "epsilon", "clip_norm", "cpus_per_worker", "collective_timeout_s"):
            require(0 < getattr(self, name) < math.inf, f"train.{name}", getattr(self, name), "has to be positive and finite")
        limits = ("max_failures", "min_workers", "wait_for_workers_s", "max_skipped_steps")
        for name in ("weight_decay", "max_minutes", "threads_per_worker", "warmup_steps", "checkpoint_every", *limits):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "cannot be negative")
        require(
            not self.new_item_vectors or bool(self.warm_start),
            "train.new_item_vectors",
            self.new_item_vectors,
            "needs train.warm_start: without one every item is new; set it, or leave this empty",
        )
        require_custom("train.resources", self.resources, "set train.cpus_per_worker, train.device")
        require(self.min_workers <= self.workers, "train.min_workers", self.min_workers, f"exceeds train.workers={self.workers}")
        require(self.zero_stage in (0, 1, 2, 3), "train.zero_stage", self.zero_stage, "has to be 0, 1, 2 or 3")
        for name, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
            require(
                getattr(self, name) == "none" or self.zero_stage >= least,
                f"train.{name}",
                getattr(self, name),
                f"needs train.zero_stage={least} or higher, not {self.zero_stage}; set that, or none",
            )
        require(
            self.warmup_steps <= self.max_steps,
            "train.warmup_steps",
            self.warmup_steps,
            f"exceeds train.max_steps={self.max_steps}: the rate would never reach train.learning_rate",
        )
        require(
            0 <= self.final_learning_rate_share <= 1,
            "train.final_learning_rate_share",
            self.final_learning_rate_share,
            "is a share, from 0 to 1",
        )
        unknown = sorted(set(self.track) - {"tensorboard", "mlflow", "wandb", "ray"})
        require(not unknown, "train.track", self.track, f"{', '.join(unknown)} is none of tensorboard, mlflow, wandb, ray")
        require(
            self.validate_every <= self.max_steps,
            "train.validate_every",
            self.validate_every,
            f"exceeds train.max_steps={self.max_steps}: no checkpoint would ever be chosen; "
            f"set train.validate_every={self.max_steps} or lower",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Exact ranking of the full catalogue."""

    ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 50])
    exclude_history: bool = True  # the paper's protocol: items in the history are no candidates
    batch_size: int = 256  # users ranked together
    precision: Literal["float32", "bfloat16"] = "float32"  # that factors of scores are rounded to; sums stay float32
    bootstrap: int = 1000  # replicates over users, from which 95 % intervals come; 0: no intervals
    list_k: int = 10  # length of the lists whose coverage, popularity and novelty are measured; 0: none, nor calibration
    both_splits: bool = True  # a log with times is evaluated by the other kind of split too
    model: str = ""  # checkpoint or bundle to evaluate; empty: the run's best checkpoint
    previous: str = ""  # run directory to compare with on the users of both; empty: that of train.warm_start; none: none

    def __post_init__(self) -> None:
        for name in ("bootstrap", "list_k"):
            require(getattr(self, name) >= 0, f"evaluate.{name}", getattr(self, name), "cannot be negative; 0 makes none")
        require(bool(self.ks) and min(self.ks) >= 1, "evaluate.ks", self.ks, "needs at least one k, each at least 1")
        require(10 in self.ks, "evaluate.ks", self.ks, "has to contain 10: recall@10 chooses the checkpoint")
        require(self.batch_size >= 1, "evaluate.batch_size", self.batch_size, "needs at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, from log to bundle."""

    run_dir: str = "runs/quickstart"
    seed: int = 0
    log: LogConfig = field(default_factory=LogConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    bundle: BundleConfig = field(default_factory=BundleConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    recommend: RecommendConfig = field(default_factory=RecommendConfig)
    states: StatesConfig = field(default_factory=StatesConfig)
    night: NightConfig = field(default_factory=NightConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir", repr(self.run_dir), "needs a directory or URL")
        require(self.seed >= 0, "seed", self.seed, "cannot be negative")
        batch, workers = self.batch, self.train.workers
        require(
            batch.tokens > 0 or batch.global_batch_size >= workers,
            "batch.global_batch_size",
            batch.global_batch_size,
            f"is below train.workers={workers}: a rank would never see data; raise the batch or take fewer workers",
        )
        require(
            batch.tokens == 0 or batch.tokens >= workers * batch.max_length,
            "batch.tokens",
            batch.tokens,
            f"is below batch.max_length={batch.max_length} x train.workers={workers}: a rank could see no data; "
            f"raise it to {workers * batch.max_length} or more, or take fewer workers",
        )

        require(
            not self.train.validate_lists or self.evaluate.list_k > 0,
            "train.validate_lists",
            self.train.validate_lists,
            "needs lists, and evaluate.list_k=0 makes none; set evaluate.list_k=10, or train.validate_lists=false",
        )
        self._check_table()

    def _check_table(self) -> None:
        """What a table that is dealt out to the workers cannot be combined with, and what only it can."""
        train, sharded = self.train, self.model.table == "sharded"
        require(
            sharded or train.table_optimizer == "adamw",
            "train.table_optimizer",
            train.table_optimizer,
            "needs model.table=sharded, as DeepSpeed trains a replicated table with AdamW; set that, or adamw",
        )
        require(
            not sharded or train.zero_stage < 3,
            "train.zero_stage",
            train.zero_stage,
            "partitions parameters, and model.table=sharded has spread the item rows already; set train.zero_stage=2 or lower, "
            "or model.table=replicated",
        )
        require(
            not sharded or train.offload_optimizer == "none",
            "train.offload_optimizer",
            train.offload_optimizer,
            "does not reach a sharded table, whose state stays with its rows; set none, or model.table=replicated",
        )

    @property
    def dataset_url(self) -> str:
        """Where the prepared dataset lies."""
        return self.dataset.dir or storage.join(self.run_dir, "dataset")

    @property
    def registry_url(self) -> str:
        """Where bundles are published."""
        return self.bundle.registry or storage.join(self.run_dir, "registry")

    @property
    def recommendations_url(self) -> str:
        """Where lists are written."""
        return self.recommend.dir or storage.join(self.run_dir, "recommendations")

    @property
    def states_url(self) -> str:
        """Where states are written."""
        return self.states.dir or storage.join(self.run_dir, "states")
