"""Distances against closed forms; nil for one law, and not for narrow, shifted, mirrored ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_vae.verdict.distances import c2st, distances, mmd, sliced_wasserstein
from pyro_vae.verdict.moments import coverage, moment_errors
from truth import assert_z


def _quantiles(size: int) -> Tensor:
    """A standard normal without noise, `(S, 1, 1)`."""
    return torch.special.ndtri((torch.arange(size) + 0.5) / size).reshape(-1, 1, 1)


@pytest.mark.parametrize(("size", "other"), [(20_000, 20_000), (20_000, 7_000)])
def test_wasserstein_of_two_normals(double: None, size: int, other: int) -> None:
    a, b = 1.0 + 2.0 * _quantiles(size), -0.5 + 0.7 * _quantiles(other)
    truth = math.hypot(1.5, 1.3)
    assert sliced_wasserstein(a, b).item() == pytest.approx(truth, rel=1e-3)


def test_wasserstein_of_unequal_sizes_is_that_of_repeated_draws(double: None) -> None:
    a, b = torch.randn(6, 4, 2), torch.randn(9, 4, 2)
    repeated = sliced_wasserstein(a.repeat_interleave(3, 0), b.repeat_interleave(2, 0))
    torch.testing.assert_close(sliced_wasserstein(a, b), repeated)


@pytest.mark.parametrize("size", [2, 5])
def test_wasserstein_averages_over_the_sphere(double: None, size: int) -> None:
    """A draw moved along a monotone map pays its own way: E (θ·d)² = |d|² / L."""
    z, shift = torch.randn(400, 3, size), torch.randn(3, size)
    directions = 4000
    found = sliced_wasserstein(z, z + shift, directions=directions).square()
    truth = shift.square().sum(-1) / size
    spread = (3 / (size * (size + 2)) * size**2 - 1) ** 0.5
    assert_z(found, truth, truth * spread / directions**0.5)
    scaled = sliced_wasserstein(z, 1.5 * z, directions=directions).square()
    truth = 0.25 * z.square().sum(-1).mean(0) / size
    assert_z(scaled, truth, truth * spread / directions**0.5)


def test_orders_of_wasserstein(double: None) -> None:
    z = torch.randn(100, 2, 1)
    far = torch.cat([z[:50], z[50:] + 10 * z.abs().max()])
    one, two = (sliced_wasserstein(z, far, order=p) for p in (1, 2))
    assert (one < two).all()
    torch.testing.assert_close(one, (far.mean(0) - z.mean(0)).squeeze(-1))


def _kernel_mean(shift: Tensor, covariance: Tensor, h: float) -> Tensor:
    """E exp(−|x − y|² / 2h²) for x − y ~ N(shift, covariance)."""
    size = len(shift)
    wide = covariance + h**2 * torch.eye(size)
    distance = shift @ torch.linalg.solve(wide, shift)
    return h**size * torch.linalg.det(wide).rsqrt() * (-0.5 * distance).exp()


@pytest.mark.parametrize("h", [0.5, 2.0])
def test_mmd_of_two_normals(double: None, h: float) -> None:
    mean, zero = torch.tensor([0.7, -0.3]), torch.zeros(2)
    tril = torch.tensor([[1.2, 0.0], [0.5, 0.6]])
    covariance, eye = tril @ tril.mT, torch.eye(2)
    truth = (
        _kernel_mean(zero, 2 * covariance, h)
        + _kernel_mean(zero, 2 * eye, h)
        - 2 * _kernel_mean(mean, covariance + eye, h)
    )
    a, b = mean + torch.randn(30, 2000, 2) @ tril.mT, torch.randn(40, 2000, 2)
    found = mmd(a, b, bandwidth=h)
    assert_z(found.mean(), truth, found.std() / 2000**0.5)
    assert found.std() < 0.1


def test_mmd_takes_the_median_distance_of_the_reference(double: None) -> None:
    a, b = torch.randn(15, 3, 2), torch.randn(20, 3, 2)
    medians = [torch.pdist(b[:, i]).median().item() for i in range(3)]
    by_hand = [mmd(a[:, [i]], b[:, [i]], bandwidth=h) for i, h in enumerate(medians)]
    torch.testing.assert_close(mmd(a, b), torch.cat(by_hand))
    torch.testing.assert_close(mmd(5 * a, 5 * b), mmd(a, b))


@pytest.mark.parametrize(
    "figure", [mmd, lambda a, b: c2st(a, b) - 0.5, lambda a, b: c2st(a, b, neighbours=1) - 0.5]
)
@pytest.mark.parametrize("size", [1, 3])
def test_one_law_has_no_distance_in_expectation(figure: Any, size: int) -> None:
    found = figure(torch.randn(40, 3000, size), torch.randn(40, 3000, size))
    assert_z(found.mean(), torch.tensor(0.0), found.std() / 3000**0.5)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_c2st_errs_as_documented(size: int) -> None:
    found = c2st(torch.randn(200, 400, size), torch.randn(200, 400, size))
    assert 0.38 < found.std() * 200**0.5 < 0.55


def test_c2st_approaches_the_bayes_accuracy() -> None:
    shift = torch.tensor([1.2, -0.9])
    best = torch.special.ndtr(shift.norm() / 2)
    a, b = torch.randn(600, 40, 2), torch.randn(600, 40, 2)
    found = c2st(a + shift, b, neighbours=51)
    assert best - 0.02 < found.mean() < best + 4 * found.std() / 40**0.5
    assert (c2st(a + 100, b) == 1).all()
    torch.testing.assert_close(c2st(a * 7 + 3, b * 7 + 3), c2st(a, b), atol=5e-3, rtol=0)


def test_c2st_flags_what_is_not_finite() -> None:
    a, b = torch.randn(40, 3, 2), torch.randn(40, 3, 2)
    a[3, 1] = torch.inf
    b[:, 2, 0] = 1.0
    assert torch.isnan(c2st(a, b)).tolist() == [False, True, True]


def test_moment_errors_are_in_sd_and_honest(double: None) -> None:
    draws = 0.3 + 1.4 * torch.randn(500, 400, 2)
    uniform = math.sqrt(12) * (torch.rand(800, 400, 2) - 0.5)
    errors = moment_errors(draws, 5.0 * uniform)
    spread = moment_errors(5 * draws, 5.0 * uniform)
    assert_z(spread.mean.mean(0), torch.tensor(0.3), spread.mean.std(0) / 20)
    assert_z(spread.sd.mean(0), torch.tensor(0.4), spread.sd.std(0) / 20)
    for error, claimed in ((spread.mean, spread.mean_se), (spread.sd, spread.sd_se)):
        assert_z(
            error.std() / claimed.mean(), torch.tensor(1.0), torch.tensor(1 / (2 * 800) ** 0.5)
        )
    assert (errors.sd < 0).all()


def test_moment_errors_take_the_error_of_chains(double: None) -> None:
    a, b = torch.randn(100, 3, 2), 2 * torch.randn(400, 3, 2)
    given = moment_errors(
        a, b, mcse=torch.full((3, 2), 0.3), reference_mcse=torch.full((3, 2), 0.4)
    )
    torch.testing.assert_close(given.mean_se, 0.5 / b.std(0))
    wide = moment_errors(a, b, mcse=a.std(0) / 5, reference_mcse=b.std(0) / 10)
    torch.testing.assert_close(wide.sd_se, 2 * moment_errors(a, b).sd_se)


@pytest.mark.parametrize(("size", "level"), [(199, 0.9), (19, 0.5), (99, 0.95), (30, 0.77)])
def test_coverage_of_one_law_is_its_level(double: None, size: int, level: float) -> None:
    found = coverage(torch.randn(size, 4000, 2), torch.randn(50, 4000, 2), level)
    bias = 0.0 if size != 30 else 1e-3  # between two order statistics
    assert_z(found.mean(0), torch.tensor(level), found.std(0) / 4000**0.5 + bias)
    claimed = (level * (1 - level) * (1 / size + 1 / 50)) ** 0.5
    assert found.std().item() == pytest.approx(claimed, rel=0.1)


def test_coverage_of_a_narrow_normal(double: None) -> None:
    half = 0.5 * torch.special.ndtri(torch.tensor(0.95))
    truth = 2 * torch.special.ndtr(half) - 1
    found = coverage(0.5 * torch.randn(999, 400, 1), torch.randn(500, 400, 1))
    assert_z(found.mean(), truth, found.std() / 20 + 1e-3)


TRIL = torch.tensor([[1.0, 0.0], [-0.8, 0.6]])
LAWS: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "narrow": (lambda z: 0.4 * z, {"sliced_wasserstein", "mmd", "c2st", "sd_error", "coverage"}),
    "wide": (lambda z: 2.0 * z, {"sliced_wasserstein", "mmd", "c2st", "sd_error", "coverage"}),
    "shifted": (lambda z: z + 1, {"sliced_wasserstein", "mmd", "c2st", "mean_error", "coverage"}),
    "mirrored": (lambda z: z * torch.tensor([1.0, -1.0]), {"sliced_wasserstein", "mmd", "c2st"}),
}
COLUMNS = ["sliced_wasserstein", "mmd", "c2st", "mean_error", "sd_error", "coverage"]


@pytest.fixture(scope="module")
def reference() -> Tensor:
    torch.manual_seed(1)
    return 3.0 + 10 * torch.randn(4, 250, 40, 2) @ TRIL.T


@pytest.mark.parametrize("law", LAWS)
def test_wrong_laws_stand_out_from_their_zero(reference: Tensor, law: str) -> None:
    change, seen = LAWS[law]
    found = distances(3.0 + 10 * change(torch.randn(600, 40, 2) @ TRIL.T), reference, points=300)
    assert list(found) == [f"{name}{suffix}" for name in COLUMNS for suffix in ("", "_zero")]
    for name in COLUMNS:
        ours, zero = found[name], found[f"{name}_zero"]
        apart = (ours - zero.mean()).abs() > (zero - zero.mean()).abs().max()
        assert apart.float().mean() >= 0.9 if name in seen else apart.float().mean() < 0.3, name


def test_the_right_law_is_its_own_zero() -> None:
    draws, reference = torch.randn(250, 300, 2) @ TRIL.T, torch.randn(2, 250, 300, 2) @ TRIL.T
    found = distances(draws, reference, points=100)
    for name in COLUMNS:
        difference = found[name] - found[f"{name}_zero"]
        assert_z(difference.mean(), torch.tensor(0.0), difference.std() / 300**0.5)


def test_data_are_taken_one_by_one(double: None) -> None:
    a, b = torch.randn(40, 7, 3), torch.randn(40, 7, 3)
    figures: list[Any] = [sliced_wasserstein, mmd, c2st]
    for figure in figures:
        whole = figure(a, b)
        assert whole.shape == (7,)
        torch.testing.assert_close(figure(a, b, chunk=1), whole)
        singly = [figure(a[:, [i]], b[:, [i]]) for i in range(7)]
        torch.testing.assert_close(torch.cat(singly), whole)
    chains = b.unflatten(0, (2, 20))
    whole_table, one = distances(a, chains), distances(a[:, [4]], chains[:, :, [4]])
    for name, column in whole_table.items():
        torch.testing.assert_close(column[[4]], one[name])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: mmd(z, z[:, :2]), "draws must be"),
        (lambda z: sliced_wasserstein(z[0], z[0]), "draws must be"),
        (lambda z: c2st(z, z[:20]), "as many draws on both sides"),
        (lambda z: c2st(z, z, neighbours=4), "an odd number"),
        (lambda z: coverage(z, z, 0.99), "level must lie"),
        (lambda z: distances(z, z.unsqueeze(0)), "C >= 2 chains"),
    ],
)  # fmt: skip
def test_bad_draws_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(30, 3, 2))
