"""Data: what is read is what was written, splits are partitions, broken files one clear error."""

from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat, savemat

import pyro_vae as pv
from pyro_vae.data.readers import read_idx, read_mat, read_npz
from truth import assert_z

Array = NDArray[Any]
SETS = [
    "mnist",
    "fashion_mnist",
    "binarized_mnist",
    "omniglot",
    "caltech101_silhouettes",
    "frey_faces",
]
SPLITS = ("train", "validation", "test")
thorough = settings(deadline=None, derandomize=True, max_examples=60)
bytes_of_any_shape = st.integers(1, 3).flatmap(
    lambda n: arrays(np.uint8, array_shapes(min_dims=n, max_dims=n, max_side=5))
)


def idx(array: Array) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@contextmanager
def file_of(content: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def npz(**parts: Array) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **parts)  # type: ignore[arg-type]
    return file.getvalue()


def rows_of(data: pv.data.Dataset) -> Array:
    return torch.cat([data.train[0], data.validation[0], data.test[0]]).numpy()


def as_multiset(x: Array) -> Array:
    return np.unique(x.reshape(len(x), -1), axis=0, return_counts=True)[1]


# --- splits and binarisation


def test_digits_are_real_split_and_binary(digits: pv.data.Dataset) -> None:
    from sklearn.datasets import load_digits

    everything = rows_of(digits)
    assert sum(len(part) for part in digits.labels.values()) == len(everything) == 1797
    assert np.unique(everything).tolist() == [0, 1]
    assert everything.sum() == float((load_digits().data > 8).sum())
    grey = pv.data.load("digits", binarize=None)
    assert grey.train[0].unique().numel() == 17 and grey.train[0].max() == 1
    assert torch.equal((grey.test[0] > 0.5).float(), digits.test[0])
    assert torch.equal(pv.data.load("digits").train[0], digits.train[0])
    assert digits.observed == 64 and digits.per_batch is None


def test_static_binarisation_is_fixed_and_right() -> None:
    grey = torch.full((10_000, 1), 0.3)
    once, again = pv.data.bernoulli(0)(grey), pv.data.bernoulli(0)(grey)
    assert torch.equal(once, again)
    assert not torch.equal(once, pv.data.bernoulli(1)(grey))
    assert_z(once.mean(), torch.tensor(0.3), torch.tensor((0.3 * 0.7 / 10_000) ** 0.5))


def test_splits_are_drawn_apart() -> None:
    data = pv.data.from_array(np.full((300, 50), 0.5), held_out=100, binarize=pv.data.bernoulli(0))
    for a, b in ((data.train, data.test), (data.validation, data.test)):
        equal = (a[0] == b[0]).double().mean()
        assert_z(equal, torch.tensor(0.5).double(), torch.tensor(0.5 / 5000**0.5).double())


def test_dynamic_binarisation_draws_batches_anew_and_held_out_rows_once() -> None:
    x = np.random.default_rng(0).random((400, 30))
    grey = pv.data.from_array(x, held_out=50)
    data = pv.data.from_array(x, held_out=50, binarize=pv.data.dynamic(3))
    again = pv.data.from_array(x, held_out=50, binarize=pv.data.dynamic(3))
    assert torch.equal(data.train[0], grey.train[0])
    for split in ("validation", "test"):
        drawn = getattr(data, split)[0]
        assert drawn.unique().tolist() == [0, 1]
        assert torch.equal(drawn, getattr(again, split)[0])
        p = getattr(grey, split)[0].double()
        assert_z(drawn.double().sum(), p.sum(), (p * (1 - p)).sum().sqrt())
    assert data.per_batch is not None
    draws = torch.stack([data.per_batch(data.train[0][:20]) for _ in range(400)]).double()
    p = data.train[0][:20].double()
    assert draws.unique().tolist() == [0, 1]
    assert_z(draws.mean(0), p, (p * (1 - p) / 400).sqrt())


@pytest.mark.parametrize("choice", [pv.data.threshold, pv.data.bernoulli(0), pv.data.dynamic(0)])
@pytest.mark.parametrize("x", [[255.0, 0.0], [-0.1, 0.5], [math.nan, 0.5]])
def test_only_grey_values_are_binarised(choice: Any, x: list[float]) -> None:
    with pytest.raises(ValueError, match=r"expected: grey values in \[0, 1\]"):
        choice(torch.tensor(x))


def test_labels_follow_their_rows() -> None:
    x = np.arange(100.0)[:, None].repeat(3, 1)
    data = pv.data.from_array(x, np.arange(100)).with_labels()
    for rows, labels in (data.train, data.validation, data.test):
        assert torch.equal(rows[:, 0].long(), labels)
    with pytest.raises(ValueError, match="has no labels"):
        pv.data.from_array(x).with_labels()


@thorough
@given(
    rows=st.integers(3, 60),
    width=st.integers(1, 4),
    held_out=st.one_of(st.integers(1, 20), st.floats(0.01, 0.49)),
    seed=st.integers(0, 2**31),
)
def test_splits_are_a_partition(rows: int, width: int, held_out: float, seed: int) -> None:
    count = held_out if isinstance(held_out, int) else int(held_out * rows)
    x = np.arange(rows * width).reshape(rows, width)
    if not 1 <= count < rows / 2:
        with pytest.raises(ValueError, match="leaves a split empty"):
            pv.data.from_array(x, held_out=held_out, seed=seed)
        return
    data = pv.data.from_array(x, np.arange(rows), held_out=held_out, seed=seed)
    sizes = [len(getattr(data, split)[0]) for split in SPLITS]
    assert sizes == [rows - 2 * count, count, count]
    order = torch.cat([data.labels[split] for split in SPLITS]).numpy()
    assert sorted(order) == list(range(rows))
    np.testing.assert_array_equal(rows_of(data), x[order])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pv.data.load("mnits"), "unknown data set 'mnits'"),
        (lambda: pv.data.from_array(np.zeros((0, 3))), "empty"),
        (lambda: pv.data.from_array(np.full((10, 3), np.nan)), "NaN"),
        (lambda: pv.data.from_array(np.zeros((10, 3)), np.zeros(9)), "uneven"),
        (lambda: pv.data.from_array(np.zeros((4, 3))), "leaves a split empty"),
        (lambda: pv.data.from_array(np.zeros((40, 3)), held_out=0.5), "leaves a split empty"),
        (lambda: pv.data.from_array(np.zeros((40, 3)), held_out=20), "leaves a split empty"),
        (lambda: pv.data.from_array(np.zeros((40, 3)), held_out=math.nan), "leaves a split empty"),
        (lambda: pv.data.from_array(np.zeros((40, 3)), image_shape=(2, 2)), "no images of 2×2"),
    ],
    ids=["name", "empty", "nan", "uneven", "few", "half", "half count", "nan held out", "shape"],
)
def test_bad_arrays(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- idx


@thorough
@given(array=bytes_of_any_shape, packed=st.booleans())
def test_idx_round_trip(array: Array, packed: bool) -> None:
    content = gzip.compress(idx(array)) if packed else idx(array)
    with file_of(content, "x-ubyte.gz" if packed else "x-ubyte") as path:
        np.testing.assert_array_equal(read_idx(path, array.ndim), array)


@thorough
@given(array=bytes_of_any_shape, packed=st.booleans(), data=st.data())
def test_a_truncated_idx_is_refused(array: Array, packed: bool, data: st.DataObject) -> None:
    content = gzip.compress(idx(array)) if packed else idx(array)
    cut = data.draw(st.integers(0, len(content) - 1))
    with file_of(content[:cut], "x-ubyte.gz" if packed else "x-ubyte") as path:
        with pytest.raises(ValueError, match=r"x-ubyte[^\n]*\n  expected: .*\n  got: .*\n  try:"):
            read_idx(path, array.ndim)


@thorough
@given(array=bytes_of_any_shape, value=st.integers(0, 255), data=st.data())
def test_a_corrupted_idx_header_is_refused(array: Array, value: int, data: st.DataObject) -> None:
    content = bytearray(idx(array))
    place = data.draw(st.integers(0, 3 + 4 * array.ndim))
    if content[place] == value:
        return
    content[place] = value
    for dimensions in (1, 2, 3):
        with file_of(bytes(content), "x-ubyte") as path:
            with pytest.raises(ValueError, match=r"x-ubyte[^\n]*\n  expected: "):
                read_idx(path, dimensions)


@thorough
@given(array=bytes_of_any_shape, value=st.integers(0, 255), data=st.data())
def test_a_corrupted_archive_is_never_read_wrong(
    array: Array, value: int, data: st.DataObject
) -> None:
    content = bytearray(gzip.compress(idx(array)))
    content[data.draw(st.integers(0, len(content) - 1))] = value
    with file_of(bytes(content), "x-ubyte.gz") as path:
        try:
            np.testing.assert_array_equal(read_idx(path, array.ndim), array)
        except ValueError as error:
            assert "\n  expected: " in str(error)


@pytest.mark.parametrize(
    ("content", "dimensions", "message"),
    [
        (b"", 3, "no idx file of images\n.*0x00000803\n.*an empty file"),
        (idx(np.ones((4, 2, 2), np.uint8)) + b"\0", 3, "4 × 2 × 2 bytes .*\n.*got:      17 bytes"),
        (idx(np.ones(4, np.uint8)), 3, "no idx file of images\n.*\n.*0x00000801, labels"),
        (idx(np.ones((4, 2, 2), np.uint8)), 1, "no idx file of labels\n.*\n.*0x00000803, images"),
        (gzip.compress(b"1"), 3, "magic number 0x00000803\n.*0x1f8b0800"),
        (idx(np.ones((0, 2, 2), np.uint8)), 3, "at least one\n.*got:      0 bytes"),
    ],
    ids=["empty", "trailing", "labels as images", "images as labels", "packed", "no rows"],
)
def test_bad_idx(content: bytes, dimensions: int, message: str) -> None:
    with file_of(content, "x-ubyte") as path, pytest.raises(ValueError, match=message):
        read_idx(path, dimensions)


# --- your own files


@thorough
@given(
    x=arrays(
        np.float32, st.tuples(st.integers(3, 12), st.integers(1, 3), st.integers(1, 3)),
        elements=st.floats(-9, 9, width=32),
    )
)  # fmt: skip
def test_npz_round_trip(x: Array) -> None:
    with file_of(npz(x=x, y=np.arange(len(x)), note=np.array("mine")), "mine.npz") as path:
        data = pv.data.from_file(path, held_out=1)
    order = torch.cat([data.labels[split] for split in SPLITS]).numpy()
    assert sorted(order) == list(range(len(x)))
    np.testing.assert_array_equal(rows_of(data), x[order].reshape(len(x), -1))
    assert data.name == "mine" and data.image_shape == x.shape[1:]


ARCHIVE = npz(x=np.random.default_rng(0).random((40, 3)).astype(np.float32))


@thorough
@given(cut=st.integers(0, len(ARCHIVE) - 1))
def test_a_truncated_npz_is_refused(cut: int) -> None:
    with file_of(ARCHIVE[:cut], "mine.npz") as path:
        with pytest.raises(ValueError, match="npz archive of plain arrays, or is damaged"):
            pv.data.from_file(path)


@thorough
@given(place=st.integers(0, len(ARCHIVE) - 1), value=st.integers(0, 255))
def test_a_corrupted_npz_is_never_read_wrong(place: int, value: int) -> None:
    content = bytearray(ARCHIVE)
    content[place] = value
    with file_of(ARCHIVE, "right.npz") as path:
        right = read_npz(path, ["x"])["x"]
    with file_of(bytes(content), "mine.npz") as path:
        try:
            np.testing.assert_array_equal(read_npz(path, ["x"])["x"], right)
        except ValueError as error:
            assert "\n  expected: " in str(error)


def test_an_array_file_is_an_array(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((40, 4, 5))
    np.save(tmp_path / "x.npy", x)
    data, same = pv.data.from_file(tmp_path / "x.npy", seed=3), pv.data.from_array(x, seed=3)
    assert np.array_equal(rows_of(data), rows_of(same)) and data.image_shape == (4, 5)


def test_own_splits_are_kept(tmp_path: Path) -> None:
    x = np.arange(2, 32, dtype=np.uint8).reshape(10, 3)
    y = np.arange(10)
    parts = dict(zip(SPLITS, np.split(x, [5, 8]), strict=True))
    labels = {f"{k}_labels": v for k, v in zip(SPLITS, np.split(y, [5, 8]), strict=True)}
    np.savez(tmp_path / "x.npz", **parts, **labels)  # type: ignore[arg-type]
    data = pv.data.from_file(tmp_path / "x.npz")
    np.testing.assert_allclose(rows_of(data), x / np.float32(255))
    assert [data.labels[split].tolist() for split in SPLITS] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7],
        [8, 9],
    ]
    np.savez(tmp_path / "x.npz", **parts)  # type: ignore[arg-type]
    assert not pv.data.from_file(tmp_path / "x.npz").labels


X = np.random.default_rng(0).integers(0, 256, (100, 4, 5), np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("held_out", [0.1, 10])
def test_a_mapped_file_gives_the_same_rows(tmp_path: Path, dtype: Any, held_out: float) -> None:
    np.save(tmp_path / "x.npy", X if dtype == np.uint8 else X / np.float32(255))
    (tmp_path / "x.npy").chmod(0o444)
    data = pv.data.from_file(tmp_path / "x.npy", memory_map=True, held_out=held_out)
    assert data.train[0].dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert (data.per_batch is None) == (dtype == np.float32)
    index = torch.randperm(80)
    batch = data.train[0][index]
    batch = data.per_batch(batch) if data.per_batch else batch
    expected = torch.from_numpy(X.reshape(100, -1) / np.float32(255))
    torch.testing.assert_close(batch, expected[:80][index])
    torch.testing.assert_close(data.validation[0], expected[80:90])
    torch.testing.assert_close(data.test[0], expected[90:])
    assert data.observed == 20 and data.image_shape == (4, 5)


def test_mapped_rows_are_binarised_batch_by_batch(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.clip(20, 235))
    data = pv.data.from_file(tmp_path / "x.npy", memory_map=True, binarize=pv.data.dynamic(0))
    assert data.train[0].dtype == torch.uint8 and data.per_batch is not None
    p = torch.from_numpy(X.clip(20, 235).reshape(100, -1)[:10] / 255)
    draws = torch.stack([data.per_batch(data.train[0][:10]) for _ in range(300)]).double()
    assert_z(draws.mean(0), p, (p * (1 - p) / 300).sqrt())
    assert data.test[0].unique().tolist() == [0, 1]
    np.save(tmp_path / "x.npy", (X > 127).astype(np.uint8))
    data = pv.data.from_file(tmp_path / "x.npy", memory_map=True, white=1)
    assert data.per_batch is not None
    assert data.per_batch(data.train[0]).unique().tolist() == [0, 1]


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="a file with holes, on POSIX")
def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    rows = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 64
    with (tmp_path / "x.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (rows, 64)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + rows * 64)
    data = pv.data.from_file(tmp_path / "x.npy", memory_map=True, white=1)
    assert len(data.train[0]) == rows - 20_000 and len(data.test[0]) == 10_000
    assert data.train[0][torch.randint(len(data.train[0]), (128,))].shape == (128, 64)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "bare.npz", "bare.npy"])
@pytest.mark.parametrize("memory_map", [False, True])
def test_nothing_is_unpickled(name: str, memory_map: bool, tmp_path: Path) -> None:
    trap = np.array([Trap(tmp_path / "sprung")] * 10, dtype=object)
    with (tmp_path / name).open("wb") as file:
        if name.startswith("bare"):
            pickle.dump(trap, file)
        elif name.endswith("npz"):
            np.savez(file, x=trap)
        else:
            np.save(file, trap)
    with pytest.raises(ValueError, match=r"or is damaged|memory-mapped"):
        pv.data.from_file(tmp_path / name, memory_map=memory_map)
    assert not (tmp_path / "sprung").exists()


GREY = {part: np.full((9, 2), 0.5) for part in SPLITS}


@pytest.mark.parametrize(
    ("parts", "arguments", "message"),
    [
        ({"images": X}, {}, r"expected: x, y, train.*\n  got:      images"),
        ({"y": np.arange(9)}, {}, "expected: x\n  got:      y"),
        ({k: v for k, v in GREY.items() if k != "test"}, {}, "got:      train, validation"),
        ({**GREY, "train_labels": np.arange(9)}, {}, "expected: .*test_labels\n"),
        ({**GREY, "test": np.zeros((9, 3))}, {}, "rows of different shapes"),
        ({**GREY, "test": np.zeros((0, 2))}, {}, "test split is empty"),
        ({**GREY, "validation": np.full((9, 2), np.inf)}, {}, "NaN or infinite"),
        ({**GREY, **{f"{k}_labels": np.arange(8) for k in SPLITS}}, {}, "train split has uneven"),
        ({"x": X, "y": np.arange(99)}, {}, "uneven"),
        ({"x": X, "y": np.full(100, 0.5)}, {}, "y of 'x.npz' holds no classes"),
        ({"x": np.array(["a"] * 9)}, {}, "no rows of numbers"),
        ({"x": np.array(3.0)}, {}, "no rows of numbers"),
        ({"x": np.full((9, 2), 1j)}, {}, "no rows of numbers"),
        ({"x": X // 128}, {}, "largest byte of 1\n.*white=1"),
        ({"x": X}, {"white": 1}, "largest byte of 255\n.*white=255"),
        ({"x": X}, {"memory_map": True}, "cannot|no file that can be memory-mapped"),
        ({"x": X * 2.0}, {"binarize": pv.data.threshold}, "cannot be binarised"),
    ],
)  # fmt: skip
def test_bad_npz(parts: Any, arguments: Any, message: str) -> None:
    with file_of(npz(**parts), "x.npz") as path, pytest.raises(ValueError, match=message):
        pv.data.from_file(path, **arguments)


@pytest.mark.parametrize(
    ("array", "arguments", "message"),
    [
        (np.zeros((40, 3)), {}, "uint8 or float32 .*\n.*<f8"),
        (np.zeros((40, 3), ">f4"), {}, "uint8 or float32 .*\n.*>f4"),
        (np.zeros((3, 40), np.float32).T, {}, "column by column"),
        (np.zeros((), np.float32), {}, r"of shape \(\)"),
        (np.full((40, 3), np.nan, np.float32), {}, "held-out data has NaN"),
        (np.zeros((4, 3), np.float32), {}, "leaves a split empty"),
        (X, {"binarize": pv.data.bernoulli(0)}, "cannot be binarised once"),
        (X, {"image_shape": (3, 3)}, "no images of 3×3"),
        (X, {"white": 100}, "largest byte of 25"),
    ],
)  # fmt: skip
def test_bad_mapped_files(array: Array, arguments: Any, message: str) -> None:
    file = io.BytesIO()
    np.save(file, array)
    with file_of(file.getvalue(), "x.npy") as path, pytest.raises(ValueError, match=message):
        pv.data.from_file(path, memory_map=True, **arguments)
    with file_of(file.getvalue()[:-1], "x.npy") as path:
        with pytest.raises(ValueError, match=r"or is damaged|binarised once"):
            pv.data.from_file(path, memory_map=True, **arguments)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*\n  expected: a \.npy or \.npz file"):
        pv.data.from_file(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(ARCHIVE)
    with pytest.raises(ValueError, match=r"got: .*; TypeError: an archive of several arrays"):
        pv.data.from_file(tmp_path / "x.npy")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"expected: \.npy or \.npz"):
        pv.data.from_file(tmp_path / "x.csv")


# --- a folder of images


def draw(path: Path, size: tuple[int, int] = (4, 6), value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def test_images_are_grey_rows_with_their_classes(tmp_path: Path) -> None:
    for number in range(12):
        draw(tmp_path / "b cat" / "deep" / f"{number}.png", value=100 + number)
        draw(tmp_path / "a dog" / f"{number}.PNG", value=number)
    (tmp_path / "a dog" / "Thumbs.db").write_text("no image, not looked at")
    (tmp_path / ".cache").mkdir()
    data = pv.data.from_images(tmp_path, held_out=5)
    values = rows_of(data)[:, 0] * 255
    labels = torch.cat([data.labels[split] for split in SPLITS]).numpy()
    np.testing.assert_array_equal(labels, values >= 99)
    assert sorted(values.round()) == [*range(12), *range(100, 112)]
    assert data.image_shape == (4, 6) and data.name == tmp_path.name
    x = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), np.uint8)
    for number, colours in enumerate(x):
        (tmp_path / "colour").mkdir(exist_ok=True)
        Image.fromarray(colours).save(tmp_path / "colour" / f"{number}.png")
    data = pv.data.from_images(tmp_path / "colour", held_out=1)
    luma = (x @ [0.299, 0.587, 0.114]).reshape(5, -1)
    difference = abs(255 * rows_of(data)[:, None] - luma).max(-1)
    assert data.labels == {} and sorted(difference.argmin(1)) == [*range(5)]
    assert difference.min(1).max() <= 1


def test_images_of_mixed_size(tmp_path: Path) -> None:
    for number in range(6):
        draw(tmp_path / f"{number}.png", (4, 6) if number < 5 else (8, 6))
    with pytest.raises(
        ValueError, match=r"4×6 as in .*0\.png'\n.*8×6 in .*5\.png'\n.*size=\(4, 6\)"
    ):
        pv.data.from_images(tmp_path)
    data = pv.data.from_images(tmp_path, size=(3, 2), held_out=1)
    assert data.image_shape == (3, 2)
    np.testing.assert_allclose(rows_of(data), np.float32(90) / 255)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        pv.data.from_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no image in .*\n.*\.png.*\n  got:      nothing"):
        pv.data.from_images(tmp_path)
    image = draw(tmp_path / "cat" / "1.png").read_bytes()
    with pytest.raises(ValueError, match="size is no size"):
        pv.data.from_images(tmp_path, size=(0, 3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no image in .*empty'"):
        pv.data.from_images(tmp_path)
    draw(tmp_path / "loose.png")
    (tmp_path / "empty").rmdir()
    with pytest.raises(ValueError, match=r"beside and inside .*\n.*\n.*'loose.png' beside 'cat'"):
        pv.data.from_images(tmp_path)
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 6), 999, np.uint16)).save(deep, "PNG")
    gif = io.BytesIO()
    Image.new("L", (6, 4)).save(gif, "GIF")
    for content in (b"", b"text", image[: len(image) // 2], gif.getvalue(), deep.getvalue()):
        (tmp_path / "cat" / "0.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"0\.png' is no PNG or JPEG image of 8 bits"):
            pv.data.from_images(tmp_path / "cat")


# --- published sets, made up in their published shape


def made_up(count: int) -> tuple[Array, Array]:
    rows = np.arange(count)
    x = np.zeros((count, 28, 28), np.uint8)
    x[:, 0, :3] = np.stack([rows // 65_536, rows // 256 % 256, rows % 256], -1)
    return x, (rows % 10).astype(np.uint8)


@pytest.fixture(scope="module")
def mnist_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("root") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        x, y = made_up(count)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(x))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y), 1))
    return raw


@pytest.fixture
def mnist_root(mnist_files: Path, tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in mnist_files.iterdir():
        (raw / file.name).symlink_to(file)
    return tmp_path


def test_idx_sets_are_read_unpacked_or_packed(
    mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRO_VAE_DATA", str(mnist_root))
    data = pv.data.load("mnist", binarize=None)
    assert data.name == "MNIST" and data.image_shape == (28, 28)
    for split, first, count in (
        ("train", 0, 50_000),
        ("validation", 50_000, 10_000),
        ("test", 0, 10_000),
    ):
        rows = (getattr(data, split)[0][:, :3] * 255).round().long() @ torch.tensor(
            [65_536, 256, 1]
        )
        assert torch.equal(rows, torch.arange(first, first + count))
        assert torch.equal(data.labels[split], rows % 10)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte", r"\(60000, 28, 28\)\n.*\(10000, 28, 28\)"),
        ("train-images-idx3-ubyte", idx(np.zeros(60_000, np.uint8)), "no idx file of images"),
        ("t10k-images-idx3-ubyte", idx(np.ones((10_000, 2, 2), np.uint8)), r"\(10000, 2, 2\)"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(59_999, np.uint8))), r"\(60000,\)\n.*\(59999,\)"),
        ("t10k-labels-idx1-ubyte.gz", b"", "no gzip archive|no idx file of labels"),
    ],
    ids=["swapped", "mislabelled", "small", "label count", "empty"],
)  # fmt: skip
def test_another_file_in_the_place_of_one(
    name: str, other: str | bytes, message: str, mnist_root: Path
) -> None:
    raw = mnist_root / "MNIST" / "raw"
    content = other if isinstance(other, bytes) else (raw / other).read_bytes()
    (raw / name).unlink()
    (raw / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pv.data.load("mnist", root=mnist_root)


@pytest.mark.parametrize("name", SETS)
def test_a_set_needs_a_root(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    with pytest.raises(
        ValueError, match=rf"no folder to find '{name}' in\n.*PYRO_VAE_DATA.*\n *root/"
    ):
        pv.data.load(name)
    with pytest.raises(
        FileNotFoundError, match=r"expected:\n *root/.*/.*\n(.*\n)*  missing:  the folder"
    ):
        pv.data.load(name, root=tmp_path / "nowhere")
    advice = "download=True, or" if name in SETS[:2] else r"root=\.\.\."
    with pytest.raises(FileNotFoundError, match=rf"missing:  .*/.*\n  try:      {advice}"):
        pv.data.load(name, root=tmp_path)


def test_a_set_that_nobody_serves_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="try:      no download is known"):
        pv.data.load("omniglot", root=tmp_path, download=True)


@pytest.mark.parametrize("name", SETS[2:])
@pytest.mark.parametrize(
    "content", [b"", b"foreign", ARCHIVE], ids=["empty", "foreign", "other keys"]
)
def test_another_file_in_the_place_of_a_set(name: str, content: bytes, tmp_path: Path) -> None:
    from pyro_vae.data.sets import SETS

    path = tmp_path / SETS[name].files[0]
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\n  expected: .*\n  got: .*\n  try: "):
        pv.data.load(name, root=tmp_path, download=name == "omniglot")


def test_bad_mat_files(tmp_path: Path) -> None:
    path = tmp_path / "x.mat"
    savemat(path, {"a": np.arange(600), "c": "text"}, do_compression=True)
    np.testing.assert_array_equal(read_mat(path, ["a"])["a"].ravel(), np.arange(600))
    with pytest.raises(ValueError, match="expected: a, b\n  got:      a\n"):
        read_mat(path, ["a", "b"])
    whole = path.read_bytes()
    for cut in (0, 60, 128, 200, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"x\.mat' is no MATLAB file|x\.mat' does not hold"):
            read_mat(path, ["a"])


def test_missing_files_are_fetched_by_torchvision(
    mnist_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    def fetch(root: str, *, download: bool) -> None:
        assert download
        (Path(root) / "MNIST").mkdir()
        (Path(root) / "MNIST" / "raw").symlink_to(mnist_files)

    def offline(root: str, *, download: bool) -> None:
        raise RuntimeError("Error downloading train-images")

    with pytest.raises(FileNotFoundError, match=r"try:      download=True"):
        pv.data.load("mnist", root=tmp_path)
    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    with pytest.raises(
        FileNotFoundError, match=r"could not be fetched .*\n(.*\n)*.*Error downloading"
    ):
        pv.data.load("mnist", root=tmp_path, download=True)
    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    assert len(pv.data.load("mnist", root=tmp_path, download=True).train[0]) == 50_000


def test_a_torchvision_of_another_release_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, mnist_root: Path
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(
        ImportError, match=r"cannot be imported beside torch .* install them together"
    ):
        pv.data.load("fashion_mnist", root=mnist_root, download=True)
    pv.data.load("mnist", root=mnist_root, download=True)


# --- the real sets


@pytest.mark.parametrize(
    ("name", "mean", "train_labels", "first"),
    [
        ("mnist", 0.1307, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], (5, 7)),
        ("fashion_mnist", 0.2860, [6000] * 10, (9, 9)),
    ],
)
def test_real_idx_sets(
    name: str, mean: float, train_labels: list[int], first: tuple[int, int], real_data: Path
) -> None:
    data = pv.data.load(name, root=real_data, binarize=None)
    assert [len(getattr(data, split)[0]) for split in SPLITS] == [50_000, 10_000, 10_000]
    x = torch.cat([data.train[0], data.validation[0]])
    assert x.mean().item() == pytest.approx(mean, abs=5e-5)
    labels = torch.cat([data.labels["train"], data.labels["validation"]])
    assert labels.bincount().tolist() == train_labels
    assert (int(data.labels["train"][0]), int(data.labels["test"][0])) == first
    assert pv.data.load(name, root=real_data).test[0].unique().tolist() == [0, 1]


def test_real_static_mnist(real_data: Path) -> None:
    data = pv.data.load("binarized_mnist", root=real_data)
    for split, mean in zip(SPLITS, (0.130562, 0.131127, 0.132512), strict=True):
        assert getattr(data, split)[0].mean().item() == pytest.approx(mean, abs=5e-7)
    with np.load(real_data / "binarized_mnist" / "binarized_mnist.npz") as file:
        train, test = (np.unpackbits(file[key], axis=1) for key in ("train", "test"))
    np.testing.assert_array_equal(data.train[0], train)
    assert np.array_equal(np.unique(data.test[0], axis=0), np.unique(test, axis=0))
    ink = data.test[0].sum(-1)  # digits 0 have the most ink, and are the first in the file
    in_file = torch.from_numpy(test).float().sum(-1)
    assert in_file[:900].mean() > 1.2 * in_file.mean()
    assert_z(ink[:900].mean(), ink.mean(), ink.std() / 30)
    upright = data.train[0].unflatten(1, data.image_shape or ())  # digits have margins, all round
    assert upright[:, :1].sum() + upright[:, :, :1].sum() < 1e-4 * upright.sum()


def test_real_omniglot(real_data: Path) -> None:
    data = pv.data.load("omniglot", root=real_data)
    grey = pv.data.load("omniglot", root=real_data, binarize=None)
    assert [len(getattr(data, split)[0]) for split in SPLITS] == [23_000, 1_345, 8_115]
    assert data.name == "OMNIGLOT (rebuilt)"
    assert torch.equal(data.train[0], grey.train[0]) and data.train[0].unique().numel() == 256
    assert data.test[0].unique().tolist() == [0, 1] and data.per_batch is torch.bernoulli
    with np.load(real_data / "omniglot" / "omniglot_28x28_rebuilt.npz") as file:
        x, alphabet = file["train"].reshape(24_345, -1), file["train_alphabet"]
    rows = torch.cat([grey.train[0], grey.validation[0]]) * 255
    labels = torch.cat([data.labels["train"], data.labels["validation"]])
    ours, theirs = (np.lexsort(part.T) for part in (rows.round().numpy().astype(np.uint8), x))
    np.testing.assert_array_equal(rows.round().numpy()[ours], x[theirs])
    assert labels.bincount().tolist() == np.bincount(alphabet).tolist()
    assert len(data.labels["validation"].unique()) > 45 and len(data.labels["test"].unique()) == 50


def test_real_silhouettes_are_upright_objects(real_data: Path) -> None:
    data = pv.data.load("caltech101_silhouettes", root=real_data)
    assert [len(getattr(data, split)[0]) for split in SPLITS] == [4_100, 2_264, 2_307]
    path = real_data / "caltech101_silhouettes" / "caltech101_silhouettes_28_split1.mat"
    content = loadmat(path)
    for row, height, width in ((0, 3, 20), (7, 14, 9), (100, 27, 0), (4_099, 10, 13)):
        pixel = data.train[0][row, 28 * height + width]
        assert pixel == 1 - int(content["train_data"][row, 28 * width + height])
    for split, key in zip(SPLITS, ("train", "val", "test"), strict=True):
        np.testing.assert_array_equal(data.labels[split] + 1, content[f"{key}_labels"].ravel())
    assert data.labels["train"].unique().tolist() == list(range(101))
    train, test = ({row.numpy().tobytes() for row in x} for x in (data.train[0], data.test[0]))
    assert len(train & test) <= 4  # as published


def test_real_faces_are_a_partition_of_the_frames(real_data: Path) -> None:
    data = pv.data.load("frey_faces", root=real_data)
    assert [len(getattr(data, split)[0]) for split in SPLITS] == [1_565, 200, 200]
    assert data.image_shape == (28, 20) and not data.labels
    with np.load(real_data / "freyfaces" / "freyfaces.npz") as file:
        frames = file["faces"].reshape(1_965, -1)
    ours = (rows_of(data) * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], frames[np.lexsort(frames.T)])
    assert not np.array_equal(ours, frames)
