"""`report.html` of a run: what its files say, on one page."""

import os
import time
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import to_yaml
from lrurec_dist.data.sequences import LengthHistogram, SequenceDataset
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.report.page import RunFacts, build_page
from lrurec_dist.reporting import METRICS, MetricsFile

REPORT = "report.html"  # below the run directory
_POINTS = 300  # of a curve, at most


def write_report(
    config: Config, dataset: SequenceDataset, model: LRURec, evaluations: Sequence[Mapping[str, Any]], previous: str | None
) -> str:
    """Write the report of a run and return its URL.

    Args:
        config: of the run, whose directory has the records of its training if it trained.
        dataset: that was evaluated on.
        model: that was evaluated.
        evaluations: their figures, the configured split's first.
        previous: the run directory that they are compared with.
    """
    records = MetricsFile(storage.join(config.run_dir, METRICS)).read()
    figures, url = evaluations[0], storage.join(config.run_dir, REPORT)
    manifest = dataset.manifest
    lengths = LengthHistogram.total(dataset.lengths.values())
    counts = dataset.catalogue.table["count"].to_numpy()
    names = ("users", "interactions", "num_items", "new_items", "rows_read", "interactions_of_parent", "users_evaluable")
    about = [
        ("run", config.run_dir),
        ("model", f"{figures['name']}, {figures['model']}"),
        ("dataset", dataset.url),
        ("written", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())),
    ]
    facts = RunFacts(
        title=f"{figures['name']} · {config.run_dir.rstrip('/').rpartition('/')[2]}",
        about=about,
        evaluations=evaluations,
        training=_by_step(records, "train"),
        validation=_by_step(records, "validation"),
        decays=[block.decay().norm(dim=0).tolist() for block, _ in model.layers()],
        lengths=doubling_bars(lengths.lengths, lengths.users),
        popularity=doubling_bars(counts, np.ones_like(counts)),
        data=[(name.replace("_", " "), manifest[name]) for name in names if name in manifest],
        configuration=to_yaml(config),
        previous=None if previous is None else (previous, _link(config.run_dir, storage.join(previous, REPORT))),
    )
    storage.write_bytes(url, build_page(facts).encode())
    return url


def doubling_bars(values: np.ndarray, weights: np.ndarray) -> list[tuple[str, int]]:
    """How much weight lies in 0, 1, 2 to 3, 4 to 7, …, from the first that has any to the last."""
    place = np.where(values > 0, np.floor(np.log2(np.maximum(values, 1))).astype(np.int64) + 1, 0)
    total = np.bincount(place, weights).astype(np.int64)
    labels = ["0", "1", *(f"{1 << index}–{(2 << index) - 1}" for index in range(1, len(total)))]
    first = int(np.argmax(total > 0)) if len(total) else 0
    return list(zip(labels[first : len(total)], total[first:].tolist(), strict=True))


def _by_step(records: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """The records of a kind in the order of their steps, of a step done again the later one; so many at most."""
    steps = {record["step"]: record for record in records if record["kind"] == kind}
    ordered = [steps[step] for step in sorted(steps)]
    return ordered[:: -(-len(ordered) // _POINTS) or 1]


def _link(run_url: str, report: str) -> str | None:
    """How a page in a run directory points to another one's; None where a browser could not follow."""
    if "://" in run_url + report or not storage.exists(report):
        return None
    return urllib.parse.quote(os.path.relpath(report, run_url))
