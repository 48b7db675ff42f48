"""Bounds in their order, and a verdict that says yes to right guides and no to wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pairs import Pair, digits_pair, guide_of
from pyro_vae.models import PPCA
from pyro_vae.posterior import quadrature
from pyro_vae.verdict.bounds import bounds, pareto_khat
from truth import assert_z


def _psislw(log_weight: np.ndarray) -> np.ndarray:
    if int(arviz.__version__.split(".")[0]) < 1:
        return np.asarray(arviz.psislw(log_weight)[1])
    from arviz_stats.base import array_stats

    return np.asarray(array_stats.psislw(log_weight, axis=-1)[1])


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.5, 0.9])
def test_khat_is_that_of_arviz_and_of_theory(double: None, shape: float) -> None:
    uniform = torch.rand(4000, 40)
    log_weight = ((uniform.pow(-shape) - 1) / shape).log()
    k = pareto_khat(log_weight)
    np.testing.assert_allclose(k.numpy(), _psislw(log_weight.T.numpy()), atol=0.02)
    assert_z(k.mean(), torch.tensor(shape), k.std() / 40**0.5 + 0.01)


def test_khat_of_equal_weights_says_nothing_is_wrong() -> None:
    assert pareto_khat(torch.zeros(1000, 2)).tolist() == [-torch.inf] * 2
    with pytest.raises(ValueError, match="at least 25 draws"):
        pareto_khat(torch.zeros(24, 2))


def test_bounds_are_ordered_and_below_the_evidence(trained: Pair, digits: Any) -> None:
    x = digits.test[0][:32]
    exact = quadrature(trained.model, (x,)).log_evidence
    found = bounds(trained.model, trained.guide, (x,), draws=2000)
    assert found.log_weight.shape == (2000, 32) and found.draws["z"].shape == (1, 2000, 32, 2)
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


def _tilted() -> PPCA:
    """A model whose posterior has correlation −0.8."""
    return PPCA(torch.tensor([[2.0, 2.0], [0.9, 0.0], [0.0, 0.9]]), torch.zeros(3), noise=1.0)


def _guide(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    model = _tilted()

    def posterior(x: Tensor) -> Any:
        right: Any = model.posterior(x)
        mean, tril = change(right.mean, right.scale_tril)
        return dist.MultivariateNormal(mean, scale_tril=tril)

    return guide_of(posterior)


def _mirrored(mean: Tensor, tril: Tensor) -> tuple[Tensor, Tensor]:
    flip = torch.tensor([1.0, -1.0])
    return mean, torch.linalg.cholesky((tril @ tril.mT) * flip * flip.unsqueeze(-1))


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        pytest.param(lambda m, t: (m, t), set(), id="exact"),
        pytest.param(
            lambda m, t: (m, 0.4 * t), {"too narrow", "high KL", "heavy weights"}, id="narrow"
        ),
        pytest.param(lambda m, t: (m, 2.0 * t), {"too wide", "high KL"}, id="wide"),
        pytest.param(lambda m, t: (m + t.sum(-1), t), {"mean off", "high KL"}, id="shifted"),
        pytest.param(_mirrored, {"high KL"}, id="mirrored"),
        pytest.param(lambda m, t: (-m, t), {"mean off", "high KL"}, id="reversed"),
    ],
)
def test_the_verdict_says_no_to_wrong_guides(change: Any, reasons: set[str]) -> None:
    x = 2.0 + _tilted()(None, size=20).detach()
    table = pv.compare(_tilted(), _guide(change), (x,), witnesses=0, progress=False).table
    given = [set(why.split(", ")) - {""} for why in table["why"]]
    if not reasons:
        assert given == [set()] * 20
    else:
        told = sum(reasons <= why for why in given)
        assert told >= 18, f"{reasons} told for {told} of 20 data: {given}"


@pytest.fixture(scope="module")
def verdict(trained: Pair, digits: Any) -> Any:
    batch = (digits.test[0][:8],)
    return pv.compare(*trained, batch, witnesses=1, nuts_draws=100, nuts_warmup=80, progress=False)


def test_the_table_holds_the_identity_and_the_witness(verdict: Any) -> None:
    table = verdict.table
    assert len(table) == 8
    np.testing.assert_allclose(table["log_evidence"] - table["elbo"], table["kl"])
    assert (table["kl"] > -2 * table["kl_se"]).all()
    assert table["rhat"].notna().tolist() == [True] + [False] * 7
    assert abs(table["nuts_mean_error"][0]) < 6 * table["nuts_mcse"][0]
    summary = verdict.summary()
    assert summary.index.tolist() == ["guide", "NUTS"]
    assert summary.loc["guide", "kl"] == pytest.approx(table["kl"].mean())
    assert summary.loc["guide", "trusted"] == (table["why"] == "").mean()


def test_it_prints_and_saves(verdict: Any, tmp_path: Path) -> None:
    text = repr(verdict)
    assert "log p(x)" in text and "pooled" in text and "NUTS" in text
    verdict.save(tmp_path / "new" / "folder")
    saved = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert saved == {"table.csv", "summary.csv", "guide.nc", "exact.nc", "nuts.nc"}
    table = pd.read_csv(tmp_path / "new" / "folder" / "table.csv", index_col="datum")
    np.testing.assert_allclose(table["kl"], verdict.table["kl"], rtol=1e-4)
    draws = arviz.from_netcdf(str(tmp_path / "new" / "folder" / "nuts.nc"))
    assert draws["posterior"]["z"].shape == (2, 100, 1, 2)


@pytest.mark.parametrize("image_shape", [None, (8, 8)])
def test_it_draws(verdict: Any, image_shape: Any, tmp_path: Path) -> None:
    figure = verdict.plot(image_shape)
    assert len(figure.axes) == (1 if image_shape is None else 3)
    figure.savefig(tmp_path / "panels.png")


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_other_dimensions(latent_dim: int, digits: Any) -> None:
    pair = digits_pair(pv.guides.MultivariateNormalGuide, latent_dim)
    verdict = pv.compare(*pair, (digits.test[0][:2],), witnesses=0, progress=False)
    assert len(verdict.table) == 2
    if latent_dim == 1:
        assert len(verdict.plot().axes) == 2
    else:
        with pytest.raises(ValueError, match="one or two latent dimensions"):
            verdict.plot()


def test_four_dimensions_are_refused_with_a_way_out(digits: Any) -> None:
    with pytest.raises(ValueError, match=r"at most 3 latent.*\n.*nuts"):
        pv.compare(*digits_pair(latent_dim=4), (digits.test[0][:2],), progress=False)
