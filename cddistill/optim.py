"""From config to optax: one optimiser per turn."""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with clipping; `config.optim.<turn>.<field>` overrides a field for one turn."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # optax's default is 1e-4, PyTorch's 1e-2: state it
    clip: float = 1.0  # global gradient norm; 0 = off
    warmup: int = 0  # updates of linear warm-up
    decay: str = "constant"  # or "cosine" to zero, "linear" to zero, over `steps`
    bf16_moments: bool = False  # first moment in bfloat16: 2 bytes a weight less


def optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """AdamW with its learning-rate schedule over `updates` updates, behind global-norm clipping."""
    after = max(updates - config.warmup, 1)
    schedules = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, after),
        "linear": optax.linear_schedule(config.lr, 0.0, after),
    }
    if config.decay not in schedules:
        raise ValueError(f"optim.decay {config.decay!r} is not one of {', '.join(schedules)}")
    lr = optax.join_schedules(
        [optax.linear_schedule(0.0, config.lr, config.warmup), schedules[config.decay]], [config.warmup]
    )
    adam = optax.adamw(
        lr if config.warmup else schedules[config.decay],
        *config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype="bfloat16" if config.bf16_moments else None,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam
