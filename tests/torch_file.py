"""Files of torch.save without PyTorch: arrays become tensors, a bytes value is a pickle by itself."""

import pickle
import zipfile

import numpy as np


def write_torch(file, saved):
    """Write nested dicts and lists of arrays and plain values as torch.save does, in float32; returns the file."""
    arrays = []
    pickled = pickle_of(saved, arrays)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        for i, x in enumerate(arrays):
            archive.writestr(f"archive/data/{i}", np.asarray(x, "<f4", order="C").tobytes())
    return file


def pickle_of(x, arrays: list) -> bytes:
    """Opcodes that push x; arrays are appended to the list."""
    if isinstance(x, bytes):
        return x
    if isinstance(x, dict):
        return b"}(" + b"".join(pickle_of(y, arrays) for pair in x.items() for y in pair) + b"u"
    if isinstance(x, list):
        return b"](" + b"".join(pickle_of(y, arrays) for y in x) + b"e"
    if not isinstance(x, np.ndarray):
        return pickle.dumps(x, 2)[2:-1]  # without the opcodes PROTO and STOP
    strides = tuple(step // x.itemsize for step in np.asarray(x, order="C").strides)
    key, size, start, shape, strides, cpu, kind = (
        pickle_of(y, arrays) for y in (str(len(arrays)), x.size, 0, x.shape, strides, "cpu", "storage")
    )
    arrays.append(x)
    storage = b"(" + kind + b"ctorch\nFloatStorage\n" + key + cpu + size + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + start + shape + strides + b"\x89}tR"
