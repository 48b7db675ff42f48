"""Pairs that several tests share: the families of the catalogue, each on the digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.networks import MLP, Merge, OneHot

HIDDEN = 32


class Pair(NamedTuple):
    model: Any
    guide: Any


def digits_pair(guide: Any = pv.guides.NormalGuide, latent_dim: int = 2) -> Pair:
    return Pair(
        pv.models.VAE(
            MLP(latent_dim, 64, 64),
            prior=pv.priors.StandardNormal(latent_dim),
            likelihood=pv.likelihoods.Bernoulli(),
        ),
        guide(MLP(64, 64, guide.features(latent_dim))),
    )


def random_ppca(observed: int = 6, latent_dim: int = 2, noise: float = 0.5) -> pv.models.PPCA:
    return pv.models.PPCA(torch.randn(observed, latent_dim), torch.randn(observed), noise)


def guide_of(posterior: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """A guide in plain Pyro that samples `"z"` from a distribution given `x`."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    return guide


def tilted() -> pv.models.PPCA:
    """A model whose posterior has correlation −0.8."""
    loadings = torch.tensor([[2.0, 2.0], [0.9, 0.0], [0.0, 0.9]])
    return pv.models.PPCA(loadings, torch.zeros(3), noise=1.0)


def wrong_guide(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """The exact posterior of `tilted`, its mean and triangle changed."""
    model = tilted()

    def posterior(x: Tensor) -> Any:
        right: Any = model.posterior(x)
        mean, tril = change(right.mean, right.scale_tril)
        return dist.MultivariateNormal(mean, scale_tril=tril)

    return guide_of(posterior)


def mirrored(mean: Tensor, tril: Tensor) -> tuple[Tensor, Tensor]:
    """The correlation with the other sign."""
    flip = torch.tensor([1.0, -1.0])
    return mean, torch.linalg.cholesky((tril @ tril.mT) * flip * flip.unsqueeze(-1))


def sparse(concentration: float) -> Callable[[Tensor], None]:
    """Rates with a pole at 0: of 0.05, single precision rounds 0.6 % onto it."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(concentration), 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    return model


def two_levels(x: Tensor) -> None:
    """z2 → z1 → x in plain Pyro, each given what is above with variance 1."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.full((1,), 3.0), 1.0).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)


PRIORS: dict[str, Callable[[Any, Tensor, int], nn.Module]] = {
    "standard": lambda guide, x, size: pv.priors.StandardNormal(size),
    "diagonal": lambda guide, x, size: pv.priors.DiagonalNormal(size),
    "mixture": lambda guide, x, size: pv.priors.GaussianMixture(size, 7),
    "vamp": lambda guide, x, size: pv.priors.VampPrior.from_data(guide.posterior, x, 9),
    "vamp, weighted": lambda guide, x, size: pv.priors.VampPrior.at_random(
        guide.posterior, 9, x.shape[1], learned_weights=True
    ),
    "flow": lambda guide, x, size: pv.priors.FlowPrior(size, hidden=(HIDDEN,)),
}
"""Builders from an amortized guide, data and `L`."""

GUIDES: dict[str, Callable[[Tensor, int], Any]] = {
    "mean-field": lambda x, size: pv.guides.NormalGuide(_encoder(x, pv.guides.NormalGuide, size)),
    "full": lambda x, size: pv.guides.MultivariateNormalGuide(
        _encoder(x, pv.guides.MultivariateNormalGuide, size)
    ),
    "flow": lambda x, size: pv.guides.FlowGuide(
        _encoder(x, pv.guides.FlowGuide, size), size, hidden=(HIDDEN,)
    ),
    "local": lambda x, size: pv.guides.NormalGuide(
        pv.guides.Table(x, pv.guides.NormalGuide.features(size))
    ),
    "corrupted": lambda x, size: pv.guides.CorruptedGuide(
        pv.guides.NormalGuide(_encoder(x, pv.guides.NormalGuide, size)), pv.guides.masking(0.2)
    ),
}
"""Builders from data and `L`. `RefinedGuide` needs a model as well: see `catalogue_pair`."""


def _encoder(x: Tensor, guide: Any, size: int) -> nn.Module:
    return MLP(x.shape[1], HIDDEN, guide.features(size))


def catalogue_pair(
    x: Tensor, prior: str = "standard", guide: str = "mean-field", likelihood: Any = None,
    latent_dim: int = 2,
) -> Pair:  # fmt: skip
    """Any prior, guide and likelihood together, on data `x`."""
    likelihood = likelihood or pv.likelihoods.Bernoulli()
    amortized = GUIDES["mean-field" if guide in ("local", "refined") else guide](x, latent_dim)
    model = pv.models.VAE(
        MLP(latent_dim, HIDDEN, likelihood.features(x.shape[1])),
        prior=PRIORS[prior](amortized, x, latent_dim),
        likelihood=likelihood,
    )
    if guide == "refined":
        return Pair(model, pv.guides.RefinedGuide(amortized, model, steps=3, draws=4))
    return Pair(model, GUIDES["local"](x, latent_dim) if guide == "local" else amortized)


def hierarchical_pair(x: Tensor, prior: str = "standard") -> Pair:
    bottom = Merge(MLP(64, HIDDEN), MLP(1, HIDDEN), head=MLP(2 * HIDDEN, HIDDEN, 4))
    guide = pv.guides.HierarchicalGuide(MLP(64, HIDDEN, 2), bottom)
    model = pv.models.HierarchicalVAE(
        Merge(MLP(2, HIDDEN), MLP(1, HIDDEN), head=MLP(2 * HIDDEN, HIDDEN, 64)),
        prior=PRIORS[prior](guide, x, 1),
        conditional=pv.priors.ConditionalNormal(MLP(1, HIDDEN, 4)),
        likelihood=pv.likelihoods.Bernoulli(),
    )
    return Pair(model, guide)


def conditional_pair(prior: nn.Module | None = None, latent_dim: int = 2) -> Pair:
    encoder = Merge(nn.Identity(), OneHot(10), head=MLP(74, 64, 2 * latent_dim))
    model = pv.models.ConditionalVAE(
        Merge(nn.Identity(), OneHot(10), head=MLP(latent_dim + 10, 64, 64, 64)),
        prior=prior or pv.priors.StandardNormal(latent_dim),
        likelihood=pv.likelihoods.Bernoulli(),
    )
    return Pair(model, pv.guides.NormalGuide(encoder))


def quantized_pair(codes: int = 32, positions: int = 4, width: int = 4) -> Pair:
    codebook = pv.models.Codebook(codes, width, positions)
    encoder = MLP(64, 64, positions * width)
    model = pv.models.VectorQuantizedVAE(
        MLP(positions * width, 64, 64), codebook, pv.likelihoods.Bernoulli()
    )
    return Pair(model, pv.guides.QuantizedGuide(encoder, codebook))
