"""What the tests know of Kubernetes: the documents of cluster/, strict checks against schemas, and KubeRay's fields."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = ROOT / "cluster" / "kubernetes"
KUBERNETES_VERSION = "1.33"

# Fields of ray.io/v1 that cluster/ uses, looked up in the schemas of this release; `make check-cluster CRDS=…` checks them,
# values included, against the schemas themselves. What a pod template holds is checked as a Pod, and ends in /.
KUBERAY = "v1.7"
_GROUP = {"rayStartParams.*", "template/"}
_CLUSTER = {
    "rayVersion",
    "authOptions.mode",
    *(f"headGroupSpec.{name}" for name in _GROUP),
    *(f"workerGroupSpecs[].{name}" for name in _GROUP | {"groupName", "replicas", "minReplicas", "maxReplicas", "resources.*"}),
}
FIELDS = {
    "RayCluster": _CLUSTER
    | {
        "enableInTreeAutoscaling",
        "autoscalerOptions.version",
        "autoscalerOptions.idleTimeoutSeconds",
        "autoscalerOptions.securityContext.allowPrivilegeEscalation",
        "autoscalerOptions.securityContext.capabilities.drop[]",
        "gcsFaultToleranceOptions.redisAddress",
        "gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.name",
        "gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.key",
    },
    "RayJob": {
        "entrypoint",
        "metadata.*",
        "backoffLimit",
        "activeDeadlineSeconds",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "submitterPodTemplate/",
        *(f"rayClusterSpec.{name}" for name in _CLUSTER),
    },
    "RayCronJob": {
        "schedule",
        "timeZone",
        "jobTemplate.clusterSelector.*",
        "jobTemplate.entrypoint",
        "jobTemplate.submitterPodTemplate/",
    },
}


def documents() -> list[tuple[str, dict[str, Any]]]:
    """Every Kubernetes document of cluster/ with `file: kind name`, the template's date set."""
    found = []
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text().replace("DATE", "2026-11-20")):
            name = document.get("metadata", {}).get("name", "")
            found.append((f"{path.name}: {document['kind']} {name}", document))
    return found


def is_ray(document: dict[str, Any]) -> bool:
    return str(document["apiVersion"]).startswith("ray.io/")


def pod_templates(document: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The pod templates of Ray's kinds, with where they are."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key in ("template", "submitterPodTemplate"):
                yield f"{place}.{key}", value
            else:
                yield from pod_templates(value, f"{place}.{key}")
    elif isinstance(document, list):
        for at, value in enumerate(document):
            yield from pod_templates(value, f"{place}[{at}]")


def pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that cluster/ starts."""
    for name, document in documents():
        if is_ray(document):
            yield from ((f"{name}{place}", template["spec"]) for place, template in pod_templates(document))
        elif document["kind"] == "CronJob":
            yield name, document["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        elif document["kind"] == "StatefulSet":
            yield name, document["spec"]["template"]["spec"]


def fields_of(value: Any, known: set[str], place: str = "") -> Iterator[str]:
    """The dotted fields of a spec as `FIELDS` writes them: lists as [], maps with free keys as .*, pod templates as /."""
    if isinstance(value, dict):
        for key, inner in value.items():
            at = f"{place}.{key}" if place else key
            if key in ("template", "submitterPodTemplate"):
                yield f"{at}/"
            elif isinstance(inner, dict) and f"{at}.*" in known:
                yield f"{at}.*"
            else:
                yield from fields_of(inner, known, at)
    elif isinstance(value, list):
        for inner in value:
            yield from fields_of(inner, known, f"{place}[]")
    else:
        yield place


def read_schemas(folder: Path) -> dict[str, dict[str, Any]]:
    """The schemas of ray.io/v1 in a folder, by kind: released CRDs, or JSON files of kind, apiVersion, schema."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            each = json.loads(path.read_text())
            if each.get("apiVersion") == "ray.io/v1":
                found[each["kind"]] = each["schema"]
        elif path.suffix in (".yaml", ".yml"):
            for crd in yaml.safe_load_all(path.read_text()):
                if crd and crd.get("kind") == "CustomResourceDefinition" and crd["spec"]["group"] == "ray.io":
                    versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"]}
                    if "v1" in versions:
                        found[crd["spec"]["names"]["kind"]] = versions["v1"]
    return found


def errors_against(schema: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """What is wrong with a document, unknown fields included, which an API server would drop in silence."""
    validator = jsonschema.Draft202012Validator(_closed(schema))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def _closed(schema: Any) -> Any:
    """A Kubernetes schema as JSON schema: objects that name their fields have no others."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if closed.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    named = isinstance(closed.get("properties"), dict) and "type" not in closed["properties"].get("properties", {})
    if closed.get("type") == "object" and named and not closed.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
