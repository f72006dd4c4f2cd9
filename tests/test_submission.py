"""A night that is submitted to a running cluster, as `ray job submit` does it: a head, a node for data, one for training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from lrurec_dist.serve.recommender import Recommender
from tests.clusters import ENVIRONMENT, RAY, cluster
from tests.nights import DAYS, TINY, write_log
from tests.test_jobs import ROOT, read_status

NAME = f"night-{DAYS[0]}"


@pytest.mark.timeout(600)
def test_a_submitted_night_runs_on_the_nodes_it_asks_for_and_its_job_and_its_run_find_each_other(tmp_path: Path) -> None:
    root, log = tmp_path / "root", write_log(tmp_path / "log", DAYS[:1])
    run = f"{root}/nights/{DAYS[0]}"
    apart = ["dataset.resources.data_node=0.01", "train.resources.gpu_node=1"]
    night = ["jobs/nightly.py", "configs/quickstart.yaml", *log, f"night.root={root}", f"night.date={DAYS[0]}", *TINY, *apart]
    with cluster(tmp_path) as made:
        made.add_node('--resources={"data_node": 1}')
        made.add_node('--resources={"gpu_node": 1}')
        assert [len(list(temporary.glob("session_2*"))) for temporary in made.temporaries] == [1, 1, 1], "each has its own"
        address = f"http://127.0.0.1:{made.dashboard}"
        environment = {**os.environ, **ENVIRONMENT, "RAY_API_SERVER_ADDRESS": address}
        environment.pop("RAY_ADDRESS", None)

        def job(*arguments: str) -> "subprocess.CompletedProcess[str]":
            command = [RAY, "job", *arguments]
            return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)

        found_by = ["--submission-id", NAME, "--metadata-json", json.dumps({"run": run})]
        done = job("submit", *found_by, "--working-dir", ".", "--", sys.executable, *night)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        logs = job("logs", NAME).stdout
        assert f"night {DAYS[0]}: done, {run}" in logs
        assert "no node has" not in logs
        (details,) = [each for each in JobSubmissionClient(address).list_jobs() if (each.metadata or {}).get("run") == run]
        assert (details.submission_id, details.driver_exit_code) == (NAME, 0)
    for place in (root, Path(run)):
        status = read_status(place)
        assert (status["result"], status["exit_code"], status["submission"]) == ("done", 0, NAME)
    assert Recommender.load(str(read_status(Path(run))["bundle"])).num_items == 80
