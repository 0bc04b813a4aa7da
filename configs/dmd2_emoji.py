"""DMD2 from the embedded emoji teacher: class-conditional images in one step, without regression pairs.

    python -m cddistill.main --config=configs/dmd2_emoji.py         one step
    python -m cddistill.main --config=configs/dmd2_emoji.py:four    four steps, with backward simulation

Steps are critic updates, as in the paper; the student has one update in method.ratio. All values are ours.
"""

from cddistill.config import defaults

VARIANTS = {"one": (999,), "four": (999, 749, 499, 249)}  # student timesteps


def get_config(variant="one"):
    if variant not in VARIANTS:
        raise ValueError(f"configs/dmd2_emoji.py has no variant {variant!r}: known are {', '.join(VARIANTS)}")
    config = defaults("dmd2")
    config.teacher = "emoji"
    config.teacher_steps = (50,)
    config.teacher_guidance = 2.0
    config.steps = 1500
    config.batch_size = 8
    config.optim.lr = 3e-4
    config.optim.warmup = 50  # updates of each turn: 50 steps of the critic, 250 of the student
    config.optim.weight_decay = 1e-2
    config.optim.clip = 10.0
    config.method.real_guidance = 2.0
    config.method.ema_decay = 0.995
    config.method.student_timesteps = VARIANTS[variant]
    config.sample_steps = (1,) if variant == "one" else (1, 2, 4)
    config.eval_every = 250
    config.checkpoint_every = 500
    return config
