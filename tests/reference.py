"""Slow float64 truth, written from the paper's equations and from nothing in the package.

Complex matrices stay complex here, every position is visited one after the other, and the full
matrix of scores is built: what the package does fast is compared with what this does plainly.
"""

import numpy as np
import torch


def complex_parameters(state: dict[str, torch.Tensor], blocks: int) -> dict[str, np.ndarray]:
    """The parameters of `LRURec.state_dict()` in float64, with B, b and C as complex arrays."""
    plain = {name: value.detach().double().numpy() for name, value in state.items()}
    for block in range(blocks):
        layer = f"recurrent.{block}."
        weight = plain.pop(layer + "in_proj.weight")
        plain[layer + "B"] = weight[: len(weight) // 2] + 1j * weight[len(weight) // 2 :]
        bias = plain.pop(layer + "in_proj.bias")
        plain[layer + "b"] = bias[: len(bias) // 2] + 1j * bias[len(bias) // 2 :]
        weight = plain.pop(layer + "out_proj.weight")
        plain[layer + "C"] = weight[:, : weight.shape[1] // 2] - 1j * weight[:, weight.shape[1] // 2 :]
    return plain


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """LayerNorm over the last axis, epsilon 1e-5."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function."""
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def user_vectors(p: dict[str, np.ndarray], item_ids: list[int], blocks: int) -> np.ndarray:
    """(len(item_ids), dim): the vector after each item of one history; 0 is padding and drives nothing."""
    x = layer_norm(p["table.weight"][item_ids], p["norm.weight"], p["norm.bias"])
    for block in range(blocks):
        r, f = f"recurrent.{block}.", f"feed_forward.{block}."
        decay = np.exp(-np.exp(p[r + "nu_log"]) + 1j * np.exp(p[r + "theta_log"]))
        state = np.zeros(len(decay), dtype=complex)
        read = np.empty_like(x)
        for t, item_id in enumerate(item_ids):
            drive = np.exp(p[r + "gamma_log"]) * (p[r + "B"] @ x[t] + p[r + "b"])
            state = decay * state + (drive if item_id != 0 else 0)
            read[t] = (p[r + "C"] @ state).real + p[r + "out_proj.bias"]
        x = layer_norm(read + x, p[r + "norm.weight"], p[r + "norm.bias"])
        inner = gelu(x @ p[f + "w_1.weight"].T + p[f + "w_1.bias"])
        x = layer_norm(inner @ p[f + "w_2.weight"].T + p[f + "w_2.bias"] + x, p[f + "norm.weight"], p[f + "norm.bias"])
    return x


def cross_entropy_sum(
    vectors: np.ndarray, weight: np.ndarray, bias: np.ndarray, targets: np.ndarray, include_padding_class: bool
) -> float:
    """Sum over targets of log sum exp of all scores minus the target's score."""
    scores = vectors @ weight.T + bias
    target_scores = scores[np.arange(len(targets)), targets]
    classes = scores if include_padding_class else scores[:, 1:]
    highest = classes.max(1, keepdims=True)
    return float((np.log(np.exp(classes - highest).sum(1)) + highest[:, 0] - target_scores).sum())


def rank_of(scores: np.ndarray, target: int, excluded: set[int]) -> int:
    """Place of `target` among items 1.. when they are sorted by (-score, item_id), excluded ones removed."""
    if target in excluded:
        return len(scores)
    candidates = [item for item in range(1, len(scores)) if item not in excluded]
    return 1 + sorted(candidates, key=lambda item: (-scores[item], item)).index(target)
