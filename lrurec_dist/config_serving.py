"""Settings of the handoff: the bundle that goes to serving, and what is made with it."""

from dataclasses import dataclass

from lrurec_dist.config_data import require


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """The artefact that goes to serving."""

    registry: str = ""  # empty: <run_dir>/registry
    golden_requests: int = 32  # histories whose answers travel with the bundle

    def __post_init__(self) -> None:
        require(self.golden_requests >= 1, "bundle.golden_requests", self.golden_requests, "needs at least 1 to check an export")


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
