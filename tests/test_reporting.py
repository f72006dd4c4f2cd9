"""What people and schedulers read."""

import queue
from pathlib import Path

import pytest

from lrurec_dist import reporting, storage
from lrurec_dist.errors import ConfigError, DataNotReadyError, DataQualityError
from lrurec_dist.reporting import MetricsFile, Status, describe, exit_code_of, format_duration, format_table, metrics_table


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 30),
        (DataNotReadyError("x"), 20),
        (DataQualityError("x"), 21),
        (ValueError("x"), 70),
        (KeyboardInterrupt(), 70),
    ],
)
def test_every_error_has_its_documented_exit_code(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code


def test_status_keeps_finished_stages_over_attempts(tmp_path: Path) -> None:
    first = Status(str(tmp_path))
    first.running("prepare")
    first.commit("prepare", "inputs-1", {"dataset": "there"})
    first.failed(DataQualityError("too dirty"))
    written = storage.read_json(str(tmp_path / "status.json"))
    assert (written["result"], written["stage"], written["exit_code"]) == ("failed", "prepare", 21)
    assert written["error"] == "DataQualityError: too dirty"

    second = Status(str(tmp_path))
    assert second.committed("prepare", "inputs-1") == {"dataset": "there"}
    assert second.committed("prepare", "inputs-2") is None
    assert second.committed("train", "inputs-1") is None
    second.done(bundle="here")
    written = storage.read_json(str(tmp_path / "status.json"))
    assert (written["result"], written["exit_code"], written["bundle"]) == ("done", 0, "here")
    assert "error" not in written


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3599, "59 min 59 s"), (12_000, "3 h 20 min")]
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_tables_align_names_left_and_numbers_right() -> None:
    assert format_table(["name", "count"], [["a", 1234567], ["long name", 0.5]]).splitlines() == [
        "name           count",
        "---------  ---------",
        "a          1,234,567",
        "long name    0.50000",
    ]


def test_the_metrics_table_shows_every_model_under_every_k() -> None:
    metrics = {f"{name}@{k}": k / 100 for name in ("recall", "ndcg", "mrr") for k in (1, 10)}
    table = metrics_table({"LRURec": metrics, "popularity": metrics}, [1, 10])
    assert table.count("LRURec") == table.count("popularity") == 3
    assert table.count("0.10000") == 6


def test_followed_records_are_printed_in_order_and_old_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(reporting, "say", printed.put)
    url = str(tmp_path / "metrics.jsonl")
    MetricsFile(url).write("note", text="from an earlier attempt")
    with MetricsFile(url).followed(poll_s=0.01):
        MetricsFile(url).write("note", text="first")
        assert printed.get(timeout=60) == "train: first", "a record is printed while the run goes on"
        MetricsFile(url).write("note", text="second")
    assert printed.get_nowait() == "train: second"
    assert printed.empty()


def test_a_progress_line_names_step_loss_rate_recall_and_time_left() -> None:
    record = {
        "kind": "train",
        "step": 50,
        "epoch": 2,
        "loss": 5.29918,
        "targets_per_s": 14357.2,
        "best_recall@10": 0.12345,
        "seconds_left": 100,
    }
    line = describe(record)
    for fact in ("50", "loss 5.2992", "14,357 targets/s", "recall@10 0.1235", "1 min 40 s left"):
        assert fact in line
