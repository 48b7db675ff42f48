"""Objectives against hand-computed values, and their gradients against each other."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO
from pyro.optim.optim import PyroOptim
from torch import Tensor, nn

import pyro_vae as pv
from pairs import (
    GUIDES,
    catalogue_pair,
    guide_of,
    hierarchical_pair,
    quantized_pair,
    random_ppca,
)
from pyro_vae.networks import raw_positive
from pyro_vae.pair import log_densities
from pyro_vae.svi.objectives import (
    IWAE,
    AnalyticELBO,
    Beta,
    DReG,
    FreeBits,
    ScoreFunctionELBO,
    gradients,
    warm_up,
)
from pyro_vae.verdict.kl import normal_kl
from truth import assert_z

pytestmark = pytest.mark.usefixtures("double")


def _fixture() -> tuple[Any, Any, Tensor]:
    model = random_ppca()
    guide = pv.guides.NormalGuide(nn.Linear(6, 4))
    return model, guide, model(None, size=7).detach()


def _near_the_optimum(model: Any) -> Any:
    """A linear guide a little off the best mean-field one."""
    guide = pv.guides.NormalGuide(nn.Linear(6, 4))
    precision = model._precision().detach()
    gain = torch.linalg.solve(precision, model.loading.mT.detach()) / model.noise.detach() ** 2
    layer: Any = guide.encoder
    with torch.no_grad():
        layer.weight.copy_(torch.cat([gain, torch.zeros(2, 6)]))
        scale = raw_positive(precision.diagonal().rsqrt())
        layer.bias.copy_(torch.cat([-gain @ model.mean, scale]))
        layer.weight.add_(0.02 * torch.randn(4, 6))
    return guide


def _seeded(objective: Any, *pair: Any) -> Tensor:
    torch.manual_seed(3)
    return objective.differentiable_loss(*pair)


def _log_weights(model: Any, guide: Any, x: Tensor, draws: int) -> Any:
    torch.manual_seed(3)
    return log_densities(model, guide, (x,), draws)


def _subsampled(model: Any, full: int) -> tuple[Any, Any]:
    """The pair of PPCA with a plate of `full` rows of which the batch is a part."""

    def sub_model(x: Tensor) -> None:
        with pyro.plate("data", full, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", model.decode(z), obs=x)

    def sub_guide(x: Tensor) -> None:
        with pyro.plate("data", full, subsample=x):
            pyro.sample("z", model.mean_field_posterior(x))

    return sub_model, sub_guide


def test_iwae_is_the_evidence_under_the_exact_posterior() -> None:
    model, _, x = _fixture()
    for draws in (1, 2, 50):
        for objective in (IWAE(draws), DReG(draws)):
            loss = objective.loss(model, guide_of(model.posterior), x)
            assert loss == pytest.approx(-model.log_evidence(x).sum().item(), abs=1e-9)


def test_iwae_by_hand_also_with_a_subsampled_plate() -> None:
    model, guide, x = _fixture()
    weight = _log_weights(model, guide, x, 5).log_weight
    hand = -(weight.logsumexp(0) - math.log(5)).sum()
    torch.testing.assert_close(_seeded(IWAE(5), model, guide, x), hand)
    torch.testing.assert_close(_seeded(DReG(5), model, guide, x), hand)

    plain = guide_of(model.mean_field_posterior)
    weight = _log_weights(model, plain, x, 5).log_weight
    hand = -(1000 / 7) * (weight.logsumexp(0) - math.log(5)).sum()
    for objective in (IWAE(5), DReG(5)):
        torch.testing.assert_close(_seeded(objective, *_subsampled(model, 1000), x), hand)
    # The bound of 1,000 data lies below their evidence, where the scale inside the weights
    # would put it above.
    evidence = (1000 / 7) * model.log_evidence(x).sum()
    losses = torch.stack(
        [IWAE(200).differentiable_loss(*_subsampled(model, 1000), x) for _ in range(40)]
    )
    assert -losses.mean() < evidence + 3 * losses.std() / 40**0.5


def test_a_common_scale_multiplies_and_unequal_ones_are_refused() -> None:
    model, _, x = _fixture()
    guide = guide_of(model.mean_field_posterior)
    plain = _seeded(IWAE(5), model, guide, x)
    scaled = poutine.scale(model, 0.1), poutine.scale(guide, 0.1)
    for objective in (IWAE(5), DReG(5)):
        torch.testing.assert_close(_seeded(objective, *scaled, x), 0.1 * plain)
        with pytest.raises(ValueError, match="scaled unequally"):
            objective.differentiable_loss(poutine.scale(model, 0.1), guide, x)


def test_bounds_are_ordered_in_k_and_below_the_evidence() -> None:
    model, guide, x = _fixture()
    draws = [1, 5, 50]
    values = {k: torch.tensor([-IWAE(k).loss(model, guide, x) for _ in range(60)]) for k in draws}
    evidence = model.log_evidence(x).sum()
    for low, high in pairwise(draws):
        error = (values[low].var() / 60 + values[high].var() / 60).sqrt()
        assert values[high].mean() > values[low].mean() + 2 * error
    assert values[50].mean() < evidence + 3 * values[50].std() / 60**0.5


def test_beta_and_warm_up_by_hand_also_with_a_subsampled_plate() -> None:
    model, guide, x = _fixture()
    found = _log_weights(model, guide, x, 3)
    for beta in (0.0, 0.3, 1.0, 4.0):
        hand = -(found.likelihood - beta * (found.guide - found.prior)).mean(0).sum()
        torch.testing.assert_close(_seeded(Beta(beta, draws=3), model, guide, x), hand)
    plain = guide_of(model.mean_field_posterior)
    found = _log_weights(model, plain, x, 3)
    hand = -(1000 / 7) * (found.likelihood - 0.3 * (found.guide - found.prior)).mean(0).sum()
    torch.testing.assert_close(_seeded(Beta(0.3, draws=3), *_subsampled(model, 1000), x), hand)

    objective = Beta(warm_up(4))
    for step in range(6):
        found = _log_weights(model, guide, x, 1)
        weight = min(step / 4, 1.0)
        hand = -(found.likelihood - weight * (found.guide - found.prior)).mean(0).sum()
        torch.testing.assert_close(_seeded(objective, model, guide, x), hand)
        objective.loss(model, guide, x)  # an evaluation is no step
    assert objective.step == 6


def test_free_bits_by_hand() -> None:
    model, guide, x = _fixture()
    found = _log_weights(model, guide, x, 4)
    torch.testing.assert_close(
        _seeded(FreeBits(0.0, draws=4), model, guide, x), -found.log_weight.mean(0).sum()
    )
    torch.testing.assert_close(
        _seeded(FreeBits(100.0, draws=4), model, guide, x),
        7 * 2 * 100.0 - found.likelihood.mean(0).sum(),
    )
    with torch.no_grad():
        loss = _seeded(FreeBits(0.2, draws=20_000), model, guide, x)
        q = guide.posterior(x)
        zero, one = torch.zeros(2), torch.ones(2)
        kl = torch.stack(
            [
                normal_kl(q.mean[:, j : j + 1], q.stddev[:, j : j + 1], zero[:1], one[:1]).mean()
                for j in range(2)
            ]
        )
        found = _log_weights(model, guide, x, 20_000)
    hand = 7 * kl.clamp_min(0.2).sum() - found.likelihood.mean(0).sum()
    torch.testing.assert_close(loss, hand, rtol=2e-3, atol=0)
    # Where one side does not factorise, the site counts as one.
    wide = guide_of(model.posterior)
    found = _log_weights(model, wide, x, 4)
    torch.testing.assert_close(
        _seeded(FreeBits(100.0, draws=4), model, wide, x),
        7 * 100.0 - found.likelihood.mean(0).sum(),
    )


def test_the_analytic_elbo_is_the_elbo() -> None:
    model, guide, x = _fixture()
    analytic = torch.tensor([AnalyticELBO(draws=2).loss(model, guide, x) for _ in range(300)])
    sampled = torch.tensor([Trace_ELBO().loss(model, guide, x) for _ in range(2000)])
    error = (analytic.var() / 300 + sampled.var() / 2000).sqrt()
    assert_z(analytic.mean(), sampled.mean(), error)
    found = _log_weights(model, guide, x, 2)
    q = guide.posterior(x)
    kl = normal_kl(q.mean, q.stddev, torch.zeros(2), torch.ones(2)).sum()
    torch.testing.assert_close(
        _seeded(AnalyticELBO(draws=2), model, guide, x), kl - found.likelihood.mean(0).sum()
    )


def test_the_analytic_elbo_is_right_from_the_top_down_and_refused_elsewhere() -> None:
    torch.set_default_dtype(torch.float32)
    x = (torch.rand(20, 64) > 0.5).float()
    pair = hierarchical_pair(x)
    with torch.no_grad():
        analytic = torch.tensor([AnalyticELBO().loss(*pair, x) for _ in range(80)])
        sampled = torch.tensor([Trace_ELBO().loss(*pair, x) for _ in range(80)])
    assert_z(analytic.mean(), sampled.mean(), (analytic.var() / 80 + sampled.var() / 80).sqrt())

    def bottom_up(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"biased for this guide(.*\n)*.*\['z1', 'z2'\]"):
        AnalyticELBO().loss(pair.model, bottom_up, x)
    with pytest.raises(ValueError, match="no closed KL is known at site 'z'"):
        AnalyticELBO().loss(*catalogue_pair(x, "mixture"), x)


def _mean_and_error(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), rows.std(0) / len(rows) ** 0.5


def test_dreg_has_the_gradient_of_iwae_with_less_variance() -> None:
    model, _, x = _fixture()
    guide = _near_the_optimum(model)
    rows = {
        name: gradients(objective, model, guide, (x,), repeats=500)
        for name, objective in (("iwae", IWAE(16)), ("dreg", DReG(16)))
    }
    (mean, error), (other, other_error) = (_mean_and_error(r) for r in rows.values())
    assert_z(mean, other, (error**2 + other_error**2).sqrt())
    assert rows["dreg"].var(0).sum() < 0.5 * rows["iwae"].var(0).sum()
    for p in model.parameters():
        p.grad = None
    DReG(16).loss_and_grads(model, guide, x)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_score_function_has_the_gradient_of_the_elbo_with_far_more_variance() -> None:
    model, guide, x = _fixture()
    rows = {
        name: gradients(objective, model, guide, (x,), repeats=800)
        for name, objective in (
            ("reparameterized", Trace_ELBO()),
            ("analytic KL", AnalyticELBO()),
            ("score function", ScoreFunctionELBO()),
        )
    }
    mean, error = _mean_and_error(rows["reparameterized"])
    for name in ("analytic KL", "score function"):
        other, other_error = _mean_and_error(rows[name])
        assert_z(mean, other, (error**2 + other_error**2).sqrt())
    variance = {name: r.var(0).sum().item() for name, r in rows.items()}
    assert variance["score function"] > 10 * variance["reparameterized"]
    torch.testing.assert_close(
        _seeded(ScoreFunctionELBO(3), model, guide, x),
        -_log_weights(model, guide, x, 3).log_weight.mean(0).sum(),
    )


@pytest.mark.parametrize("guide", GUIDES)
def test_dreg_takes_every_reparameterized_guide(guide: str) -> None:
    torch.set_default_dtype(torch.float32)
    x = (torch.rand(20, 64) > 0.5).float()
    pair = catalogue_pair(x, "vamp" if guide != "local" else "mixture", guide)
    loss = DReG(4)(*pair)(x)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in pair.guide.parameters() if p.grad is not None)


def test_dreg_is_refused_where_it_is_biased() -> None:
    torch.set_default_dtype(torch.float32)
    x = (torch.rand(20, 64) > 0.5).float()
    with pytest.raises(ValueError, match=r"biased for a guide of several(.*\n)*.*z2"):
        DReG(3).differentiable_loss(*hierarchical_pair(x), x)


def test_dreg_has_the_gradient_of_iwae_for_the_model_as_well() -> None:
    model, _, x = _fixture()
    guide = _near_the_optimum(model)
    rows = {}
    for name, objective in (("iwae", IWAE(8)), ("dreg", DReG(8))):
        losses = (objective.differentiable_loss(model, guide, x) for _ in range(400))
        parts = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
        rows[name] = torch.stack([torch.cat([g.flatten() for g in part]) for part in parts])
    (mean, error), (other, other_error) = (_mean_and_error(r) for r in rows.values())
    assert_z(mean, other, (error**2 + other_error**2).sqrt())


@pytest.mark.parametrize(
    "objective", [Beta(1.0), IWAE(1), FreeBits(0.0)], ids=lambda o: type(o).__name__
)
def test_a_factor_of_the_guide_enters_every_objective(objective: Any) -> None:
    torch.set_default_dtype(torch.float32)
    x = (torch.rand(20, 64) > 0.5).float()
    pair = quantized_pair()
    expected = Trace_ELBO().differentiable_loss(*pair, x)
    found = objective.differentiable_loss(*pair, x)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert pair.model.codebook.vectors.grad.abs().sum() > 0


def test_fit_starts_a_warm_up_from_zero() -> None:
    torch.set_default_dtype(torch.float32)
    seen: list[int] = []
    objective = Beta(lambda step: seen.append(step) or 1.0)  # type: ignore[func-returns-value]
    x = (torch.rand(20, 64) > 0.5).float()
    for _ in range(2):
        seen.clear()
        pv.fit(
            *catalogue_pair(x), (x,), objective=objective, epochs=2, batch_size=10, progress=False
        )
        assert seen[-4:] == [0, 1, 2, 3]


def test_free_bits_refuses_masks() -> None:
    model, guide, x = _fixture()
    nothing: Any = torch.tensor(False)
    masked = poutine.mask(model, nothing), poutine.mask(guide, nothing)
    with pytest.raises(ValueError, match="knows no masks"):
        FreeBits(0.1).differentiable_loss(*masked, x)


def test_dreg_wants_reparameterization() -> None:
    model, _, x = _fixture()

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = NonreparameterizedNormal(loc, 1.0).to_event(1)
            pyro.sample("z", z)

    with pytest.raises(ValueError, match="wants a reparameterized guide"):
        DReG(3).differentiable_loss(model, guide, x)
    pyro.clear_param_store()


@pytest.mark.parametrize(
    "objective",
    [IWAE(5), DReG(5), Beta(warm_up(20)), FreeBits(0.1), AnalyticELBO(), AnalyticELBO(draws=3)],
    ids=lambda o: type(o).__name__,
)
def test_stock_svi_and_fit_take_it(objective: Any, digits: Any) -> None:
    torch.set_default_dtype(torch.float32)
    (x,) = digits.train
    pair = catalogue_pair(x)
    svi = SVI(*pair, PyroOptim(torch.optim.Adam, {"lr": 3e-3}), objective)
    losses = [svi.step(x) for _ in range(10)]
    assert losses[-1] < losses[0]
    run = pv.fit(*pair, digits, objective=objective, epochs=3, lr=3e-3, progress=False)
    assert run.epochs[-1].validation_elbo > run.epochs[0].validation_elbo - 1
    assert math.isfinite(svi.evaluate_loss(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: IWAE(0), "draws"),
        (lambda: Beta(-1.0), "beta"),
        (lambda: Beta(float("nan")), "beta"),
        (lambda: FreeBits(-0.1), "nats"),
        (lambda: warm_up(0), "at least one step"),
    ],
    ids=["draws", "beta", "nan", "nats", "steps"],
)
def test_bad_settings(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
