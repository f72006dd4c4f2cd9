"""The page to try the service by hand, in a real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lrurec_dist.serve.recommender import Recommender
from lrurec_dist.serve.registry import version_url
from tests.browser import Browser, browser
from tests.services import call, in_thread, write_versions

TOKEN = "a token that nobody guesses"  # noqa: S105
IDLE = "document.body.dataset.busy === 'no'"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found


def test_a_person_types_a_history_and_sees_the_state_move(window: Browser, tmp_path: Path) -> None:
    registry, versions = write_versions(tmp_path, 1, {"i007": "<b>Alpha</b> & Centauri"})
    recommender = Recommender.load(version_url(registry, versions[0]))
    with in_thread(registry) as url:
        window.open(url)
        window.wait(IDLE)
        assert window.texts("#version, #events, #origin") == [versions[0], "0", "new"]
        window.type("#item", "centau")
        window.wait("document.querySelectorAll('#found option').length === 1")
        (offered,) = window.run("return [...document.querySelectorAll('#found option')].map(e => e.value)")
        assert offered == "<b>Alpha</b> & Centauri · i007"
        for text in (offered, "i042\n", "never seen\n"):
            window.type("#item", text)
            if not text.endswith("\n"):
                window.click("#add button.main")
            window.wait(IDLE)
        assert window.texts("#history li") == [offered, "i042", "never seen"]
        assert window.texts("#history li.unknown") == ["never seen"]
        (state,) = recommender.encode([["i007", "i042"]])
        expected = [item.item_key for item in recommender.recommend_from_states([state], 10)[0]]
        assert window.texts("#items tr td:nth-child(2)") == expected
        assert window.texts("#problem, #events, #origin") == ["", "2", "stored"]
        norms = state.recurrent.flatten(1).norm(dim=1).tolist()
        expected_norms = [text for block, norm in enumerate(norms, 1) for text in (f"block {block}", f"{norm:.2f}")]
        assert window.texts("#norms span") == expected_norms
        window.click("#items button")
        window.wait(IDLE)
        assert window.texts("#history li")[3:] == expected[:1]
        assert window.texts("#events") == ["3"]
        user = window.run("return document.getElementById('user').value")
        assert call(f"{url}/recommend", {"user": user, "k": 1})[1]["state"]["events"] == 3
        window.click("#anew")
        window.wait(IDLE)
        assert (window.texts("#history li"), window.texts("#events")) == ([], ["0"])
        window.run("document.getElementById('k').value = 1000")
        window.click("#anew")
        window.wait(IDLE + " && document.getElementById('problem').textContent")
        assert "serve.max_k" in window.texts("#problem")[0]
    assert [line for line in window.complaints() if "422" not in line] == []


def test_the_page_asks_for_the_token_and_works_with_it(window: Browser, tmp_path: Path) -> None:
    registry, versions = write_versions(tmp_path, 1)
    with in_thread(registry, TOKEN) as url:
        window.open(url)
        window.wait("!document.getElementById('enter').hidden")
        for token, version in (("wrong\n", "–"), (TOKEN + "\n", versions[0])):
            window.type("#token", token)
            window.wait(IDLE)
            assert window.texts("#version") == [version]
        assert window.run("return document.getElementById('enter').hidden")
