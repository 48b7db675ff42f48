"""Diagnostics of a whole pair: truths by quadrature, and answers that say no."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pairs import (
    Pair,
    catalogue_pair,
    conditional_pair,
    guide_of,
    hierarchical_pair,
    mirrored,
    quantized_pair,
    tilted,
    wrong_guide,
)
from pyro_vae.models import PPCA
from pyro_vae.verdict.collapse import linear_collapse
from pyro_vae.verdict.diagnosis import Diagnosis, Estimate
from pyro_vae.verdict.diagnostics import diagnose
from pyro_vae.verdict.kl import multivariate_normal_kl, normal_kl
from truth import assert_z


def _hold(estimate: Estimate | None, truth: Tensor | float) -> None:
    assert estimate is not None
    assert_z(estimate.value, torch.as_tensor(truth), estimate.se)


def _same(estimate: Estimate | None, value: Any, tolerance: float = 1e-5) -> None:
    assert estimate is not None
    assert estimate.value.item() == pytest.approx(float(value), abs=tolerance)


def _gaussian_model(size: int, noise: float = 1.0) -> Callable[[Tensor], None]:
    """A standard Gaussian prior, and x = z + noise."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    return model


class _Quadrature:
    """A mixture of `N` Gaussians of one covariance and a Gaussian prior, on a grid of 1 or 2 d."""

    def __init__(self, means: Tensor, covariance: Tensor, prior: Any) -> None:
        size = means.shape[1]
        axis = torch.linspace(-9, 9, 4001 if size == 1 else 241)
        grid = torch.cartesian_prod(*[axis] * size).reshape(-1, size)
        self.cell = (axis[1] - axis[0]).item() ** size
        self.log_each = dist.MultivariateNormal(means, covariance).log_prob(grid.unsqueeze(1))
        self.log_aggregate = self.log_each.logsumexp(1) - math.log(len(means))
        self.log_prior = prior.log_prob(grid)
        self.square = self.log_aggregate.exp().reshape([len(axis)] * size)
        self.step = (axis[1] - axis[0]).item()

    @property
    def mutual_information(self) -> Tensor:
        ratio = self.log_each - self.log_aggregate.unsqueeze(1)
        return (self.log_each.exp() * ratio).sum(0).mean() * self.cell

    @property
    def marginal_kl(self) -> Tensor:
        return (self.log_aggregate.exp() * (self.log_aggregate - self.log_prior)).sum() * self.cell

    @property
    def total_correlation(self) -> Tensor:
        product = self.square.sum(1, keepdim=True) * self.square.sum(0) * self.cell
        return (self.square * (self.square.log() - product.log())).sum() * self.cell

    def thin_mass(self, thin: float) -> Tensor:
        holes = self.log_aggregate - self.log_prior < -thin
        return self.log_prior[holes].exp().sum() * self.cell


def _standard(size: int) -> Any:
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


@pytest.mark.parametrize("chunk", [200, 2**15])
def test_surgery_of_a_plain_pair_is_that_of_quadrature(double: None, chunk: int) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([-2.0, -1.6, 0.1, 0.2, 0.9, 1.0, 3.0])
    guide = guide_of(lambda x: dist.Normal(0.7 * x, 0.3))
    found = diagnose(model, guide, (x,), draws=600, chunk=chunk, seed=1)
    means = 0.7 * x.unsqueeze(1)
    truth = _Quadrature(means, torch.eye(1) * 0.09, _standard(1))
    _hold(found.surgery.mutual_information, truth.mutual_information)
    _hold(found.surgery.marginal_kl, truth.marginal_kl)
    _hold(found.holes.thin_mass, truth.thin_mass(math.log(100)))
    rate = normal_kl(means, torch.tensor(0.3), torch.zeros(1), torch.ones(1))
    _hold(found.rate, rate.mean())
    _hold(found.rate, truth.mutual_information + truth.marginal_kl)
    distortion = 0.5 * math.log(2 * math.pi * 0.25) + ((0.3 * x).square() + 0.09) / 0.5
    _hold(found.distortion, distortion.mean())
    _hold(found.elbo, -(rate + distortion).mean())
    assert found.units.names == ("z",)
    _same(found.surgery.total_correlation, 0)  # one dimension: no other to depend on


@pytest.fixture
def planar(double: None) -> tuple[Diagnosis, Tensor, _Quadrature]:
    """Nine posteriors in the plane whose means are correlated."""
    x = torch.randn(9, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.5]])
    guide = guide_of(lambda x: dist.Normal(0.8 * x, torch.tensor([0.4, 0.6])).to_event(1))
    truth = _Quadrature(0.8 * x, torch.diag(torch.tensor([0.16, 0.36])), _standard(2))
    return diagnose(_gaussian_model(2), guide, (x,), draws=800, seed=1), x, truth


def test_the_parts_of_the_rate_are_those_of_quadrature(planar: Any) -> None:
    found, _, truth = planar
    surgery = found.surgery
    _hold(surgery.mutual_information, truth.mutual_information)
    _hold(surgery.marginal_kl, truth.marginal_kl)
    _hold(surgery.total_correlation, truth.total_correlation)
    _hold(surgery.dimension_kl, truth.marginal_kl - truth.total_correlation)
    assert truth.total_correlation > 0.1
    parts = surgery.mutual_information.value + surgery.total_correlation.value
    _same(found.rate, parts + surgery.dimension_kl.value)
    _same(surgery.dimension_kl, found.units.marginal_kl.value.sum())


def test_units_are_those_of_the_closed_form(planar: Any) -> None:
    found, x, _ = planar
    units, sd = found.units, torch.tensor([0.4, 0.6])
    means = 0.8 * x
    scalar = normal_kl(means.unsqueeze(-1), sd.unsqueeze(-1), torch.zeros(1), torch.ones(1))
    _hold(units.kl, scalar.mean(0))
    torch.testing.assert_close(units.variance.value, means.var(0))
    assert (units.variance.se == 0).all() and units.active.all() and not units.collapsed.any()
    _hold(units.mean, means.mean(0))
    _hold(units.sd, (means.var(0, correction=0) + sd**2).sqrt())
    _hold(units.prior_mean, torch.zeros(2))
    _hold(units.prior_sd, torch.ones(2))


def test_two_sites_in_either_order_are_conditioned_together(double: None) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)

    def bottom_up(x: Tensor) -> None:  # the exact posterior
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(2 * x / 3, (2 / 3) ** 0.5).to_event(1))
            pyro.sample("z2", dist.Normal(z1 / 2, 0.5**0.5).to_event(1))

    x = torch.tensor([[-3.0], [-1.0], [0.0], [0.5], [4.0]])
    found = diagnose(model, bottom_up, (x,), draws=800, seed=1)
    means = torch.cat([x / 3, 2 * x / 3], dim=1)
    covariance = torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]])
    above = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    prior = dist.MultivariateNormal(torch.zeros(2), above)
    truth = _Quadrature(means, covariance, prior)
    _hold(found.surgery.mutual_information, truth.mutual_information)
    _hold(found.surgery.marginal_kl, truth.marginal_kl)
    _hold(found.rate, multivariate_normal_kl(means, covariance, torch.zeros(2), above).mean())
    evidence = dist.Normal(0.0, 3**0.5).log_prob(x).mean()
    _same(found.elbo, evidence)
    assert found.elbo.se < 1e-12
    units = found.units
    assert units.names == ("z2[0]", "z1[0]") and units.active.all()
    assert units.variance.value[1] == pytest.approx(means[:, 1].var().item())
    assert_z(units.variance.value[0], means[:, 0].var(), units.variance.se[0])
    assert found.surgery.total_correlation is found.surgery.dimension_kl is units.kl is None
    assert units.collapsed is None and "kl" not in found.table


def test_mutual_information_lies_between_nothing_and_log_n() -> None:
    model, x = _gaussian_model(2), torch.randn(30, 2)
    alike = diagnose(model, guide_of(lambda x: dist.Normal(0 * x, 1.0).to_event(1)), (x,))
    for nothing in (alike.surgery.mutual_information, alike.surgery.marginal_kl, alike.rate):
        _same(nothing, 0)
    assert alike.units.collapsed is not None
    assert alike.units.collapsed.all() and not alike.units.active.any()
    assert alike.holes.thin_mass is not None and alike.holes.thin_mass.value == 0
    far = diagnose(model, guide_of(lambda x: dist.Normal(9 * x, 0.01).to_event(1)), (x,))
    _same(far.surgery.mutual_information, math.log(30))
    assert far.units.active.all() and far.holes.thin_mass is not None
    assert far.holes.thin_mass.value > 0.9


def test_a_unit_that_says_the_same_of_every_row_is_inactive_but_costs() -> None:
    guide = guide_of(lambda x: dist.Normal(0 * x + 1, 0.1).to_event(1))
    found = diagnose(_gaussian_model(2), guide, (torch.randn(40, 2),))
    assert not found.units.active.any()
    assert found.units.collapsed is not None and not found.units.collapsed.any()
    _same(found.surgery.marginal_kl, found.rate.value)


def _blind(mean: Tensor, sd: Any) -> Any:
    """A factorised Gaussian that does not know its mean, as a flow does not."""
    base = dist.Normal(torch.zeros_like(mean), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [dist.transforms.AffineTransform(mean, sd, 1)])


@pytest.mark.parametrize("draws", [2, 5])
def test_noise_of_draws_makes_no_unit_active(double: None, draws: int) -> None:
    slope = torch.cat([torch.zeros(20), torch.linspace(0.5, 2, 20)])
    x = torch.randn(300, 40)
    guide = guide_of(lambda x: _blind(slope * x, 1.0))
    units = diagnose(_gaussian_model(40), guide, (x,), draws=draws, seed=1).units
    _hold(units.variance, (slope * x).var(0))
    assert (units.variance.se[:20] > 0).all()
    assert torch.equal(units.active, slope > 0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m, t: (m, 0.2 * t), id="narrow"),
        pytest.param(lambda m, t: (m + 1.0, t), id="shifted"),
        pytest.param(mirrored, id="mirrored"),
    ],
)
def test_the_aggregate_of_a_wrong_guide_is_further_from_the_prior(change: Any) -> None:
    x = tilted()(None, size=500).detach()
    right = diagnose(tilted(), wrong_guide(lambda m, t: (m, t)), (x,), draws=4, seed=1)
    wrong = diagnose(tilted(), wrong_guide(change), (x,), draws=4, seed=1)
    assert right.surgery.marginal_kl is not None and wrong.surgery.marginal_kl is not None
    assert right.surgery.marginal_kl.value < 0.03
    assert wrong.surgery.marginal_kl.value - 5 * wrong.surgery.marginal_kl.se > 0.06
    evidence = tilted().log_evidence(x).mean().item()
    _same(right.elbo, evidence)
    assert right.elbo.se < 1e-5
    assert evidence - wrong.elbo.value > 5 * wrong.elbo.se
    assert right.surgery.total_correlation is None  # the guide is no product


def _decoder(decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    return model


@pytest.mark.parametrize(
    ("decode", "low", "high"),
    [
        pytest.param(lambda z: 3 * z, 1 - 1e-3, 1 + 1e-3, id="linear"),
        pytest.param(lambda z: (2 * z).sin(), 1.0, 4.0, id="smooth"),
        pytest.param(lambda z: z + 2 * (z > 0), 30.0, 1e6, id="smooth, with a jump"),
        pytest.param(lambda z: (2 * z).round(), math.inf, math.inf, id="steps"),
        pytest.param(lambda z: 0 * z, 0.0, 0.0, id="constant"),
    ],
)
def test_jumps_tell_steps_from_slopes(decode: Any, low: float, high: float) -> None:
    guide = guide_of(lambda x: dist.Normal(0 * x, 1.0).to_event(1))
    found = diagnose(_decoder(decode), guide, (torch.randn(80, 2),))
    assert found.holes.jumps is not None and found.holes.jumps.shape == (80,)
    assert low <= found.holes.jumps.max() <= high
    assert found.summary()["value"]["jumps_max"] == found.holes.jumps.max()


def _labelled(prior: nn.Module | None, digits: Any) -> Diagnosis:
    batch = digits.test[0][:60], digits.labels["test"][:60].sort().values
    model, guide = conditional_pair(prior)
    return diagnose(model, guide, batch, draws=4, chunk=400)


def test_labels_are_carried_along(digits: Any) -> None:
    found = _labelled(None, digits)
    assert found.surgery.marginal_kl is not None and found.holes.thin_mass is not None
    total = found.surgery.mutual_information.value + found.surgery.marginal_kl.value
    _same(found.rate, total)


def test_where_each_label_has_its_prior_the_marginal_kl_is_not_defined(digits: Any) -> None:
    table = nn.Sequential(pv.networks.OneHot(10), nn.Linear(10, 4))
    found = _labelled(pv.priors.ConditionalNormal(table), digits)
    assert found.surgery.marginal_kl is found.holes.thin_mass is None
    assert found.surgery.total_correlation is found.surgery.dimension_kl is None
    assert 0 <= found.surgery.mutual_information.value <= math.log(60)
    assert found.units.kl is not None
    _same(found.rate, found.units.kl.value.sum())
    assert math.isnan(found.summary()["value"]["marginal_kl"])
    assert "marginal_kl" not in found.table and "–" in repr(found)


@pytest.mark.parametrize(
    ("prior", "guide"),
    [("vamp", "mean-field"), ("mixture", "full"), ("standard", "flow"), ("flow", "local"), ("standard", "refined")],
)  # fmt: skip
def test_the_catalogue(prior: str, guide: str, digits: Any) -> None:
    x = digits.test[0][:12]
    pair = catalogue_pair(x, prior, guide)
    found = diagnose(pair.model, pair.guide, (x,), draws=3, chunk=100)
    surgery = found.surgery
    assert surgery.marginal_kl is not None and torch.isfinite(surgery.marginal_kl.value)
    total = surgery.mutual_information.value + surgery.marginal_kl.value
    _same(found.rate, total, 1e-4)
    assert (surgery.total_correlation is not None) == (guide == "refined")


@pytest.mark.parametrize("build", [hierarchical_pair, lambda x: quantized_pair()])
def test_hierarchies_and_codes(build: Callable[[Tensor], Pair], digits: Any) -> None:
    x = digits.test[0][:12]
    pair = build(x)
    found = diagnose(pair.model, pair.guide, (x,), draws=3)
    information = found.surgery.mutual_information
    assert -4 * information.se <= information.value <= math.log(12) + 1e-6
    assert torch.isfinite(found.rate.value) and found.holes.jumps is not None


def test_supports_that_do_not_overlap_are_told_apart() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 10.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = diagnose(model, guide_of(lambda x: dist.Uniform(x, x + 1)), (torch.arange(9.0),))
    _same(found.surgery.mutual_information, math.log(9))
    _hold(found.holes.thin_mass, 0.1)


def test_where_no_row_has_support_the_prior_is_thin() -> None:
    guide = guide_of(lambda x: dist.LogNormal(x, 1.0).to_event(1))
    found = diagnose(_gaussian_model(1), guide, (torch.randn(200, 1),), seed=1)
    assert found.holes.thin_mass is not None and 0.45 < found.holes.thin_mass.value < 0.6


def test_memory_is_bounded_and_the_random_state_kept() -> None:
    largest = 0

    def guide(x: Tensor) -> None:
        nonlocal largest
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))
        largest = max(largest, z[..., 0].numel())

    x, before = torch.randn(100, 2), torch.get_rng_state()
    first = diagnose(_gaussian_model(2), guide, (x,), draws=5, chunk=300)
    assert largest <= 300
    assert torch.equal(torch.get_rng_state(), before)
    again = diagnose(_gaussian_model(2), guide, (x,), draws=5, chunk=300)
    other = diagnose(_gaussian_model(2), guide, (x,), draws=5, chunk=300, seed=1)
    assert first.rate.value == again.rate.value != other.rate.value


def test_it_prints_a_summary_and_a_table() -> None:
    guide = guide_of(lambda x: dist.Normal(x / 2, 0.7).to_event(1))
    found = diagnose(_gaussian_model(2), guide, (torch.randn(50, 2),))
    assert found.table.index.tolist() == ["z[0]", "z[1]"]
    assert {"variance", "variance_se", "kl", "active", "collapsed"} <= set(found.table.columns)
    summary = found.summary()
    assert summary["value"]["active_units"] == 2
    assert summary["se"]["rate"] == found.rate.se > 0
    assert "mutual_information" in repr(found) and "z[1]" in repr(found)


def _optimum(x: Tensor, latent_dim: int, noise: float) -> PPCA:
    """The linear VAE with fixed noise that maximises the ELBO under its best mean-field guide."""
    model = PPCA(0.5 * torch.randn(x.shape[1], latent_dim), x.mean(0), noise)
    optimizer = torch.optim.LBFGS([model.loading], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        precision = model._precision()
        gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
        value = gap - model.log_evidence(x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    return model


def test_a_linear_vae_has_dead_units_where_the_closed_form_says(double: None) -> None:
    x = torch.randn(300, 6) * torch.tensor([3.0, 2.0, 1.5, 0.8, 0.6, 0.4])
    x = x @ torch.linalg.qr(torch.randn(6, 6)).Q
    eigenvalues, dead = linear_collapse(x, noise=1.0)
    assert dead.tolist() == [False] * 3 + [True] * 3
    model = _optimum(x, 5, noise=1.0)
    strength = model.loading.detach().square().sum(0)
    expected = (eigenvalues[:5] - 1).clamp_min(0)
    torch.testing.assert_close(strength.sort(descending=True).values, expected, atol=1e-3, rtol=0)
    units = diagnose(model, guide_of(model.mean_field_posterior), (x,), draws=20).units
    assert units.collapsed is not None and units.collapsed.sum() == dead[:5].sum()
    assert torch.equal(units.collapsed, strength < 1e-3)
    assert torch.equal(units.active, ~units.collapsed)


def test_maximum_likelihood_has_no_dead_direction_of_its_own(double: None) -> None:
    x = torch.randn(300, 6) * torch.tensor([3.0, 2.0, 1.5, 0.8, 0.6, 0.4])
    model = PPCA.maximum_likelihood(x, 3)
    eigenvalues, dead = linear_collapse(x, model.noise.item())
    assert not dead[:3].any() and dead[-1]
    strength = torch.linalg.svdvals(model.loading.detach()).square()
    torch.testing.assert_close(strength, eigenvalues[:3] - model.noise.detach() ** 2)


def _any(value: Any) -> Any:
    return value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g: diagnose(m, g, (torch.zeros(1, 2),)), "so little"),
        (lambda m, g: diagnose(m, g, (torch.zeros(3, 2),), draws=1), "draws >= 2"),
        (lambda m, g: diagnose(m, g, (torch.zeros(3, 2),), chunk=0), "chunk >= 1"),
        (lambda m, g: diagnose(m, g, _any(torch.zeros(3, 2))), "no tuple of tensors"),
        (lambda m, g: diagnose(m, m, (torch.zeros(3, 3),)), "shape"),
        (lambda m, g: linear_collapse(torch.zeros(3), 1.0), r"\(N, D\)"),
        (lambda m, g: linear_collapse(torch.zeros(1, 3), 1.0), "N >= 2"),
        (lambda m, g: linear_collapse(torch.zeros(3, 3), 0.0), "noise > 0"),
        (lambda m, g: linear_collapse(torch.full((3, 3), torch.nan), 1.0), "NaN"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    guide = guide_of(lambda x: dist.Normal(x / 2, 0.7).to_event(1))
    with pytest.raises(ValueError, match=message):
        call(_gaussian_model(2), guide)
