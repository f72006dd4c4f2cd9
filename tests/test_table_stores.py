"""Tables on S3, and catalogues behind HTTP: what fails in passing, and what refuses."""

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pyiceberg.catalog
import pytest
from pyiceberg.utils.config import Config as IcebergSettings

from lrurec_dist.data.tables import pin_table
from lrurec_dist.errors import ConfigError, LrurecError, TryAgainError
from tests.dirty_log import CLEAN, kept_files, prepare
from tests.tables import DATES, NIGHTS, RULES, append_delta, append_iceberg, as_parquet, night_of
from tests.tables import catalogue as catalogue


def test_a_table_on_s3_is_read_like_one_on_disk(bucket, tmp_path):
    options = {"allow_http": "true"}
    url = append_delta(f"{bucket}/events", night_of(NIGHTS[0], DATES[2]), storage_options=options)
    first, _ = prepare(tmp_path / "first", url.replace("s3://", "s3a://"), **RULES)
    append_delta(url, night_of(NIGHTS[1], DATES[0]), storage_options=options)
    merged, _ = prepare(tmp_path / "second", f"{url}/", parent=first.url, **RULES)
    log = as_parquet(tmp_path / "log", *map(night_of, NIGHTS[:2]))
    plain, _ = prepare(tmp_path / "plain", log, parent=first.url, rebuild=True, **RULES)
    assert merged.manifest["rows_read"] == len(NIGHTS[1])
    assert kept_files(merged) == kept_files(plain)


def test_a_store_that_refuses_or_fails_under_delta_is_said_as_such(bucket, s3):
    url = append_delta(f"{bucket}/events", night_of(CLEAN), storage_options={"allow_http": "true"})
    s3.order({"request": "GET .*_last_checkpoint", "times": 99, "action": "refuse", "status": 403, "code": "AccessDenied"})
    with pytest.raises(ConfigError, match=rf"^{url}: refuses to read \(.*privileges"):
        pin_table(url, log_format="delta", snapshot="", partition_column="date")
    s3.order({"request": "GET .*_last_checkpoint", "times": 1, "action": "refuse", "status": 503, "code": "SlowDown"})
    assert pin_table(url, log_format="delta", snapshot="", partition_column="date").snapshot == 0
    s3.order({"request": "GET .*_last_checkpoint", "times": 99, "action": "refuse", "status": 400, "code": "RequestTimeout"})
    with pytest.raises(TryAgainError, match=rf"^{url}: could not read the Delta log"):
        pin_table(url, log_format="delta", snapshot="", partition_column="date")


@pytest.fixture(params=["fsspec.FsspecFileIO", "pyarrow.PyArrowFileIO"])
def driver(request, catalogue, bucket, s3, monkeypatch) -> str:  # noqa: ARG001
    """The catalogue's tables lie on S3, behind one of pyiceberg's drivers."""
    monkeypatch.setenv("PYICEBERG_CATALOG__DEFAULT__WAREHOUSE", f"{bucket}/warehouse")
    monkeypatch.setenv("PYICEBERG_CATALOG__DEFAULT__PY_IO_IMPL", f"pyiceberg.io.{request.param}")
    monkeypatch.setenv("PYICEBERG_CATALOG__DEFAULT__S3__ENDPOINT", s3.endpoint)
    monkeypatch.setenv("PYICEBERG_CATALOG__DEFAULT__S3__REGION", "us-east-1")
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", IcebergSettings())
    return str(request.param)


@pytest.mark.usefixtures("no_wait")
def test_iceberg_on_s3_is_read_through_a_catalogue_and_without_and_says_why_it_cannot_be(driver, s3, tmp_path):
    table = append_iceberg(pyiceberg.catalog.load_catalog(), "shop.events", night_of(NIGHTS[0]))
    first, _ = prepare(tmp_path / "first", "shop.events", log_format="iceberg", **RULES)
    assert first.manifest["rows_read"] == len(NIGHTS[0])
    found, was_there = prepare(tmp_path / "first", table.metadata_location.replace("s3:", "s3a:"), log_format="iceberg", **RULES)
    assert (was_there, found.identity) == (True, first.identity)
    # s3fs repeats by itself, for half a minute, what fails in passing; tests of storage have it.
    failures = [(403, ConfigError, "refuses to read")] + [(503, TryAgainError, "could not read")] * ("PyArrow" in driver)
    for code, error, text in failures:
        s3.order({"request": "/warehouse/", "times": 1000, "action": "refuse", "status": code, "code": "AccessDenied"})
        with pytest.raises(error, match=rf"^shop\.events: {text}"):
            pin_table("shop.events", log_format="iceberg", snapshot="", partition_column="date")


@pytest.fixture
def rest_catalogue(monkeypatch) -> Iterator[type[http.server.BaseHTTPRequestHandler]]:
    """A catalogue behind HTTP that answers everything with the status of the handler's `status`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        status, asked = 200, 0

        def do_GET(self) -> None:
            Handler.asked += 1
            self.send_response(Handler.status)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no", "type": "no", "code": %d}}' % Handler.status)

        def log_message(self, *_: Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    monkeypatch.setenv("PYICEBERG_CATALOG__DEFAULT__URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", IcebergSettings())
    yield Handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "error", "attempts"),
    [(503, TryAgainError, 5), (500, TryAgainError, 5), (403, ConfigError, 1), (401, ConfigError, 1)],
)
@pytest.mark.usefixtures("no_wait")
def test_a_catalogue_that_fails_is_asked_again_and_one_that_refuses_is_not(
    rest_catalogue, status: int, error: type[LrurecError], attempts: int
):
    rest_catalogue.status = status
    with pytest.raises(error, match=r"^shop\.events: (could not read in 5 attempts|refuses to read)"):
        pin_table("shop.events", log_format="iceberg", snapshot="", partition_column="date")
    assert rest_catalogue.asked == attempts


def test_a_catalogue_that_nobody_described_is_a_wrong_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("PYICEBERG_HOME", str(tmp_path))
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", IcebergSettings())
    with pytest.raises(ConfigError, match=r"no Iceberg catalogue can be opened .*PYICEBERG_CATALOG__DEFAULT__URI"):
        pin_table("shop.events", log_format="iceberg", snapshot="", partition_column="date")
