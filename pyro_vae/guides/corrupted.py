"""Guides that see a corrupted input while they are trained: denoising."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.guides.amortized import AbstractAmortizedGuide
from pyro_vae.pair import PairModule

Corruption = Callable[[Tensor], Tensor]


class CorruptedGuide(PairModule):
    r"""Trained on $q(z \mid \tilde x)$ with $\tilde x$ a corruption of $x$; evaluated on $x$.

    With a variational guide this is a denoising VAE, with `DeltaGuide` and
    `models.Autoencoder` a denoising autoencoder.

    Args:
        guide: an amortized guide.
        corruption: makes the input of the encoder while in training mode, such as
            `masking(0.2)`.

    Warning:
        The objective averages ELBOs under corruption: a bound, but a looser one. Measure on
        clean inputs, which `bounds` and `compare` do.

    References:
        Daniel J. Im, Sungjin Ahn, Roland Memisevic, Yoshua Bengio. *Denoising Criterion for
        Variational Auto-Encoding Framework*, 2017.
        Pascal Vincent, Hugo Larochelle, Yoshua Bengio, Pierre-Antoine Manzagol. *Extracting
        and Composing Robust Features with Denoising Autoencoders*, 2008.

    Example:
        >>> import pyro_vae as pv
        >>> guide = CorruptedGuide(pv.guides.NormalGuide(pv.networks.MLP(64, 4)), masking(0.2))
        >>> guide.eval()(torch.ones(5, 64)).shape
        torch.Size([5, 2])
    """

    def __init__(self, guide: AbstractAmortizedGuide, corruption: Corruption) -> None:
        super().__init__()
        self.guide = guide
        self.corruption = corruption

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        """Sample the site `"z"` for each row of the batch."""
        seen = self.corruption(x) if self.training else x
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.guide.posterior(seen, *rest))

    def posterior(self, *batch: Tensor) -> dist.TorchDistribution:
        """q(z | x) of the clean input: batch shape `(B,)`, event shape `(L,)`."""
        return self.guide.posterior(*batch)


def masking(probability: float) -> Corruption:
    """Set each value to 0 with this probability.

    Example:
        >>> masking(1.0)(torch.ones(3))
        tensor([0., 0., 0.])
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1]; got {probability}")
    return lambda x: x * (torch.rand_like(x) >= probability)


def gaussian(sd: float) -> Corruption:
    """Add Gaussian noise.

    Example:
        >>> gaussian(0.1)(torch.zeros(3)).shape
        torch.Size([3])
    """
    if not sd >= 0:
        raise ValueError(f"sd must be >= 0; got {sd}")
    return lambda x: x + sd * torch.randn_like(x)
