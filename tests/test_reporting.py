"""What people and schedulers read."""

import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lrurec_dist import reporting, storage
from lrurec_dist.errors import ConfigError, DataNotReadyError, DataQualityError
from lrurec_dist.reporting import (
    MetricsFile,
    Status,
    describe,
    exit_code_of,
    format_duration,
    format_table,
    metrics_table,
    progress_of,
)
from tests.processes import on_a_terminal
from tests.stores import Faults


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
    with MetricsFile(url).followed(10, poll_s=0.01):
        MetricsFile(url).write("note", text="first")
        assert printed.get(timeout=60) == "train: first", "a record is printed while the run goes on"
        MetricsFile(url).write("note", text="second")
    assert printed.get_nowait() == "train: second"
    assert printed.empty()


def test_lines_of_several_threads_are_all_kept_where_appending_rewrites_the_file(faulty: tuple[str, Faults]) -> None:
    url, _ = faulty
    file = MetricsFile(f"{url}/metrics.jsonl")
    threads = [threading.Thread(target=lambda: [file.write("note", text="x") for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(file.read()) == 80


def test_a_checkpoint_line_says_what_was_written_and_how_long_training_stood_still() -> None:
    record = {"kind": "checkpoint", "step": 1500, "bytes": 12_340_000, "write_s": 2.04, "snapshot_s": 0.25, "waited_s": 1.5}
    assert describe(record) == "train: checkpoint at step 1,500: 12.3 MB written in 2.0 s; training stood still for 1.75 s"


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


THREE_STAGES = """
from lrurec_dist.reporting import end_progress, progress_of, say
progress = progress_of("prepare", every_s=0.0)
for done in range(4):
    progress("read", done, 3, "parts", f"{done * 1000:,} rows")
say("a line in between")
for done in range(2):
    progress("merged", done, 3, "shards")
    say(f"merged: so far {done}")
end_progress()
say("the end")
"""


def test_on_a_terminal_a_bar_shows_rate_share_and_time_left_and_leaves_nothing_behind() -> None:
    status, text, screen = on_a_terminal([sys.executable, "-c", THREE_STAGES])
    assert status == 0
    for expected in (r"prepare: read:   0%\|", r"prepare: read: 100%\|.*\| 3/3 \[\d\d:\d\d<00:00, .* parts/s, 3,000 rows\]"):
        assert re.search(expected, text), text
    assert re.search(r"prepare: merged:  33%\|.*\| 1/3 \[", text), "a bar goes on below the lines that are said"
    assert screen == ["a line in between", "merged: so far 0", "merged: so far 1", "the end", ""]


def test_elsewhere_progress_is_plain_lines() -> None:
    run = subprocess.run([sys.executable, "-c", THREE_STAGES], capture_output=True, text=True, check=True, timeout=120)
    assert run.stderr == ""
    assert run.stdout.splitlines() == [
        "prepare: read 0 of 3 parts, 0 rows",
        "prepare: read 1 of 3 parts, 1,000 rows",
        "prepare: read 2 of 3 parts, 2,000 rows",
        "prepare: read 3 of 3 parts, 3,000 rows",
        "a line in between",
        "prepare: merged 0 of 3 shards",
        "merged: so far 0",
        "prepare: merged 1 of 3 shards",
        "merged: so far 1",
        "the end",
    ]


def test_a_bar_is_shown_where_only_the_errors_go_to_a_terminal(tmp_path: Path) -> None:
    command = ["sh", "-c", f"{sys.executable} -c '{THREE_STAGES}' > {tmp_path}/out"]
    status, text, screen = on_a_terminal(command)
    assert (status, "prepare: read: 100%|" in text, screen) == (0, True, [""])
    assert (tmp_path / "out").read_text().splitlines() == ["a line in between", "merged: so far 0", "merged: so far 1", "the end"]


def test_progress_lines_come_every_so_many_seconds_and_no_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = [100.0]
    monkeypatch.setattr(reporting, "say", said.append)
    monkeypatch.setattr(reporting, "terminal", lambda: None)
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    progress = progress_of("prepare")
    for done in range(25):
        progress("merged", done, 25, "shards")
        now[0] += 1
    assert said == ["prepare: merged 10 of 25 shards", "prepare: merged 20 of 25 shards"]


FOLLOWED = """
from lrurec_dist.reporting import MetricsFile
train = {"epoch": 0, "loss": 5.0, "targets_per_s": 9.0, "best_recall@10": 0.25, "seconds_left": 9.0}
validation = {"recall@10": 0.5, "ndcg@10": 0.25, "is_best": True, "users": 3, "seconds": 1.0}
file = MetricsFile("{path}")
with file.followed(20, poll_s=0.01):
    file.write("train", step=10, **train)
    file.write("ranking", step=10, shards_done=2, shards=4)
    file.write("validation", step=10, **validation)
    file.write("train", step=15, **train)
"""


def test_training_is_a_bar_of_steps_on_a_terminal_and_lines_elsewhere(tmp_path: Path) -> None:
    _, text, screen = on_a_terminal([sys.executable, "-c", FOLLOWED.replace("{path}", f"{tmp_path}/terminal.jsonl")])
    assert re.search(r"train: trained:  50%\|.*\| 10/20 \[.*loss 5.0000, recall@10 0.2500\]", text), text
    assert re.search(r"train: ranked:  50%\|.*\| 2/4 \[", text), text
    assert re.search(r"train: trained:  75%\|.*\| 15/20 \[", text), text
    assert "ranked" not in text.partition("train: validation at")[2], "the ranking's bar goes with the ranking"
    (line, empty) = screen
    assert (line.startswith("train: validation at step 10: recall@10 0.5000"), empty) == (True, "")
    command = [sys.executable, "-c", FOLLOWED.replace("{path}", f"{tmp_path}/pipe.jsonl")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    assert [re.split("  (?=epoch|ndcg)", line)[0] for line in lines] == [
        "train: step     10",
        "train: validating at step 10: ranked 2 of 4 shards",
        "train: validation at step 10: recall@10 0.5000",
        "train: step     15",
    ]


def test_a_training_line_names_the_two_largest_shares_of_the_time() -> None:
    shares = {"waiting_share": 0.04, "forward_share": 0.31, "backward_share": 0.5, "update_share": 0.15, "padding_share": 0.9}
    record = {
        "kind": "train",
        "step": 5,
        "epoch": 0,
        "loss": 1.0,
        "targets_per_s": 1.0,
        "seconds_left": 1.0,
        "best_recall@10": 0.0,
    }
    assert "1 targets/s (backward 50%, forward 31%)  recall" in describe({**record, **shares})
    assert "1 targets/s  recall" in describe(record), "of an earlier version"
