"""Optimisers: AdamW from config, one per turn."""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with gradient clipping; `config.optim.<turn>.<field>` overrides a field for one turn."""

    lr: float = 1e-4  # learning rate, after the warm-up
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the averages of the gradient and of its square
    eps: float = 1e-8  # added to the root of the latter
    weight_decay: float = 0.0  # decoupled, times lr; libraries disagree on the default (optax 1e-4, PyTorch 1e-2)
    clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    warmup: int = 0  # updates of linear warm-up from 0; a turn that is played every 5th step counts only its own
    decay: str = "constant"  # or "cosine", "linear": to 0 over the updates after the warm-up
    cycles: int = 1  # equal parts of the training, each with its own warm-up and decay


def optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """AdamW with its learning-rate schedule over `updates` updates, after clipping by the global norm.

    Raises ValueError for an unknown decay, and for fewer than one cycle.
    """
    if config.cycles < 1:
        raise ValueError(f"optim.cycles must be at least 1, not {config.cycles}")
    cycle = -(-updates // config.cycles)
    after = max(cycle - config.warmup, 1)
    schedules = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, after),
        "linear": optax.linear_schedule(config.lr, 0.0, after),
    }
    if config.decay not in schedules:
        raise ValueError(f"optim.decay {config.decay!r} is not one of {', '.join(schedules)}")
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
