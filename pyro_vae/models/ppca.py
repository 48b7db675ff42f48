"""Probabilistic principal component analysis: the one VAE in which everything is exact."""

from __future__ import annotations

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.checks import check_batch
from pyro_vae.networks import positive, raw_positive
from pyro_vae.pair import PairModule, plate_size


class PPCA(PairModule):
    r"""Linear decoder, Gaussian noise; evidence and posterior in closed form.

    $$z \sim \mathcal N(0, I_L), \qquad x \mid z \sim \mathcal N(\mu + W z, \sigma^2 I_D)$$

    With $P = I + W^\top W / \sigma^2$ the posterior is
    $\mathcal N(P^{-1} W^\top (x - \mu) / \sigma^2, P^{-1})$, and
    $p(x) = \mathcal N(\mu, W W^\top + \sigma^2 I)$.

    Args:
        loading: `W`, `(D, L)`.
        mean: $\mu$, `(D,)`.
        noise: $\sigma$, above 1e-4, in the units of `x`.

    Raises:
        ValueError: shapes that do not fit, or noise that is too small.

    References:
        Michael E. Tipping, Christopher M. Bishop. *Probabilistic Principal Component
        Analysis*, 1999.

    Example:
        >>> model = PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> x = model(None, size=4)
        >>> model.log_evidence(x).shape, model.posterior(x).mean.shape
        (torch.Size([4]), torch.Size([4, 2]))
    """

    def __init__(self, loading: Tensor, mean: Tensor, noise: float) -> None:
        super().__init__()
        if loading.dim() != 2 or mean.shape != loading.shape[:1]:
            raise ValueError(
                "loading must be (D, L) and mean (D,); "
                f"got {tuple(loading.shape)} and {tuple(mean.shape)}"
            )
        if not noise > 1e-4:
            raise ValueError(f"noise must be a standard deviation above 1e-4; got {noise}")
        self.loading = nn.Parameter(loading.clone())
        self.mean = nn.Parameter(mean.clone())
        self.raw_noise = nn.Parameter(raw_positive(loading.new_tensor(noise)))

    @property
    def noise(self) -> Tensor:
        """σ, a scalar."""
        return positive(self.raw_noise)

    def forward(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Score `x` of shape `(B, D)`, or generate `size` data when `x` is `None`."""
        latent = self.mean.new_zeros(self.loading.shape[1])
        with pyro.plate("data", plate_size(x, size)):
            z = pyro.sample("z", dist.Normal(latent, 1.0).to_event(1))
            return pyro.sample("x", self.decode(z), obs=x)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for latents `(..., L)`."""
        return dist.Normal(z @ self.loading.mT + self.mean, self.noise).to_event(1)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, `(B, D)` to `(B,)`."""
        diagonal = self.noise.square().expand_as(self.mean)
        evidence = dist.LowRankMultivariateNormal(self.mean, self.loading, diagonal)
        return evidence.log_prob(x)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """Exact p(z | x), batch shape `(B,)`, event shape `(L,)`."""
        precision = self._precision()
        projected = (x - self.mean) @ self.loading / self.noise.square()
        location = torch.linalg.solve(precision, projected.unsqueeze(-1)).squeeze(-1)
        return dist.MultivariateNormal(location, precision_matrix=precision)

    def mean_field_posterior(self, x: Tensor) -> dist.TorchDistribution:
        r"""The factorised Gaussian nearest to p(z | x) in KL(q‖p): same mean, variance 1/Pᵢᵢ.

        Its ELBO lies below log p(x) by $\frac12 (\sum_i \log P_{ii} - \log |P|)$.
        """
        scale = self._precision().diagonal().rsqrt()
        return dist.Normal(self.posterior(x).mean, scale).to_event(1)

    def _precision(self) -> Tensor:
        gram = self.loading.mT @ self.loading / self.noise.square()
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device) + gram

    @classmethod
    def maximum_likelihood(cls, x: Tensor, latent_dim: int) -> PPCA:
        r"""The optimum in closed form, from the eigenvectors of the sample covariance.

        $$W = U_L (\Lambda_L - \sigma^2 I)^{1/2}, \qquad
          \sigma^2 = \frac{1}{D - L} \sum_{j > L} \lambda_j$$

        Args:
            x: data, `(N, D)`.
            latent_dim: `1 <= L < D`.

        Raises:
            ValueError: `latent_dim` out of range, or data without variance left for the noise.

        Example:
            >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
            >>> PPCA.maximum_likelihood(x, 2).loading.shape
            torch.Size([5, 2])
        """
        _check(x, latent_dim)
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).mT @ (x - mean) / len(x))
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        variance = values[latent_dim:].mean()
        excess = (values[:latent_dim] - variance).clamp_min(0)
        return cls(vectors[:, :latent_dim] * excess.sqrt(), mean, variance.sqrt().item())

    @classmethod
    def expectation_maximization(
        cls,
        x: Tensor,
        latent_dim: int,
        *,
        iterations: int = 1000,
        tolerance: float = 1e-9,
        seed: int = 0,
    ) -> EMResult:
        """The optimum by EM, which climbs log p(x) at every step.

        The E-step takes the exact posterior's first two moments; the M-step is a least-squares
        fit of `x` on them. It reaches the same optimum as `maximum_likelihood`, up to a
        rotation of the latent space.

        Args:
            x: data, `(N, D)`.
            latent_dim: `1 <= L < D`.
            iterations: at most so many steps.
            tolerance: stop when log p(x) per datum gains less than this, in nats.
            seed: of the first loading.

        Returns:
            `EMResult(model, log_evidence)`, the second the mean per datum before each step.

        Raises:
            ValueError: `latent_dim` or `iterations` out of range.

        References:
            Michael E. Tipping, Christopher M. Bishop. *Mixtures of Probabilistic Principal
            Component Analyzers*, 1999 (the two-step EM without the sample covariance).

        Example:
            >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
            >>> result = PPCA.expectation_maximization(x, 2)
            >>> bool((result.log_evidence.diff() > -1e-5).all())
            True
        """
        _check(x, latent_dim)
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1; got {iterations}")
        generator = torch.Generator().manual_seed(seed)
        centred = x - x.mean(0)
        start = torch.randn(x.shape[1], latent_dim, generator=generator, dtype=x.dtype)
        scale = centred.square().mean().sqrt()
        model = cls(start.to(x) * scale, x.mean(0), scale.item())
        history: list[Tensor] = []
        with torch.no_grad():
            for _ in range(iterations):
                history.append(model.log_evidence(x).mean())
                if len(history) > 1 and abs(history[-1] - history[-2]) < tolerance:
                    break
                model = cls(*_em_step(model, x, centred))
        return EMResult(model, torch.stack(history))


class EMResult(NamedTuple):
    """What `PPCA.expectation_maximization` returns."""

    model: PPCA
    """the model at the optimum"""
    log_evidence: Tensor
    """mean log p(x) per datum before each step, nats; never falls"""


def _em_step(model: PPCA, x: Tensor, centred: Tensor) -> tuple[Tensor, Tensor, float]:
    posterior = model.posterior(x)
    z = posterior.mean
    second = z.mT @ z + posterior.covariance_matrix.sum(0)
    cross = centred.mT @ z
    loading = torch.linalg.solve(second, cross.mT).mT
    residual = centred.square().sum() - (loading * cross).sum()
    return loading, model.mean, (residual / centred.numel()).sqrt().item()


def _check(x: Tensor, latent_dim: int) -> None:
    check_batch((x,), "data")
    if x.dim() != 2:
        raise ValueError(f"data must be (N, D); got {tuple(x.shape)}")
    if not 1 <= latent_dim < x.shape[1]:
        raise ValueError(f"latent_dim must be in 1..{x.shape[1] - 1}, below D; got {latent_dim}")
