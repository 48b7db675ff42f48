"""What a fit measured, and what it left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from pyro_vae.tables import Tabular

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Epoch:
    """What was measured after one pass over the training data; nats per datum.

    Training and validation are measured alike: after the epoch, at the same weights, without
    weights on the KL, with several draws a datum; training on at most as many rows as
    validation has. ELBO = reconstruction − KL; `_se` is the standard error over rows.
    """

    epoch: int
    loss: float
    """mean of the training objective over the epoch's batches, lower is better"""
    train_elbo: float
    train_elbo_se: float
    train_reconstruction: float
    train_kl: float
    validation_elbo: float
    validation_elbo_se: float
    validation_reconstruction: float
    validation_kl: float
    seconds: float
    """since the start of the run, pauses between a kill and a resumption left out"""


@dataclass(frozen=True, repr=False)
class Run(Tabular):
    """A finished fit. The model and the guide hold the weights of `best_epoch`.

    Attributes:
        epochs: what was measured, in order.
        best_epoch: the one with the highest validation ELBO.
        stopped_early: whether patience ended the run.
    """

    epochs: tuple[Epoch, ...]
    best_epoch: int
    stopped_early: bool

    @property
    def history(self) -> pd.DataFrame:
        """A row an epoch, a column a field of `Epoch`."""
        import pandas as pd

        return pd.DataFrame([asdict(epoch) for epoch in self.epochs]).set_index("epoch")

    @property
    def best(self) -> Epoch:
        """The epoch whose weights were kept."""
        return next(epoch for epoch in self.epochs if epoch.epoch == self.best_epoch)

    @property
    def seconds(self) -> float:
        """Wall time of the fit."""
        return self.epochs[-1].seconds

    def _told(self) -> Sequence[str | pd.DataFrame]:
        best = self.best
        end = "converged" if self.stopped_early else "ran"
        return [
            f"Run: {end} {self.epochs[-1].epoch} epochs in {self.seconds:.1f} s; epoch "
            f"{best.epoch} kept, validation ELBO {best.validation_elbo:.2f} ± "
            f"{best.validation_elbo_se:.2f} nats (reconstruction "
            f"{best.validation_reconstruction:.2f}, KL {best.validation_kl:.2f})"
        ]


@dataclass(frozen=True, repr=False)
class Runs(Tabular):
    """The same fit from several seeds.

    Attributes:
        runs: by seed.
    """

    runs: dict[int, Run]

    @property
    def table(self) -> pd.DataFrame:
        """A row a seed: what its best epoch measured."""
        import pandas as pd

        rows = [{"seed": seed, **asdict(run.best)} for seed, run in self.runs.items()]
        return pd.DataFrame(rows).set_index("seed")

    @property
    def validation_elbo(self) -> float:
        """Mean over seeds of the best validation ELBO, nats per datum."""
        return self._elbos().mean().item()

    @property
    def validation_elbo_se(self) -> float:
        """Standard error of that mean over seeds; NaN for a single seed."""
        elbos = self._elbos()
        return (elbos.std() / math.sqrt(len(elbos))).item() if len(elbos) > 1 else math.nan

    def _elbos(self) -> torch.Tensor:
        bests = [run.best.validation_elbo for run in self.runs.values()]
        return torch.tensor(bests, dtype=torch.float64)

    def _told(self) -> Sequence[str | pd.DataFrame]:
        return [
            f"Runs: {len(self.runs)} seeds, validation ELBO {self.validation_elbo:.2f} ± "
            f"{self.validation_elbo_se:.2f} nats (mean and standard error over seeds)",
            self.table,
        ]
