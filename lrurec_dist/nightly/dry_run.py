"""What the nightly job would do now, and about how long it would take; nothing is changed."""

from statistics import median
from typing import Any

from lrurec_dist.config import Config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.sources import Source
from lrurec_dist.nightly.plan import (
    begin,
    check_ready,
    config_of,
    dates_to_run,
    list_sources,
    registry_of,
    root_of,
    stages_of,
)
from lrurec_dist.nightly.records import Night, NightRecord, before, read_nights
from lrurec_dist.nightly.retention import what_to_remove
from lrurec_dist.reporting import format_duration, format_table, say

_NIGHTS = 5  # earlier ones, whose median is the estimate


def describe_plan(config: Config) -> None:
    """Print, for each night and stage, what is committed and what would run, the new files, and the time and cost to expect.

    Raises:
        DataNotReadyError: the log has no partition for a night.
    """
    records, sources = read_nights(root_of(config)), list_sources(config)
    dates, missing = dates_to_run(config, records, {source.partition for source in sources})
    for date in missing:
        say(f"night {date}: has no partition, and would be left out")
    if not dates:
        say(f"night {config.night.date}: done already; nothing to do")
    expected = _expected_seconds(records, config.night.date)
    rows, hours = [], 0.0
    seen: set[str] = set()
    for position, date in enumerate(dates):
        night = begin(config, date, records)
        check_ready(config, night, sources)
        config_of(config, night)  # refuses what the night would refuse
        fresh = [source for source in _unread(night, sources) if source.url not in seen]
        seen |= {source.url for source in fresh}
        done: dict[str, Any] = next((record.status.get("stages", {}) for record in records if record.date == date), {})
        for number, stage in enumerate(stages_of(config, night, records)[0]):
            seconds = 0.0 if stage in done else expected.get(stage)
            hours += (seconds or 0.0) / 3600
            rows.append(
                [
                    f"{date} {stage}",
                    "committed" if stage in done else "would run",
                    f"{len(fresh):,} files, {sum(source.size for source in fresh):,} bytes" if number == 0 else "",
                    "unknown" if seconds is None else format_duration(seconds),
                ]
            )
        if position == 0:
            say(f"night {date}: would be merged into {night.parent or 'nothing'}, beside {night.previous or 'nothing'}")
    if rows:
        say(format_table(["night and stage", "state", "new input", "expected"], rows))
        cost = f", {hours * config.night.cost_per_hour:,.2f} at night.cost_per_hour={config.night.cost_per_hour:g}"
        say(
            f"expected: {format_duration(hours * 3600)}{cost if config.night.cost_per_hour else ''}, by the last nights' medians"
            if expected
            else "expected: unknown, since no night is done yet"
        )
    for removal in what_to_remove(records, registry_of(config), config.night.keep_nights):
        say(f"night {removal.date}: {removal.bytes / 1e6:,.1f} MB would be removed; status, report, figures and lineage stay")
    say("dry run: nothing was changed")


def _unread(night: Night, sources: list[Source]) -> list[Source]:
    """Files that the night would read: of its partitions, and not in the dataset that it is merged into."""
    known = SequenceDataset(night.parent).manifest["inputs"]["sources"] if night.parent else {}
    return [source for source in sources if source.partition <= night.partition and source.url not in known]


def _expected_seconds(records: list[NightRecord], date: str) -> dict[str, float]:
    earlier = [record.seconds for record in before(records, date) if record.result == "done"][:_NIGHTS]
    stages = {stage for seconds in earlier for stage in seconds}
    return {stage: median(seconds[stage] for seconds in earlier if stage in seconds) for stage in stages}
