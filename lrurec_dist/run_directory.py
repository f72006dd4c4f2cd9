"""Commands on a run directory: arguments to configuration, the directory's claim to one configuration, exit codes."""

import argparse
import traceback
from collections.abc import Callable, Sequence

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import MAY_CHANGE, differences, load_config, to_dict, to_yaml, with_absolute_paths
from lrurec_dist.errors import EXIT_DONE, ConfigError, LrurecError
from lrurec_dist.reporting import METRICS, MetricsFile, Status, exit_code_of, say


def run_command(arguments: Sequence[str], run: Callable[[Config], object], *, description: str, default_config: str) -> int:
    """Parse a command line, run what it configures, and return the exit code; a failure is one clear line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=default_config, help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top, e.g. train.max_steps=200")
    parsed = parser.parse_args(arguments)
    path, overrides = parsed.config, parsed.overrides
    if "=" in path:
        path, overrides = default_config, [path, *overrides]
    return exit_code_after(lambda: run(with_absolute_paths(load_config(path, overrides))))


def exit_code_after(command: Callable[[], object]) -> int:
    """Run what a command line asks for and return the exit code; a failure is one clear line."""
    try:
        command()
    except LrurecError as error:
        say(f"{type(error).__name__}: {error}")
        return exit_code_of(error)
    except Exception as error:  # the outermost boundary: what nobody foresaw keeps its traceback and gets its code
        traceback.print_exc()
        say(f"internal error, please report it with the lines above: {type(error).__name__}: {error}")
        return exit_code_of(error)
    return EXIT_DONE


def open_run(config: Config) -> Status:
    """The status of a run directory, which holds this configuration from now on.

    Raises:
        ConfigError: it holds another one.
    """
    url = storage.join(config.run_dir, "config.yaml")
    if storage.exists(url):
        differing = [line for line in differences(to_dict(load_config(url)), to_dict(config)) if not line.startswith(MAY_CHANGE)]
        if differing:
            raise ConfigError(
                f"run_dir={config.run_dir}: belongs to another configuration ({'; '.join(differing)}); choose another run_dir, or delete it"
            )
    storage.write_bytes(url, to_yaml(config).encode())
    say(f"run directory {config.run_dir}")
    return Status(config.run_dir)


def run_metrics(config: Config, stage: str, rank: int | None = None) -> MetricsFile:
    """The run's `metrics.jsonl`; every line that is written says by whom, so that lines of many runs can lie in one store.

    `run` is the directory, `night` its date, null for a run that is none, `rank` that of a training
    worker, null for the job's own process.
    """
    about = {"run": config.run_dir, "night": config.night.date or None, "stage": stage, "rank": rank}
    return MetricsFile(storage.join(config.run_dir, METRICS), **about)
