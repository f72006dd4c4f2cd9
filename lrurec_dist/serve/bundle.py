"""The bundle: everything serving needs in one immutable, verified directory that executes nothing.

manifest.json    schema version, every file's size and SHA-256, fingerprints, versions, metrics, what rounding moves
README.md        model card
config.json      arguments of the model, type of the stored item rows, window length, whether histories are excluded
model.safetensors, catalogue/*.parquet, metrics.json, lineage.json
golden/          requests.jsonl, expected.safetensors: what the model answers with the item rows that are stored
exports/         programs and vectors for other runtimes, where they were asked for (`lrurec_dist/serve/export.py`)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor

from lrurec_dist import PAD_ID, storage
from lrurec_dist.errors import BundleError
from lrurec_dist.model.item_table import ItemTable
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.serve.model_card import git_revision, libraries, model_card, with_intervals
from lrurec_dist.serve.stored_table import (
    ROWS,
    SCALES,
    TABLE_DTYPES,
    as_stored,
    candidate_bias,
    expected_tensors,
    least_bytes,
    loaded_rows,
    rounding,
    stored_tensors,
)
from lrurec_dist.serve.verified_files import HEADER_BYTES, VerifiedFiles, parse_json, read_tensors, tensor_header

SCHEMA_VERSION = 2
GOLDEN_K = 10
# Products of another shape or thread count round differently; beyond this a score is another score. Relative to the
# larger of the score and one; the same for every type of stored rows, since golden answers are theirs.
GOLDEN_TOLERANCE = 1e-4

_CONFIG, _WEIGHTS, _CATALOGUE = "config.json", "model.safetensors", "catalogue/part-00000.parquet"
_REQUESTS, _EXPECTED = "golden/requests.jsonl", "golden/expected.safetensors"
_JSON_BYTES = 1 << 20
_GOLDEN_BYTES = 64 << 20
_KEY_BYTES = 4096  # of an item key or title on average, with all that Parquet adds
_WHOLE = {"num_items": 2**31 - 2, "dim": 1 << 16, "hidden": 1 << 16, "blocks": 1 << 10}  # largest values of the model's arguments


@dataclass(frozen=True)
class GoldenAnswers:
    """Histories with what the trained model answers with the item rows a bundle stores, before the bundle exists.

    `histories` are item keys, oldest first; `item_ids` (requests, k) int64 and `scores`
    (requests, k) float32 are the best candidates outside each history, padded by 0 and -inf.
    """

    histories: list[list[str | int]]
    item_ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Bundle:
    """A loaded, verified bundle. The model is float32, whatever type its item rows are stored in."""

    version: str
    model: LRURec
    item_keys: pa.Array  # of item_id 1, 2, …
    max_length: int
    exclude_history: bool
    golden: GoldenAnswers
    manifest: dict[str, Any]
    candidate_bias: Tensor  # (num_items + 1,): as the model's, -inf for items that are not recommended any more
    item_titles: pa.Array | None = None  # of item_id 1, 2, …, where the catalogue has a column `title`


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
    table_dtype: str = "float32",
    exports: Sequence[str] = (),
    parent: str = "",
) -> str:
    """Write a bundle below `registry_url/versions`, manifest last, and return its URL.

    Args:
        model: as trained, in float32.
        catalogue: its table; a column `title`, null where an item has none, goes along.
        golden: what `as_stored(model, table_dtype)` answers.
        metrics: values by metric of `model` and `popularity`; with `intervals`, by model and metric, where known.
        table_dtype: one of `TABLE_DTYPES`.
        exports: some of `export.EXPORTS`.
        parent: version of the bundle whose model this one was trained on from; empty if there is none.

    The version is `<date>-<hash of the content>`: the same content gives the same version, and an
    existing one is left as it is.

    Raises:
        BundleError: an export answers otherwise than the model.
        ConfigError: an export needs a package that is not installed.
    """
    stored = as_stored(model, table_dtype)
    values = {name: value for name, value in model.state_dict().items() if name != ROWS}
    weights = save(
        {**{name: value.contiguous() for name, value in values.items()}, **stored_tensors(model.table.weight, table_dtype)}
    )
    config = {"model": model_arguments, "max_length": max_length, "exclude_history": exclude_history, "table_dtype": table_dtype}
    small = {
        _REQUESTS: "".join(json.dumps({"history": history}) + "\n" for history in golden.histories).encode(),
        _EXPECTED: save({"item_ids": golden.item_ids, "scores": golden.scores}),
    }
    moved = rounding(model, table_dtype, _windows(golden, catalogue["item_key"], max_length))
    description = {
        "schema_version": SCHEMA_VERSION,
        "num_items": catalogue.num_rows,
        "catalogue_fingerprint": catalogue_fingerprint,
        "dataset": lineage.get("dataset_identity"),
        "parent": parent,
        "git_revision": git_revision(),
        "libraries": libraries(),
        "table_dtype": table_dtype,
        "rounding": {**moved._asdict(), "histories": len(golden.histories)},
        "golden_tolerance": GOLDEN_TOLERANCE,
        "metrics": with_intervals(metrics, "model"),
        "exports": list(exports),
    }
    hashes = {_WEIGHTS: storage.sha256(weights), **{name: storage.sha256(data) for name, data in small.items()}}
    if "title" in catalogue.column_names:  # what the fingerprint does not cover
        description["titles"] = catalogue.num_rows - catalogue["title"].null_count
        hashes["titles"] = storage.fingerprint(catalogue["title"].to_pylist())
    identity = {"description": description, "files": hashes, "config": config, "metrics": metrics, "lineage": lineage}
    version = f"{date}-{storage.fingerprint(identity)}"
    url = storage.join(registry_url, "versions", version)
    if storage.is_committed(url):
        return url
    manifest = {**description, "version": version}
    storage.remove_tree(url)
    for name, data in ((_WEIGHTS, weights), *small.items()):
        storage.write_bytes(storage.join(url, name), data)
    storage.write_table(storage.join(url, _CATALOGUE), catalogue)
    for name, value in ((_CONFIG, config), ("metrics.json", metrics), ("lineage.json", lineage)):
        storage.write_json(storage.join(url, name), value)
    storage.write_bytes(storage.join(url, "README.md"), model_card(manifest, config, metrics, lineage).encode())
    if exports:
        from lrurec_dist.serve.export import write_exports  # what loads a bundle does without it

        write_exports(storage.join(url, "exports"), stored, exports, item_keys=catalogue["item_key"], max_length=max_length)
    storage.commit(url, manifest)
    return url


def _windows(golden: GoldenAnswers, item_keys: pa.ChunkedArray, max_length: int) -> Tensor:
    """(histories, max_length) int64: the golden histories as ids, padded on the left."""
    keys = item_keys.combine_chunks()
    item_ids = torch.full((len(golden.histories), max_length), PAD_ID)
    for row, history in enumerate(golden.histories):
        if recent := pc.index_in(pa.array(history[-max_length:], type=keys.type), value_set=keys).to_pylist():
            item_ids[row, -len(recent) :] = torch.tensor(recent) + 1
    return item_ids


def load_bundle(url: str) -> Bundle:
    """Read a bundle after every listed file was found as committed; files that the manifest does not list are not looked at.

    Whatever was put there: nothing outside of the directory is read, nothing larger than the manifest and the shapes in
    it allow is read or allocated, and nothing is executed.

    Raises:
        BundleError: no manifest, another schema, a missing or changed file, or contents that do not fit together.
    """
    files = VerifiedFiles(url)
    manifest = files.manifest
    schema, version = manifest.get("schema_version"), manifest.get("version")
    if type(schema) is not int or schema != SCHEMA_VERSION:
        raise BundleError(
            f"{url}: schema_version={schema!r}, this code reads {SCHEMA_VERSION}; update the one that is older"[:1000]
        )
    if not isinstance(version, str) or not version.isascii() or not version.replace("-", "").isalnum() or len(version) > 128:
        raise BundleError(f"{url}: version={str(version)[:80]!r} is none; letters, digits and dashes")
    files.check_entries()
    config = _read_config(files)
    model = _read_model(files, config)
    catalogue = _read_catalogue(files, model.table.num_items)
    item_keys = catalogue["item_key"].combine_chunks()
    golden = _read_golden(files, item_keys)
    if manifest.get("num_items") != len(item_keys) or not isinstance(manifest.get("catalogue_fingerprint"), str):
        raise BundleError(
            f"{url}: contents do not fit together: {len(item_keys):,} items, the manifest says {str(manifest.get('num_items'))[:80]}"
        )
    files.check_rest()
    return Bundle(
        version=version,
        model=model,
        item_keys=item_keys,
        max_length=config["max_length"],
        exclude_history=config["exclude_history"],
        golden=golden,
        manifest=manifest,
        candidate_bias=candidate_bias(model.table.bias, catalogue["status"] if "status" in catalogue.column_names else None),
        item_titles=catalogue["title"].combine_chunks() if "title" in catalogue.column_names else None,
    )


def _require(holds: bool, files: VerifiedFiles, what: str) -> None:
    if not holds:
        raise BundleError(f"{files.url}: contents do not fit together: {what[:400]}")


def _read_config(files: VerifiedFiles) -> dict[str, Any]:
    config = parse_json(files.read(_CONFIG, _JSON_BYTES), storage.join(files.url, _CONFIG))
    names = {"model": dict, "max_length": int, "exclude_history": bool, "table_dtype": str}
    fits = (
        isinstance(config, dict)
        and config.keys() == names.keys()
        and all(type(config[name]) is kind for name, kind in names.items())
    )
    _require(fits, files, f"{_CONFIG} has to have {', '.join(names)}")
    _require(1 <= config["max_length"] <= 1 << 20, files, f"max_length={config['max_length']}")
    _require(
        config["table_dtype"] in TABLE_DTYPES, files, f"table_dtype={config['table_dtype']} is none of {', '.join(TABLE_DTYPES)}"
    )
    shape = config["model"]
    unknown = shape.keys() - _WHOLE.keys() - {"dropout", "ring", "temperature"}
    _require(not unknown, files, f"the model has no {', '.join(unknown)}")
    for name, largest in _WHOLE.items():
        value = shape.get(name)
        _require(type(value) is int and 1 <= value <= largest, files, f"{name}={value!r} is no number from 1 to {largest:,}")
    temperature = shape.get("temperature", 0.0)
    _require(type(temperature) in (int, float) and 0 <= temperature < 1e6, files, f"temperature={temperature!r}")
    return {**config, "model": {**{name: shape[name] for name in _WHOLE}, "temperature": float(temperature), "dropout": 0.0}}


def _read_model(files: VerifiedFiles, config: dict[str, Any]) -> LRURec:
    shape, dtype, where = config["model"], config["table_dtype"], storage.join(files.url, _WEIGHTS)
    least = least_bytes(shape["num_items"], shape["dim"], shape["hidden"], shape["blocks"], dtype)
    data = files.read(_WEIGHTS, 4 * least + HEADER_BYTES)
    _require(len(data) >= least, files, f"{len(data):,} bytes of weights, a model of this shape has {least:,} and more")
    with torch.device("meta"):  # the rest has values, and is no larger than what was read
        table = ItemTable(shape["num_items"], shape["dim"])
    model = LRURec(**shape, table=table)
    tensors = read_tensors(data, expected_tensors(model, dtype), where)
    tensors[ROWS] = loaded_rows(tensors)
    tensors.pop(SCALES, None)
    model.load_state_dict(tensors, assign=True)
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise BundleError(f"{files.url}: a weight is not finite")
    model = model.eval().requires_grad_(False)
    if not all((layer.decay().square().sum(0) < 1).all() for layer, _ in model.layers()):
        raise BundleError(f"{files.url}: a decay has a modulus of 1 or more; states would grow for ever")
    return model


def _read_catalogue(files: VerifiedFiles, num_items: int) -> pa.Table:
    limit = (num_items + 4096) * _KEY_BYTES
    try:
        file = pq.ParquetFile(pa.BufferReader(files.read(_CATALOGUE, limit)))
        rows = file.metadata.num_rows
        _require(rows == num_items, files, f"{rows:,} catalogue items, but {num_items:,} item rows")
        names = [name for name in ("item_id", "item_key", "status", "title") if name in file.schema_arrow.names]
        for group in range(file.metadata.num_row_groups):
            pieces = [file.metadata.row_group(group).column(column) for column in range(file.metadata.num_columns)]
            used = [piece for piece in pieces if piece.path_in_schema in names]
            # a dictionary lets a small file stand for any amount of text
            fits = (
                not any(piece.has_dictionary_page for piece in used)
                and sum(piece.total_uncompressed_size for piece in used) <= limit
            )
            _require(fits, files, f"{_CATALOGUE} says it is larger than {limit:,} bytes, or has dictionaries")
        table = file.read(names).combine_chunks()
        table.validate(full=True)
        _require({"item_id", "item_key"} <= set(names) and table.num_rows == num_items, files, f"{_CATALOGUE} lacks items")
        ids, keys = table["item_id"].combine_chunks(), table["item_key"].combine_chunks()
        in_order = (
            ids.type == pa.int64() and ids[0].as_py() == 1 and pc.all(pc.equal(pc.pairwise_diff(ids), 1)).as_py() is not False
        )
        _require(in_order and not ids.null_count, files, f"{_CATALOGUE} has other item ids than 1 to {num_items:,}, in order")
        _require(_is_key(keys.type) and not keys.null_count, files, f"item keys are {keys.type}, or missing")
        _require(pc.count_distinct(keys).as_py() == num_items, files, "an item key is there twice")
        for name in {"status", "title"} & set(names):
            kind = table.schema.field(name).type
            _require(pa.types.is_string(kind) or pa.types.is_large_string(kind), files, f"{name} of items is no text")
    except (pa.ArrowException, OSError, ValueError, TypeError) as reason:
        raise BundleError(f"{files.url}: {_CATALOGUE} cannot be read: {_line(reason)}") from None
    return table


def _is_key(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _read_golden(files: VerifiedFiles, item_keys: pa.Array) -> GoldenAnswers:
    where = storage.join(files.url, _REQUESTS)
    histories: list[list[str | int]] = []
    kind = int if pa.types.is_integer(item_keys.type) else str
    for number, line in enumerate(files.read(_REQUESTS, _GOLDEN_BYTES).splitlines(), start=1):
        request = parse_json(line, f"{where}, line {number},")
        history = request.get("history") if isinstance(request, dict) else None
        if not isinstance(history, list) or not all(type(key) is kind for key in history):
            raise BundleError(f"{where}, line {number}: is no history of item keys")
        try:
            pa.array(history, type=item_keys.type)
        except (pa.ArrowException, OverflowError, ValueError) as reason:
            raise BundleError(f"{where}, line {number}: keys are not {item_keys.type}: {_line(reason)}") from None
        histories.append(history)
    _require(bool(histories), files, "there are no golden requests")
    data, where = files.read(_EXPECTED, _GOLDEN_BYTES), storage.join(files.url, _EXPECTED)
    shape = tensor_header(data, where).get("item_ids", ("", []))[1]
    fits = isinstance(shape, list) and len(shape) == 2 and type(shape[1]) is int and 1 <= shape[1] <= 10_000
    _require(fits and shape[0] == len(histories), files, f"{len(histories)} golden requests, answers of shape {shape}")
    expected = read_tensors(data, {"item_ids": (torch.int64, shape), "scores": (torch.float32, shape)}, where)
    item_ids, scores = expected["item_ids"], expected["scores"]
    in_catalogue = bool(((item_ids >= PAD_ID) & (item_ids <= len(item_keys))).all())
    numbers = bool(torch.where(item_ids == PAD_ID, scores == -torch.inf, torch.isfinite(scores)).all())
    _require(in_catalogue and numbers, files, "a golden answer is no item of the catalogue, or its score no number")
    return GoldenAnswers(histories, item_ids, scores)


def _line(reason: Exception) -> str:
    return f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
