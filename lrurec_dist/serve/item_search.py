"""Items by a part of their key or title, for a person who types; and the titles, where there are any."""

from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from lrurec_dist import storage
from lrurec_dist.errors import ConfigError
from lrurec_dist.serve.item_keys import ItemKeys, Key


def read_titles(url: str) -> dict[Key, str]:
    """Titles by item key, from a Parquet file with the columns item_key and title.

    Raises:
        ConfigError: no such file, or other columns.
    """
    try:
        table = storage.read_table(url, columns=["item_key", "title"])
        columns = [table[name].to_pylist() for name in ("item_key", "title")]
    except (FileNotFoundError, KeyError, pa.ArrowException) as reason:
        raise ConfigError(
            f"serve.titles={url}: has to be a Parquet file with the columns item_key and title; {type(reason).__name__}"
        ) from None
    return {key: str(title) for key, title in zip(*columns, strict=True) if title is not None}


def find_items(item_keys: ItemKeys, titles: Mapping[Key, str], text: str, most: int) -> list[Key]:
    """Keys of at most `most` items whose key or title holds `text`, whatever its case; those that begin with it first."""
    keys = item_keys.keys.cast(pa.large_string())
    found: dict[Key, None] = {}
    for match in (pc.starts_with, pc.match_substring):
        places = pc.indices_nonzero(match(keys, text, ignore_case=True))[:most]
        found |= dict.fromkeys(item_keys.keys.take(places).to_pylist())
    found |= dict.fromkeys(_titled(item_keys, titles, text.casefold(), most))
    return list(found)[:most]


def _titled(item_keys: ItemKeys, titles: Mapping[Key, str], text: str, most: int) -> Iterator[Key]:
    for key, title in titles.items():
        if text in title.casefold() and item_keys.find([key]):
            yield key
            most -= 1
            if not most:
                return
