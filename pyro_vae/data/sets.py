"""Published data sets by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch

from pyro_vae.checks import refuse
from pyro_vae.data import published
from pyro_vae.data.binarize import Binarize, dynamic, threshold
from pyro_vae.data.dataset import Dataset, split

_IDX = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


@dataclass(frozen=True)
class _Published:
    title: str
    read: Callable[..., published.Rows]
    """takes a path for each of the files"""
    binarize: Binarize | None
    """the usual choice"""
    files: tuple[str, ...] = ()
    """below the root; those of idx may lie there packed as `.gz`"""
    torchvision: str | None = None
    """the class in `torchvision.datasets` that fetches the files"""


SETS = {
    "digits": _Published("digits", published.digits, threshold),
    "mnist": _Published(
        "MNIST", published.mnist, threshold, tuple(f"MNIST/raw/{f}" for f in _IDX), "MNIST"
    ),
    "fashion_mnist": _Published(
        "Fashion-MNIST", published.mnist, threshold,
        tuple(f"FashionMNIST/raw/{f}" for f in _IDX), "FashionMNIST",
    ),
    "binarized_mnist": _Published(
        "static binarized MNIST", published.binarized_mnist, None,
        ("binarized_mnist/binarized_mnist.npz",),
    ),
    "omniglot": _Published(
        "OMNIGLOT (rebuilt)", published.omniglot, dynamic(seed=0),
        ("omniglot/omniglot_28x28_rebuilt.npz",),
    ),
    "caltech101_silhouettes": _Published(
        "Caltech 101 Silhouettes", published.caltech101_silhouettes, None,
        ("caltech101_silhouettes/caltech101_silhouettes_28_split1.mat",),
    ),
    "frey_faces": _Published(
        "Frey Faces", published.frey_faces, None, ("freyfaces/freyfaces.npz",)
    ),
}  # fmt: skip
"""By name."""


def load(
    name: str = "digits",
    *,
    root: str | Path | None = None,
    download: bool = False,
    binarize: Binarize | EllipsisType | None = ...,
) -> Dataset:
    """Load a published data set by name.

    | name | rows (train / validation / test) | `binarize` by default |
    | --- | --- | --- |
    | `"digits"` | 8×8, 1,297 / 250 / 250 | `threshold` |
    | `"mnist"`, `"fashion_mnist"` | 28×28, 50,000 / 10,000 / 10,000 | `threshold` |
    | `"binarized_mnist"` | 28×28, 50,000 / 10,000 / 10,000, no labels | is binary |
    | `"omniglot"` | 28×28, 23,000 / 1,345 / 8,115 | `dynamic(seed=0)` |
    | `"caltech101_silhouettes"` | 28×28, 4,100 / 2,264 / 2,307 | is binary |
    | `"frey_faces"` | 28×20, 1,565 / 200 / 200, no labels | `None`: grey |

    - `"digits"`: the handwritten digits of scikit-learn's package (UCI, 17 grey levels), in a
      fixed shuffled order; no files.
    - `"mnist"`, `"fashion_mnist"`: `MNIST/raw` or `FashionMNIST/raw` as torchvision lays them
      out, unpacked or as `.gz`. The last 10,000 training rows are the validation set, the
      published test rows the test set. Papers take `binarize=dynamic(seed)`, or
      `"binarized_mnist"`, whose figures are comparable across papers.
    - `"binarized_mnist"`: the published draw and splits; `train`, `valid`, `test` of `uint8`
      `(N, 98)`, eight pixels a byte. Its test rows are sorted by digit in the file: here they
      are the same rows in a fixed shuffled order.
    - `"omniglot"`: a rebuild of the usual 28×28 file from the originals, so figures are close
      to, not strictly comparable with, published ones; `train`, `test` of `uint8`
      `(N, 28, 28)`, 255 for ink, `train_alphabet`, `test_alphabet`. Drawers 1–15 of each
      character train, 16–20 test, both in a fixed shuffled order; validation is the last 1,345
      of the former. Labels are the 50 alphabets.
    - `"caltech101_silhouettes"`: the published file, split 1, and its splits; the object is 1
      and upright; labels from 0. A few silhouettes occur in more than one split.
    - `"frey_faces"`: `faces` of `uint8` `(1965, 28, 20)`, video frames in a fixed shuffled
      order, so that a test frame has near-copies in training.

    Args:
        name: of the set.
        root: folder that holds the files; the environment variable `PYRO_VAE_DATA` by default.
            It is only read.
        download: let torchvision fetch `"mnist"` or `"fashion_mnist"` into the root where files
            are missing.
        binarize: `threshold`, `bernoulli(seed)`, `dynamic(seed)`, your own, or `None` to keep
            grey values in [0, 1]; `...` is the table's choice.

    Returns:
        A `Dataset` of float32 rows.

    Raises:
        ValueError: an unknown name, no root, a file that is damaged or another than published.
        FileNotFoundError: the root does not hold the files, or they could not be fetched.
        ImportError: a download without a torchvision that fits this torch.

    References:
        E. Alpaydin, C. Kaynak. *Optical Recognition of Handwritten Digits*, UCI, 1998.
        Yann LeCun, Corinna Cortes, Christopher Burges. *The MNIST Database*, 1998.
        Han Xiao, Kashif Rasul, Roland Vollgraf. *Fashion-MNIST*, 2017.
        Hugo Larochelle, Iain Murray. *The Neural Autoregressive Distribution Estimator*, 2011.
        Brenden Lake, Ruslan Salakhutdinov, Joshua Tenenbaum. *Human-level Concept Learning
        through Probabilistic Program Induction*, 2015.
        Benjamin Marlin, Kevin Swersky, Bo Chen, Nando de Freitas. *Inductive Principles for
        Restricted Boltzmann Machine Learning*, 2010.
        Jakub Tomczak, Max Welling. *VAE with a VampPrior*, 2018, for the split of Frey Faces.

    Example:
        >>> digits = load("digits")
        >>> digits.train[0].shape, digits.test[0].shape, digits.image_shape
        (torch.Size([1297, 64]), torch.Size([250, 64]), (8, 8))
    """
    if name not in SETS:
        refuse(
            f"unknown data set {name!r}",
            expected=f"one of {list(SETS)}",
            got=repr(name),
            advice="pv.data.from_array(x), from_file(path) or from_images(folder) for your own",
        )
    wanted = SETS[name]
    rows = wanted.read(*_paths(name, wanted, root or os.environ.get("PYRO_VAE_DATA"), download))
    return split(
        wanted.title,
        rows.x,
        rows.y,
        rows.held_out,
        binarize=wanted.binarize if binarize is ... else binarize,
        image_shape=rows.image_shape,
    )


def _paths(name: str, wanted: _Published, root: str | Path | None, download: bool) -> list[Path]:
    """Where the files of a set lie, unpacked or packed; fetched first if that is allowed."""
    if not wanted.files:
        return []
    if root is None:
        refuse(
            f"no folder to find {name!r} in",
            expected=f"root=..., or the environment variable PYRO_VAE_DATA, with{_tree(wanted)}",
            got=None,
            advice=f"load({name!r}, root='data'{', download=True' * bool(wanted.torchvision)})",
        )
    folder = Path(root).expanduser()
    found = {file: _present(folder / file) for file in wanted.files}
    if download and wanted.torchvision and not all(found.values()):
        _fetch(wanted, wanted.torchvision, folder)
        found = {file: _present(folder / file) for file in wanted.files}
    missing = [file for file, path in found.items() if path is None]
    if missing:
        advice = "root=... or PYRO_VAE_DATA, the folder above these"
        if not download and wanted.torchvision:
            advice = f"download=True, or {advice}"
        if download and not wanted.torchvision:
            advice = f"no download is known; {advice}"
        raise FileNotFoundError(
            f"{wanted.title} is not in {str(folder)!r}\n  expected:{_tree(wanted)}"
            f"\n  missing:  {', '.join(missing) if folder.is_dir() else 'the folder itself'}"
            f"\n  try:      {advice}"
        )
    return [path for path in found.values() if path is not None]


def _present(path: Path) -> Path | None:
    packed = path.with_name(f"{path.name}.gz")
    candidates = (path, packed) if path.name.endswith("-ubyte") else (path,)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _tree(wanted: _Published) -> str:
    ends = {file: "[.gz]" if file.endswith("-ubyte") else "" for file in wanted.files}
    return "".join(f"\n              root/{file}{end}" for file, end in ends.items())


def _fetch(wanted: _Published, source: str, folder: Path) -> None:
    datasets = _torchvision().datasets
    try:
        getattr(datasets, source)(str(folder), download=True)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"{wanted.title} could not be fetched into {str(folder)!r}"
            f"\n  expected: a connection, and a folder to write to, for{_tree(wanted)}"
            f"\n  got:      {type(error).__name__}: {error}"
            "\n  try:      another root, or put the files there by hand"
        ) from error


def _torchvision() -> Any:
    try:
        import torchvision
    except (RuntimeError, ImportError) as error:
        raise ImportError(
            f"torchvision cannot be imported beside torch {torch.__version__}: the two are not "
            "builds of one release; install them together, uv pip install torch torchvision"
        ) from error
    return torchvision
