"""Settings of nights: which ones there are, what each does, what is kept of them."""

import math
import re
from dataclasses import dataclass
from datetime import date

from lrurec_dist.config_data import require


@dataclass(frozen=True, kw_only=True)
class NightConfig:
    """Nights below one directory, run by jobs/nightly.py."""

    date: str = ""  # of the night to run, e.g. 2026-11-21
    root: str = ""  # directory of all nights; empty: run_dir
    lag_days: int = 0  # a night's newest partition is so many days older than its date: 1 where it runs right after midnight
    partition_format: str = "%Y-%m-%d"  # how partitions spell a date, as for strftime, in quotes; has to sort like dates
    ready_file: str = ""  # a partition can be read once its directory has this file, e.g. _SUCCESS; empty: once it has any
    catch_up: bool = True  # missed nights run first, in order; False: this night takes their partitions, too
    from_date: str = ""  # every unfinished night from this date on runs, in order; empty: only missed ones
    late_days: int = 3  # rows that are older than a night's new days by more are rejected as late; -1: none is
    future_days: int = 1  # rows later by more than so many days than the end of a night's last day are rejected; -1: none is
    warm_start: bool = True  # from the night whose bundle serves; False: from scratch
    warm_steps: int = 0  # of a night with a warm start, instead of train.max_steps; 0: the same
    publish: bool = True  # False: bundles are made and nothing serves them
    states: bool = False  # states of all users, after publishing
    recommend: bool = False  # lists for all users, after publishing
    keep_nights: int = 7  # the latest so many keep datasets, checkpoints and lists; 0: all do
    lease_s: float = 60.0  # a run that was silent for so long is taken for dead, and the next one takes over
    dry_run: bool = False  # True: print what would be done, and change nothing
    cost_per_hour: float = 0.0  # of the cluster, in a currency of your own, for the dry run

    def __post_init__(self) -> None:
        for name in ("date", "from_date"):
            value = getattr(self, name)
            require(not value or _is_date(value), f"night.{name}", value, "is no date; write it as 2026-11-21")
        require(
            not self.from_date or self.from_date <= self.date,
            "night.from_date",
            self.from_date,
            f"is after night.date={self.date}; it is the first night of the range that ends there",
        )
        for name in ("lag_days", "warm_steps", "keep_nights", "cost_per_hour"):
            require(0 <= getattr(self, name) < math.inf, f"night.{name}", getattr(self, name), "has to be 0 or positive")
        for name in ("late_days", "future_days"):
            require(getattr(self, name) >= -1, f"night.{name}", getattr(self, name), "is a number of days, or -1 for no limit")
        require(0 < self.lease_s < math.inf, "night.lease_s", self.lease_s, "has to be positive and finite")
        spelled = [
            date(*day).strftime(self.partition_format) for day in ((2025, 12, 31), (2026, 1, 9), (2026, 1, 10), (2026, 2, 1))
        ]
        require(
            spelled == sorted(set(spelled)),
            "night.partition_format",
            self.partition_format,
            f"spells days {', '.join(spelled)}, which do not sort like dates; partitions are compared as text, take %Y-%m-%d",
        )


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return re.fullmatch(r"\d{4}-\d\d-\d\d", text) is not None
