"""States of all users of a dataset, from a bundle to Parquet files, so that serving starts warm; shard by shard
(`shard_files.py`), in the columns that `state_files.py` names."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from lrurec_dist import storage
from lrurec_dist.data.passes import Passes
from lrurec_dist.data.sequences import SequenceDataset, SequenceShard
from lrurec_dist.reporting import Progress, silent
from lrurec_dist.serve.bundle import Bundle
from lrurec_dist.serve.encoding import extend_states, initial_states
from lrurec_dist.serve.shard_files import ShardFiles, bundle_for_part, check_catalogue, checked_bundle
from lrurec_dist.serve.state_files import FOLDER, SCHEMA_VERSION, state_schema, state_table


@dataclass(frozen=True, kw_only=True)
class StateOptions:
    """How states are made."""

    recent_items: int  # ids of last items kept with a state
    batch_size: int  # users encoded together


def encode_dataset(
    url: str, bundle_url: str, dataset: SequenceDataset, options: StateOptions, passes: Passes, progress: Progress = silent
) -> tuple[dict[str, Any], bool]:
    """Write the state of each user after the whole history below `url`, or find them there.

    Args:
        url: the directory; what an interrupted call for the same inputs left there is kept.
        bundle_url: the bundle; verified, and its golden requests replayed, by every process.
        dataset: whose users, of the bundle's catalogue.
        options: how.
        passes: what goes over the shards; the files are the same, to the byte, whatever it is.
        progress: told of each shard.

    Returns:
        The manifest, and whether all was there already.

    Raises:
        ConfigError: `url` holds states made of other inputs.
        CatalogueError: dataset and bundle have different catalogues.
        BundleError: as `load_bundle`, or a golden request gets another answer.
    """
    bundle = checked_bundle(bundle_url)
    check_catalogue(bundle, dataset)
    inputs = {
        "bundle": storage.fingerprint(bundle.manifest["files"]),
        "dataset": dataset.identity,
        "recent_items": options.recent_items,
        "batch_size": options.batch_size,
    }
    files = ShardFiles(url=url, folder=FOLDER, setting="states.dir", inputs=inputs)
    if manifest := files.committed():
        return manifest, True
    part = functools.partial(_make_part, files=files, bundle_url=bundle_url, dataset=dataset, options=options)
    records = files.make(dataset, part, passes, progress, "encoded")
    description = {
        "schema_version": SCHEMA_VERSION,
        "bundle_version": bundle.version,
        "bundle": bundle_url,
        "dataset": dataset.url,
        "shape": [len(bundle.model.recurrent), bundle.model.hidden],
    }
    return files.commit(description, records), False


def _make_part(
    name: str, *, files: ShardFiles, bundle_url: str, dataset: SequenceDataset, options: StateOptions
) -> dict[str, Any]:
    """Write the states of a shard and return its record."""
    bundle, shard = bundle_for_part(bundle_url), dataset.read_shard(name)
    blocks, hidden, dim = len(bundle.model.recurrent), bundle.model.hidden, bundle.model.item_rows().shape[1]
    schema = state_schema(shard.user_keys.type, blocks * 2 * hidden, dim)
    return files.write(name, schema, lambda: _states(bundle, shard, schema, options))


def _states(bundle: Bundle, shard: SequenceShard, schema: pa.Schema, options: StateOptions) -> Iterator[pa.Table]:
    """Tables of some users at a time, in the order of the shard."""
    for begin in range(0, len(shard.user_keys), options.batch_size):
        users = range(begin, min(begin + options.batch_size, len(shard.user_keys)))
        histories = [torch.from_numpy(shard.item_ids[shard.offsets[user] : shard.offsets[user + 1]]) for user in users]
        states, vectors = extend_states(bundle.model, *initial_states(bundle.model, len(users)), histories)
        events = torch.tensor([len(history) for history in histories])
        recent = [history[max(0, len(history) - options.recent_items) :] for history in histories]
        keys = shard.user_keys.slice(begin, len(users))
        yield state_table(schema, keys, states, vectors, recent, events, bundle.version)
