"""An MLflow model registry that is told what serves: a real one, in files."""

import re
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lrurec_dist import storage
from lrurec_dist.serve.channels import CHAMPION, read_channel
from lrurec_dist.serve.gate import Check
from lrurec_dist.serve.mlflow_registry import tell_mlflow
from lrurec_dist.serve.registry import offer, version_url
from lrurec_dist.serve.registry_command import main
from tests.services import write_versions


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """An empty MLflow that the environment names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would need sqlalchemy and alembic
    return MlflowClient(f"file://{tmp_path}/mlflow", f"file://{tmp_path}/mlflow")


def aliases(client: MlflowClient) -> dict[str, str]:
    """The bundle behind each alias."""
    found = client.get_registered_model("shop").aliases
    return {alias: client.get_model_version("shop", str(number)).tags["bundle"] for alias, number in found.items()}


def test_aliases_follow_the_channels_and_a_version_is_registered_once(tmp_path: Path, mlflow_store: MlflowClient) -> None:
    registry, (first, second) = write_versions(tmp_path)
    tell_mlflow(registry, "shop")
    assert aliases(mlflow_store) == {"champion": first}
    known = mlflow_store.get_model_version_by_alias("shop", "champion")
    url = version_url(registry, first)
    sha256 = storage.file_sha256(storage.join(url, storage.MANIFEST))
    assert (known.source, known.tags["manifest_sha256"], known.tags["recall_at_10"]) == (url, sha256, "0.5")
    offer(registry, second, lambda _: ([Check("floor", 0.1, 0.2, False)], {}), {})
    tell_mlflow(registry, "shop")
    assert aliases(mlflow_store) == {"candidate": second, "champion": first}, "refused, and looked at last"
    offer(registry, second, lambda _: ([], {}), {})
    tell_mlflow(registry, "shop")
    assert aliases(mlflow_store) == {"candidate": second, "champion": second}
    assert main(["rollback", registry, "--mlflow-model", "shop"], description="") == 0
    assert aliases(mlflow_store) == {"candidate": second, "champion": first}
    assert len(mlflow_store.search_model_versions("name='shop'")) == 2


@pytest.mark.parametrize(
    ("uri", "missing", "message"),
    [
        ("http://anna:secret@127.0.0.1:9", "", "MLflow was not told, and the registry's channels count; "),
        ("sqlite:///{place}/runs.db", "alembic", "alembic is not installed, so .* pip install alembic"),
        ("file://{place}", "mlflow", r"mlflow is not installed, so .* pip install 'lrurec-dist\[mlflow\]'"),
    ],
)
def test_without_mlflow_a_version_is_champion_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uri: str, missing: str, message: str
) -> None:
    registry, (first, second) = write_versions(tmp_path)
    offer(registry, second, lambda _: ([], {}), {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(place=tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)  # what an import finds that is not there
    assert main(["rollback", registry, "--mlflow-model", "shop"], description="") == 0
    pointer = read_channel(registry, CHAMPION).pointer
    assert pointer is not None
    assert pointer.version == first
    said = capsys.readouterr().out
    assert "secret" not in said
    assert re.search(f"publish.mlflow_model=shop: {message}", said), said
