"""A point for each datum: the encoder of a plain autoencoder."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.guides.amortized import AbstractAmortizedGuide


class DeltaGuide(AbstractAmortizedGuide):
    r"""$q(z \mid x) = \delta(z - f(x))$.

    With `models.Autoencoder` the ELBO is the log-likelihood of the reconstruction; with a
    prior it is maximum a posteriori.

    Args:
        encoder: maps `x`, `(..., D)`, to `(..., L)`.

    Warning:
        Its density is no density: KL, k-hat and evidence mean nothing under it.

    References:
        Geoffrey E. Hinton, Ruslan R. Salakhutdinov. *Reducing the Dimensionality of Data
        with Neural Networks*, 2006.

    Example:
        >>> import torch
        >>> DeltaGuide(torch.nn.Linear(64, 2)).posterior(torch.zeros(5, 64)).event_shape
        torch.Size([2])
    """

    @staticmethod
    def features(latent_dim: int) -> int:
        """L: the point."""
        return latent_dim

    def distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The point mass at `(..., L)`."""
        return dist.Delta(features, event_dim=1)
