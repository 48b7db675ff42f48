"""Each likelihood is normalised over its support, and refuses data outside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pyro_vae as pv
from pairs import catalogue_pair
from pyro_vae.likelihoods import LogisticLevels
from truth import assert_z

DISCRETE: dict[str, Any] = {
    "categorical": (pv.likelihoods.Categorical(5), torch.arange(5.0), 5),
    "logistic": (pv.likelihoods.DiscretizedLogistic(256), torch.linspace(0, 1, 256), 2),
    "logistic, two": (pv.likelihoods.DiscretizedLogistic(2), torch.tensor([0.0, 1.0]), 2),
    "poisson": (pv.likelihoods.Poisson(), torch.arange(200.0), 1),
    "negative binomial": (pv.likelihoods.NegativeBinomial(1, 0.7), torch.arange(5000.0), 1),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_it_sums_to_one(double: None, name: str) -> None:
    likelihood, support, width = DISCRETE[name]
    assert likelihood.features(7) == 7 * width
    for features in (torch.zeros(width), torch.randn(width), 3 * torch.randn(width)):
        distribution = likelihood(features)
        total = distribution.log_prob(support.double().unsqueeze(-1)).exp().sum().item()
        assert total == pytest.approx(1, abs=1e-6)
        mean = (distribution.log_prob(support.double().unsqueeze(-1)).exp() * support).sum().item()
        if name != "categorical":
            assert distribution.mean.item() == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("logit", [-20.0, -3.0, -0.01, 0.0, 1e-4, 0.5, 20.0])
def test_the_continuous_bernoulli_integrates_to_one(double: None, logit: float) -> None:
    x = torch.linspace(0, 1, 100_001)
    density = pv.likelihoods.ContinuousBernoulli()(torch.tensor([logit])).log_prob(x.unsqueeze(-1))
    assert torch.trapezoid(density.exp(), x).item() == pytest.approx(1, abs=1e-5)


def test_logistic_levels_sample_what_they_score() -> None:
    levels = LogisticLevels(torch.tensor(0.8), torch.tensor(0.2), 9)
    x = levels.sample(torch.Size([40_000]))
    support = torch.linspace(0, 1, 9)
    share = (x.unsqueeze(-1) - support).abs().argmin(-1).bincount(minlength=9) / 40_000
    truth = levels.log_prob(support).exp()
    assert_z(share, truth, (truth * (1 - truth) / 40_000).sqrt())
    assert levels.expand(torch.Size([3])).sample(torch.Size([2])).shape == (2, 3)


def test_logistic_levels_are_stable_far_out() -> None:
    levels = LogisticLevels(torch.tensor([50.0, -50.0]), torch.tensor(0.01), 256)
    x = torch.tensor([0.5, 0.5], requires_grad=True)
    log_prob = levels.log_prob(x)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all() and x.grad is not None and torch.isfinite(x.grad).all()


def test_categories_are_laid_out_in_blocks() -> None:
    logits = torch.randn(3, 4)  # levels, places
    distribution: Any = pv.likelihoods.Categorical(3)(logits.flatten())
    torch.testing.assert_close(distribution.base_dist.probs, logits.softmax(0).T)


REFUSALS = {
    "bernoulli, grey": (pv.likelihoods.Bernoulli(), 0.5, "outside the support of Bernoulli"),
    "continuous bernoulli, 2": (pv.likelihoods.ContinuousBernoulli(), 2.0, "outside the support"),
    "categorical, 17": (
        pv.likelihoods.Categorical(17),
        17.0,
        "outside the support of Categorical",
    ),
    "categorical, half": (pv.likelihoods.Categorical(17), 0.5, "outside the support"),
    "categorical, negative": (pv.likelihoods.Categorical(17), -1.0, "outside the support"),
    "logistic, off the grid": (pv.likelihoods.DiscretizedLogistic(17), 0.51, "multiples of 1/16"),
    "logistic, 255": (pv.likelihoods.DiscretizedLogistic(256), 255.0, "x / 255"),
    "poisson, half": (pv.likelihoods.Poisson(), 0.5, "outside the support of Poisson"),
    "poisson, negative": (pv.likelihoods.Poisson(), -1.0, "outside the support"),
    "negative binomial, half": (pv.likelihoods.NegativeBinomial(8), 0.5, "outside the support"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_it_refuses_other_data_before_the_first_step(name: str) -> None:
    likelihood, value, message = REFUSALS[name]
    x = torch.zeros(20, 8)
    x[13, 2] = value
    with pytest.raises(ValueError, match=message) as caught:
        pv.fit(*catalogue_pair(x, likelihood=likelihood), (x,), epochs=1, progress=False)
    assert "rows [13]" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pv.likelihoods.Categorical(1), "levels"),
        (lambda: pv.likelihoods.DiscretizedLogistic(1), "levels"),
        (lambda: pv.likelihoods.NegativeBinomial(0), "observed"),
        (lambda: pv.likelihoods.NegativeBinomial(4, 0.0), "dispersion"),
    ],
    ids=["categorical", "logistic", "places", "dispersion"],
)
def test_bad_settings(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_tokens_with_positions() -> None:
    """Sequences in which each token depends on its place, through the whole pair."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 6, (256, 1), generator=generator)
    x = (start + torch.arange(5)) % 6
    likelihood = pv.likelihoods.Categorical(6)
    model = pv.models.VAE(
        pv.networks.MLP(2, 64, likelihood.features(5)),
        prior=pv.priors.StandardNormal(2),
        likelihood=likelihood,
    )
    encoder = torch.nn.Sequential(pv.networks.Tokens(6, 5, 4), pv.networks.MLP(20, 64, 4))
    guide = pv.guides.NormalGuide(encoder)
    run = pv.fit(model, guide, (x,), epochs=60, lr=2e-2, batch_size=64, progress=False)
    # Six equally likely sequences: −log 6 = −1.79 nats at best, and five independent tokens
    # would have −5 log 6 = −8.96.
    assert -3.5 < run.best.validation_elbo < -1.79
    with pytest.raises(ValueError, match=r"token 6 is out of range 0\.\.5, the vocabulary of 6"):
        pv.check_pair(model, guide, (torch.full((3, 5), 6),))
