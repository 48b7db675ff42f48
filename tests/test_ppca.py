"""Level one of the ladder: everything in closed form."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pairs import guide_of, random_ppca
from pyro_vae.models import PPCA
from pyro_vae.pair import log_densities
from truth import assert_z

pytestmark = pytest.mark.usefixtures("double")


def test_evidence_and_posterior_are_those_of_the_joint_gaussian() -> None:
    model = random_ppca()
    x = model(None, size=5).detach()
    w, noise = model.loading, model.noise
    covariance = w @ w.mT + noise.square() * torch.eye(6)
    dense = dist.MultivariateNormal(model.mean, covariance)
    torch.testing.assert_close(model.log_evidence(x), dense.log_prob(x))
    gain = w.mT @ torch.linalg.inv(covariance)
    torch.testing.assert_close(model.posterior(x).mean, (x - model.mean) @ gain.mT)
    expected = torch.eye(2) - gain @ w
    torch.testing.assert_close(model.posterior(x).covariance_matrix[0], expected)


def test_elbo_of_the_exact_posterior_is_the_evidence_for_every_draw() -> None:
    model = random_ppca()
    x = model(None, size=50).detach()
    weight = log_densities(model, guide_of(model.posterior), (x,), draws=100).log_weight
    assert (weight - model.log_evidence(x)).abs().max() < 1e-10
    loss = Trace_ELBO().loss(model, guide_of(model.posterior), x)
    assert loss == pytest.approx(-model.log_evidence(x).sum().item(), abs=1e-9)


def _correlated() -> PPCA:
    """Two loadings that nearly agree, hence a strongly correlated posterior."""
    first, second = torch.randn(2, 6)
    return PPCA(torch.stack([first, first + 0.8 * second], 1), torch.randn(6), noise=1.0)


def _mean_field_gap(model: PPCA) -> torch.Tensor:
    precision = model._precision()
    return 0.5 * (precision.diagonal().log().sum() - precision.logdet())


def test_the_best_mean_field_guide_is_below_by_the_closed_gap() -> None:
    model = _correlated()
    x = model(None, size=200).detach()
    weight = log_densities(model, guide_of(model.mean_field_posterior), (x,), 2000).log_weight
    gap = model.log_evidence(x) - weight.mean(0)
    assert_z(gap.mean(), _mean_field_gap(model), weight.std(0).mean() / (2000 * 200) ** 0.5)
    shifted = guide_of(lambda x: dist.Normal(model.posterior(x).mean + 0.1, 0.5).to_event(1))
    assert log_densities(model, shifted, (x,), 2000).log_weight.mean() < weight.mean()


def test_svi_finds_that_guide() -> None:
    model = _correlated().requires_grad_(False)
    x = model(None, size=256).detach()
    guide = pv.guides.NormalGuide(nn.Linear(6, 4))
    run = pv.fit(
        model, guide, (x,), epochs=300, batch_size=64, lr=5e-2, schedule=pv.svi.cosine(1200),
        average=0.99, measure_every=300, progress=False,
    )  # fmt: skip
    weight = log_densities(model, guide, (x,), 2000).log_weight
    gap = (model.log_evidence(x) - weight.mean(0)).mean()
    # A linear guide contains the optimum.
    assert _mean_field_gap(model) > 0.2
    assert gap.item() == pytest.approx(_mean_field_gap(model).item(), abs=1e-2)
    torch.testing.assert_close(guide.posterior(x).mean, model.posterior(x).mean, atol=0.06, rtol=0)
    assert run.best.train_elbo == pytest.approx(weight.mean().item(), abs=0.05)


def test_maximum_likelihood_is_a_maximum() -> None:
    x = random_ppca(8, 3)(None, size=400).detach()
    optimum = PPCA.maximum_likelihood(x, 3)
    evidence = optimum.log_evidence(x).mean()
    gradients = torch.autograd.grad(evidence, list(optimum.parameters()))
    assert max(g.abs().max() for g in gradients) < 1e-9
    for _ in range(10):
        with torch.no_grad():
            nearby = PPCA(
                optimum.loading + 0.01 * torch.randn(8, 3),
                optimum.mean + 0.01 * torch.randn(8),
                optimum.noise.item() * 1.01,
            )
        assert nearby.log_evidence(x).mean() < evidence


def test_em_climbs_to_the_same_optimum() -> None:
    x = random_ppca(8, 3)(None, size=400).detach()
    closed = PPCA.maximum_likelihood(x, 3)
    model, history = PPCA.expectation_maximization(x, 3, tolerance=1e-13, iterations=5000)
    assert (history.diff() > -1e-12).all(), "EM never falls"
    assert history[-1] == pytest.approx(closed.log_evidence(x).mean().item(), abs=1e-9)
    torch.testing.assert_close(model.noise, closed.noise, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        model.loading @ model.loading.mT, closed.loading @ closed.loading.mT, rtol=1e-4, atol=1e-4
    )


def test_svi_reaches_the_optimum_of_the_marginal_likelihood() -> None:
    x = random_ppca(5, 1)(None, size=400).detach()
    start = PPCA(0.1 * torch.randn(5, 1), torch.zeros(5), noise=1.0)
    guide = pv.guides.NormalGuide(nn.Linear(5, 2))
    for lr in (3e-2, 3e-3):
        pv.fit(start, guide, (x,), epochs=60, lr=lr, progress=False)
    best = PPCA.maximum_likelihood(x, 1).log_evidence(x).mean().item()
    assert start.log_evidence(x).mean().item() == pytest.approx(best, abs=5e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PPCA(torch.zeros(3), torch.zeros(3), 1.0), "loading must be"),
        (lambda: PPCA(torch.zeros(3, 2), torch.zeros(2), 1.0), "mean"),
        (lambda: PPCA(torch.zeros(3, 2), torch.zeros(3), 0.0), "noise must be"),
        (lambda: PPCA.maximum_likelihood(torch.randn(9, 3), 3), r"latent_dim must be in 1\.\.2"),
        (lambda: PPCA.maximum_likelihood(torch.randn(9, 3), 0), "latent_dim"),
        (lambda: PPCA.maximum_likelihood(torch.randn(9), 1), r"data must be \(N, D\)"),
        (lambda: PPCA.expectation_maximization(torch.randn(9, 3), 2, iterations=0), "iterations"),
        (lambda: PPCA.expectation_maximization(torch.full((9, 3), torch.nan), 2), "NaN"),
    ],
)  # fmt: skip
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_wide_noise_does_not_overflow() -> None:
    torch.set_default_dtype(torch.float32)
    assert PPCA(torch.eye(3, 2), torch.zeros(3), noise=1e4).noise.item() == pytest.approx(1e4)
    assert pv.likelihoods.LearnedNormal(scale=1e4).scale.item() == pytest.approx(1e4)
    x = 120 * torch.randn(50, 3) + 30
    assert torch.isfinite(PPCA.maximum_likelihood(x, 2).log_evidence(x)).all()
