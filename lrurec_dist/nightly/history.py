"""The last nights as a table, from their own files."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from lrurec_dist import storage
from lrurec_dist.errors import DataNotReadyError
from lrurec_dist.nightly.records import NightRecord, read_nights
from lrurec_dist.reporting import format_table, say
from lrurec_dist.run_directory import exit_code_after


def main(arguments: Sequence[str], *, description: str) -> int:
    """Print the table, or one JSON object a night, and return the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("root", help="directory of the nights: night.root")
    parser.add_argument("--last", type=int, default=14, help="so many nights (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a night instead of the table")
    parsed = parser.parse_args(arguments)

    def tell() -> None:
        nights = [describe_night(record) for record in history(storage.absolute(parsed.root), parsed.last)]
        say("\n".join(json.dumps(night) for night in nights) if parsed.json else nights_table(nights))

    return exit_code_after(tell)


def history(root: str, last: int) -> list[NightRecord]:
    """The last nights that were begun, the earliest first.

    Raises:
        DataNotReadyError: there is none.
    """
    records = read_nights(root)[:last]
    if not records:
        raise DataNotReadyError(f"{root}: has no nights; give the directory that night.root names")
    return records[::-1]


def describe_night(record: NightRecord) -> dict[str, Any]:
    """What is known of a night: figures are None where it did not get so far."""
    lineage = record.lineage
    dataset = lineage.get("dataset") or (storage.read_manifest(record.dataset, verify=False) if record.dataset else {})
    evaluation = lineage.get("evaluation", {})
    beside = evaluation.get("beside_previous")
    return {
        "date": record.date,
        "state": record.result,
        "events": dataset.get("rows_read"),
        "new_items": dataset.get("new_items"),
        "recall@10": evaluation["model"]["recall@10"] if evaluation else None,
        "difference": beside["recall@10"]["value"] if beside else None,
        "low": beside["recall@10"]["low"] if beside else None,
        "high": beside["recall@10"]["high"] if beside else None,
        "hours": sum(record.seconds.values()) / 3600,
        "serving": lineage.get("serving") or None,
        "error": record.status.get("error") if not lineage or lineage["result"] == "refused" else None,
    }


def nights_table(nights: Sequence[dict[str, Any]]) -> str:
    """The table; below it the errors of the nights that have one."""
    rows = [
        [
            night["date"],
            night["state"],
            *("" if night[name] is None else night[name] for name in ("events", "new_items", "recall@10")),
            "" if night["difference"] is None else _signed(night["difference"]),
            "" if night["low"] is None else f"{_signed(night['low'])} to {_signed(night['high'])}",
            f"{night['hours']:.2f}",
            night["serving"] or "as before",
        ]
        for night in nights
    ]
    header = ["night", "state", "events", "new items", "recall@10", "against yesterday", "95 %", "hours", "serving"]
    errors = [f"{night['date']}: {night['error']}" for night in nights if night["error"]]
    return "\n".join([format_table(header, rows), *errors])


def _signed(value: float) -> str:
    return f"{value:+.5f}"
