"""Rows of new items that somebody brings along: content embeddings, projected to the width of the item table."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lrurec_dist import storage
from lrurec_dist.data.catalogue import Catalogue
from lrurec_dist.errors import ConfigError, DataNotReadyError


def read_given_rows(url: str, catalogue: Catalogue, *, known: int, dim: int) -> dict[int, Tensor]:
    """Rows (dim,) float32 by item id of the items after the first `known` ones, as far as the file at `url` has them.

    The file is Parquet with the columns item_key and vector (a list of `dim` numbers). Items that
    are known already, and those that the catalogue does not have, are passed over.

    Raises:
        DataNotReadyError: there is no such file.
        ConfigError: its columns, keys, widths or numbers are not that; or a new item has two vectors.
    """
    setting = f"train.new_item_vectors={url}"
    if not storage.exists(url):
        raise DataNotReadyError(f"{setting}: does not exist; write the file first, or leave the setting empty")
    try:
        table = storage.read_table(url)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{setting}: is no Parquet file ({error})") from None
    missing = {"item_key", "vector"} - set(table.column_names)
    if missing:
        raise ConfigError(
            f"{setting}: has no column {min(missing)} but {', '.join(table.column_names)}; name them item_key, vector"
        )
    keys, kind = table["item_key"], catalogue.keys.type
    if pa.types.is_integer(keys.type) != pa.types.is_integer(kind):
        raise ConfigError(f"{setting}: item_key is {keys.type}, the catalogue's keys are {kind}")
    item_ids = catalogue.ids_of(keys.cast(kind))
    new = np.flatnonzero(item_ids > known)
    vectors = table["vector"].take(pa.array(new))
    try:
        widths = pc.unique(pc.list_value_length(vectors))
        numbers = pc.list_flatten(vectors).cast(pa.float32())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ConfigError(f"{setting}: vector is {table['vector'].type}; it has to be lists of numbers") from None
    if len(new) and widths.to_pylist() != [dim]:
        raise ConfigError(f"{setting}: vectors have widths {widths.to_pylist()}, model.dim={dim}; project them to that width")
    if not (numbers.null_count == 0 and np.isfinite(numbers.to_numpy()).all()):
        raise ConfigError(f"{setting}: a vector has a number that is missing, infinite or nan")
    rows = torch.from_numpy(numbers.to_numpy().reshape(len(new), dim).copy())
    found = dict(zip(item_ids[new].tolist(), rows, strict=True))
    if len(found) < len(new):
        raise ConfigError(f"{setting}: {len(new) - len(found):,} new items have more than one vector; one each")
    return found
