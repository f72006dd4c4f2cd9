"""Settings of the handoff: the bundle that goes to serving, what it has to pass, and what is made with it."""

import ipaddress
import math
from dataclasses import dataclass, field
from typing import Literal

from lrurec_dist.config_data import require


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """The artefact that goes to serving."""

    registry: str = ""  # empty: <run_dir>/registry
    titles: str = ""  # Parquet or CSV files with item_key and title, for people who read answers
    golden_requests: int = 32  # histories whose answers travel with the bundle
    table_dtype: Literal["float32", "bfloat16", "int8"] = "float32"  # of item rows in the file; loaded they are float32
    exports: list[str] = field(default_factory=list)  # for other runtimes: torch, onnx, vectors, faiss

    def __post_init__(self) -> None:
        require(self.golden_requests >= 1, "bundle.golden_requests", self.golden_requests, "needs at least 1 to check an export")
        unknown = sorted(set(self.exports) - {"torch", "onnx", "vectors", "faiss"})
        require(not unknown, "bundle.exports", self.exports, f"{', '.join(unknown)} is none of torch, onnx, vectors, faiss")


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """What a bundle has to pass before it becomes the registry's champion."""

    metrics: list[str] = field(default_factory=lambda: ["recall@10", "ndcg@10"])  # compared with champion and baselines
    compare_with_champion: bool = True  # False: neither figures nor catalogue are compared, as for a catalogue made anew
    margin: float = 0.01  # the interval of the difference to the champion may reach so far below 0, in units of the metric
    segment_margin: float = 0.02  # so much worse, beyond noise, a segment may be than the champion's
    segment_users: int = 100  # smaller segments are recorded and refuse nothing
    floors: dict[str, float] = field(default_factory=dict)  # least value of a metric, e.g. {"recall@10": 0.05}
    against_baselines: list[str] = field(default_factory=lambda: ["popularity", "recent_popularity"])  # exceeded beyond noise
    min_coverage_share: float = 0.5  # of the champion's coverage@k; 0: not looked at
    max_bundle_gb: float = 50.0  # 10^9 bytes of all its files; 0: no limit
    max_latency_ms: float = 500.0  # of 95 % of single requests to the loaded bundle on this machine; 0: no limit
    load_timeout_s: float = 600.0  # for a fresh process to load the bundle and answer its golden requests
    keep: int = 0  # newest versions that stay after a promotion, besides those in use; 0: all
    mlflow_model: str = ""  # name of a model in an MLflow registry that is told of candidate and champion; empty: none

    def __post_init__(self) -> None:
        unknown = sorted(set(self.metrics) - {"recall@10", "ndcg@10"})
        require(not unknown, "publish.metrics", self.metrics, f"{', '.join(unknown)} is none of recall@10, ndcg@10")
        require(bool(self.metrics), "publish.metrics", self.metrics, "needs at least one of recall@10, ndcg@10")
        baselines = ("popularity", "recent_popularity", "markov", "neighbours")
        unknown = sorted(set(self.against_baselines) - set(baselines))
        require(
            not unknown,
            "publish.against_baselines",
            self.against_baselines,
            f"{', '.join(unknown)} is none of {', '.join(baselines)}",
        )
        for name in ("margin", "segment_margin", "segment_users", "max_bundle_gb", "max_latency_ms", "keep"):
            require(
                0 <= getattr(self, name) < math.inf, f"publish.{name}", getattr(self, name), "has to be 0 or positive and finite"
            )
        require(
            0 <= self.min_coverage_share <= 1, "publish.min_coverage_share", self.min_coverage_share, "is a share, from 0 to 1"
        )
        require(
            0 < self.load_timeout_s < math.inf, "publish.load_timeout_s", self.load_timeout_s, "has to be positive and finite"
        )


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """Lists for the users of the dataset, written by jobs/recommend.py."""

    bundle: str = ""  # empty: the run's
    dir: str = ""  # empty: <run_dir>/recommendations
    users: str = ""  # file of user keys, one a line; empty: all users
    k: int = 100  # items a list
    exclude_history: bool = True  # items of the full history are not recommended

    def __post_init__(self) -> None:
        require(self.k >= 1, "recommend.k", self.k, "needs at least 1")


@dataclass(frozen=True, kw_only=True)
class StatesConfig:
    """States of all users of the dataset, written by jobs/states.py, with which serving starts."""

    bundle: str = ""  # empty: the run's
    dir: str = ""  # empty: <run_dir>/states
    recent_items: int = 500  # ids of a user's last items, which are not recommended; older ones only serving can leave out

    def __post_init__(self) -> None:
        require(self.recent_items >= 0, "states.recent_items", self.recent_items, "cannot be negative; 0 keeps none")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The HTTP service, run by jobs/serve.py."""

    runner: Literal["ray", "process"] = "ray"  # Ray Serve, or uvicorn in the job's own process
    host: str = "127.0.0.1"  # address to listen on; others than this machine's own need a token
    port: int = 8000  # 0: a free one, with serve.runner=process
    replicas: int = 1  # processes that answer; several share their sessions through Redis
    bundle: str = ""  # URL of one bundle for good; empty: the champion of the registry, wherever it goes
    poll_s: float = 10.0  # seconds between two looks at the champion
    token_variable: str = ""  # environment variable with the bearer token that requests need; empty: they need none
    allow_open: bool = False  # listen to other machines without a token
    states: str = ""  # URL of states that jobs/states.py made, to start with
    redis_variable: str = ""  # environment variable with the URL of the Redis for sessions; empty: they stay in the process
    session_days: float = 30.0  # a session in Redis goes so long after its last event
    sessions: int = 100_000  # held in a process; the least recently used goes first. Some 5 KB each
    keep_events: int = 200  # item keys kept with a state, so that another version can make one of its own
    batch_size: int = 64  # requests answered together
    batch_wait_ms: float = 0.0  # the first request of a batch waits so long for others, besides those that come meanwhile
    max_waiting: int = 1024  # requests; more are refused with 503
    max_body_bytes: int = 1 << 20  # of a request; more is refused with 413
    max_events: int = 2000  # item keys in the events of a request
    max_filter: int = 10_000  # item keys in exclude, and in allow
    max_k: int = 200  # items a list

    def __post_init__(self) -> None:
        for name in ("replicas", "sessions", "batch_size", "max_waiting", "max_body_bytes", "max_events", "max_filter", "max_k"):
            require(getattr(self, name) >= 1, f"serve.{name}", getattr(self, name), "needs at least 1")
        for name in ("poll_s", "session_days"):
            require(0 < getattr(self, name) < math.inf, f"serve.{name}", getattr(self, name), "has to be positive and finite")
        require(0 <= self.batch_wait_ms <= 1000, "serve.batch_wait_ms", self.batch_wait_ms, "has to be in 0..1000")
        require(self.keep_events >= 0, "serve.keep_events", self.keep_events, "cannot be negative; 0 keeps none")
        require(0 <= self.port < 1 << 16, "serve.port", self.port, "is no port")
        require(self.port > 0 or self.runner == "process", "serve.port", 0, "is for serve.runner=process; name a port")
        require(
            self.replicas == 1 or (self.runner == "ray" and bool(self.redis_variable)),
            "serve.replicas",
            self.replicas,
            "needs serve.runner=ray, and sessions that all of them see: set serve.redis_variable",
        )
        require(
            _is_loopback(self.host) or bool(self.token_variable) or self.allow_open,
            "serve.host",
            self.host,
            "is reachable for others, who would need no token; set serve.token_variable, or serve.allow_open=true "
            "where something else keeps them out",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
