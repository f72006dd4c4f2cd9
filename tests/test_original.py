"""Importing a checkpoint of the public LRURec code."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.original import load_original


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "original.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def state(golden: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name[6:]: torch.from_numpy(array) for name, array in golden.items() if name.startswith("param/")}


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_original_checkpoint_gives_its_scores(
    tmp_path: Path, golden: dict[str, np.ndarray], state: dict[str, torch.Tensor], wrapped: bool
) -> None:
    path = tmp_path / "best_acc_model.pth"
    torch.save({"model_state_dict": state, "epoch": 3} if wrapped else state, path)
    model = load_original(path).eval()
    item_ids = torch.from_numpy(golden["x"])
    scores = model(item_ids, item_ids > 0) @ model.item_rows().T + model.table.bias
    torch.testing.assert_close(scores, torch.from_numpy(golden["logits"])[item_ids > 0], rtol=1e-4, atol=1e-5)


def test_a_file_that_would_execute_code_is_refused_and_does_not(tmp_path: Path) -> None:
    path, proof = tmp_path / "evil.pth", tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (proof,)

    torch.save({"model_state_dict": Evil()}, path)
    with pytest.raises(CheckpointError, match="not a file of tensors"):
        load_original(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Evil()))  # noqa: S301
    assert proof.exists(), "the same object does execute elsewhere, or the test would prove nothing"


def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "other.pth"
    for content, message in (
        ({**state, "model.extra": torch.zeros(1)}, "model.extra is missing or unknown"),
        ({name: value for name, value in state.items() if name != "model.bias"}, "model.bias is missing"),
        ({"weight": torch.zeros(1)}, "not a state dict of the original"),
        ([1, 2], "holds no state dict"),
        ({"model_state_dict": {"a": 3}}, "holds no state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            load_original(path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a file of tensors"):
        load_original(path)
