"""Weights of the public LRURec code, as this package names and stores them."""

from pathlib import Path

import torch
from torch import Tensor

from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.lrurec import LRURec

_PER_BLOCK = {
    "lru_layer.params_log",
    *(f"lru_layer.{name}.{kind}" for name in ("in_proj", "out_proj", "layer_norm") for kind in ("weight", "bias")),
    *(f"feed_forward.{name}.{kind}" for name in ("w_1", "w_2", "layer_norm") for kind in ("weight", "bias")),
}


def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `LRURec.state_dict()` from those of the original's.

    Re(C h) = Cr hr - Ci hi, so the imaginary part of C is stored negated; the imaginary part of
    its bias has no effect and is dropped. Linear in the tensors, so gradients convert as well.

    Raises:
        CheckpointError: a tensor is missing or is not one of the original's.
    """
    blocks = len([name for name in state if name.endswith("lru_layer.params_log")])
    outer = {"embedding.token.weight", "embedding.layer_norm.weight", "embedding.layer_norm.bias", "model.bias"}
    expected = outer | {f"model.lru_blocks.{block}.{name}" for block in range(blocks) for name in _PER_BLOCK}
    if blocks == 0 or expected != set(state):
        odd = sorted(expected ^ set(state))[:3]
        raise CheckpointError(
            f"not a state dict of the original LRURec: {', '.join(odd) or 'no recurrent layer'} "
            f"{'is' if len(odd) == 1 else 'are'} missing or unknown"
        )
    ours = {
        "table.weight": state["embedding.token.weight"],
        "table.bias": state["model.bias"],
        "norm.weight": state["embedding.layer_norm.weight"],
        "norm.bias": state["embedding.layer_norm.bias"],
    }
    for block in range(blocks):
        theirs, layer, ffn = f"model.lru_blocks.{block}.", f"recurrent.{block}.", f"feed_forward.{block}."
        ours |= dict(
            zip((layer + "nu_log", layer + "theta_log", layer + "gamma_log"), state[theirs + "lru_layer.params_log"], strict=True)
        )
        into, out = (state[f"{theirs}lru_layer.{name}.weight"] for name in ("in_proj", "out_proj"))
        into_bias, out_bias = (state[f"{theirs}lru_layer.{name}.bias"] for name in ("in_proj", "out_proj"))
        ours[layer + "in_proj.weight"] = torch.cat([into.real, into.imag])
        ours[layer + "in_proj.bias"] = torch.cat([into_bias.real, into_bias.imag])
        ours[layer + "out_proj.weight"] = torch.cat([out.real, -out.imag], dim=1)
        ours[layer + "out_proj.bias"] = out_bias.real
        for kind in ("weight", "bias"):
            ours[layer + f"norm.{kind}"] = state[theirs + f"lru_layer.layer_norm.{kind}"]
            ours[ffn + f"norm.{kind}"] = state[theirs + f"feed_forward.layer_norm.{kind}"]
            for name in ("w_1", "w_2"):
                ours[ffn + f"{name}.{kind}"] = state[theirs + f"feed_forward.{name}.{kind}"]
    return {name: tensor.detach().clone() for name, tensor in ours.items()}


def load_original(path: str | Path, *, dropout: float = 0.0) -> LRURec:
    """The model in a `best_acc_model.pth` of the public LRURec code.

    The file is read as tensors only, so it cannot execute anything.

    Raises:
        CheckpointError: the file holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, EOFError, RuntimeError, KeyError by file
        raise CheckpointError(f"{path}: not a file of tensors that torch can read safely ({type(error).__name__})") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no state dict of tensors")
    ours = from_original(state)
    blocks = len([name for name in ours if name.endswith("nu_log")])
    classes, dim = ours["table.weight"].shape
    model = LRURec(num_items=classes - 1, dim=dim, hidden=len(ours["recurrent.0.nu_log"]), blocks=blocks, dropout=dropout)
    model.load_state_dict(ours)
    return model
