"""The first stage of a night: the log becomes a dataset, and a table says what became of its rows."""

import math
from dataclasses import asdict, replace

import numpy as np

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.data.audit import SplitAudit, stored_audit
from lrurec_dist.data.events import EventRules, parse_time
from lrurec_dist.data.filters import Filters, filter_dataset
from lrurec_dist.data.prepare import PrepareOptions, prepare_dataset
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import Split, describe_split, resolve_split
from lrurec_dist.data.synthetic import write_synthetic_log
from lrurec_dist.errors import DataNotReadyError
from lrurec_dist.ray_session import RaySession
from lrurec_dist.reporting import Status, format_table, progress_of, say

STAGES = ("read", "number", "merge", "filter", "commit", "all")  # in the order of their seconds in the table
UNFILTERED = ".unfiltered"  # beside a filtered dataset: everything, which the next night is merged into


def prepare(config: Config, status: Status, session: RaySession) -> None:
    """Prepare the dataset of a run, or find it prepared, and commit the stage."""
    log = config.log
    path = log.path or write_synthetic_log(storage.join(config.run_dir, "log"), **asdict(config.synthetic))
    say(f"prepare: reading {path}")
    synthetic = {"user_column": "user_id", "item_column": "item_id", "timestamp_column": "timestamp", "timestamp_unit": "s"}
    columns = {name: getattr(log, name) for name in synthetic} if log.path else synthetic
    unit = columns["timestamp_unit"]
    rules = EventRules(
        keep=tuple(log.keep),
        since=parse_time(log.since, unit, "log.since"),
        until=parse_time(log.until, unit, "log.until"),
        late_before=parse_time(log.min_time, unit, "log.min_time"),
        future_from=parse_time(log.max_time, unit, "log.max_time"),
        max_key_bytes=log.max_key_bytes,
        **columns,
    )
    tolerance = math.floor(log.duplicate_tolerance) if unit == "position" else round(log.duplicate_tolerance * 1e6)
    # The cap counts what is left when duplicates are gone, and what is to be quarantined has to be there.
    cap_after_filters = tolerance > 0 or log.users_above_cap == "quarantined"
    options = PrepareOptions(
        log_path=path,
        log_format=log.format,
        snapshot=log.snapshot,
        partition_column=log.partition_column,
        from_partition=log.from_partition,
        to_partition=log.to_partition,
        rules=rules,
        max_rejected_share=log.max_rejected_share,
        drop_duplicates=log.duplicates == "drop",
        max_user_events=0 if cap_after_filters else log.max_user_events,
        shards=config.dataset.shards,
        parent=config.dataset.parent,
        rebuild=config.dataset.rebuild,
        deleted_users=config.dataset.deleted_users,
        deleted_items=config.dataset.deleted_items,
        first_ids=config.dataset.first_ids,
        resources=config.dataset.resources,
    )
    settings = config.dataset
    filters = Filters(
        duplicate_tolerance=tolerance,
        max_user_events=log.max_user_events if cap_after_filters else 0,
        users_above_cap=log.users_above_cap,
        drop_repeats=settings.drop_repeats,
        min_item_count=settings.min_item_count,
        min_user_events=settings.min_user_events,
        k_core=settings.k_core,
    )
    if filters.active:
        parent = SequenceDataset(settings.parent).catalogue if settings.parent else None
        before = f"{settings.parent}{UNFILTERED}" if settings.parent else ""
        everything = replace(options, parent=before, first_ids="appearance")
        base, _ = prepare_dataset(f"{config.dataset_url}{UNFILTERED}", everything, progress_of("prepare"), session.connect)
        dataset, was_there = filter_dataset(
            config.dataset_url, base, filters, parent, session.connect, settings.first_ids, settings.resources
        )
    else:
        dataset, was_there = prepare_dataset(config.dataset_url, options, progress_of("prepare"), session.connect)
    facts = dataset.manifest
    if was_there:
        say(f"prepare: skipped, {config.dataset_url} holds this log's dataset")
    if table := facts["inputs"].get("table"):
        say(f"prepare: read snapshot {table['snapshot']} of the {table['format']} table {table['location']}")
    rows = [
        ["rows read", facts["rows_read"]],
        *([f"rejected: {reason}", count] for reason, count in facts["rows_rejected"].items()),
        *([f"filtered, {reason}", count] for reason, count in facts["rows_filtered"].items()),
        *([f"dropped, {reason}", count] for reason, count in facts["events_dropped"].items()),
        *([f"quarantined, {reason}", count] for reason, count in facts["events_quarantined"].items()),
        *([["users quarantined", facts["users_quarantined"]]] if facts["users_quarantined"] else []),
        *([["interactions of the parent", facts["interactions_of_parent"]]] if facts["interactions_of_parent"] else []),
        ["interactions", facts["interactions"]],
        ["users", facts["users"]],
        ["users too short to evaluate (train only)", facts["users_too_short_to_evaluate"]],
        ["items", facts["num_items"]],
        ["new items", facts["new_items"]],
        *([f"length, percentile {p}", facts["length_percentiles"][p]] for p in ("50", "90", "99", "100")),
        *(
            [f"{end} interaction", _moment(value, facts["time_unit"])]
            for end, value in zip(("first", "last"), facts["time_range"], strict=True)
        ),
        ["bytes of sequences", dataset.sequence_bytes],
    ]
    if not was_there:
        rows += [
            ["bytes read", facts["bytes_read"]],
            ["bytes written", facts["bytes_written"]],
            *([f"seconds, {stage}", f"{facts['seconds'][stage]:,.2f}"] for stage in STAGES if stage in facts["seconds"]),
        ]
    say(format_table(["dataset", "figure"], rows))
    for note in facts["schema_notes"]:
        say(f"prepare: {note}")
    if not was_there:
        rate = facts["rows_read"] / max(facts["seconds"]["all"], 1e-9)
        say(f"prepare: {rate:,.0f} rows/s {facts['prepared']}, {config.dataset_url}")
    audit(dataset, resolve_split(dataset, **asdict(config.split)), "prepare", session)
    status.commit("prepare", storage.fingerprint(facts["inputs"]), {"dataset": config.dataset_url})


def audit(dataset: SequenceDataset, split: Split, stage: str, session: RaySession) -> SplitAudit:
    """Print the audit of a split, which is made unless the dataset has it."""
    found, was_there = stored_audit(dataset, split, progress_of(stage), session.connect, session.data_resources)
    say(
        f"{stage}: split {describe_split(split, dataset.manifest['time_unit'])}; audited{' before' if was_there else ''}, "
        "nothing of a later part trains"
    )
    about = ("users", "interactions", "items", "train", "validation", "test")  # the first words of counts, in the table's order
    names = sorted(found.counts, key=lambda name: (about.index(name.split("_")[0]), name))
    say(format_table(["split", "count"], [[name.replace("_", " "), found.counts[name]] for name in names]))
    return found


def open_dataset(url: str) -> SequenceDataset:
    """The dataset that an earlier preparation left.

    Raises:
        DataNotReadyError: there is none.
    """
    if not storage.is_committed(url):
        raise DataNotReadyError(f"dataset {url} does not exist; run jobs/prepare.py first")
    return SequenceDataset(url)


def _moment(stored: int, unit: str) -> str:
    """A stored time as a person reads it."""
    return f"position {stored:,}" if unit == "position" else f"{np.datetime64(stored, 'us')}Z"
