"""What the files of nights say about them; nothing else remembers a night.

<root>/nights/<date>/night.json     what the night was begun with
                    /status.json    how far it is, as of any run
                    /lineage.json   what came of it, once it is over: done, or refused by the gate
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lrurec_dist import storage
from lrurec_dist.reporting import METRICS, MetricsFile

NIGHTS, NIGHT, LINEAGE = "nights", "night.json", "lineage.json"
STAGE = "stage"  # kind of a record of a finished or failed stage in metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Night:
    """What a night is begun with, pinned for later attempts. Dates are ISO 8601; an empty text is none."""

    date: str
    partition: str  # the newest one it reads
    parent: str  # dataset that new files are merged into
    parent_partition: str  # the newest one that has
    previous: str  # run directory of the night to start from and to compare with


@dataclass(frozen=True)
class NightRecord:
    """A night that was begun, by its files; each is read once, when it is asked for."""

    date: str
    url: str

    @cached_property
    def night(self) -> Night | None:
        """What it was begun with."""
        values = self._json(NIGHT)
        return Night(**values) if values else None

    @cached_property
    def status(self) -> dict[str, Any]:
        """As `reporting.Status` writes it; empty before the first stage."""
        return self._json("status.json") or {}

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """Empty as long as the night is not over."""
        return self._json(LINEAGE) or {}

    @cached_property
    def dataset(self) -> str:
        """URL of its dataset; empty if it is not committed."""
        url = storage.join(self.url, "dataset")
        return url if storage.is_committed(url) else ""

    @property
    def result(self) -> str:
        """done or refused; failed or stopped with the exit code; running, which a killed one says as well; begun."""
        if self.lineage:
            return str(self.lineage["result"])
        if not self.status:
            return "begun"
        ended = self.status["result"] in ("failed", "stopped")
        return f"{self.status['result']} in {self.status['stage']}" + (f" ({self.status['exit_code']})" if ended else "")

    @property
    def published(self) -> dict[str, Any]:
        """Outputs of its last way through the gate: version, promoted, decision, generation; empty without one."""
        outputs: dict[str, Any] = self.status.get("stages", {}).get("publish", {}).get("outputs", {})
        return outputs

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, of all attempts that ended by themselves."""
        total: dict[str, float] = {}
        for record in MetricsFile(storage.join(self.url, METRICS)).read():
            if record["kind"] == STAGE:
                total[record["stage"]] = round(total.get(record["stage"], 0.0) + record["seconds"], 3)
        return total

    def _json(self, name: str) -> Any:
        url = storage.join(self.url, name)
        return storage.read_json(url) if storage.exists(url) else None


def night_url(root: str, date: str) -> str:
    """Where a night's run directory lies."""
    return storage.join(root, NIGHTS, date)


def read_nights(root: str) -> list[NightRecord]:
    """All nights that were begun, the latest first."""
    names = storage.list_names(storage.join(root, NIGHTS))
    return [NightRecord(name, night_url(root, name)) for name in sorted(names, reverse=True) if not name.startswith(".")]


def before(records: list[NightRecord], date: str) -> Iterator[NightRecord]:
    """Those before a date, the latest first."""
    return (record for record in records if record.date < date)


def pin(root: str, night: Night) -> None:
    """Remember what a night is begun with; as long as it has no dataset, any configuration may begin it."""
    record = NightRecord(night.date, night_url(root, night.date))
    if not record.dataset:
        storage.remove_tree(storage.join(record.url, "config.yaml"))
    storage.write_json(storage.join(record.url, NIGHT), asdict(night))
