"""`lineage.json` of a night: from the files it read to the decision about its bundle, in one plain file."""

import time
from typing import Any

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.nightly.plan import registry_of
from lrurec_dist.nightly.records import LINEAGE, NightRecord
from lrurec_dist.serve.channels import CHAMPION, decision_url, read_channel
from lrurec_dist.stage_evaluate import read_figures

SCHEMA_VERSION = 1
METRICS = ("recall@10", "ndcg@10")
_FACTS = (
    "rows_read",
    "rows_rejected",
    "rows_filtered",
    "events_dropped",
    "interactions",
    "users",
    "num_items",
    "new_items",
    "catalogue_fingerprint",
)


def write_lineage(config: Config, record: NightRecord, result: str) -> dict[str, Any]:
    """Write what became of a night that is over, and return it.

    Args:
        config: of the nights; its registry counts.
        record: of the night, read after its last stage.
        result: done or refused.
    """
    night, stages = record.night, record.status["stages"]
    assert night is not None, "a night is pinned before it runs"
    dataset, evaluation = SequenceDataset(record.dataset), stages["evaluate"]["outputs"]
    known = SequenceDataset(night.parent).manifest["inputs"]["sources"] if night.parent else {}
    files = {url: version for url, version in dataset.manifest["inputs"]["sources"].items() if url not in known}
    champion = read_channel(registry_of(config), CHAMPION).pointer
    lineage = {
        "schema_version": SCHEMA_VERSION,
        "date": night.date,
        "result": result,
        "finished": round(time.time(), 3),
        "seconds": record.seconds,
        "parent": night.parent,
        "previous": night.previous,
        "partitions": dataset.manifest.get("partitions", {}),  # which an earlier version did not count
        "files": [{"url": url, "version": version} for url, version in files.items()],
        "dataset": {"url": dataset.url, "identity": dataset.identity, **{name: dataset.manifest[name] for name in _FACTS}},
        "checkpoint": stages["train"]["outputs"]["best"],
        "bundle": stages["bundle"]["outputs"],
        "evaluation": {
            "split": evaluation["split"]["kind"],
            "users": evaluation["users"],
            "model": {name: evaluation["model"][name] for name in METRICS},
            "popularity": {name: evaluation["popularity"][name] for name in METRICS},
            "beside_previous": _beside_previous(config, record, evaluation["split"]["kind"]),
        },
        "decision": record.published,
        "serving": champion.version if champion else "",
        **{stage: stages[stage]["outputs"] for stage in ("states", "recommend") if stage in stages},
    }
    storage.write_json(storage.join(record.url, LINEAGE), lineage)
    return lineage


def _beside_previous(config: Config, record: NightRecord, kind: str) -> dict[str, Any] | None:
    """The model beside the one that served, on the same users: as the gate compared them, else as the evaluation did."""
    compared = None
    if record.published:
        compared = storage.read_json(decision_url(registry_of(config), record.published["decision"])).get("compared")
    compared = compared or read_figures(record.url, kind)["previous"]
    if not compared or not compared["users"]:
        return None
    return {"users": compared["users"], **{name: compared["differences"][name] for name in METRICS}}
