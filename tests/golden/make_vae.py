"""Reference outputs of PyTorch diffusers for tiny random autoencoders: python -m golden.make_vae, in tests/

Recorded with torch 2.13.0 (CPU), diffusers 0.42.1. Weights and inputs come from a numpy seed, here and in the tests, so
vae.npz holds only outputs and gradients. Neither torch nor diffusers is needed to run the tests.
"""

from pathlib import Path

import numpy as np
from golden.make_models import weights


def kl(n: int) -> dict:
    """Options of an AutoencoderKL with n blocks."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "block_out_channels": [8, 16, 16][:n],
        "norm_num_groups": 4,
        "sample_size": 16,
    }


CONFIGS = {
    "sd": kl(2),
    "sd3": kl(3) | {"latent_channels": 6, "use_quant_conv": False, "use_post_quant_conv": False,
                    "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "odd": kl(2) | {"mid_block_add_attention": False, "layers_per_block": 2, "use_quant_conv": False,
                    "in_channels": 1, "out_channels": 2, "scaling_factor": 0.5,
                    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]},
    "tiny": {"encoder_block_out_channels": [8] * 3, "decoder_block_out_channels": [8] * 3, "latent_channels": 5,
             "num_encoder_blocks": [1, 2, 1], "num_decoder_blocks": [2, 1, 1]},
}  # fmt: skip


def normal(seed: int, *shape: int) -> np.ndarray:
    """Unit Gaussian numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(config: dict):
    """Two images and two unscaled latents of 4 x 6 latent pixels, NCHW."""
    n = len(config.get("block_out_channels", config.get("num_encoder_blocks")))
    image = (2, config.get("in_channels", 3), 4 * 2 ** (n - 1), 6 * 2 ** (n - 1))
    return np.tanh(normal(0, *image)), normal(1, 2, config.get("latent_channels", 4), 4, 6)


def record(net, x, z):
    """Raw outputs of both halves and the gradients of a random projection of them."""
    import torch

    x, z = (torch.from_numpy(a).requires_grad_() for a in (x, z))
    encoded = net.encode(x)
    encoded = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
    out = {"encoded": encoded, "decoded": net.decode(z).sample}
    a, b = (torch.from_numpy(normal(seed, *y.shape)) for seed, y in zip((2, 3), out.values(), strict=True))
    ((a * out["encoded"]).sum() + (b * out["decoded"]).sum()).backward()
    norms = {k: p.grad.norm() for k, p in net.named_parameters()}
    out |= {"grad_x": x.grad, "grad_z": z.grad, "grad_norm": torch.stack([norms[k] for k in sorted(norms)])}
    return {k: v.detach().numpy() for k, v in out.items()}


def main():
    """Run diffusers and write vae.npz beside this file."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny

    out = {}
    for name, config in CONFIGS.items():
        net = (AutoencoderTiny if name == "tiny" else AutoencoderKL)(**config)
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        net.load_state_dict({k: torch.from_numpy(v) for k, v in weights(shapes).items()})
        recorded = record(net, *inputs(config))
        out |= {f"{name}/{k}": v for k, v in recorded.items()}
    np.savez_compressed(Path(__file__).parent / "vae.npz", **out)
    print({k: (v.shape, float(np.abs(v).mean())) for k, v in out.items()})


if __name__ == "__main__":
    main()
