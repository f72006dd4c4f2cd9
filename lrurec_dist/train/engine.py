"""The one door to DeepSpeed: a model in, optimizer steps out, state keyed by parameter name.

What DeepSpeed's checkpoints cannot do (load at another world size) is done by name: full optimizer
state per parameter, gathered from the ranks and scattered to them again. What its clipping cannot
do (count gradients that lie elsewhere) is done here: AdamW's fused form divides by a scale and
skips a step when told to, without the host waiting for either.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from lrurec_dist import collectives
from lrurec_dist.errors import CheckpointError
from lrurec_dist.model.lrurec import RECURRENCE, LRURec
from lrurec_dist.train.optimizer import adamw
from lrurec_dist.train.pieces import Piece, pieces_of_rank

_MOMENTS = ("exp_avg", "exp_avg_sq")
T = TypeVar("T")


@dataclass(frozen=True)
class ClipResult:
    """What an update did with its gradient; scalars on the device, the same on every rank.

    `norm` is that of the whole gradient before clipping, `factor` what the gradient was multiplied
    with, min(1, clip_norm / norm). `skipped` is 1.0 if the norm was not finite, and then no
    parameter, moment or step count changed on any rank; else 0.0.
    """

    norm: Tensor
    factor: Tensor
    skipped: Tensor


class Engine:
    """A model under DeepSpeed.

    Args:
        model: on its device; the same on every rank.
        device: where it computes.
        config: DeepSpeed's JSON, from `deepspeed_config.derive`.
        learning_rate, weight_decay, epsilon: of AdamW. Biases and LayerNorm take no decay.
        decay_recurrence: let weight decay reach nu, theta and gamma, as the original does.
        clip_norm: bound on the global gradient norm.
        apart: a part of the model that somebody else trains and keeps; DeepSpeed does not see it.

    An update is as many `backward` as the config accumulates, then `update`; the same calls on
    every rank. Needs an initialised process group; it is used as it is.
    """

    def __init__(
        self,
        model: LRURec,
        *,
        device: torch.device,
        config: Mapping[str, Any],
        learning_rate: float,
        weight_decay: float,
        decay_recurrence: bool,
        epsilon: float,
        clip_norm: float,
        apart: nn.Module | None = None,
    ) -> None:
        logger.setLevel(logging.WARNING)
        # DeepSpeed calls collectives by names that torch is about to drop; nobody who trains can do anything about it.
        warnings.filterwarnings("ignore", r".*torch\.distributed\..* is deprecated", FutureWarning)
        if device.type == "cpu":
            # Compiling this op takes a minute, and a killed build blocks every later start for ever.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        others = set() if apart is None else set(apart.parameters())
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter not in others]
        exempt_names = ("bias", "norm.weight", *(() if decay_recurrence else RECURRENCE))
        groups = [
            {"params": [p for name, p in named if not name.endswith(exempt_names)], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name.endswith(exempt_names)], "weight_decay": 0.0},
        ]
        optimizer = adamw(groups, learning_rate=learning_rate, epsilon=epsilon)
        self._named = named
        # as this rank holds them; stage 3 leaves nothing of the parameters' own
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._held: dict[str, slice] = {}  # rows of parameters that are not whole on a rank even then
        parts = [model] if apart is None else [part for part in model.children() if part is not apart]
        self._engine, *_ = deepspeed.initialize(model=_Scope(parts), optimizer=optimizer, config=dict(config))
        self._zero_stage = int(config["zero_optimization"]["stage"])
        self._offloaded = config["zero_optimization"]["offload_optimizer"]["device"] != "none"
        self.accumulation = int(config["gradient_accumulation_steps"])
        # Below stage 2 gradients are reduced when `reduce` asks for it, so that its time is known.
        self._engine.enable_backward_allreduce = self._zero_stage >= 2
        self._device, self._clip_norm = device, clip_norm
        self._backwards, self._reduced = 0, False
        self.model = model
        self._create_moments()

    def __call__(self, compute: Callable[..., T], *args: Any) -> T:
        """compute(*args), which finds the model's parameters whole whatever the ZeRO stage.

        With stage 3, parameters are there within this call and the backward pass of the tensors
        it returns, and nowhere else.
        """
        result: T = self._engine(compute, *args)
        return result

    def backward(self, loss_sum: Tensor, num_targets: int) -> None:
        """Add to the gradient from a sum over this rank's targets of one micro-batch.

        Args:
            loss_sum: scalar with a graph, summed over the micro-batch; it may have no target.
            num_targets: targets of the update, on all ranks and in all micro-batches together, so
                that the gradient is that of the mean over the global batch however it is spread.
        """
        self._backwards += 1
        self._engine.set_gradient_accumulation_boundary(self._backwards == self.accumulation)
        # DeepSpeed averages gradients over ranks; times world_size, the average is the sum.
        self._engine.backward(loss_sum * (collectives.world_size() / num_targets), scale_wrt_gas=False)
        if self._backwards < self.accumulation:
            self._engine.step()  # counts a micro-batch

    def reduce(self) -> None:
        """Add up the gradients of all ranks, where the backward passes have left that to do: below stage 2.

        `update` does it itself where nobody has asked before it for the sake of its time.
        """
        if not self._engine.enable_backward_allreduce and not self._reduced:
            self._engine.allreduce_gradients()
        self._reduced = True

    def update(self, outside_sq_norm: float | Tensor = 0.0) -> ClipResult:
        """One optimizer step with the gradient that was added up, clipped by its global norm.

        Args:
            outside_sq_norm: square of the norm, over all ranks, of gradients that belong to the
                same update but are kept elsewhere; the same on every rank. Who keeps them
                multiplies them with the result's `factor`, and leaves them if it is `skipped`.
        """
        assert self._backwards == self.accumulation, "an update needs all of its micro-batches"
        self.reduce()
        self._backwards, self._reduced = 0, False
        sq_norm = torch.zeros((), dtype=torch.float64, device=self._device)
        gradients = self._gradients()
        if gradients:
            sq_norm += torch.stack(torch._foreach_norm(gradients)).double().square().sum().to(self._device)
        if self._zero_stage > 0:  # each rank has its part
            collectives.all_reduce_sum(sq_norm)
        norm = (sq_norm + outside_sq_norm).sqrt()
        scale = (norm / self._clip_norm).clamp_min(1.0)
        skipped = (~norm.isfinite()).float()
        inner: Any = self._inner
        inner.grad_scale, inner.found_inf = scale.float(), skipped
        self._engine.step()
        return ClipResult(norm.float(), scale.reciprocal().float(), skipped)

    def set_learning_rate(self, learning_rate: float) -> None:
        """The rate of the following updates."""
        for group in self._inner.param_groups:
            group["lr"] = learning_rate

    @property
    def updates(self) -> int:
        """How many updates the moments have seen; the host waits for the device."""
        return int(next(iter(self._inner.state.values()))["step"])

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, whole, on the CPU; all ranks must call."""
        return {name: whole.to("cpu", copy=True) for name, whole in self._whole_tensors([None])}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Both Adam moments of every parameter, whole, as `<moment>/<name>`, on the CPU; all ranks must call."""
        return {name: whole.to("cpu", copy=True) for name, whole in self._whole_tensors(_MOMENTS)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, then every moment as `<moment>/<name>`, whole, where they are computed, one at a time.

        All ranks must go through all of them, as each is gathered from the ranks when its turn comes.
        """
        return self._whole_tensors([None, *_MOMENTS])

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of a checkpoint; views, one at a time. All ranks must go through all of theirs."""
        return pieces_of_rank(self.tensors(), collectives.rank(), collectives.world_size())

    def rows_of(self, name: str) -> slice:
        """The rows of a parameter, or of state named after one, that `load` takes on this rank."""
        return self._held.get(name.rpartition("/")[2], slice(None))

    def load(self, parameters: dict[str, Tensor], optimizer_state: dict[str, Tensor] | None, step: int) -> None:
        """Take over parameters, moments and step count, saved at any world size and ZeRO stage; all ranks must call.

        Args:
            parameters, optimizer_state: by name, `rows_of` each; without state moments are zero.
            step: updates that the moments have seen.

        Raises:
            CheckpointError: a name or a shape does not fit this model or this optimizer.
        """
        found = {name: tuple(p.shape) for name, p in parameters.items()}
        if self._shapes != found:
            odd = sorted(set(self._shapes.items()) ^ set(found.items()))[0]
            raise CheckpointError(
                f"parameter {odd[0]} {odd[1]} is not in both checkpoint and model; model.* or the catalogue differ"
            )
        missing = self._state_names() - (self._state_names() if optimizer_state is None else optimizer_state.keys())
        if missing:
            raise CheckpointError(
                f"{min(missing)} is not in the checkpoint, which another train.table_optimizer wrote; set that one, "
                "or begin with parameters alone: train.warm_start with train.warm_start_moments=false"
            )
        for name, parameter in self._named:
            value = parameters[name].to(self._device)
            self._set_whole(parameter, value)
            for moment in _MOMENTS:
                state = torch.zeros_like(value) if optimizer_state is None else optimizer_state[f"{moment}/{name}"]
                self._set_whole(parameter, state.to(self._device), moment)
        for state in self._inner.state.values():
            state["step"].fill_(step)
        if self._zero_stage == 3:
            self._spread_partitions()

    def _state_names(self) -> set[str]:
        """What `load` needs of an optimizer's state."""
        return {f"{moment}/{name}" for moment in _MOMENTS for name, _ in self._named}

    def _whole_tensors(self, kinds: Iterable[str | None]) -> Iterator[tuple[str, Tensor]]:
        """Parameters for None, else moments of that name; none of them to be written to."""
        for moment in kinds:
            if moment and self._zero_stage in (1, 2):
                yield from self._gathered(moment)
                continue
            for name, parameter in self._named:
                if moment is None:
                    yield name, (safe_get_full_fp32_param(parameter) if self._zero_stage == 3 else parameter).detach()
                elif self._zero_stage == 0:
                    yield f"{moment}/{name}", self._inner.state[parameter][moment]
                else:
                    yield f"{moment}/{name}", safe_get_full_optimizer_state(parameter, moment)

    def _gathered(self, moment: str) -> Iterator[tuple[str, Tensor]]:
        """Moments of stages 1 and 2: the flat parts of a group, gathered at once; DeepSpeed would add up a whole tensor for each."""
        optimizer, names = self._engine.optimizer, {parameter: name for name, parameter in self._named}
        groups = zip(
            optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, self._flat_partitions(), strict=True
        )
        for parameters, offsets, partition in groups:
            mine = self._inner.state[partition][moment].to(self._device)
            flat = collectives.all_gather_rows(mine, [mine.numel()] * collectives.world_size())
            for parameter, offset in zip(parameters, offsets, strict=True):
                whole = flat.narrow(0, offset, parameter.numel()).view(parameter.shape)
                yield f"{moment}/{names[parameter]}", whole

    def _set_whole(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        if self._zero_stage == 3:
            # DeepSpeed's own function for whole values fails where ranks do not divide them
            numel = parameter.partition_numel()  # type: ignore[attr-defined]
            flat = nn.functional.pad(value.flatten(), (0, numel * collectives.world_size() - value.numel()))
            mine = flat.narrow(0, numel * collectives.rank(), numel)
            if moment is None:
                safe_set_local_fp32_param(parameter, mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, moment)
            return
        if moment is None:
            with torch.no_grad():
                parameter.copy_(value)
            if self._zero_stage > 0:
                safe_set_full_fp32_param(parameter, value)
        elif self._zero_stage > 0:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            self._inner.state[parameter][moment].copy_(value)

    def _spread_partitions(self) -> None:
        """Bring what stage 3 computes with up to date with the partitions that AdamW steps, as its own step does."""
        optimizer = self._engine.optimizer
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones, which every rank has whole
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _gradients(self) -> list[Tensor]:
        """This rank's part of the reduced gradient, as the optimizer is about to see it."""
        if self._zero_stage == 0:
            return [parameter.grad for _, parameter in self._named if parameter.grad is not None]
        if self._offloaded:
            return [flat.grad for flat in self._flat_partitions() if flat.grad is not None]
        return [part for parts in self._engine.optimizer.averaged_gradients.values() for part in parts]

    def _flat_partitions(self) -> list[Tensor]:
        """What the torch optimizer steps: parameters below stage 1, above it a flat part of each group."""
        optimizer = self._engine.optimizer
        if self._zero_stage == 0:
            return [parameter for _, parameter in self._named]
        flat: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self._zero_stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return flat

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
        for parameter in self._flat_partitions():
            self._inner.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),  # the fused step counts where the parameter is
                **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
            }
        if self._zero_stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


class _Scope(nn.Module):
    """What DeepSpeed takes for the model: whatever is computed in its forward finds the parameters of the parts whole."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, compute: Callable[..., Any], *args: Any) -> Any:
        return compute(*args)
