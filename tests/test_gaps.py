"""The inference gap and its two parts, against closed forms and quadrature."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pairs import Pair, guide_of, hierarchical_pair, random_ppca
from pyro_vae.models import PPCA
from pyro_vae.posterior import quadrature
from pyro_vae.verdict.family import family_of
from pyro_vae.verdict.gaps import gaps
from pyro_vae.verdict.kl import multivariate_normal_kl
from truth import assert_z

quiet = partial(gaps, progress=False, steps=320, evaluation_draws=600)


def _full(model: PPCA, shift: float, scale: float) -> Any:
    """The exact posterior, moved by `shift` of its sd and `scale` times as wide."""

    def posterior(x: Tensor) -> Any:
        right: Any = model.posterior(x)
        tril = right.scale_tril
        return dist.MultivariateNormal(right.mean + shift * tril.sum(-1), scale_tril=scale * tril)

    return guide_of(posterior)


def _mean_field(model: PPCA, shift: float, scale: float) -> Any:
    def posterior(x: Tensor) -> Any:
        best: Any = model.mean_field_posterior(x)
        location, sd = best.mean, best.base_dist.scale
        return dist.Normal(location + shift * sd, scale * sd).to_event(1)

    return guide_of(posterior)


def _mean_field_gap(model: PPCA) -> Tensor:
    precision = model._precision().detach()
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 0.2), (3.0, 1.0), (0.0, 5.0)])
def test_a_family_that_holds_the_posterior_has_no_approximation_gap(
    double: None, shift: float, scale: float
) -> None:
    model = random_ppca(latent_dim=3)
    x = model(None, size=8).detach()
    evidence = model.log_evidence(x).detach()
    found = quiet(model, _full(model, shift, scale), (x,), log_evidence=evidence, steps=640)
    assert found.settled.all() and found.approximation.abs().max() < 1e-3
    assert (found.amortization > 5 * found.amortization_se).all()


@pytest.mark.parametrize(("latent_dim", "shift", "scale"), [(2, 4.0, 0.3), (20, -2.0, 2.0)])
def test_the_gaps_of_mean_field_are_those_of_the_closed_form(
    double: None, latent_dim: int, shift: float, scale: float
) -> None:
    model = random_ppca(observed=2 * latent_dim, latent_dim=latent_dim)
    x = model(None, size=8).detach()
    evidence = model.log_evidence(x).detach()
    guide = _mean_field(model, shift, scale)
    found = quiet(model, guide, (x,), log_evidence=evidence)
    assert found.settled.all()
    truth = _mean_field_gap(model)
    assert_z(found.approximation, truth, found.approximation_se)

    right: Any = model.posterior(x)
    best: Any = model.mean_field_posterior(x)
    sd = best.base_dist.scale
    covariance = torch.diag_embed((scale * sd).square())
    exact = right.mean, right.covariance_matrix
    kl = multivariate_normal_kl(best.mean + shift * sd, covariance, *exact).detach()
    assert_z(found.inference, kl, found.inference_se)
    assert_z(found.amortization, kl - truth, found.amortization_se)
    torch.testing.assert_close(found.inference, found.approximation + found.amortization)


def test_an_optimal_guide_has_no_amortization_gap(double: None) -> None:
    loading = torch.tensor([[2.0, 2.0], [0.9, 0.0], [0.0, 0.9]])
    model = PPCA(loading, torch.zeros(3), noise=1.0)
    x = model(None, size=30).detach()
    evidence = model.log_evidence(x).detach()
    found = quiet(model, _mean_field(model, 0.0, 1.0), (x,), log_evidence=evidence, steps=200)
    moved = found.amortization_se > 0
    assert (found.amortization[~moved] == 0).all() and found.amortization.abs().max() < 0.01
    assert_z(found.amortization[moved], torch.zeros(()), found.amortization_se[moved])
    assert_z(found.approximation, _mean_field_gap(model), found.approximation_se)
    assert (found.amortization_se < 0.5 * found.inference_se).all(), "draws are not paired"


def _folded(x: Tensor) -> None:
    """Two modes, at z and at −z: x[0] sees their square, x[1] faintly their sign."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        mean = torch.cat([z.square(), z], -1)
        noise = torch.tensor([0.2, 1.0])
        pyro.sample("x", dist.Normal(mean, noise).to_event(1), obs=x)


@pytest.mark.parametrize("place", [None, 0.0])
def test_a_guide_at_the_minor_mode_is_the_encoders_fault(
    double: None, monkeypatch: pytest.MonkeyPatch, place: float | None
) -> None:
    wrong = None if place is None else torch.full((3, 1), place)
    search = importlib.import_module("pyro_vae.verdict.gaps")
    monkeypatch.setattr(search, "heaviest", lambda target, draws: wrong)
    x = torch.tensor([[4.0, 2.0], [4.0, -2.0], [2.0, 3.0]])

    def wrong_side(x: Tensor) -> Any:
        mode = -x[:, :1].clamp_min(0.1).sqrt() * x[:, 1:].sign()
        return dist.Normal(mode, 0.05 * torch.ones_like(mode)).to_event(1)

    exact = quadrature(_folded, (x,)).log_evidence
    found = quiet(_folded, guide_of(wrong_side), (x,), log_evidence=exact)
    assert found.inference.min() > 5 and found.approximation.max() < 0.1


class _Bent(pv.guides.NormalGuide):
    """A mean-field Gaussian, bent by a flow that scores what it has drawn alone."""

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        self.flow = dist.transforms.Planar(2)

    def distribution(self, features: Tensor) -> Any:
        return dist.TransformedDistribution(super().distribution(features), [self.flow])


def test_a_family_that_cannot_score_a_given_place() -> None:
    model = random_ppca()
    x = model(None, size=5).detach()
    guide = _Bent(pv.networks.MLP(6, 4))
    found = quiet(model, guide, (x,), log_evidence=model.log_evidence(x).detach(), steps=80)
    assert (found.approximation < 0.5 * found.inference).all()


NARROW, BROAD = torch.tensor([2.5, 0.0]), torch.tensor([-1.0, 0.0])


def _needle(x: Tensor) -> None:
    """x[0] sees a needle, which few draws of the prior meet, and a hill beside it."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        needle = 10 * (-(z - NARROW).square().sum(-1) / (2 * 0.1**2)).exp()
        hill = 5 * (-(z - BROAD).square().sum(-1) / (2 * 0.3**2)).exp()
        mean = torch.stack([needle + hill, torch.zeros_like(hill)], -1)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def test_a_mode_that_few_draws_of_the_prior_meet() -> None:
    x = torch.tensor([[10.0, 5.0]]).expand(64, -1)  # no simulated x[1] is as far

    def tells_unless_x1_is_far(x: Tensor) -> Any:
        right = (x[:, :1] > 9) & (x[:, 1:] < 4.5)
        mode = torch.where(right, NARROW, BROAD)
        return dist.Normal(mode, torch.where(right, 0.05, 0.2).expand(mode.shape)).to_event(1)

    exact = quadrature(_needle, (x[:1],)).log_evidence.expand(64)
    found = quiet(_needle, guide_of(tells_unless_x1_is_far), (x,), log_evidence=exact)
    assert found.inference.min() > 3 and found.approximation.max() < 0.5


def test_a_guide_that_knows_its_own_rows_alone() -> None:
    model = random_ppca()
    x = model(None, size=5).detach()
    guide = pv.guides.NormalGuide(pv.guides.Table(x, 4))
    found = quiet(model, guide, (x,), log_evidence=model.log_evidence(x).detach())
    assert_z(found.approximation, _mean_field_gap(model).float(), found.approximation_se)


def _as_full(guide: Any) -> Any:
    """The same answers as members of the larger family."""

    def posterior(x: Tensor) -> Any:
        q = guide.posterior(x)
        return dist.MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev))

    return guide_of(posterior)


def test_a_larger_family_approximates_better(trained: Pair, digits: Any) -> None:
    x = digits.test[0][:8]
    exact = quadrature(trained.model, (x,)).log_evidence
    small, full, refined = (
        quiet(trained.model, guide, (x,), log_evidence=exact, steps=1000, evaluation_draws=8000)
        for guide in (
            trained.guide,
            _as_full(trained.guide),
            pv.guides.RefinedGuide(trained.guide, trained.model, steps=3, draws=8),
        )
    )
    for found in (small, full, refined):
        assert found.settled.all()
        assert (found.approximation > -4 * found.approximation_se).all()
        assert (found.amortization > -4 * found.amortization_se).all()
    error = torch.hypot(small.approximation_se, full.approximation_se)
    assert (full.approximation < small.approximation + 4 * error).all()
    assert full.approximation.mean() < 0.8 * small.approximation.mean()
    assert refined.amortization.mean() < small.amortization.mean()
    error = torch.hypot(small.approximation_se, refined.approximation_se)
    assert_z(small.approximation, refined.approximation, error)


def test_a_flow_is_climbed_through_its_features(trained: Pair, digits: Any) -> None:
    x = digits.test[0][:3]
    exact = quadrature(trained.model, (x,)).log_evidence
    encoder = pv.networks.MLP(64, pv.guides.FlowGuide.features(2))
    guide = pv.guides.FlowGuide(encoder, 2, transforms=1, hidden=(8,))
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    found = quiet(trained.model, guide, (x,), log_evidence=exact, steps=80, draws=16)
    assert (found.approximation < 0.5 * found.amortization).all()
    assert (found.approximation > -4 * found.approximation_se).all()
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in guide.parameters())


def _poisson(x: Tensor) -> None:
    """Two rates with priors of their own, so that the posterior is a product of two Gammas."""
    with pyro.plate("data", len(x)):
        low = pyro.sample("low", dist.Gamma(2.0, 1.0))
        high = pyro.sample("high", dist.Gamma(9.0, 1.0))
        pyro.sample("x", dist.Poisson(torch.stack([low, high], -1)).to_event(1), obs=x)


def _two_gammas(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("high", dist.Gamma(8.0 * torch.ones(len(x)), 1.0))
        pyro.sample("low", dist.Gamma(2.0, 2.0))


def test_several_sites_of_a_plain_pair(double: None) -> None:
    x = torch.tensor([[0.0, 5.0], [3.0, 9.0], [7.0, 20.0]])
    prior = torch.tensor([2.0, 9.0])
    evidence = dist.GammaPoisson(prior, 1.0).log_prob(x).sum(-1)
    found = quiet(_poisson, _two_gammas, (x,), log_evidence=evidence, steps=1200)
    assert found.settled.all()
    assert (found.approximation.abs() < 1e-3 + 4 * found.approximation_se).all()
    kl = [
        torch.distributions.kl_divergence(dist.Gamma(*q), dist.Gamma(x[:, i] + prior[i], 2.0))
        for i, q in enumerate([(2.0, 2.0), (8.0, 1.0)])
    ]
    assert_z(found.amortization, torch.stack(kl).sum(0), found.amortization_se)


LOCATION, SCALE = torch.tensor([[0.3, -2.0], [1.0, 4.0], [0.1, 0.2]]), torch.full((3, 2), 0.7)
TRIL = torch.tensor([[0.8, 0.0], [-0.5, 0.3]])
FAMILIES: dict[str, Callable[[], Any]] = {
    "normal": lambda: dist.Normal(LOCATION, 0.5).to_event(1),
    "log-normal": lambda: dist.LogNormal(LOCATION, SCALE).to_event(1),
    "beta": lambda: dist.Beta(SCALE, 2 * SCALE).to_event(1),
    "student": lambda: dist.StudentT(3 + SCALE, LOCATION, SCALE).to_event(1),
    "covariance": lambda: dist.MultivariateNormal(LOCATION, TRIL @ TRIL.mT),
    "precision": lambda: dist.MultivariateNormal(LOCATION, precision_matrix=TRIL @ TRIL.mT),
    "low rank": lambda: dist.LowRankMultivariateNormal(LOCATION, SCALE.unsqueeze(-1), SCALE),
    "mixture": lambda: dist.MixtureOfDiagNormals(LOCATION.expand(3, 3, 2), torch.ones(3, 3, 2), LOCATION[:, :1].expand(3, 3)),
    "dirichlet": lambda: dist.Dirichlet(SCALE),
    "transformed": lambda: dist.TransformedDistribution(dist.Normal(LOCATION, SCALE), [dist.transforms.SigmoidTransform()]).to_event(1),
    "expanded": lambda: dist.ExpandedDistribution(dist.Gamma(2.0, 3.0), torch.Size([3])),
    "masked": lambda: dist.Normal(LOCATION, SCALE).to_event(1).mask(torch.tensor([True, False, True])),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_taken_apart_and_put_together(name: str) -> None:
    x = torch.zeros(3, 2)
    family = family_of(guide_of(lambda x: FAMILIES[name]()), (x,))
    original, member = FAMILIES[name](), family.member(family.start)["z"]
    z = original.expand((5, 3)).sample()
    torch.testing.assert_close(member.log_prob(z), original.log_prob(z), rtol=1e-4, atol=1e-4)
    other = family.member(family.start + 0.1)["z"]
    assert not torch.allclose(other.log_prob(z), original.log_prob(z))
    assert family.unit(family.start, 8).shape == family.start.shape


def _offset_normal(x: Tensor) -> Any:
    shifted = [dist.transforms.AffineTransform(x, torch.ones(2))]
    return dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), shifted).to_event(1)


def _mixture(x: Tensor) -> Any:
    weights = dist.Categorical(torch.ones(len(x), 2))
    parts = dist.Normal(x.unsqueeze(1).expand(-1, 2, -1), 1.0).to_event(1)
    return dist.MixtureSameFamily(weights, parts)


@pytest.mark.parametrize(
    ("posterior", "message"),
    [
        (lambda x: dist.Delta(x, event_dim=1), r"no best member(.|\n)*Delta"),
        (_mixture, r"no best member(.|\n)*MixtureSameFamily"),
        (_offset_normal, r"cannot be read(.|\n)*TransformedDistribution"),
    ],
    ids=["point", "mixture", "unknown"],
)
def test_families_without_a_best_member_are_refused(posterior: Any, message: str) -> None:
    model = PPCA(torch.eye(2, 2), torch.zeros(2), noise=1.0)
    with pytest.raises(ValueError, match=message):
        quiet(model, guide_of(posterior), (torch.ones(3, 2),), log_evidence=torch.zeros(3))


def test_a_hierarchy_is_refused(digits: Any) -> None:
    x = digits.test[0][:3]
    with pytest.raises(ValueError, match=r"at 'z1' change from draw to draw"):
        quiet(*hierarchical_pair(x), (x,), log_evidence=torch.zeros(3))


@pytest.mark.parametrize(
    "options", [{"steps": 3}, {"lr": 0.0}, {"draws": 0}, {"log_evidence": torch.zeros(4)}], ids=str
)
def test_bad_settings_are_refused(options: dict[str, Any]) -> None:
    model = random_ppca()
    guide = _mean_field(model, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"gaps wants steps|log_evidence is not a figure"):
        quiet(model, guide, (torch.ones(3, 6),), **({"log_evidence": torch.zeros(3)} | options))


def test_a_search_cut_short_says_so() -> None:
    model = random_ppca()
    x = model(None, size=5).detach()
    guide, evidence = _mean_field(model, 30.0, 1.0), model.log_evidence(x).detach()
    assert not quiet(model, guide, (x,), log_evidence=evidence, steps=40).settled.any()


def test_chunks_and_seeds() -> None:
    model = random_ppca()
    x = model(None, size=7).detach()
    run = partial(
        quiet, model, _mean_field(model, 1.0, 0.5), (x,),
        log_evidence=model.log_evidence(x).detach(), steps=80, evaluation_draws=500,
    )  # fmt: skip
    state = torch.get_rng_state()
    whole, again, pieces = run(), run(), run(chunk=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole.amortization, again.amortization)
    assert whole.log_weight.shape == (500, 7) and whole.log_weight.dtype == torch.float64
    for name in ("inference", "approximation", "amortization"):
        error = torch.hypot(getattr(whole, f"{name}_se"), getattr(pieces, f"{name}_se"))
        assert_z(getattr(whole, name), getattr(pieces, name), error)
