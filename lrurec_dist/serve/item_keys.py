"""Item keys to item ids and back, a request at a time."""

from collections.abc import Iterable, Sequence
from numbers import Integral

import pyarrow as pa

from lrurec_dist.errors import LrurecError

Key = str | int


class ItemKeys:
    """The catalogue of a bundle, to be looked up by key: some 150 bytes an item of text."""

    def __init__(self, keys: pa.Array, titles: pa.Array | None = None) -> None:
        self.keys, self.titles = keys, titles  # of item_id 1, 2, …
        self._ids = {key: item_id for item_id, key in enumerate(keys.to_pylist(), 1)}
        self.integers = pa.types.is_integer(keys.type)

    def find(self, keys: Iterable[Key]) -> list[int]:
        """Ids of those keys that the catalogue knows, in their order.

        Raises:
            LrurecError: a key is not of the catalogue's type.
        """
        keys = list(keys)
        if not all(isinstance(key, Integral if self.integers else str) for key in keys):
            raise LrurecError(f"item keys have to be {self.keys.type}, as in this bundle's catalogue; got {keys[:3]}")
        return [item_id for key in keys if (item_id := self._ids.get(key)) is not None]

    def key_of(self, item_id: int) -> Key:
        """The key of an item_id from 1 on."""
        key: Key = self.keys[item_id - 1].as_py()
        return key

    def title_of(self, key: Key) -> str | None:
        """The title of an item that the catalogue knows, if it has one."""
        title: str | None = None if self.titles is None else self.titles[self._ids[key] - 1].as_py()
        return title

    def keys_of(self, item_ids: Sequence[int]) -> list[Key]:
        """The keys of item ids from 1 on."""
        return self.keys.take(pa.array([item_id - 1 for item_id in item_ids], pa.int64())).to_pylist()
