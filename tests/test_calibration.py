"""Calibration says yes to right guides and kernels, and names what is wrong with the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pairs import conditional_pair, mirrored, quantized_pair, tilted, wrong_guide
from pyro_vae.log_joint import LogJoint
from pyro_vae.verdict.calibration import Calibration, calibrate
from pyro_vae.verdict.joint_test import JointTest, joint_test
from truth import FAILURE_RATE, assert_z

ROW = (torch.zeros(1, 3),)


def _sd(tril: Tensor) -> Tensor:
    return tril.square().sum(-1).sqrt()


def _prior(mean: Tensor, tril: Tensor) -> tuple[Tensor, Tensor]:
    return 0 * mean, torch.eye(2).expand_as(tril)


RIGHT = "calibrated"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda m, t: (m, t), [RIGHT, RIGHT, RIGHT, RIGHT], id="exact"),
        pytest.param(lambda m, t: (m, 0.4 * t), ["too narrow", "too narrow", "", "wrong"], id="narrow"),
        pytest.param(lambda m, t: (m, 0.85 * t), ["too narrow", "too narrow", "", "wrong"], id="a little narrow"),
        pytest.param(lambda m, t: (m, 2.0 * t), ["too wide", "too wide", "", "wrong"], id="wide"),
        pytest.param(lambda m, t: (m + 0.5 * _sd(t), t), ["biased high", "biased high", "", "wrong"], id="shifted"),
        pytest.param(lambda m, t: (m - 4 * _sd(t), t), ["biased low", "biased low", "", "wrong"], id="far off"),
        pytest.param(lambda m, t: (-m, t), ["too narrow", "too narrow", "", "wrong"], id="reversed"),
        pytest.param(mirrored, [RIGHT, RIGHT, "biased high", "wrong"], id="mirrored"),
        pytest.param(_prior, [RIGHT, RIGHT, RIGHT, "wrong"], id="prior"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: Any, words: list[str]) -> None:
    found = calibrate(tilted(), wrong_guide(change), ROW)
    table = found.summary(FAILURE_RATE)
    assert table.index.tolist() == ["z[0]", "z[1]", "z[0] × z[1]", "log p(x, z)"]
    for name, word, expected in zip(table.index, table["verdict"], words, strict=True):
        right = word != RIGHT if expected == "wrong" else expected in ("", word)
        assert right, f"{name} is called {word}\n{table}"


def test_a_right_guide_has_uniform_ranks_and_honest_intervals() -> None:
    found = calibrate(tilted(), wrong_guide(lambda m, t: (m, t)), ROW, replicates=4000, draws=99)
    assert found.ranks.shape == (4000, 4) and found.ranks.min() == 0 and found.ranks.max() == 99
    table = found.summary()
    scale = torch.tensor(4000.0)
    assert_z(torch.tensor(table["shift"].to_numpy()), torch.zeros(4), 1 / scale.sqrt())
    assert_z(torch.tensor(table["width"].to_numpy()), torch.ones(4), 1 / (2 * scale).sqrt())
    coverage = found.coverage([0.3, 0.9])
    assert coverage.index.names == ["quantity", "level"] and len(coverage) == 8
    level = coverage.index.get_level_values("level")
    assert_z(
        *(
            torch.tensor(value.to_numpy())
            for value in (coverage["coverage"], level, coverage["se"])
        )
    )
    assert (found.ecdf_difference().abs() <= found.band(0.999).unsqueeze(-1)).all()


@pytest.mark.parametrize(("scale", "shift"), [(0.7, 0.0), (2.0, 0.0), (1.0, 0.5), (1.5, -1.0)])
def test_shift_and_width_are_those_of_a_gaussian_guide(scale: float, shift: float) -> None:
    guide = wrong_guide(lambda m, t: (m + shift * scale * _sd(t), scale * t))
    table = calibrate(tilted(), guide, ROW, replicates=1000, draws=1000).summary()
    for column, truth in (("shift", shift), ("width", scale)):
        values, errors = (
            torch.tensor(table[name][:2].to_numpy()) for name in (column, f"{column}_se")
        )
        # Draws are finite: their own noise widens the scores by 1 % of the guide's sd at most.
        assert_z(values, torch.full((2,), truth).double(), torch.hypot(errors, 0.01 * values))


def _of_uniform(count: int, quantities: int) -> Calibration:
    uniform = torch.rand(count, quantities, dtype=torch.float64)
    names = tuple(map(str, range(quantities)))
    return Calibration(names, (uniform * 101).long(), 100, uniform)


def test_the_false_alarm_rate_is_as_told() -> None:
    pvalue = _of_uniform(200, 5000).pvalue
    for level in (0.01, 0.1, 0.5):
        share, error = (pvalue < level).double().mean(), (level * (1 - level) / 5000) ** 0.5
        assert_z(share, torch.tensor(level), torch.tensor(error))


@pytest.mark.parametrize("count", [60, 1000])
def test_the_band_holds_whole_curves(count: int) -> None:
    found = _of_uniform(count, 3000)
    inside = (found.ecdf_difference().abs() <= found.band(0.9).unsqueeze(-1)).all(0)
    error = (0.9 * 0.1 * (1 / 3000 + 1 / 4000)) ** 0.5  # of these curves, and of the band's
    assert_z(inside.double().mean(), torch.tensor(0.9), torch.tensor(error))


def _two_levels(x: Tensor) -> None:
    """z2 → z1 → x, each given what is above with variance 1."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.tensor(3.0), 1.0))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


def _bottom_up(width: float) -> Any:
    """Its exact posterior, sampled in the other order, with z2 `width` times as wide."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal((2 * x + 3) / 3, (2 / 3) ** 0.5))
            pyro.sample("z2", dist.Normal((z1 + 3) / 2, width * 0.5**0.5))

    return guide


def test_sites_are_told_apart() -> None:
    right = calibrate(_two_levels, _bottom_up(1.0), (torch.zeros(7),)).summary()
    assert right.index.tolist() == ["z2", "z1", "z2 × z1", "log p(x, z)"]
    assert (right["verdict"] == RIGHT).all()
    wide = calibrate(_two_levels, _bottom_up(2.0), (torch.zeros(7),)).summary()["verdict"]
    assert wide["z2"] == "too wide" and wide["z1"] == RIGHT


def test_a_guide_that_ignores_the_label_is_seen() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(4.0 * y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide_with(shift: float) -> Any:
        def guide(x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x + shift * y) / 2, 0.5**0.5))

        return guide

    batch = (torch.zeros(3), torch.tensor([0.0, 1.0, 1.0]))
    assert (calibrate(model, guide_with(4.0), batch).summary()["verdict"] == RIGHT).all()
    assert calibrate(model, guide_with(0.0), batch).summary()["verdict"]["z"] == "biased low"


@pytest.mark.parametrize("build", [conditional_pair, quantized_pair])
def test_the_catalogue_is_refused_untrained(build: Any) -> None:
    x = (torch.rand(5, 64) > 0.5).float()
    batch = (x, torch.arange(5)) if build is conditional_pair else (x,)
    model, guide = build()
    found = calibrate(model, guide, batch, replicates=300, draws=50, chunk=1000)
    assert found.ranks.shape == (300, len(found.names))
    assert found.pvalue.min() < 1e-6


def test_equal_draws_share_their_ranks_at_random() -> None:
    def coin(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))

    found = calibrate(coin, guide, (torch.zeros(1),), replicates=5000)
    assert (found.pvalue > FAILURE_RATE).all()


def test_chunks_and_seeds() -> None:
    options: Any = {"replicates": 100, "draws": 40}
    before = torch.get_rng_state()
    one, again = (calibrate(tilted(), wrong_guide(mirrored), ROW, **options) for _ in range(2))
    other = calibrate(tilted(), wrong_guide(mirrored), ROW, seed=1, **options)
    pieces = calibrate(tilted(), wrong_guide(mirrored), ROW, chunk=300, **options)
    assert torch.equal(one.uniform, again.uniform) and not torch.equal(one.ranks, other.ranks)
    assert pieces.ranks.shape == one.ranks.shape
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal((one.uniform * 41).floor().long(), one.ranks)


def test_it_draws_and_prints(tmp_path: Path) -> None:
    found = calibrate(tilted(), wrong_guide(mirrored), ROW)
    axes = found.plot()
    assert len(axes.lines) == 4 and axes.get_legend() is not None
    figure: Any = axes.figure
    figure.savefig(tmp_path / "calibration.png")
    assert found.plot(axes) is axes
    assert "biased high" in repr(found)


@pytest.mark.parametrize("options", [{"replicates": 10}, {"draws": 5}], ids=str)
def test_too_few_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="calibrate wants replicates >= 50"):
        calibrate(tilted(), wrong_guide(mirrored), ROW, **options)


def _positive(x: Tensor) -> None:
    """A bounded latent next to a free one, and a label's worth of dependence between them."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0), 2.0))
        z = pyro.sample("z", dist.Normal(rate, 1.0))
        pyro.sample("x", dist.Normal(z, rate), obs=x)


Density = Callable[[LogJoint, Tensor], Tensor]


def _metropolis(density: Density, sign: float = 1.0) -> Callable[[LogJoint, Tensor], Tensor]:
    def step(target: LogJoint, u: Tensor) -> Tensor:
        proposal = u + 0.7 * torch.randn_like(u)
        log_ratio = sign * (density(target, proposal) - density(target, u))
        accept = torch.rand_like(log_ratio).log() < log_ratio
        return torch.where(accept.unsqueeze(-1), proposal, u)

    return step


def _exact(target: LogJoint, u: Tensor) -> Tensor:
    return target(u)


def _without_jacobian(target: LogJoint, u: Tensor) -> Tensor:
    return target(u) - target.constrain(u)[1]


def _without_prior(target: LogJoint, u: Tensor) -> Tensor:
    return target(u) + 0.1 * u.square().sum(-1)


def _with_stale_density() -> Callable[[LogJoint, Tensor], Tensor]:
    """Remembers the density of where it stands, though the data have changed."""
    here: list[Tensor] = []

    def step(target: LogJoint, u: Tensor) -> Tensor:
        proposal = u + 0.7 * torch.randn_like(u)
        there, before = target(proposal), here.pop() if here else target(u)
        accept = torch.rand_like(there).log() < there - before
        here.append(torch.where(accept, there, before))
        return torch.where(accept.unsqueeze(-1), proposal, u)

    return step


PLAIN = (torch.zeros(1),)


@pytest.mark.parametrize(
    ("model", "batch", "functions"),
    [(_positive, PLAIN, 7), (_two_levels, PLAIN, 7), (tilted(), ROW, 7)],
)
def test_a_right_kernel_passes(model: Any, batch: Any, functions: int) -> None:
    before = torch.get_rng_state()
    found = joint_test(model, batch, _metropolis(_exact), replicates=20_000)
    assert len(found.table) == functions
    assert found.pvalue > FAILURE_RATE, found
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(_metropolis(_exact, sign=-1.0), id="wrong sign"),
        pytest.param(_metropolis(_exact, sign=0.0), id="always accepts"),
        pytest.param(_metropolis(_exact, sign=0.8), id="hot"),
        pytest.param(_metropolis(_without_jacobian), id="no Jacobian"),
        pytest.param(_metropolis(_without_prior), id="flat prior"),
        pytest.param(_with_stale_density(), id="stale density"),
    ],
)
def test_a_wrong_kernel_is_refused(step: Any) -> None:
    found = joint_test(_positive, PLAIN, step, replicates=20_000)
    assert found.pvalue < FAILURE_RATE, found


def test_its_z_is_standard_normal(double: None) -> None:
    """Under an exact draw of p(z | x), by many seeds."""

    def gibbs(target: LogJoint, u: Tensor) -> Tensor:
        (x,) = target.batch
        return ((x + 3) / 2 + 0.5**0.5 * torch.randn(x.shape)).reshape(u.shape)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(3.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    tests = [joint_test(model, PLAIN, gibbs, sweeps=1, replicates=500, seed=s) for s in range(60)]
    z = torch.stack([torch.tensor(test.table["z"].to_numpy()) for test in tests])
    assert_z(z.mean(0), torch.zeros(4), torch.tensor(60**-0.5))
    assert_z(z.square().mean(0), torch.ones(4), torch.tensor((2 / 60) ** 0.5))


def test_a_joint_test_prints_and_refuses() -> None:
    found = joint_test(_two_levels, PLAIN, lambda target, u: u, sweeps=1, replicates=60)
    assert isinstance(found, JointTest) and "p-value of all" in repr(found)
    assert found.table.index.tolist() == [
        "z2", "z1", "z2²", "z1²", "z2 × z1", "log p(x | z)", "log p(x, z)"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="joint_test wants sweeps >= 1"):
        joint_test(_two_levels, PLAIN, lambda target, u: u, sweeps=0)


@pytest.mark.parametrize("step", [lambda target, u: u.log(), lambda target, u: u[..., 0]])
def test_a_step_into_nowhere_is_refused(step: Any) -> None:
    with pytest.raises(ValueError, match="step returns no new latents"):
        joint_test(_two_levels, PLAIN, step, replicates=60)
