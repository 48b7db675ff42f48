"""Guides beyond the amortized Gaussians: densities, lookups, steps, corruption."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pairs import GUIDES, Pair, catalogue_pair, digits_pair, random_ppca
from pyro_vae.guides import CorruptedGuide, FlowGuide, NormalGuide, RefinedGuide, Table
from pyro_vae.guides.corrupted import gaussian, masking
from pyro_vae.posterior import quadrature
from pyro_vae.svi.objectives import AnalyticELBO
from truth import assert_drawn_from, assert_z


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_a_flow_integrates_to_one_and_samples_itself_for_each_datum(latent_dim: int) -> None:
    guide = FlowGuide(pv.networks.MLP(6, 16, FlowGuide.features(latent_dim)), latent_dim)
    with torch.no_grad():
        x = 3 * torch.randn(2, 6)
        q: Any = guide.posterior(x)
        line = torch.linspace(-15, 15, 3001 if latent_dim == 1 else 801)
        grid = torch.cartesian_prod(*[line] * latent_dim).reshape(-1, 1, latent_dim)
        total = q.log_prob(grid).exp().sum(0) * (line[1] - line[0]) ** latent_dim
        torch.testing.assert_close(total, torch.ones(2), atol=5e-3, rtol=0)
        z = q.sample(torch.Size([10_000]))
        first, second = (guide.posterior(row) for row in x)
        assert_drawn_from(z[:, 0], first.log_prob)
        assert_drawn_from(z[:, 1], second.log_prob)
        with pytest.raises(AssertionError, match="over"):
            assert_drawn_from(z[:, 0], second.log_prob)


def test_a_flow_reads_its_features() -> None:
    with pytest.raises(ValueError, match=r"FlowGuide of 2 latents wants 12 features.*got 4"):
        FlowGuide(nn.Linear(6, 4), 2).posterior(torch.zeros(3, 6))


def test_a_table_finds_its_rows_in_any_order(digits: Any) -> None:
    (x,) = digits.train
    table = Table(x, 3)
    with torch.no_grad():
        table.parameters_of.copy_(torch.arange(float(len(x)))[:, None].expand(-1, 3))
    order = torch.randperm(len(x))
    found = table(x[order])[:, 0].long()
    assert torch.equal(x[found], x[order]), "the row that was found is the row, or its equal"
    assert (found == order).float().mean() > 0.9
    assert torch.equal(table(-0.0 * x[:1] + x[:1]), table(x[:1]))
    with pytest.raises(ValueError, match=r"start must give 4 features.*got \(20, 6\)"):
        Table(x[:20], 4, start=nn.Linear(64, 6))
    assert Table((4 * x[:5]).long(), 3)((4 * x[:5]).long()).shape == (5, 3)
    with pytest.raises(ValueError, match=r"1 of 3 rows are not in the table, the first \[1\]"):
        table(torch.stack([x[0], x[0] + 0.25, x[1]]))


def test_a_table_starts_from_an_encoder_and_goes_through_state_dict(digits: Any) -> None:
    x = digits.train[0][:20]
    encoder = pv.networks.MLP(64, 4)
    table = Table(x, 4, start=encoder)
    torch.testing.assert_close(table(x), encoder(x))
    other = Table(x, 4)
    other.load_state_dict(table.state_dict())
    torch.testing.assert_close(other(x[5:9]), table(x[5:9]))


def test_local_parameters_find_each_posterior(double: None) -> None:
    model = random_ppca().requires_grad_(False)
    x = model(None, size=30).detach()
    guide = NormalGuide(Table(x, 4))
    objective = AnalyticELBO(draws=16)
    for lr in (0.1, 0.01):
        pv.fit(model, guide, (x,), epochs=150, lr=lr, objective=objective, progress=False)
    best = model.mean_field_posterior(x)
    torch.testing.assert_close(guide.posterior(x).mean, best.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(guide.posterior(x).stddev, best.stddev, atol=0.1, rtol=0)


def test_local_and_refined_guides_close_part_of_the_amortization_gap(
    trained: Pair, digits: Any
) -> None:
    x = digits.test[0][:32]
    exact = quadrature(trained.model, (x,)).log_evidence
    gaps: dict[str, Any] = {}
    local = NormalGuide(Table(x, 4, start=trained.guide.encoder))
    frozen_model = trained.model.requires_grad_(False)
    try:
        pv.fit(frozen_model, local, (x,), epochs=200, lr=2e-2, batch_size=32, progress=False)
    finally:
        trained.model.requires_grad_(True)
    refined = RefinedGuide(trained.guide, trained.model, steps=60)
    for name, guide in (("amortized", trained.guide), ("local", local), ("refined", refined)):
        found = pv.bounds(trained.model, guide, (x,), draws=2000)
        gaps[name] = (exact - found.elbo).mean(), found.elbo_se.square().mean().sqrt() / 32**0.5
    for name in ("local", "refined"):
        gained = gaps["amortized"][0] - gaps[name][0]
        assert gained > 0.2 * gaps["amortized"][0] + 4 * gaps[name][1], gaps
        assert gaps[name][0] > 0, "the approximation gap of the family remains"


def test_refinement_leaves_the_world_alone(trained: Pair, digits: Any) -> None:
    x = digits.test[0][:4]
    refined = RefinedGuide(trained.guide, trained.model, steps=2)
    before, state = torch.get_rng_state(), trained.model.decoder[0].weight.detach().clone()
    trace = poutine.trace(lambda: refined.posterior(x)).get_trace()
    assert list(trace.nodes) == ["_INPUT", "_RETURN"], "the model's sites stay inside"
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(trained.model.decoder[0].weight, state)
    assert all(p.requires_grad for part in trained for p in part.parameters())
    assert {id(p) for p in refined.parameters()} == {id(p) for p in trained.guide.parameters()}
    with pytest.raises(ValueError, match="steps and draws must be >= 1"):
        RefinedGuide(trained.guide, trained.model, steps=0)


@pytest.mark.parametrize("family", ["mean-field", "full", "flow"])
def test_what_is_refined_does_not_depend_on_its_neighbours(family: str, digits: Any) -> None:
    x = digits.train[0][:50]
    guide = GUIDES[family](x, 2)
    model = digits_pair().model
    refined = pv.guides.RefinedGuide(guide, model, steps=3)
    z = torch.randn(2)
    together = refined.posterior(x[:5]).log_prob(z)
    alone = refined.posterior(x[3:4]).log_prob(z)
    torch.testing.assert_close(together[3:4], alone)
    assert (together - guide.posterior(x[:5]).log_prob(z)).abs().min() > 1e-4


def test_refinement_in_many_dimensions_has_points_for_every_scale() -> None:
    """With fewer points than dimensions a full covariance grows where no point looks."""
    torch.manual_seed(0)
    model = random_ppca(observed=30, latent_dim=20, noise=1.0)
    x = model(None, size=4).detach()
    kind = pv.guides.MultivariateNormalGuide
    encoder = nn.Linear(30, kind.features(20))
    nn.init.normal_(encoder.weight, std=1e-3)
    nn.init.zeros_(encoder.bias)
    found = [
        (model.log_evidence(x) - pv.bounds(model, guide, (x,)).elbo).mean()
        for guide in (RefinedGuide(kind(encoder), model, steps=steps) for steps in (50, 300))
    ]
    assert found[1] < found[0] and found[1] < 1.0, found


def test_corruption_is_for_training_only(digits: Any) -> None:
    x = digits.train[0][:8]
    model, guide = digits_pair()
    noisy = CorruptedGuide(guide, masking(0.5))
    torch.manual_seed(0)
    assert not torch.equal(noisy(x), guide(x))
    noisy.eval()
    torch.manual_seed(0)
    clean = noisy(x)
    torch.manual_seed(0)
    assert torch.equal(clean, guide(x))
    noisy.train()
    one = pv.bounds(model, noisy, (x,)).elbo
    assert torch.equal(one, pv.bounds(model, guide, (x,)).elbo), "bounds see the clean encoder"
    assert noisy.training


def test_corruptions_do_what_they_say() -> None:
    x = torch.ones(10_000)
    share = (masking(0.3)(x) == 0).float().mean()
    assert_z(share, torch.tensor(0.3), torch.tensor((0.3 * 0.7 / 10_000) ** 0.5))
    assert_z(gaussian(0.5)(x).mean(), torch.tensor(1.0), torch.tensor(0.5 / 100))
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="probability"):
            masking(bad)
    with pytest.raises(ValueError, match="sd"):
        gaussian(-1.0)


def test_a_delta_is_a_point(digits: Any) -> None:
    guide = pv.guides.DeltaGuide(pv.networks.MLP(64, 3))
    x = digits.train[0][:5]
    assert torch.equal(guide(x), guide.encoder(x))
    assert isinstance(guide.posterior(x), dist.Delta)


def test_a_right_guide_of_every_family_is_trusted(digits: Any) -> None:
    """On a model with nearly Gaussian posteriors each continuous family reaches the exact one."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    model = pv.models.PPCA(torch.eye(6, 2), torch.zeros(6), noise=1.0).requires_grad_(False)
    for guide in (
        NormalGuide(pv.networks.MLP(6, 4)),
        pv.guides.MultivariateNormalGuide(pv.networks.MLP(6, 5)),
        FlowGuide(pv.networks.MLP(6, 12), 2, hidden=(16,)),
    ):
        for lr in (2e-2, 2e-3):
            pv.fit(model, guide, (x,), epochs=120, lr=lr, batch_size=64, progress=False)
        table = pv.compare(model, guide, (x[:8],), search=0, progress=False).table
        assert (table["why"] == "").sum() >= 7, f"{type(guide).__name__}:\n{table}"


def test_a_catalogue_pair_can_be_refined_inside_many_draws(digits: Any) -> None:
    x = digits.test[0][:3]
    pair = catalogue_pair(x, "mixture", "refined")
    assert pv.bounds(*pair, (x,), draws=30).elbo.shape == (3,)
