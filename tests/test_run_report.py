"""What a run's files say arrives in its report."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lrurec_dist import storage
from lrurec_dist.config_file import load_config
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.reporting import METRICS, MetricsFile
from lrurec_dist.run_report import doubling_bars, write_report
from tests.datasets import write_dataset
from tests.test_report import Page, figures


def test_bars_double_and_lose_nothing() -> None:
    values, weights = np.array([0, 1, 2, 3, 4, 7, 8, 1000]), np.array([9, 1, 1, 1, 1, 1, 5, 2])
    bars = doubling_bars(values, weights)
    assert bars[:5] == [("0", 9), ("1", 1), ("2–3", 2), ("4–7", 2), ("8–15", 5)]
    assert bars[-1] == ("512–1023", 2)
    assert doubling_bars(np.array([5, 6]), np.array([1, 1])) == [("4–7", 2)]
    assert doubling_bars(np.array([], dtype=np.int64), np.array([])) == []


@pytest.mark.parametrize("has_before", [True, False])
def test_a_report_shows_the_later_record_of_a_step_and_links_the_run_before(tmp_path: Path, has_before: bool) -> None:
    dataset = write_dataset(str(tmp_path / "data"), [[1, 2, 3], [4, 5, 6, 7]], 9)
    before = tmp_path / "the run before"
    if has_before:
        storage.write_bytes(str(before / "report.html"), b"before")
    config = load_config(None, [f"run_dir={tmp_path / 'run'}", f"dataset.dir={dataset.url}"])
    records = MetricsFile(f"{config.run_dir}/{METRICS}")
    shares = {"waiting_share": 0.25, "forward_share": 0.25, "padding_share": 0.9}
    for step, loss in ((50, 7.0), (100, 999.0), (100, 5.0)):  # the last one after a kill
        records.write("train", step=step, loss=loss, targets_per_s=10.0, **shares)
    records.write("validation", step=100, **{"recall@10": 0.5, "ndcg@10": 0.25})
    torch.manual_seed(0)
    model = LRURec(num_items=9, dim=4, hidden=3, blocks=2, dropout=0.0)
    url = write_report(config, dataset, model, [{**figures(), "model": "/checkpoints/7"}], str(before))
    page = Page(Path(url).read_text())
    text = " ".join(page.text)
    assert "loss: 5 at 100" in text
    assert "999" not in text
    for block, (recurrent, _) in enumerate(model.layers(), start=1):
        assert f"Block {block}: |λ| of 3 hidden units" in text
        assert f"largest {recurrent.decay().norm(dim=0).max():.5f}" in text
    assert "waiting 25%" in text
    assert "other 50%" in text, "padding is no share of the time"
    assert ["interactions", "7"] in page.rows
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == (["../the%20run%20before/report.html"] if has_before else [])
