"""Evidence with error bars against closed forms and quadrature, and the sandwich around it."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pairs import Pair, conditional_pair, hierarchical_pair, random_ppca, sparse
from pyro_vae.log_joint import LogJoint
from pyro_vae.posterior import annealed, quadrature, sandwich
from pyro_vae.posterior.path import Base
from truth import assert_z


def test_it_agrees_with_closed_forms() -> None:
    model = random_ppca(20, 3)
    x = model(None, size=256).detach()
    before = torch.get_rng_state()
    found = annealed(model, (x,), particles=128, temperatures=64, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    trusted = found.ess > 20
    assert trusted.float().mean() > 0.9
    truth = model.log_evidence(x).detach().double()
    assert_z(found.log_evidence[trusted], truth[trusted], found.error[trusted])
    ratio = (found.log_evidence - truth).exp()  # E[w] = p(x), whatever the schedule
    assert_z(ratio.mean(), torch.tensor(1.0), ratio.std() / 256**0.5)
    posterior = model.posterior(x)
    error = posterior.variance.detach().sqrt() / found.ess.sqrt().unsqueeze(-1)
    assert ((found.mean - posterior.mean.detach()) / error).abs().mean() < 1.0
    drawn = found.resample(500)
    assert drawn["z"].shape == (1, 500, 256, 3)
    assert ((drawn.mean - found.mean).abs() < 5 * posterior.variance.detach().sqrt() / 20).all()


def test_latents_of_double_precision_keep_it() -> None:
    model = random_ppca(5, 2).double()
    x = model(None, size=8).detach()
    found = annealed(model, (x,), particles=32, temperatures=8, progress=False)
    assert found.draws["z"].dtype == torch.float64
    assert_z(found.log_evidence, model.log_evidence(x).detach(), found.error)


@pytest.mark.filterwarnings("ignore:the density of a latent is infinite")
def test_a_pole_at_a_border() -> None:
    model, counts = sparse(0.05), torch.arange(64.0) % 4
    found = annealed(model, (counts,), progress=False)
    truth = dist.NegativeBinomial(torch.tensor(0.05), probs=torch.tensor(0.5)).log_prob(counts)
    assert_z(found.log_evidence, truth, found.error)
    assert (found.draws["rate"] > 0).all()
    assert torch.isfinite(sandwich(model, (counts,), progress=False).upper).all()


def test_the_prior_stands_in_for_a_guide_only_where_that_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, plain = [], LogJoint.prior_draws

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(10 * y, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1).to_event(1))

    def counted(target: LogJoint, draws: int) -> Tensor:
        drawn.append(draws * len(target.batch[0]))
        return plain(target, draws)

    monkeypatch.setattr(LogJoint, "prior_draws", counted)
    x, y = torch.zeros(9, 4), torch.arange(9.0).unsqueeze(1).expand(-1, 4)
    with pyro.validation_enabled(False):
        Base(LogJoint(model, (x, y)), guide)
        assert sum(drawn) == 9 * 32  # for the prior's scale
        x[4], x[7] = torch.nan, torch.inf
        base = Base(LogJoint(model, (x, y)), guide)
    assert sum(drawn) == 2 * 9 * 32 + 2 * 100
    assert base.guide is not None
    mean = base.guide.sample(1000).mean(0)
    expected = torch.where(torch.isfinite(x), x, 10 * y)
    # nine standard errors of 100 draws of sd 1, then 1,000 of sd 1.5; rows are 10 apart
    torch.testing.assert_close(mean, expected, atol=1.0, rtol=0)


def test_a_chunk_bounds_what_is_scored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scored, plain = random_ppca(6, 4, 0.5), [], LogJoint.parts

    def counted(target: LogJoint, u: Tensor) -> tuple[Tensor, Tensor]:
        scored.append(u.shape[:-1].numel())
        return plain(target, u)

    monkeypatch.setattr(LogJoint, "parts", counted)
    annealed(model, (torch.zeros(30, 6),), particles=4, temperatures=3, chunk=96, progress=False)
    assert max(scored) == 96  # three rows of the 32 particles that tune the path


def test_it_agrees_with_the_grid_on_digits(trained: Pair, digits: Any) -> None:
    x = digits.test[0][:64]
    exact = quadrature(trained.model, (x,)).log_evidence
    for guide in (None, trained.guide):
        found = annealed(trained.model, (x,), guide=guide, particles=128, progress=False)
        trusted = found.ess > 20
        assert trusted.float().mean() > 0.9
        assert_z(found.log_evidence[trusted], exact[trusted], found.error[trusted])


def test_a_kernel_that_takes_everything_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_ppca(20, 3)
    x = model(None, size=256).detach()
    right = torch.rand_like
    monkeypatch.setattr(
        "pyro_vae.posterior.kernels.torch.rand_like", lambda like: right(like) * 1e-30
    )
    truth = model.log_evidence(x).detach().double()
    found = sandwich(model, (x,), progress=False)
    truth = model.log_evidence(found.batch[0]).detach().double()
    down, up = found.lower - truth, found.upper - truth
    with pytest.raises(AssertionError, match="allowed"):
        assert_z(down.exp().mean(), torch.tensor(1.0), down.exp().std() / 16)
        assert_z((-up).exp().mean(), torch.tensor(1.0), (-up).exp().std() / 16)


def test_the_sandwich_holds_the_exact_value(trained: Pair) -> None:
    found = sandwich(trained.model, (torch.zeros(128, 64),), guide=trained.guide, progress=False)
    exact = quadrature(trained.model, found.batch).log_evidence
    assert found.latents["z"].shape == (128, 2)
    assert ((found.lower - exact) < 5 * found.lower_error).all()
    back = (exact - found.upper).exp()  # E = 1 over data drawn with their z*
    assert_z(back.mean(), torch.tensor(1.0), back.std() / 128**0.5)
    assert found.width.abs().mean() < 0.2


def test_the_sandwich_is_thin_in_twenty_dimensions() -> None:
    torch.manual_seed(1)
    model = pv.models.VAE(
        pv.networks.MLP(20, 64, 64),
        prior=pv.priors.StandardNormal(20),
        likelihood=pv.likelihoods.Bernoulli(),
    )
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(6.0)
    batch = (torch.zeros(12, 64),)
    found = sandwich(model, batch, temperatures=96, progress=False)
    assert -0.2 < found.width.mean() < 0.5 and found.width.max() < 1.5
    assert found.gradients.max() < 100_000, "the stated cost of a datum"
    hasty = sandwich(model, batch, temperatures=6, progress=False)
    assert hasty.width.mean() > 1.0, "and it says when it was too fast"


@pytest.mark.parametrize("make", ["hierarchical", "conditional"])
def test_other_pairs(make: str, digits: Any) -> None:
    x, y = digits.test[0][:6], digits.labels["test"][:6]
    hierarchical = make == "hierarchical"
    pair = hierarchical_pair(x) if hierarchical else conditional_pair()
    batch: tuple[Tensor, ...] = (x,) if hierarchical else (x, y)
    found = annealed(pair.model, batch, guide=pair.guide, progress=False)
    exact = quadrature(pair.model, batch).log_evidence
    assert_z(found.log_evidence, exact, found.error)
    assert len(sandwich(pair.model, batch, guide=pair.guide, progress=False).batch) == len(batch)


def test_what_has_no_likelihood_is_named_by_minus_infinity() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    found = annealed(model, (torch.tensor([0.5, 60.0]),), progress=False)
    assert found.log_evidence[1] == -torch.inf and torch.isfinite(found.log_evidence[0])
    with pytest.raises(ValueError, match="particles >= 2 and temperatures >= 1"):
        annealed(model, (torch.zeros(1),), particles=1)
