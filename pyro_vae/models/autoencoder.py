"""A plain autoencoder, as the model that has no prior."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.pair import PairModule


class Autoencoder(PairModule):
    r"""$p(x \mid z)$ and nothing on $z$: with `DeltaGuide`, SVI minimises reconstruction error.

    It shows what the V of VAE buys: nothing asks the codes to fill any region, so between
    them are holes, and there is nothing to generate from.

    Args:
        decoder: maps `z`, `(..., L)`, to the features of the likelihood.
        latent_dim: `L`.
        likelihood: turns features into p(x | z).

    References:
        Geoffrey E. Hinton, Ruslan R. Salakhutdinov. *Reducing the Dimensionality of Data
        with Neural Networks*, 2006.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> model = Autoencoder(pv.networks.MLP(2, 64), 2, pv.likelihoods.Bernoulli())
        >>> guide = pv.guides.DeltaGuide(pv.networks.MLP(64, 2))
        >>> pv.check_pair(model, guide, (torch.ones(5, 64),))
    """

    def __init__(self, decoder: nn.Module, latent_dim: int, likelihood: nn.Module) -> None:
        super().__init__()
        if not isinstance(latent_dim, int) or latent_dim < 1:
            raise ValueError(f"latent_dim must be an integer >= 1; got {latent_dim!r}")
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Score `x` of shape `(B, D)`.

        Raises:
            ValueError: asked to generate.
        """
        if x is None:
            raise ValueError("an autoencoder has no prior to generate from; models.VAE has")
        flat = dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1).mask(False)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", flat)
            return pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)
