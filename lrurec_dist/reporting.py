"""What a person or a scheduler reads about a run: lines, tables, `metrics.jsonl`, `status.json`."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lrurec_dist import storage
from lrurec_dist.errors import EXIT_DONE, LrurecError, TryAgainError

METRICS = "metrics.jsonl"  # below the run directory


def say(line: str) -> None:
    """Print one line at once, whatever buffers stand between the process and the reader."""
    print(line, file=sys.stdout, flush=True)


def now_and_then(stage: str, every_s: float = 10.0) -> Callable[[str], None]:
    """A function that says `<stage>: <line>`, but not more often than every so many seconds."""
    last = time.monotonic()

    def progress(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            say(f"{stage}: {line}")

    return progress


def format_duration(seconds: float) -> str:
    """Seconds as `45 s`, `12 min 05 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain-text table: first column left-aligned, the others right-aligned."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def metrics_table(rows: Mapping[str, Mapping[str, float]], ks: Sequence[int]) -> str:
    """A table per metric: one line per model, one column per k, from maps such as {"recall@10": 0.2}."""
    return "\n\n".join(
        format_table(
            [metric, *(f"@{k}" for k in ks)], [[model, *(values[f"{metric}@{k}"] for k in ks)] for model, values in rows.items()]
        )
        for metric in ("recall", "ndcg", "mrr")
    )


class Status:
    """`<run>/status.json`, the truth about a run: its stage, its result, its exit code.

    Stages are committed here with the fingerprint of their inputs; `stages` maps each finished one
    to its inputs and outputs. Written whole at every change, so that a kill leaves the last truth.
    """

    def __init__(self, run_url: str) -> None:
        self._url = storage.join(run_url, "status.json")
        before = storage.read_json(self._url) if storage.exists(self._url) else {}
        self.stages: dict[str, dict[str, Any]] = before.get("stages", {})
        self._facts: dict[str, Any] = {}
        self._started = time.time()

    def running(self, stage: str) -> None:
        """Say that `stage` has begun."""
        self._write(result="running", stage=stage)

    def committed(self, stage: str, inputs: str) -> dict[str, Any] | None:
        """The outputs of `stage` if it was finished for these inputs."""
        done = self.stages.get(stage)
        return done["outputs"] if done and done["inputs"] == inputs else None

    def commit(self, stage: str, inputs: str, outputs: dict[str, Any]) -> None:
        """Record that `stage` finished for these inputs."""
        self.stages[stage] = {"inputs": inputs, "outputs": outputs}
        self._write(result="running", stage=stage)

    def done(self, **facts: Any) -> None:
        """Record success."""
        self._write(result="done", stage="done", exit_code=EXIT_DONE, **facts)

    def failed(self, error: BaseException) -> None:
        """Record a failure and the exit code that belongs to it."""
        self._write(result="failed", exit_code=exit_code_of(error), error=f"{type(error).__name__}: {error}")

    def _write(self, **facts: Any) -> None:
        self._facts = {
            **self._facts,
            **facts,
            "stages": self.stages,
            "started": self._started,
            "updated": time.time(),
        }
        storage.write_json(self._url, self._facts)


def exit_code_of(error: BaseException) -> int:
    """The documented exit code for an error."""
    return error.exit_code if isinstance(error, LrurecError) else LrurecError.exit_code


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, with its `kind` and the time it was written.

    The one account of a run's progress: workers write it, the driver prints it, readers plot it.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def write(self, kind: str, **values: Any) -> None:
        """Append one line."""
        storage.append_line(self._url, json.dumps({"kind": kind, **values, "time": round(time.time(), 3)}))

    def read(self) -> list[dict[str, Any]]:
        """Every whole line so far."""
        if not storage.exists(self._url):
            return []
        return [json.loads(line) for line in storage.read_bytes(self._url).decode().split("\n")[:-1]]

    @contextmanager
    def followed(self, poll_s: float = 1.0) -> Iterator[None]:
        """Print what others write while the context is open, and all of it before it closes."""
        seen = len(self.read())
        closing = threading.Event()

        def follow() -> None:
            nonlocal seen
            while True:
                last_round = closing.wait(poll_s)
                try:
                    records = self.read()
                except (OSError, TryAgainError):  # storage hiccup: the records stay where they are, the next round reads them
                    records = []
                for record in records[seen:]:
                    say(describe(record))
                seen = max(seen, len(records))
                if last_round:
                    return

        thread = threading.Thread(target=follow, name="metrics-follower", daemon=True)
        thread.start()
        try:
            yield
        finally:
            closing.set()
            thread.join()


def describe(record: Mapping[str, Any]) -> str:
    """One line a person can read for one record of `metrics.jsonl`."""
    match record["kind"]:
        case "train":
            return (
                f"train: step {record['step']:>6,}  epoch {record['epoch']:>3}  loss {record['loss']:.4f}  "
                f"{record['targets_per_s']:,.0f} targets/s  recall@10 {record['best_recall@10']:.4f}  "
                f"at most {format_duration(record['seconds_left'])} left"
            )
        case "validation":
            standing = "best so far" if record["is_best"] else f"best was {record['best_recall@10']:.4f}"
            return (
                f"train: validation at step {record['step']:,}: recall@10 {record['recall@10']:.4f}  ndcg@10 {record['ndcg@10']:.4f}  "
                f"{standing}  ({record['users']:,} users, {record['seconds']:.1f} s)"
            )
        case "note":
            return f"train: {record['text']}"
        case kind:
            return f"{kind}: {json.dumps(dict(record))}"
