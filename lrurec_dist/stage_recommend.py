"""The stage beside a night: lists for the users of its dataset, from its bundle."""

import os

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.data.numbering import keys_in
from lrurec_dist.data.passes import LocalPasses, Passes, RayPasses
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import DataNotReadyError
from lrurec_dist.ray_session import RaySession
from lrurec_dist.reporting import Status, progress_of, say
from lrurec_dist.serve.recommendations import ListOptions, recommend_dataset

LOCAL_SCORES = 10**11  # of users and items; so many take threads of this process a minute or two
_NAMED = 5  # unknown users in the message


def bundle_of(config: Config, status: Status, section: str, bundle: str) -> str:
    """URL of the bundle that a section's setting names, else of the run's; the run's dataset is there, too.

    Raises:
        DataNotReadyError: no bundle, or no dataset.
    """
    bundle_url = bundle or status.stages.get("bundle", {}).get("outputs", {}).get("url", "")
    if not bundle_url:
        raise DataNotReadyError(f"{section}.bundle is not set, and {config.run_dir} has no bundle; run jobs/train.py first")
    for setting, place in ((f"{section}.bundle", bundle_url), ("dataset.dir", config.dataset_url)):
        if not storage.is_committed(place):
            raise DataNotReadyError(f"{setting}={place} does not exist, or is being written; run jobs/train.py first")
    return bundle_url


def passes_of(session: RaySession, *, by_ray: bool) -> Passes:
    """Ray tasks, or as many threads of this process as it has cores."""
    if not by_ray:
        return LocalPasses(threads=os.cpu_count() or 1)
    session.connect()
    return RayPasses(session.data_resources)


def recommend(config: Config, status: Status, session: RaySession) -> None:
    """Write the lists, or find them, and commit the stage.

    Raises:
        DataNotReadyError: no dataset, no bundle, or no file of users.
        LrurecError: as `recommend_dataset`.
    """
    settings = config.recommend
    bundle_url = bundle_of(config, status, "recommend", settings.bundle)
    if settings.users and not storage.exists(settings.users):
        raise DataNotReadyError(f"recommend.users={settings.users} does not exist; one user key a line, or nothing for all users")
    dataset = SequenceDataset(config.dataset_url)
    options = ListOptions(
        k=settings.k,
        exclude_history=settings.exclude_history,
        batch_size=config.evaluate.batch_size,
        users=keys_in(settings.users),
    )
    users = int(dataset.manifest["users"]) if options.users is None else len(options.users)
    passes = passes_of(session, by_ray=users * dataset.num_items > LOCAL_SCORES)
    manifest, was_there = recommend_dataset(
        config.recommendations_url, bundle_url, dataset, options, passes, progress_of("recommend")
    )
    if was_there:
        say(f"recommend: skipped, {config.recommendations_url} holds these lists")
    if manifest["unknown_users"]:
        unknown_url = storage.join(config.recommendations_url, "unknown_users.txt")
        names = storage.read_bytes(unknown_url).decode().splitlines()
        more = ", …" if len(names) > _NAMED else ""
        say(
            f"recommend: {len(names):,} of the users asked for are unknown to {dataset.url}: {', '.join(names[:_NAMED])}{more}; all in {unknown_url}"
        )
    say(
        f"recommend: {settings.k} items for {manifest['users']:,} users by bundle {manifest['bundle_version']}, {config.recommendations_url}"
    )
    status.commit("recommend", storage.fingerprint(manifest["inputs"]), {"url": config.recommendations_url})
