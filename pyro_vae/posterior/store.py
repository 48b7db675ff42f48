"""Results that grow chunk by chunk, in memory or in a folder that survives a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae import __version__
from pyro_vae.atomic import replace_file
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import preserved_rng

Part = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Draws, each `(C, S, b, ...)`, and figures, each `(b, ...)`, of `b` rows."""


def by_chunks(
    work: Callable[[slice], Part],
    target: LogJoint,
    size: int,
    *,
    seed: int,
    settings: Mapping[str, Any],
    folder: str | Path | None,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Work through the rows of a target, `size` at a time, each chunk from a seed of its own.

    With a folder, arrays live there as memory-mapped `.npy` files, so memory does not grow with
    what is kept; a chunk is noted as finished once it is on disk, and one that is noted is not
    worked on again.

    Raises:
        ValueError: the folder holds another run.
    """
    count = len(target.batch[0])
    store = _Store(count) if folder is None else _DiskStore(count, Path(folder))
    store.open(_identity(target) | dict(settings) | {"seed": seed, "rows": count, "chunk": size})
    label = str(settings["method"])
    with tqdm(total=count, desc=label, unit="datum", disable=not progress) as bar:
        for first in range(0, count, size):
            rows = slice(first, min(count, first + size))
            if first not in store.finished:
                with preserved_rng(1_000_003 * seed + first):
                    store.write(rows, *work(rows))
            bar.update(rows.stop - first)
    return store.arrays[0], store.arrays[1]


class _Store:
    """Arrays in memory, allocated by the shapes of the first chunk."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.arrays: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.finished: list[int] = []

    def open(self, identity: Mapping[str, Any]) -> None:
        """Nothing was kept."""

    def write(
        self, rows: slice, draws: Mapping[str, Tensor], figures: Mapping[str, Tensor]
    ) -> None:
        """Put the rows of a chunk into place."""
        for kind, axis, parts in ((0, 2, draws), (1, 0, figures)):
            for name, part in parts.items():
                shape = (*part.shape[:axis], self.count, *part.shape[axis + 1 :])
                if name not in self.arrays[kind]:
                    self.arrays[kind][name] = self.allocate(name, shape, part.cpu())
                self.arrays[kind][name].narrow(axis, rows.start, rows.stop - rows.start).copy_(
                    part
                )
        self.finished.append(rows.start)

    def allocate(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for an array."""
        return torch.empty(shape, dtype=like.dtype)


class _DiskStore(_Store):
    """The same in a folder: `name.npy`, and `run.json` that says what is finished."""

    def __init__(self, count: int, folder: Path) -> None:
        super().__init__(count)
        self.folder = folder
        self.maps: dict[str, Any] = {}

    def open(self, identity: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record: dict[str, Any] = {"identity": dict(identity), "finished": [], "arrays": {}}
        note = self.folder / "run.json"
        if not note.exists():
            return
        found = json.loads(note.read_text())
        other = _difference(found.get("identity", {}), self.record["identity"])
        if other:
            raise ValueError(
                f"folder {str(self.folder)!r} holds draws of another run"
                f"\n  expected: the same {', '.join(other)}\n  try:      another folder"
            )
        self.record = found
        self.finished = list(found["finished"])
        for name, (kind, _) in found["arrays"].items():
            self.arrays[kind][name] = self._map(name, np.load(self._path(name), mmap_mode="r+"))

    def write(
        self, rows: slice, draws: Mapping[str, Tensor], figures: Mapping[str, Tensor]
    ) -> None:
        super().write(rows, draws, figures)
        for array in self.maps.values():
            array.flush()
        arrays = [(n, (k, list(a.shape))) for k in (0, 1) for n, a in self.arrays[k].items()]
        self.record |= {"finished": self.finished, "arrays": dict(arrays)}
        replace_file(self.folder / "run.json", json.dumps(self.record, indent=1))

    def allocate(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        dtype = like.numpy().dtype
        array = np.lib.format.open_memmap(self._path(name), mode="w+", dtype=dtype, shape=shape)
        return self._map(name, array)

    def _map(self, name: str, array: Any) -> Tensor:
        self.maps[name] = array
        return torch.from_numpy(array)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def _identity(target: LogJoint) -> dict[str, Any]:
    """What makes a run the same: version, data, and the model's density at a few points."""
    digest = hashlib.sha256()
    for part in target.batch:
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    few = target.rows(slice(0, 8))
    with preserved_rng(0), torch.no_grad():
        probe = few(few.prior_draws(2)).double().flatten().tolist()
    return {"version": __version__, "batch": digest.hexdigest(), "model": probe}


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    def same(name: str) -> bool:
        if name == "model" and name in found:
            a, b = (torch.tensor(which[name]) for which in (found, wanted))
            return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, equal_nan=True)
        return name in found and found[name] == wanted[name]

    return [name for name in wanted if not same(name)]
