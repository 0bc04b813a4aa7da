"""A state dict in both of PyTorch's file formats: python tests/golden/make_files.py

Recorded with torch 2.13.0. state_dict.npz has the values (as float32) and dtypes, so that tests need no torch.
"""

from pathlib import Path

import numpy as np


def state_dict():
    """Every dtype, and every layout of a tensor in its storage."""
    import torch

    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 4, generator=draw)
    state = torch.nn.Module().state_dict()  # an OrderedDict with attributes of its own
    state |= {
        "matrix": matrix,
        "transposed": matrix.T,
        "row": matrix[1],  # the storage's middle
        "expanded": torch.ones(1).expand(4, 3),  # strides of 0
        "channels_last": torch.randn(2, 3, 4, 4, generator=draw).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2, generator=draw)),
        "scalar": torch.tensor(5.0),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3, generator=draw).half(),
        "bfloat16": torch.randn(2, 2, generator=draw).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64, generator=draw),
        "long": torch.arange(3) - 1,
        "byte": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
    }
    return state


def main():
    """Write the three files next to this one."""
    import torch

    folder, state = Path(__file__).parent, state_dict()
    torch.save(state, folder / "state_dict.pt")
    torch.save(state, folder / "state_dict_before_1_6.pt", _use_new_zipfile_serialization=False)
    numbers = {name: x.detach().float().numpy() for name, x in state.items()}
    dtypes = {f"{name}/dtype": str(x.dtype).removeprefix("torch.") for name, x in state.items()}
    np.savez_compressed(folder / "state_dict.npz", **numbers, **dtypes)


if __name__ == "__main__":
    main()
