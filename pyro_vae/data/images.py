"""A folder of your own images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vae.checks import refuse
from pyro_vae.data.binarize import Binarize
from pyro_vae.data.dataset import Dataset, from_array
from pyro_vae.data.readers import parsing

SUFFIXES = (".png", ".jpg", ".jpeg")


def from_images(
    folder: str | Path,
    *,
    size: tuple[int, int] | None = None,
    held_out: float = 0.15,
    seed: int = 0,
    name: str | None = None,
    binarize: Binarize | None = None,
) -> Dataset:
    """Read the PNG and JPEG files of a folder as grey rows in [0, 1], shuffled and split.

    Sub-folders are classes, numbered in the order of their names, with the images at any depth
    below them; other kinds of file are not looked at. Colour becomes grey, by the luma
    transform of ITU-R 601-2, and transparency is dropped. All rows are held in memory; for
    more than fits, write them to a `.npy` file of bytes and memory-map that.

    Args:
        folder: with images, or with a sub-folder of them for each class.
        size: `(height, width)` to bring all images to, by antialiased linear interpolation;
            `None` takes them as they are, which must be of one size.
        held_out: the part of the rows, or their count if an integer, that goes to validation,
            and as much again to test.
        seed: of the shuffle.
        name: for figures; that of the folder by default.
        binarize: `threshold`, `bernoulli(seed)` or `dynamic(seed)`.

    Raises:
        ValueError: no image in the folder or in one of its classes; images both in it and in
            classes; a file that is no image; images of mixed size or with more than 8 bits a
            channel; too few to hold out.
        FileNotFoundError: no such folder.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for number in range(20):
        ...         Image.new("L", (6, 4), color=12 * number).save(f"{folder}/{number}.png")
        ...     data = from_images(folder)
        >>> data.train[0].shape, data.image_shape
        (torch.Size([14, 24]), (4, 6))
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}\n  expected: a folder of PNG or JPEG files, or of "
            "sub-folders of them\n  try:      an absolute path"
        )
    if size is not None and not (len(size) == 2 and min(size) >= 1):
        refuse(
            "size is no size", expected="(height, width), each >= 1", got=size, advice="(28, 28)"
        )
    classes = sorted(part for part in folder.iterdir() if part.is_dir() and part.name[0] != ".")
    groups = [_images(part, "**/*") for part in classes] or [_images(folder, "*")]
    _check_groups(folder, classes, groups)
    paths = [path for group in groups for path in group]
    first = _grey(paths[0], size)
    pixels = np.empty((len(paths), *first.shape), np.uint8)
    for row, path in enumerate(paths):
        image = _grey(path, size)
        if image.shape != first.shape:
            refuse(
                "images of mixed size",
                expected=f"{_size(first)} as in {str(paths[0])!r}",
                got=f"{_size(image)} in {str(path)!r}",
                advice=f"size=({first.shape[0]}, {first.shape[1]}) to bring all to one",
            )
        pixels[row] = image
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return from_array(
        torch.from_numpy(pixels).float().div_(255),
        labels if classes else None,
        held_out=held_out,
        seed=seed,
        name=name or folder.resolve().name,
        binarize=binarize,
    )


def _images(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
    )


def _check_groups(folder: Path, classes: list[Path], groups: list[list[Path]]) -> None:
    if classes and (loose := _images(folder, "*")):
        refuse(
            f"{str(folder)!r} holds images both beside and inside of its classes",
            expected="images in sub-folders alone, or none there",
            got=f"{loose[0].name!r} beside {classes[0].name!r}",
            advice="move the loose images into a sub-folder of their own",
        )
    for part, group in zip(classes or [folder], groups, strict=True):
        if not group:
            refuse(
                f"no image in {str(part)!r}",
                expected=f"files that end in {', '.join(SUFFIXES)}",
                got=", ".join(sorted(path.name for path in part.iterdir())[:5]) or "nothing",
                advice="another folder, or the images as PNG",
            )


def _grey(path: Path, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    from PIL import Image

    with parsing(path, "PNG or JPEG image of 8 bits a channel") as file:
        image: Image.Image = Image.open(file, formats=("PNG", "JPEG"))
        if image.mode[0] in "IF":
            raise TypeError(f"mode {image.mode}, more than 8 bits")
        image = image.convert("L")
        if size is not None:
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(image)


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[0]}×{image.shape[1]}"
