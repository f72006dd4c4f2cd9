"""User states as bytes: the same state back, and nothing from bytes that are not one."""

import struct
import zlib

import pytest
import torch

from lrurec_dist.errors import StateError, StateVersionError
from lrurec_dist.serve.user_state import UserState


def build_state(recent: tuple[int, ...] = (3, 2**31 - 1, 1)) -> UserState:
    torch.manual_seed(0)
    return UserState("2026-01-02-é", torch.randn(2, 2, 8), torch.randn(6), recent, 2**40)


@pytest.mark.parametrize("recent", [(), (5,), (3, 2**31 - 1, 1)])
def test_bytes_make_the_same_state_again(recent: tuple[int, ...]) -> None:
    state = build_state(recent)
    again = UserState.from_bytes(state.to_bytes())
    assert (again.version, again.recent, again.events) == (state.version, recent, 2**40)
    assert torch.equal(again.recurrent, state.recurrent)
    assert torch.equal(again.vector, state.vector)
    assert again.to_bytes() == state.to_bytes()
    assert len(state.to_bytes()) < 4 * (32 + 6 + len(recent)) + 64, "little is added to the numbers"


def test_every_changed_byte_is_noticed() -> None:
    data = build_state().to_bytes()
    for place in range(len(data)):
        with pytest.raises(StateError):
            UserState.from_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])


@pytest.mark.parametrize(
    "data", [b"", b"LRUS", build_state().to_bytes()[:-1], build_state().to_bytes() + b"\0", b"\x80\x04K\x01." * 20]
)
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    with pytest.raises(StateError, match="make a new one from the user's history"):
        UserState.from_bytes(data)


def test_a_header_that_promises_more_than_there_is_reserves_nothing() -> None:
    data = bytearray(build_state().to_bytes()[:-4])
    struct.pack_into("<I", data, 12, 2**32 - 1)  # hidden
    with pytest.raises(StateError, match="its header says"):
        UserState.from_bytes(bytes(data) + struct.pack("<I", zlib.crc32(data)))


def test_another_format_is_refused() -> None:
    data = bytearray(build_state().to_bytes()[:-4])
    struct.pack_into("<H", data, 4, 9)
    with pytest.raises(StateError, match="format=9, this code reads 1"):
        UserState.from_bytes(bytes(data) + struct.pack("<I", zlib.crc32(data)))


def test_another_version_is_refused_with_both_and_the_way_out() -> None:
    build_state().check_version("2026-01-02-é")
    with pytest.raises(StateVersionError, match=r"version=2026-01-02-é: this is version other.*from the user's history"):
        build_state().check_version("other")
