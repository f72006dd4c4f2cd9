"""The prepared dataset: per-user sequences, hash-sharded, ordered in time, committed by a manifest."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lrurec_dist import storage
from lrurec_dist.data.catalogue import Catalogue, load_catalogue
from lrurec_dist.errors import CatalogueError, ConfigError, DataQualityError, IntegrityError

SCHEMA_VERSION = 3
LENGTHS = "lengths.parquet"  # below the dataset: the histogram of each shard
AUDITS = "audits"  # below the dataset: its splits, proved; not among the files that its manifest lists
MIN_EVALUABLE = 3  # leave-last-out needs one target for test, one for validation, one to train on


class LengthHistogram(NamedTuple):
    """How many sequences there are of each length: users[i] users have lengths[i] interactions.

    Both are int64; lengths ascend, and each occurs once.
    """

    lengths: np.ndarray
    users: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, users: np.ndarray | None = None) -> "LengthHistogram":
        """The histogram of some lengths, in any order, of so many users each; None: of one each."""
        distinct, place, times = np.unique(lengths.astype(np.int64), return_inverse=True, return_counts=True)
        if users is None:
            return cls(distinct, times)
        total = np.zeros(len(distinct), dtype=np.int64)
        np.add.at(total, place, users)
        return cls(distinct, total)

    @classmethod
    def total(cls, histograms: "Iterable[LengthHistogram]") -> "LengthHistogram":
        """The histogram of the sequences of several."""
        nothing = np.empty(0, dtype=np.int64)
        return cls.of(*(np.concatenate(parts) for parts in zip((nothing, nothing), *histograms, strict=True)))


@dataclass(frozen=True)
class SequenceShard:
    """The users of one shard, ragged.

    `item_ids` int64 holds all sequences end to end, oldest first; user i's is
    `item_ids[offsets[i]:offsets[i + 1]]`. `user_keys[i]` is theirs. `timestamps` int64, in the
    dataset's unit, lie beside `item_ids` where they were read.
    """

    user_keys: pa.Array
    offsets: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Interactions per user."""
        return np.diff(self.offsets)


class SequenceDataset:
    """A committed dataset, opened for reading.

    One that a night without news left has no files of its own: it names the dataset that has them.
    """

    def __init__(self, url: str, *, verify: bool = False) -> None:
        self.url = url
        self.place = url  # where its files lie
        self.manifest = storage.read_manifest(url, verify=verify)
        if "same_as" in self.manifest:
            self.place = self.manifest["same_as"]
            files = storage.read_manifest(self.place, verify=verify)["files"]
            if storage.fingerprint(files) != self.manifest["same_as_identity"]:
                raise IntegrityError(f"{url}: has what {self.place} had, but that was replaced; prepare it again")
            self.manifest = {**self.manifest, "files": files}
        if self.manifest.get("schema_version") != SCHEMA_VERSION:
            raise DataQualityError(
                f"{url}: schema_version={self.manifest.get('schema_version')}, this code reads {SCHEMA_VERSION}; prepare it again"
            )

    @property
    def identity(self) -> str:
        """16 hex digits that change with any byte of the dataset."""
        return storage.fingerprint(self.manifest["files"])

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return int(self.manifest["num_items"])

    @property
    def shard_names(self) -> list[str]:
        """Sequence files, in order."""
        return sorted(name for name in self.manifest["files"] if name.startswith("sequences/"))

    @property
    def sequence_bytes(self) -> int:
        """Size of the sequence files."""
        return sum(int(self.manifest["files"][name]["bytes"]) for name in self.shard_names)

    @cached_property
    def lengths(self) -> dict[str, LengthHistogram]:
        """The histogram of lengths of each shard, by its name."""
        table = storage.read_table(storage.join(self.place, LENGTHS))
        shard, lengths, users = (table[name].to_numpy() for name in ("shard", "length", "users"))
        bounds = np.searchsorted(shard, np.arange(len(self.shard_names) + 1))
        return {
            name: LengthHistogram(lengths[begin:end], users[begin:end])
            for name, begin, end in zip(self.shard_names, bounds, bounds[1:], strict=False)
        }

    @cached_property
    def catalogue(self) -> Catalogue:
        """The item catalogue of this dataset."""
        catalogue = load_catalogue(storage.join(self.place, "catalogue"))
        if catalogue.fingerprint != self.manifest["catalogue_fingerprint"]:
            raise CatalogueError(
                f"{self.url}: catalogue {catalogue.fingerprint}, but the manifest names {self.manifest['catalogue_fingerprint']}"
            )
        return catalogue

    def read_shard(self, name: str, *, timestamps: bool = False) -> SequenceShard:
        """The sequences in one file, with their timestamps where asked for."""
        return read_shard(self.place, name, timestamps=timestamps)


def read_shard(place: str, name: str, *, timestamps: bool = False) -> SequenceShard:
    """The sequences in one file of the dataset whose files lie at `place`, with their timestamps where asked for."""
    columns = ["user_key", "item_ids", *(["timestamps"] if timestamps else [])]
    table = storage.read_table(storage.join(place, name), columns=columns)
    lists = table["item_ids"].combine_chunks()
    return SequenceShard(
        user_keys=table["user_key"].combine_chunks(),
        offsets=lists.offsets.to_numpy().astype(np.int64),
        item_ids=lists.values.to_numpy().astype(np.int64),
        timestamps=table["timestamps"].combine_chunks().values.to_numpy().astype(np.int64) if timestamps else None,
    )


def remove_leftovers(url: str) -> None:
    """Delete what an interrupted preparation left of a dataset.

    Raises:
        ConfigError: something else lies there, and stays.
    """
    ours = ("catalogue/", "sequences/", "quarantine/", f"{AUDITS}/", LENGTHS)
    foreign = [name for name in storage.list_files(url) if not name.startswith(ours)]
    if foreign:
        raise ConfigError(
            f"dataset.dir={url}: holds {foreign[0]}, which no preparation wrote; give an empty directory or a new one"
        )
    storage.remove_tree(url)
