"""The stage beside a night: states of the users of its dataset, from its bundle."""

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.ray_session import RaySession
from lrurec_dist.reporting import Status, progress_of, say
from lrurec_dist.serve.states import StateOptions, encode_dataset
from lrurec_dist.stage_recommend import bundle_of, passes_of

LOCAL_EVENTS = 10**7  # so many take threads of this process some minutes


def make_states(config: Config, status: Status, session: RaySession) -> None:
    """Write the states, or find them, and commit the stage.

    Raises:
        DataNotReadyError: no dataset, or no bundle.
        LrurecError: as `encode_dataset`.
    """
    bundle_url = bundle_of(config, status, "states", config.states.bundle)
    dataset = SequenceDataset(config.dataset_url)
    options = StateOptions(recent_items=config.states.recent_items, batch_size=config.evaluate.batch_size)
    passes = passes_of(session, by_ray=int(dataset.manifest["interactions"]) > LOCAL_EVENTS)
    manifest, was_there = encode_dataset(config.states_url, bundle_url, dataset, options, passes, progress_of("states"))
    if was_there:
        say(f"states: skipped, {config.states_url} holds these states")
    say(f"states: {manifest['users']:,} users by bundle {manifest['bundle_version']}, {config.states_url}")
    status.commit("states", storage.fingerprint(manifest["inputs"]), {"url": config.states_url})
