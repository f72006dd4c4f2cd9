"""The bundle: everything serving needs in one immutable, verified directory that executes nothing.

manifest.json    schema version, every file's size and SHA-256, fingerprints
README.md        model card
config.json      arguments of the model, window length, whether histories are excluded
model.safetensors, catalogue/*.parquet, metrics.json, lineage.json
golden/          requests.jsonl, expected.safetensors: what the trained model answered
"""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lrurec_dist import storage
from lrurec_dist.errors import BundleError
from lrurec_dist.model.lrurec import LRURec

SCHEMA_VERSION = 1
GOLDEN_K = 10


@dataclass(frozen=True)
class GoldenAnswers:
    """Histories with what the trained model answered, before the bundle existed.

    `histories` are item keys, oldest first; `item_ids` (requests, k) int64 and `scores`
    (requests, k) float32 are the best candidates outside each history, padded by 0 and -inf.
    """

    histories: list[list[str | int]]
    item_ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Bundle:
    """A loaded, verified bundle."""

    version: str
    model: LRURec
    item_keys: pa.Array  # of item_id 1, 2, …
    max_length: int
    exclude_history: bool
    golden: GoldenAnswers
    manifest: dict[str, Any]


def save_bundle(
    registry_url: str,
    *,
    date: str,
    model: LRURec,
    model_arguments: dict[str, Any],
    max_length: int,
    exclude_history: bool,
    catalogue: pa.Table,
    catalogue_fingerprint: str,
    golden: GoldenAnswers,
    metrics: dict[str, Any],
    lineage: dict[str, Any],
) -> str:
    """Write a bundle below `registry_url/versions`, manifest last, and return its URL.

    The version is `<date>-<hash of the content>`: the same content gives the same version, and an
    existing one is left as it is.
    """
    weights = save({name: value.contiguous() for name, value in model.state_dict().items()})
    config = {"model": model_arguments, "max_length": max_length, "exclude_history": exclude_history}
    identity = {
        "weights": storage.sha256(weights),
        "config": config,
        "catalogue": catalogue_fingerprint,
        "metrics": metrics,
        "lineage": lineage,
    }
    version = f"{date}-{storage.fingerprint(identity)}"
    url = storage.join(registry_url, "versions", version)
    if storage.is_committed(url):
        return url
    storage.remove_tree(url)
    storage.write_bytes(storage.join(url, "model.safetensors"), weights)
    storage.write_json(storage.join(url, "config.json"), config)
    storage.write_table(storage.join(url, "catalogue", "part-00000.parquet"), catalogue)
    storage.write_json(storage.join(url, "metrics.json"), metrics)
    storage.write_json(storage.join(url, "lineage.json"), lineage)
    storage.write_bytes(
        storage.join(url, "golden", "requests.jsonl"),
        "".join(json.dumps({"history": h}) + "\n" for h in golden.histories).encode(),
    )
    storage.write_bytes(
        storage.join(url, "golden", "expected.safetensors"), save({"item_ids": golden.item_ids, "scores": golden.scores})
    )
    storage.write_bytes(
        storage.join(url, "README.md"), _model_card(version, config, catalogue.num_rows, metrics, lineage).encode()
    )
    storage.commit(
        url,
        {
            "schema_version": SCHEMA_VERSION,
            "version": version,
            "num_items": catalogue.num_rows,
            "catalogue_fingerprint": catalogue_fingerprint,
        },
    )
    return url


def load_bundle(url: str) -> Bundle:
    """Read a bundle after every file was found as committed.

    Raises:
        BundleError: no manifest, a newer schema, a missing or changed file, or contents that do
            not fit together.
    """
    manifest = storage.read_manifest(url, error=BundleError)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{url}: schema_version={manifest.get('schema_version')}, this code reads {SCHEMA_VERSION}; update the one that is older"
        )
    try:
        config = storage.read_json(storage.join(url, "config.json"))
        model = LRURec(**{**config["model"], "dropout": 0.0})
        model.load_state_dict(load(storage.read_bytes(storage.join(url, "model.safetensors"))))
        catalogue = storage.read_table(storage.join(url, "catalogue", "part-00000.parquet"), columns=["item_key"])
        requests = storage.read_bytes(storage.join(url, "golden", "requests.jsonl")).decode().splitlines()
        expected = load(storage.read_bytes(storage.join(url, "golden", "expected.safetensors")))
        golden = GoldenAnswers([json.loads(line)["history"] for line in requests], expected["item_ids"], expected["scores"])
        bundle = Bundle(
            version=str(manifest["version"]),
            model=model.eval().requires_grad_(False),
            item_keys=catalogue["item_key"].combine_chunks(),
            max_length=int(config["max_length"]),
            exclude_history=bool(config["exclude_history"]),
            golden=golden,
            manifest=manifest,
        )
    except (KeyError, TypeError, ValueError, RuntimeError, FileNotFoundError, pa.ArrowException, SafetensorError) as reason:
        raise BundleError(
            f"{url}: contents do not fit together: {type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
        ) from reason
    if len(bundle.item_keys) != model.table.num_items:
        raise BundleError(f"{url}: {len(bundle.item_keys):,} catalogue items, but {model.table.num_items:,} item rows")
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise BundleError(f"{url}: a weight is not finite")
    return bundle


def _model_card(version: str, config: dict[str, Any], num_items: int, metrics: dict[str, Any], lineage: dict[str, Any]) -> str:
    shape = config["model"]
    rows = "".join(f"| {name} | {value:.5f} | {metrics['popularity'][name]:.5f} |\n" for name, value in metrics["model"].items())
    largest = metrics["largest_decay_modulus"]
    return f"""# {version}

LRURec, {shape["blocks"]} blocks, dim {shape["dim"]}, hidden {shape["hidden"]}; {num_items:,} items.
Trained on windows of {config["max_length"]} interactions. The largest decay modulus is {largest:.5f}: of an event
that lies {config["max_length"]} steps back, a state carried without end still holds up to {largest ** config["max_length"]:.2g},
which re-encoding the window does not.

Test figures over {metrics["users"]:,} users, full catalogue, leave-last-out, histories {"excluded from" if config["exclude_history"] else "among"} the candidates:

| metric | model | popularity |
|---|---|---|
{rows}
Data: {lineage["interactions"]:,} interactions of {lineage["users"]:,} users, from {len(lineage["sources"])} file(s); checkpoint at step {lineage["step"]:,}.
"""
