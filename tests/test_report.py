"""The report is one page that stands alone, says the figures it was given, and escapes what it was told."""

import itertools
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from lrurec_dist.report.page import RunFacts, build_page
from lrurec_dist.report.svg import WIDTH, bar_chart, interval_chart, line_chart, number, share_bar, ticks

EVIL = "<script>alert('x')</script>&\"><img src=x onerror=y>"
VOID = {"meta", "link", "br", "img", "hr", "input"}
SHAPES = {"line", "circle", "rect", "polyline"}


class Page(HTMLParser):
    """Reads a page strictly: what is opened is closed, in order. Keeps tags, attributes, text and the cells of tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def interval(value: float | None, low: float | None = None, high: float | None = None, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, **more}


def figures(**changes: Any) -> dict[str, Any]:
    names = ("recall@10", "ndcg@10", "mean_rank")
    metrics = {
        "model": dict(zip(names, (interval(0.25, 0.2, 0.3), interval(0.125, 0.1, 0.15), interval(31.5, 30, 33)), strict=True)),
        "popularity": dict(zip(names, (interval(0.05, 0.04, 0.06), interval(0.03), interval(1234.5)), strict=True)),
    }
    return {
        "name": f"LRURec {EVIL}",
        "models": ["model", "popularity"],
        "users": 4321,
        "unseen_targets": 17,
        "unknown_targets": 0,
        "trained_targets": 0,
        "split": {"kind": "leave_last_out"},
        "trained": {"kind": "leave_last_out"},
        "exclude_history": True,
        "bootstrap": 1000,
        "metrics": metrics,
        "differences": {"popularity": {name: interval(0.2, 0.1, 0.3, beyond_noise=name == "recall@10") for name in names}},
        "lists": {"coverage@10": 0.75, "ece": 0.0625},
        "reliability": [{"users": 5, "confidence": 0.3, "hit_rate": 0.4}],
        "segments": [
            {"scheme": scheme, "segment": segment, "users": 12, "metrics": metrics}
            for scheme, segment in (("history length", "1 to 4"), ("history length", "5 to 9"), ("user", "trained"))
        ],
        "audit": {"train_users": 4000},
        "previous": None,
        **changes,
    }


def facts(**changes: Any) -> RunFacts:
    shares = {"waiting_share": 0.1, "forward_share": 0.5, "backward_share": 0.3}
    training = [
        {"step": step, "loss": 5 / step, "learning_rate": 0.1, "targets_per_s": 1000.0 * step, **shares} for step in (50, 100)
    ]
    options: dict[str, Any] = {
        "title": f"night {EVIL}",
        "about": [("run", EVIL)],
        "evaluations": [figures()],
        "training": training,
        "validation": [{"step": 100, "recall@10": 0.2, "ndcg@10": 0.1}],
        "decays": [[0.9, 0.99], [0.8, 0.5]],
        "lengths": [("1", 3), ("2–3", 4)],
        "popularity": [("1", 7)],
        "data": [("users", 4000), ("items", 600)],
        "configuration": f"run_dir: {EVIL}",
        "previous": None,
    }
    return RunFacts(**{**options, **changes})


def test_the_page_says_the_figures_with_their_intervals() -> None:
    page = Page(build_page(facts()))
    assert ["recall@10", "0.250.2 … 0.3", "0.050.04 … 0.06"] in page.rows
    assert ["mean rank", "31.530 … 33", "1,234.5"] in page.rows, "without an interval there is the value alone"
    assert ["recall@10", "0.2 ≠0.1 … 0.3"] in page.rows
    assert ["ndcg@10", "0.2 ≈0.1 … 0.3"] in page.rows
    assert ["1 to 4", "12", "0.250.2 … 0.3", "0.050.04 … 0.06"] in page.rows
    assert ["train users", "4,000"] in page.rows
    assert "recall@10 by user" not in page.text, "of one segment there is nothing to compare"
    text = " ".join(page.text)
    for said in ("4,321 users", "17 targets never occur", "largest 0.99000", "1,000 replicates", "forward 50%", "other 10%"):
        assert said in text, said


def test_metrics_stand_in_the_order_of_their_k() -> None:
    names = ("mean_rank", "mrr@5", "ndcg@10", "ndcg@5", "recall@10", "recall@5")  # as sorted keys of JSON are
    metrics = {model: dict.fromkeys(names, interval(0.5)) for model in ("model", "popularity")}
    more = {**figures(), "metrics": metrics, "differences": {"popularity": metrics["model"]}}
    rows = [row[0] for row in Page(build_page(facts(evaluations=[more]))).rows]
    begin = rows.index("recall@5")
    assert rows[begin : begin + 6] == ["recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr@5", "mean rank"]


def test_what_a_run_is_called_cannot_become_markup() -> None:
    html = build_page(facts(previous=(EVIL, None), evaluations=[figures(), figures(split={"kind": "global_time"})]))
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "".join(page.text).count(EVIL) >= 5


def test_the_page_needs_nothing_from_anywhere() -> None:
    html = build_page(facts(previous=("/runs/before", "../before/report.html")))
    assert not re.search(r"https?:|url\(|@import", html)
    tags = Page(html).tags
    assert not any("src" in attributes for _, attributes in tags)
    links = [attributes["href"] for _, attributes in tags if "href" in attributes]
    assert links == ["../before/report.html"]


def test_the_run_before_is_linked_and_its_difference_shown() -> None:
    previous = {
        "name": "LRURec, step 9",
        "users": 4000,
        "users_with_another_target": 21,
        "now": {"recall@10": interval(0.25)},
        "before": {"recall@10": interval(0.24)},
        "differences": {"recall@10": interval(0.01, -0.01, 0.03, beyond_noise=False)},
    }
    page = Page(build_page(facts(previous=("/runs/before", None), evaluations=[figures(previous=previous)])))
    assert ["recall@10", "0.25", "0.24", "0.01 ≈-0.01 … 0.03"] in page.rows
    assert "21 for another one" in " ".join(page.text)


def test_a_model_of_another_run_has_a_report_without_training() -> None:
    page = Page(build_page(facts(training=[], validation=[], evaluations=[figures(lists={}, reliability=[], segments=[])])))
    text = " ".join(page.text)
    assert "no training of its own" in text
    assert "evaluate.list_k=0" in text


def test_every_mark_lies_inside_its_chart() -> None:
    for tag, attributes in Page(build_page(facts())).tags:
        if tag == "svg":
            width, height = (float(value) for value in str(attributes["viewbox"]).split()[2:])
        elif tag in SHAPES:
            for name, value in attributes.items():
                if name in ("x", "x1", "x2", "cx"):
                    assert 0 <= float(str(value)) <= width, (tag, attributes)
                if name in ("y", "y1", "y2", "cy"):
                    assert 0 <= float(str(value)) <= height, (tag, attributes)
                if name == "points":
                    points = [tuple(map(float, point.split(","))) for point in str(value).split()]
                    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_the_last_label_of_an_axis_ends_within_the_chart() -> None:
    charts = (
        line_chart({"loss": [(0, 1), (3600, 2)]}, title="loss", x="step", y="loss"),
        bar_chart([(label, 1) for label in ("1", "2–3", "16384–32767")], title="popularity", x="interactions", y="items"),
        interval_chart([("model", [(0.0031, 0.003, 0.0035)])], ["95 %"], title="ndcg"),
    )
    for chart, last in zip(charts, ("4,000", "16384–32767", "0.004"), strict=True):
        labels = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]+)', chart)
        assert labels[-1][1] == last
        for x, label in labels:
            assert float(x) + len(label) * 7 / 2 <= WIDTH, "a digit is 7 to 8 wide, a comma or a point half of that"


def test_a_line_goes_where_its_points_are() -> None:
    chart = line_chart({"loss": [(0, 4), (50, 2), (100, 0)]}, title="loss", x="step", y="loss")
    (line,) = re.findall(r'points="([^"]+)"', chart)
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in line.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 < y1 < y2, "a loss that falls goes down"
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)
    assert "nan" not in line_chart({"loss": [(1, math.nan), (2, 1.0), (3, math.inf)]}, title="loss", x="step", y="loss")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0031, 0.0032), (-5, 1e9), (7, 7), (0, 0)])
def test_ticks_are_few_and_hold_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    assert 2 <= len(found) <= 9
    assert all(after > before for before, after in itertools.pairwise(found))


def test_charts_of_nothing_say_so() -> None:
    for chart in (
        line_chart({"loss": []}, title="Loss", x="", y=""),
        bar_chart([("1", 0)], title="Loss", x="", y=""),
        interval_chart([("a", [None])], ["b"], title="Loss"),
    ):
        assert "Loss: nothing to show" in chart
    assert "svg" in share_bar({"waiting": 1.0}, title="Shares")


def test_numbers_read_as_people_write_them() -> None:
    assert [number(value) for value in (1234567, 0.123456, 1234.56, 0.0, math.nan)] == [
        "1,234,567",
        "0.1235",
        "1,234.6",
        "0",
        "–",
    ]
