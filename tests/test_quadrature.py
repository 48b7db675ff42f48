"""Level two: the grid against closed forms, and on what is hard for grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pairs import Pair, digits_pair, random_ppca, sparse
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import log_densities
from pyro_vae.posterior import quadrature
from truth import assert_z


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_it_is_exact_for_linear_gaussian_models(double: None, latent_dim: int) -> None:
    model = random_ppca(6, latent_dim, noise=0.3)
    x = model(None, size=12).detach()
    x[0] *= 6  # far out in the tail of the prior
    exact = quadrature(model, (x,))
    posterior = model.posterior(x)
    assert (exact.log_evidence - model.log_evidence(x)).abs().max() < 1e-6
    assert exact.error.max() < 1e-5
    torch.testing.assert_close(exact.mean, posterior.mean, atol=1e-6, rtol=0)
    covariance = posterior.covariance_matrix
    torch.testing.assert_close(exact.covariance, covariance, atol=1e-6, rtol=1e-5)


def _narrow(x: Tensor) -> None:
    """A posterior with correlation 0.9999."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 0.01).to_event(1), obs=x)


def test_a_narrow_ridge(double: None) -> None:
    x = torch.linspace(-3, 3, 7).unsqueeze(-1)
    exact = quadrature(_narrow, (x,))
    truth = dist.Normal(0.0, (2 + 1e-4) ** 0.5).log_prob(x).squeeze(-1)
    torch.testing.assert_close(exact.log_evidence, truth, atol=1e-6, rtol=0)
    assert (exact.covariance[:, 0, 1] / exact.covariance[:, 0, 0] + 1).abs().max() < 1e-3


def _modes(width: float, latent_dim: int = 2) -> tuple[Callable[[Tensor], None], Any]:
    """Five far modes of unequal weight under a likelihood that says little."""
    places = torch.tensor([[-6.0, 0.0], [6.0, 0.5], [0.0, 7.0], [0.0, -8.0], [0.3, 0.0]])
    weights = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1])
    mixture = dist.MixtureSameFamily(
        dist.Categorical(weights), dist.Normal(places[:, :latent_dim], width).to_event(1)
    )

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", mixture)
            pyro.sample("x", dist.Normal(0.1 * z, 3.0).to_event(1), obs=x)

    def log_evidence(x: Tensor) -> Tensor:
        spread = ((0.1 * width) ** 2 + 9) ** 0.5
        marginal = dist.Normal(0.1 * places[:, :latent_dim], spread).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(weights), marginal).log_prob(x)

    return model, log_evidence


@pytest.mark.parametrize("width", [0.5, 0.2, 0.05])
def test_all_modes_of_a_prior_are_covered(double: None, width: float) -> None:
    model, log_evidence = _modes(width)
    x = torch.randn(4, 2) * 3
    exact = quadrature(model, (x,), tolerance=1e-8)
    torch.testing.assert_close(exact.log_evidence, log_evidence(x), atol=1e-6, rtol=0)
    z = exact.sample(20_000)["z"][0]
    near = (z[:, 0].unsqueeze(1) - torch.tensor([[-6.0, 0.0], [6.0, 0.5]])).norm(
        dim=-1
    ) < 5 * width
    share = near.double().mean(0)
    prior, reach = torch.tensor([0.3, 0.25]), torch.tensor([[-6.0, 0.0], [6.0, 0.5]])
    spread = ((0.1 * width) ** 2 + 9) ** 0.5
    likelihood = dist.Normal(0.1 * reach, spread).to_event(1).log_prob(x[0])
    truth = (prior.log() + likelihood - log_evidence(x)[0]).exp()
    assert_z(share, truth, (truth * (1 - truth) / 20_000).sqrt())


def test_bounded_and_several_sites(double: None) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)
            pyro.sample("other", dist.Normal(shift, 1.0), obs=torch.ones(len(x)))

    counts = torch.tensor([0.0, 1.0, 7.0])
    exact = quadrature(model, (counts,))
    truth = dist.GammaPoisson(3.0, 2.0).log_prob(counts)
    truth = truth + dist.Normal(0.0, 2.0**0.5).log_prob(torch.ones(3))
    torch.testing.assert_close(exact.log_evidence, truth, atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.mean[:, 0], (3 + counts) / 3, atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.mean[:, 1], torch.full((3,), 0.5), atol=1e-6, rtol=0)
    draws = exact.sample(50)
    assert draws["rate"].shape == draws["shift"].shape == (1, 50, 3)


def test_it_integrates_to_one_and_reports_its_error(trained: Pair, digits: Any) -> None:
    x = digits.test[0][:6]
    exact = quadrature(trained.model, (x,))
    finer = quadrature(trained.model, (x,), tolerance=1e-12, max_nodes=2**17)
    assert ((exact.log_evidence - finer.log_evidence).abs() <= exact.error + 1e-5).all()
    for b, grid in enumerate(exact.grids):
        assert grid.probability.sum().item() == pytest.approx(1, abs=1e-9)
        nodes = grid.nodes.flatten(0, 1)[::97].float()
        log_joint = LogJoint(trained.model, (x[b : b + 1],))(nodes.unsqueeze(1))[:, 0]
        density = (log_joint.double() - exact.log_evidence[b]).exp()
        torch.testing.assert_close(density, grid.density.flatten()[::97], rtol=1e-3, atol=1e-6)


def test_log_evidence_is_elbo_plus_kl(trained: Pair, digits: Any) -> None:
    """The identity log p(x) = ELBO + KL(q‖p(z|x)), each of the three computed on its own."""
    x = digits.test[0][:16]
    exact = quadrature(trained.model, (x,))
    elbo, kl = [], []
    with torch.no_grad():
        for b, grid in enumerate(exact.grids):
            # Both terms as integrals over a grid that holds q, with no Monte Carlo in them.
            q = trained.guide.posterior(x[b : b + 1])
            line = torch.linspace(-7, 7, 161)
            nodes = torch.cartesian_prod(line, line) * q.stddev + q.mean
            log_q = q.log_prob(nodes).double()
            weight = log_q.softmax(0)
            log_joint = LogJoint(trained.model, (x[b : b + 1],))(nodes.unsqueeze(1))[:, 0].double()
            elbo.append((weight * (log_joint - log_q)).sum())
            kl.append((weight * (log_q - (log_joint - exact.log_evidence[b]))).sum())
            assert grid.probability.dim() == 2
    assert (torch.stack(kl) > 0).all()
    torch.testing.assert_close(torch.stack(elbo) + torch.stack(kl), exact.log_evidence)
    weight = log_densities(trained.model, trained.guide, (x,), 4000).log_weight.detach().double()
    assert_z(weight.mean(0), torch.stack(elbo), weight.std(0) / 4000**0.5)


def test_draws_have_the_moments_of_the_grid(double: None) -> None:
    model = random_ppca()
    x = model(None, size=20).detach()
    exact = quadrature(model, (x,))
    z = exact.sample(20_000)["z"][0]
    assert_z(z.mean(0), exact.mean, exact.sd / 20_000**0.5)
    squares = (z - exact.mean).square()
    assert_z(squares.mean(0), exact.sd.square(), squares.std(0) / 20_000**0.5)
    assert torch.equal(exact.sample(5, seed=1)["z"], exact.sample(5, seed=1)["z"])


def test_chunks_change_nothing(trained: Pair, digits: Any) -> None:
    x = digits.test[0][:5]
    whole = quadrature(trained.model, (x,))
    pieces = quadrature(trained.model, (x,), chunk=1000)
    torch.testing.assert_close(whole.log_evidence, pieces.log_evidence, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.mean, pieces.mean, atol=1e-4, rtol=0)


def test_what_it_refuses(digits: Any) -> None:
    x = digits.test[0][:3]
    with pytest.raises(ValueError, match=r"at most 3 latent.*has 4\n.*nuts"):
        quadrature(digits_pair(latent_dim=4).model, (x,))

    def impossible(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z.sigmoid(), 2.0, validate_args=False), obs=x)

    with pytest.raises(ValueError, match=r"data \[1, 2\] have no likelihood"):
        quadrature(impossible, (torch.tensor([1.5, 3.0, -1.0]),))

    def improper(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    with pytest.raises(ValueError, match="no box holds the posterior"):
        quadrature(improper, (torch.zeros(2),))
    with pytest.raises(ValueError, match="empty"):
        quadrature(random_ppca(), (torch.zeros(0, 6),))


def test_the_model_is_left_as_it_was(trained: Pair, digits: Any) -> None:
    before = torch.get_rng_state()
    quadrature(trained.model, (digits.test[0][:2],))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad for p in trained.model.parameters())


def test_one_and_three_latents_of_a_decoder(digits: Any) -> None:
    for latent_dim in (1, 3):
        pair = digits_pair(pv.guides.MultivariateNormalGuide, latent_dim)
        exact = quadrature(pair.model, (digits.test[0][:2],))
        assert exact.error.max() < 1e-4
        assert exact.sample(7)["z"].shape == (1, 7, 2, latent_dim)


@pytest.mark.parametrize(("latent_dim", "noise"), [(1, 0.1), (1, 0.3), (2, 0.1), (3, 0.1)])
def test_posteriors_far_in_the_tail_of_the_prior(
    double: None, latent_dim: int, noise: float
) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    x = torch.arange(0, 30, 1.5).unsqueeze(-1).expand(-1, latent_dim)
    truth = dist.Normal(0.0, (1 + noise**2) ** 0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(quadrature(model, (x,)).log_evidence, truth, atol=1e-6, rtol=0)


def test_a_simplex_and_its_moments(double: None) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            pyro.sample("x", dist.Categorical(z), obs=x)

    x = torch.tensor([0.0, 1.0, 2.0])
    exact = quadrature(model, (x,))
    concentration = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(exact.log_evidence, (concentration / 6).log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.mean, (concentration + torch.eye(3)) / 7, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="fewer degrees of freedom"):
        exact.density(0)


def test_a_density_on_the_positive_reals_is_one_in_z(double: None) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(3.0, 2.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    nodes, density = quadrature(model, (torch.tensor([4.0]),)).density(0)
    torch.testing.assert_close(
        density, dist.Gamma(7.0, 3.0).log_prob(nodes[:, 0]).exp(), atol=1e-6, rtol=1e-6
    )


def test_a_pole_at_a_border(double: None) -> None:
    counts = torch.arange(4.0)
    truth = dist.NegativeBinomial(torch.tensor(0.02), probs=torch.tensor(0.5)).log_prob(counts)
    with pytest.warns(UserWarning, match="rounded onto a border"):
        found = quadrature(sparse(0.02), (counts,)).log_evidence
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=0)


def test_a_support_that_moves_with_another_latent_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            low = pyro.sample("low", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Uniform(low, low + 1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="support of latent site 'z' depends on another"):
        quadrature(model, (torch.zeros(2),))


def test_dropout_is_off(digits: Any) -> None:
    model = digits_pair().model
    model.decoder = torch.nn.Sequential(torch.nn.Dropout(0.5), model.decoder)
    x = digits.test[0][:3]
    exact = quadrature(model, (x,))
    assert exact.error.max() < 1e-4
    assert torch.equal(exact.log_evidence, quadrature(model, (x,)).log_evidence)
    assert model.decoder.training
