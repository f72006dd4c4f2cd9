"""What a bundle says of itself: where it comes from, and the model card."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from lrurec_dist import __version__

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = ("torch", "safetensors", "pyarrow", "ray", "deepspeed", "onnx", "onnxruntime")


def libraries() -> dict[str, str]:
    """Versions of Python, this package and of what it computes and writes with, as far as installed."""
    found = {"python": platform.python_version(), "lrurec_dist": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The commit of the checkout this package runs from, `-dirty` behind it if files differ from it; None without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()  # noqa: S603

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an environment inside of another checkout is none of it
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def with_intervals(metrics: dict[str, Any], name: str) -> dict[str, dict[str, float | None]]:
    """{"value", "low", "high"} of each metric of the model called `name`; null ends where no interval is known."""
    known = metrics.get("intervals", {}).get(name, {})
    return {
        metric: {"value": value, "low": known.get(metric, {}).get("low"), "high": known.get(metric, {}).get("high")}
        for metric, value in metrics[name].items()
    }


def model_card(manifest: dict[str, Any], config: dict[str, Any], metrics: dict[str, Any], lineage: dict[str, Any]) -> str:
    """The Markdown page for people who get the bundle."""
    shape, rounding = config["model"], manifest["rounding"]
    rows = "".join(
        f"| {name} | {figures['value']:.5f} | {_ends(figures)} | {metrics['popularity'][name]:.5f} |\n"
        for name, figures in with_intervals(metrics, "model").items()
    )
    largest = metrics["largest_decay_modulus"]
    exports = ", ".join(manifest["exports"]) or "none"
    return f"""# {manifest["version"]}

LRURec, {shape["blocks"]} blocks, dim {shape["dim"]}, hidden {shape["hidden"]}; {manifest["num_items"]:,} items.
Trained on windows of {config["max_length"]} interactions. The largest decay modulus is {largest:.5f}: of an event
that lies {config["max_length"]} steps back, a state carried without end still holds up to {largest ** config["max_length"]:.2g},
which re-encoding the window does not.

Test figures over {metrics["users"]:,} users, full catalogue, split {metrics.get("split", {}).get("kind", "leave_last_out")}, histories {"excluded from" if config["exclude_history"] else "among"} the candidates,
of the model in float32, with 95 % intervals by bootstrap over users:

| metric | model | from – to | popularity |
|---|---|---|---|
{rows}
Item rows are stored as {manifest["table_dtype"]} and are float32 again once loaded. Beside the trained rows that moves a score by
{rounding["largest"]:.2g} at most and {rounding["mean"]:.2g} in the mean, where the largest is {rounding["largest_score"]:.3g}; {rounding["same_best"]:.1%} of the histories keep
their best item ({rounding["histories"]} golden histories, all items). The golden answers are those of the stored rows, and are
replayed within {manifest["golden_tolerance"]:g} of the larger of score and one.

Data: {lineage["interactions"]:,} interactions of {lineage["users"]:,} users, from {len(lineage["sources"])} file(s); checkpoint at step {lineage["step"]:,}.
Catalogue {manifest["catalogue_fingerprint"]}, dataset {manifest["dataset"] or "unknown"}, code {manifest["git_revision"] or "not from a checkout"}.
Trained on from: {manifest["parent"] or "nothing"}. Exports: {exports}.
"""


def _ends(figures: dict[str, float | None]) -> str:
    low, high = figures["low"], figures["high"]
    return "" if low is None or high is None else f"{low:.5f} – {high:.5f}"
