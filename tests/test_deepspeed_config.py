"""What DeepSpeed is told: derived from our settings, with extras that are checked against DeepSpeed itself."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from lrurec_dist.errors import ConfigError
from lrurec_dist.train.deepspeed_config import derive

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def derived(extras: dict[str, Any] | None = None, zero_stage: int = 1) -> dict[str, Any]:
    return derive(device=CPU, zero_stage=zero_stage, extras=extras)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_deepspeed_reads_what_is_derived(zero_stage: int) -> None:
    parsed = DeepSpeedConfig(derive(device=CPU, zero_stage=zero_stage, accumulation=3))
    assert parsed.zero_optimization_stage == zero_stage
    assert parsed.gradient_accumulation_steps == 3
    assert parsed.gradient_clipping == 0
    assert not parsed.timers_config.enabled


def test_offloading_reaches_deepspeed() -> None:
    parsed = DeepSpeedConfig(derive(device=GPU, zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")).zero_config
    assert (parsed.offload_optimizer.device, parsed.offload_param.device) == ("cpu", "cpu")


@pytest.mark.parametrize("setting", ["offload_optimizer", "offload_parameters"])
def test_a_cpu_has_nowhere_to_offload_to(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.{setting}=cpu: this run computes on the CPU.*set none"):
        derive(device=CPU, zero_stage=3, **{setting: "cpu"})  # type: ignore[arg-type]


def test_extras_join_what_is_derived_at_every_depth() -> None:
    merged = derived({"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True})
    assert merged["zero_optimization"] == {**derived()["zero_optimization"], "overlap_comm": True}
    assert DeepSpeedConfig(merged).zero_config.overlap_comm
    assert DeepSpeedConfig(merged).wall_clock_breakdown


def test_an_extra_may_repeat_what_is_derived() -> None:
    assert derived({"zero_optimization": {"stage": 1}, "fp16": {"enabled": False}}) == derived()


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage=2: contradicts 1"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping=1\.0: contradicts 0\.0"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled=True: contradicts False"),
        ({"zero_optimization": 2}, r"zero_optimization=2: contradicts .*'stage': 1"),
        ({"optimizer": {"type": "Lamb"}}, r"optimizer=.*: is said by train\.learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler=.*: is said by train\.schedule"),
        ({"train_batch_size": 7}, r"train_batch_size=7: is said by batch\.global_batch_size"),
    ],
)
def test_an_extra_that_contradicts_is_refused_with_both_values(extras: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.deepspeed\.{message}"):
        derived(extras)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"wall_clock_breakdwon": True}, r"^train\.deepspeed\.wall_clock_breakdwon: DeepSpeed knows no such key"),
        ({"gradient_clip": 0.0}, r"^train\.deepspeed\.gradient_clip: DeepSpeed knows no such key"),
        ({"zero_optimization": {"overlap_com": True}}, r"^train\.deepspeed: .*overlap_com: Extra inputs are not permitted"),
        ({"zero_optimization": {"overlap_comm": "later"}}, r"^train\.deepspeed: .*overlap_comm: Input should be a valid boolean"),
        ({"sparse_gradients": True}, r"^train\.deepspeed: .*has been removed"),
        ({"zero_optimization": {"cpu_offload": True}}, r"^train\.deepspeed: .*cpu_offload.*offload_optimizer"),
        ({"communication_data_type": "fp7"}, r"^train\.deepspeed: .*communication_data_type.*fp7"),
    ],
)
def test_what_deepspeed_does_not_know_or_take_is_refused(extras: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        derived(extras)
