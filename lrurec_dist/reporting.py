"""What a person or a scheduler reads about a run: lines, tables, `metrics.jsonl`, `status.json`."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from lrurec_dist import storage
from lrurec_dist.errors import EXIT_DONE, LrurecError, StoppedError, TryAgainError

METRICS = "metrics.jsonl"  # below the run directory


def say(line: str) -> None:
    """Print one line at once, whatever buffers stand between the process and the reader; above the bar if one is shown."""
    with tqdm.external_write_mode() if _bars else nullcontext():
        print(line, file=sys.stdout, flush=True)


class Progress(Protocol):
    """Is told how far a piece of work is."""

    def __call__(self, what: str, done: int, total: int, unit: str, note: str = "", /) -> None:
        """`done` of `total` units are done of what is called `what`; `note` is what else there is to say."""


def silent(what: str, done: int, total: int, unit: str, note: str = "", /) -> None:
    """A `Progress` that shows nobody anything."""


def progress_of(stage: str, every_s: float = 10.0) -> Progress:
    """What shows a person how far a stage is.

    On a terminal that is a bar with rate, share and time left, until all is done, other work is
    told of, or `end_progress` is called; elsewhere a line, but not more often than every so many seconds.
    """
    last = time.monotonic()

    def progress(what: str, done: int, total: int, unit: str, note: str = "", /) -> None:
        nonlocal last
        if terminal() is not None:
            _show(f"{stage}: {what}", done, total, unit, note)
        elif time.monotonic() - last >= every_s:
            last = time.monotonic()
            say(f"{stage}: {what} {done:,} of {total:,} {unit}{note and ', '}{note}")

    return progress


def terminal() -> TextIO | None:
    """The terminal that somebody watches this process on."""
    return next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)


_bars: dict[str, Any] = {}  # the bar that is shown, by what it is about; a terminal has one last line


def _show(title: str, done: int, total: int, unit: str, note: str) -> None:
    if title not in _bars:
        end_progress()
        _bars[title] = tqdm(
            desc=title,
            total=total,
            initial=done,  # what was done before the bar began does not count for its rate
            unit=f" {unit}",
            postfix=note,
            file=terminal(),
            leave=False,
            miniters=1,
            dynamic_ncols=True,
        )
    bar = _bars[title]
    bar.set_postfix_str(note, refresh=False)
    bar.update(done - bar.n)
    if done >= total:
        bar.refresh()
        end_progress()


def end_progress() -> None:
    """Take the bar from the terminal, if there is one."""
    while _bars:
        _bars.popitem()[1].close()


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
    `submission` is the id of the Ray job that wrote it, which `ray job logs` takes; null where nobody submitted one.
    """

    def __init__(self, run_url: str) -> None:
        self._url = storage.join(run_url, "status.json")
        before = storage.read_json(self._url) if storage.exists(self._url) else {}
        self.stages: dict[str, dict[str, Any]] = before.get("stages", {})
        self._facts: dict[str, Any] = {"submission": _submission()}
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
        """Record a failure, or that the job was stopped, and the exit code that belongs to it."""
        result = "stopped" if isinstance(error, StoppedError) else "failed"
        self._write(result=result, exit_code=exit_code_of(error), error=f"{type(error).__name__}: {error}")

    def _write(self, **facts: Any) -> None:
        self._facts = {
            **self._facts,
            **facts,
            "stages": self.stages,
            "started": self._started,
            "updated": time.time(),
        }
        storage.write_json(self._url, self._facts)


def _submission() -> str | None:
    """Ray sets this for the process that a submitted job is, and it names no other way."""
    described = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return json.loads(described)["metadata"]["job_submission_id"] if described else None


def exit_code_of(error: BaseException) -> int:
    """The documented exit code for an error."""
    return error.exit_code if isinstance(error, LrurecError) else LrurecError.exit_code


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, with its `kind` and the time it was written; threads may share it.

    The one account of a run's progress: workers write it, the driver prints it, readers plot it.
    `about` stands in every line that is written through this object: see `run_directory.run_metrics`.
    """

    def __init__(self, url: str, **about: Any) -> None:
        self._url, self._about = url, about
        self._lock = threading.Lock()  # object stores rewrite the file to append to it

    def write(self, kind: str, **values: Any) -> dict[str, Any]:
        """Append one line, and return what it holds."""
        record = {"kind": kind, **self._about, **values, "time": round(time.time(), 3)}
        with self._lock:
            storage.append_line(self._url, json.dumps(record))
        return record

    def read(self) -> list[dict[str, Any]]:
        """Every whole line so far."""
        if not storage.exists(self._url):
            return []
        return [json.loads(line) for line in storage.read_bytes(self._url).decode().split("\n")[:-1]]

    @contextmanager
    def followed(self, max_steps: int, poll_s: float = 1.0) -> Iterator[None]:
        """Print what others write while the context is open, and all of it before it closes.

        On a terminal a bar of `max_steps` steps, and in a long validation one of its shards, stands for the lines about them.
        """
        seen = len(self.read())
        closing = threading.Event()
        progress = progress_of("train")

        def tell(record: Mapping[str, Any]) -> None:
            if terminal() is None or record["kind"] not in ("train", "ranking"):
                if record["kind"] == "validation":
                    end_progress()  # of its ranking
                say(describe(record))
            elif record["kind"] == "train":
                note = f"loss {record['loss']:.4f}, recall@10 {record['best_recall@10']:.4f}"
                progress("trained", record["step"], max_steps, "steps", note)
            else:
                progress("ranked", record["shards_done"], record["shards"], "shards")

        def follow() -> None:
            nonlocal seen
            while True:
                last_round = closing.wait(poll_s)
                try:
                    records = self.read()
                except (OSError, TryAgainError):  # storage hiccup: the records stay where they are, the next round reads them
                    records = []
                for record in records[seen:]:
                    tell(record)
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
            end_progress()


def describe(record: Mapping[str, Any]) -> str:
    """One line a person can read for one record of `metrics.jsonl`."""
    match record["kind"]:
        case "train":
            shares = {name.removesuffix("_share"): record[name] for name in record if name.endswith("_share")}
            shares.pop("padding", None)  # of the positions, not of the time
            largest = ", ".join(f"{name} {shares[name]:.0%}" for name in sorted(shares, key=shares.__getitem__)[:-3:-1])
            return (
                f"train: step {record['step']:>6,}  epoch {record['epoch']:>3}  loss {record['loss']:.4f}  "
                f"{record['targets_per_s']:,.0f} targets/s{largest and f' ({largest})'}  recall@10 {record['best_recall@10']:.4f}  "
                f"at most {format_duration(record['seconds_left'])} left"
            )
        case "validation":
            standing = "best so far" if record["is_best"] else f"best was {record['best_recall@10']:.4f}"
            return (
                f"train: validation at step {record['step']:,}: recall@10 {record['recall@10']:.4f}  ndcg@10 {record['ndcg@10']:.4f}  "
                f"{standing}  ({record['users']:,} users, {record['seconds']:.1f} s)"
            )
        case "ranking":
            return (
                f"train: validating at step {record['step']:,}: ranked {record['shards_done']:,} of {record['shards']:,} shards"
            )
        case "checkpoint":
            return (
                f"train: checkpoint at step {record['step']:,}: {record['bytes'] / 1e6:,.1f} MB written in {record['write_s']:.1f} s; "
                f"training stood still for {record['snapshot_s'] + record['waited_s']:.2f} s"
            )
        case "note":
            return f"train: {record['text']}"
        case "stage":
            return f"night {record['night']}: {record['stage']} {record['result']} in {format_duration(record['seconds'])}"
        case kind:
            return f"{kind}: {json.dumps(dict(record))}"
