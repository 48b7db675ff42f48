"""Priors p(z): modules that return a distribution with event shape `(L,)` when called."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class StandardNormal(nn.Module):
    r"""$p(z) = \mathcal N(0, I_L)$.

    Args:
        latent_dim: `L`.

    Raises:
        ValueError: `latent_dim` is no integer of at least 1.

    References:
        Diederik P. Kingma, Max Welling. *Auto-Encoding Variational Bayes*, 2014.

    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(2)).item()
        -1.8378770351409912
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if not isinstance(latent_dim, int) or latent_dim < 1:
            raise ValueError(f"latent_dim must be an integer >= 1; got {latent_dim!r}")
        self.register_buffer("loc", torch.zeros(latent_dim))
        self.register_buffer("scale", torch.ones(latent_dim))

    def forward(self) -> dist.TorchDistribution:
        """Return the distribution, event shape `(L,)`."""
        return dist.Normal(self.loc, self.scale).to_event(1)
