"""Likelihoods p(x | z): modules that turn decoder features into a distribution over `x`.

`likelihood(features)` takes `(..., F)` and returns a distribution with event shape `(D,)`;
`likelihood.features(D)` says how wide `F` the decoder must be.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .networks import positive


class Bernoulli(nn.Module):
    r"""Binary pixels, $p(x \mid z) = \prod_d \mathrm{Bernoulli}(x_d; \sigma(f_d(z)))$.

    Accepts 0 and 1 only. Grey values are no Bernoulli data: the "ELBO" they give bounds
    no likelihood.

    References:
        Diederik P. Kingma, Max Welling. *Auto-Encoding Variational Bayes*, 2014.

    Example:
        >>> Bernoulli()(torch.zeros(3, 4)).log_prob(torch.ones(3, 4))
        tensor([-2.7726, -2.7726, -2.7726])
    """

    def features(self, observed: int) -> int:
        """D: a logit for each pixel."""
        return observed

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Map logits `(..., D)` to a distribution with event shape `(D,)`."""
        return dist.Bernoulli(logits=features).to_event(1)


class Normal(nn.Module):
    r"""Real data with a fixed scale, $p(x \mid z) = \mathcal N(x; f(z), \sigma^2 I)$.

    Args:
        scale: $\sigma > 0$, in the units of `x`.

    Warning:
        $\sigma$ sets the trade between reconstruction and KL: too large a value switches
        latents off (posterior collapse). `LearnedNormal` fits it.

    Raises:
        ValueError: a scale that is not positive and finite.

    References:
        James Lucas, George Tucker, Roger Grosse, Mohammad Norouzi. *Don't Blame the ELBO!
        A Linear VAE Perspective on Posterior Collapse*, 2019.

    Example:
        >>> Normal(0.1)(torch.zeros(3, 4)).variance[0]
        tensor([0.0100, 0.0100, 0.0100, 0.0100])
    """

    scale: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale of a Normal likelihood must be > 0 and finite; got {scale}")
        self.register_buffer("scale", torch.tensor(float(scale)))

    def features(self, observed: int) -> int:
        """D: a mean for each pixel."""
        return observed

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Map means `(..., D)` to a distribution with event shape `(D,)`."""
        return dist.Normal(features, self.scale).to_event(1)


class LearnedNormal(nn.Module):
    r"""Real data, learned scale: $p(x \mid z) = \mathcal N(x; f(z), \mathrm{diag}\,\sigma^2)$.

    Args:
        observed: `D` for a scale of each pixel; `None` for one scale shared by all.
        scale: where $\sigma$ starts.

    Warning:
        A pixel that never varies sends its own $\sigma$ to zero and the likelihood to
        infinity; the floor of 1e-4 bounds it. Shared is the safer choice for images.

    Raises:
        ValueError: a scale not above the floor, or `observed` below 1.

    References:
        Oleh Rybkin, Kostas Daniilidis, Sergey Levine. *Simple and Effective VAE Training
        with Calibrated Decoders*, 2021.

    Example:
        >>> LearnedNormal(4, scale=0.5)(torch.zeros(3, 4)).variance[0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500], grad_fn=<SelectBackward0>)
    """

    def __init__(self, observed: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        if not 1e-3 <= scale < math.inf:
            raise ValueError(f"scale of a LearnedNormal must start at 1e-3 or above; got {scale}")
        if observed is not None and observed < 1:
            raise ValueError(f"observed must be the number of pixels, >= 1; got {observed}")
        shape = () if observed is None else (observed,)
        self.raw_scale = nn.Parameter(torch.full(shape, math.log(math.expm1(scale - 1e-4))))

    @property
    def scale(self) -> Tensor:
        """σ, of shape `()` or `(D,)`."""
        return positive(self.raw_scale)

    def features(self, observed: int) -> int:
        """D: a mean for each pixel."""
        return observed

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Map means `(..., D)` to a distribution with event shape `(D,)`."""
        return dist.Normal(features, self.scale).to_event(1)
