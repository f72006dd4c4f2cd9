"""DeepSpeed's JSON, derived from our own settings, with a user's extras merged in and checked.

DeepSpeed ignores keys it does not know. Which ones it knows is asked of DeepSpeed itself: its
parser runs over a mapping that remembers what it was asked for. That is the one place that needs
DeepSpeed, which is a worker's business; the rest is asked by the driver before there are workers.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch

from lrurec_dist.errors import ConfigError

Offload = Literal["none", "cpu"]

_OWNERS = {  # sections that we never derive, because what they say is said elsewhere
    "optimizer": "train.learning_rate, train.weight_decay and train.epsilon",
    "scheduler": "train.schedule",
    "train_batch_size": "batch.global_batch_size or batch.tokens",
}


def derive(**settings: Any) -> dict[str, Any]:
    """The JSON of a run, from the arguments of `merge_extras`.

    Raises:
        ConfigError: as `merge_extras`, or DeepSpeed does not know or take an extra.
    """
    merged = merge_extras(**settings)
    _check_known(merged)
    return merged


def merge_extras(
    *,
    device: torch.device,
    zero_stage: int,
    accumulation: int = 1,
    offload_optimizer: Offload = "none",
    offload_parameters: Offload = "none",
    extras: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What follows from our settings, with a user's extras, which DeepSpeed has not looked at.

    Args:
        device: where this rank computes.
        zero_stage: what DeepSpeed partitions: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too.
        accumulation: micro-batches of an update.
        offload_optimizer: where optimizer state lies when it is not in use,
        offload_parameters: and partitioned parameters; `none` is the device.
        extras: the user's keys, nested as in DeepSpeed's documentation.

    Raises:
        ConfigError: an extra contradicts what is derived; offloading from a CPU.
    """
    for setting, where in (("offload_optimizer", offload_optimizer), ("offload_parameters", offload_parameters)):
        if where != "none" and device.type == "cpu":
            raise ConfigError(f"train.{setting}={where}: this run computes on the CPU, where everything lies already; set none")
    zero: dict[str, Any] = {"stage": zero_stage, "offload_optimizer": {"device": offload_optimizer}}
    if zero_stage in (1, 2) and offload_optimizer == "none":
        zero["compute_grad_norm"] = False  # the engine takes its own, which others may add to
    if zero_stage == 3:
        zero["offload_param"] = {"device": offload_parameters}
    derived = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: batches are cut by our data order
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # by the engine
        "steps_per_print": 2**31,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every step
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # DeepSpeed lists Adam, its parent class, by exact type
        "zero_force_ds_cpu_optimizer": False,  # AdamW's fused form does the same, and needs no compiler
    }
    return _merged(derived, extras or {}, "train.deepspeed")


def _merged(derived: Mapping[str, Any], extras: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Both, if they agree wherever both say something."""
    merged = dict(derived)
    for key, value in extras.items():
        name = f"{path}.{key}"
        if path == "train.deepspeed" and key in _OWNERS:
            raise ConfigError(f"{name}={value}: is said by {_OWNERS[key]}; set these, and leave {key} out")
        if key not in derived:
            merged[key] = value
        elif isinstance(derived[key], Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(derived[key], value, name)
        elif derived[key] != value:
            raise ConfigError(f"{name}={value}: contradicts {derived[key]}, which follows from the other settings; leave it out")
    return merged


class _Asked(dict[str, Any]):
    """A mapping that remembers the keys it was asked for, copies of it included."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.keys_asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)


def _check_known(config: dict[str, Any]) -> None:
    """Refuse what DeepSpeed's parser refuses, and keys that it never asks for."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    asked = _Asked(config)
    try:
        DeepSpeedConfig(asked)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"train.deepspeed: {error.title}: {key}: {problem['msg']}; see DeepSpeed's documentation") from None
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"train.deepspeed: {error}; see DeepSpeed's documentation") from None
    unknown = sorted(config.keys() - asked.keys_asked)
    if unknown:
        raise ConfigError(
            f"train.deepspeed.{unknown[0]}: DeepSpeed knows no such key and would ignore it; see its documentation, "
            "or leave it out"
        )
