"""What the channels point to, told to an MLflow model registry: a copy for those who look there, which nothing here reads back."""

import re
from typing import Any

from lrurec_dist import storage
from lrurec_dist.reporting import say
from lrurec_dist.serve.channels import CANDIDATE, CHAMPION, Pointer, read_channel
from lrurec_dist.serve.registry import version_url


def tell_mlflow(registry_url: str, name: str) -> None:
    """Point the aliases `candidate` and `champion` of a registered model to what the channels point to.

    Versions that MLflow does not have are registered, with the bundle's URL as their source and what its manifest says as
    tags. What was missed is made up for the next time. Where MLflow is and how to get in, its own environment variables
    say. Whatever goes wrong there is said, and changes nothing here.
    """
    try:
        _tell(registry_url, name)
    except ModuleNotFoundError as error:
        missing = (error.name or "mlflow").split(".")[0]  # or what its store needs
        wanted = "'lrurec-dist[mlflow]'" if missing == "mlflow" else missing
        say(f"publish.mlflow_model={name}: {missing} is not installed, so MLflow knows nothing of it; pip install {wanted}")
    except Exception as error:  # of MLflow, its store, its database or the network
        reason = re.sub(r"://[^/@\s]*@", "://…@", f"{type(error).__name__}: {error}".splitlines()[0])  # a password
        say(f"publish.mlflow_model={name}: MLflow was not told, and the registry's channels count; {reason}")


def _tell(registry_url: str, name: str) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        aliases = client.create_registered_model(name, description=f"Bundles of {registry_url}").aliases
    for alias in (CANDIDATE, CHAMPION):
        pointer = read_channel(registry_url, alias).pointer
        if pointer is None:
            continue
        number = _number(client, name, version_url(registry_url, pointer.version), pointer)
        if str(aliases.get(alias)) != number:
            client.set_registered_model_alias(name, alias, number)
            say(f"{alias} of {name} in MLflow: version {number}, {pointer.version}")


def _number(client: Any, name: str, url: str, pointer: Pointer) -> str:
    """MLflow's number of a bundle, which is registered if it has none."""
    for known in client.search_model_versions(f"name='{name}'"):
        if known.source == url and known.tags.get("manifest_sha256") == pointer.manifest_sha256:
            return str(known.version)
    manifest = storage.read_manifest(url, verify=False)
    tags = {"bundle": pointer.version, "manifest_sha256": pointer.manifest_sha256, "decision": pointer.decision}
    for fact in ("dataset", "catalogue_fingerprint", "num_items", "parent", "git_revision"):
        tags[fact] = manifest[fact]
    for metric, figures in manifest["metrics"].items():
        key = metric.replace("@", "_at_")  # which MLflow takes
        tags |= {key: figures["value"], f"{key}_low": figures["low"], f"{key}_high": figures["high"]}
    known = {tag: str(value) for tag, value in tags.items() if value not in (None, "")}
    return str(client.create_model_version(name, source=url, tags=known).version)
