"""How each published set lies in its files: bit order, column order, sorted rows, splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.checks import refuse
from pyro_vae.data.dataset import shuffled
from pyro_vae.data.readers import Array, missing_keys, read_idx, read_mat, read_npz


class Rows(NamedTuple):
    """A set in order: training rows, then validation, then test."""

    x: Tensor
    """`(N, D)` in [0, 1], float32"""
    y: Tensor | None
    held_out: tuple[int, int]
    """rows of validation and of test"""
    image_shape: tuple[int, int]


def digits() -> Rows:
    """The 1,797 digits of scikit-learn's package, shuffled."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = shuffled(len(found.data), seed=0)
    x = torch.as_tensor(found.data, dtype=torch.float32) / 16
    y = torch.as_tensor(found.target, dtype=torch.int64)
    return Rows(x[order], y[order], (250, 250), (8, 8))


def mnist(train_images: Path, train_labels: Path, test_images: Path, test_labels: Path) -> Rows:
    """MNIST and what has its shape; the last 10,000 training rows are validation."""
    x = [
        _exactly(read_idx(path, 3), (count, 28, 28), path)
        for path, count in ((train_images, 60_000), (test_images, 10_000))
    ]
    y = [
        _exactly(read_idx(path, 1), (count,), path)
        for path, count in ((train_labels, 60_000), (test_labels, 10_000))
    ]
    return Rows(_grey(x), _classes(y), (10_000, 10_000), (28, 28))


def binarized_mnist(path: Path) -> Rows:
    """Eight pixels a byte, the first in the highest bit; test rows sorted by digit."""
    arrays = read_npz(path, ("train", "valid", "test"))
    counts = {"train": 50_000, "valid": 10_000, "test": 10_000}
    packed = [_exactly(_array(arrays, key, path), (n, 98), path) for key, n in counts.items()]
    packed[2] = packed[2][shuffled(10_000, seed=0).numpy()]
    x = torch.from_numpy(np.unpackbits(np.concatenate(packed), axis=1)).float()
    return Rows(x, None, (10_000, 10_000), (28, 28))


def omniglot(path: Path) -> Rows:
    """Rows in order of alphabet, character and drawer; classes are the 50 alphabets."""
    keys = ("train", "test", "train_alphabet", "test_alphabet")
    arrays = read_npz(path, keys)
    x, y = [], []
    for part, count in (("train", 24_345), ("test", 8_115)):
        order = shuffled(count, seed=0).numpy()
        x.append(_exactly(_array(arrays, part, path), (count, 28, 28), path)[order])
        y.append(_exactly(_array(arrays, f"{part}_alphabet", path), (count,), path)[order])
    return Rows(_grey(x), _classes(y), (1_345, 8_115), (28, 28))


def caltech101_silhouettes(path: Path) -> Rows:
    """Pixels column by column, the object 0 in the file and 1 here; classes from 0."""
    counts = {"train": 4_100, "val": 2_264, "test": 2_307}
    arrays = read_mat(path, [f"{part}_{kind}" for part in counts for kind in ("data", "labels")])
    pixels = [_exactly(arrays[f"{part}_data"], (n, 784), path) for part, n in counts.items()]
    labels = [_exactly(arrays[f"{part}_labels"], (n, 1), path) for part, n in counts.items()]
    upright = np.concatenate(pixels).reshape(-1, 28, 28).transpose(0, 2, 1)
    x = torch.from_numpy(upright == 0).flatten(1).float()
    return Rows(x, _classes(labels).flatten() - 1, (2_264, 2_307), (28, 28))


def frey_faces(path: Path) -> Rows:
    """Video frames in order, neighbours alike."""
    faces = _array(read_npz(path, ("faces",)), "faces", path)
    order = shuffled(1_965, seed=0).numpy()
    return Rows(_grey([_exactly(faces, (1_965, 28, 20), path)[order]]), None, (200, 200), (28, 20))


def _array(arrays: dict[str, Array], key: str, path: Path) -> Array:
    return arrays[key] if key in arrays else missing_keys(path, [key], arrays)


def _exactly(array: Array, shape: tuple[int, ...], path: Path) -> Array:
    if array.shape != shape or array.dtype != np.uint8:
        refuse(
            f"{str(path)!r} is not the published file",
            expected=f"uint8 of shape {shape}",
            got=f"{array.dtype} of shape {array.shape}",
            advice="the file as it was published; pv.data.from_file(path) or from_array(x) for "
            "your own",
        )
    return array


def _grey(parts: Sequence[Array]) -> Tensor:
    pixels = torch.from_numpy(np.concatenate(parts))
    return pixels.flatten(1).float().div_(255)


def _classes(parts: Sequence[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
