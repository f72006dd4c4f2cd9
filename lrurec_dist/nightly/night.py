"""The nightly job: every night that is due, in order, under one lease."""

import time
from dataclasses import replace

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.data.sources import Source
from lrurec_dist.errors import GateRefusedError, StoppedError
from lrurec_dist.nightly.dry_run import describe_plan
from lrurec_dist.nightly.lease import Lease, held
from lrurec_dist.nightly.lineage import write_lineage
from lrurec_dist.nightly.plan import (
    begin,
    check_ready,
    check_settings,
    config_of,
    dates_to_run,
    list_sources,
    registry_of,
    root_of,
    stages_of,
)
from lrurec_dist.nightly.records import STAGE, NightRecord, night_url, pin, read_nights
from lrurec_dist.nightly.retention import apply, what_to_remove
from lrurec_dist.reporting import Status, describe, say
from lrurec_dist.run_directory import run_metrics
from lrurec_dist.signals import interrupt, on_sigterm
from lrurec_dist.stages import Stage, run

LEASE = "lease.json"  # below the root


def run_nights(config: Config) -> None:
    """Run `night.date` and what is to be caught up before it; nothing happens if all of it is done.

    `<root>/status.json` has the outcome of the last such command, as every run has of its own.

    Raises:
        LeaseError: another process runs nights of this root.
        DataNotReadyError: the night's partition is not there; nothing was changed.
        GateRefusedError: the night's bundle was refused; what served before goes on serving.
        LrurecError: as the stages raise.
    """
    check_settings(config)
    if config.night.dry_run:
        describe_plan(config)
        return
    root = root_of(config)
    try:
        with (
            on_sigterm(interrupt),
            held(storage.join(root, LEASE), f"night {config.night.date}", config.night.lease_s) as lease,
        ):
            status = Status(root)
            try:
                _run_due(config, lease, status)
            except BaseException as error:
                status.failed(_stopped(config) if isinstance(error, KeyboardInterrupt) else error)
                raise
            status.done(night=config.night.date)
    except KeyboardInterrupt as error:
        raise _stopped(config) from error


def _stopped(config: Config) -> StoppedError:
    return StoppedError(
        f"night.date={config.night.date}: stopped between stages; the same command goes on from what is committed"
    )


def _run_due(config: Config, lease: Lease, status: Status) -> None:
    root = root_of(config)
    status.running(f"{config.night.date} plan")
    records, sources = read_nights(root), list_sources(config)
    dates, missing = dates_to_run(config, records, {source.partition for source in sources})
    for date in missing:
        say(f"night {date}: has no partition, and is left out; files that come late are merged by the night that finds them")
    if not dates:
        say(f"night {config.night.date}: done already, {night_url(root, config.night.date)}; nothing to do")
        return
    refused: GateRefusedError | None = None
    for date in dates:
        refused = None  # the last night decides how the command ends
        try:
            _run_night(replace(config, night=replace(config.night, date=date)), sources, lease, status)
        except GateRefusedError as error:
            say(f"night {date}: {error}")
            refused = error
    lease.check()
    for removal in what_to_remove(read_nights(root), registry_of(config), config.night.keep_nights):
        apply(removal)
        say(f"night {removal.date}: removed {removal.bytes / 1e6:,.1f} MB; status, report, figures and lineage stay")
    if refused is not None:
        raise refused


def _run_night(config: Config, sources: list[Source], lease: Lease, status: Status) -> None:
    """Run one night; its lineage is written when it is over, which it is if the gate refuses."""
    root, date = root_of(config), config.night.date
    records = read_nights(root)
    night = begin(config, date, records)
    check_ready(config, night, sources)
    stages, later = stages_of(config, night, records)
    say(f"night {date}: {' → '.join(stages)}; merged into {night.parent or 'nothing'}, beside {night.previous or 'nothing'}")
    if later:
        say(f"night {date}: night {later} was published since, so this one's bundle does not go to serving")
    pin(root, night)
    settings = config_of(config, night)
    laps = _Laps(settings)

    def before(stage: Stage) -> None:
        laps.end("done")
        lease.check()
        status.running(f"{date} {stage}")
        say(f"night {date}: {stage} begins")
        laps.begin(stage)

    try:
        run(settings, stages, before)
    except GateRefusedError:
        laps.end("refused")
        write_lineage(config, NightRecord(date, night_url(root, date)), "refused")
        raise
    except BaseException:
        laps.end("failed")
        raise
    laps.end("done")
    lease.check()
    write_lineage(config, NightRecord(date, night_url(root, date)), "done")
    say(f"night {date}: done, {night_url(root, date)}")


class _Laps:
    """Writes how long each stage took, and how it ended, into the run's metrics."""

    def __init__(self, config: Config) -> None:
        self._config, self._stage = config, ""

    def begin(self, stage: str) -> None:
        self._stage, self._started = stage, time.perf_counter()

    def end(self, result: str) -> None:
        """Nothing happens between stages."""
        if self._stage:
            seconds = round(time.perf_counter() - self._started, 3)
            say(describe(run_metrics(self._config, self._stage).write(STAGE, result=result, seconds=seconds)))
            self._stage = ""
