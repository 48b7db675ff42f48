"""Convergence of Markov chains, vectorised: chains `(C, S, ...)` in, one figure a scalar out."""

from __future__ import annotations

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor


def rhat(chains: Tensor) -> Tensor:
    r"""Rank-normalised split R-hat, the larger of bulk and tail.

    Draws are replaced by the normal scores of their ranks, $\Phi^{-1}((r - 3/8)/(n + 1/4))$;
    each chain is split in two and $\hat R = \sqrt{\widehat{\mathrm{var}}^+ / W}$ compares the
    variance between with that within. The tail figure does the same to $|x - \mathrm{median}|$.

    Args:
        chains: `(C, S, ...)`, `S >= 4`.

    Returns:
        `(...)`; 1 at convergence, and above 1.01 is a warning. NaN where chains do not move.

    References:
        Aki Vehtari, Andrew Gelman, Daniel Simpson, Bob Carpenter, Paul-Christian Bürkner.
        *Rank-Normalization, Folding, and Localization: An Improved R-hat*, 2021.

    Example:
        >>> chains = torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0))
        >>> bool((rhat(chains) < 1.01).all())
        True
    """
    _check(chains)
    ordered = chains.flatten(0, 1).sort(0).values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    folded = (chains - median).abs()
    bulk, tail = (split_gelman_rubin(_normal_scores(x)) for x in (chains, folded))
    return torch.maximum(bulk, tail)


def ess(chains: Tensor) -> Tensor:
    """Bulk effective sample size: that of the mean of rank-normalised split chains.

    Args:
        chains: `(C, S, ...)`, `S >= 4`.

    Returns:
        `(...)`, in draws; at most a few times `C S` for antithetic chains.

    References:
        As `rhat`; autocovariances by Geyer's initial monotone sequence.

    Example:
        >>> chains = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> 1500 < ess(chains).item() < 2600
        True
    """
    _check(chains)
    return effective_sample_size(_normal_scores(_split(chains)))


def mcse_mean(chains: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean over `(C, S, ...)`: sd / √ESS of the raw draws."""
    _check(chains)
    size = effective_sample_size(_split(chains.double()))
    return (chains.double().flatten(0, 1).std(0) / size.sqrt()).to(chains)


def _split(chains: Tensor) -> Tensor:
    half = chains.shape[1] // 2
    return torch.cat([chains[:, :half], chains[:, chains.shape[1] - half :]])


def _normal_scores(chains: Tensor) -> Tensor:
    columns = chains.double().reshape(chains.shape[0] * chains.shape[1], -1).mT.contiguous()
    ordered = columns.sort(-1).values
    below, upto = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    ranks = (below + upto + 1).double() / 2  # equal draws share the mean of their ranks
    scores = torch.special.ndtri((ranks - 0.375) / (columns.shape[-1] + 0.25))
    scores = torch.where(torch.isnan(columns).any(-1, keepdim=True), torch.nan, scores)
    return scores.mT.reshape(chains.shape)


def _check(chains: Tensor) -> None:
    if chains.dim() < 2 or chains.shape[1] < 4:
        raise ValueError(
            f"chains must be (C, S, ...) with S >= 4 draws; got {tuple(chains.shape)}"
        )
