"""Bundles that a stranger may have written: what is stored, what is said of it, and what is refused before it is read."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lrurec_dist import storage
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import BundleError
from lrurec_dist.reporting import Status
from lrurec_dist.serve.bundle import GoldenAnswers, load_bundle, save_bundle
from lrurec_dist.serve.recommender import Recommender
from lrurec_dist.serve.stored_table import TABLE_DTYPES, as_stored, loaded_rows, stored_tensors
from lrurec_dist.stages import parent_version
from tests.datasets import write_dataset
from tests.test_recommender import HISTORIES, MAX_LENGTH, NUM_ITEMS, SHAPE, answers, build_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(str(tmp_path_factory.mktemp("data")), HISTORIES, NUM_ITEMS)


def write(registry: str, dataset: SequenceDataset, *, table_dtype: str = "float32", **changes: Any) -> str:
    model = build_model()
    figures = {"model": {"recall@10": 0.5}, "popularity": {"recall@10": 0.1}, "users": 4, "largest_decay_modulus": 0.99}
    arguments: dict[str, Any] = {
        "date": "2026-01-02",
        "model": model,
        "model_arguments": SHAPE,
        "max_length": MAX_LENGTH,
        "exclude_history": True,
        "catalogue": dataset.catalogue.table,
        "catalogue_fingerprint": dataset.catalogue.fingerprint,
        "golden": GoldenAnswers(
            [dataset.catalogue.keys_of(history) for history in HISTORIES], *answers(as_stored(model, table_dtype), True)
        ),
        "metrics": {**figures, "intervals": {"model": {"recall@10": {"value": 0.5, "low": 0.41, "high": 0.59}}}},
        "lineage": {"interactions": 29, "users": 4, "sources": {}, "step": 7, "dataset_identity": "d1"},
        "table_dtype": table_dtype,
    }
    return save_bundle(registry, **{**arguments, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dataset: SequenceDataset) -> Path:
    return Path(write(str(tmp_path_factory.mktemp("registry")), dataset))


@pytest.fixture
def copy(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / storage.MANIFEST).read_text())
    change(manifest)
    (bundle / storage.MANIFEST).write_text(json.dumps(manifest))


def replace(bundle: Path, name: str, data: bytes) -> None:
    """Change a file and sign it, as somebody could who may write to the registry."""
    (bundle / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": storage.sha256(data)}
    change_manifest(bundle, lambda manifest: manifest["files"].update({name: entry}))


def change_config(bundle: Path, **changes: Any) -> None:
    config = json.loads((bundle / "config.json").read_text())
    model = {**config["model"], **{name: value for name, value in changes.items() if name in config["model"]}}
    others = {name: value for name, value in changes.items() if name not in model}
    replace(bundle, "config.json", json.dumps({**config, **others, "model": model}).encode())


@pytest.mark.parametrize("table_dtype", TABLE_DTYPES)
def test_a_bundle_answers_to_the_bit_as_the_model_with_its_rows_rounded_as_stored(
    tmp_path: Path, dataset: SequenceDataset, table_dtype: str
) -> None:
    url = write(str(tmp_path), dataset, table_dtype=table_dtype)
    stored = as_stored(build_model(), table_dtype)
    bundle = load_bundle(url)
    assert {name: value.dtype for name, value in bundle.model.state_dict().items()} == dict.fromkeys(
        stored.state_dict(), torch.float32
    )
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in bundle.model.state_dict().items())
    Recommender(bundle).check_golden()
    item_bytes = (Path(url) / "model.safetensors").read_bytes()
    assert load(item_bytes)["table.weight"].dtype == getattr(torch, table_dtype)


def test_golden_answers_of_the_float_rows_are_refused_beside_coarser_ones(tmp_path: Path, dataset: SequenceDataset) -> None:
    golden = GoldenAnswers([dataset.catalogue.keys_of(history) for history in HISTORIES], *answers(build_model(), True))
    with pytest.raises(BundleError, match="golden request"):
        Recommender.load(write(str(tmp_path), dataset, table_dtype="int8", golden=golden))


@pytest.mark.parametrize(("table_dtype", "bound"), [("bfloat16", 1 / 256), ("int8", 1 / 254)])
def test_stored_rows_are_off_by_no_more_than_is_said(table_dtype: str, bound: float) -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    rows[4] *= 1e-41  # below the smallest normal number
    rows[5] *= 1e30
    off = (loaded_rows(stored_tensors(rows, table_dtype)) - rows).abs()
    reference = rows.abs() if table_dtype == "bfloat16" else rows.abs().amax(1, keepdim=True)
    assert (off <= bound * (1 + 1e-5) * reference + 1e-40).all()  # rounding of the scale and of the product; denormal numbers
    assert off[6:].max() > 1e-4, "nothing was rounded"


def test_manifest_and_card_say_where_it_comes_from_how_good_it_is_and_what_rounding_moves(
    tmp_path: Path, dataset: SequenceDataset
) -> None:
    url = write(str(tmp_path), dataset, table_dtype="int8", parent="2026-01-01-0123")
    manifest = load_bundle(url).manifest
    assert (manifest["schema_version"], manifest["parent"], manifest["dataset"]) == (2, "2026-01-01-0123", "d1")
    assert manifest["metrics"] == {"recall@10": {"value": 0.5, "low": 0.41, "high": 0.59}}
    assert manifest["libraries"]["torch"] == torch.__version__
    assert manifest["git_revision"] is None or len(manifest["git_revision"].removesuffix("-dirty")) == 40
    model, stored = build_model(), as_stored(build_model(), "int8")
    scores = [
        torch.cat([one.encode(torch.tensor([history[-MAX_LENGTH:]])) for history in HISTORIES]) @ one.item_rows().T
        + one.table.bias
        for one in (model, stored)
    ]
    off = (scores[0] - scores[1]).abs()[:, 1:]
    assert manifest["rounding"]["largest"] == pytest.approx(float(off.max()), rel=1e-3)
    assert manifest["rounding"]["mean"] == pytest.approx(float(off.mean()), rel=1e-3)
    card = (Path(url) / "README.md").read_text()
    for fact in (
        "stored as int8",
        f"{manifest['rounding']['largest']:.2g} at most",
        "0.41000 – 0.59000",
        "2026-01-01-0123",
        "within 0.0001 of",
    ):
        assert fact in card
    assert load_bundle(write(str(tmp_path), dataset)).manifest["rounding"]["largest"] == 0


def test_the_parent_is_the_bundle_of_the_run_that_training_began_from(tmp_path: Path) -> None:
    Status(str(tmp_path)).commit("bundle", "inputs", {"url": "somewhere", "version": "2026-01-01-0123"})
    assert parent_version(str(tmp_path)) == parent_version(f"{tmp_path}/checkpoints/step_000010") == "2026-01-01-0123"
    assert parent_version("") == parent_version(f"{tmp_path}/elsewhere") == ""


def test_a_bundle_may_lie_in_any_store(dataset: SequenceDataset) -> None:
    url = write("memory://registry", dataset, table_dtype="bfloat16")
    assert Recommender.load(url).num_items == NUM_ITEMS


def test_titles_come_along_and_make_another_version_where_the_catalogue_has_them(
    tmp_path: Path, dataset: SequenceDataset, whole: Path
) -> None:
    versions = {whole.name}
    for titles in ([*"abcdefghijklmnopqrs", None], [*"abcdefghijklmnopqrt", None], ["a"] + [None] * (NUM_ITEMS - 1)):
        column = pa.array(titles, pa.large_string())
        url = write(str(tmp_path), dataset, catalogue=dataset.catalogue.table.append_column("title", column))
        bundle = load_bundle(url)
        assert bundle.item_titles is not None
        assert bundle.item_titles.to_pylist() == titles
        assert bundle.manifest["titles"] == NUM_ITEMS - titles.count(None)
        assert bundle.manifest["catalogue_fingerprint"] == dataset.catalogue.fingerprint
        versions.add(bundle.version)
    assert len(versions) == 4
    without = load_bundle(str(whole))
    assert without.item_titles is None
    assert "titles" not in without.manifest


def test_files_that_the_manifest_does_not_list_are_not_looked_at(copy: Path) -> None:
    (copy / "exports").mkdir()
    (copy / "exports" / "more.bin").write_bytes(b"x")
    (copy / "pipe").symlink_to("/dev/zero")
    assert load_bundle(str(copy)).version


ENTRY = {"bytes": 4, "sha256": storage.sha256(b"here")}


@pytest.mark.parametrize(
    "name",
    ["../canary", "/etc/hostname", "golden/../../canary", "C:\\canary", "a\\..\\b", "file:///etc/hostname", "s3://b/c", "", "."],
)
def test_a_name_that_leaves_the_directory_is_refused_and_not_read(copy: Path, name: str) -> None:
    (copy.parent / "canary").write_bytes(b"here")
    change_manifest(copy, lambda manifest: manifest["files"].update({name: ENTRY}))
    with pytest.raises(BundleError, match="leaves the directory"), only_below(copy):
        load_bundle(str(copy))


def test_a_link_that_leaves_the_directory_is_refused_and_not_read(copy: Path) -> None:
    (copy.parent / "canary").write_bytes(b"here")
    (copy / "link").symlink_to("../canary")
    change_manifest(copy, lambda manifest: manifest["files"].update({"link": ENTRY}))
    with pytest.raises(BundleError, match="a link that leaves the directory"), only_below(copy):
        load_bundle(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(schema_version=3), "schema_version=3, this code reads 2"),
        (lambda manifest: manifest.update(schema_version=True), "schema_version=True"),
        (lambda manifest: manifest.update(version="../../x"), "version='../../x' is none"),
        (lambda manifest: manifest["files"].pop("config.json"), "does not list config.json"),
        (lambda manifest: manifest["files"]["model.safetensors"].update(bytes=1 << 60), "expected 1,152,921,504,606,846,976"),
        (lambda manifest: manifest["files"]["README.md"].update(bytes=-1), "without size and SHA-256"),
        (lambda manifest: manifest["files"]["README.md"].update(sha256="0" * 64), "changed after the commit"),
        (lambda manifest: manifest["files"].update({"gone.bin": ENTRY}), "gone.bin is missing"),
        (lambda manifest: manifest["files"].update({"golden": ENTRY}), "is a directory"),
        (lambda manifest: manifest.update(num_items=21), "the manifest says 21"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    change_manifest(copy, change)
    with pytest.raises(BundleError, match=message):
        load_bundle(str(copy))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"parent": ""', '"parent": "", "parent": ""', "key 'parent' is given twice"),
        ('"parent": ""', '"parent": NaN', "NaN is not a finite number"),
        ('"parent": ""', '"parent": 1e999', "1e999 is not a finite number"),
        ('"parent": ""', '"parent": ' + "[" * 100_000, "is not JSON"),
    ],
)
def test_json_that_is_read_in_two_ways_is_refused(copy: Path, old: str, new: str, message: str) -> None:
    text = (copy / storage.MANIFEST).read_text()
    assert old in text
    (copy / storage.MANIFEST).write_text(text.replace(old, new))
    with pytest.raises(BundleError, match=message):
        load_bundle(str(copy))


def test_a_manifest_without_end_is_refused_after_its_first_bytes(copy: Path) -> None:
    with (copy / storage.MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)  # takes no room, and would not fit into memory
    with pytest.raises(BundleError, match=r"is larger than 4,194,304 bytes"):
        load_bundle(str(copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 12}, "do not fit together"),
        ({"num_items": 2**31 - 2, "dim": 1 << 16}, "a model of this shape has"),
        ({"hidden": 1 << 16}, "a model of this shape has"),
        ({"blocks": 10**9}, "blocks=1000000000 is no number from 1 to 1,024"),
        ({"num_items": NUM_ITEMS - 1}, "do not fit together"),
        ({"dim": 6.0}, "dim=6.0"),
        ({"max_length": 1 << 40}, "max_length=1099511627776"),
        ({"table_dtype": "int8"}, "do not fit together"),
        ({"table_dtype": "float8"}, "table_dtype=float8"),
        ({"exclude_history": 1}, "has to have model, max_length"),
    ],
)
def test_a_shape_that_is_not_that_of_the_weights_is_refused_before_a_model_is_made(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(copy, **changes)
    with pytest.raises(BundleError, match=message):
        load_bundle(str(copy))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("table.bias", torch.full((NUM_ITEMS + 1,), torch.nan), "not finite"),
        ("recurrent.0.nu_log", torch.full((8,), -200.0), "modulus of 1 or more"),
        ("more", torch.zeros(1), "more is"),
        ("norm.bias", torch.zeros(6, dtype=torch.float64), "norm.bias is"),
    ],
)
def test_weights_that_cannot_serve_are_refused(copy: Path, name: str, value: torch.Tensor, message: str) -> None:
    tensors = load((copy / "model.safetensors").read_bytes())
    replace(copy, "model.safetensors", save({**tensors, name: value}))
    with pytest.raises(BundleError, match=message):
        load_bundle(str(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(0, 19), "19 catalogue items, but 20 item rows"),
        (lambda table: table.take(list(range(19, -1, -1))), "other item ids"),
        (lambda table: table.set_column(1, "item_key", pa.array(["same"] * 20)), "there twice"),
        (lambda table: table.set_column(1, "item_key", pa.array([None] + ["a"] * 19)), "missing"),
        (lambda table: table.drop_columns(["item_key"]), "lacks items"),
        (lambda table: table.append_column("title", pa.array([1] * 20)), "title of items is no text"),
    ],
)
def test_a_catalogue_that_does_not_fit_is_refused(
    copy: Path, dataset: SequenceDataset, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    place = storage.join(str(copy), "catalogue", "part-00000.parquet")
    storage.write_table(place, change(dataset.catalogue.table))
    replace(copy, "catalogue/part-00000.parquet", Path(place).read_bytes())
    with pytest.raises(BundleError, match=message):
        load_bundle(str(copy))


def test_a_catalogue_with_dictionaries_is_refused_since_they_may_stand_for_any_amount(
    copy: Path, dataset: SequenceDataset
) -> None:
    pq.write_table(dataset.catalogue.table, copy / "catalogue" / "part-00000.parquet", use_dictionary=["item_key"])
    replace(copy, "catalogue/part-00000.parquet", (copy / "catalogue" / "part-00000.parquet").read_bytes())
    with pytest.raises(BundleError, match="has dictionaries"):
        load_bundle(str(copy))


@pytest.mark.parametrize("history", [[1], ["i001", None], "i001", [["i001"]], [1.5]])
def test_a_golden_history_of_other_keys_is_refused(copy: Path, history: Any) -> None:
    replace(copy, "golden/requests.jsonl", (json.dumps({"history": history}) + "\n").encode() * 4)
    with pytest.raises(BundleError, match="is no history"):
        load_bundle(str(copy))


# What strangers may do, by hundreds


_watched: list[Any] = []  # paths opened, while somebody watches
_watching = [False]


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching[0] and event == "open":
        _watched.append(arguments[0])


sys.addaudithook(_audit)


class only_below:  # noqa: N801  # reads as a statement
    """Nothing beside the directory, within the folder that holds it, nor of the system's own files, is opened."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)

    def __enter__(self) -> None:
        _watched.clear()
        _watching[0] = True

    def __exit__(self, *_: object) -> None:
        _watching[0] = False
        opened = [str(path) for path in _watched if isinstance(path, str | bytes | Path)]
        beside = str(Path(self._directory).parent)
        assert not [path for path in opened if path.startswith((beside, "/etc")) and not path.startswith(self._directory + "/")]


TEXT = st.text("ab/.\\\0é", max_size=5)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["../canary", "/etc/hostname", "config.json", "", "int8", "a" * 64, "\x00", "99"])
    | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=5,
)


def edited(value: Any, draw: st.DataObject) -> Any:
    """`value` with something in it replaced, removed, renamed or added."""
    if isinstance(value, dict | list) and value and draw.draw(st.integers(0, 4)):
        key = draw.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else list(range(len(value)))))
        value = value.copy()
        match draw.draw(st.sampled_from(["into", "into", "remove", "rename"])):
            case "into":
                value[key] = edited(value[key], draw)
            case "remove":
                del value[key]
            case "rename" if isinstance(value, dict):
                value[draw.draw(st.sampled_from(["../canary", "x", "files"]) | TEXT)] = value.pop(key)
        return value
    return draw.draw(JSON)


def refused_or_loaded(bundle: Path) -> None:
    with only_below(bundle):
        try:
            Recommender.load(str(bundle))
        except BundleError:
            return


MANY = settings(
    max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@MANY
@given(draw=st.data(), name=st.sampled_from([storage.MANIFEST, "config.json", "golden/requests.jsonl"]))
def test_any_edit_of_the_json_is_refused_by_name_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, draw: st.DataObject, name: str
) -> None:
    bundle = fresh(tmp_path_factory, whole)
    first, *rest = (whole / name).read_text().splitlines() if name.endswith("l") else [(whole / name).read_text()]
    data = "\n".join([json.dumps(edited(json.loads(first), draw)), *rest]).encode()
    if name == storage.MANIFEST:
        (bundle / name).write_bytes(data)
    else:
        replace(bundle, name, data)
    refused_or_loaded(bundle)


FILES = [
    "model.safetensors",
    "catalogue/part-00000.parquet",
    "golden/expected.safetensors",
    "golden/requests.jsonl",
    "config.json",
]


@MANY
@given(
    name=st.sampled_from([*FILES, storage.MANIFEST]),
    place=st.floats(0, 1, exclude_max=True),
    head=st.booleans(),
    bit=st.integers(0, 8),
    signed=st.booleans(),
)
def test_any_flipped_bit_or_cut_end_is_refused_by_name_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, name: str, place: float, head: bool, bit: int, signed: bool
) -> None:
    bundle = fresh(tmp_path_factory, whole)
    data = bytearray((whole / name).read_bytes())
    at = int(place * (min(len(data), 300) if head else len(data)))  # the first bytes say how the others are read
    if bit == 8:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    if signed and name != storage.MANIFEST:
        replace(bundle, name, bytes(data))
        refused_or_loaded(bundle)
        return
    (bundle / name).write_bytes(data)
    if name == storage.MANIFEST:
        refused_or_loaded(bundle)
    else:
        with pytest.raises(BundleError, match="changed after the commit"):
            load_bundle(str(bundle))


def fresh(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Path:
    """The whole bundle again, beside a canary; always in the same place."""
    place = tmp_path_factory.getbasetemp() / "fuzzed"
    bundle = place / "bundle"
    if bundle.exists():
        for name in [*FILES, storage.MANIFEST]:
            (bundle / name).write_bytes((whole / name).read_bytes())
    else:
        shutil.copytree(whole, bundle)
        (place / "canary").write_bytes(b"here")
    return bundle


def test_the_watch_sees_what_is_opened_outside(tmp_path: Path) -> None:
    (tmp_path / "canary").write_bytes(b"here")
    with pytest.raises(AssertionError), only_below(tmp_path / "bundle"):
        storage.read_bytes(str(tmp_path / "canary"))
