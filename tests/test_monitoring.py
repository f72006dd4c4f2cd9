"""The dashboard and what Prometheus reads: every figure in them is one that training or Ray exports."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray.dashboard.modules.metrics.dashboards as ray_dashboards
import yaml

from lrurec_dist.train.trackers import gauge_name
from tests.datasets import chain_sequences, write_dataset
from tests.manifests import ROOT, documents, pod_specs
from tests.processes import run_ranks
from tests.trainings import NUM_ITEMS, configure, records, train_in_turn

MONITORING = ROOT / "cluster" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "training.json").read_text())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What a training exports through Ray, with the names that Prometheus finds."""
    place = tmp_path_factory.mktemp("monitoring")
    dataset = write_dataset(str(place / "dataset"), chain_sequences(100, NUM_ITEMS), NUM_ITEMS, shards=2).url
    run_ranks(1, train_in_turn, [configure(place / "run", dataset)])
    numbers = {"step"} | {
        f"{kind}/{name}"
        for kind in ("train", "validation", "checkpoint")
        for record in records(place / "run", kind)
        for name, value in record.items()
        if isinstance(value, int | float)
    }
    return {f"ray_{gauge_name(name)}" for name in numbers}


def metrics() -> set[str]:
    variables = [variable["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
    queries = variables + [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}


def test_the_dashboard_asks_for_what_training_exports(exported: set[str]) -> None:
    ours = {name for name in metrics() if name.startswith("ray_lrurec_")}
    assert len(ours) > 15
    assert ours <= exported, sorted(ours - exported)


def test_the_dashboard_asks_for_figures_of_nodes_by_the_names_that_ray_uses_itself() -> None:
    panels = (Path(ray_dashboards.__file__).parent / "default_dashboard_panels.py").read_text()
    of_nodes = {name for name in metrics() if not name.startswith("ray_lrurec_")}
    assert of_nodes
    assert {name for name in of_nodes if not re.search(rf"\b{name}\b", panels)} == set()


def test_panels_have_places_and_numbers_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)


def test_prometheus_looks_where_ray_nodes_are_and_the_network_lets_it_in() -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"]}
    kubernetes = jobs["ray-kubernetes"]
    (place,) = kubernetes["kubernetes_sd_configs"]
    assert {document["metadata"]["namespace"] for _, document in documents() if document["kind"].startswith("Ray")} == set(
        place["namespaces"]["names"]
    )
    (port_rule,) = (rule for rule in kubernetes["relabel_configs"] if rule["source_labels"][0].endswith("port_name"))
    read = {
        port["containerPort"]
        for name, spec in pod_specs()
        for port in spec["containers"][0].get("ports", [])
        if re.fullmatch(port_rule["regex"], port["name"]) and "Ray" in name
    }
    assert read == {8080, 44217, 44227}
    (nodes,) = (document for name, document in documents() if name.endswith("NetworkPolicy ray-nodes"))
    let_in = {port["port"] for rule in nodes["spec"]["ingress"] if "monitoring" in str(rule) for port in rule["ports"]}
    assert read == let_in
