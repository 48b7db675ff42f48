"""Data sets in memory: tensors, splits, binarisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .checks import check_batch
from .pair import Batch

Binarize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Dataset:
    """Three splits in memory, each a batch `(x,)` or `(x, y)` with `x` of shape `(N, D)`.

    Attributes:
        name: what it is called in figures.
        train: the rows to fit.
        validation: the rows that decide when to stop.
        test: the rows that nothing was decided on.
        labels: the class of each row, by name of the split, where there are classes.
        image_shape: `(height, width)` of a row, where rows are images.
    """

    name: str
    train: Batch
    validation: Batch
    test: Batch
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    image_shape: tuple[int, int] | None = None

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


def threshold(x: Tensor) -> Tensor:
    """Binarise grey values in [0, 1] at one half.

    Example:
        >>> threshold(torch.tensor([0.2, 0.5, 0.7]))
        tensor([0., 0., 1.])
    """
    return (x > 0.5).to(x.dtype)


def bernoulli(seed: int = 0) -> Binarize:
    """Binarise grey values in [0, 1] by one Bernoulli draw each, once, from a fixed seed.

    Example:
        >>> bernoulli(seed=0)(torch.full((4,), 0.5))
        tensor([1., 0., 1., 1.])
    """

    def sample(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.bernoulli(x.cpu(), generator=generator).to(x)

    return sample


def load(name: str = "digits", *, binarize: Binarize | None = threshold) -> Dataset:
    """Load a data set by name.

    - `"digits"`: the 1,797 real handwritten 8×8 digits of scikit-learn's package (UCI, 17
      grey levels), shuffled with a fixed seed into 1,297 / 250 / 250; no download.

    Args:
        name: `"digits"`.
        binarize: `threshold`, `bernoulli(seed)`, your own, or `None` to keep grey values in
            [0, 1].

    Returns:
        A `Dataset` of float32 rows.

    Raises:
        ValueError: an unknown name.

    References:
        E. Alpaydin, C. Kaynak. *Optical Recognition of Handwritten Digits*, UCI, 1998.

    Example:
        >>> digits = load("digits")
        >>> digits.train[0].shape, digits.test[0].shape, digits.image_shape
        (torch.Size([1297, 64]), torch.Size([250, 64]), (8, 8))
    """
    if name != "digits":
        raise ValueError(
            f"unknown data set {name!r}\n  expected: 'digits'"
            "\n  try:      pv.data.from_array(x) for your own"
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.as_tensor(digits.data, dtype=torch.float32) / 16
    y = torch.as_tensor(digits.target, dtype=torch.int64)
    return _split("digits", x, y, (250, 250), 0, binarize, (8, 8))


def from_array(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor | None = None,
    *,
    held_out: float = 0.15,
    seed: int = 0,
    name: str = "data",
    image_shape: tuple[int, int] | None = None,
) -> Dataset:
    """Shuffle and split your own rows; values are left as they are.

    Args:
        x: `(N, ...)` numbers; rows are flattened to `(N, D)`, float32.
        y: `(N,)` classes, optional.
        held_out: the part of the rows that goes to validation, and as much again to test.
        seed: of the shuffle.
        name: for figures.
        image_shape: `(height, width)`, found from `x` of shape `(N, height, width)`.

    Raises:
        ValueError: no rows, NaN or infinity, uneven `x` and `y`, too few rows to hold out.

    Example:
        >>> from_array(np.zeros((100, 4, 4))).validation[0].shape
        torch.Size([15, 16])
    """
    rows = torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x).float()
    labels = None if y is None else torch.as_tensor(y)
    check_batch((rows,) if labels is None else (rows, labels), "data")
    if image_shape is None and rows.dim() == 3:
        image_shape = (rows.shape[1], rows.shape[2])
    count = int(held_out * len(rows))
    if count < 1 or 2 * count >= len(rows):
        raise ValueError(
            f"held_out={held_out} of {len(rows)} rows leaves a split empty"
            "\n  expected: at least one row in each of train, validation, test"
            "\n  try:      more rows, or held_out between 0 and 0.5"
        )
    return _split(
        name, rows.reshape(len(rows), -1), labels, (count, count), seed, None, image_shape
    )


def _split(
    name: str,
    x: Tensor,
    y: Tensor | None,
    held_out: tuple[int, int],
    seed: int,
    binarize: Binarize | None,
    image_shape: tuple[int, int] | None,
) -> Dataset:
    if binarize is not None:
        x = binarize(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    sizes = (len(x) - sum(held_out), *held_out)
    parts = dict(zip(("train", "validation", "test"), order.split(list(sizes)), strict=True))
    return Dataset(
        name=name,
        train=(x[parts["train"]],),
        validation=(x[parts["validation"]],),
        test=(x[parts["test"]],),
        labels={} if y is None else {key: y[index] for key, index in parts.items()},
        image_shape=image_shape,
    )
