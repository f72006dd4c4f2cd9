"""What a bundle makes of a dataset, shard by shard: one Parquet file each, made once, committed together.

manifest.json            schema version, inputs, counts, every file's size and SHA-256; written last
<folder>/part-*.parquet  one file a shard of the dataset, one row a user
parts/part-*.json        what a finished file holds, so that a run that is repeated goes on from there
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lrurec_dist import storage
from lrurec_dist.data.passes import Passes
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import CatalogueError, ConfigError, IntegrityError
from lrurec_dist.files import new_file
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.reporting import Progress
from lrurec_dist.serve.bundle import Bundle, load_bundle
from lrurec_dist.serve.recommender import Recommender
from lrurec_dist.stores import retried

ROW_GROUP = 8192  # users whose rows are written together, and held until then


@dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """Where the files of one kind lie and what they are made of.

    Attributes:
        url: the directory.
        folder: of the files, and what they hold, in a word.
        setting: that names `url`, for messages.
        inputs: JSON values; files made with other ones are never mixed.
    """

    url: str
    folder: str
    setting: str
    inputs: dict[str, Any]

    def committed(self) -> dict[str, Any] | None:
        """The manifest, after every file was found as committed; None where nothing is.

        Raises:
            ConfigError: it holds what was made of other inputs.
            IntegrityError: a file is missing or changed.
        """
        if not storage.is_committed(self.url):
            return None
        manifest = storage.read_manifest(self.url)
        self._check_inputs(manifest["inputs"])
        return manifest

    def make(
        self, dataset: SequenceDataset, part: Callable[[str], dict[str, Any]], passes: Passes, progress: Progress, done: str
    ) -> dict[str, dict[str, Any]]:
        """Records of all shards: those that are there, whole, and `part(shard)` of the others.

        Raises:
            ConfigError: as `committed`, of what an interrupted run left.
        """
        records = self._finished(dataset.shard_names)
        missing = [name for name in dataset.shard_names if name not in records]
        progress(done, len(records), len(dataset.shard_names), "shards")
        for name, record in zip(missing, passes.each(part, [(name,) for name in missing]), strict=True):
            records[name] = record
            progress(done, len(records), len(dataset.shard_names), "shards")
        return records

    def write(self, shard: str, schema: pa.Schema, tables: Callable[[], Iterable[pa.Table]]) -> dict[str, Any]:
        """Write the file of a shard, then its record, which is returned."""
        place = storage.join(self.url, self.name_of(shard))

        def write() -> tuple[dict[str, Any], int]:
            users = 0
            options = {"compression": "zstd", "use_dictionary": ["bundle_version"]}
            with new_file(place) as file, pq.ParquetWriter(file, schema, **options) as writer:
                for table in _grouped(tables()):
                    writer.write_table(table)
                    users += table.num_rows
            return file.entry(), users

        entry, users = retried("write", place, write)
        record = {"entry": entry, "users": users, "inputs": self.inputs}
        storage.write_json(storage.join(self.url, _record_of(shard)), record)
        return record

    def commit(self, description: dict[str, Any], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Write the manifest and return it as a reader gets it: description, inputs, users and files."""
        known = {self.name_of(shard): record["entry"] for shard, record in records.items()}
        users = sum(record["users"] for record in records.values())
        storage.commit(self.url, {**description, "inputs": self.inputs, "users": users}, known)
        return storage.read_manifest(self.url, verify=False)

    def name_of(self, shard: str) -> str:
        """The file of a shard, below `url`."""
        return shard.replace("sequences/", f"{self.folder}/")

    def _finished(self, shards: list[str]) -> dict[str, dict[str, Any]]:
        records = {}
        for name in shards:
            if not storage.exists(record_url := storage.join(self.url, _record_of(name))):
                continue
            record = storage.read_json(record_url)
            self._check_inputs(record["inputs"])
            try:
                storage.verify_file(self.url, self.name_of(name), record["entry"])
            except IntegrityError:
                continue  # made again
            records[name] = record
        return records

    def _check_inputs(self, before: dict[str, Any]) -> None:
        differing = sorted(name for name in self.inputs if before.get(name) != self.inputs[name])
        if differing:
            raise ConfigError(
                f"{self.setting}={self.url}: holds {self.folder} made with other {', '.join(differing)}; "
                f"choose another {self.setting}, or delete it"
            )


def _record_of(shard: str) -> str:
    return shard.replace("sequences/", "parts/").replace(".parquet", ".json")


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting.clear()
    if waiting:
        yield pa.concat_tables(waiting)


@functools.lru_cache(maxsize=1)
def checked_bundle(bundle_url: str) -> Bundle:
    """The bundle, once a process, after its golden requests were answered as they should be."""
    arrange_cpu()
    bundle = load_bundle(bundle_url)
    Recommender(bundle).check_golden()
    return bundle


def bundle_for_part(bundle_url: str) -> Bundle:
    """`checked_bundle` for a task: products may round otherwise with more threads; shards are what is computed side by side."""
    torch.set_num_threads(1)
    return checked_bundle(bundle_url)


def check_catalogue(bundle: Bundle, dataset: SequenceDataset) -> None:
    """Raise CatalogueError unless item ids of the dataset are those of the bundle."""
    theirs, ours = bundle.manifest["catalogue_fingerprint"], dataset.manifest["catalogue_fingerprint"]
    if theirs != ours:
        raise CatalogueError(
            f"bundle {bundle.version} has catalogue {theirs} ({len(bundle.item_keys):,} items), {dataset.url} has {ours} "
            f"({dataset.num_items:,}); give the dataset that the bundle was trained on, or a bundle of this one"
        )
