"""Log files made directly, and what reading them gives."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lrurec_dist import storage
from lrurec_dist.data.events import EventBlock, EventRules, read_unit
from lrurec_dist.data.sources import Source, read_units, resolve_sources

COLUMNS = ["user_id", "item_id", "time"]


def rules(**changed: Any) -> EventRules:
    """Rules for the columns `user_id`, `item_id`, `time` (in seconds), without conditions."""
    defaults: dict[str, Any] = {"user_column": "user_id", "item_column": "item_id", "timestamp_column": "time"}
    return EventRules(**(defaults | {"timestamp_unit": "s"} | changed))


def sources_of(path: str | Path) -> list[Source]:
    return resolve_sources(str(path), log_format="auto", partition_column="date", from_partition="", to_partition="")


def read_blocks(path: str | Path, unit_bytes: int = 1 << 40, **changed: Any) -> list[EventBlock]:
    """All blocks of a log; every row of each is accounted for."""
    blocks = [block for unit in read_units(sources_of(path), unit_bytes) for block in read_unit(unit, rules(**changed))]
    for block in blocks:
        assert block.rows_read == block.events.num_rows + block.quarantined.num_rows + sum(block.filtered.values())
        assert block.events.column_names == ["user_key", "item_key", "timestamp"]
        assert [block.events[name].null_count for name in block.events.column_names] == [0, 0, 0]
        assert block.quarantined.column_names[-3:] == ["_reason", "_source", "_row"]
        assert all(block.filtered.values())
    return blocks


def events_of(blocks: list[EventBlock]) -> list[tuple[Any, Any, int]]:
    return [tuple(row.values()) for block in blocks for row in block.events.to_pylist()]


def reasons_of(blocks: list[EventBlock]) -> dict[int, str]:
    """Row number -> reason."""
    return {row["_row"]: row["_reason"] for block in blocks for row in block.quarantined.select(["_row", "_reason"]).to_pylist()}


def filtered_of(blocks: list[EventBlock]) -> dict[str, int]:
    total: dict[str, int] = {}
    for block in blocks:
        for reason, count in block.filtered.items():
            total[reason] = total.get(reason, 0) + count
    return total


def write_parquet(path: str | Path, columns: Any, **options: Any) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return str(path)


def write_text(path: str | Path, text: str | bytes) -> str:
    storage.write_bytes(str(path), text.encode() if isinstance(text, str) else text)
    return str(path)
