"""Optimisers: AdamW from config, one per turn."""

import dataclasses
from typing import Literal

import optax

from cddistill.typed import Count, Decay, Natural, NonNegative, Positive


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with gradient clipping; `config.optim.<turn>.<field>` overrides a field for one turn."""

    lr: NonNegative = 1e-4  # learning rate, after the warm-up
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay of the averages of the gradient and of its square
    eps: Positive = 1e-8  # added to the root of the latter
    weight_decay: NonNegative = 0.0  # decoupled, times lr; libraries disagree on the default (optax 1e-4, PyTorch 1e-2)
    clip: NonNegative = 1.0  # largest global gradient norm; 0 = no clipping
    warmup: Natural = 0  # updates of linear warm-up from 0; a turn that is played every 5th step counts only its own
    decay: Literal["constant", "cosine", "linear"] = "constant"  # else to 0 over the updates after the warm-up
    cycles: Count = 1  # equal parts of the training, each with its own warm-up and decay


def optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """AdamW with its learning-rate schedule over `updates` updates, after clipping by the global norm."""
    cycle = -(-updates // config.cycles)
    after = max(cycle - config.warmup, 1)
    schedules = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, after),
        "linear": optax.linear_schedule(config.lr, 0.0, after),
    }
    lr = schedules[config.decay]
    if config.warmup:
        lr = optax.join_schedules([optax.linear_schedule(0.0, config.lr, config.warmup), lr], [config.warmup])
    adam = optax.adamw(
        lr if config.cycles == 1 else lambda update: lr(update % cycle),
        *config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam
