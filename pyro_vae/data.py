"""Data sets in memory: tensors, splits, binarisation."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_vae.checks import check_batch, refuse
from pyro_vae.pair import Batch

Binarize = Callable[[Tensor], Tensor]
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
"""By name, the class in `torchvision.datasets`."""


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


def load(
    name: str = "digits",
    *,
    root: str | Path | None = None,
    download: bool = False,
    binarize: Binarize | None = threshold,
) -> Dataset:
    """Load a data set by name.

    - `"digits"`: the 1,797 real handwritten 8×8 digits of scikit-learn's package (UCI, 17
      grey levels), shuffled with a fixed seed into 1,297 / 250 / 250; no download.
    - `"mnist"`, `"fashion_mnist"`: 28×28, by torchvision, from `root`. The last 10,000
      training rows are the validation set, the published test rows the test set.

    Args:
        name: of the set.
        root: folder that holds `MNIST/raw` or `FashionMNIST/raw`; the environment variable
            `PYRO_VAE_DATA` by default.
        download: let torchvision fetch what is missing, and unpack archives it finds there.
        binarize: `threshold`, `bernoulli(seed)`, your own, or `None` to keep grey values in
            [0, 1].

    Returns:
        A `Dataset` of float32 rows.

    Raises:
        ValueError: an unknown name, or no root.
        FileNotFoundError: the root does not hold the files.

    References:
        E. Alpaydin, C. Kaynak. *Optical Recognition of Handwritten Digits*, UCI, 1998.
        Yann LeCun, Corinna Cortes, Christopher Burges. *The MNIST Database*, 1998.
        Han Xiao, Kashif Rasul, Roland Vollgraf. *Fashion-MNIST*, 2017.

    Example:
        >>> digits = load("digits")
        >>> digits.train[0].shape, digits.test[0].shape, digits.image_shape
        (torch.Size([1297, 64]), torch.Size([250, 64]), (8, 8))
    """
    if name == "digits":
        return _digits(binarize)
    if name in TORCHVISION:
        return _from_torchvision(name, root or os.environ.get("PYRO_VAE_DATA"), download, binarize)
    refuse(
        f"unknown data set {name!r}",
        expected=f"one of {['digits', *TORCHVISION]}",
        got=repr(name),
        advice="pv.data.from_array(x) for your own",
    )


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


def _digits(binarize: Binarize | None) -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.as_tensor(digits.data, dtype=torch.float32) / 16
    y = torch.as_tensor(digits.target, dtype=torch.int64)
    return _split("digits", x, y, (250, 250), 0, binarize, (8, 8))


def _from_torchvision(
    name: str, root: str | Path | None, download: bool, binarize: Binarize | None
) -> Dataset:
    if root is None:
        refuse(
            f"no folder to find {name!r} in",
            expected="root=..., or the environment variable PYRO_VAE_DATA",
            got=None,
            advice=f"load({name!r}, root='data', download=True)",
        )
    source = getattr(_torchvision().datasets, TORCHVISION[name])
    try:
        parts = [source(str(root), train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name} is not in {str(root)!r}\n  expected: the unpacked idx files in "
            f"{TORCHVISION[name]}/raw\n  try:      download=True, which also unpacks archives"
        ) from error
    x, test = ((part.data.flatten(1) / 255) for part in parts)
    x, test = (x, test) if binarize is None else (binarize(x), binarize(test))
    labels = {
        "train": parts[0].targets[:-10_000],
        "validation": parts[0].targets[-10_000:],
        "test": parts[1].targets,
    }
    return Dataset(name, (x[:-10_000],), (x[-10_000:],), (test,), labels, (28, 28))


def _torchvision() -> Any:
    try:
        import torchvision
    except (RuntimeError, ImportError) as error:
        raise ImportError(
            f"torchvision cannot be imported beside torch {torch.__version__}: the two are not "
            "builds of one release; install them together, uv pip install torch torchvision"
        ) from error
    return torchvision


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
