"""Pairs that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

import pyro_vae as pv


class Pair(NamedTuple):
    model: Any
    guide: Any


def digits_pair(guide: Any = pv.guides.NormalGuide, latent_dim: int = 2) -> Pair:
    return Pair(
        pv.models.VAE(
            pv.networks.MLP(latent_dim, 64, 64),
            prior=pv.priors.StandardNormal(latent_dim),
            likelihood=pv.likelihoods.Bernoulli(),
        ),
        guide(pv.networks.MLP(64, 64, guide.features(latent_dim))),
    )


def random_ppca(observed: int = 6, latent_dim: int = 2, noise: float = 0.5) -> pv.models.PPCA:
    return pv.models.PPCA(torch.randn(observed, latent_dim), torch.randn(observed), noise)


def guide_of(posterior: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """A guide in plain Pyro that samples `"z"` from a distribution given `x`."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    return guide
