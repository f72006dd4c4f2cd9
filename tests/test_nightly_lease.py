"""The lease of nights: one holder, tokens that rise, and what happens to a holder that was asleep."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lrurec_dist.errors import LeaseError
from lrurec_dist.nightly.lease import held


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"{tmp_path}/lease.json"


def test_a_free_lease_is_taken_and_tokens_rise(url):
    tokens = []
    for _ in range(3):
        with held(url, "night 2026-11-21", 30) as lease:
            lease.check()
            tokens.append(lease.token)
    assert tokens == [1, 2, 3]


def test_a_second_run_is_refused_with_the_holder_s_name_as_soon_as_the_first_one_renews(url):
    with (
        held(url, "night 2026-11-21", 0.4),
        pytest.raises(LeaseError, match="token 1, for night 2026-11-21") as error,
        held(url, "b", 0.4),
    ):
        pass
    assert error.value.exit_code == 40
    assert str(os.getpid()) in str(error.value)


def test_of_several_that_come_at_once_one_gets_the_lease(url):
    everybody_asked = threading.Barrier(4)

    def run(number: int) -> int | None:
        everybody_asked.wait()
        try:
            with held(url, f"run {number}", 0.4) as lease:
                everybody_ended.wait()
                return lease.token
        except LeaseError:
            everybody_ended.wait()
            return None

    everybody_ended = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    assert sorted(token for token in found if token) == [1]


def test_a_check_by_a_holder_that_was_replaced_says_by_whom(url):
    with held(url, "first", 3600) as first:
        os.remove(url)
        with held(url, "second", 3600) as second:
            with pytest.raises(LeaseError, match=r"held it with token 1, and now .* for second; this run changes nothing more"):
                first.check()
            second.check()


SLEEPER = """
    from lrurec_dist.nightly.lease import held
    with held({url!r}, "night 2026-11-21", 0.5):
        print("held", flush=True)
        input()
        print("wrote", flush=True)
"""


def started(script: str, until: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while until not in process.stdout.readline():
        assert process.poll() is None
    return process


def test_a_process_that_was_suspended_while_another_took_over_ends_with_40_and_writes_nothing(url):
    process = started(SLEEPER.format(url=url), "held")
    os.kill(process.pid, signal.SIGSTOP)
    with held(url, "the next run", 30) as lease:
        assert lease.token == 2
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(60) == 40
        assert process.stdin is not None
        assert process.stdout is not None
        output = process.stdout.read()
        process.stdin.close()
        process.stdout.close()
        assert "the next run" in output
        assert "wrote" not in output
        lease.check()


def test_a_killed_holder_is_followed_after_its_time(url):
    process = started(SLEEPER.format(url=url), "held")
    process.kill()
    process.communicate()
    with held(url, "again", 30) as lease:
        assert lease.token == 2


def test_a_lease_that_ends_is_free_at_once(url):
    with held(url, "first", 3600):
        pass
    with held(url, "second", 3600) as lease:  # would watch for an hour
        assert lease.token == 2
