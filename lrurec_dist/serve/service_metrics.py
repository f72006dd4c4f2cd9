"""Figures of the service in the text format of Prometheus; of this process alone."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lrurec_dist.errors import TryAgainError

_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class ServiceMetrics:
    """Counts requests; reads everything else where it is counted, when it is asked for.

    Args:
        paths: that have figures of their own; the others are `other`.
        counters: by name, what it counts and how to read it.
        gauges: likewise; one whose reader raises TryAgainError is left out.
        version: reads the version that serves.
    """

    def __init__(
        self,
        paths: set[str],
        counters: dict[str, tuple[str, Callable[[], float]]],
        gauges: dict[str, tuple[str, Callable[[], float]]],
        version: Callable[[], str],
    ) -> None:
        self._paths, self._counters, self._gauges, self._version = paths, counters, gauges, version
        self._registry = CollectorRegistry()
        self._requests = Counter("lrurec_requests", "Requests by path and status.", ["path", "status"], registry=self._registry)
        self._seconds = Histogram(
            "lrurec_request_seconds", "Seconds from head to answer.", ["path"], buckets=_BUCKETS_S, registry=self._registry
        )
        self._registry.register(self)

    def seen(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        path = path if path in self._paths else "other"
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """What is counted elsewhere, for the registry."""
        for name, (about, read) in self._counters.items():
            yield CounterMetricFamily(f"lrurec_{name}", about, value=read())
        for name, (about, read) in self._gauges.items():
            try:
                yield GaugeMetricFamily(f"lrurec_{name}", about, value=read())
            except TryAgainError:
                continue
        bundle = GaugeMetricFamily("lrurec_bundle", "The version that serves.", labels=["version"])
        bundle.add_metric([self._version()], 1)
        yield bundle

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
