"""User states in Parquet: how they lie there, and how serving gets them; needs what the recommender needs.

user_key        as in the dataset
recurrent       fixed-size list of float32: (blocks, 2, hidden), real and imaginary plane, row by row
vector          fixed-size list of float32: (dim,)
recent          list of int32: ids of the last items, oldest first
events          int64
bundle_version  the bundle that made the state
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lrurec_dist import storage
from lrurec_dist.errors import StateError, StateVersionError
from lrurec_dist.serve.item_keys import Key
from lrurec_dist.serve.recommender import Recommender
from lrurec_dist.serve.user_state import UserState

FOLDER = "states"
SCHEMA_VERSION = 1
_USERS_AT_ONCE = 256


def state_schema(user_key: pa.DataType, recurrent: int, dim: int) -> pa.Schema:
    """Columns of a file of states with so many numbers each."""
    return pa.schema(
        [
            ("user_key", user_key),
            ("recurrent", pa.list_(pa.float32(), recurrent)),
            ("vector", pa.list_(pa.float32(), dim)),
            ("recent", pa.large_list(pa.int32())),
            ("events", pa.int64()),
            ("bundle_version", pa.large_string()),
        ]
    )


def state_table(
    schema: pa.Schema, user_keys: pa.Array, states: Tensor, vectors: Tensor, recent: list[Tensor], events: Tensor, version: str
) -> pa.Table:
    """Rows of users: states (users, blocks, 2, hidden), vectors (users, dim), recent ids and events of each."""
    ends = torch.tensor([len(ids) for ids in recent], dtype=torch.int64).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    ids = torch.cat([torch.empty(0, dtype=torch.int32), *(ids.int() for ids in recent)])
    columns = [
        user_keys,
        pa.FixedSizeListArray.from_arrays(pa.array(states.flatten().numpy()), type=schema.field("recurrent").type),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.flatten().numpy()), type=schema.field("vector").type),
        pa.LargeListArray.from_arrays(pa.array(offsets.numpy()), pa.array(ids.numpy())),
        pa.array(events.numpy()),
        pa.repeat(pa.scalar(version, pa.large_string()), len(user_keys)),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def read_states(url: str, version: str) -> Iterator[tuple[Key, UserState]]:
    """Every user_key with its state, some thousand in memory at a time; each file is verified before its first row.

    Args:
        url: of a directory that jobs/states.py committed.
        version: of the bundle that is going to use them.

    Raises:
        StateVersionError: another bundle made them.
        StateError: they are of another schema.
        IntegrityError: nothing is committed there, or a file is missing or changed.
    """
    manifest = storage.read_manifest(url, verify=False)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise StateError(
            f"{url}: schema_version={manifest.get('schema_version')}, this code reads {SCHEMA_VERSION}; make them again"
        )
    if manifest["bundle_version"] != version:
        raise StateVersionError(
            f"{url}: states of version={manifest['bundle_version']}, asked for by version {version}, to which their numbers "
            "mean nothing; make states with that bundle (jobs/states.py, states.bundle)"
        )
    return _read(url, manifest)


def _read(url: str, manifest: dict[str, Any]) -> Iterator[tuple[Key, UserState]]:
    version, (blocks, hidden) = manifest["bundle_version"], manifest["shape"]
    for name, entry in manifest["files"].items():
        if not name.startswith(f"{FOLDER}/"):
            continue
        storage.verify_file(url, name, entry)
        for table in storage.iter_row_groups(storage.join(url, name)):
            batch = table.combine_chunks()
            users = batch.num_rows
            recurrent, vectors = (_floats(batch, column).view(users, -1) for column in ("recurrent", "vector"))
            columns = [batch[column].to_pylist() for column in ("user_key", "recent", "events")]
            for user, rows, vector, recent, events in zip(columns[0], recurrent, vectors, *columns[1:], strict=True):
                state = UserState(version, rows.view(blocks, 2, hidden).clone(), vector.clone(), tuple(recent), events)
                yield user, state


def _floats(table: pa.Table, column: str) -> Tensor:
    return torch.cat([torch.empty(0), *(torch.tensor(chunk.flatten().to_numpy()) for chunk in table[column].chunks)])


def apply_events(url: str, recommender: Recommender, events: Mapping[Key, Sequence[Key]]) -> Iterator[tuple[Key, UserState]]:
    """Every user with the state after later events on top of the stored one.

    Args:
        url: as `read_states`.
        recommender: of the bundle that made the states.
        events: item keys by user_key, oldest first, of what came after the states were made.

    Returns:
        (user_key, state): those of the files in their order, then users whom only `events` names. A state is that of the
        whole history within float32 rounding.

    Raises:
        LrurecError: as `read_states` and `Recommender.extend`.
    """
    stored = read_states(url, recommender.version)
    return _applied(stored, recommender, dict(events))


def _applied(
    stored: Iterator[tuple[Key, UserState]], recommender: Recommender, left: dict[Key, Sequence[Key]]
) -> Iterator[tuple[Key, UserState]]:
    while batch := list(islice(stored, _USERS_AT_ONCE)):
        users, states = zip(*batch, strict=True)
        yield from zip(users, recommender.extend_many(states, [left.pop(user, ()) for user in users]), strict=True)
    new = iter(left.items())
    while some := list(islice(new, _USERS_AT_ONCE)):
        yield from zip([user for user, _ in some], recommender.encode([keys for _, keys in some]), strict=True)
