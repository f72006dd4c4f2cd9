"""Configurations from YAML files with `key=value` on top, and back; every mistake is named."""

import dataclasses
import difflib
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.errors import ConfigError, DataNotReadyError

# Settings that change how a run is computed and how long it goes on, not what it is: a run
# directory may be continued with other values.
MAY_CHANGE = (
    "run_dir",
    "log.path",  # the dataset's manifest knows its sources better
    "log.snapshot",
    "dataset.dir",
    "dataset.resources",
    "batch.feed",
    "bundle.",
    "model.table",
    "evaluate.bootstrap",
    "evaluate.list_k",
    "evaluate.both_splits",
    "evaluate.model",
    "evaluate.previous",
    "publish.",
    "night.",
    "recommend.",
    "states.",
    "serve.",
    "train.workers",
    "train.device",
    "train.cpus_per_worker",
    "train.resources",
    "train.threads_per_worker",
    "train.zero_stage",
    "train.offload_optimizer",
    "train.offload_parameters",
    "train.activation_checkpointing",
    "train.accumulation",
    "train.track",
    "train.validate_lists",
    "train.max_steps",
    "train.max_minutes",
    "train.patience",
    "train.report_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.resume",
    "train.max_failures",
    "train.min_workers",
    "train.wait_for_workers_s",
    "train.collective_timeout_s",
    "train.max_skipped_steps",
)


def with_absolute_paths(config: Config) -> Config:
    """The configuration with local paths made absolute: workers have another working directory."""

    def resolved(url: str) -> str:
        return storage.absolute(url) if url else url

    in_catalogue = config.log.format == "iceberg" and "/" not in config.log.path
    log_path = config.log.path if in_catalogue else ",".join(resolved(part.strip()) for part in config.log.path.split(","))
    return dataclasses.replace(
        config,
        run_dir=resolved(config.run_dir),
        log=dataclasses.replace(config.log, path=log_path),
        dataset=dataclasses.replace(
            config.dataset,
            dir=resolved(config.dataset.dir),
            parent=resolved(config.dataset.parent),
            deleted_users=resolved(config.dataset.deleted_users),
            deleted_items=resolved(config.dataset.deleted_items),
        ),
        train=dataclasses.replace(
            config.train,
            warm_start=resolved(config.train.warm_start),
            new_item_vectors=resolved(config.train.new_item_vectors),
        ),
        evaluate=dataclasses.replace(
            config.evaluate,
            model=resolved(config.evaluate.model),
            previous=config.evaluate.previous if config.evaluate.previous == "none" else resolved(config.evaluate.previous),
        ),
        bundle=dataclasses.replace(
            config.bundle, registry=resolved(config.bundle.registry), titles=resolved(config.bundle.titles)
        ),
        night=dataclasses.replace(config.night, root=resolved(config.night.root)),
        recommend=dataclasses.replace(
            config.recommend,
            bundle=resolved(config.recommend.bundle),
            dir=resolved(config.recommend.dir),
            users=resolved(config.recommend.users),
        ),
        states=dataclasses.replace(config.states, bundle=resolved(config.states.bundle), dir=resolved(config.states.dir)),
        serve=dataclasses.replace(
            config.serve,
            bundle=resolved(config.serve.bundle),
            states=resolved(config.serve.states),
        ),
    )


def load_config(path: str | None = None, overrides: list[str] | None = None) -> Config:
    """The configuration in a YAML file with `key=value` overrides on top.

    Args:
        path: YAML file; None for the defaults alone.
        overrides: dotted assignments, e.g. `train.max_steps=200`.

    Raises:
        DataNotReadyError: the file does not exist.
        ConfigError: an unknown key (the nearest known one is named), a wrong type, a value that
            breaks a rule, an override that is not an assignment.
    """
    layers = [OmegaConf.structured(Config)]
    if path is not None:
        try:
            text = storage.read_bytes(path).decode()
        except FileNotFoundError:
            raise DataNotReadyError(f"configuration {path} does not exist") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: {error}") from None
        try:
            layers.append(OmegaConf.create(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from None
        if not isinstance(layers[-1], DictConfig):
            raise ConfigError(f"{path} holds a list; a configuration is a mapping of settings to values")
    for override in overrides or []:
        if "=" not in override or override.startswith(("-", "=")):
            raise ConfigError(f"{override!r} is not an override; write key=value, e.g. train.max_steps=200")
        try:
            layers.append(OmegaConf.from_dotlist([override]))
        except yaml.YAMLError:
            raise ConfigError(f"{override}: the value is not YAML; write key=value, lists as [1,5,10], text in quotes") from None
        key = override.partition("=")[0]
        if key in _SECTIONS:
            raise ConfigError(f"{override}: {key} is a group of settings; set one of them, e.g. {_SECTIONS[key]}")
    try:
        merged = OmegaConf.merge(*layers)
        config = OmegaConf.to_object(merged)
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise ConfigError(_unknown_key(str(error.full_key))) from None
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{error.full_key or path}: {reason}; see lrurec_dist/config.py for what it takes") from None
    except TypeError as error:
        raise ConfigError(f"{path} {' '.join(overrides or [])}: {error}; a list is set whole, e.g. evaluate.ks=[10,20]") from None
    assert isinstance(config, Config)
    return config


_SECTIONS = {
    section.name: f"{section.name}.{dataclasses.fields(section.default_factory)[0].name}"  # type: ignore[arg-type]
    for section in dataclasses.fields(Config)
    if dataclasses.is_dataclass(section.default_factory)
}


def to_dict(config: Config) -> dict[str, Any]:
    """The effective configuration as plain values."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The effective configuration as YAML, in the order of the dataclasses."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_dict(values: dict[str, Any]) -> Config:
    """The configuration that `to_dict` gave."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))  # type: ignore[return-value]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`setting=old -> new` for every dotted setting in which two plain configurations differ."""
    before, after = _flatten(old), _flatten(new)
    return [
        f"{key}={before.get(key, 'unset')} -> {after.get(key, 'unset')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def shaping_settings(config: Config) -> dict[str, Any]:
    """Dotted settings with their values, of those that decide what training computes after its next step."""
    sections = ("seed.", "split.", "batch.", "model.", "loss.", "train.", "evaluate.")  # evaluate: decides which step is best
    settings = _flatten(to_dict(config))
    return {key: value for key, value in settings.items() if f"{key}.".startswith(sections) and not key.startswith(MAY_CHANGE)}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _unknown_key(key: str) -> str:
    known = sorted(_flatten(to_dict(Config())) | dict.fromkeys(section.name for section in dataclasses.fields(Config)))
    same_name = [name for name in known if name.split(".")[-1] == key]  # its section was forgotten
    near = (same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]
    return f"{key}: unknown setting; the nearest known one is {near}"
