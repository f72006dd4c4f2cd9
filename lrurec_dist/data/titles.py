"""What people call an item: titles from the files of whoever keeps the items, beside the catalogue's keys."""

import re

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from lrurec_dist import storage
from lrurec_dist.data.catalogue import Catalogue
from lrurec_dist.errors import ConfigError, DataNotReadyError

LONGEST = 300  # characters of a title that are kept
_COLUMNS = ("item_key", "title")


def title_files(pattern: str) -> list[str]:
    """The files that `bundle.titles` names, in order.

    Raises:
        DataNotReadyError: there is none.
    """
    files = list(storage.expand(pattern))
    if not files:
        raise DataNotReadyError(f"bundle.titles={pattern}: no file is there; write it first, or leave the setting empty")
    return files


def read_titles(pattern: str, catalogue: Catalogue) -> pa.Array:
    """Titles of item_id 1, 2, …, as text; null for an item that no file names.

    Args:
        pattern: a file, a directory or a glob of Parquet or CSV files with the columns item_key and title. Where several
            rows name an item the last one counts, of files in the order of their names.
        catalogue: whose items are meant; the files may name others, too.

    Raises:
        DataNotReadyError: there is no such file.
        ConfigError: a file has other columns, keys of another type, or is of neither format.
    """
    table = pa.concat_tables(_read(file, catalogue.keys.type) for file in title_files(pattern))
    table = table.filter(pc.is_valid(table["item_key"]))
    # Of a key that is there twice the last row is found, since it comes first here.
    newest_first = table.take(pa.array(range(table.num_rows - 1, -1, -1), pa.int64()))
    places = pc.index_in(catalogue.keys, value_set=newest_first["item_key"])
    titles = pc.utf8_slice_codeunits(newest_first["title"], 0, LONGEST).take(places)
    return pa.concat_arrays(titles.chunks) if titles.num_chunks else pa.nulls(len(places), pa.large_string())


def _read(file: str, kind: pa.DataType) -> pa.Table:
    """item_key, of the catalogue's type, and title of one file."""
    try:
        if re.search(r"\.csv(\.\w+)?$", file.lower()):
            filesystem, path = storage.arrow_filesystem(file)
            texts = pa.csv.ConvertOptions(column_types=dict.fromkeys(_COLUMNS, pa.large_string()), include_columns=[*_COLUMNS])
            with filesystem.open_input_stream(path) as stream:  # decompressed by its name
                lines = pa.csv.ParseOptions(newlines_in_values=True)
                table = pa.csv.read_csv(stream, parse_options=lines, convert_options=texts)
        else:
            table = storage.read_table(file, columns=[*_COLUMNS])
            if pa.types.is_integer(table["item_key"].type) != pa.types.is_integer(kind):
                raise pa.ArrowInvalid(f"item_key is {table['item_key'].type}, the catalogue's keys are {kind}")
        table = table.select([*_COLUMNS]).cast(pa.schema([("item_key", kind), ("title", pa.large_string())]))
        table.validate(full=True)
    except (pa.ArrowException, KeyError) as reason:
        raise ConfigError(
            f"bundle.titles={file}: has to be Parquet or CSV with the columns item_key and title; {str(reason).splitlines()[0]}"
        ) from None
    return table
