"""Prior draws that data share find modes that draws of their own miss."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pairs import random_ppca
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import preserved_rng
from pyro_vae.posterior import annealed, convergence, hmc, sandwich, scouts
from pyro_vae.posterior.mixture import Mixture
from pyro_vae.posterior.scouts import heaviest, scouted
from pyro_vae.posterior.tempering import tempered
from truth import assert_z

NOISE = 0.02


def _mirrored(x: Tensor) -> None:
    """Two narrow modes far apart: the sign of the first latent leaves no trace."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        seen = torch.stack([z[..., 0].abs(), z[..., 1]], -1)
        pyro.sample("x", dist.Normal(seen, NOISE).to_event(1), obs=x)


def _of_the_right(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, NOISE).to_event(1))


def _far() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(64, 2, generator=generator) + torch.tensor([1.0, 0.0])


def test_both_modes_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = hmc(_mirrored, (_far(),), guide=_of_the_right, draws=500, progress=False)
    left = (draws["z"][..., :1] < 0).double()
    assert_z(left.flatten(0, 1).mean(0), torch.full((64, 1), 0.5), convergence.mcse_mean(left))
    monkeypatch.setattr(scouts, "LATENTS", 0)
    alone = hmc(_mirrored, (_far(),), guide=_of_the_right, draws=500, progress=False)
    missed = (alone["z"][..., 0] > 0).flatten(0, 1).all(0)
    silent = torch.tensor([not trouble for trouble in alone.trouble])
    assert (missed & silent).sum() > 16


def test_annealing_counts_both_modes() -> None:
    x = _far()
    found = annealed(_mirrored, (x,), guide=_of_the_right, particles=64, progress=False)
    seen = dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(x.double()).sum(-1)
    assert_z(found.log_evidence, seen + torch.tensor(2.0).log(), found.error)


def test_they_know_the_posterior() -> None:
    model = random_ppca(4, 2)
    (x,) = (torch.randn(70, 4),)
    found = scouted(LogJoint(model, (x,)))
    assert found is not None and found.power.eq(1).all()
    mean, covariance = found.mixture.moments()
    exact = model.posterior(x)
    scale = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((mean - exact.mean) / scale).abs().max() < 1
    ratio = covariance.diagonal(dim1=-2, dim2=-1).sqrt() / scale
    assert 0.5 < ratio.min() and ratio.max() < 1.5


def test_they_stay_at_home() -> None:
    def own_place(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=x)

    assert scouted(LogJoint(own_place, (torch.randn(9, 2),))) is None  # priors differ
    assert scouted(LogJoint(random_ppca(6, 4), (torch.randn(9, 6),))) is None  # too many latents


def test_a_datum_without_likelihood_leaves_the_others_alone() -> None:
    x = torch.cat([_far()[:9], torch.full((1, 2), torch.inf)])
    found = scouted(LogJoint(_mirrored, (x,)))
    assert found is not None and all(torch.isfinite(part).all() for part in found.mixture)


def test_the_heaviest_mode_is_named() -> None:
    def tilted(x: Tensor) -> None:
        """Odds of e^x0 for the right mode of two."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor([0.5, 0.0]), 1.0).to_event(1))
            seen = torch.stack([z[..., 0].abs(), z[..., 1]], -1)
            pyro.sample("x", dist.Normal(seen, NOISE).to_event(1), obs=x)

    found = heaviest(LogJoint(tilted, (_far(),)), 32)
    assert found is not None and (found - _far()).abs().max() < 3 * NOISE


def test_a_mixture_beside_another() -> None:
    torch.manual_seed(0)
    one, other = (
        Mixture(torch.zeros(3, 1), torch.randn(3, 1, 2), torch.eye(2).expand(3, 1, 2, 2))
        for _ in range(2)
    )
    share, u = torch.tensor([0.0, 0.3, 1.0]), torch.randn(5, 3, 2)
    both = one.beside(other, share).log_prob(u).exp()
    expected = (1 - share) * one.log_prob(u).exp() + share * other.log_prob(u).exp()
    torch.testing.assert_close(both, expected)


def test_a_narrow_component_beside_a_far_one_is_scored_right() -> None:
    torch.manual_seed(0)
    sds = torch.tensor([1e-3, 1.0])
    far = torch.tensor([[[0.0], [3.0]]])
    mixture = Mixture(torch.full((1, 2), 0.5).log(), far, sds.reshape(1, 2, 1, 1))
    u = 1e-3 * torch.randn(100, 1, 1)
    parts = dist.Normal(far[0, :, 0].double(), sds.double())
    exact = parts.log_prob(u[:, 0].double()).logsumexp(-1) - torch.tensor(2.0).log()
    assert (mixture.log_prob(u)[:, 0] - exact).abs().max() < 1e-5


def test_draws_on_the_border_of_a_support_are_left_out() -> None:
    def edge(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Pareto(1.0, 1e5))  # in float32 some draws are 1
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    target = LogJoint(edge, (torch.ones(64),))
    assert not torch.isfinite(target.prior_draws(1000)).all()
    found = scouted(target)
    assert found is not None and all(torch.isfinite(part).all() for part in found.mixture)


def test_simulated_latents_are_none_of_the_chains_own() -> None:
    model, x = random_ppca(4, 2), torch.zeros(9, 4)
    both = sandwich(model, (x,), particles=2, temperatures=1, progress=False)
    with preserved_rng(0):
        scouts_of_the_first_chunk = LogJoint(model, (x[:1],)).prior_draws(9)
    assert not torch.isin(both.latents["z"], scouts_of_the_first_chunk).any()


def test_the_largest_power_that_leaves_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    log_weight = 10 * torch.randn(1000, 4, generator=generator, dtype=torch.float64)
    log_weight[:, 3] /= 100
    log_weight[::2, 1] = -torch.inf
    power = tempered(log_weight, torch.ones(4).double(), 0.5, 64)
    share = (power * log_weight).softmax(0)
    effective = 1 / share.square().sum(0)
    torch.testing.assert_close(effective[:3], torch.full((3,), 32.0).double(), atol=0.01, rtol=0)
    assert power[3] == 1 and effective[3] > 32
    assert (power[:3] < 1).all()
    seven = torch.full((50, 1), -torch.inf)
    seven[:7] = 0.0
    assert tempered(seven, torch.ones(1), 1.0, 32) == 1
