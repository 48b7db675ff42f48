"""Two levels of latents."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from pyro_vae.pair import PairModule, plate_size


class HierarchicalVAE(PairModule):
    r"""$z_2 \sim p(z_2),\quad z_1 \sim p(z_1 \mid z_2),\quad x \sim p(x; f_\theta(z_1, z_2))$.

    The decoder sees both levels: without that skip a VampPrior on the top does little.

    Args:
        decoder: maps `z1` and `z2` to the features of the likelihood; `networks.Merge`.
        prior: p(z2), any prior.
        conditional: p(z1 | z2), called with `z2`: `ConditionalNormal`.
        likelihood: turns features into p(x | z1, z2).

    References:
        Jakub M. Tomczak, Max Welling. *VAE with a VampPrior*, 2018, section 4.

    Example:
        >>> import pyro_vae as pv
        >>> from pyro_vae.networks import MLP, Merge
        >>> model = HierarchicalVAE(
        ...     Merge(MLP(3, 16), MLP(2, 16), head=MLP(32, 64)),
        ...     prior=pv.priors.StandardNormal(2),
        ...     conditional=pv.priors.ConditionalNormal(MLP(2, 16, 6)),
        ...     likelihood=pv.likelihoods.Bernoulli(),
        ... )
        >>> model(None, size=5).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        decoder: nn.Module,
        *,
        prior: nn.Module,
        conditional: nn.Module,
        likelihood: nn.Module,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.prior = prior
        self.conditional = conditional
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Score `x` of shape `(B, D)`, or generate `size` data when `x` is `None`."""
        with pyro.plate("data", plate_size(x, size)):
            z2 = pyro.sample("z2", self.prior())
            z1 = pyro.sample("z1", self.conditional(z2))
            return pyro.sample("x", self.likelihood(self.decoder(z1, z2)), obs=x)
