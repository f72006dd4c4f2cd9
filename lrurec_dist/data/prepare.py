"""From a log to a prepared dataset: one pass for the catalogue, one shuffle into sequence shards."""

import functools
import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from lrurec_dist import storage
from lrurec_dist.data.catalogue import Catalogue, build_catalogue, load_catalogue, save_catalogue
from lrurec_dist.data.events import read_events, reading_errors, resolve_log, summarise_items
from lrurec_dist.data.sequences import MIN_EVALUABLE, SCHEMA_VERSION, SequenceDataset
from lrurec_dist.errors import CatalogueError, ConfigError, DataQualityError

TIE_RULE = "timestamp, then item_id"


def prepare_dataset(
    url: str,
    *,
    log_path: str,
    log_format: str,
    user_column: str,
    item_column: str,
    timestamp_column: str,
    timestamp_unit: str,
    max_rejected_share: float,
    shards: int,
    parent: str = "",
) -> tuple[SequenceDataset, bool]:
    """Turn a log into a committed dataset at `url`, or find it there.

    Args:
        url: the dataset's directory.
        parent: an earlier dataset whose item ids are kept; empty for none.
        others: as in `lrurec_dist.config.LogConfig` and `DatasetConfig`.

    Returns:
        The dataset, and whether it was there already, prepared from the same files in the same way.

    Raises:
        ConfigError: another dataset lies at `url`.
        DataNotReadyError: the log does not exist.
        DataQualityError: the log is empty, lacks a column, or too many rows are unusable.
    """
    files, log_format = resolve_log(log_path, log_format)
    parent_dataset = SequenceDataset(parent) if parent else None
    inputs: dict[str, Any] = {
        "columns": [user_column, item_column, timestamp_column],
        "format": log_format,
        "parent_catalogue": parent_dataset.manifest["catalogue_fingerprint"] if parent_dataset else None,
        "shards": shards,
        "sources": files,
        "timestamp_unit": timestamp_unit,
    }
    if storage.is_committed(url):
        dataset = SequenceDataset(url, verify=True)
        differing = sorted(name for name in inputs if dataset.manifest["inputs"].get(name) != inputs[name])
        if differing:
            raise ConfigError(
                f"dataset.dir={url}: holds a dataset prepared with other {', '.join(differing)}; choose another dataset.dir or run_dir, or delete it"
            )
        _check_quality(log_path, dataset.manifest["interactions"], dataset.manifest["rows_rejected"], max_rejected_share)
        return dataset, True
    _remove_leftovers(url)

    with reading_errors():
        events = read_events(
            list(files),
            log_format=log_format,
            user_column=user_column,
            item_column=item_column,
            timestamp_column=timestamp_column,
            timestamp_unit=timestamp_unit,
        ).materialize()
        items, rejected = summarise_items(events)
    interactions = int(pc.sum(items["count"]).as_py() or 0)
    _check_quality(log_path, interactions, rejected, max_rejected_share)
    catalogue = build_catalogue(items, parent_dataset.catalogue if parent_dataset else None)
    save_catalogue(catalogue, storage.join(url, "catalogue"))
    written = write_sequences(events, url, catalogue.fingerprint, shards)
    lengths = np.repeat(written["length"].to_numpy(), written["users"].to_numpy())
    if int(lengths.sum()) != interactions:
        raise DataQualityError(
            f"{url}: {interactions:,} interactions read but {int(lengths.sum()):,} written; this is a bug, please report it"
        )
    description = {
        "schema_version": SCHEMA_VERSION,
        "inputs": inputs,
        "tie_rule": TIE_RULE,
        "time_unit": "position" if timestamp_unit == "position" else "us",
        "rows_read": interactions + sum(rejected.values()),
        "rows_rejected": rejected,
        "interactions": interactions,
        "users": len(lengths),
        "users_evaluable": int((lengths >= MIN_EVALUABLE).sum()),
        "users_too_short_to_evaluate": int((lengths < MIN_EVALUABLE).sum()),
        "length_percentiles": {str(p): int(np.percentile(lengths, p, method="inverted_cdf")) for p in (0, 10, 50, 90, 99, 100)},
        "num_items": catalogue.num_items,
        "new_items": catalogue.num_items - (parent_dataset.num_items if parent_dataset else 0),
        "catalogue_fingerprint": catalogue.fingerprint,
        "time_range": [pc.min(items["first_seen"]).as_py(), pc.max(items["last_seen"]).as_py()],
    }
    known = dict(
        zip(
            written["file"].to_pylist(),
            ({"bytes": b, "sha256": s} for b, s in zip(written["bytes"].to_pylist(), written["sha256"].to_pylist(), strict=True)),
            strict=True,
        )
    )
    storage.commit(url, description, known)
    return SequenceDataset(url), False


def _remove_leftovers(url: str) -> None:
    """Delete what an interrupted preparation left, and refuse to touch anything else."""
    foreign = [name for name in storage.list_files(url) if not name.startswith(("catalogue/", "sequences/"))]
    if foreign:
        raise ConfigError(
            f"dataset.dir={url}: holds {foreign[0]}, which no preparation wrote; give an empty directory or a new one"
        )
    storage.remove_tree(url)


def _check_quality(log_path: str, interactions: int, rejected: dict[str, int], max_rejected_share: float) -> None:
    total = interactions + sum(rejected.values())
    if total == 0:
        raise DataQualityError(f"log.path={log_path}: the log is empty; there is nothing to train on")
    share = sum(rejected.values()) / total
    if share > max_rejected_share or interactions == 0:
        reasons = ", ".join(f"{name} {count:,}" for name, count in sorted(rejected.items(), key=lambda pair: -pair[1]))
        raise DataQualityError(
            f"log.max_rejected_share={max_rejected_share}: {share:.2%} of {total:,} rows are unusable ({reasons}); mend the log or raise the share"
        )


def write_sequences(events: ray.data.Dataset, url: str, catalogue_fingerprint: str, shards: int) -> pa.Table:
    """Write `sequences/*.parquet` below `url` from events and the catalogue that lies there.

    A user lies in shard hash(user_key) mod shards; events are ordered by (timestamp, item_id), so
    the files depend on the events and not on the order in which they were read.

    Returns:
        A table (file, bytes, sha256, length, users): how many users of each file have each length.
    """
    assign = functools.partial(
        _assign_ids_and_shards, catalogue_url=storage.join(url, "catalogue"), fingerprint=catalogue_fingerprint, shards=shards
    )
    keyed = events.map_batches(assign, batch_format="pyarrow", batch_size=None)
    grouped = keyed.groupby("shard", num_partitions=shards).map_groups(
        functools.partial(_write_shard, url=url), batch_format="pyarrow"
    )
    return pa.concat_tables(ray.get(grouped.to_arrow_refs()), promote_options="permissive").combine_chunks()


@functools.lru_cache(maxsize=1)
def _cached_catalogue(url: str, fingerprint: str) -> Catalogue:
    """One catalogue per worker process; the fingerprint tells apart what was at `url` at two times."""
    catalogue = load_catalogue(url)
    if catalogue.fingerprint != fingerprint:
        raise CatalogueError(
            f"{url}: catalogue {catalogue.fingerprint}, expected {fingerprint}; is another job preparing this dataset?"
        )
    return catalogue


def _assign_ids_and_shards(events: pa.Table, catalogue_url: str, fingerprint: str, shards: int) -> pa.Table:
    usable = events.filter(events["reason"].is_null())
    return pa.table(
        {
            "user_key": usable["user_key"],
            "item_id": pa.array(_cached_catalogue(catalogue_url, fingerprint).ids_of(usable["item_key"])),
            "timestamp": usable["timestamp"],
            "shard": pa.array(shard_of(usable["user_key"], shards)),
        }
    )


def shard_of(user_keys: pa.Array | pa.ChunkedArray, shards: int) -> np.ndarray:
    """int32 shard of each user: a hash of the key that no library version changes, modulo shards."""
    encoded = user_keys.dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    keys = (str(key).encode() for key in encoded.dictionary.to_pylist())
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % shards for key in keys], dtype=np.int32
    )
    return hashes[encoded.indices.to_numpy()]


def _write_shard(events: pa.Table, url: str) -> pa.Table:
    """Write one shard's sequences and say what was written."""
    if events.num_rows == 0:
        return pa.table({"file": pa.array([], pa.string())})
    encoded = events["user_key"].combine_chunks().dictionary_encode()
    order_of_keys = pc.sort_indices(encoded.dictionary)
    position = np.empty(len(order_of_keys), dtype=np.int64)
    position[order_of_keys.to_numpy()] = np.arange(len(order_of_keys))
    user = position[encoded.indices.to_numpy()]
    item_ids, timestamps = events["item_id"].to_numpy(), events["timestamp"].to_numpy()
    order = np.lexsort((item_ids, timestamps, user))
    lengths = np.bincount(user, minlength=len(position))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    table = pa.table(
        {
            "user_key": encoded.dictionary.take(order_of_keys),
            "item_ids": pa.LargeListArray.from_arrays(offsets, pa.array(item_ids[order].astype(np.int32))),
            "timestamps": pa.LargeListArray.from_arrays(offsets, pa.array(timestamps[order])),
        }
    )
    name = f"sequences/part-{events['shard'][0].as_py():05d}.parquet"
    entry = storage.write_table(storage.join(url, name), table)
    length, users = np.unique(lengths, return_counts=True)
    return pa.table(
        {
            "file": pa.array([name] * len(length), pa.string()),
            "bytes": pa.array([entry["bytes"]] * len(length), pa.int64()),
            "sha256": pa.array([entry["sha256"]] * len(length), pa.string()),
            "length": pa.array(length.astype(np.int64)),
            "users": pa.array(users.astype(np.int64)),
        }
    )
