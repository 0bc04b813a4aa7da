"""Features of a PyTorch writing of FID's Inception-v3 with random weights: python -m golden.make_inception, in tests/

Recorded with torch 2.13.0 (CPU). There is no package of this network here: the other side is a second implementation,
written from Szegedy et al. 2015 and the layer names of the published file. Weights and images come from a numpy seed,
here and in the tests, so inception.npz holds only features.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
from golden.make_models import weights

SIZE = 107  # px: the smallest that leaves 2 x 2 pixels to the last blocks, where kinds of pools differ


def images() -> np.ndarray:
    """An image [1, h, w, 3] in [0, 255]."""
    return np.random.default_rng(0).uniform(0, 255, (1, SIZE, SIZE, 3)).astype(np.float32)


def parameters(kernels: dict) -> dict:
    """{PyTorch name: array} for {layer: shape of its kernel}, and a head of 1008 classes that nothing uses."""
    shapes = {}
    for layer, shape in kernels.items():
        shapes[f"{layer}.conv.weight"] = tuple(shape)
        shapes |= {f"{layer}.bn.{name}": (shape[0],) for name in ("weight", "bias", "running_mean", "running_var")}
    found = weights(shapes)
    scales = {"conv.weight": 1.4, "bn.bias": 3.0, "running_mean": 3.0, "running_var": 3.0}  # ReLU halves the variance
    for name, x in found.items():
        x *= next((scale for end, scale in scales.items() if name.endswith(end)), 1.0)
        x += name.endswith("running_var") * np.float32(2.0)
    return found | {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}


def network():
    """The network as torch modules, by the published names."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Unit(nn.Module):
        def __init__(self, cin, cout, **how):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(cin, cout, bias=False, **how), nn.BatchNorm2d(cout, eps=0.001)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    flat = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    class Block(nn.Module):
        """Layers by name; `routes` are lists of names, applied one after the other, that are concatenated."""

        def __init__(self, units, routes):
            super().__init__()
            for name, unit in units.items():
                self.add_module(name, unit)
            self.routes = routes

        def forward(self, x):
            out = []
            for route in self.routes:
                y = x
                for step in route:
                    y = step(y) if callable(step) else getattr(self, step)(y)
                out.append(y)
            return torch.cat(out, 1)

    def a(cin, pool):
        return Block(
            {
                "branch1x1": Unit(cin, 64, kernel_size=1),
                "branch5x5_1": Unit(cin, 48, kernel_size=1),
                "branch5x5_2": Unit(48, 64, kernel_size=5, padding=2),
                "branch3x3dbl_1": Unit(cin, 64, kernel_size=1),
                "branch3x3dbl_2": Unit(64, 96, kernel_size=3, padding=1),
                "branch3x3dbl_3": Unit(96, 96, kernel_size=3, padding=1),
                "branch_pool": Unit(cin, pool, kernel_size=1),
            },
            [["branch1x1"], ["branch5x5_1", "branch5x5_2"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
             [flat, "branch_pool"]],
        )  # fmt: skip

    def b(cin):
        return Block(
            {
                "branch3x3": Unit(cin, 384, kernel_size=3, stride=2),
                "branch3x3dbl_1": Unit(cin, 64, kernel_size=1),
                "branch3x3dbl_2": Unit(64, 96, kernel_size=3, padding=1),
                "branch3x3dbl_3": Unit(96, 96, kernel_size=3, stride=2),
            },
            [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], [nn.MaxPool2d(3, 2)]],
        )

    def c(cin, w):
        row, column = {"kernel_size": (1, 7), "padding": (0, 3)}, {"kernel_size": (7, 1), "padding": (3, 0)}
        return Block(
            {
                "branch1x1": Unit(cin, 192, kernel_size=1),
                "branch7x7_1": Unit(cin, w, kernel_size=1),
                "branch7x7_2": Unit(w, w, **row),
                "branch7x7_3": Unit(w, 192, **column),
                "branch7x7dbl_1": Unit(cin, w, kernel_size=1),
                "branch7x7dbl_2": Unit(w, w, **column),
                "branch7x7dbl_3": Unit(w, w, **row),
                "branch7x7dbl_4": Unit(w, w, **column),
                "branch7x7dbl_5": Unit(w, 192, **row),
                "branch_pool": Unit(cin, 192, kernel_size=1),
            },
            [["branch1x1"], [f"branch7x7_{i}" for i in (1, 2, 3)], [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)],
             [flat, "branch_pool"]],
        )  # fmt: skip

    def d(cin):
        return Block(
            {
                "branch3x3_1": Unit(cin, 192, kernel_size=1),
                "branch3x3_2": Unit(192, 320, kernel_size=3, stride=2),
                "branch7x7x3_1": Unit(cin, 192, kernel_size=1),
                "branch7x7x3_2": Unit(192, 192, kernel_size=(1, 7), padding=(0, 3)),
                "branch7x7x3_3": Unit(192, 192, kernel_size=(7, 1), padding=(3, 0)),
                "branch7x7x3_4": Unit(192, 192, kernel_size=3, stride=2),
            },
            [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)], [nn.MaxPool2d(3, 2)]],
        )

    def e(cin, pool):
        row, column = {"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": (3, 1), "padding": (1, 0)}
        return Block(
            {
                "branch1x1": Unit(cin, 320, kernel_size=1),
                "branch3x3_1": Unit(cin, 384, kernel_size=1),
                "branch3x3_2a": Unit(384, 384, **row),
                "branch3x3_2b": Unit(384, 384, **column),
                "branch3x3dbl_1": Unit(cin, 448, kernel_size=1),
                "branch3x3dbl_2": Unit(448, 384, kernel_size=3, padding=1),
                "branch3x3dbl_3a": Unit(384, 384, **row),
                "branch3x3dbl_3b": Unit(384, 384, **column),
                "branch_pool": Unit(cin, 192, kernel_size=1),
            },
            [["branch1x1"], ["branch3x3_1", "branch3x3_2a"], ["branch3x3_1", "branch3x3_2b"],
             ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a"],
             ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3b"], [pool, "branch_pool"]],
        )  # fmt: skip

    return nn.Sequential(OrderedDict({
        "Conv2d_1a_3x3": Unit(3, 32, kernel_size=3, stride=2),
        "Conv2d_2a_3x3": Unit(32, 32, kernel_size=3),
        "Conv2d_2b_3x3": Unit(32, 64, kernel_size=3, padding=1),
        "pool1": nn.MaxPool2d(3, 2),
        "Conv2d_3b_1x1": Unit(64, 80, kernel_size=1),
        "Conv2d_4a_3x3": Unit(80, 192, kernel_size=3),
        "pool2": nn.MaxPool2d(3, 2),
        "Mixed_5b": a(192, 32),
        "Mixed_5c": a(256, 64),
        "Mixed_5d": a(288, 64),
        "Mixed_6a": b(288),
        "Mixed_6b": c(768, 128),
        "Mixed_6c": c(768, 160),
        "Mixed_6d": c(768, 160),
        "Mixed_6e": c(768, 192),
        "Mixed_7a": d(768),
        "Mixed_7b": e(1280, flat),
        "Mixed_7c": e(2048, nn.MaxPool2d(3, 1, 1)),
        "pool3": nn.AdaptiveAvgPool2d(1),
    })).eval()  # fmt: skip


def main():
    """Run torch and write inception.npz next to this file."""
    import torch

    net = network()
    state = net.state_dict()
    kernels = {k.removesuffix(".conv.weight"): x.shape for k, x in state.items() if k.endswith(".conv.weight")}
    for name, x in parameters(kernels).items():
        if name in state:
            state[name].copy_(torch.from_numpy(x))
    with torch.no_grad():
        x = torch.from_numpy(images().transpose(0, 3, 1, 2))
        features = net((x - 128.0) / 128.0).flatten(1).numpy()
    sizes = np.array([np.prod(shape) for shape in kernels.values()]).sum()
    np.savez_compressed(Path(__file__).parent / "inception.npz", features=features, layers=len(kernels), kernels=sizes)
    print(features.shape, features.mean(), features.std(), len(kernels), sizes)


if __name__ == "__main__":
    main()
