"""The ruler of statistical tests: errors in Monte Carlo standard errors, one false-alarm rate."""

from __future__ import annotations

import torch
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
