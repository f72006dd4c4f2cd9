"""The stage that says how good a model is: ranks, figures with intervals, baselines, and the run before beside it."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import to_dict
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import Split, describe_split, resolve_split
from lrurec_dist.errors import CatalogueError, ConfigError, DataNotReadyError, DataQualityError
from lrurec_dist.evaluate.dataset_evaluation import evaluate_dataset
from lrurec_dist.evaluate.evaluation import RankingProtocol
from lrurec_dist.evaluate.metrics import MEAN_RANK
from lrurec_dist.evaluate.ranks import MODEL, compare_with
from lrurec_dist.evaluate.shard_evaluation import Figures
from lrurec_dist.evaluate.summary import summarise, summarise_pair, values_of
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.ray_session import RaySession
from lrurec_dist.reporting import Status, format_table, metrics_table, progress_of, say
from lrurec_dist.run_directory import run_metrics
from lrurec_dist.run_report import write_report
from lrurec_dist.serve.bundle import load_bundle
from lrurec_dist.stage_prepare import audit, open_dataset
from lrurec_dist.train.checkpoint import model_loader, read_checkpoint_manifest
from lrurec_dist.train.checkpoint_index import find_checkpoint
from lrurec_dist.train.launch import use_cuda

SCHEMA_VERSION = 2  # 2: ranks have the target's popularity decile
EVALUATION = "evaluation"  # below the run directory: a committed directory for each kind of split
FIGURES = "metrics.json"  # below each of them
OTHER_SPLIT = {"kind": "global_time", "train_until": "20%", "test_from": "10%"}  # of a run that leaves the last ones out


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """What is evaluated: where it lies, how a worker loads it on a device, and what it was trained on."""

    url: str
    name: str  # for people
    step: int
    files: dict[str, Any]  # with their SHA-256
    max_length: int  # of a training window
    trained: dict[str, str] | Split  # settings of the split, or the split
    load: Callable[[str], Callable[[], LRURec]]


def evaluate(config: Config, status: Status, session: RaySession) -> None:
    """Evaluate a run's best checkpoint, or `evaluate.model`, commit the stage, and write the report.

    Raises:
        DataNotReadyError: no dataset, or no model.
        CatalogueError: the model's catalogue is not the dataset's, nor its beginning.
        DataQualityError: nobody is evaluable by the configured split.
    """
    dataset = open_dataset(config.dataset_url)
    model = find_model(config, dataset)
    inputs = storage.fingerprint(
        {
            "schema_version": SCHEMA_VERSION,
            "dataset": dataset.identity,
            "model": model.files,
            "evaluate": to_dict(config)["evaluate"],
            "split": to_dict(config)["split"],
            "warm_start": config.train.warm_start,
        }
    )
    split = resolve_split(dataset, **asdict(config.split))
    outputs = status.committed("evaluate", inputs)
    if outputs and all(storage.is_committed(evaluation_url(config.run_dir, kind)) for kind in outputs["evaluated"]):
        say(f"evaluate: skipped, {model.url} was evaluated on these inputs")
    else:
        found = {split.kind: _evaluate_split(config, dataset, model, split, session)}
        if (other := _other_split(config, dataset)) is not None:
            try:
                found[other.kind] = _evaluate_split(config, dataset, model, other, session)
            except DataQualityError as error:
                say(f"evaluate: not by split.kind={other.kind}: {error}")
        main = found[split.kind]
        values = {name: values_of(metrics) for name, metrics in main["metrics"].items()}
        facts = ("users", "unseen_targets", "unknown_targets", "trained_targets", "new_users", "without_history")
        outputs = {
            **{name: main[name] for name in facts},
            "split": main["split"],
            "step": model.step,
            "evaluated": list(found),
            "baselines": {name: of_model for name, of_model in values.items() if name != MODEL},
            "model": values[MODEL],
            "popularity": values["popularity"],
        }
        run_metrics(config, "evaluate").write("test", **outputs)
        status.commit("evaluate", inputs, outputs)
    evaluations = [read_figures(config.run_dir, kind) for kind in outputs["evaluated"]]
    for figures in evaluations:
        _tell(figures, dataset)
    report = write_report(config, dataset, model.load("cpu")(), evaluations, _previous_run(config))
    say(f"evaluate: {report}")


def evaluation_url(run_url: str, kind: str) -> str:
    """Where a run's evaluation by a kind of split lies."""
    return storage.join(run_url, EVALUATION, kind)


def read_figures(run_url: str, kind: str) -> dict[str, Any]:
    """The figures of a run's evaluation by a kind of split, as `summarise` and this stage made them."""
    figures: dict[str, Any] = storage.read_json(storage.join(evaluation_url(run_url, kind), FIGURES))
    return figures


def find_model(config: Config, dataset: SequenceDataset) -> EvaluatedModel:
    """The model to evaluate: the checkpoint or bundle `evaluate.model`, or the run's best checkpoint.

    Raises:
        DataNotReadyError: it is not there.
        CatalogueError: its catalogue is not the dataset's, nor its beginning.
    """
    url = config.evaluate.model or best_checkpoint(config)
    manifest = storage.read_manifest(url, verify=False) if storage.is_committed(url) else {}
    if not {"version", "tensors"} & manifest.keys():
        raise DataNotReadyError(f"evaluate.model={url}: is neither a checkpoint nor a bundle; give a directory of one of them")
    _refuse_another_catalogue(url, manifest, dataset)
    if "version" in manifest:
        config_of, metrics = (storage.read_json(storage.join(url, name)) for name in ("config.json", "metrics.json"))
        return EvaluatedModel(
            url=url,
            name=f"bundle {manifest['version']}",
            step=metrics["step"],
            files=manifest["files"],
            max_length=config_of["max_length"],
            trained=Split(**metrics["split"]),
            load=lambda device: functools.partial(_load_bundled, url, device),
        )
    manifest = read_checkpoint_manifest(url)
    settings = manifest["settings"]
    return EvaluatedModel(
        url=url,
        name=f"LRURec, step {manifest['progress']['step']:,}",
        step=manifest["progress"]["step"],
        files=manifest["files"],
        max_length=settings["batch.max_length"],
        trained={name: settings[f"split.{name}"] for name in ("kind", "train_until", "test_from")},
        load=lambda device: model_loader(url, device),
    )


def best_checkpoint(config: Config) -> str:
    """The URL of the run's best checkpoint.

    Raises:
        DataNotReadyError: there is none.
    """
    best = find_checkpoint(config.run_dir, "best")
    if best is None:
        raise DataNotReadyError(f"{config.run_dir} has no checkpoint; run jobs/train.py first")
    return best


def _load_bundled(url: str, device: str) -> LRURec:
    return load_bundle(url).model.to(device)


def _refuse_another_catalogue(url: str, manifest: dict[str, Any], dataset: SequenceDataset) -> None:
    """Raise unless the dataset's catalogue is, or begins with, that of what lies at `url`."""
    known, expected = manifest["num_items"], manifest["catalogue_fingerprint"]
    of_dataset = dataset.manifest["catalogue_fingerprint"]
    if known < dataset.num_items:
        of_dataset = dataset.catalogue.first(known).fingerprint
    if known > dataset.num_items or of_dataset != expected:
        raise CatalogueError(
            f"{url}: has catalogue {expected} of {known:,} items, {dataset.url} has {dataset.num_items:,}, which neither are nor begin "
            "with those: ids would change their meaning; prepare with dataset.parent=<the dataset it was made with>"
        )


def _other_split(config: Config, dataset: SequenceDataset) -> Split | None:
    if not config.evaluate.both_splits or dataset.manifest["time_unit"] == "position":
        return None
    if config.split.kind == "global_time":
        return Split()
    try:
        return resolve_split(dataset, **OTHER_SPLIT)  # type: ignore[arg-type]
    except ConfigError as error:
        say(f"evaluate: not by split.kind=global_time: {error}")
        return None


def _evaluate_split(
    config: Config, dataset: SequenceDataset, model: EvaluatedModel, split: Split, session: RaySession
) -> dict[str, Any]:
    """Evaluate by one split, and commit ranks and figures."""
    options = config.evaluate
    audited = audit(dataset, split, "evaluate", session)
    session.connect()
    cuda = use_cuda(config.train.device)
    url = evaluation_url(config.run_dir, split.kind)
    storage.remove_tree(url)
    trained = model.trained if isinstance(model.trained, Split) else resolve_split(dataset, **model.trained)  # type: ignore[arg-type]
    protocol = RankingProtocol(
        split=split,
        part="test",
        max_length=model.max_length,
        batch_size=options.batch_size,
        exclude_history=options.exclude_history,
        deepest=max(options.ks),
        product_dtype=getattr(torch, options.precision),
    )
    evaluation = evaluate_dataset(
        config.dataset_url,
        model.load("cuda" if cuda else "cpu"),
        protocol,
        Figures(ks=tuple(options.ks), list_k=options.list_k, replicates=options.bootstrap, seed=config.seed),
        trained=trained,
        ranks_url=url,
        workers=config.train.workers,
        cpus_per_worker=config.train.cpus_per_worker,
        gpus_per_worker=1 if cuda else 0,
        resources=config.train.resources,
        data_resources=session.data_resources,
        progress=progress_of("evaluate"),
    )
    figures = {
        "schema_version": SCHEMA_VERSION,
        "model": model.url,
        "name": model.name,
        "step": model.step,
        "dataset": dataset.url,
        "dataset_identity": dataset.identity,
        "split": asdict(split),
        "trained": asdict(trained),
        "exclude_history": options.exclude_history,
        "precision": str(protocol.product_dtype).removeprefix("torch."),
        "ks": options.ks,
        "bootstrap": options.bootstrap,
        "audit": audited.counts,
        **summarise(evaluation, dataset.num_items),
    }
    run = _previous_run(config)
    figures["previous"] = None if run is None else compare_runs(config, dataset, split.kind, run)
    storage.write_json(storage.join(url, FIGURES), figures)
    about = {"schema_version": SCHEMA_VERSION, "num_items": dataset.num_items}
    storage.commit(url, {**about, "catalogue_fingerprint": dataset.manifest["catalogue_fingerprint"]})
    return figures


def _previous_run(config: Config) -> str | None:
    run = config.evaluate.previous or config.train.warm_start
    return None if run in ("", "none") else run


def compare_runs(config: Config, dataset: SequenceDataset, kind: str, before_run: str) -> dict[str, Any] | None:
    """The run's evaluation by a kind of split beside that of an earlier run on the same users, as `summarise_pair` has it.

    None if the earlier run has no such evaluation.

    Raises:
        CatalogueError: the dataset's catalogue is not that of the earlier evaluation, nor begins with it.
    """
    options, before = config.evaluate, evaluation_url(before_run, kind)
    if not storage.is_committed(before):
        say(f"evaluate: {before_run} has no evaluation by split.kind={kind} to compare with")
        return None
    manifest = storage.read_manifest(before)
    _refuse_another_catalogue(before, manifest, dataset)
    paired = compare_with(
        evaluation_url(config.run_dir, kind),
        before,
        ks=tuple(options.ks),
        num_items=dataset.num_items,
        num_items_before=manifest["num_items"],
        replicates=options.bootstrap,
        seed=config.seed,
    )
    return {"run": before_run, "name": read_figures(before_run, kind)["name"], **summarise_pair(paired)}


def _tell(figures: dict[str, Any], dataset: SequenceDataset) -> None:
    split, trained = Split(**figures["split"]), Split(**figures["trained"])
    history = "excluded from" if figures["exclude_history"] else "among"
    say(
        f"evaluate: test, {figures['users']:,} users, {dataset.num_items:,} items, history {history} the candidates; "
        f"{figures['unseen_targets']:,} targets never occur in the training part"
    )
    say(f"evaluate: split {describe_split(split, dataset.manifest['time_unit'])}")
    if split.kind == "global_time":
        new, left_out = figures["new_users"], figures["without_history"]
        say(f"evaluate: {new:,} of these users have no training part; {left_out:,} more have no history and are left out")
    if split != trained:
        say(
            f"evaluate: trained by split {describe_split(trained, dataset.manifest['time_unit'])}; "
            f"{figures['trained_targets']:,} users are left out, whose target trained the model"
        )
    if figures["unknown_targets"]:
        say(f"evaluate: {figures['unknown_targets']:,} targets are items that the model does not know: misses")
    if beyond := [k for k in figures["ks"] if k > dataset.num_items]:
        say(f"evaluate: k={beyond} exceeds the catalogue, which stands for it")
    names = {model: figures["name"] if model == MODEL else model.replace("_", " ") for model in figures["models"]}
    say(metrics_table({names[model]: values_of(figures["metrics"][model]) for model in names}, figures["ks"]))
    say("\n" + _interval_table(figures, names))
    if figures["lists"]:
        say("\n" + format_table(["lists", figures["name"]], [[name, value] for name, value in figures["lists"].items()]))
    if previous := figures["previous"]:
        say(_previous_table(previous))


def _interval_table(figures: dict[str, Any], names: dict[str, str]) -> str:
    """recall@10, ndcg@10 and the mean rank with their intervals, and how far the model is from each baseline."""
    rows = []
    for metric in ("recall@10", "ndcg@10", MEAN_RANK):
        for model in names:
            row = [f"{metric}  {names[model]}", *_cells(figures["metrics"][model][metric])]
            difference = figures["differences"].get(model, {}).get(metric)
            rows.append([*row, *(_cells(difference) if difference else [""] * 3), _verdict(difference) if difference else ""])
    return format_table(["95 % intervals", "value", "from", "to", "model minus it", "from", "to", "beyond noise"], rows)


def _previous_table(previous: dict[str, Any]) -> str:
    about = (
        f"evaluate: beside {previous['run']} ({previous['name']}): {previous['users']:,} users asked for the same item, "
        f"{previous['users_with_another_target']:,} for another one and not compared"
    )
    if previous["users"] == 0:
        return about
    rows = [
        [metric, previous["now"][metric]["value"], previous["before"][metric]["value"], *_cells(difference), _verdict(difference)]
        for metric, difference in previous["differences"].items()
    ]
    return f"{about}\n{format_table(['same users', 'now', 'before', 'difference', 'from', 'to', 'beyond noise'], rows)}"


def _cells(interval: dict[str, Any]) -> list[Any]:
    return ["" if interval[end] is None else interval[end] for end in ("value", "low", "high")]


def _verdict(difference: dict[str, Any]) -> str:
    if difference["low"] is None:
        return ""
    return "yes" if difference["beyond_noise"] else "no"
