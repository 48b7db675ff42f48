"""Richer is not worse: exact log p(x) of held-out digits, over seeds, by quadrature."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import pyro_vae as pv
from pairs import GUIDES, PRIORS
from pyro_vae.networks import MLP
from pyro_vae.posterior import quadrature

SEEDS = (0, 1, 2)


@cache
def _log_evidence(prior: str, guide: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact log p(x) and ELBO of 60 test digits after a short fit, nats a digit."""
    digits = pv.data.load("digits")
    torch.manual_seed(seed)
    amortized = GUIDES[guide](digits.train[0], 2)
    model = pv.models.VAE(
        MLP(2, 128, 64),
        prior=PRIORS[prior](amortized, digits.train[0], 2),
        likelihood=pv.likelihoods.Bernoulli(),
    )
    pv.fit(model, amortized, digits, epochs=40, lr=6e-3, seed=seed, progress=False)
    batch = (digits.test[0][:60],)
    exact = quadrature(model, batch, tolerance=1e-2)
    assert exact.error.max() < 0.05
    return exact.log_evidence, pv.bounds(model, amortized, batch, draws=300).elbo


def _compare(richer: tuple[str, str], plainer: tuple[str, str], what: int) -> tuple[float, float]:
    """Mean gain over seeds and digits, in nats, and its standard error over seeds."""
    gains = torch.stack(
        [
            (_log_evidence(*richer, s)[what] - _log_evidence(*plainer, s)[what]).mean()
            for s in SEEDS
        ]
    )
    return gains.mean().item(), gains.std().item() / len(SEEDS) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["mixture", "vamp"])
def test_a_richer_prior_is_not_worse(prior: str) -> None:
    gain, error = _compare((prior, "mean-field"), ("standard", "mean-field"), 0)
    assert gain > -2 * error - 0.05, f"{gain:.3f} ± {error:.3f} nats"


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["full", "flow"])
def test_a_richer_guide_is_not_worse(guide: str) -> None:
    gain, error = _compare(("standard", guide), ("standard", "mean-field"), 0)
    assert gain > -2 * error - 0.05, f"log p(x): {gain:.3f} ± {error:.3f} nats"
