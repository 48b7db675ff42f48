"""Level two: lattices that data share, against closed forms and against grids of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
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
    scores = sum(crossed(target, points, chunk=3))
    direct = target(points.unsqueeze(1).expand(7, 5, 3))
    torch.testing.assert_close(scores, direct.mT)
    assert shares_latents(target, points)


def _likelihood(mean: Any, x: Tensor, width: float = 1.0) -> None:
    pyro.sample("x", dist.Normal(mean, width).to_event(1), obs=x)


def _covariate(x: Tensor, c: Tensor, z: Tensor) -> None:
    _likelihood(z + c, x)


def _gated(x: Tensor, c: Tensor, z: Tensor) -> None:
    """The rows differ only where few draws of the prior fall."""
    _likelihood(z + c * (z - 2).relu(), x)


def _faint(x: Tensor, c: Tensor, z: Tensor) -> None:
    """Differences that are small beside log p(x, z), and not beside the posterior's spread."""
    _likelihood(z + 1e-4 * c, x, width=0.01)


def _masked(x: Tensor, c: Tensor, z: Tensor) -> None:
    seen: Any = c[:, 0] > 0
    with poutine.mask(mask=seen):
        _likelihood(z, x)


def _masked_fn(x: Tensor, c: Tensor, z: Tensor) -> None:
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1).mask(c[:, 0] > 0), obs=x)


def _heavy(x: Tensor, c: Tensor, z: Tensor) -> None:
    pyro.sample("x", dist.StudentT(5.0, z, 1.0).to_event(1), obs=x)


class _Shifted(dist.Normal):
    """A Normal that scores something else."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value - 1)


def _overriding(x: Tensor, c: Tensor, z: Tensor) -> None:
    pyro.sample("x", _Shifted(z, 1.0).to_event(1), obs=x)


def _model(
    likelihood: Callable[[Tensor, Tensor, Tensor], None], **plate: int
) -> Callable[[Tensor, Tensor], None]:
    def model(x: Tensor, c: Tensor) -> None:
        size = plate.get("size", len(x))
        with pyro.plate("data", size, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            likelihood(x, c, z)

    return model


def _own_prior(x: Tensor, c: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(c, 1.0).to_event(1))
        _likelihood(z, x)


def _own_support(x: Tensor, c: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(c - 9, c + 9).to_event(1))
        _likelihood(z, x)


def _global(x: Tensor, c: Tensor) -> None:
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=torch.ones(3))
    _model(lambda x, c, z: _likelihood(z, x))(x, c)


def _by_sum(model: Any, x: Tensor, c: Tensor) -> Tensor:
    """Log p(x) of one latent by a sum over many nodes of one line."""
    line = torch.linspace(-14, 14, 40_001)
    scores = LogJoint(model, (x, c))(line.reshape(-1, 1, 1).expand(-1, len(x), 1))
    return scores.logsumexp(0) + (line[1] - line[0]).log()


@pytest.mark.parametrize(
    "model",
    [
        *map(_model, (_covariate, _gated, _faint, _masked, _masked_fn, _heavy, _overriding)),
        _model(lambda x, c, z: _likelihood(z, x), size=60),
        _own_prior, _global,
    ],
    ids=[
        "covariate", "gated", "faint", "mask", "masked distribution", "StudentT", "subclass",
        "subsampled", "own prior", "global site",
    ],
)  # fmt: skip
def test_who_gets_a_grid_of_its_own(double: None, model: Any) -> None:
    x, c = 2 * torch.randn(40, 1), torch.randn(40, 1)
    x[:4] = 4  # beyond the gate
    target = LogJoint(model, (x, c))
    assert not shares_latents(target, torch.linspace(-6, 6, 400).unsqueeze(1))
    exact = quadrature(model, (x, c))
    torch.testing.assert_close(exact.log_evidence, _by_sum(model, x, c), atol=1e-5, rtol=0)


def test_supports_of_their_own(double: None) -> None:
    x, c = torch.randn(40, 1), torch.randn(40, 1)
    assert not shares_latents(LogJoint(_own_support, (x, c)), torch.linspace(-6, 6, 9)[:, None])
    exact = quadrature(_own_support, (x, c))
    edges = dist.Normal(x, 1.0).cdf(c + 9) - dist.Normal(x, 1.0).cdf(c - 9)
    truth = (edges / 18).log().squeeze(1)
    torch.testing.assert_close(exact.log_evidence, truth, atol=1e-5, rtol=0)


def test_what_shares_all_the_same(double: None) -> None:
    """Images, models that write to their rows, and what they note beside."""

    def model(x: Tensor) -> None:
        x.clamp_(-100, 100)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.deterministic("twice", 2 * z)
            mean = z[..., None, None].expand(*z.shape[:-1], 1, 2, 3)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(3), obs=x)

    x = torch.randn(40, 1, 2, 3)
    assert shares_latents(LogJoint(model, (x,)), torch.randn(50, 1))
    evidence = quadrature(model, (x,)).log_evidence
    truth = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 1).log_prob(x.flatten(1))
    torch.testing.assert_close(evidence, truth, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_data_far_from_zero(double: None, scale: float) -> None:
    """The squares of such data are 10¹² times their spread."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            _likelihood(1e6 * scale + scale * z.expand(*z.shape[:-1], 10), x, width=scale)

    x = 1e6 * scale + scale * (torch.randn(40, 1) + torch.randn(40, 10))
    exact = quadrature(model, (x,))
    spread = dist.MultivariateNormal(torch.zeros(10), torch.eye(10) + 1)
    truth = spread.log_prob(x / scale - 1e6) - 10 * torch.tensor(scale).log()
    torch.testing.assert_close(exact.log_evidence, truth, atol=1e-6, rtol=0)


def test_no_more_nodes_than_allowed(double: None) -> None:
    model = random_ppca()
    exact = quadrature(model, (model(None, size=20).detach(),), max_nodes=2304)
    assert max(grid.probability.numel() for grid in exact.grids) <= 2304


def test_blocks_change_nothing(double: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_ppca(6, 2, noise=0.3)
    x = model(None, size=90).detach()
    whole = quadrature(model, (x,))
    monkeypatch.setattr(lattice, "HELD", 32 * 192**2)
    monkeypatch.setattr(lattice, "TOGETHER", 8 * 192**2)
    pieces = quadrature(model, (x,))
    torch.testing.assert_close(whole.log_evidence, pieces.log_evidence)
    torch.testing.assert_close(whole.mean, pieces.mean)
    assert [grid.probability.shape for grid in whole.grids] == [
        grid.probability.shape for grid in pieces.grids
    ]


def test_far_modes_among_many_data(double: None) -> None:
    """Posteriors of two modes, equal and far from each other."""

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


def test_the_decoder_runs_once_a_latent(digits: Any, trained: Pair) -> None:
    """Scoring 300 data at 500 latents decodes 500 rows, and the 300 once to read them."""
    decoded: list[int] = []
    hook = trained.model.decoder.register_forward_hook(
        lambda module, inputs, features: decoded.append(features.shape[:-1].numel())
    )
    target = LogJoint(trained.model, (digits.train[0][:300],))
    decoded.clear()
    with torch.no_grad():
        crossed(target, torch.randn(500, 2))
    hook.remove()
    assert 500 <= sum(decoded) < 820
