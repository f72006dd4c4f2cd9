"""The stage after the bundle: it becomes the registry's champion if it passes the gate."""

import dataclasses
from dataclasses import asdict
from typing import Any

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import to_dict
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import ConfigError, DataNotReadyError, GateRefusedError
from lrurec_dist.evaluate.ranks import MODEL
from lrurec_dist.evaluate.summary import values_of
from lrurec_dist.ray_session import RaySession
from lrurec_dist.reporting import Status, say
from lrurec_dist.serve import gate
from lrurec_dist.serve.channels import CHAMPION, Channel, decision_url, read_channel
from lrurec_dist.serve.gate import Check
from lrurec_dist.serve.mlflow_registry import tell_mlflow
from lrurec_dist.serve.registry import collect, offer, version_url
from lrurec_dist.serve.replay import replay_in_fresh_process
from lrurec_dist.stage_evaluate import SCHEMA_VERSION, compare_runs, evaluate, evaluation_url, read_figures
from lrurec_dist.stage_prepare import open_dataset

RESCORED = "champion"  # below the run directory: champions, evaluated on this run's dataset


def publish(config: Config, status: Status, session: RaySession) -> None:
    """Put the run's bundle through the gate and make it champion, or find that it was, and commit the stage.

    Raises:
        DataNotReadyError: no dataset, no bundle, or no evaluation of the bundle's model on the dataset.
        ConfigError: the bundle lies in another registry, or a check is asked for that the evaluation cannot make.
        GateRefusedError: a check was not passed; the champion stays.
        ChannelMovedError: another champion was made meanwhile; it stays.
    """
    bundle = status.stages.get("bundle", {}).get("outputs")
    if not bundle:
        raise DataNotReadyError(f"{config.run_dir} has no bundle; run jobs/train.py first")
    registry, version = config.registry_url, bundle["version"]
    if version_url(registry, version) != bundle["url"]:
        raise ConfigError(f"bundle.registry={registry}: the run's bundle is {bundle['url']}; set the registry that it lies in")
    inputs = storage.fingerprint({"registry": registry, "version": version})
    done, champion = status.committed("publish", inputs), read_channel(registry, CHAMPION).pointer
    if champion and champion.version == version:
        say(f"publish: skipped, {version} is champion, generation {champion.generation}")
        status.commit("publish", inputs, _outputs(version, champion.decision, champion.generation, promoted=True))
        _tell(config)
        return
    if done and done["promoted"]:
        standing = (
            f"{champion.version} is champion now, generation {champion.generation}" if champion else "there is no champion now"
        )
        say(
            f"publish: skipped, {version} was promoted as generation {done['generation']}; {standing}; jobs/registry.py moves it back"
        )
        return
    dataset = open_dataset(config.dataset_url)
    figures = _figures(config, dataset, bundle["url"])
    about = {
        "run": config.run_dir,
        "dataset": dataset.url,
        "dataset_identity": dataset.identity,
        "settings": to_dict(config)["publish"],
    }

    def examine(before: Channel) -> tuple[list[Check], dict[str, Any]]:
        checks, facts = _examine(config, dataset, bundle["url"], figures, before, session)
        say(f"publish: {version} against {before.pointer.version if before.pointer else 'no champion'}")
        say(gate.checks_table(map(asdict, checks)))
        return checks, facts

    outcome = offer(registry, version, examine, about)
    if outcome.pointer is None:
        generation = champion.generation if champion else 0
        status.commit("publish", inputs, _outputs(version, outcome.decision, generation, promoted=False))
        _tell(config)
        failed = gate.refused(outcome.checks)
        raise GateRefusedError(
            f"publish: {version} is refused by {len(failed)} of {len(outcome.checks)} checks ({'; '.join(check.name for check in failed)}); "
            f"{f'{champion.version} stays champion' if champion else 'there is no champion'}; "
            f"numbers in {decision_url(registry, outcome.decision)}"
        )
    generation = outcome.pointer.generation
    status.commit("publish", inputs, _outputs(version, outcome.decision, generation, promoted=True))
    say(f"publish: {version} is champion, generation {generation}; decision {decision_url(registry, outcome.decision)}")
    _tell(config)
    if config.publish.keep:
        for removal in collect(registry, config.publish.keep, remove=True):
            say(f"publish: removed {removal.version}, {removal.bytes / 1e6:,.1f} MB: {removal.reason}")


def _tell(config: Config) -> None:
    if config.publish.mlflow_model:
        tell_mlflow(config.registry_url, config.publish.mlflow_model)


def _outputs(version: str, decision: str, generation: int, *, promoted: bool) -> dict[str, Any]:
    return {"version": version, "decision": decision, "generation": generation, "promoted": promoted}


def _figures(config: Config, dataset: SequenceDataset, bundle_url: str) -> dict[str, Any]:
    """The figures of the run's evaluation, after it was found to be that of the bundle's model on the dataset."""
    options = config.evaluate
    if options.bootstrap == 0:
        raise ConfigError("evaluate.bootstrap=0: the gate compares intervals; set 1000, and run jobs/evaluate.py")
    if options.list_k == 0 and config.publish.min_coverage_share:
        raise ConfigError(
            f"publish.min_coverage_share={config.publish.min_coverage_share:g}: evaluate.list_k=0 measures no coverage; "
            "set publish.min_coverage_share=0, or evaluate.list_k=10 and run jobs/evaluate.py"
        )
    way_out = "run jobs/train.py with this configuration again"
    if not storage.is_committed(evaluation_url(config.run_dir, config.split.kind)):
        raise DataNotReadyError(f"{config.run_dir} has no evaluation by split.kind={config.split.kind}; {way_out}")
    figures = read_figures(config.run_dir, config.split.kind)
    models = (storage.read_json(storage.join(bundle_url, "lineage.json")).get("checkpoint"), bundle_url)
    if figures["schema_version"] != SCHEMA_VERSION or figures["bootstrap"] == 0:
        raise DataNotReadyError(f"{config.run_dir} has an evaluation without the intervals that the gate needs; {way_out}")
    if figures["model"] not in models or figures["dataset_identity"] != dataset.identity:
        raise DataNotReadyError(
            f"{config.run_dir} has an evaluation of {figures['model']} on {figures['dataset']}, the bundle is of {models[0]} "
            f"and the dataset {dataset.url}; {way_out}"
        )
    return figures


def _examine(
    config: Config, dataset: SequenceDataset, url: str, figures: dict[str, Any], champion: Channel, session: RaySession
) -> tuple[list[Check], dict[str, Any]]:
    """All checks, and what else the record says."""
    options, manifest = config.publish, storage.read_manifest(url, verify=False)
    found = replay_in_fresh_process(url, options.load_timeout_s)
    answered = found.error or f"{found.requests} golden requests answered as by the trained model, loaded in {found.load_s:.1f} s"
    gigabytes = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e9
    checks = [
        Check("largest difference to a golden score", found.difference, None, not found.error, answered),
        gate.at_most("GB of all files", gigabytes, options.max_bundle_gb),
        gate.at_most("ms, 95 % of single requests", found.latency_ms, options.max_latency_ms),
        *gate.floors(values_of(figures["metrics"][MODEL]) | figures["lists"], options.floors),
        *gate.above_baselines(figures["differences"], options.against_baselines, options.metrics),
    ]
    facts: dict[str, Any] = {"replay": asdict(found), "metrics": figures["metrics"][MODEL], "users": figures["users"]}
    if champion.pointer is None:
        return [*checks, Check("champion", None, None, True, "there is none to compare with")], facts
    if not options.compare_with_champion:
        return [*checks, Check("champion", None, None, True, "publish.compare_with_champion=false")], facts
    champion_url = version_url(config.registry_url, champion.pointer.version)
    known = storage.read_manifest(champion_url, verify=False)
    begins_alike = dataset.catalogue.first(known["num_items"]).fingerprint == known["catalogue_fingerprint"]
    checks.append(gate.catalogue_extends(manifest["num_items"], known["num_items"], begins_alike))
    if not checks[-1].passed or found.error:
        return checks, facts
    compared, about = _against_champion(config, dataset, champion.pointer.version, champion_url, figures, session)
    return [*checks, *compared], {**facts, "compared": about}


def _against_champion(
    config: Config, dataset: SequenceDataset, version: str, url: str, figures: dict[str, Any], session: RaySession
) -> tuple[list[Check], dict[str, Any]]:
    """The champion is evaluated as the candidate was, on the same dataset, and both are compared on the users of both."""
    options, kind = config.publish, config.split.kind
    rescored = dataclasses.replace(
        config,
        run_dir=storage.join(config.run_dir, RESCORED, version),
        dataset=dataclasses.replace(config.dataset, dir=dataset.url),
        evaluate=dataclasses.replace(config.evaluate, model=url, previous="none", both_splits=False),
    )
    say(f"publish: the champion {version} on this run's dataset")
    evaluate(rescored, Status(rescored.run_dir), session)
    before = read_figures(rescored.run_dir, kind)
    beside = compare_runs(config, dataset, kind, rescored.run_dir)
    assert beside is not None, "the champion was evaluated"
    checks = [
        *gate.no_worse(beside["differences"], options.metrics, options.margin, beside["users"]),
        *gate.segments_no_worse(beside["segments"], options.metrics, options.segment_margin, options.segment_users),
    ]
    if options.min_coverage_share:
        k = config.evaluate.list_k
        checks.append(gate.coverage_kept(figures["lists"], before["lists"], k, options.min_coverage_share))
    about = {
        **{name: beside[name] for name in ("users", "users_with_another_target", "now", "before", "differences", "segments")},
        "unknown_targets": figures["unknown_targets"],
        "champions_unknown_targets": before["unknown_targets"],
        "champions_evaluation": rescored.run_dir,
    }
    return checks, about
