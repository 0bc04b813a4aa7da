"""cddistill: few-step conditional diffusion distillation in JAX."""

__version__ = "0.1.0"
