"""Amortized Gaussian guides: one encoder gives the variational parameters of every datum."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.networks import positive
from pyro_vae.pair import PairModule


class AbstractAmortizedGuide(PairModule):
    """q(z | x) whose parameters an encoder computes from the batch.

    Args:
        encoder: maps `(*batch)`, of shape `(..., D)`, to `(..., F)` features;
            `features(L)` of each guide says how wide `F` must be.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *batch: Tensor) -> Tensor:
        """Sample the site `"z"` for each row of the batch."""
        with pyro.plate("data", len(batch[0])):
            return pyro.sample("z", self.posterior(*batch))

    def posterior(self, *batch: Tensor) -> dist.TorchDistribution:
        """q(z | x): batch shape `(B,)`, event shape `(L,)`."""
        return self.distribution(self.encoder(*batch))

    def distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The member of the family with these features, `(..., F)`."""
        raise NotImplementedError


class NormalGuide(AbstractAmortizedGuide):
    r"""Mean-field Gaussian, $q(z \mid x) = \mathcal N(\mu(x), \mathrm{diag}\,\sigma(x)^2)$.

    Args:
        encoder: maps `x`, `(..., D)`, to `(..., 2 L)`: means, then raw scales.

    Warning:
        Where the posterior is correlated, the best factorised Gaussian is too narrow: its
        variances are those of each coordinate *given the others*.

    Raises:
        ValueError: an odd number of features.

    References:
        Diederik P. Kingma, Max Welling. *Auto-Encoding Variational Bayes*, 2014.

    Example:
        >>> guide = NormalGuide(nn.Linear(64, NormalGuide.features(2)))
        >>> guide.posterior(torch.zeros(5, 64)).mean.shape
        torch.Size([5, 2])
    """

    @staticmethod
    def features(latent_dim: int) -> int:
        """2 L: a mean and a raw scale for each latent."""
        return 2 * latent_dim

    def distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The Gaussian with these means and raw scales, `(..., 2 L)`."""
        if features.shape[-1] % 2:
            raise ValueError(
                f"NormalGuide wants 2 L features from its encoder; got {features.shape[-1]}"
            )
        location, raw_scale = features.chunk(2, dim=-1)
        return dist.Normal(location, positive(raw_scale)).to_event(1)


class MultivariateNormalGuide(AbstractAmortizedGuide):
    r"""Gaussian with full covariance, $q(z \mid x) = \mathcal N(\mu(x), C(x) C(x)^\top)$.

    Args:
        encoder: maps `x`, `(..., D)`, to `(..., L + L (L + 1) / 2)`: means, then the lower
            triangle of `C` by rows, its diagonal raw.

    Raises:
        ValueError: a number of features that no `L` gives.

    References:
        Diederik P. Kingma, Max Welling. *An Introduction to Variational Autoencoders*,
        2019, section 2.5.1.

    Example:
        >>> guide = MultivariateNormalGuide(nn.Linear(64, MultivariateNormalGuide.features(2)))
        >>> guide.posterior(torch.zeros(5, 64)).covariance_matrix.shape
        torch.Size([5, 2, 2])
    """

    @staticmethod
    def features(latent_dim: int) -> int:
        """L + L (L + 1) / 2: a mean for each latent, and a lower triangle."""
        return latent_dim + latent_dim * (latent_dim + 1) // 2

    def distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The Gaussian with these means and triangles, `(..., L + L (L + 1) / 2)`."""
        width = features.shape[-1]
        size = (math.isqrt(9 + 8 * width) - 3) // 2
        if size < 1 or self.features(size) != width:
            raise ValueError(
                "MultivariateNormalGuide wants L + L (L + 1) / 2 features from its encoder "
                f"(2, 5, 9, 14, ...); got {width}"
            )
        location, triangle = features[..., :size], features[..., size:]
        row, column = torch.tril_indices(size, size, device=features.device)
        entries = torch.where(row == column, positive(triangle), triangle)
        scale_tril = features.new_zeros(*features.shape[:-1], size, size)
        scale_tril[..., row, column] = entries
        return dist.MultivariateNormal(location, scale_tril=scale_tril)
