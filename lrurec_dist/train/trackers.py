"""Trackers of experiments, chosen by name: what `metrics.jsonl` holds, where people look at curves."""

import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lrurec_dist import storage
from lrurec_dist.errors import ConfigError

_EXTRAS = ("mlflow", "wandb")  # of this package; the others come with it
_Scalars = Callable[[dict[str, float], int], None]


class Trackers:
    """Every number of a record to each tracker, as `<kind>/<name>` at its step.

    Args:
        run_url: TensorBoard's event files lie below it, in `tensorboard`; the others call the run by it.
        names: of `tensorboard`, `mlflow`, `wandb`, `ray`; where the middle two keep runs, their own environment variables
            say, and `ray` is the cluster's metrics export, from which Prometheus reads `ray_lrurec_<kind>_<name>`.
        settings: the run's configuration, for those that keep one.
        note: told of a tracker that failed; the others go on, and so does training.

    Raises:
        ConfigError: a tracker's package is not installed.
    """

    def __init__(
        self, run_url: str, names: Sequence[str], settings: Mapping[str, Any], note: Callable[[str], None] = lambda _: None
    ) -> None:
        self._open: dict[str, tuple[_Scalars, Callable[[], object]]] = {}
        self._note = note
        for name in names:
            try:
                self._open[name] = _OPEN[name](run_url, settings)
            except ImportError as error:
                missing = error.name or name
                ours = missing.split(".")[0] == name and name in _EXTRAS
                wanted = f"'lrurec-dist[{name}]'" if ours else missing  # or what its store needs
                raise ConfigError(
                    f"train.track={name}: {missing} is not installed; pip install {wanted}, or leave {name} out"
                ) from None

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
        for name, (write, _) in list(self._open.items()):
            with self._left_out_if_it_fails(name):
                write(numbers, step)

    def close(self) -> None:
        """Write what is still buffered."""
        for name, (_, close) in list(self._open.items()):
            with self._left_out_if_it_fails(name):
                close()

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a service of somebody else's: its curves are not worth a training
            traceback.print_exc()  # into the worker's own log; the text may hold what does not belong into records
            del self._open[name]
            self._note(f"train.track={name}: gets no more numbers, since it failed ({type(error).__name__})")


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
