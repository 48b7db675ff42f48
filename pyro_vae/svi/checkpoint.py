"""Weights on disk: safetensors, never a pickle."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn


def save_weights(folder: str | Path, model: nn.Module, guide: nn.Module) -> None:
    """Write `model.safetensors` and `guide.safetensors` into a folder, made if missing.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(folder, nn.Linear(1, 1), nn.Linear(1, 1))
        ...     load_weights(folder, nn.Linear(1, 1), nn.Linear(1, 1))
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, part in (("model", model), ("guide", guide)):
        path = Path(folder) / f"{name}.safetensors"
        save_model(part, str(path))
        path.chmod(0o644)  # safetensors leaves 0600, which hides the file from colleagues


def load_weights(folder: str | Path, model: nn.Module, guide: nn.Module) -> None:
    """Read what `save_weights` wrote into modules of the same shapes.

    Raises:
        FileNotFoundError: the folder holds no weights.
        RuntimeError: the modules have other parameters than the file, or it is damaged.
    """
    for name, part in (("model", model), ("guide", guide)):
        try:
            load_model(part, Path(folder) / f"{name}.safetensors")
        except SafetensorError as error:
            raise RuntimeError(f"{name}.safetensors is damaged: {error}") from error
