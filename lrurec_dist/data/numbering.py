"""Item ids of a preparation: from what its parts saw to the catalogue, with the figures of what is kept."""

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lrurec_dist import storage
from lrurec_dist.data.catalogue import DELETED, Catalogue, as_keys, build_catalogue
from lrurec_dist.data.passes import PartReport
from lrurec_dist.data.shards import ShardReport


def catalogue_of(
    parts: list[PartReport], parent: Catalogue | None, first_ids: Literal["appearance", "count"]
) -> tuple[Catalogue, list[np.ndarray]]:
    """The catalogue, and for each part the item_id (int32) of each of its codes."""
    tables = [part.items for part in parts if part.items.num_rows]
    if tables:
        items = (
            pa.concat_tables(tables)
            .group_by("item_key", use_threads=False)
            .aggregate([("count", "sum"), ("first_seen", "min"), ("last_seen", "max")])
            .rename_columns(["item_key", "count", "first_seen", "last_seen"])
        )
        catalogue = build_catalogue(items, parent, first_ids)
    else:
        assert parent is not None, "a first night without events was refused before"
        catalogue = parent
    return catalogue, [catalogue.ids_of(part.items["item_key"]).astype(np.int32) for part in parts]


def with_figures(catalogue: Catalogue, merged: list[ShardReport], deleted: np.ndarray | None) -> Catalogue:
    """The catalogue with the counts and times of the interactions that are kept."""
    size = catalogue.num_items + 1
    counts = np.zeros(size, dtype=np.int64)
    first, last = (catalogue.table[name].to_numpy() for name in ("first_seen", "last_seen"))
    first, last = (np.concatenate([[0], values]) for values in (first, last))
    found_first, found_last = np.full(size, np.iinfo(np.int64).max), np.full(size, np.iinfo(np.int64).min)
    for report in merged:
        ids = report.items["item_id"].to_numpy()
        counts[ids] += report.items["count"].to_numpy()
        found_first[ids] = np.minimum(found_first[ids], report.items["first_seen"].to_numpy())
        found_last[ids] = np.maximum(found_last[ids], report.items["last_seen"].to_numpy())
    occurs = counts > 0
    first, last = np.where(occurs, found_first, first), np.where(occurs, found_last, last)
    return catalogue.with_figures(counts[1:], first[1:], last[1:], deleted)


def keys_in(path: str) -> pa.Array | None:
    """The keys in a text file, one a line."""
    if not path:
        return None
    lines = (line.strip() for line in storage.read_bytes(path).decode().splitlines())
    return pa.array([line for line in lines if line], pa.large_string())


def deleted_ids(path: str, catalogue: Catalogue) -> np.ndarray | None:
    """Item ids deleted before or now."""
    ids = catalogue.table.filter(pc.equal(catalogue.table["status"], DELETED))["item_id"].to_numpy()
    keys = keys_in(path)
    if keys is not None:
        found = catalogue.ids_of(as_keys(keys, catalogue.keys.type))
        ids = np.union1d(ids, found[found > 0])
    return ids if len(ids) else None
