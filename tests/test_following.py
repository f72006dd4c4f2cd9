"""The service goes where the champion goes, and stays where it is while that cannot be loaded."""

from pathlib import Path

import pytest

from lrurec_dist import storage
from lrurec_dist.errors import BundleError, DataNotReadyError
from lrurec_dist.serve.channels import CHAMPION, move, read_channel
from lrurec_dist.serve.following import ChampionFollower, bundle_of_champion, champion_of
from lrurec_dist.serve.live import LiveRecommender
from lrurec_dist.serve.registry import version_url
from tests.services import promote, write_versions


def test_the_follower_swaps_when_the_champion_moved_and_loads_nothing_otherwise(tmp_path: Path) -> None:
    registry, versions = write_versions(tmp_path)
    live = LiveRecommender(bundle_of_champion(registry, champion_of(registry)))
    follower = ChampionFollower(live, registry, poll_s=60)
    before = live.current
    follower.look()
    assert live.current is before
    for version in (versions[1], versions[0]):
        promote(registry, version)
        follower.look()
        assert live.current.version == version
    assert (follower.swaps, follower.failures) == (2, 0)


def test_a_champion_that_cannot_be_loaded_changes_nothing_and_is_not_loaded_at_every_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry, versions = write_versions(tmp_path)
    live = LiveRecommender(version_url(registry, versions[0]))
    follower = ChampionFollower(live, registry, poll_s=60)
    weights = Path(version_url(registry, versions[1])) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    promote(registry, versions[1])
    for _ in range(3):
        follower.look()
    assert live.current.version == versions[0]
    assert (follower.swaps, follower.failures) == (0, 1)
    assert f"version {versions[0]} goes on; BundleError: " in capsys.readouterr().out
    weights.write_bytes(whole)
    promote(registry, versions[1])  # a move of its own: tried at once
    follower.look()
    assert live.current.version == versions[1]


def test_a_registry_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    registry, versions = write_versions(tmp_path)
    live = LiveRecommender(version_url(registry, versions[0]))
    follower = ChampionFollower(live, registry, poll_s=60)
    storage.write_bytes(f"{registry}/channels/{CHAMPION}.json", b"{")
    follower.look()
    storage.remove_tree(registry)
    follower.look()
    assert (live.current.version, follower.failures) == (versions[0], 2)


def test_only_the_manifest_that_passed_the_gate_is_followed(tmp_path: Path) -> None:
    registry, versions = write_versions(tmp_path)
    move(read_channel(registry, CHAMPION), versions[1], "0" * 64, "by hand", [])
    with pytest.raises(BundleError, match="another manifest"):
        bundle_of_champion(registry, champion_of(registry))
    move(read_channel(registry, CHAMPION), "2026-01-02-gone", "0" * 64, "by hand", [])
    with pytest.raises(BundleError, match="is missing"):
        bundle_of_champion(registry, champion_of(registry))
    with pytest.raises(DataNotReadyError, match=r"has no champion; .*serve\.bundle"):
        champion_of(f"{tmp_path}/empty")
