"""Lists for the users of a dataset, from a bundle to Parquet files; shard by shard, each done once.

manifest.json         schema version, inputs, bundle version, counts, every file's size and SHA-256; written last
lists/part-*.parquet  user_key, item_keys, scores, bundle_version; one file a shard of the dataset, one row a user
parts/part-*.json     what a finished file holds, so that a run that is repeated goes on from there
unknown_users.txt     the keys asked for that the dataset does not have, one a line, where there are any
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from lrurec_dist import PAD_ID, storage
from lrurec_dist.data.batches import pad_left
from lrurec_dist.data.catalogue import as_keys
from lrurec_dist.data.passes import Passes
from lrurec_dist.data.sequences import SequenceDataset, SequenceShard
from lrurec_dist.errors import CatalogueError, ConfigError, IntegrityError
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.files import new_file
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.reporting import Progress, silent
from lrurec_dist.serve.bundle import Bundle, load_bundle
from lrurec_dist.serve.recommender import Recommender
from lrurec_dist.stores import retried

SCHEMA_VERSION = 1
_ROW_GROUP = 8192  # users whose lists are written together, and held until then


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Which lists are made. `users` are the keys of the users asked for, as text; None asks for all."""

    k: int
    exclude_history: bool
    batch_size: int  # users ranked together
    users: pa.Array | None = None


def recommend_dataset(
    url: str, bundle_url: str, dataset: SequenceDataset, options: ListOptions, passes: Passes, progress: Progress = silent
) -> tuple[dict[str, Any], bool]:
    """Write the k best items of each user below `url`, best first, or find them there.

    Args:
        url: the directory; what an interrupted call for the same inputs left there is kept.
        bundle_url: the bundle; verified, and its golden requests replayed, by every process.
        dataset: whose users, with their full histories, of the bundle's catalogue.
        options: how many, for whom; a list is shorter where candidates run out.
        passes: what goes over the shards; the files are the same, to the byte, whatever it is.
        progress: told of each shard.

    Returns:
        The manifest, and whether all was there already.

    Raises:
        ConfigError: k exceeds the catalogue, or `url` holds lists made of other inputs.
        CatalogueError: dataset and bundle have different catalogues.
        BundleError: as `load_bundle`, or a golden request gets another answer.
    """
    bundle = _loaded(bundle_url)
    num_items = len(bundle.item_keys)
    if options.k > num_items:
        raise ConfigError(f"recommend.k={options.k}: the catalogue has {num_items:,} items; set recommend.k={num_items} or lower")
    theirs, ours = bundle.manifest["catalogue_fingerprint"], dataset.manifest["catalogue_fingerprint"]
    if theirs != ours:
        raise CatalogueError(
            f"bundle {bundle.version} has catalogue {theirs} ({num_items:,} items), {dataset.url} has {ours} "
            f"({dataset.num_items:,}); give the dataset that the bundle was trained on, or a bundle of this one"
        )
    inputs = {
        "bundle": storage.fingerprint(bundle.manifest["files"]),
        "dataset": dataset.identity,
        "k": options.k,
        "exclude_history": options.exclude_history,
        "batch_size": options.batch_size,
        "users": None if options.users is None else storage.fingerprint(options.users.to_pylist()),
    }
    if storage.is_committed(url):
        manifest = storage.read_manifest(url)
        _check_inputs(url, manifest["inputs"], inputs)
        return manifest, True
    records = _finished(url, inputs, dataset.shard_names)
    kept = len(records)
    missing = [name for name in dataset.shard_names if name not in records]
    make = functools.partial(_make_part, url=url, bundle_url=bundle_url, dataset=dataset, options=options, inputs=inputs)
    progress("ranked", kept, len(dataset.shard_names), "shards")
    for name, record in zip(missing, passes.each(make, [(name,) for name in missing]), strict=True):
        records[name] = record
        progress("ranked", len(records), len(dataset.shard_names), "shards")
    unknown = _unknown_users(url, options.users, dataset.shard_names)
    known = {_lists_of(name): records[name]["entry"] for name in dataset.shard_names}
    if unknown:
        storage.write_bytes(storage.join(url, "unknown_users.txt"), "".join(f"{key}\n" for key in unknown).encode())
    description = {
        "schema_version": SCHEMA_VERSION,
        "inputs": inputs,
        "bundle_version": bundle.version,
        "bundle": bundle_url,
        "dataset": dataset.url,
        "users": sum(record["users"] for record in records.values()),
        "unknown_users": len(unknown),
    }
    storage.commit(url, description, known)
    return storage.read_manifest(url, verify=False), False


def _check_inputs(where: str, before: dict[str, Any], inputs: dict[str, Any]) -> None:
    differing = sorted(name for name in inputs if before.get(name) != inputs[name])
    if differing:
        raise ConfigError(
            f"recommend.dir={where}: holds lists made with other {', '.join(differing)}; choose another recommend.dir, or delete it"
        )


def _lists_of(shard: str) -> str:
    return shard.replace("sequences/", "lists/")


def _record_of(shard: str) -> str:
    return shard.replace("sequences/", "parts/").replace(".parquet", ".json")


def _finished(url: str, inputs: dict[str, Any], shards: list[str]) -> dict[str, dict[str, Any]]:
    """Records of the shards whose lists are there, whole."""
    records = {}
    for name in shards:
        if not storage.exists(record_url := storage.join(url, _record_of(name))):
            continue
        record = storage.read_json(record_url)
        _check_inputs(url, record["inputs"], inputs)
        try:
            storage.verify_file(url, _lists_of(name), record["entry"])
        except IntegrityError:
            continue  # made again
        records[name] = record
    return records


def _unknown_users(url: str, asked: pa.Array | None, shards: list[str]) -> list[str]:
    if asked is None:
        return []
    found = [storage.read_table(storage.join(url, _lists_of(name)), columns=["user_key"])["user_key"] for name in shards]
    keys = pa.chunked_array([chunk for column in found for chunk in column.chunks], type=found[0].type)
    distinct = asked.unique()
    return distinct.filter(pc.invert(pc.is_in(as_keys(distinct, keys.type), value_set=keys))).to_pylist()


@functools.lru_cache(maxsize=1)
def _loaded(bundle_url: str) -> Bundle:
    """The bundle, once a process, after its golden requests were answered as they should be."""
    arrange_cpu()
    bundle = load_bundle(bundle_url)
    Recommender(bundle).check_golden()
    return bundle


def _make_part(
    name: str, *, url: str, bundle_url: str, dataset: SequenceDataset, options: ListOptions, inputs: dict[str, Any]
) -> dict[str, Any]:
    """Write the lists of a shard, then its record, which is returned."""
    torch.set_num_threads(1)  # products may round otherwise with more; shards are what is computed side by side
    bundle, shard = _loaded(bundle_url), dataset.read_shard(name)
    place = storage.join(url, _lists_of(name))

    def write() -> tuple[dict[str, Any], int]:
        users = 0
        with new_file(place) as file:
            schema = _schema(shard, bundle)
            with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["bundle_version"]) as writer:
                waiting: list[pa.Table] = []
                for table in _lists(bundle, shard, schema, options):
                    waiting.append(table)
                    users += table.num_rows
                    if sum(part.num_rows for part in waiting) >= _ROW_GROUP:
                        writer.write_table(pa.concat_tables(waiting))
                        waiting.clear()
                if waiting:
                    writer.write_table(pa.concat_tables(waiting))
        return file.entry(), users

    entry, users = retried("write", place, write)
    record = {"entry": entry, "users": users, "inputs": inputs}
    storage.write_json(storage.join(url, _record_of(name)), record)
    return record


def _schema(shard: SequenceShard, bundle: Bundle) -> pa.Schema:
    return pa.schema(
        [
            ("user_key", shard.user_keys.type),
            ("item_keys", pa.large_list(bundle.item_keys.type)),
            ("scores", pa.large_list(pa.float32())),
            ("bundle_version", pa.large_string()),
        ]
    )


@torch.inference_mode()
def _lists(bundle: Bundle, shard: SequenceShard, schema: pa.Schema, options: ListOptions) -> Iterator[pa.Table]:
    """Tables of some users at a time, in the order of the shard."""
    members = torch.arange(len(shard.user_keys))
    if options.users is not None:
        asked = pc.is_in(shard.user_keys, value_set=as_keys(options.users, shard.user_keys.type))
        members = members[torch.from_numpy(asked.to_numpy(zero_copy_only=False))]
    item_rows = bundle.model.item_rows()
    for users in members.split(options.batch_size) if len(members) else ():
        histories = [shard.item_ids[shard.offsets[user] : shard.offsets[user + 1]] for user in users.tolist()]
        length = max(1, min(bundle.max_length, max(map(len, histories))))
        item_ids = torch.from_numpy(pad_left([history[-length:] for history in histories], length))
        excluded = [torch.from_numpy(history) for history in histories if options.exclude_history]
        rows = torch.arange(len(excluded)).repeat_interleave(torch.tensor([len(ids) for ids in excluded], dtype=torch.int64))
        ids = torch.cat([torch.empty(0, dtype=torch.int64), *excluded])
        best, scores = top_k(bundle.model.encode(item_ids), item_rows, bundle.model.table.bias, options.k, rows, ids)
        present = best != PAD_ID
        offsets = pa.array(torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0)]).numpy())
        keys = bundle.item_keys.take(pa.array(best[present].numpy() - 1))
        columns = [
            shard.user_keys.take(pa.array(users.numpy())),
            pa.LargeListArray.from_arrays(offsets, keys),
            pa.LargeListArray.from_arrays(offsets, pa.array(scores[present].numpy())),
            pa.repeat(pa.scalar(bundle.version, pa.large_string()), len(users)),
        ]
        yield pa.Table.from_arrays(columns, schema=schema)
