"""Settings of the data plane: the log, the dataset made of it, its split, its batches."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lrurec_dist.errors import ConfigError


def require(holds: bool, setting: str, value: object, rule: str) -> None:
    """Refuse a setting that does not keep its rule.

    Raises:
        ConfigError: it does not.
    """
    if not holds:
        raise ConfigError(f"{setting}={value}: {rule}")


def require_custom(setting: str, resources: Mapping[str, float], instead: str) -> None:
    """Refuse resources that are Ray's own, and amounts that Ray cannot reserve; `instead` says how its own are asked for.

    Raises:
        ConfigError: there are some.
    """
    own = sorted({"CPU", "GPU", "memory", "object_store_memory"} & resources.keys())
    require(not own, setting, resources, f"{', '.join(own)} is Ray's own; {instead}")
    wrong = {name: amount for name, amount in resources.items() if not 0 < amount < math.inf or (amount > 1 and amount % 1)}
    require(not wrong, setting, wrong, "an amount is positive, and above 1 a whole number; e.g. {data_node: 0.01}")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the interaction log is and how to read it."""

    path: str = ""  # file, directory, glob, or several with commas between; any fsspec URL; empty: a synthetic log
    # auto: by file name, and a directory with _delta_log is a Delta table. Of an Iceberg table path is namespace.table in
    # the catalogue that pyiceberg's own settings describe, or the URL of its metadata file.
    format: Literal["auto", "parquet", "csv", "jsonl", "delta", "iceberg"] = "auto"
    snapshot: str = ""  # version of a Delta table or snapshot id of an Iceberg table; empty: the newest
    partition_column: str = "date"  # of Hive directories, e.g. events/date=2026-11-20/part-0.parquet, or of a table
    from_partition: str = ""  # first partition to read, compared as text; empty: from the first one on
    to_partition: str = ""  # first partition not to read any more; empty: to the last one
    user_column: str = "user_id"
    item_column: str = "item_id"
    timestamp_column: str = "timestamp"
    timestamp_unit: Literal["s", "ms", "us", "ns", "position"] = "s"  # of integers; Arrow timestamps know theirs
    keep: list[str] = field(default_factory=list)  # conditions, all of which a row satisfies: "event == click", "price > 0"
    since: str = ""  # first time to read: ISO 8601, or an integer in timestamp_unit; empty: all
    until: str = ""  # first time not to read any more
    # Rows before the one, or from the other on, are rejected as late and future, into quarantine; of the files read now, so
    # that each night may have its own. Written like log.since; empty: none.
    min_time: str = ""
    max_time: str = ""
    max_key_bytes: int = 256  # longer user and item keys are rejected
    duplicates: Literal["drop", "keep"] = "drop"  # of a row with the same user, item and timestamp
    # Of a user's events with an item, those at most so long after the last one that was kept are duplicates too: a
    # button pressed twice. Seconds, or positions; 0: the same time alone.
    duplicate_tolerance: float = 0.0
    max_user_events: int = 0  # of a user with more after duplicates are gone, a crawler perhaps; 0: no limit
    users_above_cap: Literal["capped", "quarantined"] = "capped"  # the latest so many are kept, or nothing, in quarantine/
    max_rejected_share: float = 0.01  # of all rows; above it the job stops

    def __post_init__(self) -> None:
        require(0 <= self.max_rejected_share <= 1, "log.max_rejected_share", self.max_rejected_share, "is a share, from 0 to 1")
        names = [self.user_column, self.item_column, self.timestamp_column]
        require(len(set(names)) == 3, "log.*_column", names, "user, item and timestamp are three different columns")
        require(self.max_key_bytes >= 1, "log.max_key_bytes", self.max_key_bytes, "needs at least 1")
        require(self.max_user_events >= 0, "log.max_user_events", self.max_user_events, "cannot be negative; 0 is no limit")
        require(
            re.fullmatch(r"\d*", self.snapshot) is not None,
            "log.snapshot",
            self.snapshot,
            "is no number; give a Delta version or an Iceberg snapshot id",
        )
        require(
            not self.snapshot or self.format in ("auto", "delta", "iceberg"),
            "log.snapshot",
            self.snapshot,
            f"means nothing to log.format={self.format}; leave it empty, or set log.format=delta or log.format=iceberg",
        )
        is_table = self.format in ("delta", "iceberg")
        require(not is_table or bool(self.path), "log.path", repr(self.path), f"log.format={self.format} needs a table")
        require(not is_table or "," not in self.path, "log.path", self.path, "a table stands alone; prepare several apart")
        require(
            0 <= self.duplicate_tolerance < math.inf,
            "log.duplicate_tolerance",
            self.duplicate_tolerance,
            "has to be 0 or positive and finite",
        )
        require(
            self.duplicate_tolerance == 0 or self.duplicates == "drop",
            "log.duplicate_tolerance",
            self.duplicate_tolerance,
            "contradicts log.duplicates=keep; set log.duplicates=drop, or leave it at 0",
        )
        require(
            self.users_above_cap == "capped" or self.max_user_events > 0,
            "log.users_above_cap",
            self.users_above_cap,
            "needs a cap; set log.max_user_events, e.g. 50000",
        )
        no_range = self.to_partition and self.from_partition >= self.to_partition
        require(
            not no_range, "log.to_partition", self.to_partition, f"has to come after log.from_partition={self.from_partition}"
        )


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The log that is generated when `log.path` is empty."""

    users: int = 3000
    items: int = 600
    mean_length: int = 24  # events per user
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.users >= 1, "synthetic.users", self.users, "needs at least 1")
        require(self.items >= 16, "synthetic.items", self.items, "needs at least 16, or there is nothing to learn")
        require(self.mean_length >= 4, "synthetic.mean_length", self.mean_length, "needs 4, or few users can be evaluated")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """The prepared dataset."""

    dir: str = ""  # empty: <run_dir>/dataset; give a place of its own to share it between runs
    parent: str = ""  # an earlier dataset: what it has is merged with the files it has not seen; item ids are kept
    rebuild: bool = False  # True: read the whole log again, and take only the item ids from the parent
    # Of a dataset without parent: by first time, or the most frequent first. Later nights append by first time.
    first_ids: Literal["appearance", "count"] = "appearance"
    shards: int = 0  # files that users are hashed into; 0: as the parent, or one for each 64 MB of the log and 8 at least
    deleted_users: str = ""  # file of user keys, one a line, of whom nothing is kept
    deleted_items: str = ""  # file of item keys; their ids stay reserved
    drop_repeats: bool = False  # True: of one item several times in a row the first interaction stays
    min_item_count: int = 0  # interactions an item needs to be in the catalogue
    min_user_events: int = 0  # interactions of such items that a user needs
    k_core: Literal["once", "until_stable"] = "once"  # once: items, then users; until_stable: until both hold
    # What a Ray task over the log or over sequences reserves besides its CPUs, by name: nodes started with such a resource
    # are the ones that work on data, e.g. {data_node: 0.01}
    resources: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.shards >= 0, "dataset.shards", self.shards, "cannot be negative; 0 follows from the size of the log")
        for name in ("min_item_count", "min_user_events"):
            require(getattr(self, name) >= 0, f"dataset.{name}", getattr(self, name), "cannot be negative; 0 filters nothing")
        require(not self.rebuild or bool(self.parent), "dataset.rebuild", self.rebuild, "is about dataset.parent, which is empty")
        require_custom("dataset.resources", self.resources, "data tasks reserve their CPUs themselves")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How sequences become training batches."""

    global_batch_size: int = 128  # windows per optimizer step, all ranks together
    tokens: int = 0  # above 0: windows of similar length, windows x longest at most this, instead of global_batch_size
    max_length: int = 50  # interactions per window
    # sliding: overlapping, so that long histories lose no target; carried: from a history's start on, each going on from the
    # state in which the one before it ended, so that a model learns from all of it: global_batch_size users side by side
    windows: Literal["paper", "sliding", "carried"] = "paper"
    stride: int = 0  # sliding: targets of each window but a sequence's earliest, which predicts all it has
    first_item_is_target: bool = True  # predict a window's first item from padding, as the paper does
    shards_mixed: int = 64  # sequence shards shuffled together and held in memory by whoever cuts batches
    feed: Literal["auto", "local", "ray"] = "auto"  # local: each rank cuts its batches; ray: Ray Data tasks do, anywhere

    def __post_init__(self) -> None:
        require(self.global_batch_size >= 1, "batch.global_batch_size", self.global_batch_size, "needs at least 1")
        require(self.max_length >= 2, "batch.max_length", self.max_length, "next-item targets need at least 2")
        require(self.shards_mixed >= 1, "batch.shards_mixed", self.shards_mixed, "needs at least 1")
        require(self.tokens >= 0, "batch.tokens", self.tokens, "cannot be negative; 0 takes global_batch_size windows")
        require(
            self.windows != "sliding" or 1 <= self.stride <= self.max_length,
            "batch.stride",
            self.stride,
            f"batch.windows=sliding needs a stride from 1 to batch.max_length={self.max_length}, e.g. {self.max_length // 2}",
        )
        require(
            self.windows == "sliding" or self.stride == 0,
            "batch.stride",
            self.stride,
            f"means nothing to batch.windows={self.windows}; set batch.windows=sliding, or leave it at 0",
        )
        require(
            self.windows != "carried" or self.tokens == 0,
            "batch.tokens",
            self.tokens,
            "means nothing to batch.windows=carried, whose batches are a window of each of batch.global_batch_size users; leave it at 0",
        )


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """What trains, validates and tests."""

    kind: Literal["leave_last_out", "global_time"] = "leave_last_out"  # each user's last items; or one moment for everybody
    # Where training and validation end, for global_time: an integer in the log's unit, microseconds or position; a
    # time, 2026-11-20 or 2026-11-20T06:00:00Z; or how much of the log's end is cut off: 2d, 12h, 30m, 10%.
    train_until: str = ""
    test_from: str = ""

    def __post_init__(self) -> None:
        for name in ("train_until", "test_from"):
            value = getattr(self, name)
            if self.kind == "leave_last_out":
                require(
                    value == "", f"split.{name}", value, "means nothing to split.kind=leave_last_out; set split.kind=global_time"
                )
            else:
                require(
                    re.fullmatch(r"-?\d+|\d+(\.\d+)?[dhm%]|\d{4}-\d\d-\d\d.*", value) is not None,
                    f"split.{name}",
                    repr(value),
                    "is no time; split.kind=global_time needs one, such as 2d, 12h, 10%, 2026-11-20 or microseconds",
                )
