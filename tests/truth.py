"""The ruler of statistical tests: errors in Monte Carlo standard errors, one false-alarm rate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.stats import chisquare
from torch import Tensor

FAILURE_RATE = 1e-4
"""How often a right implementation may fail one statistical test, were its seed not fixed."""


def assert_z(estimate: Tensor, truth: Tensor, standard_error: Tensor) -> None:
    """Hold (estimate − truth) / MCSE to N(0, 1), with Bonferroni's correction over entries."""
    z = ((estimate - truth) / standard_error).abs().double()
    tail = torch.tensor(FAILURE_RATE / (2 * z.numel()), dtype=torch.float64)
    bound = -torch.special.ndtri(tail)  # of the lower tail: 1 − tail would round to 1
    assert torch.isfinite(z).all(), f"not finite: {z}"
    assert (z <= bound).all(), f"|z| up to {z.max():.2f}, allowed {bound:.2f} for {z.numel()}"


def assert_drawn_from(z: Tensor, log_prob: Callable[[Tensor], Tensor]) -> None:
    """Hold the counts of `z`, `(S, L)` with L of 1 or 2, in cells to the density's integrals.

    Cells where no more than 20 draws are expected count as one, with all that is outside. Pyro's
    `auto_goodness_of_fit` rejects right samplers in two dimensions.
    """
    dtype, size, z = z.dtype, z.shape[-1], z.double()
    points = 1000 if size == 1 else 8  # of the midpoint rule, for a cell along an axis
    middle = torch.linspace(0.5, 40 * points - 0.5, 40 * points, dtype=z.dtype) / (40 * points)
    ends = z.quantile(z.new_tensor([0.002, 0.998]), dim=0)  # so that some is always outside
    grid = ends[0] + torch.cartesian_prod(*[middle] * size).reshape(-1, size) * (ends[1] - ends[0])
    density = (
        log_prob(grid.to(dtype)).double().exp()
        * (ends[1] - ends[0]).prod()
        / (40 * points) ** size
    )
    expected = len(z) * density.reshape([40, points] * size).sum(list(range(1, 2 * size, 2)))
    found = torch.histogramdd(z, 40, range=ends.T.flatten().tolist()).hist
    found, expected = found[expected > 20], expected[expected > 20]
    found = torch.cat([found, len(z) - found.sum(0, keepdim=True)])
    expected = torch.cat([expected, len(z) - expected.sum(0, keepdim=True)])
    assert expected.min() > 0, "the density integrates to more than one"
    p_value = chisquare(found, expected).pvalue
    assert p_value > FAILURE_RATE, f"p = {p_value:.1e} over {len(found)} cells"
