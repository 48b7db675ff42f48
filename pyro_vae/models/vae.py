"""The variational autoencoder's generative half."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from pyro_vae.pair import PairModule, plate_size


class VAE(PairModule):
    r"""A latent-variable model with a neural decoder.

    $$z \sim p(z), \qquad x \mid z \sim p(x; f_\theta(z))$$

    Args:
        decoder: maps `z`, `(..., L)`, to the features of the likelihood, `(..., F)`.
        prior: a module that returns p(z), event shape `(L,)`.
        likelihood: a module that turns features into p(x | z), event shape `(D,)`.

    References:
        Diederik P. Kingma, Max Welling. *Auto-Encoding Variational Bayes*, 2014.
        Danilo J. Rezende, Shakir Mohamed, Daan Wierstra. *Stochastic Backpropagation and
        Approximate Inference in Deep Generative Models*, 2014.

    Example:
        >>> from pyro_vae import likelihoods, networks, priors
        >>> decoder = networks.MLP(2, 32, 64)
        >>> prior, likelihood = priors.StandardNormal(2), likelihoods.Bernoulli()
        >>> model = VAE(decoder, prior=prior, likelihood=likelihood)
        >>> model(None, size=5).shape
        torch.Size([5, 64])
    """

    def __init__(self, decoder: nn.Module, *, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Score `x` of shape `(B, D)`, or generate `size` data when `x` is `None`."""
        with pyro.plate("data", plate_size(x, size)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)
