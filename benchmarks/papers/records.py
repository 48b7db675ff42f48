"""What the recipes share: parts of a run kept on disk, means with errors, and their records."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import pyro_vae


class Kept:
    """What was worked out of a fitted pair, part by part, on disk: a killed run goes on.

    The folder is named after the weights, so that nothing is read that other weights have told.
    After a change of the library, or of a recipe's sizes, delete what it tells.
    """

    def __init__(self, folder: Path, *modules: nn.Module) -> None:
        weights = hashlib.sha256()
        for module in modules:
            for tensor in module.state_dict().values():
                weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self.folder = folder / weights.hexdigest()[:12]
        self.seconds: dict[str, float] = {}
        """Wall time of each part asked for, whenever it was spent."""

    def __call__(self, name: str, find: Callable[[], Any]) -> Any:
        """Read a part, or find it and write it."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            start = time.perf_counter()
            part = {"found": find(), "seconds": time.perf_counter() - start}
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(part, path.with_suffix(".unfinished"))
            path.with_suffix(".unfinished").replace(path)
        part = torch.load(path)
        self.seconds[name] = part["seconds"]
        return part["found"]


def mean(name: str, values: Tensor) -> dict[str, float | None]:
    """A mean over images and its standard error; none of none."""
    values = values.double()
    return {
        name: values.mean().item() if len(values) else None,
        f"{name}_se": (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None,
    }


def machine() -> dict[str, Any]:
    """Where figures were measured, and with what."""
    return {
        "device": platform.machine(), "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__,
        "pyro": pyro.__version__, "pyro_vae": pyro_vae.__version__,
    }  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The finished rows of a table."""
    return json.loads(path.read_text()) if path.exists() else []


def write(path: Path, row: dict[str, Any], key: tuple[str, str], order: list[str]) -> None:
    """Add a finished row to a table, in the place of one of the same name and seed."""

    def place(row: dict[str, Any]) -> tuple[int, int]:
        return order.index(row[key[0]]), row[key[1]]

    rows = sorted([r for r in read(path) if place(r) != place(row)] + [row], key=place)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n"
    path.with_suffix(".unfinished").write_text(text)
    path.with_suffix(".unfinished").replace(path)
