"""Two levels, from the top down."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.guides.amortized import NormalGuide
from pyro_vae.pair import PairModule


class HierarchicalGuide(PairModule):
    r"""$q(z_2 \mid x)\, q(z_1 \mid x, z_2)$, both mean-field Gaussians.

    The order is that of the model, p(z2) p(z1 | z2), so that closed KL terms stay unbiased.

    Args:
        top: maps `x` to the features of q(z2 | x), `(..., 2 L2)`.
        bottom: maps `(x, z2)` to those of q(z1 | x, z2), `(..., 2 L1)`; `networks.Merge`.

    References:
        Jakub M. Tomczak, Max Welling. *VAE with a VampPrior*, 2018, section 4.

    Example:
        >>> import torch
        >>> from pyro_vae.networks import MLP, Merge
        >>> bottom = Merge(MLP(64, 8), MLP(2, 8), head=MLP(16, 6))
        >>> HierarchicalGuide(MLP(64, 4), bottom)(torch.zeros(5, 64)).shape
        torch.Size([5, 3])
    """

    def __init__(self, top: nn.Module, bottom: nn.Module) -> None:
        super().__init__()
        self.top = NormalGuide(top)
        self.bottom = NormalGuide(bottom)

    def forward(self, x: Tensor) -> Tensor:
        """Sample `"z2"`, then `"z1"`, for each row of the batch."""
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", self.posterior(x))
            return pyro.sample("z1", self.bottom.posterior(x, z2))

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z2 | x), which a VampPrior on the top level takes."""
        return self.top.posterior(x)
