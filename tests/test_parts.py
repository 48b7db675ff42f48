"""Networks, likelihoods, priors and guides: shapes, normalisers, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import pyro_vae as pv
from pyro_vae.networks import positive
from pyro_vae.verdict.kl import multivariate_normal_kl, normal_kl
from truth import assert_z


def test_mlp_keeps_leading_dimensions_and_refuses_nonsense() -> None:
    network = pv.networks.MLP(4, 8, 3)
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(network(x)[3, 1], network(x[3, 1]))
    for widths in ((4,), (4, 0), (4, -1, 2), (4, 2.5)):
        with pytest.raises(ValueError, match="at least two widths"):
            pv.networks.MLP(*widths)


def test_positive_is_positive_and_has_gradients_everywhere() -> None:
    raw = torch.linspace(-80, 1e4, 1000, requires_grad=True)
    assert (positive(raw) > 0).all() and torch.isfinite(positive(raw)).all()
    positive(raw).sum().backward()
    assert raw.grad is not None and torch.isfinite(raw.grad).all()


@pytest.mark.parametrize(
    "likelihood",
    [pv.likelihoods.Normal(0.7), pv.likelihoods.LearnedNormal(), pv.likelihoods.LearnedNormal(1)],
    ids=["fixed", "shared", "per pixel"],
)
def test_normal_likelihoods_integrate_to_one(likelihood: Any) -> None:
    x = torch.linspace(-30, 30, 20001)
    density = likelihood(torch.tensor([0.3])).log_prob(x.unsqueeze(-1)).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-5)
    assert likelihood.features(7) == 7


def test_bernoulli_sums_to_one() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    assert pv.likelihoods.Bernoulli()(torch.randn(5)).log_prob(corners).exp().sum().item() == (
        pytest.approx(1, abs=1e-6)
    )


@pytest.mark.parametrize("observed", [None, 6], ids=["shared", "per pixel"])
def test_a_learned_scale_finds_the_noise(observed: int | None) -> None:
    x = 0.3 * torch.randn(4000, 6)
    likelihood = pv.likelihoods.LearnedNormal(observed)
    optimizer = torch.optim.LBFGS(likelihood.parameters(), max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -likelihood(torch.zeros_like(x)).log_prob(x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = x.square().mean(0).sqrt() if observed else x.square().mean().sqrt()
    torch.testing.assert_close(likelihood.scale.detach(), optimum, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_scales(scale: float) -> None:
    with pytest.raises(ValueError, match="scale"):
        pv.likelihoods.Normal(scale)
    with pytest.raises(ValueError, match="scale"):
        pv.likelihoods.LearnedNormal(scale=scale)
    with pytest.raises(ValueError, match="observed"):
        pv.likelihoods.LearnedNormal(0)


@pytest.mark.parametrize("latent_dim", [0, -1, 2.0])
def test_bad_latent_dimensions(latent_dim: Any) -> None:
    with pytest.raises(ValueError, match="latent_dim must be an integer >= 1"):
        pv.priors.StandardNormal(latent_dim)


def test_guides_read_their_features() -> None:
    features = torch.randn(3, 5)
    full = pv.guides.MultivariateNormalGuide(torch.nn.Identity()).posterior(features)
    tril = full.scale_tril
    torch.testing.assert_close(full.mean, features[:, :2])
    torch.testing.assert_close(tril[:, 1, 0], features[:, 3])
    torch.testing.assert_close(tril.diagonal(dim1=-2, dim2=-1), positive(features[:, [2, 4]]))
    flat = pv.guides.NormalGuide(torch.nn.Identity()).posterior(features[:, :4])
    torch.testing.assert_close(flat.stddev, positive(features[:, 2:4]))
    with pytest.raises(ValueError, match="2 L features from its encoder; got 5"):
        pv.guides.NormalGuide(torch.nn.Identity()).posterior(features)
    with pytest.raises(ValueError, match=r"\(2, 5, 9, 14, ...\); got 4"):
        pv.guides.MultivariateNormalGuide(torch.nn.Identity()).posterior(features[:, :4])


def test_closed_gaussian_kl_is_that_of_torch_and_of_monte_carlo(double: None) -> None:
    count, size, draws = 20, 3, 20_000
    mean, other_mean = torch.randn(2, count, size)
    sd, other_sd = torch.rand(2, count, size) + 0.3
    q, p = Normal(mean, sd), Normal(other_mean, other_sd)
    closed = normal_kl(mean, sd, other_mean, other_sd)
    torch.testing.assert_close(closed, kl_divergence(q, p).sum(-1))
    z = q.sample(torch.Size([draws]))
    ratio = (q.log_prob(z) - p.log_prob(z)).sum(-1)
    assert_z(ratio.mean(0), closed, ratio.std(0) / draws**0.5)

    tril, other_tril = torch.randn(2, count, size, size).tril()
    covariance, other_covariance = (t @ t.mT + 0.1 * torch.eye(size) for t in (tril, other_tril))
    full_q = torch.distributions.MultivariateNormal(mean, covariance)
    full_p = torch.distributions.MultivariateNormal(other_mean, other_covariance)
    closed = multivariate_normal_kl(mean, covariance, other_mean, other_covariance)
    torch.testing.assert_close(closed, kl_divergence(full_q, full_p))
    z = full_q.sample(torch.Size([draws]))
    ratio = full_q.log_prob(z) - full_p.log_prob(z)
    assert_z(ratio.mean(0), closed, ratio.std(0) / draws**0.5)

    diagonal = multivariate_normal_kl(
        mean, torch.diag_embed(sd.square()), other_mean, torch.diag_embed(other_sd.square())
    )
    torch.testing.assert_close(diagonal, normal_kl(mean, sd, other_mean, other_sd))
