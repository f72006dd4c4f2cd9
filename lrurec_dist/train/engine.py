"""The one door to DeepSpeed: a model in, optimizer steps out, state keyed by parameter name.

DeepSpeed's JSON is derived here from our own settings. What its checkpoints cannot do (load at
another world size) is done by name: full optimizer state per parameter, gathered from the ranks
and scattered to them again.
"""

import logging
from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.utils import logger, safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor

from lrurec_dist import collectives
from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.lrurec import RECURRENCE, LRURec
from lrurec_dist.train.optimizer import adamw

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """A model under DeepSpeed.

    Args:
        model: on its device; the same on every rank.
        device: where it computes.
        zero_stage: 0, 1 or 2.
        learning_rate, weight_decay, epsilon: of AdamW. Biases and LayerNorm take no decay.
        decay_recurrence: let weight decay reach nu, theta and gamma, as the original does.
        clip_norm: bound on the global gradient norm.

    Needs an initialised process group; it is used as it is.
    """

    def __init__(
        self,
        model: LRURec,
        *,
        device: torch.device,
        zero_stage: int,
        learning_rate: float,
        weight_decay: float,
        decay_recurrence: bool,
        epsilon: float,
        clip_norm: float,
    ) -> None:
        logger.setLevel(logging.WARNING)
        if device.type == "cpu":
            # Compiling this op takes a minute, and a killed build blocks every later start for ever.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        named = list(model.named_parameters())
        exempt_names = ("bias", "norm.weight", *(() if decay_recurrence else RECURRENCE))
        groups = [
            {"params": [p for name, p in named if not name.endswith(exempt_names)], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name.endswith(exempt_names)], "weight_decay": 0.0},
        ]
        optimizer = adamw(groups, learning_rate=learning_rate, epsilon=epsilon)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: batches are cut by our data order
            "gradient_accumulation_steps": 1,
            "steps_per_print": 2**31,
            "gradient_clipping": clip_norm,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,  # DeepSpeed lists Adam, its parent class, by exact type
        }
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self._named = named
        self._zero_stage = zero_stage
        self.model = model
        self._create_moments()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The model's forward pass."""
        output: Tensor = self._engine(*inputs)
        return output

    def step(self, loss_sum: Tensor, num_targets: int) -> None:
        """One optimizer update from a sum over this rank's targets.

        Args:
            loss_sum: scalar with a graph, summed over this rank's targets.
            num_targets: targets on all ranks together, so that the gradient is that of the mean
                over the global batch whatever the number of ranks.
        """
        # DeepSpeed averages gradients over ranks; times world_size, the average is the sum.
        self._engine.backward(loss_sum * (collectives.world_size() / num_targets))
        self._engine.step()

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self._named}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Both Adam moments of every parameter, whole, as `<moment>/<name>`; all ranks must call."""
        return {name: moment.detach().cpu().clone() for name, moment in self._moments()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, then every moment as `<moment>/<name>`, whole, where they are computed, one at a time.

        All ranks must go through all of them, as each is gathered from the ranks when its turn comes.
        """
        for name, parameter in self._named:
            yield name, parameter.detach()
        yield from self._moments()

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named:
            for moment in _MOMENTS:
                whole = (
                    self._inner.state[parameter][moment]
                    if self._zero_stage == 0
                    else safe_get_full_optimizer_state(parameter, moment)
                )
                yield f"{moment}/{name}", whole

    def load(self, parameters: dict[str, Tensor], optimizer_state: dict[str, Tensor], step: int) -> None:
        """Take over parameters, moments and step count, saved at any world size and ZeRO stage.

        Raises:
            CheckpointError: a name or a shape does not fit this model.
        """
        expected = {name: tuple(p.shape) for name, p in self._named}
        found = {name: tuple(p.shape) for name, p in parameters.items()}
        if expected != found:
            odd = sorted(set(expected.items()) ^ set(found.items()))[0]
            raise CheckpointError(
                f"parameter {odd[0]} {odd[1]} is not in both checkpoint and model; model.* or the catalogue differ"
            )
        for name, parameter in self._named:
            value = parameters[name].to(parameter.device)
            with torch.no_grad():
                parameter.copy_(value)
            if self._zero_stage > 0:
                safe_set_full_fp32_param(parameter, value)
        for name, parameter in self._named:
            for moment in _MOMENTS:
                value = optimizer_state[f"{moment}/{name}"].to(parameter.device)
                if self._zero_stage == 0:
                    self._inner.state[parameter][moment].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)
        for state in self._inner.state.values():
            state["step"].fill_(step)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrapper."""
        optimizer = self._engine.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _create_moments(self) -> None:
        """Give AdamW the state that torch would make at the first step, and link it to parameter names.

        DeepSpeed links state to names after the step of the *first* group, when the second has
        none yet, and never again; so everything has to be there before.
        """
        for group in self._inner.param_groups:
            for parameter in group["params"]:
                self._inner.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),  # the fused step counts where the parameter is
                    **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
                }
        if self._zero_stage > 0:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
