"""An evaluation as plain values, for `metrics.json`, tables and reports."""

import math
from typing import Any

from lrurec_dist.evaluate.bootstrap import Interval, ReplicateSums
from lrurec_dist.evaluate.metrics import MEAN_RANK
from lrurec_dist.evaluate.ranks import MODEL, Paired
from lrurec_dist.evaluate.segments import in_order
from lrurec_dist.evaluate.shard_evaluation import Evaluation


def summarise(evaluation: Evaluation, num_items: int) -> dict[str, Any]:
    """All figures of an evaluation; an interval is {"value", "low", "high"}, with null ends where there are no replicates.

    `models`: in the order of tables. `metrics`: by model and metric. `differences`: the model minus each baseline, paired, with
    `beyond_noise`, whether 0 lies outside the interval. `segments`: likewise by model and metric for each group.
    """
    sums, baselines = evaluation.metrics, evaluation.models[1:]
    return {
        "models": list(evaluation.models),
        "users": evaluation.users,
        "unseen_targets": evaluation.unseen_targets,
        "unknown_targets": evaluation.unknown_targets,
        "trained_targets": evaluation.trained_targets,
        "new_users": evaluation.new_users,
        "without_history": evaluation.without_history,
        "metrics": {model: _plain(sums.intervals(f"{model}/")) for model in evaluation.models},
        "differences": {baseline: differences(sums, f"{MODEL}/", f"{baseline}/") for baseline in baselines},
        "lists": evaluation.lists.metrics(num_items, evaluation.interactions) if evaluation.lists else {},
        "reliability": evaluation.lists.reliability() if evaluation.lists else [],
        "segments": [
            {
                "scheme": scheme,
                "segment": segment,
                "users": of_segment.users,
                "metrics": {model: _plain(of_segment.intervals(f"{model}/")) for model in evaluation.models},
            }
            for (scheme, segment), of_segment in in_order(evaluation.segments)
        ],
    }


def summarise_pair(paired: Paired) -> dict[str, Any]:
    """All figures of two evaluations side by side; `differences` are the later one's minus the earlier one's."""
    return {
        "users": paired.sums.users,
        "users_with_another_target": paired.others,
        "now": _plain(paired.sums.intervals("now/")),
        "before": _plain(paired.sums.intervals("before/")),
        "differences": differences(paired.sums, "now/", "before/"),
        "segments": [
            {"scheme": scheme, "segment": segment, "users": sums.users, "differences": differences(sums, "now/", "before/")}
            for (scheme, segment), sums in in_order(paired.segments)
        ],
    }


def differences(sums: ReplicateSums, first: str, second: str) -> dict[str, dict[str, Any]]:
    """For each metric the paired difference between the names that begin with `first` and with `second`."""
    names = [name.removeprefix(first) for name in sums.names if name.startswith(first)]
    found = {name: sums.interval(f"{first}{name}", minus=f"{second}{name}") for name in names}
    return {name: {**plain(interval), "beyond_noise": interval.is_zero_outside} for name, interval in found.items()}


def plain(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON has it."""
    return {name: None if math.isnan(value) else value for name, value in interval._asdict().items()}


def values_of(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """The values alone of metrics with k, as `metrics_table` takes them."""
    return {name: interval["value"] for name, interval in metrics.items() if name != MEAN_RANK}


def _plain(intervals: dict[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {name: plain(interval) for name, interval in intervals.items()}
