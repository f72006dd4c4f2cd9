"""The jobs as a user runs them: real processes, real exit codes, real outputs."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrurec_dist import stages
from lrurec_dist.config_file import load_config, with_absolute_paths
from lrurec_dist.data.synthetic import build_synthetic_log
from lrurec_dist.serve import bundle
from lrurec_dist.serve.recommender import Recommender
from tests.processes import on_a_terminal

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "synthetic.users=300",
    "synthetic.items=100",
    "dataset.shards=2",
    "model.dim=16",
    "model.hidden=16",
    "train.max_steps=40",
    "train.validate_every=20",
    "train.report_every=20",
    "train.learning_rate=0.01",
)

SECONDS = [rf"seconds, {stage} +[0-9.]+" for stage in ("read", "number", "merge", "commit", "all")]


def run_job(name: str, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd="/", env=environment, check=False)


def read_status(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "status.json").read_text()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One whole run of the main job, from the embedded default log to the bundle."""
    run = tmp_path_factory.mktemp("job") / "run"
    (run.parent / "titles.csv").write_text("item_key,title\nitem-00001,The first\n")
    return run, run_job("train", f"run_dir={run}", f"bundle.titles={run.parent}/*.csv", *SMALL)


def test_the_main_job_ends_with_metrics_bundle_and_recommendations(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, job = finished
    assert job.returncode == 0, job.stdout + job.stderr
    assert re.search(r"^popularity +\d", job.stdout, re.M)
    assert re.search(r"^LRURec, step \d+ +\d", job.stdout, re.M)
    assert len(re.findall(r"^recommend: after ", job.stdout, re.M)) == 3
    status = read_status(run)
    assert (status["result"], status["exit_code"]) == ("done", 0)
    bundle = re.search(r"^bundle: (/.+)$", job.stdout, re.M)
    assert bundle is not None
    assert status["bundle"] == bundle[1]
    recommender = Recommender.load(bundle[1])
    assert recommender.item_keys.title_of("item-00001") == "The first"
    assert len(recommender.recommend(["item-00001"], k=5)) == 5
    assert "synthetic" in (run / "config.yaml").read_text()
    assert (run / "metrics.jsonl").read_text().count('"kind": "validation"') == 2
    assert re.findall(r"^(\w+): split leave_last_out; (audited.*), nothing", job.stdout, re.M) == [
        ("prepare", "audited"),
        ("train", "audited before"),
        ("evaluate", "audited before"),
    ]
    tables = re.findall(r"^split .*?^test without history +0$", job.stdout, re.M | re.S)
    assert len(tables) == 4
    assert tables[0] == tables[1] == tables[2], "the last one is of the other split"
    assert [path.suffix for path in (run / "dataset" / "audits").iterdir()] == [".json", ".json"]
    assert [path.name for path in sorted((run / "evaluation").iterdir())] == ["global_time", "leave_last_out"]
    assert re.search(r"^recall@10  markov +0\.\d+ +0\.\d+ +0\.\d+ +-?0\.\d+ .* (yes|no)$", job.stdout, re.M)
    assert re.search(rf"^evaluate: {run}/report.html$", job.stdout, re.M)
    assert "LRURec, step" in (run / "report.html").read_text()


def test_the_trained_model_beats_popularity_clearly(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, _ = finished
    outputs = read_status(run)["stages"]["evaluate"]["outputs"]  # type: ignore[index]
    assert outputs["users"] == 300
    assert outputs["model"]["recall@10"] > 2 * outputs["popularity"]["recall@10"] > 0


def test_a_second_run_skips_every_stage_and_says_so(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, first = finished
    again = run_job("train", f"run_dir={run}", f"bundle.titles={run.parent}/*.csv", *SMALL)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [line.split(":")[0] for line in again.stdout.splitlines() if "skipped" in line] == ["prepare", "train", "evaluate"]
    assert re.findall(r"^bundle: /.*", again.stdout, re.M) == re.findall(r"^bundle: /.*", first.stdout, re.M)


def test_the_evaluation_job_prints_the_same_table_alone(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, first = finished
    status = read_status(run)
    del status["stages"]["evaluate"]  # type: ignore[attr-defined]
    (run / "status.json").write_text(json.dumps(status))
    job = run_job("evaluate", f"run_dir={run}", *SMALL, "train.workers=1")
    assert job.returncode == 0, job.stdout + job.stderr
    rows = re.findall(r"^(?:LRURec|popularity).*$", job.stdout, re.M)
    assert rows == re.findall(r"^(?:LRURec|popularity).*$", first.stdout, re.M)


def test_a_run_directory_of_another_configuration_is_refused(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, _ = finished
    before = read_status(run)
    job = run_job("train", f"run_dir={run}", *SMALL, "model.dropout=0.7")
    assert job.returncode == 30
    assert "model.dropout=0.1 -> 0.7" in job.stdout
    assert "choose another run_dir" in job.stdout
    assert read_status(run) == before, "the other run's truth is left alone"


def test_the_preparation_job_reads_a_log_of_the_users_own(tmp_path: Path) -> None:
    log = build_synthetic_log(users=50, items=20, mean_length=6, seed=1).rename_columns(["who", "what", "when"])
    pq.write_table(log, tmp_path / "log.parquet")
    run = tmp_path / "run"
    columns = ["log.user_column=who", "log.item_column=what", "log.timestamp_column=when"]
    job = run_job("prepare", f"run_dir={run}", f"log.path={tmp_path / 'log.parquet'}", *columns)
    assert job.returncode == 0, job.stdout + job.stderr
    assert re.search(rf"^interactions +{log.num_rows}$", job.stdout, re.M)
    assert read_status(run)["result"] == "done"
    assert not (run / "checkpoints").exists()
    read = (tmp_path / "log.parquet").stat().st_size
    written = sum(path.stat().st_size for path in (run / "dataset").rglob("*.parquet"))
    for figure in (f"bytes read +{read:,}", f"bytes written +{written:,}", *SECONDS, "length, percentile 50 +[0-9]+"):
        assert re.search(rf"^{figure}$", job.stdout, re.M), figure


def test_a_job_on_a_terminal_shows_bars_and_one_without_does_not(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), *SMALL]
    status, text, screen = on_a_terminal([*command, f"run_dir={tmp_path / 'terminal'}"])
    assert status == 0, text
    for work, units in (("read", "1/1"), ("merged", "2/2"), ("audited", "2/2")):
        assert re.search(rf"prepare: {work}: 100%\|█+\| {units} \[\d\d:\d\d<00:00", text), text
    job = run_job("prepare", f"run_dir={tmp_path / 'pipe'}", *SMALL)
    assert "\r" not in job.stdout + job.stderr
    assert "%|" not in job.stdout + job.stderr
    lines = [re.sub(r"[\d.,]+ rows/s|/terminal|/pipe|^seconds.*", "", line) for line in screen]
    assert lines[:-2] == [re.sub(r"[\d.,]+ rows/s|/terminal|/pipe|^seconds.*", "", line) for line in job.stdout.splitlines()][:-1]


@pytest.mark.parametrize(
    ("name", "arguments", "code", "message"),
    [
        ("train", ["train.max_step=5"], 30, "the nearest known one is train.max_steps"),
        ("train", ["/no/such/config.yaml"], 20, "/no/such/config.yaml does not exist"),
        ("prepare", ["log.path=/no/such/log.parquet"], 20, "log.path=/no/such/log.parquet: no file there"),
        ("prepare", ["log.path={log}", "log.item_column=itm"], 21, "log.item_column=itm"),
        ("evaluate", [], 20, "run jobs/prepare.py first"),
        ("publish", [], 20, "has no bundle; run jobs/train.py first"),
    ],
)
def test_a_bad_start_ends_with_one_clear_line_and_its_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    log = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": [1], "item_id": [1], "timestamp": [1]}), log)
    job = ROOT / "jobs" / f"{name}.py"
    monkeypatch.setattr(
        sys, "argv", [str(job), *(argument.format(log=log) for argument in arguments), f"run_dir={tmp_path / 'run'}"]
    )
    monkeypatch.chdir("/")
    with pytest.raises(SystemExit) as ended:  # as a process would, without the seconds that starting one takes
        runpy.run_path(str(job), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == code
    assert message in said.out.splitlines()[-1]
    assert "Traceback" not in said.out + said.err
    if (tmp_path / "run" / "status.json").exists():
        assert read_status(tmp_path / "run")["exit_code"] == code


def test_a_run_that_newer_code_goes_on_with_keeps_its_bundle_until_there_is_news_in_it(
    finished: tuple[Path, subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished
    settings = [f"run_dir={run}", f"bundle.titles={run.parent}/*.csv", *SMALL]
    config = with_absolute_paths(load_config(str(ROOT / "configs" / "quickstart.yaml"), settings))
    monkeypatch.setattr(bundle, "git_revision", lambda: "newer")
    before = os.listdir(run / "registry" / "versions")
    stages.run(config, ["bundle"])
    assert os.listdir(run / "registry" / "versions") == before
    (run.parent / "titles.csv").write_text("item_key,title\nitem-00001,Another name\n")
    stages.run(config, ["bundle"])
    assert len(os.listdir(run / "registry" / "versions")) == len(before) + 1
