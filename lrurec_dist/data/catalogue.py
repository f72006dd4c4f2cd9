"""The item catalogue: opaque external keys to dense, append-only item ids."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lrurec_dist import storage
from lrurec_dist.errors import CatalogueError, ConfigError

ACTIVE, DELETED = "active", "deleted"


@dataclass(frozen=True)
class Catalogue:
    """Items in the order of their ids.

    `table` has the columns item_id (1..num_items), item_key, status, count, first_seen, last_seen.
    An id never changes its key: a later catalogue only appends. A deleted item keeps its row, with
    status `deleted`, so that its id is never given again.
    """

    table: pa.Table

    @property
    def num_items(self) -> int:
        """How many items there are; also the highest item_id."""
        return self.table.num_rows

    @cached_property
    def keys(self) -> pa.Array:
        """item_key of item_id 1, 2, …"""
        return self.table["item_key"].combine_chunks()

    def with_figures(
        self, counts: np.ndarray, first_seen: np.ndarray, last_seen: np.ndarray, deleted: np.ndarray | None
    ) -> "Catalogue":
        """The same items with other figures, (num_items,) each, and the given item ids marked as deleted."""
        status = np.full(self.num_items, ACTIVE, dtype=object)
        if deleted is not None:
            status[deleted - 1] = DELETED
        columns = {"status": pa.array(status, pa.string()), "count": counts, "first_seen": first_seen, "last_seen": last_seen}
        table = self.table
        for name, values in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, pa.chunked_array([values]))
        return Catalogue(table)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify which key has which id; counts do not enter."""
        digest = hashlib.sha256(f"{self.keys.type}:{self.num_items}:".encode())
        if pa.types.is_integer(self.keys.type):
            digest.update(self.keys.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        else:
            digest.update(pc.binary_length(self.keys).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            digest.update("".join(self.keys.to_pylist()).encode())
        return digest.hexdigest()[:16]

    def first(self, num_items: int) -> "Catalogue":
        """The items with ids up to `num_items`: what this catalogue was when it had as many."""
        return Catalogue(self.table.slice(0, num_items))

    def ids_of(self, keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """int64 item_id of each key; 0 for a key the catalogue does not know."""
        positions = pc.index_in(keys, value_set=self.keys)
        return pc.add(pc.fill_null(positions, -1).cast(pa.int64()), 1).to_numpy(zero_copy_only=False)

    def keys_of(self, item_ids: np.ndarray) -> list[str | int]:
        """Keys of item ids, in their order."""
        return self.keys.take(pa.array(np.asarray(item_ids, dtype=np.int64) - 1)).to_pylist()


def build_catalogue(
    items: pa.Table, parent: Catalogue | None = None, first_ids: Literal["appearance", "count"] = "appearance"
) -> Catalogue:
    """A catalogue of the given items; those of `parent` keep their ids, new ones are appended.

    New items are ordered by (first_seen, item_key), so the ids depend on the events and not on how
    they were read; so they do with `first_ids` of `count`, which without a parent puts the more
    frequent items before all that.

    Args:
        items: item_key, count, first_seen, last_seen; one row per item, in any order.
        parent: the catalogue to extend; its rows stay as they are.

    Raises:
        CatalogueError: the parent's keys are of another type.
    """
    if parent is not None and parent.keys.type != items["item_key"].type:
        raise CatalogueError(
            f"the parent catalogue has {parent.keys.type} keys, the log {items['item_key'].type}; prepare without dataset.parent"
        )
    new = items.filter(pc.equal(pa.array((parent or _empty(items)).ids_of(items["item_key"])), 0))
    by_count = [("count", "descending")] if first_ids == "count" and parent is None else []
    new = new.sort_by([*by_count, ("first_seen", "ascending"), ("item_key", "ascending")])
    first_id = parent.num_items + 1 if parent else 1
    appended = pa.table(
        {
            "item_id": pa.array(np.arange(first_id, first_id + new.num_rows, dtype=np.int64)),
            "item_key": new["item_key"],
            "status": pa.array([ACTIVE] * new.num_rows, pa.string()),
            **{name: new[name].cast(pa.int64()) for name in ("count", "first_seen", "last_seen")},
        }
    )
    if parent is None:
        return Catalogue(appended.combine_chunks())
    return Catalogue(pa.concat_tables([parent.table, appended]).combine_chunks())


def _empty(items: pa.Table) -> Catalogue:
    return Catalogue(items.slice(0, 0))


def as_keys(text: pa.Array, kind: pa.DataType) -> pa.Array:
    """Keys written as text, in the type of the log's keys.

    Raises:
        ConfigError: the log's keys are integers and a text is none.
    """
    try:
        return text.cast(kind)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"a key is no {kind}, which the log's keys are: {error}") from None


def save_catalogue(catalogue: Catalogue, url: str) -> dict[str, Any]:
    """Write the catalogue below the directory `url`; returns the manifest entry of its file."""
    return storage.write_table(storage.join(url, "part-00000.parquet"), catalogue.table)


def load_catalogue(url: str) -> Catalogue:
    """Read the catalogue below the directory `url`; the caller has verified its manifest.

    Raises:
        CatalogueError: the ids are not 1..num_items in order.
    """
    table = pa.concat_tables(storage.read_table(file) for file in storage.expand(url)).combine_chunks()
    if not np.array_equal(table["item_id"].to_numpy(), np.arange(1, table.num_rows + 1)):
        raise CatalogueError(
            f"{url}: item ids are not 1..{table.num_rows:,} in order; the catalogue was written by something else"
        )
    return Catalogue(table)
