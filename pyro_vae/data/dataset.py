"""What every source of data ends in: three splits, and your own arrays as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_vae.checks import check_batch, refuse
from pyro_vae.data.binarize import Binarize, dynamic
from pyro_vae.pair import Batch


@dataclass(frozen=True)
class Dataset:
    """Three splits, each a batch `(x,)` or `(x, y)` with `x` of shape `(N, D)`.

    They are tensors in memory; training rows alone may lie in a memory-mapped file. A batch is
    a gather, `x[index]`, and then `per_batch` where it is given.

    Attributes:
        name: what it is called in figures.
        train: the rows to fit.
        validation: the rows that decide when to stop.
        test: the rows that nothing was decided on.
        labels: the class of each row, by name of the split, where there are classes.
        image_shape: `(height, width)` of a row, where rows are images.
        per_batch: what is done to `x` of each training batch after it is gathered: the draw of
            dynamic binarisation, the conversion of bytes on disk. Held-out rows are ready.
    """

    name: str
    train: Batch
    validation: Batch
    test: Batch
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    image_shape: tuple[int, int] | None = None
    per_batch: Callable[[Tensor], Tensor] | None = None

    @property
    def observed(self) -> int:
        """`D`, the numbers in a row."""
        return int(self.train[0].shape[1])

    def with_labels(self) -> Dataset:
        """The same data as batches `(x, y)`, for conditional models."""
        if not self.labels:
            raise ValueError(f"data set {self.name!r} has no labels")
        return replace(
            self,
            train=(*self.train[:1], self.labels["train"]),
            validation=(*self.validation[:1], self.labels["validation"]),
            test=(*self.test[:1], self.labels["test"]),
        )


def from_array(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor | None = None,
    *,
    held_out: float = 0.15,
    seed: int = 0,
    name: str = "data",
    image_shape: tuple[int, int] | None = None,
    binarize: Binarize | None = None,
) -> Dataset:
    """Shuffle and split your own rows; values are left as they are, unless binarised.

    Args:
        x: `(N, ...)` numbers; rows are flattened to `(N, D)`, float32.
        y: `(N,)` classes, optional.
        held_out: the part of the rows, or their count if an integer, that goes to validation,
            and as much again to test.
        seed: of the shuffle.
        name: for figures.
        image_shape: `(height, width)`, found from `x` of shape `(N, height, width)`.
        binarize: `threshold`, `bernoulli(seed)` or `dynamic(seed)` for grey values in [0, 1].

    Raises:
        ValueError: no rows, NaN or infinity, uneven `x` and `y`, too few rows to hold out,
            values that cannot be binarised.

    Example:
        >>> from_array(np.zeros((100, 4, 4))).validation[0].shape
        torch.Size([15, 16])
    """
    rows = torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x).float()
    labels = None if y is None else torch.as_tensor(y)
    check_batch((rows,) if labels is None else (rows, labels), "data")
    count = held_out_rows(held_out, len(rows))
    order = shuffled(len(rows), seed)
    return split(
        name,
        rows.reshape(len(rows), -1)[order],
        None if labels is None else labels[order],
        (count, count),
        binarize=binarize,
        image_shape=image_shape or image_shape_of(tuple(rows.shape)),
    )


def split(
    name: str,
    x: Tensor,
    y: Tensor | None,
    held_out: tuple[int, int],
    *,
    binarize: Binarize | None,
    image_shape: tuple[int, int] | None,
) -> Dataset:
    """Cut ordered rows into training, validation and test rows, in this order."""
    if image_shape is not None and image_shape[0] * image_shape[1] != x.shape[1]:
        refuse(
            f"rows of {name!r} are no images of {image_shape[0]}×{image_shape[1]}",
            expected=f"D = {image_shape[0] * image_shape[1]}",
            got=f"D = {x.shape[1]}",
            advice="image_shape=(height, width), or None",
        )
    sizes = (len(x) - sum(held_out), *held_out)
    if isinstance(binarize, dynamic):
        parts = [x[: sizes[0]], *binarize(x[sizes[0] :]).split(list(held_out))]
    else:
        parts = list((x if binarize is None else binarize(x)).split(list(sizes)))
    names = ("train", "validation", "test")
    return Dataset(
        name=name,
        train=(parts[0],),
        validation=(parts[1],),
        test=(parts[2],),
        labels={} if y is None else dict(zip(names, y.split(list(sizes)), strict=True)),
        image_shape=image_shape,
        per_batch=torch.bernoulli if isinstance(binarize, dynamic) else None,
    )


def held_out_rows(held_out: float, rows: int) -> int:
    """The rows of validation, and again of test: a count, or a part of all rows."""
    part = int(held_out * rows) if 0 < held_out < 1 else 0
    count = held_out if isinstance(held_out, int) else part
    if count < 1 or 2 * count >= rows:
        raise ValueError(
            f"held_out={held_out} of {rows} rows leaves a split empty"
            "\n  expected: at least one row in each of train, validation, test"
            "\n  try:      more rows, or held_out between 0 and 0.5"
        )
    return count


def shuffled(rows: int, seed: int) -> Tensor:
    """A fixed order of rows."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def image_shape_of(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """`(height, width)` of an array `(N, height, width)`."""
    return (shape[1], shape[2]) if len(shape) == 3 else None
