import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from lrurec_dist.config import Config
from lrurec_dist.config_data import LogConfig
from lrurec_dist.config_file import differences, from_dict, load_config, to_dict, to_yaml, with_absolute_paths
from lrurec_dist.errors import ConfigError, DataNotReadyError

CONFIG_FILES = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))

# Each setting differs from its default, one per type.
OVERRIDES = [
    "run_dir=s3://bucket/runs/a=b",
    "log.timestamp_unit=ms",
    "batch.first_item_is_target=false",
    "train.learning_rate=2e-3",
    "train.max_steps=7000",
    "evaluate.ks=[10,3]",
    'log.keep=["event == click", "country in [DE, FR]"]',
    "train.deepspeed.zero_optimization.overlap_comm=true",
    "train.deepspeed.wall_clock_breakdown=true",
]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def write_yaml(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_there_are_config_files():
    assert len(CONFIG_FILES) > 0


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_every_config_file_loads_and_each_of_its_settings_arrives(path):
    stated = flatten(yaml.safe_load(path.read_text()))
    effective = flatten(to_dict(load_config(str(path))))
    assert stated
    assert {key: effective[key] for key in stated} == stated


def test_without_a_file_the_defaults_are_loaded():
    assert load_config() == Config()


def test_an_empty_file_states_no_differences(tmp_path):
    assert load_config(write_yaml(tmp_path / "empty.yaml", "# nothing\n")) == Config()


def test_an_override_wins_over_the_file_and_the_last_override_wins(tmp_path):
    path = write_yaml(tmp_path / "a.yaml", "seed: 1\ntrain:\n  max_steps: 600\n")
    config = load_config(path, ["seed=2", "seed=3"])
    assert (config.seed, config.train.max_steps) == (3, 600)


def test_overrides_take_the_type_of_their_setting():
    config = load_config(overrides=OVERRIDES)
    assert config.run_dir == "s3://bucket/runs/a=b"
    assert config.log.timestamp_unit == "ms"
    assert config.batch.first_item_is_target is False
    assert config.train.learning_rate == 0.002
    assert config.train.max_steps == 7000
    assert config.evaluate.ks == [10, 3]
    assert config.log.keep == ["event == click", "country in [DE, FR]"]
    assert config.train.deepspeed == {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}


@pytest.mark.parametrize(
    ("override", "unknown", "nearest"),
    [
        ("train.max_step=5", "train.max_step", "train.max_steps"),
        ("max_steps=5", "max_steps", "train.max_steps"),
        ("trian.max_steps=5", "trian", "train"),
        ("batch.max_len=5", "batch.max_len", "batch.max_length"),
        ("batch_size=5", "batch_size", "evaluate.batch_size"),
        ("learning_rate=5", "learning_rate", "train.learning_rate"),
    ],
)
def test_an_unknown_setting_names_the_nearest_known_one(override, unknown, nearest):
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[override])
    assert str(error.value) == f"{unknown}: unknown setting; the nearest known one is {nearest}"


def test_an_unknown_setting_in_a_file_is_an_error_too(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.dims: unknown setting; the nearest known one is model\.dim"):
        load_config(write_yaml(tmp_path / "a.yaml", "model:\n  dims: 5\n"))


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ("train.max_steps=many", "train.max_steps"),
        ("train.max_steps=1.5", "train.max_steps"),
        ("train.max_steps=", "train.max_steps"),
        ("batch.global_batch_size=true", "batch.global_batch_size"),
        ("train.learning_rate=fast", "train.learning_rate"),
        ("loss.include_padding_class=maybe", "loss.include_padding_class"),
        ("train.resume=sometimes", "train.resume"),
        ("train.device=tpu", "train.device"),
        ("train.schedule=exponential", "train.schedule"),
        ("train.table_optimizer=lamb", "train.table_optimizer"),
        ("log.timestamp_unit=minutes", "log.timestamp_unit"),
        ("log.format=avro", "log.format"),
        ("log.keep=price", "log.keep"),
        ("log.duplicates=merge", "log.duplicates"),
        ("log.long_users=drop", "log.long_users"),
        ("evaluate.ks=7", "evaluate.ks"),
        ("train.deepspeed=5", "train.deepspeed"),
        ("train=5", "train=5"),
        ("train.max_steps.x=5", "train.max_steps"),
        ("run_dir=${nowhere}", "run_dir"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_setting(override, setting):
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[override])
    assert str(error.value).startswith(f"{setting}:")


@pytest.mark.parametrize(
    ("overrides", "setting", "rule", "way_out"),
    [
        (
            ["train.max_steps=100"],
            "train.validate_every=500",
            "exceeds train.max_steps=100",
            "set train.validate_every=100 or lower",
        ),
        (
            ["train.workers=200"],
            "batch.global_batch_size=128",
            "is below train.workers=200",
            "raise the batch or take fewer workers",
        ),
        (["train.resources={GPU: 1}"], "train.resources={'GPU': 1.0}", "GPU is Ray's own", "set train.cpus_per_worker"),
        (
            ["dataset.resources={data_node: 0}"],
            "dataset.resources={'data_node': 0.0}",
            "an amount is positive",
            "data_node: 0.01",
        ),
        (["dataset.resources={data_node: 1.5}"], "dataset.resources={'data_node': 1.5}", "above 1 a whole", "data_node: 0.01"),
        (["train.zero_stage=4"], "train.zero_stage=4", "has to be", "0, 1, 2 or 3"),
        (
            ["train.offload_optimizer=cpu", "train.zero_stage=0"],
            "train.offload_optimizer=cpu",
            "needs train.zero_stage=1 or higher, not 0",
            "set that, or none",
        ),
        (
            ["train.offload_parameters=cpu", "train.zero_stage=2"],
            "train.offload_parameters=cpu",
            "needs train.zero_stage=3 or higher, not 2",
            "set that, or none",
        ),
        (
            ["model.table=sharded", "train.zero_stage=3"],
            "train.zero_stage=3",
            "has spread the item rows already",
            "set train.zero_stage=2 or lower, or model.table=replicated",
        ),
        (
            ["model.table=sharded", "train.offload_optimizer=cpu"],
            "train.offload_optimizer=cpu",
            "does not reach a sharded table",
            "set none, or model.table=replicated",
        ),
        (
            ["train.table_optimizer=lazy_adam"],
            "train.table_optimizer=lazy_adam",
            "needs model.table=sharded",
            "set that, or adamw",
        ),
        (
            ["train.warmup_steps=600", "train.max_steps=500"],
            "train.warmup_steps=600",
            "exceeds train.max_steps=500",
            "never reach train.learning_rate",
        ),
        (
            ["train.validate_lists=true", "evaluate.list_k=0"],
            "train.validate_lists=True",
            "needs lists",
            "set evaluate.list_k=10",
        ),
        (["train.track=[tensorbord]"], "train.track=['tensorbord']", "tensorbord is none of", "tensorboard, mlflow, wandb"),
        (
            ["model.ring_min=0.9", "model.ring_max=0.5"],
            "model.ring_min, model.ring_max=(0.9, 0.5)",
            "grows without bound",
            "0 <= ring_min < ring_max < 1",
        ),
        (
            ["model.ring_max=1.0"],
            "model.ring_min, model.ring_max=(0.8, 1.0)",
            "grows without bound",
            "0 <= ring_min < ring_max < 1",
        ),
        (["evaluate.ks=[1,5]"], "evaluate.ks=[1, 5]", "recall@10 chooses the checkpoint", "has to contain 10"),
        (
            ["log.user_column=item_id"],
            "log.*_column=['item_id', 'item_id', 'timestamp']",
            "user, item and timestamp",
            "three different columns",
        ),
        (
            ["log.from_partition=2026-11-02", "log.to_partition=2026-11-02"],
            "log.to_partition=2026-11-02",
            "has to come after",
            "log.from_partition=2026-11-02",
        ),
        (
            ["log.duplicate_tolerance=2.5", "log.duplicates=keep"],
            "log.duplicate_tolerance=2.5",
            "contradicts log.duplicates=keep",
            "set log.duplicates=drop",
        ),
        (["log.users_above_cap=quarantined"], "log.users_above_cap=quarantined", "needs a cap", "set log.max_user_events"),
        (["log.max_user_events=-1"], "log.max_user_events=-1", "cannot be negative", "0 is no limit"),
        (
            ["batch.tokens=99", "train.workers=2"],
            "batch.tokens=99",
            "is below batch.max_length=50 x train.workers=2",
            "raise it to 100 or more",
        ),
        (["batch.windows=sliding"], "batch.stride=0", "needs a stride from 1 to batch.max_length=50", "e.g. 25"),
        (["batch.windows=sliding", "batch.stride=51"], "batch.stride=51", "needs a stride from 1", "e.g. 25"),
        (
            ["batch.windows=carried", "batch.stride=5"],
            "batch.stride=5",
            "means nothing to batch.windows=carried",
            "leave it at 0",
        ),
        (
            ["batch.windows=carried", "batch.tokens=4096"],
            "batch.tokens=4096",
            "means nothing to batch.windows=carried",
            "leave it at 0",
        ),
        (["batch.stride=5"], "batch.stride=5", "means nothing to batch.windows=paper", "set batch.windows=sliding"),
        (["split.test_from=1d"], "split.test_from=1d", "means nothing to split.kind=leave_last_out", "split.kind=global_time"),
        (["split.kind=global_time", "split.test_from=1d"], "split.train_until=''", "is no time", "such as 2d, 12h, 10%"),
        (
            ["split.kind=global_time", "split.train_until=2 days", "split.test_from=1d"],
            "split.train_until='2 days'",
            "is no time",
            "such as 2d, 12h, 10%",
        ),
        (["train.keep_checkpoints=0"], "train.keep_checkpoints=0", "needs", "at least 1"),
        (["train.checkpoint_every=-1"], "train.checkpoint_every=-1", "cannot", "be negative"),
        (["batch.max_length=1"], "batch.max_length=1", "next-item targets", "at least 2"),
        (["synthetic.items=2"], "synthetic.items=2", "nothing to learn", "at least 16"),
    ],
)
def test_an_impossible_combination_names_setting_rule_and_way_out(overrides, setting, rule, way_out):
    with pytest.raises(ConfigError) as error:
        load_config(overrides=overrides)
    message = str(error.value)
    assert message.startswith(f"{setting}: ")
    assert rule in message
    assert way_out in message


@pytest.mark.parametrize(
    "override",
    [
        "log.max_rejected_share=1.01",
        "log.max_rejected_share=-0.1",
        "log.max_key_bytes=0",
        "log.duplicate_tolerance=-0.5",
        "log.duplicate_tolerance=.inf",
        "synthetic.users=0",
        "synthetic.mean_length=3",
        "dataset.shards=-1",
        "batch.global_batch_size=0",
        "batch.shards_mixed=0",
        "batch.tokens=-1",
        "model.dim=0",
        "model.hidden=0",
        "model.blocks=0",
        "model.dropout=1.0",
        "model.dropout=-0.1",
        "train.workers=0",
        "train.report_every=0",
        "train.patience=0",
        "train.accumulation=0",
        "train.warmup_steps=-1",
        "train.final_learning_rate_share=1.5",
        "train.learning_rate=0.0",
        "train.learning_rate=.nan",
        "train.clip_norm=-1.0",
        "train.weight_decay=-0.1",
        "train.max_minutes=-1.0",
        "evaluate.ks=[]",
        "evaluate.ks=[0,10]",
        "evaluate.batch_size=0",
        "bundle.golden_requests=0",
        "publish.metrics=[]",
        "publish.metrics=[recall@50]",
        "publish.margin=-0.01",
        "publish.margin=.inf",
        "publish.against_baselines=[best]",
        "publish.min_coverage_share=1.5",
        "publish.load_timeout_s=0.0",
        "publish.keep=-1",
        "bundle.exports=[onnx,tensorrt]",
        "run_dir=''",
    ],
)
def test_a_value_outside_its_range_names_its_setting(override):
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[override])
    assert str(error.value).startswith(override.split("=")[0] + "=")


def test_a_floor_is_set_by_the_name_of_its_metric():
    config = load_config(overrides=["publish.floors.recall@10=0.05", "publish.floors.coverage@10=0.1"])
    assert config.publish.floors == {"recall@10": 0.05, "coverage@10": 0.1}


@pytest.mark.parametrize("override", ["train.max_steps", "--seed=5", "=5", ""])
def test_what_is_not_an_assignment_is_not_an_override(override):
    with pytest.raises(ConfigError, match=r"is not an override; write key=value"):
        load_config(overrides=[override])


@pytest.mark.parametrize("override", ["train.max_steps=[", "run_dir={", "evaluate.ks.0=10"])
def test_an_override_that_cannot_be_parsed_is_a_config_error(override):
    with pytest.raises(ConfigError):
        load_config(overrides=[override])


def test_a_missing_file_is_not_ready(tmp_path):
    with pytest.raises(DataNotReadyError, match=r"nowhere\.yaml does not exist"):
        load_config(f"{tmp_path}/nowhere.yaml")


@pytest.mark.parametrize(
    "text",
    ["train: [1", "a: b: c", "seed: 1\nseed: 2\n", "seed: !!python/object/apply:os.getpid []", "- seed\n- 5\n", b"\xff\xfe"],
    ids=["open bracket", "two colons", "twice the same key", "code", "a list", "not UTF-8"],
)
def test_a_file_that_is_no_yaml_mapping_is_a_config_error_with_its_name(tmp_path, text):
    path = write_yaml(tmp_path / "broken.yaml", text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(path)


@pytest.mark.parametrize("path", [None, *map(str, CONFIG_FILES)])
def test_plain_values_and_yaml_give_the_same_configuration_back(path, tmp_path):
    for config in (load_config(path), load_config(path, OVERRIDES)):
        assert from_dict(to_dict(config)) == config
        assert load_config(write_yaml(tmp_path / "effective.yaml", to_yaml(config))) == config


@pytest.mark.parametrize(
    "text", ["2026-11-20", "'2026-11-20'", "2026-11-20T06:00:00Z", "2026-11-20 06:00", "1763596800000000", "2d", "10%"]
)
def test_moments_of_a_split_stay_text_in_files_and_overrides(tmp_path, text):
    path = write_yaml(tmp_path / "a.yaml", f"split:\n  kind: global_time\n  train_until: {text}\n  test_from: 1d\n")
    overrides = ["split.kind=global_time", f"split.train_until={text}", "split.test_from=1d"]
    for config in (load_config(path), load_config(overrides=overrides)):
        assert config.split.train_until == text.strip("'")
        assert load_config(write_yaml(tmp_path / "effective.yaml", to_yaml(config))) == config


def test_plain_values_are_a_copy():
    config = Config()
    to_dict(config)["evaluate"]["ks"].append(99)
    assert config == Config()


def test_equal_configurations_have_no_differences():
    assert differences(to_dict(Config()), to_dict(Config())) == []


def test_differences_name_each_setting_that_differs_and_no_other():
    changed = differences(to_dict(Config()), to_dict(load_config(overrides=["seed=1", "evaluate.ks=[10]", "train.patience=3"])))
    assert changed == ["evaluate.ks=[1, 5, 10, 20, 50] -> [10]", "seed=0 -> 1", "train.patience=10 -> 3"]


def test_a_setting_only_one_side_knows_is_a_difference():
    assert differences({"a": {"b": 1}}, {"a": {"c": 2}}) == ["a.b=1 -> unset", "a.c=unset -> 2"]


def test_directories_follow_from_the_run_directory_unless_given():
    config = load_config(overrides=["run_dir=/runs/a"])
    assert (config.dataset_url, config.registry_url) == ("/runs/a/dataset", "/runs/a/registry")
    config = load_config(overrides=["run_dir=/runs/a", "dataset.dir=/data", "bundle.registry=s3://bucket/registry"])
    assert (config.dataset_url, config.registry_url) == ("/data", "s3://bucket/registry")


def test_absolute_paths_touch_local_relative_paths_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    places = ["log.path=log.csv", "train.warm_start=last", "dataset.dir=s3://bucket/data", "bundle.registry=/registry"]
    config = load_config(overrides=[*places, "seed=4"])
    absolute = with_absolute_paths(config)
    assert absolute.run_dir == f"{tmp_path}/runs/quickstart"
    assert absolute.log.path == f"{tmp_path}/log.csv"
    assert absolute.train.warm_start == f"{tmp_path}/last"
    assert absolute.bundle.registry == "/registry"
    assert absolute.dataset == config.dataset
    assert absolute.seed == 4


def test_an_iceberg_table_of_a_catalogue_is_no_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path, absolute in (("shop.events", "shop.events"), ("t/1.metadata.json", f"{tmp_path}/t/1.metadata.json")):
        assert with_absolute_paths(load_config(overrides=["log.format=iceberg", f"log.path={path}"])).log.path == absolute


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["log.snapshot=latest"], r"^log\.snapshot=latest: is no number"),
        (["log.snapshot=-1"], r"^log\.snapshot=-1: is no number"),
        (["log.snapshot=3", "log.format=csv"], r"^log\.snapshot=3: means nothing to log\.format=csv"),
        (["log.format=delta"], r"^log\.path='': log\.format=delta needs a table"),
        (["log.format=iceberg", "log.path='a.b,c.d'"], r"^log\.path=a\.b,c\.d: a table stands alone"),
    ],
)
def test_settings_of_a_table_that_make_no_sense_are_refused(overrides, rule):
    with pytest.raises(ConfigError, match=rule):
        load_config(overrides=overrides)


def test_a_snapshot_id_keeps_all_its_digits():
    assert load_config(overrides=["log.format=delta", "log.path=t", "log.snapshot=9223372036854775807"]).log.snapshot == str(
        2**63 - 1
    )


def test_each_of_several_log_paths_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(load_config(overrides=["log.path='old.parquet, s3://bucket/log,/logs/*.parquet'"]))
    assert config.log.path == f"{tmp_path}/old.parquet,s3://bucket/log,/logs/*.parquet"
    assert with_absolute_paths(Config()).log.path == ""


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LogConfig().path = "elsewhere"  # type: ignore[misc]
