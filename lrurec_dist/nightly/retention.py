"""What old nights need not keep: all but small files, unless something that lives still needs it."""

from collections.abc import Sequence
from dataclasses import dataclass

from lrurec_dist import storage
from lrurec_dist.nightly.records import LINEAGE, NIGHT, NightRecord
from lrurec_dist.reporting import METRICS
from lrurec_dist.run_report import REPORT
from lrurec_dist.serve.channels import CANDIDATE, CHAMPION, read_channel
from lrurec_dist.stage_evaluate import EVALUATION, FIGURES
from lrurec_dist.stage_prepare import UNFILTERED

SMALL = {"config.yaml", "status.json", METRICS, REPORT, NIGHT, LINEAGE, "bad_batches.jsonl"}


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A night that keeps its small files alone: what goes, in the order in which it goes, and how many bytes that frees."""

    date: str
    urls: list[str]
    bytes: int


def what_to_remove(records: Sequence[NightRecord], registry_url: str, keep: int) -> list[Removal]:
    """Large files of nights that are neither among the latest `keep` nor needed, the oldest night first.

    Args:
        records: all nights, the latest first.
        registry_url: whose channels name versions that serve, were looked at last, or may be rolled back to.
        keep: 0 keeps all.
    """
    if keep == 0:
        return []
    needed = _needed(records, registry_url, {record.date for record in records[:keep]})
    found = [_large_files(record) for record in reversed(records) if record.date not in needed]
    return [removal for removal in found if removal.urls]


def apply(removal: Removal) -> None:
    """Remove it; interrupted, it is found again."""
    for url in removal.urls:
        storage.remove_tree(url)


def _needed(records: Sequence[NightRecord], registry_url: str, kept: set[str]) -> set[str]:
    """Nights to keep, and those with a dataset, a checkpoint or an evaluation that the next night or a rollback would use."""
    versions: set[str] = set()
    for name in (CHAMPION, CANDIDATE):
        versions |= set(read_channel(registry_url, name).versions)
    needed = kept | {record.date for record in records if record.published.get("version") in versions}
    newest_dataset = next((record.date for record in records if record.dataset), "")
    newest_done = next((record.date for record in records if record.result == "done"), "")
    needed |= {newest_dataset, newest_done}
    for record in records:
        if record.date > newest_done and record.night and not record.lineage:  # it goes on from these
            urls = (record.night.parent, record.night.previous)
            needed |= {other.date for other in records for url in urls if _below(url, other)} | {record.date}
    places = [place for record in records if record.date in needed for place in _places(record)]
    return needed | {other.date for other in records for place in places if _below(place, other)}


def _places(record: NightRecord) -> list[str]:
    """Where the files of a night's datasets lie, if elsewhere: a night without new files has none of its own."""
    urls = [storage.join(record.url, name) for name in ("dataset", f"dataset{UNFILTERED}")]
    manifests = [storage.read_manifest(url, verify=False) for url in urls if storage.is_committed(url)]
    return [manifest["same_as"] for manifest in manifests if "same_as" in manifest]


def _below(url: str, record: NightRecord) -> bool:
    return url == record.url or url.startswith(f"{record.url}/")


def _large_files(record: NightRecord) -> Removal:
    urls = [storage.join(record.url, name) for name in storage.list_names(record.url) if name not in {*SMALL, EVALUATION}]
    evaluation = storage.join(record.url, EVALUATION)
    for kind in storage.list_names(evaluation):  # its manifest first: without the ranks it is none
        names = sorted(storage.list_names(storage.join(evaluation, kind)), key=lambda name: name != storage.MANIFEST)
        urls += [storage.join(evaluation, kind, name) for name in names if name != FIGURES]
    sizes = [int(version.split()[0]) for url in urls for version in storage.expand(url).values()]
    return Removal(date=record.date, urls=urls, bytes=sum(sizes))
