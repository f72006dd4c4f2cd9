"""The command line of a registry."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from lrurec_dist import storage
from lrurec_dist.reporting import format_table, say
from lrurec_dist.run_directory import exit_code_after
from lrurec_dist.serve.channels import CHAMPION, read_channel
from lrurec_dist.serve.gate import checks_table
from lrurec_dist.serve.mlflow_registry import tell_mlflow
from lrurec_dist.serve.registry import collect, describe_version, list_versions, rollback

_KEEP = 10
_FIGURES = ("recall@10", "ndcg@10")


def main(arguments: Sequence[str], *, description: str) -> int:
    """Parse a command line, do what it says, and return the exit code; a failure is one clear line."""
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|show|rollback|gc")
    for name, action, about in (
        ("list", _list, "every version, the newest first, with what points to it"),
        ("show", _show, "one version: its files, and the decisions about it with their numbers"),
        ("rollback", _rollback, "make the champion before, or a named version, champion again"),
        ("gc", _gc, "remove old versions that no channel needs"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("registry", help="path or URL, e.g. runs/quickstart/registry")
        command.set_defaults(action=action)
        if name == "show":
            command.add_argument("version", help="a version, or champion, or candidate")
        if name == "rollback":
            command.add_argument("version", nargs="?", help="default: the champion before")
            command.add_argument("--mlflow-model", default="", metavar="NAME", help="publish.mlflow_model, if that is set")
        if name == "gc":
            command.add_argument("--keep", type=_count, default=_KEEP, help="newest versions that stay (default: %(default)s)")
            command.add_argument("--remove", action="store_true", help="do it; without, what would go is only printed")
    parsed = parser.parse_args(arguments)
    parsed.registry = storage.absolute(parsed.registry)
    return exit_code_after(lambda: parsed.action(parsed))


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError
    return value


def _list(parsed: argparse.Namespace) -> None:
    versions = list_versions(parsed.registry)
    if not versions:
        say(f"{parsed.registry} has no versions")
        return
    rows = [
        [
            version.version,
            _moment(version.created),
            *(version.figures.get(name, "–") for name in _FIGURES),
            version.items,
            f"{version.bytes / 1e6:,.1f}",
            ", ".join(version.channels),
        ]
        for version in versions
    ]
    say(format_table(["version", "written", *_FIGURES, "items", "MB", "channels"], rows))


def _show(parsed: argparse.Namespace) -> None:
    manifest, records = describe_version(parsed.registry, parsed.version)
    facts = {name: value for name, value in manifest.items() if name != "files"}
    say(format_table(["version", ""], [[name, str(value)] for name, value in facts.items()]))
    files = [[name, entry["bytes"], entry["sha256"][:12]] for name, entry in sorted(manifest["files"].items())]
    say("\n" + format_table(["file", "bytes", "SHA-256"], files))
    for record in records:
        say("\n" + _decision(record))
    if not records:
        say("\nno decision about it")


def _decision(record: dict[str, Any]) -> str:
    champion = record["champion"]
    against = f"against {champion['version']}, generation {champion['generation']}" if champion else "without a champion"
    lines = [f"{record['name']}: {record['kind']} {against}: {record['result']}, {_moment(record['started'])}"]
    if "error" in record:
        lines.append(record["error"])
    if record.get("checks"):
        lines.append(checks_table(record["checks"]))
    return "\n".join(lines)


def _rollback(parsed: argparse.Namespace) -> None:
    before = read_channel(parsed.registry, CHAMPION).pointer
    pointer = rollback(parsed.registry, parsed.version)
    say(f"{pointer.version} is champion, generation {pointer.generation}; it was {before.version if before else 'none'}")
    if parsed.mlflow_model:
        tell_mlflow(parsed.registry, parsed.mlflow_model)


def _gc(parsed: argparse.Namespace) -> None:
    removals = collect(parsed.registry, parsed.keep, remove=parsed.remove)
    if not removals:
        say(f"nothing to remove: all versions are among the newest {parsed.keep}, or needed")
        return
    say(format_table(["version", "MB", "why"], [[gone.version, f"{gone.bytes / 1e6:,.1f}", gone.reason] for gone in removals]))
    total = sum(gone.bytes for gone in removals) / 1e6
    say(
        f"{'removed' if parsed.remove else 'would remove'} {len(removals)}, {total:,.1f} MB{'' if parsed.remove else '; --remove does it'}"
    )


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
