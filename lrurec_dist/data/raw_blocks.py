"""What every reader of a log gives, whatever the file's format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lrurec_dist.data.normalise import Mask
from lrurec_dist.errors import DataQualityError


@dataclass(frozen=True)
class RawBlock:
    """Some consecutive rows of a file."""

    table: pa.Table  # the columns that were asked for, of the rows that could be parsed
    rows: np.ndarray  # int64, their row numbers in the file
    malformed: pa.Table  # what could not be parsed: see `malformed_lines`
    originals: Callable[[np.ndarray], pa.Table]  # all the file holds of the rows at these positions in `table`, rising
    wrong_type: Mask = None  # rows with a key or time of a type that is none; it reads as null


@dataclass(frozen=True)
class Columns:
    """The columns of a file that are read."""

    user: str
    item: str
    time: str
    conditions: dict[str, str]  # text of a condition -> its column

    @property
    def names(self) -> list[str]:
        """Each column once."""
        return list(dict.fromkeys((self.user, self.item, self.time, *self.conditions.values())))

    def check(self, url: str, present: Sequence[str], *, conditions: bool = True) -> None:
        """See that a file has each column once.

        Raises:
            DataQualityError: it has not.
        """
        settings = {"log.user_column": self.user, "log.item_column": self.item, "log.timestamp_column": self.time}
        asked = [(f"{setting}={column}", column) for setting, column in settings.items()]
        if conditions:
            asked += [(f"log.keep={text}", column) for text, column in self.conditions.items()]
        for setting, column in asked:
            if column not in present:
                raise DataQualityError(f"{setting}: {url} has no column {column}; it has {', '.join(present) or 'none'}")
            if list(present).count(column) > 1:
                raise DataQualityError(f"{setting}: {url} has several columns {column}; rename all but one where it is written")


def raw_lines(lines: Sequence[bytes]) -> pa.Table:
    """Lines as they stand in a file: `_line` large_string, bytes that are not UTF-8 as escapes."""
    return pa.table({"_line": pa.array([line.decode(errors="backslashreplace") for line in lines], pa.large_string())})


def malformed_lines(lines: Sequence[bytes] = (), rows: np.ndarray | Sequence[int] = ()) -> pa.Table:
    """Lines that are no rows: `_line` and `_row` int64."""
    return raw_lines(lines).append_column("_row", pa.array(rows, pa.int64()))
