"""The nightly job as a scheduler runs it: real processes, killed ones too, on a log with a partition a day."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.nights import DAYS, TINY, partition, write_log
from tests.test_jobs import ROOT, run_job

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKE0001",
    "AWS_SECRET_ACCESS_KEY": "fake-secret-key-7f3a91c0",
    "AWS_SESSION_TOKEN": "fake-session-token-55e2",
    "AZURE_STORAGE_ACCOUNT_KEY": "fake-account-key-91ab",
    "WANDB_API_KEY": "fake-wandb-key-07cd",
}
PASSWORD = "fake-password-3e8d"  # noqa: S105


def settings(place: Path, day: str, *overrides: str) -> list[str]:
    return [f"log.path={place}/log", f"night.root={place}/root", *TINY, f"night.date={day}", *overrides]


def job_until(line: str, *arguments: str, timeout_s: float = 240) -> str:
    """Run the nightly job and kill it with all its processes, as `kill -9` does, when it says a line; what it said."""
    command = [sys.executable, str(ROOT / "jobs" / "nightly.py"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )

    def kill() -> None:
        os.killpg(process.pid, signal.SIGKILL)

    deadline = threading.Timer(timeout_s, kill)
    deadline.start()
    said = ""
    try:
        assert process.stdout is not None
        while line not in said.rpartition("\n")[0][-2000:]:
            more = process.stdout.readline()
            assert more, f"ended before it said {line!r}: {said[-3000:]}"
            said += more
    finally:
        deadline.cancel()
        kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    return said


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def champion(place: Path) -> str:
    return str(read(place / "root/registry/channels/champion.json")["version"])


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two nights in one command, in an environment with credentials."""
    place = tmp_path_factory.mktemp("nights")
    write_log(place / "log")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        extra = (f"night.from_date={DAYS[0]}", "night.states=true", "night.recommend=true", "recommend.k=5")
        return place, run_job("nightly", *settings(place, DAYS[1], *extra), timeout_s=600)


def test_two_nights_follow_each_other_from_partitions_to_what_serves(nights):
    place, job = nights
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    first, second = (read(place / "root/nights" / day / "lineage.json") for day in DAYS[:2])
    assert [first["result"], second["result"]] == ["done", "done"]
    assert second["parent"] == first["dataset"]["url"]
    assert second["previous"] == f"{place}/root/nights/{DAYS[0]}"
    assert list(second["partitions"]) == [DAYS[1]]
    fresh, rows = partition(place / "log", DAYS[1]), second["dataset"]["rows_read"]
    read_of = {
        "files": 1,
        "bytes": fresh.stat().st_size,
        "rows_read": rows,
        "events": rows,
        "rows_rejected": {},
        "rows_filtered": 0,
    }
    assert second["partitions"][DAYS[1]] == read_of
    assert rows == pq.ParquetFile(fresh).metadata.num_rows > 0
    assert second["checkpoint"].startswith(f"{place}/root/nights/{DAYS[1]}/checkpoints/")
    assert (second["serving"], second["decision"]["promoted"]) == (second["bundle"]["version"], True)
    assert champion(place) == second["bundle"]["version"] != first["bundle"]["version"]
    assert second["evaluation"]["beside_previous"]["users"] > 100, "the gate compared it with yesterday's on the same users"
    assert set(second["seconds"]) == {"prepare", "train", "evaluate", "bundle", "publish", "states", "recommend"}
    metrics = (place / "root/nights" / DAYS[1] / "metrics.jsonl").read_text()
    by = {(record["run"], record["night"], record["stage"], record["rank"]) for record in map(json.loads, metrics.splitlines())}
    run = f"{place}/root/nights/{DAYS[1]}"
    assert by == {(run, DAYS[1], "train", 0), *((run, DAYS[1], stage, None) for stage in second["seconds"])}
    assert f"warm start from {place}/root/nights/{DAYS[0]}/checkpoints/" in metrics
    status = read(place / "root/status.json")
    assert (status["result"], status["exit_code"], status["night"]) == ("done", 0, DAYS[1])
    table = run_job("status", f"{place}/root").stdout.splitlines()
    assert [line.split()[:2] for line in table[2:]] == [[day, "done"] for day in DAYS[:2]]
    assert table[3].split()[-1] == second["serving"]


def test_a_night_that_is_done_is_left_alone_and_said_to_be(nights):
    place, _ = nights
    before = {path: path.stat().st_mtime_ns for path in (place / "root/nights").rglob("*")}
    job = run_job("nightly", *settings(place, DAYS[1]))
    assert job.returncode == 0
    assert f"night {DAYS[1]}: done already, {place}/root/nights/{DAYS[1]}; nothing to do" in job.stdout
    assert {path: path.stat().st_mtime_ns for path in (place / "root/nights").rglob("*")} == before


def test_no_file_and_no_line_of_a_run_has_a_credential(nights):
    place, job = nights
    refused = run_job("nightly", *settings(place, DAYS[2], f"bundle.registry=s3://key:{PASSWORD}@bucket/registry"))
    assert refused.returncode == 30
    assert "a URL holds no credentials" in refused.stdout
    files = [path for path in (place / "root").rglob("*") if path.is_file()]
    assert len(files) > 50
    texts = {str(path): path.read_bytes() for path in files}
    texts["output"] = (job.stdout + job.stderr + refused.stdout + refused.stderr).encode()
    for secret in (*SECRETS.values(), PASSWORD):
        assert [name for name, text in texts.items() if secret.encode() in text] == []


@pytest.mark.faults
def test_a_night_killed_in_training_and_refused_by_the_gate_leaves_yesterday_serving_and_is_published_later(nights):
    place, _ = nights
    yesterday = champion(place)
    job_until("train: step", *settings(place, DAYS[2]))
    assert read(place / "root/nights" / DAYS[2] / "status.json")["result"] == "running"
    refused = run_job("nightly", *settings(place, DAYS[2], "publish.floors={recall@10: 0.999}"), timeout_s=600)
    assert refused.returncode == 10, refused.stdout[-3000:] + refused.stderr[-3000:]
    assert "was silent for 2 s; taking over" in refused.stdout
    assert "prepare: skipped" in refused.stdout
    status = read(place / "root/status.json")
    assert (status["result"], status["exit_code"], champion(place)) == ("failed", 10, yesterday)
    assert read(place / "root/nights" / DAYS[2] / "lineage.json")["result"] == "refused"
    assert re.search(rf"^{DAYS[2]} +refused .* {yesterday}$", run_job("status", f"{place}/root").stdout, re.M)
    again = run_job("nightly", *settings(place, DAYS[2]), timeout_s=600)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "train: skipped" in again.stdout
    assert champion(place) == read(place / "root/nights" / DAYS[2] / "lineage.json")["bundle"]["version"] != yesterday
