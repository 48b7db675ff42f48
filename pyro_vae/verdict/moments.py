"""Moments and intervals of draws against those of a reference, in its own units."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class MomentErrors(NamedTuple):
    """What `moment_errors` returns, each `(B, L)`."""

    mean: Tensor
    """error of the mean, in reference sd"""
    mean_se: Tensor
    """its standard error, from both sides"""
    sd: Tensor
    """relative error of the sd"""
    sd_se: Tensor
    """its standard error, from both sides"""


def moment_errors(
    draws: Tensor,
    reference: Tensor,
    *,
    mcse: Tensor | None = None,
    reference_mcse: Tensor | None = None,
) -> MomentErrors:
    r"""Errors of mean and sd in units of the reference sd, with their standard errors.

    $$\frac{\mu - \mu'}{\sigma'} \pm
      \frac{\sqrt{\mathrm{MCSE}^2 + \mathrm{MCSE}'^2}}{\sigma'}, \qquad
      \frac{\sigma}{\sigma'} - 1 \pm \frac{\sigma}{\sigma'}
      \sqrt{\frac{\kappa - 1}{4 S_e} + \frac{\kappa' - 1}{4 S_e'}}$$

    where κ is the kurtosis and $S_e = (\sigma / \mathrm{MCSE})^2$ the effective sample size.

    Args:
        draws: `(S, B, L)`.
        reference: `(S', B, L)`.
        mcse: Monte Carlo standard error of the mean of `draws`, `(B, L)`; by default that of
            independent draws.
        reference_mcse: that of the reference.

    Returns:
        `MomentErrors`.

    Warning:
        The standard error of the sd supposes that squares mix as values do. It is too small for
        a chain that goes to and fro.

    Raises:
        ValueError: draws of other data.

    Example:
        >>> z = torch.randn(1000, 3, 2)
        >>> errors = moment_errors(0.5 * z, z)
        >>> errors.sd.round(decimals=4).unique()
        tensor([-0.5000])
    """
    check_draws(draws, reference)
    mean, sd, error, sd_error = _moments(draws, mcse)
    true_mean, true_sd, true_error, true_sd_error = _moments(reference, reference_mcse)
    return MomentErrors(
        (mean - true_mean) / true_sd,
        torch.hypot(error, true_error) / true_sd,
        sd / true_sd - 1,
        sd / true_sd * torch.hypot(sd_error, true_sd_error),
    )


def coverage(draws: Tensor, reference: Tensor, level: float = 0.9) -> Tensor:
    r"""Share of the reference inside the central interval of the draws, by coordinate.

    The interval runs between the quantiles at $(1 \mp \mathrm{level})/2$, the i-th of S draws
    being that at $i / (S + 1)$: then the share is `level` in expectation under one law.

    Args:
        draws: `(S, B, L)`.
        reference: `(S', B, L)`.
        level: between 0 and $(S - 1)/(S + 1)$.

    Returns:
        `(B, L)`: below `level` for draws that are too narrow or off. Its standard error under
        one law is $\sqrt{\mathrm{level}(1 - \mathrm{level})(1/S + 1/S')}$, S being effective
        sizes.

    Raises:
        ValueError: draws of other data, or a level that so few draws cannot have.

    Example:
        >>> z = torch.randn(4000, 3, 2)
        >>> bool((coverage(0.5 * z, z) < 0.7).all())
        True
    """
    check_draws(draws, reference)
    if not 0 < level <= (len(draws) - 1) / (len(draws) + 1):
        raise ValueError(
            f"level must lie between 0 and (S - 1)/(S + 1); got {level} of {len(draws)} draws"
        )
    ordered = draws.sort(0).values
    low, high = (_quantile(ordered, (1 + sign * level) / 2) for sign in (-1, 1))
    return ((reference >= low) & (reference <= high)).to(draws).mean(0)


def check_draws(a: Tensor, b: Tensor) -> None:
    """Refuse draws of other data.

    Raises:
        ValueError: they are not `(S, B, L)` and `(S', B, L)`, at least 2 each.
    """
    if a.dim() != 3 or b.dim() != 3 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2:
        raise ValueError(
            "draws must be (S, B, L) and (S', B, L), at least 2 of the same data; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _moments(draws: Tensor, mcse: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, sd, standard error of the mean, and relative one of the sd."""
    mean, sd = draws.mean(0), draws.std(0)
    error = sd / math.sqrt(len(draws)) if mcse is None else mcse
    kurtosis = ((draws - mean) / sd).pow(4).mean(0)
    return mean, sd, error, error / sd * (kurtosis - 1).clamp_min(0).sqrt() / 2


def _quantile(ordered: Tensor, level: float) -> Tensor:
    place = level * (len(ordered) + 1) - 1
    low = min(max(math.floor(place + 1e-9), 0), len(ordered) - 2)
    return ordered[low].lerp(ordered[low + 1], min(max(place - low, 0.0), 1.0))
