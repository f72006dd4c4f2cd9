"""Items by a part of their key or title, for a person who types."""

import pyarrow as pa
import pyarrow.compute as pc

from lrurec_dist.serve.item_keys import ItemKeys, Key


def find_items(item_keys: ItemKeys, text: str, most: int) -> list[Key]:
    """Keys of at most `most` items whose key or title holds `text`, whatever its case.

    Keys that begin with it come first, then titles that do, then keys and titles that hold it elsewhere.
    """
    texts = [item_keys.keys.cast(pa.large_string()), *([] if item_keys.titles is None else [item_keys.titles])]
    found: dict[Key, None] = {}
    for match in (pc.starts_with, pc.match_substring):
        for column in texts:
            places = pc.indices_nonzero(match(column, text, ignore_case=True))[:most]
            found |= dict.fromkeys(item_keys.keys.take(places).to_pylist())
            if len(found) >= most:
                return list(found)[:most]
    return list(found)
