"""A generator in diffusers' layout whose weights are drawn anew, so that no archive has to hold them.

A folder holds its configurations and tensors.json: the shapes of the tensors in each of its files of weights. The
numbers follow from the names alone, and the bytes of the files from the numbers, on every machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

TENSORS = "tensors.json"


def draw_weights(folder: Path) -> None:
    """Writes the files of weights of a folder."""
    for name, shapes in json.loads((folder / TENSORS).read_text()).items():
        write(folder / name, {tensor: numbers(f"{name} {tensor}", tuple(shape)) for tensor, shape in shapes.items()})


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 tensor: scales are 1, biases 0, all else is even noise that keeps the size of what goes through."""
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    whole = np.random.Philox(key=key).random_raw(int(np.prod(shape))).astype(np.uint64) >> np.uint64(48)
    return ((whole.astype(np.float64) / 2**15 - 1) * np.sqrt(3 / np.prod(shape[1:]))).astype(np.float32).reshape(shape)


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, byte by byte."""
    header, place = dict[str, object](__metadata__={"format": "pt"}), 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(one.tobytes() for one in tensors.values()))
