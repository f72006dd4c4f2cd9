"""The report of a run as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from lrurec_dist.report.style import STYLE
from lrurec_dist.report.svg import bar_chart, interval_chart, line_chart, number, share_bar

MODEL = "model"
_AT = ("recall@10", "ndcg@10")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a report shows.

    `evaluations` are figures as a stage of evaluation keeps them, the configured split's first.
    `training` and `validation` are records of `metrics.jsonl` by step. `decays` has the moduli of
    each block's decays. `lengths` and `popularity` are (label, count) bars. `previous` is the run
    before, with a link to its report or without one.
    """

    title: str
    about: Sequence[tuple[str, str]]
    evaluations: Sequence[Mapping[str, Any]]
    training: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    decays: Sequence[Sequence[float]]
    lengths: Sequence[tuple[str, int]]
    popularity: Sequence[tuple[str, int]]
    data: Sequence[tuple[str, Any]]
    configuration: str
    previous: tuple[str, str | None] | None = field(default=None)


def build_page(facts: RunFacts) -> str:
    """The whole page; every text of the run's is escaped."""
    main = facts.evaluations[0]
    sections = [
        _section("Training", _curves(facts)),
        *(_section(f"Test, {_kind(figures)}", _evaluation(figures)) for figures in facts.evaluations),
        *([_section("Beside the run before", _previous(facts, main))] if facts.previous else []),
        _section("Who is served how well", _segments(main)),
        _section("What is recommended", _lists(main)),
        _section("Memory of the model", _decays(facts.decays)),
        _section("Throughput", _throughput(facts.training)),
        _section("Data", _data(facts, main)),
        _section("Configuration", f"<details><summary>All settings</summary><pre>{escape(facts.configuration)}</pre></details>"),
    ]
    about = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.about)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(facts.title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(facts.title)}</h1><dl class='about'>{about}</dl>{_tiles(main)}</header>"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _card(title: str, content: str, note: str = "") -> str:
    about = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}{about}</figure>"


def _cards(*cards: str) -> str:
    return f'<div class="cards">{"".join(cards)}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], marked: int = -1) -> str:
    """A table whose first column is text and whose others are figures; row `marked` stands out."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr{' class=marked' if index == marked else ''}>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return _with_interval(value)
    if value is None:
        return ""
    return escape(number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value))


def _with_interval(interval: Mapping[str, Any]) -> str:
    """A figure, its interval below it, and whether a difference is beyond noise."""
    if interval["value"] is None:
        return "–"
    ends = "" if interval["low"] is None else f"<small>{number(interval['low'])} … {number(interval['high'])}</small>"
    mark = ""
    if "beyond_noise" in interval:
        mark = " <b>≠</b>" if interval["beyond_noise"] else " <i>≈</i>"
    return f"{number(interval['value'])}{mark}{ends}"


def _kind(figures: Mapping[str, Any]) -> str:
    return "leave last out" if figures["split"]["kind"] == "leave_last_out" else "global time cut"


def _names(figures: Mapping[str, Any]) -> dict[str, str]:
    return {name: figures["name"] if name == MODEL else _words(name) for name in figures["models"]}


def _metrics(of_model: Mapping[str, Any]) -> list[str]:
    """Metrics in the order of tables: by kind, then by k; what has no k at the end."""
    kinds = ("recall", "ndcg", "mrr")
    with_k = [(kinds.index(kind), int(k), name) for name in of_model for kind, _, k in [name.partition("@")] if k]
    return [*(name for *_, name in sorted(with_k)), *(name for name in of_model if "@" not in name)]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _tiles(figures: Mapping[str, Any]) -> str:
    of_model = figures["metrics"][MODEL]
    best = max(figures["models"][1:], key=lambda name: figures["metrics"][name]["recall@10"]["value"])
    difference = figures["differences"][best]["recall@10"]
    tiles = [(_words(name), _with_interval(of_model[name])) for name in (*_AT, "mean_rank")]
    tiles += [(f"recall@10 minus {_words(best)}", _with_interval(difference)), ("users", number(figures["users"]))]
    return f'<div class="tiles">{"".join(f"<div><span>{escape(name)}</span><strong>{value}</strong></div>" for name, value in tiles)}</div>'


def _points(records: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]


def _curves(facts: RunFacts) -> str:
    if not facts.training:
        return _absent()
    validation = {name: _points(facts.validation, name) for name in _AT}
    return _cards(
        _card("Training loss", line_chart({"loss": _points(facts.training, "loss")}, title="Training loss", x="step", y="loss")),
        _card("Validation", line_chart(validation, title="Validation", x="step", y="metric")),
    )


def _absent() -> str:
    return '<p class="note">This run directory has no training of its own.</p>'


def _evaluation(figures: Mapping[str, Any]) -> str:
    names = _names(figures)
    charts = [
        _card(
            metric,
            interval_chart(
                [(names[model], [_triple(figures["metrics"][model][metric])]) for model in names], ["95 %"], title=metric
            ),
        )
        for metric in _AT
    ]
    metrics = _metrics(figures["metrics"][MODEL])
    rows = [[_words(metric), *(figures["metrics"][model][metric] for model in names)] for metric in metrics]
    gaps = [[_words(metric), *(figures["differences"][model][metric] for model in list(names)[1:])] for metric in metrics]
    first = [row for row in rows if row[0].endswith("@10") or "@" not in row[0]]
    noise = "≠ beyond noise: 0 lies outside the 95 % interval of the paired difference; ≈ within it."
    return (
        f'<p class="note">{escape(_about(figures))}</p>{_cards(*charts)}'
        f"{table(['metric', *names.values()], first)}"
        f"<details><summary>All metrics</summary>{table(['metric', *names.values()], rows)}</details>"
        f"<details><summary>{escape(names[MODEL])} minus each baseline, on the same users</summary>"
        f'<p class="note">{noise}</p>{table(["metric", *list(names.values())[1:]], gaps)}</details>'
    )


def _about(figures: Mapping[str, Any]) -> str:
    history = "excluded from" if figures["exclude_history"] else "among"
    text = (
        f"{figures['users']:,} users, each ranked once over the full catalogue, history {history} the candidates; "
        f"{figures['unseen_targets']:,} targets never occur in the training part. Small figures: 95 % intervals by bootstrap over "
        f"users, {figures['bootstrap']:,} replicates."
    )
    if figures["split"] != figures["trained"]:
        text += f" The model was trained by another split: {figures['trained_targets']:,} users whose target it trained on are left out."
    if figures["unknown_targets"]:
        text += f" {figures['unknown_targets']:,} targets are items that the model does not know: misses."
    return text


def _triple(interval: Mapping[str, Any]) -> tuple[float, float | None, float | None] | None:
    return None if interval["value"] is None else (interval["value"], interval["low"], interval["high"])


def _previous(facts: RunFacts, figures: Mapping[str, Any]) -> str:
    assert facts.previous is not None
    run, href = facts.previous
    link = f'<a href="{escape(href, quote=True)}">{escape(run)}</a>' if href else f"<code>{escape(run)}</code>"
    previous = figures["previous"]
    if not previous or not previous["users"]:
        return f"<p>{link}: no user of both evaluations was asked for the same item.</p>"
    rows = [
        [_words(name), previous["now"][name]["value"], previous["before"][name]["value"], previous["differences"][name]]
        for name in _metrics(previous["differences"])
    ]
    return (
        f"<p>{link}, {escape(previous['name'])}: {previous['users']:,} users of both were asked for the same item "
        f"({previous['users_with_another_target']:,} for another one, not compared).</p>"
        f"{table(['metric', 'now', 'before', 'difference'], rows)}"
    )


def _segments(figures: Mapping[str, Any]) -> str:
    names = _names(figures)
    best = max(list(names)[1:], key=lambda name: figures["metrics"][name]["recall@10"]["value"])
    shown = [MODEL, best]
    cards = []
    for scheme in dict.fromkeys(segment["scheme"] for segment in figures["segments"]):
        of_scheme = [segment for segment in figures["segments"] if segment["scheme"] == scheme]
        if len(of_scheme) == 1:  # it is everybody
            continue
        rows = [
            (segment["segment"], [_triple(segment["metrics"][model]["recall@10"]) for model in shown]) for segment in of_scheme
        ]
        chart = interval_chart(rows, [names[model] for model in shown], title=f"recall@10 by {scheme}")
        cells = [
            [segment["segment"], segment["users"], *(segment["metrics"][model]["recall@10"] for model in shown)]
            for segment in of_scheme
        ]
        figures_of = table([scheme, "users", *(names[model] for model in shown)], cells)
        cards.append(_card(f"recall@10 by {scheme}", f"{chart}<details><summary>Figures</summary>{figures_of}</details>"))
    return _cards(*cards)


def _lists(figures: Mapping[str, Any]) -> str:
    if not figures["lists"]:
        return '<p class="note">Not measured: evaluate.list_k=0.</p>'
    points = [(bucket["confidence"], bucket["hit_rate"]) for bucket in figures["reliability"]]
    chart = line_chart(
        {_names(figures)[MODEL]: points, "calibrated": [(0, 0), (1, 1)]},
        title="Predicted probability of the first item and how often it is right",
        x="predicted",
        y="hit rate",
    )
    notes = {
        "coverage": "share of the catalogue that is in some list",
        "arp": "average recommendation popularity: training interactions of a recommended item",
        "popularity_lift": "relative to the histories' own; 0 is no popularity bias",
        "novelty": "mean self-information, bits",
        "confidence": "mean predicted probability of the first item",
        "hit_rate": "how often it is the target",
        "ece": "expected calibration error",
    }
    rows = [[f"{_words(name)}: {notes[name.split('@')[0]]}", value] for name, value in figures["lists"].items()]
    return _cards(_card("Calibration of the first item", chart), _card("Lists", table(["", "value"], rows)))


def _decays(decays: Sequence[Sequence[float]]) -> str:
    cards = []
    for block, moduli in enumerate(decays, start=1):
        low = math.floor(min(moduli) * 20) / 20
        width = (1 - low) / 20
        counts = [sum(low + width * index <= value < low + width * (index + 1) for value in moduli) for index in range(20)]
        bars = [(f"{low + width * index:.3f}", count) for index, count in enumerate(counts)]
        longest = max(moduli)
        cards.append(
            _card(
                f"Block {block}: |λ| of {len(moduli):,} hidden units",
                bar_chart(bars, title=f"|λ| of block {block}", x="|λ|", y="units"),
                f"largest {longest:.5f}: of an event {_half_life(longest)} events ago it holds half",
            )
        )
    return _cards(*cards)


def _half_life(modulus: float) -> str:
    return number(round(math.log(0.5) / math.log(modulus))) if 0 < modulus < 1 else "no"


def _throughput(training: Sequence[Mapping[str, Any]]) -> str:
    if not training:
        return _absent()
    names = [name for name in training[-1] if name.endswith("_share") and name != "padding_share"]
    shares = {name.removesuffix("_share"): sum(record.get(name, 0.0) for record in training) / len(training) for name in names}
    shares["other"] = max(0.0, 1 - sum(shares.values()))
    rate = line_chart({"targets": _points(training, "targets_per_s")}, title="Targets per second", x="step", y="targets/s")
    return _cards(
        _card("Targets per second", rate), _card("Where a step's time goes", share_bar(shares, title="Shares of a step"))
    )


def _data(facts: RunFacts, figures: Mapping[str, Any]) -> str:
    audit = [[_words(name), count] for name, count in sorted(figures["audit"].items())]
    return _cards(
        _card("Lengths of sequences", bar_chart(facts.lengths, title="Users by length", x="interactions", y="users")),
        _card("Popularity of items", bar_chart(facts.popularity, title="Items by interactions", x="interactions", y="items")),
        _card("Dataset", table(["", "figure"], facts.data)),
        _card("Audit: nothing of a later part trains", table([f"split, {_kind(figures)}", "count"], audit)),
    )
