"""Small committed datasets made directly, for tests whose subject comes after preparation."""

from collections import Counter

import numpy as np
import pyarrow as pa

from lrurec_dist import storage
from lrurec_dist.data.catalogue import build_catalogue, save_catalogue
from lrurec_dist.data.sequences import LENGTHS, SCHEMA_VERSION, SequenceDataset


def write_dataset(
    url: str, sequences: list[list[int]], num_items: int, shards: int = 3, timestamps: list[list[int]] | None = None
) -> SequenceDataset:
    """A dataset of the given item_id sequences; user i is `u<i>` and lies in shard i mod shards.

    Timestamps are microseconds where given, else places in the sequence.
    """
    times = timestamps or [list(range(len(sequence))) for sequence in sequences]
    keys = [f"i{item:03d}" for item in range(1, num_items + 1)]
    ones = pa.array(np.ones(num_items, dtype=np.int64))
    items = pa.table({"item_key": pa.array(keys, pa.large_string()), "count": ones, "first_seen": ones, "last_seen": ones})
    catalogue = build_catalogue(items)
    save_catalogue(catalogue, storage.join(url, "catalogue"))
    lengths: dict[str, list[int]] = {"shard": [], "length": [], "users": []}
    for shard in range(shards):
        members = range(shard, len(sequences), shards)
        table = pa.table(
            {
                "user_key": pa.array([f"u{user:04d}" for user in members], pa.large_string()),
                "item_ids": pa.array([sequences[user] for user in members], pa.large_list(pa.int32())),
                "timestamps": pa.array([times[user] for user in members], pa.large_list(pa.int64())),
            }
        )
        storage.write_table(storage.join(url, f"sequences/part-{shard:05d}.parquet"), table)
        for length, users in sorted(Counter(len(sequences[user]) for user in members).items()):
            for name, value in (("shard", shard), ("length", length), ("users", users)):
                lengths[name].append(value)
    storage.write_table(storage.join(url, LENGTHS), pa.table(lengths, schema=pa.schema([(name, pa.int64()) for name in lengths])))
    description = {
        "schema_version": SCHEMA_VERSION,
        "num_items": num_items,
        "users": len(sequences),
        "users_evaluable": sum(len(sequence) >= 3 for sequence in sequences),
        "interactions": sum(map(len, sequences)),
        "catalogue_fingerprint": catalogue.fingerprint,
        "time_unit": "us" if timestamps else "position",
        "time_range": [min(map(min, filter(None, times))), max(map(max, filter(None, times)))],
        "inputs": {"sources": {}},
    }
    storage.commit(url, description)
    return SequenceDataset(url)


def chain_sequences(users: int, num_items: int, seed: int = 0) -> list[list[int]]:
    """Users who walk along 1, 2, 3, …: trivially learnable. Lengths from 1 to 15, ever the same for a seed."""
    draw = np.random.default_rng(seed)
    starts, lengths = draw.integers(0, num_items, users), draw.integers(1, 16, users)
    return [
        [int((start + step) % num_items) + 1 for step in range(length)] for start, length in zip(starts, lengths, strict=True)
    ]
