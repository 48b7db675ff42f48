"""From files to arrays: idx, npz, npy and mat. Nothing is unpickled; what is broken is refused."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pyro_vae.checks import refuse

Array = NDArray[Any]
_KINDS = {0x801: "labels", 0x803: "images"}


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read the bytes of an idx file, packed with gzip if its name ends in `.gz`.

    The file is a magic number `0x0000080n` with `n` the number of dimensions, `n` sizes as
    big-endian 32-bit integers, then as many bytes as their product.

    Args:
        path: of the file.
        dimensions: 3 for images, 1 for labels.

    Returns:
        A read-only array.

    Raises:
        ValueError: another magic number, no data, more or fewer bytes than the sizes say, a
            damaged archive.
    """
    with parsing(path, "gzip archive" if path.suffix == ".gz" else "idx file") as file:
        content = gzip.decompress(file.read()) if path.suffix == ".gz" else file.read()
    magic, start = 0x800 + dimensions, 4 + 4 * dimensions
    if content[:4] != magic.to_bytes(4):
        refuse(
            f"{str(path)!r} is no idx file of {_KINDS.get(magic, f'{dimensions} dimensions')}",
            expected=f"magic number 0x{magic:08x}",
            got=_described(content[:4]),
            advice="the file of that name as it was published",
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start].ljust(start - 4, b"\0"))
    if not math.prod(shape) or len(content) - start != math.prod(shape):
        refuse(
            f"{str(path)!r} is cut off, empty or too long",
            expected=f"{' × '.join(map(str, shape))} bytes after the header, at least one",
            got=f"{max(0, len(content) - start)} bytes",
            advice="fetch the file again",
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_npz(path: Path, names: Collection[str]) -> dict[str, Array]:
    """Those of the named arrays that a `.npz` file holds.

    Raises:
        ValueError: it holds none of them, or is broken, foreign or pickled.
    """
    with parsing(path, "npz archive of plain arrays") as file:
        archive = np.load(file, allow_pickle=False)
        keys = list(archive.files)
        found = {key: archive[key] for key in keys if key in names}
    return found or missing_keys(path, names, keys)


def read_npy(path: Path, *, memory_map: bool = False) -> Array:
    """The array of a `.npy` file, in memory or, read-only, on disk.

    Raises:
        ValueError: broken, foreign or pickled.
    """
    with parsing(path, "npy file of one plain array") as file:
        # Mode "c" counts as memory taken: Linux refuses it for files larger than RAM.
        array: Any = (
            np.load(path, mmap_mode="r", allow_pickle=False)
            if memory_map
            else np.load(file, allow_pickle=False)
        )
        if not isinstance(array, np.ndarray):
            raise TypeError("an archive of several arrays")
        return array


def read_mat(path: Path, names: Collection[str]) -> dict[str, Array]:
    """The named arrays of a MATLAB file, version 4 to 7.2.

    Raises:
        ValueError: one is missing, or the file is broken or foreign.
    """
    from scipy.io import loadmat

    with parsing(path, "MATLAB file, version 4 to 7.2") as file:
        content: Mapping[str, Any] = loadmat(file, variable_names=list(names))
        found = {key: np.asarray(value) for key, value in content.items() if key in names}
    return found if len(found) == len(names) else missing_keys(path, names, list(found))


@contextmanager
def parsing(path: Path, kind: str) -> Iterator[BinaryIO]:
    """Open a file for a parser, and turn whatever its bytes lead that into to one refusal."""
    with path.open("rb") as file:
        try:
            yield file
        except Exception as error:
            refuse(
                f"{str(path)!r} is no {kind}, or is damaged",
                expected=kind,
                got=f"{_described(_first_bytes(path))}; {type(error).__name__}: {_line(error)}",
                advice="fetch or write the file again",
                cause=error,
            )


def missing_keys(path: Path, names: Collection[str], keys: Collection[str]) -> Any:
    """Refuse a file that does not hold what was looked for."""
    refuse(
        f"{str(path)!r} does not hold the arrays looked for",
        expected=", ".join(names),
        got=", ".join(sorted(keys)[:20]) or "none of them",
        advice="rename the arrays, np.savez(path, x=x, y=y)",
    )


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _described(start: bytes) -> str:
    if not start:
        return "an empty file"
    kind = _KINDS.get(int.from_bytes(start)) if len(start) == 4 else None
    return f"first bytes 0x{start.hex()}" + (f", {kind}" if kind else "")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
