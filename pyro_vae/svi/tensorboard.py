"""A log of a fit for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pyro_vae.svi.run import Epoch


def tensorboard(folder: str | Path) -> Callable[[Epoch], None]:
    """An `on_epoch` that writes what each epoch measured; needs the extra `tensorboard`.

    Raises:
        ImportError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard is not installed\n  try:      pip install 'pyro-vae[tensorboard]'"
        ) from error
    writer = SummaryWriter(str(folder))

    def write(epoch: Epoch) -> None:
        for name, value in asdict(epoch).items():
            writer.add_scalar(name.replace("_", "/", 1), value, epoch.epoch)
        writer.flush()

    return write
