"""Trackers of experiments, chosen by name: what `metrics.jsonl` holds, where people look at curves."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lrurec_dist import storage
from lrurec_dist.errors import ConfigError

_Scalars = Callable[[dict[str, float], int], None]


class Trackers:
    """Every number of a record to each tracker, as `<kind>/<name>` at its step.

    Args:
        run_url: TensorBoard's event files lie below it, in `tensorboard`; the others call the run by it.
        names: of `tensorboard`, `mlflow`, `wandb`, `ray`; where the middle two keep runs, their own environment variables
            say, and `ray` is the cluster's metrics export, from which Prometheus reads `ray_lrurec_<kind>_<name>`.
        settings: the run's configuration, for those that keep one.

    Raises:
        ConfigError: a tracker's package is not installed.
    """

    def __init__(self, run_url: str, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._write: list[_Scalars] = []
        self._close: list[Callable[[], object]] = []
        for name in names:
            try:
                write, close = _OPEN[name](run_url, settings)
            except ImportError as error:
                missing = error.name or name
                wanted = (
                    f"'lrurec-dist[{name}]'" if missing.split(".")[0] in (name, "torch") else missing
                )  # or what its store needs
                raise ConfigError(
                    f"train.track={name}: {missing} is not installed; pip install {wanted}, or leave {name} out"
                ) from None
            self._write.append(write)
            self._close.append(close)

    def write(self, kind: str, values: Mapping[str, object]) -> None:
        """Pass the numbers of a record on, if it has a step."""
        step = values.get("step")
        if not isinstance(step, int):
            return
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for write in self._write:
            write(numbers, step)

    def close(self) -> None:
        """Write what is still buffered."""
        for close in self._close:
            close()


def _tensorboard(run_url: str, _: Mapping[str, Any]) -> tuple[_Scalars, Callable[[], object]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(storage.join(run_url, "tensorboard"))

    def write(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def _mlflow(run_url: str, settings: Mapping[str, Any]) -> tuple[_Scalars, Callable[[], object]]:
    import mlflow

    mlflow.start_run(run_name=run_url)
    mlflow.log_dict(dict(settings), "config.json")

    def write(numbers: dict[str, float], step: int) -> None:
        mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in numbers.items()}, step=step)

    return write, mlflow.end_run


def _wandb(run_url: str, settings: Mapping[str, Any]) -> tuple[_Scalars, Callable[[], object]]:
    import wandb

    run = wandb.init(name=run_url, config=dict(settings))
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def gauge_name(name: str) -> str:
    """What a number is called in Ray's metrics export; Ray puts `ray_` before it."""
    return "lrurec_" + re.sub(r"\W", "_", name.replace("@", "_at_"))


def _ray(run_url: str, _: Mapping[str, Any]) -> tuple[_Scalars, Callable[[], object]]:
    from ray.util.metrics import Gauge

    gauges: dict[str, Gauge] = {}

    def write(numbers: dict[str, float], step: int) -> None:
        for name, value in {**numbers, "step": step}.items():
            known = gauges.get(name)
            if known is None:
                known = gauges[name] = Gauge(gauge_name(name), description=f"{name} of a training run", tag_keys=("run",))
            known.set(value, tags={"run": run_url})

    return write, gauges.clear


_OPEN: dict[str, Callable[[str, Mapping[str, Any]], tuple[_Scalars, Callable[[], object]]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
    "ray": _ray,
}
