"""Lists for the users of a dataset, from a bundle to Parquet files; shard by shard, each done once (`shard_files.py`).

lists/part-*.parquet  user_key, item_keys, scores, bundle_version
unknown_users.txt     the keys asked for that the dataset does not have, one a line, where there are any
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from lrurec_dist import PAD_ID, storage
from lrurec_dist.data.batches import pad_left
from lrurec_dist.data.catalogue import as_keys
from lrurec_dist.data.passes import Passes
from lrurec_dist.data.sequences import SequenceDataset, SequenceShard
from lrurec_dist.errors import ConfigError
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.reporting import Progress, silent
from lrurec_dist.serve.bundle import Bundle
from lrurec_dist.serve.shard_files import ShardFiles, bundle_for_part, check_catalogue, checked_bundle

SCHEMA_VERSION = 1


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
    bundle = checked_bundle(bundle_url)
    num_items = len(bundle.item_keys)
    if options.k > num_items:
        raise ConfigError(f"recommend.k={options.k}: the catalogue has {num_items:,} items; set recommend.k={num_items} or lower")
    check_catalogue(bundle, dataset)
    inputs = {
        "bundle": storage.fingerprint(bundle.manifest["files"]),
        "dataset": dataset.identity,
        "k": options.k,
        "exclude_history": options.exclude_history,
        "batch_size": options.batch_size,
        "users": None if options.users is None else storage.fingerprint(options.users.to_pylist()),
    }
    files = ShardFiles(url=url, folder="lists", setting="recommend.dir", inputs=inputs)
    if manifest := files.committed():
        return manifest, True
    part = functools.partial(_make_part, files=files, bundle_url=bundle_url, dataset=dataset, options=options)
    records = files.make(dataset, part, passes, progress, "ranked")
    unknown = _unknown_users(options.users, [storage.join(url, files.name_of(name)) for name in dataset.shard_names])
    if unknown:
        storage.write_bytes(storage.join(url, "unknown_users.txt"), "".join(f"{key}\n" for key in unknown).encode())
    description = {
        "schema_version": SCHEMA_VERSION,
        "bundle_version": bundle.version,
        "bundle": bundle_url,
        "dataset": dataset.url,
        "unknown_users": len(unknown),
    }
    return files.commit(description, records), False


def _unknown_users(asked: pa.Array | None, lists: list[str]) -> list[str]:
    if asked is None:
        return []
    found = [storage.read_table(url, columns=["user_key"])["user_key"] for url in lists]
    keys = pa.chunked_array([chunk for column in found for chunk in column.chunks], type=found[0].type)
    distinct = asked.unique()
    return distinct.filter(pc.invert(pc.is_in(as_keys(distinct, keys.type), value_set=keys))).to_pylist()


def _make_part(
    name: str, *, files: ShardFiles, bundle_url: str, dataset: SequenceDataset, options: ListOptions
) -> dict[str, Any]:
    """Write the lists of a shard and return its record."""
    bundle, shard = bundle_for_part(bundle_url), dataset.read_shard(name)
    schema = _schema(shard, bundle)
    return files.write(name, schema, lambda: _lists(bundle, shard, schema, options))


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
        best, scores = top_k(bundle.model.encode(item_ids), item_rows, bundle.candidate_bias, options.k, rows, ids)
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
