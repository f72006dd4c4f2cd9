"""The stages of a run, from log to verified bundle, each committed before the next begins."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import shaping_settings, to_dict
from lrurec_dist.data.batches import pad_left, untrained_targets
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.titles import read_titles, title_files
from lrurec_dist.errors import BundleError, ConfigError, LrurecError, StoppedError
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.ray_session import RaySession
from lrurec_dist.reporting import (
    Status,
    end_progress,
    format_duration,
    say,
)
from lrurec_dist.run_directory import open_run, run_command
from lrurec_dist.serve.bundle import GOLDEN_K, SCHEMA_VERSION, GoldenAnswers, save_bundle
from lrurec_dist.serve.recommender import Recommender
from lrurec_dist.serve.stored_table import as_stored, candidate_bias
from lrurec_dist.signals import interrupt, on_sigterm
from lrurec_dist.stage_evaluate import best_checkpoint, evaluate, read_figures
from lrurec_dist.stage_prepare import audit, open_dataset, prepare
from lrurec_dist.stage_publish import publish
from lrurec_dist.stage_recommend import recommend
from lrurec_dist.stage_states import make_states
from lrurec_dist.train.checkpoint import load_model, read_checkpoint_manifest
from lrurec_dist.train.checkpoint_index import find_checkpoint
from lrurec_dist.train.checks import check_settings, check_start
from lrurec_dist.train.launch import launch_training
from lrurec_dist.train.order import data_order

Stage = Literal["prepare", "train", "evaluate", "bundle", "publish", "recommend", "states"]


def run_job(arguments: Sequence[str], *, stages: Sequence[Stage], description: str, default_config: str) -> int:
    """Parse a job's command line, run stages, and return the exit code; a failure is one clear line."""
    return run_command(arguments, lambda config: run(config, stages), description=description, default_config=default_config)


def run(config: Config, stages: Sequence[Stage], before: Callable[[Stage], None] | None = None) -> None:
    """Run the given stages in order, skipping what is committed for the same inputs.

    `status.json` in the run directory says at any time which stage runs, what is finished, and in
    the end the result and the exit code. `before` is told of each stage before it begins; what it
    raises ends the run.
    """
    if "train" in stages:
        check_settings(config, cuda=config.train.device != "cpu")
    status = open_run(config)
    started = time.perf_counter()
    session, stage = RaySession(config), stages[0]
    try:
        if "bundle" in stages and config.bundle.titles:
            title_files(config.bundle.titles)  # rather than after the training
        with on_sigterm(interrupt):
            for stage in stages:
                status.running(stage)
                if before is not None:
                    before(stage)
                _STAGES[stage](config, status, session)
    except KeyboardInterrupt as error:
        stopped = StoppedError(f"stopped in stage {stage}; the same command goes on from what is committed")
        status.failed(stopped)
        raise stopped from error
    except BaseException as error:
        status.failed(error)
        raise
    finally:
        end_progress()
        session.close()
    status.done(bundle=status.stages.get("bundle", {}).get("outputs", {}).get("url"))
    say(f"done in {format_duration(time.perf_counter() - started)}")


def _train(config: Config, status: Status, session: RaySession) -> None:
    dataset = open_dataset(config.dataset_url)
    budget = {name: getattr(config.train, name) for name in ("max_steps", "max_minutes", "patience")}
    inputs = storage.fingerprint({"dataset": dataset.identity, **shaping_settings(config), **budget})
    done = status.committed("train", inputs)
    if done and find_checkpoint(config.run_dir, "best"):
        say(f"train: skipped, {done['best']} was trained on these inputs")
        return
    if config.train.resume == "never":
        storage.remove_tree(storage.join(config.run_dir, "checkpoints"))
    check_start(config)
    order = data_order(config, dataset)
    audited = audit(dataset, order.split, "train", session)
    missed = untrained_targets(audited.training, order)
    say(f"train: {missed:,} of {audited.counts['train_interactions']:,} interactions to train on are no window's target")
    session.connect()
    launch_training(config)
    best = find_checkpoint(config.run_dir, "best")
    if best is None:
        raise LrurecError("training ended without a checkpoint; this is a bug, please report it")
    status.commit("train", inputs, {"best": best, "split": audited.counts})


def _bundle(config: Config, status: Status, _: RaySession) -> None:
    if config.evaluate.model:
        raise ConfigError(
            f"evaluate.model={config.evaluate.model}: a bundle of this run's model would have that one's figures; use jobs/evaluate.py"
        )
    dataset, best = open_dataset(config.dataset_url), best_checkpoint(config)
    manifest = read_checkpoint_manifest(best)
    evaluation = status.stages["evaluate"]["outputs"]
    model = load_model(best)
    largest = max(float(layer.decay().norm(dim=0).max()) for layer, _ in model.layers())
    golden = _golden_answers(dataset, as_stored(model, config.bundle.table_dtype), config)
    catalogue = dataset.catalogue.table
    if config.bundle.titles:
        titles = read_titles(config.bundle.titles, dataset.catalogue)
        say(f"bundle: titles of {len(titles) - titles.null_count:,} of {len(titles):,} items, from {config.bundle.titles}")
        catalogue = catalogue.append_column("title", titles)
    intervals = read_figures(config.run_dir, evaluation["split"]["kind"])["metrics"]
    parent = parent_version(config.train.warm_start)
    inputs = storage.fingerprint(
        {
            "schema_version": SCHEMA_VERSION,
            "registry": config.registry_url,
            "dataset": dataset.identity,
            "checkpoint": manifest["files"],
            "evaluation": [evaluation, intervals],
            "titles": storage.expand(config.bundle.titles) if config.bundle.titles else {},
            "settings": [to_dict(config)["bundle"], config.batch.max_length, config.evaluate.exclude_history],
            "parent": parent,
        }
    )
    done = status.committed("bundle", inputs)
    # A version has its day and the code's revision in it: of the same run, continued after midnight or by newer code, it would
    # be another one, and the night would find its own twin for a champion and states of it in its way.
    url = done["url"] if done and storage.is_committed(done["url"]) else ""
    url = url or save_bundle(
        config.registry_url,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        model=model,
        model_arguments=manifest["model"],
        max_length=config.batch.max_length,
        exclude_history=config.evaluate.exclude_history,
        catalogue=catalogue,
        catalogue_fingerprint=dataset.catalogue.fingerprint,
        golden=golden,
        metrics={**evaluation, "intervals": intervals, "largest_decay_modulus": largest},
        lineage={
            "sources": dataset.manifest["inputs"]["sources"],
            "dataset": dataset.url,
            "dataset_identity": dataset.identity,
            "interactions": dataset.manifest["interactions"],
            "users": dataset.manifest["users"],
            "checkpoint": best,
            "step": manifest["progress"]["step"],
        },
        table_dtype=config.bundle.table_dtype,
        exports=config.bundle.exports,
        parent=parent,
    )
    try:
        recommender = Recommender.load(url)
    except BundleError:
        storage.remove_tree(url)  # it must not look committed
        raise
    difference = recommender.check_golden()
    say(f"bundle: {url}")
    stored = "" if config.bundle.table_dtype == "float32" else f" with item rows of {config.bundle.table_dtype}"
    say(
        f"bundle: verified; {len(golden.histories)} golden requests answered as by the trained model{stored}, "
        f"largest score difference {difference:.1e}"
    )
    for history in golden.histories[:3]:
        answers = ", ".join(f"{item.item_key} ({item.score:.2f})" for item in recommender.recommend(history, k=3))
        say(f"recommend: after {' → '.join(map(str, history[-3:]))}: {answers}")
    status.commit("bundle", inputs, {"url": url, "version": recommender.version})


def parent_version(warm_start: str) -> str:
    """Version of the bundle of the run, or of the run of the checkpoint, that training began from; empty if there is none."""
    for run in filter(None, (warm_start, warm_start.rpartition("/checkpoints/")[0])):
        if storage.exists(storage.join(run, "status.json")):
            return str(Status(run).stages.get("bundle", {}).get("outputs", {}).get("version", ""))
    return ""


def _golden_answers(dataset: SequenceDataset, model: Any, config: Config) -> GoldenAnswers:
    """What a model answers to the first users of the dataset, computed on item ids."""
    histories: list[Any] = []
    for name in dataset.shard_names:
        shard = dataset.read_shard(name)
        room = config.bundle.golden_requests - len(histories)
        histories += [
            shard.item_ids[begin:end] for begin, end in zip(shard.offsets[:room], shard.offsets[1 : room + 1], strict=False)
        ]
    length = min(config.batch.max_length, max(map(len, histories)))
    item_ids = torch.from_numpy(pad_left([history[-length:] for history in histories], length))
    pairs = [(row, item) for row, history in enumerate(histories) for item in history.tolist() if config.evaluate.exclude_history]
    rows, ids = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    with torch.inference_mode():
        bias = candidate_bias(model.table.bias, dataset.catalogue.table["status"])
        best, scores = top_k(model.encode(item_ids), model.item_rows(), bias, GOLDEN_K, rows, ids)
    return GoldenAnswers([dataset.catalogue.keys_of(history) for history in histories], best, scores)


_STAGES = {
    "prepare": prepare,
    "train": _train,
    "evaluate": evaluate,
    "bundle": _bundle,
    "publish": publish,
    "recommend": recommend,
    "states": make_states,
}
