"""Conditions on a log's rows: `column op value`, from text to masks."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lrurec_dist.data.normalise import Mask, decoded, mask_of
from lrurec_dist.errors import ConfigError, DataQualityError

_COMPARISONS = {
    "==": pc.equal,
    "!=": pc.not_equal,
    ">=": pc.greater_equal,
    ">": pc.greater,
    "<=": pc.less_equal,
    "<": pc.less,
}
_CONDITION = re.compile(
    r'^\s*("[^"]+"|[^\s=!<>"\[\]]+)\s*(==|!=|>=|<=|>|<|(?<=[\s"])(?:not\s+in|in)(?=[\s\[]))\s*(\S.*?)\s*$', re.DOTALL
)
_BARE = r"""[^\s"'\[\],=!<>](?:[^"'\[\],=!<>]*[^\s"'\[\],=!<>])?"""
_VALUE = rf""""[^"]*"|'[^']*'|{_BARE}"""
_VALUES = re.compile(rf"\s*(?:{_VALUE})\s*(?:,\s*(?:{_VALUE})\s*)*")
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_EXAMPLE = 'e.g. event == click, rating >= 4, country in [DE, FR], "user agent" != "bot, old"'


@dataclass(frozen=True)
class Condition:
    """What a row has to satisfy to be read."""

    text: str
    column: str
    operator: str  # == != >= > <= < in, not in
    values: tuple[int, ...] | tuple[float, ...] | tuple[str, ...]  # several for in and not in

    def evaluate(self, column: pa.ChunkedArray) -> tuple[Mask, Mask]:
        """Where the condition is not satisfied, and where that cannot be told.

        Null satisfies nothing. Numbers are compared as numbers, also with text that spells one (as
        float64); text that spells none cannot be compared. Other text is compared as text.

        Raises:
            DataQualityError: the column holds numbers and the condition text, or is nested or binary.
        """
        column = decoded(column)
        kind = column.type
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            raise DataQualityError(
                f"log.keep={self.text}: column {self.column} is {kind}; compare numbers, text, times or booleans"
            )
        if isinstance(self.values[0], str):
            if numeric:
                raise DataQualityError(f"log.keep={self.text}: column {self.column} is {kind}; compare it with a number")
            return _where_not(self._satisfied(column.cast(pa.large_string()))), None
        if numeric:
            return _where_not(self._satisfied(column)), None
        text = column.cast(pa.large_string())
        spells_number = pc.match_substring_regex(text, _NUMBER)
        numbers = pc.if_else(spells_number, text, None).cast(pa.float64())
        unreadable = mask_of(pc.invert(spells_number))
        unsatisfied = _where_not(self._satisfied(numbers))
        return unsatisfied if unreadable is None or unsatisfied is None else _or_none(unsatisfied & ~unreadable), unreadable

    def _satisfied(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        if self.operator in _COMPARISONS:
            return _COMPARISONS[self.operator](column, self.values[0])
        scalars: Any = pa.array(self.values)
        if pa.types.is_large_string(column.type):
            scalars = scalars.cast(pa.large_string())
        elif not pa.types.is_integer(column.type) or pa.types.is_floating(scalars.type):
            column, scalars = column.cast(pa.float64()), scalars.cast(pa.float64())
        else:
            column = column.cast(pa.int64())
        found = pc.is_in(column, scalars)
        return pc.and_(pc.invert(found), column.is_valid()) if self.operator == "not in" else found


def _where_not(satisfied: pa.ChunkedArray) -> Mask:
    return mask_of(pc.invert(pc.fill_null(satisfied, False)))


def _or_none(mask: np.ndarray) -> Mask:
    return mask if mask.any() else None


def parse_condition(text: str) -> Condition:
    """The condition that `text` spells: `column op value`, with a list in brackets for in and not in.

    Bare words that spell numbers are numbers; in quotes they are text. A column's name stands in
    double quotes where it holds spaces or operators.

    Raises:
        ConfigError: `text` is no condition.
    """
    match = _CONDITION.match(text)
    if match is None:
        raise ConfigError(
            f"log.keep={text}: a condition is `column op value` with op one of {', '.join(_COMPARISONS)}, in, not in; {_EXAMPLE}"
        )
    column, operator, value = match[1].strip('"'), " ".join(match[2].split()), match[3]
    in_brackets = value.startswith("[") and value.endswith("]")
    if in_brackets != (operator in ("in", "not in")):
        raise ConfigError(f"log.keep={text}: in and not in take a list in brackets, the other operators one value; {_EXAMPLE}")
    values = _parse_values(value[1:-1] if in_brackets else value, text)
    if len(values) > 1 and not in_brackets:
        raise ConfigError(f"log.keep={text}: {operator} takes one value; write in [{value}] or put text with commas in quotes")
    return Condition(text, column, operator, values)


def _parse_values(text: str, condition: str) -> tuple[Any, ...]:
    if not _VALUES.fullmatch(text):
        raise ConfigError(f"log.keep={condition}: {text!r} is no value; write a number, a word, text in quotes; {_EXAMPLE}")
    words = re.findall(_VALUE, text)
    if all(re.match(_NUMBER, word) for word in words):
        return tuple(int(word) if re.fullmatch(r"[+-]?\d{1,18}", word) else float(word) for word in words)
    return tuple(word[1:-1] if word[0] in "\"'" else word for word in words)
