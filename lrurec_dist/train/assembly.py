"""A run's model and the engine that trains it, put together as the configuration has them."""

from typing import Any

import torch

from lrurec_dist.config import Config
from lrurec_dist.model.item_table import ItemTable
from lrurec_dist.model.lrurec import LRURec
from lrurec_dist.model.sharded_table import ShardedItemTable
from lrurec_dist.train.deepspeed_config import derive
from lrurec_dist.train.engine import Engine
from lrurec_dist.train.sharded_engine import ShardedEngine
from lrurec_dist.train.subject import model_arguments


def product_dtype(config: Config) -> torch.dtype | None:
    """The type that factors of products are rounded to; None for the parameters' own."""
    return None if config.train.precision == "float32" else torch.bfloat16


def new_model(config: Config, num_items: int, device: torch.device, *, checkpointed: bool = False) -> LRURec:
    """A model before its first step, a function of the seed and of torch's global generator; with every kind of table the same."""
    kind = ShardedItemTable if config.model.table == "sharded" else ItemTable
    model = LRURec(
        **model_arguments(config, num_items),
        table=kind(num_items, config.model.dim, seed=config.seed),
        compute_dtype=product_dtype(config),
        checkpointed=checkpointed,
    )
    return model.to(device)


def new_engine(config: Config, num_items: int, device: torch.device) -> Engine:
    """The engine with a new model; all ranks must call."""
    options = config.train
    model = new_model(config, num_items, device, checkpointed=options.activation_checkpointing)
    arguments: dict[str, Any] = {
        "device": device,
        "config": derive(
            device=device,
            zero_stage=options.zero_stage,
            accumulation=options.accumulation,
            offload_optimizer=options.offload_optimizer,
            offload_parameters=options.offload_parameters,
            extras=options.deepspeed,
        ),
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "decay_recurrence": options.decay_recurrence,
        "epsilon": options.epsilon,
        "clip_norm": options.clip_norm,
    }
    if isinstance(model.table, ShardedItemTable):
        return ShardedEngine(model, model.table, table_optimizer=options.table_optimizer, **arguments)
    return Engine(model, **arguments)
