"""Your own `.npy` and `.npz` files, in memory or, larger than that, on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.checks import check_batch, refuse
from pyro_vae.data.binarize import Binarize, dynamic
from pyro_vae.data.dataset import (
    Dataset,
    from_array,
    held_out_rows,
    image_shape_of,
    split,
)
from pyro_vae.data.readers import Array, missing_keys, read_npy, read_npz

SPLITS = ("train", "validation", "test")
MAPPED_HELD_OUT = 10_000
"""Rows at most that a part of a memory-mapped file comes to in each held-out split."""


def from_file(
    path: str | Path,
    *,
    held_out: float = 0.15,
    seed: int = 0,
    name: str | None = None,
    image_shape: tuple[int, int] | None = None,
    white: int = 255,
    binarize: Binarize | None = None,
    memory_map: bool = False,
) -> Dataset:
    """Read your own rows from a file of NumPy's.

    - `.npy`: one array `(N, ...)`, shuffled and split as `from_array` does.
    - `.npz`: an array `x` and, optionally, classes `y`, shuffled and split; or your own splits
      `train`, `validation`, `test` and, optionally, `train_labels`, `validation_labels`,
      `test_labels`, kept in their order. Other arrays are not looked at.
    - `.npy` with `memory_map=True`: rows to train on stay on disk, each batch is gathered from
      there. **Nothing is shuffled: the last rows are held out**, so shuffle the file
      beforehand. Training rows must not be written to.

    Bytes (`uint8`) are divided by `white`; all other numbers are left as they are.

    Args:
        path: of the file.
        held_out: the part of the rows, or their count if an integer, that goes to validation,
            and as much again to test; a part of a memory-mapped file is 10,000 rows at most.
        seed: of the shuffle.
        name: for figures; that of the file by default.
        image_shape: `(height, width)`, found from arrays of shape `(N, height, width)`.
        white: the byte that becomes 1: 255 for grey levels, 1 for rows of 0 and 1.
        binarize: `threshold`, `bernoulli(seed)` or `dynamic(seed)` for grey values in [0, 1];
            `dynamic(seed)` alone for rows that stay on disk.
        memory_map: leave rows on disk, as `uint8` or `float32`.

    Returns:
        A `Dataset`; of bytes on disk, its `per_batch` makes grey values of each batch.

    Raises:
        ValueError: a broken, foreign or pickled file, missing arrays, values that are no
            numbers, not finite or do not match `white`; too few rows.
        FileNotFoundError: no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/mine.npy", np.random.rand(100, 4, 4))
        ...     data = from_file(f"{folder}/mine.npy", binarize=dynamic(seed=0))
        >>> data.name, data.train[0].shape, data.image_shape
        ('mine', torch.Size([70, 16]), (4, 4))
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}\n  expected: a .npy or .npz file\n  got:      working folder "
            f"{str(Path.cwd())!r}\n  try:      an absolute path"
        )
    name = name or path.stem
    if path.suffix not in (".npy", ".npz") or (memory_map and path.suffix != ".npy"):
        refuse(
            f"{path.name!r} is no file that can be {'memory-mapped' if memory_map else 'read'}",
            expected=".npy" if memory_map else ".npy or .npz",
            got=path.suffix or "no suffix",
            advice="np.save(path, x), np.savez(path, x=x, y=y), or pv.data.from_images(folder)",
        )
    if memory_map:
        return _mapped(path, held_out, name, image_shape, white, binarize)
    keys = ("x", "y", *SPLITS, *(f"{part}_labels" for part in SPLITS))
    arrays = {"x": read_npy(path)} if path.suffix == ".npy" else read_npz(path, keys)
    if "x" in arrays:
        return from_array(
            _values(arrays["x"], white, f"x of {path.name!r}"),
            _classes(arrays["y"], f"y of {path.name!r}") if "y" in arrays else None,
            held_out=held_out, seed=seed, name=name, image_shape=image_shape, binarize=binarize,
        )  # fmt: skip
    return _own_splits(path, arrays, name, image_shape, white, binarize)


def _own_splits(
    path: Path,
    arrays: dict[str, Array],
    name: str,
    image_shape: tuple[int, int] | None,
    white: int,
    binarize: Binarize | None,
) -> Dataset:
    labels = [f"{part}_labels" for part in SPLITS]
    labelled = bool(arrays.keys() & set(labels))
    wanted = [*SPLITS, *(labels if labelled else [])]
    if not arrays.keys() >= set(wanted):
        missing_keys(path, ["x"] if "y" in arrays else wanted, arrays)
    x = [_values(arrays[part], white, f"{part} of {path.name!r}") for part in SPLITS]
    y = [_classes(arrays[part], f"{part} of {path.name!r}") for part in labels if labelled]
    for number, part in enumerate(SPLITS):
        check_batch((x[number], y[number]) if labelled else (x[number],), f"{part} split")
    if len({rows.shape[1:] for rows in x}) > 1:
        refuse(
            f"the splits of {path.name!r} have rows of different shapes",
            expected=f"{tuple(x[0].shape[1:])}, as in train",
            got=", ".join(str(tuple(rows.shape[1:])) for rows in x),
            advice="save the three with one shape",
        )
    return split(
        name,
        torch.cat(x).reshape(sum(map(len, x)), -1),
        torch.cat(y) if labelled else None,
        (len(x[1]), len(x[2])),
        binarize=binarize,
        image_shape=image_shape or image_shape_of(tuple(x[0].shape)),
    )


def _mapped(
    path: Path,
    held_out: float,
    name: str,
    image_shape: tuple[int, int] | None,
    white: int,
    binarize: Binarize | None,
) -> Dataset:
    if binarize is not None and not isinstance(binarize, dynamic):
        refuse(
            "rows that stay on disk cannot be binarised once",
            expected="binarize=dynamic(seed), or None",
            got=binarize,
            advice="save them as bytes 0 and 1, and from_file(..., white=1)",
        )
    array = read_npy(path, memory_map=True)
    if array.dtype not in (np.uint8, np.float32) or not array.flags.c_contiguous or not array.ndim:
        order = "row by row" if array.flags.c_contiguous else "column by column"
        refuse(
            f"{path.name!r} cannot be gathered from on disk",
            expected="uint8 or float32 in the machine's byte order, stored row by row",
            got=f"{array.dtype.str} of shape {array.shape}, {order}",
            advice="np.save(path, np.ascontiguousarray(x, dtype=np.float32))",
        )
    count = held_out_rows(held_out, len(array))
    if not isinstance(held_out, int):
        count = min(count, MAPPED_HELD_OUT)
    rows = array.reshape(len(array), -1)
    held = _values(rows[-2 * count :], white, f"held-out part of {path.name!r}")
    check_batch((held,), "held-out data")
    ready = split(
        name,
        held if binarize is None else binarize(held),
        None,
        (count, count),
        binarize=None,
        image_shape=image_shape or image_shape_of(array.shape),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        train = torch.from_numpy(rows[: -2 * count])
    return replace(ready, train=(train,), per_batch=_per_batch(train, white, binarize))


def _per_batch(
    train: Tensor, white: int, binarize: Binarize | None
) -> Callable[[Tensor], Tensor] | None:
    def grey(x: Tensor) -> Tensor:
        return x.float() / white

    def binary(x: Tensor) -> Tensor:
        return torch.bernoulli(grey(x))

    if train.dtype == torch.uint8:
        return grey if binarize is None else binary
    return None if binarize is None else torch.bernoulli


def _values(array: Array, white: int, what: str) -> Tensor:
    """Numbers as float32; bytes are divided by `white`."""
    if array.dtype.kind not in "buif" or not array.ndim:
        refuse(
            f"{what} holds no rows of numbers",
            expected="an array (N, ...) of integers or floats",
            got=f"{array.dtype} of shape {array.shape}",
            advice="np.asarray(x, dtype=np.float32)",
        )
    if (
        array.dtype == np.uint8
        and array.size
        and (white < array.max() or array.max() <= 1 < white)
    ):
        refuse(
            f"the bytes of {what} do not reach from 0 to white={white}",
            expected=f"a largest byte from 2 to {white}" if white > 1 else "bytes 0 and 1",
            got=f"a largest byte of {array.max()}",
            advice="white=255 for grey levels, white=1 for rows of 0 and 1",
        )
    x = torch.from_numpy(array.astype(np.float32))
    return x.div_(white) if array.dtype == np.uint8 else x


def _classes(array: Array, what: str) -> Tensor:
    if array.dtype.kind not in "bui" or array.ndim != 1:
        refuse(
            f"{what} holds no classes",
            expected="an array (N,) of integers",
            got=f"{array.dtype} of shape {array.shape}",
            advice="y.astype(np.int64).ravel()",
        )
    return torch.from_numpy(array.astype(np.int64))
