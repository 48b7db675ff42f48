"""Models of x given a label."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from pyro_vae.pair import PairModule


class ConditionalVAE(PairModule):
    r"""$z \sim p(z \mid y), \quad x \mid z, y \sim p(x; f_\theta(z, y))$.

    Args:
        decoder: maps `z`, `(..., L)`, and `y`, `(...)`, to the features of the likelihood;
            `networks.Merge` with `networks.OneHot` in its second branch.
        prior: called with `y`: `ConditionalNormal`, or any that ignores it.
        likelihood: turns features into p(x | z, y).

    References:
        Kihyuk Sohn, Honglak Lee, Xinchen Yan. *Learning Structured Output Representation
        using Deep Conditional Generative Models*, 2015.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae.networks import MLP, Merge, OneHot
        >>> decoder = Merge(nn.Identity(), OneHot(10), head=MLP(2 + 10, 32, 64))
        >>> model = ConditionalVAE(
        ...     decoder, prior=pv.priors.StandardNormal(2), likelihood=pv.likelihoods.Bernoulli()
        ... )
        >>> model(None, torch.tensor([3, 7])).shape
        torch.Size([2, 64])
    """

    def __init__(self, decoder: nn.Module, *, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.prior = prior
        self.likelihood = likelihood

    def forward(
        self, x: Tensor | None = None, y: Tensor | None = None, *, size: int | None = None
    ) -> Tensor:
        """Score `x` given `y`, or generate one datum for each label: `model(None, y)`."""
        if y is None or size not in (None, len(y)):
            asked = "" if size is None else f" rather than size={size}"
            raise ValueError(
                f"a conditional model wants labels{asked}: model(x, y), model(None, y)"
            )
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", self.prior(y))
            return pyro.sample("x", self.likelihood(self.decoder(z, y)), obs=x)
