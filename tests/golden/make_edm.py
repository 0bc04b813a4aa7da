"""Reference outputs for tests/test_edm.py: python tests/golden/make_edm.py

Recorded with torch 2.13.0 (CPU). An independent, minimal implementation of Karras et al. 2022's networks: one function
per family, NCHW. Every weight is requested by name and shape where it is used, so the recorded names and shapes do not
depend on cddistill. Where diffusers 0.42.1 can express the same network, `main` checks that its UNet2DModel agrees.
Weights and inputs come from numpy seeds, here and in the tests, so edm.npz holds only results.
"""

import json
import zlib
from pathlib import Path

import numpy as np

TINY = {"img_resolution": 16, "num_blocks": 1, "model_channels": 16}
NCSNPP = {
    "_class_name": "SongUNet",
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
CONFIGS = {
    "adm": TINY | {"_class_name": "DhariwalUNet", "label_dim": 5, "channel_mult": [1, 2], "attn_resolutions": [8],
                   "channels_per_head": 8},
    "ddpmpp": TINY | {"_class_name": "SongUNet", "label_dim": 3, "augment_dim": 4, "channel_mult": [2, 1],
                      "attn_resolutions": [16], "num_blocks": 0, "precond": "vp"},
    "ncsnpp": TINY | NCSNPP | {"encoder_type": "residual", "channel_mult": [1, 2, 1], "attn_resolutions": [8],
                               "num_blocks": 0, "sigma_data": 0.7},
    "progressive": TINY | NCSNPP | {"encoder_type": "skip", "decoder_type": "skip", "channel_mult": [2, 1],
                                    "attn_resolutions": [8], "precond": "ve"},
}  # fmt: skip


def weight(name: str, shape) -> np.ndarray:
    """A random weight with the magnitude of a trained one, seeded by its PyTorch name."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("freqs"):
        x = 4.0 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1 * x + name.endswith("weight")
    return x.astype(np.float32)


def inputs(config: dict) -> dict:
    """A batch of two in NCHW, and `of`, the weights of the outputs in the scalar sum whose gradient is recorded."""
    rng = np.random.default_rng(0)
    size, sigma = (2, 3, config["img_resolution"], config["img_resolution"]), np.array([0.03, 4.0], np.float32)
    x = rng.uniform(-1, 1, size) + sigma[:, None, None, None] * rng.standard_normal(size)
    out = {"x": x.astype(np.float32), "sigma": sigma, "of": rng.standard_normal(size).astype(np.float32)}
    if classes := config.get("label_dim"):
        out["class_labels"] = np.array([1, classes])  # the second one is the null label
    if dim := config.get("augment_dim"):
        out["augment_labels"] = rng.standard_normal((2, dim)).astype(np.float32)
    return out


class Weights(dict):
    """Weights by name, generated at first use."""

    def __call__(self, name, *shape):
        import torch

        if name not in self:
            self[name] = torch.from_numpy(weight(name, shape)).requires_grad_(not name.endswith("freqs"))
        assert self[name].shape == shape, name
        return self[name]

    def linear(self, name, x, features, bias=True):
        y = x @ self(f"{name}.weight", features, x.shape[1]).T
        return y + self(f"{name}.bias", features) if bias else y

    def conv(self, name, x, features, kernel, **kwargs):
        from torch.nn.functional import conv2d

        w = self(f"{name}.weight", features, x.shape[1], kernel, kernel)
        return conv2d(x, w, self(f"{name}.bias", features), **({"padding": kernel // 2} | kwargs))

    def norm(self, name, x, eps):
        c = x.shape[1]
        y = x.reshape(x.shape[0], min(32, c // 4), -1)
        y = ((y - y.mean(2, True)) / (y.var(2, keepdim=True, correction=0) + eps).sqrt()).reshape(x.shape)
        return y * self(f"{name}.weight", c)[:, None, None] + self(f"{name}.bias", c)[:, None, None]


def fir(x, taps, before: int, after: int):
    """Zero-pad and filter x, without resampling."""
    import torch

    f = torch.tensor(taps, dtype=torch.float32)
    f = torch.outer(f, f) / f.sum() ** 2
    x = torch.nn.functional.pad(x, (before, after, before, after))
    return torch.nn.functional.conv2d(x, f.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])


def halve(x, taps):
    """Downsample by 2: filter, then take every second pixel (Song et al. 2021 after Zhang 2019)."""
    return fir(x, taps, len(taps) // 2 - 1, len(taps) // 2)[:, :, ::2, ::2]


def double(x, taps):
    """Upsample by 2: insert zeros between pixels, then filter with four times the gain."""
    b, c, h, w = x.shape
    y = x.new_zeros(b, c, 2 * h, 2 * w)
    y[:, :, ::2, ::2] = x
    return 4 * fir(y, taps, len(taps) // 2, len(taps) // 2 - 1)


def attend(w, name, x, heads, eps):
    """The residual of self-attention: softmax(q k / sqrt(d)) v per head."""
    import torch

    b, c, h, _ = x.shape
    qkv = w.conv(f"{name}.qkv", w.norm(f"{name}.norm2", x, eps), 3 * c, 1).reshape(b, heads, c // heads, 3, h * h)
    q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
    p = torch.einsum("nhci,nhcj->nhij", q, k / (c // heads) ** 0.5).softmax(-1)
    return w.conv(f"{name}.proj", torch.einsum("nhij,nhcj->nhci", p, v).reshape(x.shape), c, 1)


def adm(config, w, x, c_noise, class_labels=None, augment_labels=None):
    """Raw network output F of ADM with the changes of Karras et al. 2022, appendix F."""
    import torch
    from torch.nn.functional import silu

    n, mults, size = config["model_channels"], config["channel_mult"], config["img_resolution"]
    angle = c_noise[:, None] * 10000.0 ** -(torch.arange(n // 2) / (n // 2))
    emb = torch.cat([angle.cos(), angle.sin()], 1)
    emb = w.linear("map_layer1", silu(w.linear("map_layer0", emb, 4 * n)), 4 * n)
    if classes := config.get("label_dim"):
        onehot = torch.eye(classes + 1)[class_labels][:, :classes]
        emb = emb + w.linear("map_label", onehot, 4 * n, bias=False)
    emb = silu(emb)

    def block(name, x, width, attends=False, move=lambda x: x):
        h = w.conv(f"{name}.conv0", move(silu(w.norm(f"{name}.norm0", x, 1e-5))), width, 3)
        a = w.linear(f"{name}.affine", emb, 2 * width)[:, :, None, None]
        h = w.norm(f"{name}.norm1", h, 1e-5) * (1 + a[:, :width]) + a[:, width:]
        h = w.conv(f"{name}.conv1", silu(h), width, 3)
        h = h + (move(x) if x.shape[1] == width else w.conv(f"{name}.skip", x, width, 1))
        return h + attend(w, name, h, width // config.get("channels_per_head", 64), 1e-5) if attends else h

    skips = []
    for i, mult in enumerate(mults):
        name, attends = f"enc.{size >> i}x{size >> i}", size >> i in config["attn_resolutions"]
        down = torch.nn.AvgPool2d(2)
        x = w.conv(f"{name}_conv", x, n * mult, 3) if i == 0 else block(f"{name}_down", x, x.shape[1], move=down)
        skips += [x]
        for j in range(config["num_blocks"]):
            x = block(f"{name}_block{j}", x, n * mult, attends)
            skips += [x]
    features = x
    for i, mult in reversed(list(enumerate(mults))):
        name, attends = f"dec.{size >> i}x{size >> i}", size >> i in config["attn_resolutions"]
        if i == len(mults) - 1:
            x = block(f"{name}_in1", block(f"{name}_in0", x, x.shape[1], True), x.shape[1])
        else:
            x = block(f"{name}_up", x, x.shape[1], move=torch.nn.UpsamplingNearest2d(scale_factor=2))
        for j in range(config["num_blocks"] + 1):
            x = block(f"{name}_block{j}", torch.cat([x, skips.pop()], 1), n * mult, attends)
    return w.conv("out_conv", silu(w.norm("out_norm", x, 1e-5)), 3, 3), features


def song(config, w, x, c_noise, class_labels=None, augment_labels=None):
    """F of DDPM++ and NCSN++ (Song et al. 2021, appendix H) with the changes of Karras et al. 2022, appendix F."""
    import torch
    from torch.nn.functional import silu

    n, mults, size = config["model_channels"], config["channel_mult"], config["img_resolution"]
    taps, features = config.get("resample_filter", [1, 1]), n * config.get("channel_mult_noise", 1)
    if config.get("embedding_type") == "fourier":
        angle = 2 * np.pi * torch.outer(c_noise, w("map_noise.freqs", features // 2))
    else:
        angle = torch.outer(c_noise, 10000.0 ** -torch.linspace(0, 1, features // 2))
    emb = torch.cat([angle.sin(), angle.cos()], 1)
    if classes := config.get("label_dim"):
        onehot = torch.eye(classes + 1)[class_labels][:, :classes]
        emb = emb + w.linear("map_label", onehot * classes**0.5, features)
    if config.get("augment_dim"):
        emb = emb + w.linear("map_augment", augment_labels, features, bias=False)
    emb = silu(w.linear("map_layer1", silu(w.linear("map_layer0", emb, 4 * n)), 4 * n))

    def block(name, x, width, attends=False, move=None):
        h = silu(w.norm(f"{name}.norm0", x, 1e-6))
        h = w.conv(f"{name}.conv0", move(h, taps) if move else h, width, 3)
        h = w.norm(f"{name}.norm1", h + w.linear(f"{name}.affine", emb, width)[:, :, None, None], 1e-6)
        h = w.conv(f"{name}.conv1", silu(h), width, 3)
        if move or x.shape[1] != width:
            x = w.conv(f"{name}.skip", move(x, taps) if move else x, width, 1)
        h = (h + x) / 2**0.5
        return (h + attend(w, name, h, 1, 1e-6)) / 2**0.5 if attends else h

    image, skips = x, []
    for i, mult in enumerate(mults):
        name, attends = f"enc.{size >> i}x{size >> i}", size >> i in config["attn_resolutions"]
        if i == 0:
            x = w.conv(f"{name}_conv", x, n, 3)
        else:
            x = block(f"{name}_down", x, x.shape[1], move=halve)
            if config.get("encoder_type") == "skip":
                image = halve(image, taps)
                x = x + w.conv(f"{name}_aux_skip", image, x.shape[1], 1)
            if config.get("encoder_type") == "residual":  # filter first, then a strided convolution, as Song et al.
                blurred = fir(image, taps, len(taps) // 2, len(taps) // 2)
                image = x = (w.conv(f"{name}_aux_residual", blurred, x.shape[1], 3, stride=2, padding=0) + x) / 2**0.5
        skips += [x]
        for j in range(config["num_blocks"]):
            x = block(f"{name}_block{j}", x, n * mult, attends)
            skips += [x]
    image, features = None, x
    for i, mult in reversed(list(enumerate(mults))):
        name, attends = f"dec.{size >> i}x{size >> i}", size >> i in config["attn_resolutions"]
        if i == len(mults) - 1:
            x = block(f"{name}_in1", block(f"{name}_in0", x, x.shape[1], True), x.shape[1])
        else:
            x = block(f"{name}_up", x, x.shape[1], move=double)
        for j in range(config["num_blocks"] + 1):
            last = j == config["num_blocks"]
            x = block(f"{name}_block{j}", torch.cat([x, skips.pop()], 1), n * mult, attends and last)
        if i == 0 or config.get("decoder_type") == "skip":
            new = w.conv(f"{name}_aux_conv", silu(w.norm(f"{name}_aux_norm", x, 1e-6)), 3, 3)
            image = new if image is None else new + double(image, taps)
    return image, features


def denoise(config, w, x, sigma, **labels):
    """The denoiser D(x; sigma) of table 1, and the encoder's last feature."""
    import torch

    s, d = sigma[:, None, None, None], config.get("sigma_data", 0.5)
    t = (torch.sqrt(0.1**2 + 2 * 19.9 * torch.log(1 + s.double() ** 2)) - 0.1) / 19.9
    c_skip, c_out, c_in, c_noise = {
        "edm": (d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt(), 1 / (s**2 + d**2).sqrt(), s.log() / 4),
        "vp": (1, -s, 1 / (s**2 + 1).sqrt(), 999 * t.float()),
        "ve": (1, s, 1, (s / 2).log()),
    }[config.get("precond", "edm")]
    network = adm if config["_class_name"] == "DhariwalUNet" else song
    out, features = network(config, w, c_in * x, c_noise.flatten(), **labels)
    return c_skip * x + c_out * out, features


# Networks that diffusers can express, too: 128 channels, since it always normalises attention in 32 groups.
WIDE = {"img_resolution": 8, "num_blocks": 1, "model_channels": 128, "channel_mult": [1, 2], "attn_resolutions": [4]}
SHARED = {
    "adm": CONFIGS["adm"] | WIDE | {"channels_per_head": 64},
    "progressive": CONFIGS["progressive"] | WIDE | {"channel_mult_noise": 2, "precond": "edm"},
}


def diffusers_network(config):
    """The UNet2DModel of the same architecture, with random weights."""
    from diffusers import UNet2DModel

    common = {"block_out_channels": (128, 256), "layers_per_block": 1, "attn_norm_num_groups": 32}
    if config["_class_name"] == "DhariwalUNet":
        return UNet2DModel(
            **common, down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), attention_head_dim=64,
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), upsample_type="resnet", norm_eps=1e-5,
            resnet_time_scale_shift="scale_shift", num_class_embeds=config["label_dim"] + 1,
        )  # fmt: skip
    return UNet2DModel(
        **common, down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), attention_head_dim=None,
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"), time_embedding_type="fourier", norm_eps=1e-6,
        mid_block_scale_factor=2**0.5, norm_num_groups=None,
    )  # fmt: skip


def diffusers_names(config) -> dict:
    """{our layer name: diffusers' name} for two levels of one block each."""
    shared = config["_class_name"] == "SongUNet"
    down, up = ("resnet_down", "resnet_up") if shared else ("downsamplers.0", "upsamplers.0")
    blocks = {
        "enc.8x8_block0": "down_blocks.0.resnets.0", "enc.4x4_down": f"down_blocks.0.{down}",
        "enc.4x4_block0": "down_blocks.1.resnets.0", "dec.4x4_in0": "mid_block.resnets.0",
        "dec.4x4_in1": "mid_block.resnets.1", "dec.8x8_up": f"up_blocks.0.{up}",
    }  # fmt: skip
    blocks |= {f"dec.{s}x{s}_block{j}": f"up_blocks.{i}.resnets.{j}" for i, s in ((0, 4), (1, 8)) for j in (0, 1)}
    layers = {"conv0": "conv1", "norm0": "norm1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"}
    names = {f"{a}.{x}": f"{b}.{y}" for a, b in blocks.items() for x, y in (layers | {"skip": "conv_shortcut"}).items()}
    for a, b in blocks.items():
        attention = b.replace("resnets", "attentions")
        attention = attention[:-1] + "0" if shared else attention  # one for the whole level on the way up
        names |= {f"{a}.norm2": f"{attention}.group_norm", f"{a}.proj": f"{attention}.to_out.0"}
        names |= {f"{a}.{qkv}": f"{attention}.to_{qkv}" for qkv in "qkv"}
    names |= {
        "enc.8x8_conv": "conv_in",
        "map_layer0": "time_embedding.linear_1",
        "map_layer1": "time_embedding.linear_2",
    }
    names |= {"out_norm": "conv_norm_out", "out_conv": "conv_out", "map_label": "class_embedding"}
    names |= {
        "dec.8x8_aux_norm": "conv_norm_out",
        "dec.8x8_aux_conv": "conv_out",
        "enc.4x4_aux_skip": "down_blocks.0.skip_conv",
    }
    return names | {"dec.4x4_aux_norm": "up_blocks.0.skip_norm", "dec.4x4_aux_conv": "up_blocks.0.skip_conv"}


def check_with_diffusers(config):
    """Compare F with diffusers' for the same weights; raises if they differ."""
    import torch

    w, x = Weights(), {k: torch.from_numpy(v) for k, v in inputs(config).items() if k not in ("of", "sigma")}
    c_noise = torch.tensor([-0.9, 0.3])
    network = adm if config["_class_name"] == "DhariwalUNet" else song
    ours, _ = network(config, w, x.pop("x"), c_noise, **x)
    net, names, theirs = diffusers_network(config), diffusers_names(config), {}
    for name, value in w.items():
        layer, _, leaf = name.rpartition(".")
        if layer.endswith("qkv"):
            theirs |= {f"{names[layer[:-3] + q]}.{leaf}": value[i::3] for i, q in enumerate("qkv")}
        elif layer == "map_label":  # a table with a row for the null label
            theirs["class_embedding.weight"] = torch.cat([value.T, torch.zeros(1, value.shape[0])])
        else:
            theirs["time_proj.weight" if leaf == "freqs" else f"{names[layer]}.{leaf}"] = value
    flat = lambda name, v: v.flatten(1) if "attentions" in name and v.ndim == 4 else v
    net.load_state_dict({name: flat(name, v.detach()) for name, v in theirs.items()})
    fourier = "freqs" in "".join(
        w
    )  # there the time is sigma, of which it takes the logarithm, and the output is divided by it
    t = c_noise.exp() if fourier else c_noise
    out = net(torch.from_numpy(inputs(config)["x"]), t, **x).sample * (t[:, None, None, None] if fourier else 1)
    error = ((ours - out).abs().max() / out.abs().max()).item()
    print(config["_class_name"], "differs from diffusers by", error)
    assert error < 1e-5


def main():
    """Write edm.npz next to this file."""
    import torch

    for config in SHARED.values():
        check_with_diffusers(config)
    out = {}
    for name, config in CONFIGS.items():
        w, x = Weights(), {k: torch.from_numpy(v) for k, v in inputs(config).items()}
        of, noisy = x.pop("of"), x["x"].requires_grad_()
        y, features = denoise(config, w, **x)
        (y * of).sum().backward()
        names = sorted(w)
        out[f"{name}/out"], out[f"{name}/features"] = y.detach().numpy(), features.detach().numpy()
        out[f"{name}/grad"] = noisy.grad.numpy()
        norms = [0.0 if w[k].grad is None else w[k].grad.norm().item() for k in names]
        out[f"{name}/grad_norm"] = np.array(norms, np.float32)
        out[f"{name}/shapes"] = np.array(json.dumps({k: tuple(w[k].shape) for k in names}))
    np.savez_compressed(Path(__file__).parent / "edm.npz", **out)
    print({k: (v.shape, float(np.abs(v).mean())) for k, v in out.items() if v.dtype == np.float32})


if __name__ == "__main__":
    main()
