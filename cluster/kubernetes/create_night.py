"""Create the RayJob of a night and wait for its end: what the CronJob of nightly.yaml runs, in the cluster.

    python create_night.py rayjob.yaml                 the date is in JOB_NAME
    python create_night.py rayjob.yaml 2026-11-20      another one

A RayJob of that date that is there already is waited for, so this may be killed and started again. Status 0: the night
succeeded; 3: it failed, or was deleted; anything else: it is not known, try again.
"""

import datetime
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

FAILED = 3
POLL_S = 30.0
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

Call = Callable[[str, str, object], tuple[int, dict[str, Any]]]


def date_of(job_name: str) -> str:
    """The date in the name of a Job, ISO 8601.

    Kubernetes ends the names of a CronJob's Jobs with the time they were due, in minutes since 1970; who makes one by
    hand ends it with the date: `kubectl create job --from=cronjob/lrurec-nightly lrurec-nightly-2026-11-20`.
    """
    if found := re.search(r"-(\d{4}-\d\d-\d\d)$", job_name):
        return datetime.date.fromisoformat(found[1]).isoformat()
    if found := re.search(r"-(\d{7,})$", job_name):
        return datetime.datetime.fromtimestamp(int(found[1]) * 60, datetime.UTC).date().isoformat()
    sys.exit(f"JOB_NAME={job_name}: ends neither with a date nor with minutes since 1970; give the date as an argument")


def night_of(template: str, date: str) -> dict[str, Any]:
    """The RayJob of a date: the template with DATE replaced."""
    night: dict[str, Any] = yaml.safe_load(template.replace("DATE", date))
    return night


def api_server(url: str, account: Path) -> Call:
    """Requests to a Kubernetes API server as the service account whose token and certificate lie in `account`."""
    context = ssl.create_default_context(cafile=account / "ca.crt") if url.startswith("https:") else None

    def call(method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        token = (account / "token").read_text()  # anew each time: Kubernetes replaces it every hour
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, headers, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:  # noqa: S310
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, {"message": error.read().decode(errors="replace")}

    return call


def run_night(night: dict[str, Any], call: Call, poll_s: float = POLL_S) -> int:
    """Create a RayJob unless it is there, and wait; returns the exit status."""
    name, jobs = night["metadata"]["name"], f"/apis/ray.io/v1/namespaces/{night['metadata']['namespace']}/rayjobs"
    code, answer = call("POST", jobs, night)
    if code not in (201, 409):
        sys.exit(f"{name}: the API server answers {code}: {answer.get('message')}")
    print(f"{name}: {'created' if code == 201 else 'is there already'}", flush=True)
    said = ""
    while True:
        try:
            code, answer = call("GET", f"{jobs}/{name}", None)
        except OSError as error:  # the API server restarts; the night goes on
            print(f"{name}: {error}", flush=True)
            code, answer = 0, {}
        if code == 404:
            print(f"{name}: was deleted", flush=True)
            return FAILED
        status = answer.get("status", {})
        state, result = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
        if f"{state} {result}" != said and code == 200:
            said = f"{state} {result}"
            print(f"{name}: {state or 'waiting for the operator'} {result} {status.get('message', '')}".rstrip(), flush=True)
        if state in ("Complete", "Failed", "ValidationFailed"):
            return 0 if result == "SUCCEEDED" else FAILED
        time.sleep(poll_s)


if __name__ == "__main__":
    date = sys.argv[2] if len(sys.argv) > 2 else date_of(os.environ["JOB_NAME"])
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    sys.exit(run_night(night_of(Path(sys.argv[1]).read_text(), date), api_server(url, ACCOUNT)))
