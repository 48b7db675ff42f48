"""Level three: NUTS against the grid, convergence against ArviZ, draws through NetCDF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pairs import Pair, random_ppca
from pyro_vae.posterior import Draws, convergence, nuts, quadrature
from truth import assert_z


def _autoregressive(rho: float, shift: float = 0.0, still: bool = False) -> Tensor:
    noise = torch.randn(4, 1000, dtype=torch.float64)
    chains = [noise[:, 0]]
    for t in range(1, 1000):
        chains.append(rho * chains[-1] + (1 - rho**2) ** 0.5 * noise[:, t])
    x = torch.stack(chains, 1)
    x[0] += shift
    return x


def _arviz(figure: str, x: Tensor, **options: Any) -> float:
    """The same figure from either major of ArviZ; only the later one names its axes."""
    later = int(arviz.__version__.split(".")[0]) >= 1
    axes = {"chain_axis": 0, "draw_axis": 1} if later else {}
    return float(getattr(arviz, figure)(x.numpy(), **axes, **options))


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5, 0.9])
def test_ess_is_that_of_arviz_and_of_theory(rho: float) -> None:
    x = _autoregressive(rho)
    found = convergence.ess(x).item()
    theirs = _arviz("ess", x)
    assert found == pytest.approx(theirs, rel=0.01)
    assert convergence.ess_tail(x).item() == pytest.approx(
        _arviz("ess", x, method="tail", prob=(0.05, 0.95)), rel=0.1
    )
    assert convergence.ess_mean(x).item() == pytest.approx(
        _arviz("ess", x, method="mean"), rel=0.01
    )
    assert found == pytest.approx(4000 * (1 - rho) / (1 + rho), rel=0.25)


@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
def test_rhat_is_that_of_arviz(shift: float) -> None:
    x = _autoregressive(0.3, shift)
    theirs = _arviz("rhat", x)
    assert convergence.rhat(x).item() == pytest.approx(theirs, abs=2e-3)
    assert (convergence.rhat(x) > 1.01) == (shift > 0)


def test_rhat_sees_a_wrong_scale_and_a_still_chain() -> None:
    x = _autoregressive(0.0)
    x[0] *= 4
    assert convergence.rhat(x) > 1.05
    x = torch.zeros(4, 100)
    assert not convergence.rhat(x) < 1.01
    with pytest.raises(ValueError, match="S >= 4"):
        convergence.ess(torch.zeros(4, 3))


def test_convergence_is_vectorised() -> None:
    x = torch.stack([_autoregressive(0.1), _autoregressive(0.8, 1.0)], -1)
    for figure in (convergence.rhat, convergence.ess, convergence.mcse_mean):
        torch.testing.assert_close(figure(x), torch.stack([figure(x[..., 0]), figure(x[..., 1])]))


@pytest.mark.slow
def test_nuts_agrees_with_the_grid(trained: Pair, digits: Any) -> None:
    x = digits.test[0][:2]
    exact = quadrature(trained.model, (x,))
    before = torch.get_rng_state()
    draws = nuts(trained.model, (x,), draws=200, warmup=120, seed=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad for p in trained.model.parameters())
    assert draws["z"].shape == (2, 200, 2, 2)
    assert draws.stats["diverging"].shape == (2, 200, 2)
    assert (draws.rhat["z"] < 1.05).all()
    assert_z(draws.mean, exact.mean, draws.mcse["z"])
    squares = (draws["z"] - exact.mean).square()
    assert_z(squares.flatten(0, 1).mean(0), exact.sd.square(), convergence.mcse_mean(squares))
    product = (draws["z"] - exact.mean).prod(-1)
    covariance = exact.covariance[:, 0, 1]
    assert_z(product.flatten(0, 1).mean(0), covariance, convergence.mcse_mean(product))


@pytest.mark.slow
def test_nuts_agrees_with_closed_forms() -> None:
    model = random_ppca()
    x = model(None, size=2).detach()
    draws = nuts(model, (x,), draws=200, warmup=100, progress=False)
    assert_z(draws.mean, model.posterior(x).mean.detach(), draws.mcse["z"])
    wrong = model.posterior(x + 1).mean.detach()
    with pytest.raises(AssertionError, match="allowed"):
        assert_z(draws.mean, wrong, draws.mcse["z"])


def test_nuts_takes_a_mixture_prior_and_a_bounded_site() -> None:
    def model(x: Tensor) -> None:
        parts = dist.Normal(torch.tensor([[-1.0], [1.0]]), 0.5).to_event(1)
        with pyro.plate("data", len(x)):
            prior = dist.MixtureSameFamily(dist.Categorical(torch.ones(2) / 2), parts)
            z = pyro.sample("z", prior)
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, rate.unsqueeze(-1)).to_event(1), obs=x)

    draws = nuts(model, (torch.ones(1, 1),), draws=20, warmup=20, chains=1, progress=False)
    assert draws["z"].shape == (1, 20, 1, 1) and draws["rate"].shape == (1, 20, 1)
    assert (draws["rate"] > 0).all()
    assert draws.flat.shape == (20, 1, 2)


@pytest.mark.parametrize("options", [{"draws": 3}, {"warmup": 0}, {"chains": 0}], ids=str)
def test_nuts_refuses_empty_work(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="nuts wants draws >= 4, warmup >= 1, chains >= 1"):
        nuts(random_ppca(), (torch.zeros(1, 6),), **options)  # type: ignore[arg-type]


def test_draws_go_through_arviz_and_netcdf(tmp_path: Path) -> None:
    sites = {"z": torch.randn(2, 30, 4, 3)}
    stats = {"diverging": torch.zeros(2, 30, 4, dtype=torch.bool)}
    draws = Draws(sites, stats, method="test")
    draws.save(tmp_path / "draws.nc")
    back = arviz.from_netcdf(str(tmp_path / "draws.nc"))
    for tree in (draws.to_arviz(), back):
        posterior = tree["posterior"]
        assert posterior["z"].dims == ("chain", "draw", "datum", "latent")
        np.testing.assert_array_equal(posterior["z"].values, sites["z"].numpy())
        assert tree["sample_stats"]["diverging"].dims == ("chain", "draw", "datum")
    rhat = arviz.rhat(back)
    rhat = rhat["posterior"] if "posterior" in getattr(rhat, "children", ()) else rhat
    np.testing.assert_allclose(rhat["z"].values, draws.rhat["z"].numpy(), atol=5e-3)


def test_several_sites_keep_their_own_dims() -> None:
    draws = Draws(
        {"z1": torch.randn(1, 9, 4, 3), "z2": torch.randn(1, 9, 4, 2), "s": torch.randn(1, 9, 4)}
    )
    posterior = draws.to_arviz()["posterior"]
    assert posterior["z1"].dims == ("chain", "draw", "datum", "z1_latent")
    assert posterior["z2"].dims == ("chain", "draw", "datum", "z2_latent")
    assert posterior["s"].dims == ("chain", "draw", "datum")
    assert draws.flat.shape == (9, 4, 6)


def test_ties_share_their_rank_and_nan_is_passed_on() -> None:
    coin = (torch.rand(4, 500, generator=torch.Generator().manual_seed(1)) < 0.3).double()
    assert convergence.rhat(coin) < 1.01 and convergence.ess(coin) > 1000
    assert convergence.ess(coin).item() == pytest.approx(_arviz("ess", coin), rel=0.05)
    coin[1, 7] = torch.nan
    assert convergence.rhat(coin).isnan() and convergence.ess(coin).isnan()


def test_nuts_starts_where_there_is_a_likelihood() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    draws = nuts(model, (torch.tensor([1.5]),), draws=20, warmup=20, chains=1, progress=False)
    assert ((draws["z"] > 0.5) & (draws["z"] < 2.5)).all()
    with pytest.raises(ValueError, match=r"no likelihood at any of 100 draws"):
        nuts(model, (torch.tensor([50.0]),), draws=20, warmup=20, chains=1, progress=False)
