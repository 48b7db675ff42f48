"""Bounds in their order, and a verdict that says yes to right guides and no to wrong ones."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import arviz
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pairs import (
    Pair,
    catalogue_pair,
    digits_pair,
    guide_of,
    mirrored,
    tilted,
    two_levels,
    wrong_guide,
)
from pyro_vae.models import PPCA
from pyro_vae.posterior import quadrature
from pyro_vae.verdict.bounds import bounds, pareto_khat
from truth import assert_z


def _psislw(log_weight: np.ndarray) -> np.ndarray:
    if int(arviz.__version__.split(".")[0]) < 1:
        return np.asarray(arviz.psislw(log_weight)[1])
    from arviz_stats.base import array_stats

    return np.asarray(array_stats.psislw(-log_weight, axis=-1)[1])  # of log likelihoods there


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.5, 0.9])
def test_khat_is_that_of_arviz_and_of_theory(double: None, shape: float) -> None:
    uniform = torch.rand(4000, 40)
    log_weight = ((uniform.pow(-shape) - 1) / shape).log()
    k = pareto_khat(log_weight)
    # ArviZ 1 draws the line of the tail elsewhere by a few weights; k itself has an sd of 0.06.
    np.testing.assert_allclose(k.numpy(), _psislw(log_weight.T.numpy()), atol=0.04)
    # The weak prior of the fit pulls k towards 0.5 by a twentieth of the way.
    count = math.ceil(3 * 4000**0.5)
    assert_z(k.mean(), torch.tensor((shape * count + 5) / (count + 10)), k.std() / 40**0.5)


def test_khat_of_equal_weights_says_nothing_is_wrong() -> None:
    assert pareto_khat(torch.zeros(1000, 2)).tolist() == [-torch.inf] * 2
    with pytest.raises(ValueError, match="at least 25 draws"):
        pareto_khat(torch.zeros(24, 2))


def test_bounds_are_ordered_and_below_the_evidence(trained: Pair, digits: Any) -> None:
    x = digits.test[0][:32]
    exact = quadrature(trained.model, (x,)).log_evidence
    found = bounds(trained.model, trained.guide, (x,), draws=2000)
    assert found.elbo.shape == (32,) and found.draws["z"].shape == (1, 1000, 32, 2)
    assert (found.elbo < found.iwae).all()
    gap = (found.iwae - exact) / found.iwae_se
    usable = found.khat < 0.5
    assert usable.any()
    assert_z(found.iwae[usable], exact[usable], found.iwae_se[usable])
    assert (gap < 5).all()
    assert (exact - found.elbo > -4 * found.elbo_se).all()
    assert ((found.ess >= 1) & (found.ess <= 2000)).all()


def test_bounds_in_chunks_are_the_same_draws_of_another_order(trained: Pair, digits: Any) -> None:
    x = digits.test[0][:10]
    whole = bounds(trained.model, trained.guide, (x,), draws=1000)
    pieces = bounds(trained.model, trained.guide, (x,), draws=1000, chunk=3000)
    assert_z(whole.elbo, pieces.elbo, (whole.elbo_se**2 + pieces.elbo_se**2).sqrt())
    with pytest.raises(ValueError, match="at least 2 draws"):
        bounds(trained.model, trained.guide, (x,), draws=1)


@pytest.mark.parametrize("chunk", [400, 2500])
@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_compiled_bounds_are_the_same_draws(prior: str, chunk: int) -> None:
    """Rows and draws that no chunk divides: 2 of 5 rows at once, 334 of 1,000 draws."""
    x = (torch.rand(40, 64) > 0.5).float()
    pair = catalogue_pair(x, prior)
    plain, fast = (
        bounds(*pair, (x[:5],), draws=1000, keep=600, chunk=chunk, compile=way)
        for way in (False, True)
    )
    torch.testing.assert_close(plain.draws["z"], fast.draws["z"])
    torch.testing.assert_close(plain.iwae, fast.iwae)
    torch.testing.assert_close(plain.ess, fast.ess, rtol=1e-3, atol=0)
    assert fast.elbo.shape == (5,) and fast.draws["z"].shape == (1, 600, 5, 2)
    assert pair.model.training and pair.guide.training


def test_draws_in_chunks_are_as_many_and_unlike() -> None:
    x = torch.zeros(2, 64)
    found = bounds(*digits_pair(), (x,), draws=100, chunk=35)
    z = found.draws["z"]
    assert z.shape == (1, 100, 2, 2) and len(z.reshape(-1, 2).unique(dim=0)) == 200
    assert bounds(*digits_pair(), (x,), draws=100, keep=0).draws["z"].shape == (1, 0, 2, 2)


def test_bounds_leave_nothing_behind_with_each_row() -> None:
    """Small results among large temporaries split the heap: 13 GiB over 10,000 rows of 784."""
    alive = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(sum(type(thing) is Tensor for thing in gc.get_objects()))
            return super().forward(x)

    model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
    guide = pv.guides.NormalGuide(Counting(3, 4))
    bounds(model, guide, (torch.zeros(40, 3),), draws=30, chunk=30)
    assert len(alive) > 40 and alive[-1] <= alive[-30]


def test_a_pair_that_cannot_be_recorded_is_not_compiled() -> None:
    exact = tilted()
    x = exact(None, size=3).detach()

    def posterior(x: Tensor) -> Any:
        found: Any = exact.posterior(x)
        return found if found.mean.sum() > -torch.inf else None

    plain = bounds(exact, guide_of(posterior), (x,))
    with pytest.warns(UserWarning, match="not compiled"):
        assert torch.equal(bounds(exact, guide_of(posterior), (x,), compile=True).elbo, plain.elbo)


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        pytest.param(lambda m, t: (m, t), set(), id="exact"),
        pytest.param(
            lambda m, t: (m, 0.4 * t),
            {"too narrow", "high KL", "encoder off", "heavy weights"},
            id="narrow",
        ),
        pytest.param(lambda m, t: (m, 2.0 * t), {"too wide", "high KL"}, id="wide"),
        pytest.param(lambda m, t: (m + t.sum(-1), t), {"mean off", "high KL"}, id="shifted"),
        pytest.param(mirrored, {"high KL"}, id="mirrored"),
        pytest.param(lambda m, t: (-m, t), {"mean off", "high KL"}, id="reversed"),
    ],
)
def test_the_verdict_says_no_to_wrong_guides(change: Any, reasons: set[str]) -> None:
    x = 2.0 + tilted()(None, size=20).detach()
    table = pv.compare(tilted(), wrong_guide(change), (x,), mcmc_draws=200, progress=False).table
    given = [set(why.split(", ")) - {""} for why in table["why"]]
    if not reasons:
        assert given == [set()] * 20
    else:
        told = sum(reasons <= why for why in given)
        assert told >= 18, f"{reasons} told for {told} of 20 data: {given}"


@pytest.fixture(scope="module")
def verdict(trained: Pair, digits: Any) -> Any:
    batch = (digits.test[0][:8],)
    return pv.compare(*trained, batch, progress=False)


def test_the_table_holds_the_identity_and_the_witness(verdict: Any) -> None:
    table = verdict.table
    assert len(table) == 8
    np.testing.assert_allclose(table["log_evidence"] - table["elbo"], table["kl"])
    assert (table["kl"] > -2 * table["kl_se"]).all()
    assert (table["approximation"] + table["amortization"] - table["kl"]).abs().max() < 0.2
    assert (table["amortization"] > -0.05).all() and (table["approximation"] > -0.05).all()
    assert (table["mcmc_mean_error"].abs() < 5 * table["mcmc_mcse"]).all()
    assert "quadrature, as there are 2" in verdict.rung
    summary = verdict.summary()
    assert summary.index.tolist() == ["guide", "MCMC"]
    assert summary.loc["MCMC", "mean_error"] < 0.2 * summary.loc["guide", "mean_error"]
    assert summary.loc["guide", "kl"] == pytest.approx(table["kl"].mean())
    assert summary.loc["guide", "trusted"] == (table["why"] == "").mean()


def test_it_prints_and_saves(verdict: Any, tmp_path: Path) -> None:
    text = repr(verdict)
    assert "log p(x)" in text and "pooled" in text and "MCMC" in text and "truth: " in text
    verdict.save(tmp_path / "new" / "folder")
    saved = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    tables = {"table.csv", "summary.csv", "distances.csv"}
    assert saved == tables | {"guide.nc", "exact.nc", "mcmc.nc"}
    table = pd.read_csv(tmp_path / "new" / "folder" / "table.csv", index_col="datum")
    np.testing.assert_allclose(table["kl"], verdict.table["kl"], rtol=1e-4)
    draws = arviz.from_netcdf(str(tmp_path / "new" / "folder" / "mcmc.nc"))
    assert draws["posterior"]["z"].shape == (4, 1000, 8, 2)


@pytest.mark.parametrize("image_shape", [None, (8, 8)])
def test_it_draws(verdict: Any, image_shape: Any, tmp_path: Path) -> None:
    figure = verdict.plot(image_shape)
    assert len(figure.axes) == (6 if image_shape is None else 18)
    figure.savefig(tmp_path / "panels.png")


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_other_dimensions(latent_dim: int, digits: Any) -> None:
    pair = digits_pair(pv.guides.MultivariateNormalGuide, latent_dim)
    verdict = pv.compare(*pair, (digits.test[0][:2],), search=0, progress=False)
    assert len(verdict.table) == 2 and len(verdict.plot().axes) == 2


def test_above_three_dimensions_the_next_rung_stands_in(tmp_path: Path) -> None:
    """Six dimensions, closed forms as truth for the rung itself."""
    model = PPCA(torch.randn(20, 6), torch.zeros(20), noise=0.7)
    x = model(None, size=12).detach()
    verdict = pv.compare(model, guide_of(model.posterior), (x,), search=0, progress=False)
    assert verdict.exact is None and "annealed importance sampling" in verdict.rung
    table = verdict.table
    truth = model.log_evidence(x).detach().double()
    log_evidence, error = (
        torch.tensor(table[c].values) for c in ("log_evidence", "log_evidence_se")
    )
    assert_z(log_evidence, truth, error)
    assert table["guide_mean_error"].abs().max() < 0.15 and (table["why"] == "").sum() >= 10
    narrow = guide_of(lambda x: dist.MultivariateNormal(
        model.posterior(x).mean, scale_tril=0.4 * model.posterior(x).scale_tril))  # fmt: skip
    refused = pv.compare(model, narrow, (x,), search=0, progress=False)
    assert refused.table["why"].str.contains("too narrow").all()
    assert refused.distances["c2st"].min() > refused.distances["c2st_zero"].max()
    assert len(refused.plot().axes) == 6
    refused.save(tmp_path)
    assert not (tmp_path / "exact.nc").exists()


def test_data_whose_chains_failed_are_not_pooled(verdict: Any) -> None:
    sites = {"z": verdict.mcmc["z"].clone()}
    sites["z"][0, :, 3] += 50
    broken = replace(verdict, mcmc=replace(verdict.mcmc, sites=sites))
    assert "R-hat" in broken.table["mcmc_trouble"][3]
    assert broken.summary().loc["MCMC", "data"] == verdict.summary().loc["MCMC", "data"] - 1
    assert broken.summary().loc["MCMC", "mean_error"] < 0.1
    alone = replace(broken, exact=None, annealed=_Evidence(verdict.exact.log_evidence))
    assert "reference in doubt" in alone.table["why"][3]


class _Evidence(NamedTuple):
    log_evidence: Tensor

    @property
    def error(self) -> Tensor:
        return torch.zeros_like(self.log_evidence)


def _bottom_up(x: Tensor) -> None:
    """Its exact posterior, sampled in the other order."""
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal((2 * x + 3) / 3, (2 / 3) ** 0.5).to_event(1))
        pyro.sample("z2", dist.Normal((z1 + 3) / 2, 0.5**0.5).to_event(1))


def test_sites_are_compared_by_name(double: None) -> None:
    x = torch.tensor([[-5.0], [9.0]])
    verdict = pv.compare(two_levels, _bottom_up, (x,), progress=False)
    table = verdict.table
    assert (table["kl"].abs() < 1e-6).all() and (table["why"] == "").all()
    assert table["guide_mean_error"].abs().max() < 0.1
    assert table["mcmc_mean_error"].abs().max() < 0.2
    assert verdict.gaps is None, "the family of a hierarchy cannot be read off the guide"
    assert list(verdict.bounds.draws.sites) == ["z2", "z1"] == list(verdict.mcmc.sites)


def test_nothing_that_is_not_finite_is_trusted() -> None:
    model = tilted()
    x = torch.ones(12, 3)
    x[9] = 2.0

    def guide(x: Tensor) -> None:
        right: Any = model.posterior(x)
        mean = torch.where(x[:, :1] == 2.0, torch.nan, right.mean)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=right.scale_tril))

    with pyro.validation_enabled(False):
        verdict = pv.compare(model, guide, (x,), search=0, progress=False)
        assert "not finite" in verdict.table["why"][9] and (verdict.table["why"][:9] == "").all()
        assert verdict.summary().loc["guide", "trusted"] == pytest.approx(11 / 12)


def test_an_exact_guide_in_single_precision_has_light_weights() -> None:
    model = tilted()
    x = model(None, size=6).detach()
    found = bounds(model, guide_of(model.posterior), (x,))
    assert (found.khat == -torch.inf).all()
    before = torch.get_rng_state()
    assert (
        pareto_khat(1000 * torch.randn(500, 3, generator=torch.Generator())) == torch.inf
    ).all()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{"draws": 10}, {"search": -1}, {"mcmc_draws": 2}], ids=str)
def test_bad_counts_are_refused_at_once(options: dict[str, int], digits: Any) -> None:
    with pytest.raises(ValueError, match="compare wants draws >= 25"):
        pv.compare(*digits_pair(), (digits.test[0][:2],), progress=False, **options)  # type: ignore[arg-type]


def test_a_bounded_latent_is_drawn_where_it_lives() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.full((2,), 2.0), 0.3).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x.log(), 0.1).to_event(1))

    verdict = pv.compare(model, guide, (torch.full((1, 2), 8.0),), search=0, progress=False)
    (panel,) = verdict.plot().axes
    mesh: Any = panel.collections[0]
    low, high = panel.get_xlim()
    inside = (mesh.get_coordinates()[..., 0] > low) & (mesh.get_coordinates()[..., 0] < high)
    assert inside.mean() > 0.1
