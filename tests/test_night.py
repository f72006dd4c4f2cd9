"""What the schedule runs, against an API server that answers as Kubernetes does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.kubernetes.create_night import FAILED, api_server, date_of, night_of, run_night
from tests.manifests import KUBERNETES

JOBS = "/apis/ray.io/v1/namespaces/lrurec/rayjobs"
TEMPLATE = (KUBERNETES / "rayjob.yaml").read_text()


class Server:
    """Keeps RayJobs; each look at one takes the next of the states it is to go through."""

    def __init__(self, account: Path) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.states: list[dict[str, str] | int] = []
        self.tokens: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = body["metadata"]["name"]
                there = name in outer.jobs
                outer.jobs.setdefault(name, body)
                self._answer(409 if there else 201, {"message": "already exists"} if there else body)

            def do_GET(self) -> None:
                state = outer.states.pop(0)
                if isinstance(state, int):
                    self._answer(state, {"message": "no"})
                else:
                    self._answer(200, {**outer.jobs[self.path.rpartition("/")[2]], "status": state})

            def _answer(self, code: int, body: object) -> None:
                assert self.path.startswith(JOBS)
                outer.tokens.add(self.headers["Authorization"])
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.call = api_server(f"http://127.0.0.1:{self._server.server_port}", account)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "token").write_text("secret")
    made = Server(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("lrurec-nightly-29920320", "2026-11-21"),
        ("lrurec-nightly-29920319", "2026-11-20"),
        ("lrurec-nightly-2026-11-19", "2026-11-19"),
    ],
)
def test_the_date_is_the_one_in_the_name_of_the_job(name: str, date: str) -> None:
    assert date_of(name) == date


@pytest.mark.parametrize("name", ["lrurec-nightly", "lrurec-nightly-x7k2p"])
def test_a_name_without_a_date_is_an_error(name: str) -> None:
    with pytest.raises(SystemExit, match="ends neither with a date"):
        date_of(name)


def test_a_night_is_the_template_with_its_date() -> None:
    night = night_of(TEMPLATE, "2026-11-20")
    assert night["metadata"]["name"] == "lrurec-2026-11-20"
    assert "night.date=2026-11-20 " in night["spec"]["entrypoint"]
    assert "DATE" not in json.dumps(night)


def test_a_night_is_created_and_waited_for(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.states = [
        {},
        {"jobDeploymentStatus": "Initializing"},
        503,
        {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
    ]
    assert run_night(night_of(TEMPLATE, "2026-11-20"), server.call, poll_s=0) == 0
    assert server.jobs["lrurec-2026-11-20"] == night_of(TEMPLATE, "2026-11-20")
    assert server.tokens == {"Bearer secret"}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "lrurec-2026-11-20: created"
    assert said[-1] == "lrurec-2026-11-20: Complete SUCCEEDED"


def test_a_second_pod_waits_for_the_night_that_is_there(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.jobs["lrurec-2026-11-20"] = {"spec": "of the first pod"}
    server.states = [{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    assert run_night(night_of(TEMPLATE, "2026-11-20"), server.call, poll_s=0) == 0
    assert server.jobs == {"lrurec-2026-11-20": {"spec": "of the first pod"}}
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "end",
    [
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
        404,
    ],
)
def test_a_night_that_failed_or_is_gone_has_the_status_that_is_not_tried_again(server: Server, end: dict[str, str] | int) -> None:
    server.states = [{"jobDeploymentStatus": "Running"}, end]
    assert run_night(night_of(TEMPLATE, "2026-11-20"), server.call, poll_s=0) == FAILED


def test_a_night_that_cannot_be_created_says_why() -> None:
    with pytest.raises(SystemExit, match="the API server answers 403: no rights"):
        run_night(night_of(TEMPLATE, "2026-11-20"), lambda *_: (403, {"message": "no rights"}), poll_s=0)
