"""A bundle as a server meets it: loaded by a process of its own, asked its golden requests, timed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import lrurec_dist
from lrurec_dist.errors import LrurecError
from lrurec_dist.serve.bundle import load_bundle
from lrurec_dist.serve.recommender import Recommender

_REQUESTS = 100  # timed, one after the other
_WARM_UP = 5
_QUANTILE = 0.95
_K = 10


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a fresh process found. `error` is empty if every golden request was answered as by the trained model."""

    requests: int = 0
    difference: float | None = None  # largest of a score
    load_s: float | None = None
    latency_ms: float | None = None  # that 95 % of single requests do not exceed
    error: str = ""


def replay_in_fresh_process(url: str, timeout_s: float) -> Replay:
    """Load the bundle at `url` in a new process of this interpreter and let it answer; a failure is in `error`."""
    package = str(Path(lrurec_dist.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "lrurec_dist.serve.replay", url]
    try:
        process = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=timeout_s, check=False, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return Replay(error=f"not loaded and answered within publish.load_timeout_s={timeout_s:g}")
    if process.returncode != 0:
        last = (process.stderr.strip() or "no message").splitlines()[-1]
        return Replay(error=f"a fresh process ended with {process.returncode}: {last}")
    return Replay(**json.loads(process.stdout.splitlines()[-1]))


def replay(url: str) -> Replay:
    """Load the bundle at `url`, compare its answers to the golden requests, and time single ones.

    Raises:
        BundleError: it cannot be loaded, or answers otherwise than the trained model.
    """
    begin = time.perf_counter()
    bundle = load_bundle(url)
    recommender = Recommender(bundle)
    difference = recommender.check_golden()
    load_s = time.perf_counter() - begin
    histories, seconds = bundle.golden.histories, []
    for number in range(_WARM_UP + _REQUESTS):
        begin = time.perf_counter()
        recommender.recommend(histories[number % len(histories)], k=_K)
        seconds.append(time.perf_counter() - begin)
    latency_s = float(np.quantile(seconds[_WARM_UP:], _QUANTILE))
    return Replay(requests=len(histories), difference=difference, load_s=load_s, latency_ms=1000 * latency_s)


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(replay(sys.argv[1]))))
    except LrurecError as error:
        sys.exit(f"{type(error).__name__}: {error}")
