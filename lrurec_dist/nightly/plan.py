"""Which nights run, what each begins with, its configuration and its stages."""

import dataclasses
from collections.abc import Iterable
from datetime import date, datetime, timedelta

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.data.sources import Source, resolve_sources
from lrurec_dist.data.tables import pin_table
from lrurec_dist.errors import ConfigError, DataNotReadyError
from lrurec_dist.nightly.records import Night, NightRecord, before, night_url
from lrurec_dist.serve.channels import CHAMPION, read_channel
from lrurec_dist.stages import Stage


def root_of(config: Config) -> str:
    """The directory of all nights."""
    return config.night.root or config.run_dir


def registry_of(config: Config) -> str:
    """The registry of all nights."""
    return config.bundle.registry or storage.join(root_of(config), "registry")


def check_settings(config: Config) -> None:
    """Refuse settings that nights cannot have.

    Raises:
        ConfigError: naming them.
    """
    if not config.night.date:
        raise ConfigError("night.date is not set; give the date of the night to run, e.g. night.date=2026-11-21")
    if not config.log.path:
        raise ConfigError("log.path is not set, and a night reads partitions; give a log with a partition a day")
    places = {
        "dataset.dir": config.dataset.dir,
        "recommend.dir": config.recommend.dir,
        "recommend.bundle": config.recommend.bundle,
        "states.dir": config.states.dir,
        "states.bundle": config.states.bundle,
        "evaluate.model": config.evaluate.model,
        "log.to_partition": config.log.to_partition,
    }
    for setting, value in places.items():
        if value:
            raise ConfigError(f"{setting}={value}: each night has its own; leave it empty")
    if 0 < config.night.warm_steps < config.train.validate_every:
        raise ConfigError(
            f"night.warm_steps={config.night.warm_steps}: is below train.validate_every={config.train.validate_every}, so nights after "
            f"the first would choose no checkpoint; set train.validate_every={config.night.warm_steps} or lower, or take more steps"
        )
    if config.night.from_date and not config.night.catch_up:
        raise ConfigError(f"night.from_date={config.night.from_date}: contradicts night.catch_up=false; give one of them")


def partition_of_night(config: Config, night: str) -> str:
    """The newest partition that a night reads."""
    return _spelled(config, date.fromisoformat(night) - timedelta(days=config.night.lag_days))


def _spelled(config: Config, day: date) -> str:
    return day.strftime(config.night.partition_format)


def _end_of(config: Config, night: str) -> str:
    """The first partition that a night does not read any more."""
    return _spelled(config, date.fromisoformat(night) + timedelta(days=1 - config.night.lag_days))


def list_sources(config: Config) -> list[Source]:
    """All files of the log up to the night's newest partition.

    Raises:
        DataNotReadyError: there is none.
    """
    log = config.log
    table = pin_table(log.path, log_format=log.format, snapshot=log.snapshot, partition_column=log.partition_column)
    return resolve_sources(
        log.path,
        log_format=log.format,
        partition_column=log.partition_column,
        from_partition=log.from_partition,
        to_partition=_end_of(config, config.night.date),
        table=table,
    )


def dates_to_run(config: Config, records: list[NightRecord], partitions: Iterable[str]) -> tuple[list[str], list[str]]:
    """Dates of the nights to run, in order, and of missed ones that have no partition.

    The last one is `night.date`, unless it is done. With `night.from_date` these are all that are
    neither done nor refused from there on; with `night.catch_up` those after the last one that
    committed a dataset, since what later ones read contains what an earlier one would have trained on.
    """
    settings, there = config.night, set(partitions)
    last = date.fromisoformat(settings.date)
    if settings.from_date:
        first = date.fromisoformat(settings.from_date)
    else:
        newest = next((record.date for record in before(records, settings.date) if record.dataset), None)
        first = date.fromisoformat(newest) + timedelta(days=1) if newest and settings.catch_up else last
    over = {record.date for record in records if first.isoformat() <= record.date <= settings.date and record.lineage}
    dates: list[str] = []
    missing: list[str] = []
    for day in (first + timedelta(days=number) for number in range((last - first).days)):
        text = day.isoformat()
        if text not in over:
            (dates if partition_of_night(config, text) in there else missing).append(text)
    done = next((record for record in records if record.date == settings.date and record.result == "done"), None)
    return dates + ([] if done else [settings.date]), missing


def check_ready(config: Config, night: Night, sources: list[Source]) -> None:
    """See that a night's partition is there and that the files it reads belong to whole partitions.

    Raises:
        DataNotReadyError: it is not.
    """
    fresh = {source.partition for source in sources if night.parent_partition < source.partition <= night.partition}
    if night.partition not in fresh:
        raise DataNotReadyError(
            f"night.date={night.date}: partition {config.log.partition_column}={night.partition} of {config.log.path} is not there; "
            f"the last one before it is {max((source.partition for source in sources if source.partition < night.partition), default='none')}"
        )
    if config.night.ready_file:
        directories = {source.url.rpartition("/")[0] for source in sources if source.partition in fresh}
        for directory in sorted(directories):
            if not storage.exists(storage.join(directory, config.night.ready_file)):
                raise DataNotReadyError(
                    f"night.ready_file={config.night.ready_file}: {directory} has none, so it is being written"
                )


def begin(config: Config, night: str, records: list[NightRecord]) -> Night:
    """What a night begins with: the newest dataset and the serving night before it, or the same as before once it has a dataset."""
    known = next((record for record in records if record.date == night and record.dataset), None)
    if known is not None and known.night is not None:
        return known.night
    parent = next((record for record in before(records, night) if record.dataset and record.night), None)
    return Night(
        date=night,
        partition=partition_of_night(config, night),
        parent=parent.dataset if parent else config.dataset.parent,
        parent_partition=parent.night.partition if parent and parent.night else "",
        previous=_last_good(config, night, records) or config.train.warm_start,
    )


def _last_good(config: Config, night: str, records: list[NightRecord]) -> str:
    """Run directory of the night whose bundle serves; if that is a later one or none of ours, of the newest promoted one."""
    earlier = list(before(records, night))
    if not config.night.publish:
        return next((record.url for record in earlier if record.result == "done"), "")
    champion = read_channel(registry_of(config), CHAMPION).pointer
    serving = next((record for record in earlier if champion and record.published.get("version") == champion.version), None)
    found = serving or next((record for record in earlier if record.published.get("promoted")), None)
    return found.url if found else ""


def config_of(config: Config, night: Night) -> Config:
    """The configuration of a night's run."""
    settings, train = config.night, config.train
    warm = bool(night.previous) and settings.warm_start
    earliest, latest = _times(config, night)
    return dataclasses.replace(
        config,
        run_dir=night_url(root_of(config), night.date),
        log=dataclasses.replace(config.log, to_partition=_end_of(config, night.date), min_time=earliest, max_time=latest),
        dataset=dataclasses.replace(config.dataset, parent=night.parent, rebuild=config.dataset.rebuild and bool(night.parent)),
        train=dataclasses.replace(
            train,
            warm_start=night.previous if warm else "",
            new_item_vectors=train.new_item_vectors if warm else "",
            max_steps=settings.warm_steps if warm and settings.warm_steps else train.max_steps,
        ),
        evaluate=dataclasses.replace(config.evaluate, previous=config.evaluate.previous or night.previous or "none"),
        bundle=dataclasses.replace(config.bundle, registry=registry_of(config)),
    )


def _times(config: Config, night: Night) -> tuple[str, str]:
    """Between which times the rows of new files have to lie: `log.min_time` and `log.max_time`."""
    log, settings = config.log, config.night
    earliest, latest = log.min_time, log.max_time
    if log.timestamp_unit == "position":
        return earliest, latest
    if not earliest and night.parent_partition and settings.late_days >= 0 and not config.dataset.rebuild:
        last_known = datetime.strptime(night.parent_partition, settings.partition_format).date()
        earliest = (last_known + timedelta(days=1 - settings.late_days)).isoformat()
    if not latest and settings.future_days >= 0:
        latest = (date.fromisoformat(night.date) + timedelta(days=1 + settings.future_days - settings.lag_days)).isoformat()
    return earliest, latest


def stages_of(config: Config, night: Night, records: list[NightRecord]) -> tuple[list[Stage], str]:
    """The stages of a night in order, and the later night whose bundle must not be replaced, if there is one."""
    stages: list[Stage] = ["prepare", "train", "evaluate", "bundle"]
    later = next((record.date for record in records if record.date > night.date and record.published.get("promoted")), "")
    if not later and config.night.publish:
        stages.append("publish")
    if not later and config.night.states:
        stages.append("states")
    if not later and config.night.recommend:
        stages.append("recommend")
    return stages, later
