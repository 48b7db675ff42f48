"""Likelihoods p(x | z): modules that turn decoder features into a distribution over `x`.

`likelihood(features)` takes `(..., F)` and returns a distribution with event shape `(D,)`;
`likelihood.features(D)` says how wide `F` the decoder must be.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_vae.networks import positive, raw_positive


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
        self.raw_scale = nn.Parameter(raw_positive(torch.full(shape, scale)))

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


class ContinuousBernoulli(nn.Module):
    r"""Grey values in [0, 1], with the normaliser that they need.

    $$p(x \mid z) = \prod_d C(\lambda_d)\, \lambda_d^{x_d} (1-\lambda_d)^{1-x_d}$$

    The Bernoulli's formula with the normaliser that grey values need,
    $C(\lambda) = 2\,\mathrm{artanh}(1 - 2\lambda) / (1 - 2\lambda)$.

    References:
        Gabriel Loaiza-Ganem, John P. Cunningham. *The Continuous Bernoulli: Fixing a
        Pervasive Error in Variational Autoencoders*, 2019.

    Example:
        >>> ContinuousBernoulli()(torch.zeros(3, 4)).log_prob(torch.full((3, 4), 0.3))
        tensor([0., 0., 0.])
    """

    def features(self, observed: int) -> int:
        """D: a logit for each pixel."""
        return observed

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Map logits `(..., D)` to a distribution with event shape `(D,)`."""
        return dist.ContinuousBernoulli(logits=features).to_event(1)


class Categorical(nn.Module):
    r"""One of `K` values at each place: grey levels, or tokens with positions.

    $$p(x \mid z) = \prod_d \mathrm{softmax}(f_d(z))_{x_d}, \qquad x_d \in \{0, \dots, K - 1\}$$

    Args:
        levels: `K`, at least 2.

    Raises:
        ValueError: fewer than 2 levels.

    References:
        Aäron van den Oord, Nal Kalchbrenner, Koray Kavukcuoglu. *Pixel Recurrent Neural
        Networks*, 2016 (pixels as categories).

    Example:
        >>> Categorical(17)(torch.zeros(3, 17 * 4)).log_prob(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        if not isinstance(levels, int) or levels < 2:
            raise ValueError(f"levels must be an integer >= 2; got {levels!r}")
        self.levels = levels

    def features(self, observed: int) -> int:
        """K D: a block of `D` logits for each level."""
        return self.levels * observed

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Map logits `(..., K D)` to a distribution with event shape `(D,)`."""
        logits = features.unflatten(-1, (self.levels, -1)).movedim(-2, -1)
        return dist.Categorical(logits=logits).to_event(1)


class DiscretizedLogistic(nn.Module):
    r"""Grey levels in [0, 1]: a logistic density integrated over the bin of each level.

    $$p(x_d \mid z) = \sigma\!\left(\tfrac{x_d + h - \mu_d}{s_d}\right)
      - \sigma\!\left(\tfrac{x_d - h - \mu_d}{s_d}\right), \qquad h = \frac{1}{2 (K - 1)}$$

    with the first and last bin open to infinity, so that it sums to 1.

    Args:
        levels: `K`; data are multiples of 1/(K − 1), so `x / 255` for pixels of 8 bits.

    Raises:
        ValueError: fewer than 2 levels.

    References:
        Tim Salimans, Andrej Karpathy, Xi Chen, Diederik P. Kingma. *PixelCNN++*, 2017.

    Example:
        >>> DiscretizedLogistic(256)(torch.zeros(3, 8)).log_prob(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if not isinstance(levels, int) or levels < 2:
            raise ValueError(f"levels must be an integer >= 2; got {levels!r}")
        self.levels = levels

    def features(self, observed: int) -> int:
        """2 D: means, then raw scales."""
        return 2 * observed

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Map `(..., 2 D)` to a distribution with event shape `(D,)`."""
        if features.shape[-1] % 2:
            raise ValueError(f"DiscretizedLogistic wants 2 D features; got {features.shape[-1]}")
        loc, raw_scale = features.chunk(2, dim=-1)
        scale = positive(raw_scale - 2)  # starts near 0.13, a tenth of the range
        return LogisticLevels(loc, scale, self.levels).to_event(1)


class Poisson(nn.Module):
    r"""Counts, $p(x \mid z) = \prod_d \mathrm{Poisson}(x_d; \mathrm{softplus}(f_d(z)))$.

    References:
        Romain Lopez et al. *Deep Generative Modeling for Single-Cell Transcriptomics*, 2018
        (counts in a VAE).

    Example:
        >>> Poisson()(torch.zeros(3, 4)).log_prob(torch.ones(3, 4)).shape
        torch.Size([3])
    """

    def features(self, observed: int) -> int:
        """D: a raw rate for each place."""
        return observed

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Map raw rates `(..., D)` to a distribution with event shape `(D,)`."""
        return dist.Poisson(positive(features)).to_event(1)


class NegativeBinomial(nn.Module):
    r"""Counts with more spread than Poisson's: mean $\mu_d(z)$, variance $\mu_d + \mu_d^2 / r_d$.

    Args:
        observed: `D`; each place learns its own $r_d$.
        dispersion: where $r$ starts. Poisson is the limit of large `r`; it is held below
            1,000, above which single precision fails.

    Raises:
        ValueError: `observed` below 1, or a dispersion that is not positive.

    References:
        Romain Lopez et al. *Deep Generative Modeling for Single-Cell Transcriptomics*, 2018.

    Example:
        >>> NegativeBinomial(4)(torch.zeros(3, 4)).mean[0].detach()
        tensor([0.6932, 0.6932, 0.6932, 0.6932])
    """

    def __init__(self, observed: int, dispersion: float = 10.0) -> None:
        super().__init__()
        if not isinstance(observed, int) or observed < 1:
            raise ValueError(f"observed must be the number of places, >= 1; got {observed!r}")
        if not 1e-3 <= dispersion < 1000:
            raise ValueError(f"dispersion must start between 1e-3 and 1,000; got {dispersion}")
        self.raw_dispersion = nn.Parameter(raw_positive(torch.full((observed,), dispersion)))

    def features(self, observed: int) -> int:
        """D: a raw mean for each place."""
        return observed

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Map raw means `(..., D)` to a distribution with event shape `(D,)`."""
        dispersion = positive(self.raw_dispersion).clamp_max(1000.0)
        return dist.GammaPoisson(dispersion, dispersion / positive(features)).to_event(1)


class _Levels(constraints.Constraint):
    """Multiples of 1/(K − 1) in [0, 1]."""

    is_discrete = True
    event_dim = 0

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        steps = value * (self.levels - 1)
        return ((steps - steps.round()).abs() < 1e-3) & (value >= 0) & (value <= 1)

    def __repr__(self) -> str:
        return f"multiples of 1/{self.levels - 1} in [0, 1]"


class LogisticLevels(dist.TorchDistribution):
    """The distribution behind `DiscretizedLogistic`, of each pixel.

    Args:
        loc: mean of the logistic.
        scale: its scale, positive.
        levels: `K`.

    Example:
        >>> levels = torch.linspace(0, 1, 5)
        >>> LogisticLevels(torch.tensor(0.4), torch.tensor(0.1), 5).log_prob(levels).exp().sum()
        tensor(1.0000)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Multiples of 1/(K − 1)."""
        return _Levels(self.levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogisticLevels:
        """The same for a larger batch shape."""
        shape = torch.Size(batch_shape)
        return LogisticLevels(
            self.loc.expand(shape), self.scale.expand(shape), self.levels, validate_args=False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Score levels, in nats; log(σ(b) − σ(a)) = log σ(b) + log σ(−a) + log(1 − e^(a−b))."""
        half = 0.5 / (self.levels - 1)
        above = (value + half - self.loc) / self.scale
        below = (value - half - self.loc) / self.scale
        inside = torch.log(-torch.expm1(-2 * half / self.scale))
        first, last = value < half, value > 1 - half
        log_prob = torch.where(last, 0.0, logsigmoid(above)) + torch.where(
            first, 0.0, logsigmoid(-below)
        )
        return log_prob + torch.where(first | last, 0.0, inside)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw levels."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            logistic = self.loc + self.scale * uniform.clamp(1e-7, 1 - 1e-7).logit()
            return (logistic * (self.levels - 1)).round().clamp(0, self.levels - 1) / (
                self.levels - 1
            )

    @property
    def mean(self) -> Tensor:
        """E[x] = Σ P(x ≥ level) / (K − 1), over the levels above the first."""
        edges = (torch.arange(1, self.levels, device=self.loc.device) - 0.5) / (self.levels - 1)
        tails = ((self.loc.unsqueeze(-1) - edges) / self.scale.unsqueeze(-1)).sigmoid()
        return tails.mean(-1)
