"""Level two: lattices that data share, against closed forms and against grids of their own."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pairs import Pair, random_ppca
from pyro_vae.log_joint import LogJoint
from pyro_vae.posterior import lattice, quadrature
from pyro_vae.posterior.crossed import crossed, shares_latents
from truth import assert_z


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_many_data_of_a_linear_gaussian_model(double: None, latent_dim: int) -> None:
    model = random_ppca(6, latent_dim, noise=0.3)
    x = model(None, size=200).detach()
    x[0] *= 6  # far out in the tail of the prior
    exact, posterior = quadrature(model, (x,)), model.posterior(x)
    assert (exact.log_evidence - model.log_evidence(x)).abs().max() < 1e-6
    torch.testing.assert_close(exact.mean, posterior.mean, atol=1e-6, rtol=0)
    covariance = posterior.covariance_matrix
    torch.testing.assert_close(exact.covariance, covariance, atol=1e-6, rtol=1e-5)


def test_a_lattice_settles_what_a_grid_of_its_own_would(
    trained: Pair, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = digits.test[0][:150]
    shared = quadrature(trained.model, (x,))
    assert len({tuple(grid.axes.flatten().tolist()) for grid in shared.grids}) > 100
    monkeypatch.setattr(lattice, "FEWEST", len(x) + 1)
    own = quadrature(trained.model, (x,))
    turned = [(grid.axes[0, 1] != 0).item() for grid in shared.grids]
    assert all(grid.axes[0, 1] != 0 for grid in own.grids)
    assert sum(turned) < 0.5 * len(x)
    torch.testing.assert_close(shared.log_evidence, own.log_evidence, atol=1e-4, rtol=0)
    torch.testing.assert_close(shared.mean, own.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(shared.sd, own.sd, atol=0, rtol=1e-3)
    assert shared.error.max() < 1e-5
    z = shared.sample(4000)["z"][0].double()
    assert_z(z.mean(0), shared.mean, shared.sd / 4000**0.5)
    latents, density = shared.density(turned.index(False))
    cell = (latents[1, 1] - latents[0, 0]).prod()
    assert (density.sum() * cell).item() == pytest.approx(1, abs=1e-5)


def _two_sites(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        pyro.sample("x", dist.Bernoulli(logits=3 * z).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(z.sum(-1), scale), obs=y)


def test_crossed_is_the_log_joint(double: None) -> None:
    batch = torch.rand(5, 2).round(), torch.randn(5)
    target, points = LogJoint(_two_sites, batch), torch.randn(7, 3)
    scores = crossed(target, points, chunk=3)
    assert scores is not None
    direct = target(points.unsqueeze(1).expand(7, 5, 3))
    torch.testing.assert_close(scores, direct.mT)
    assert shares_latents(target)


def _by_row(x: Tensor, c: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + c, 1.0).to_event(1), obs=x)


def _own_prior(x: Tensor, c: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(c, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def _masked(x: Tensor, c: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        seen = dist.Normal(z, 1.0).to_event(1).mask(c[:, 0] > 0)
        pyro.sample("x", seen, obs=x)


def _heavy(x: Tensor, c: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.StudentT(5.0, z, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("model", [_by_row, _own_prior, _masked, _heavy])
def test_who_gets_a_grid_of_its_own(double: None, model: Any) -> None:
    x, c = torch.randn(40, 1), torch.randn(40, 1)
    assert not shares_latents(LogJoint(model, (x, c)))
    exact = quadrature(model, (x, c))
    marginal = dist.Normal(0.0, 2.0**0.5)
    truth = {
        _by_row: marginal.log_prob(x - c),
        _own_prior: marginal.log_prob(x - c),
        _masked: marginal.log_prob(x) * (c > 0),
    }.get(model)
    if truth is None:
        line = torch.linspace(-12, 12, 20_001)
        joint = dist.Normal(0.0, 1.0).log_prob(line) + dist.StudentT(5.0, line, 1.0).log_prob(x)
        truth = joint.logsumexp(-1, keepdim=True) + (line[1] - line[0]).log()
    torch.testing.assert_close(exact.log_evidence, truth.squeeze(-1), atol=1e-5, rtol=0)


def test_far_modes_among_many_data(double: None) -> None:
    """Posteriors with two modes, far from each other, do not spoil their neighbours' lattices."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
            folded = torch.stack([z[..., 0].abs(), z[..., 1]], -1)
            pyro.sample("x", dist.Normal(folded, 0.05).to_event(1), obs=x)

    x = torch.stack([torch.linspace(0.5, 4, 60), torch.linspace(-3, 3, 60)], -1)
    exact = quadrature(model, (x,))
    marginal = dist.Normal(0.0, (9 + 0.05**2) ** 0.5).log_prob(x).sum(-1) + torch.tensor(2.0).log()
    torch.testing.assert_close(exact.log_evidence, marginal, atol=1e-5, rtol=0)
    assert (exact.mean[:, 0].abs() < 1e-3).all()


def test_the_decoder_runs_once_a_latent(double: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many data do not make it decode twice as much."""
    model, decoded = random_ppca(6, 2, noise=0.3), []

    def counting(target: LogJoint, points: Tensor, **how: Any) -> Tensor | None:
        decoded.append(len(points))
        return crossed(target, points, **how)

    x = model(None, size=400).detach()
    monkeypatch.setattr(lattice, "crossed", counting)
    quadrature(model, (x[:200],))
    half = sum(decoded)
    quadrature(model, (x,))
    assert sum(decoded) - half < 1.5 * half
