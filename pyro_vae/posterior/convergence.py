"""Convergence of Markov chains, vectorised: chains `(C, S, ...)` in, one figure a scalar out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 2**22
"""Numbers worked on at once, which bounds the memory."""


def rhat(chains: Tensor, *, superchains: int | None = None) -> Tensor:
    r"""Rank-normalised R-hat, the larger of bulk and tail; split, or nested.

    Draws are replaced by the normal scores of their ranks, $\Phi^{-1}((r - 3/8)/(n + 1/4))$;
    each chain is split in two and $\hat R = \sqrt{\widehat{\mathrm{var}}^+ / W}$ compares the
    variance between with that within. The tail figure does the same to $|x - \mathrm{median}|$.

    Many short chains want the nested figure: chains come in groups that share their start, and
    $\hat R = \sqrt{1 + B / W}$ with `B` the variance of the groups' means and `W` the variance
    within a group, between and within its chains. It needs no long chain: `S` may be 1.

    Args:
        chains: `(C, S, ...)`, `S >= 4`; nested, `S >= 1`.
        superchains: how many groups the chains form, in order; `None` for split R-hat.

    Returns:
        `(...)`; 1 at convergence, and above 1.01 is a warning. NaN where chains do not move.

    Raises:
        ValueError: too few draws, or chains that form no equal groups of 2 or more.

    References:
        Aki Vehtari, Andrew Gelman, Daniel Simpson, Bob Carpenter, Paul-Christian Bürkner.
        *Rank-Normalization, Folding, and Localization: An Improved R-hat*, 2021.
        Charles Margossian, Matthew Hoffman, Pavel Sountsov, Lionel Riou-Durand, Aki Vehtari,
        Andrew Gelman. *Nested R-hat: Assessing the Convergence of Markov Chain Monte Carlo When
        Running Many Short Chains*, 2024.

    Example:
        >>> chains = torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0))
        >>> bool((rhat(chains) < 1.01).all())
        True
    """
    if superchains is None:
        _check(chains)
    elif superchains < 2 or len(chains) % superchains or len(chains) == superchains:
        raise ValueError(
            f"nested R-hat wants at least 2 equal groups of at least 2 chains; got {len(chains)} "
            f"chains in {superchains} groups"
        )

    def compare(x: Tensor) -> Tensor:
        return _split_rhat(x) if superchains is None else _nested_rhat(x, superchains)

    def both(x: Tensor) -> Tensor:
        ordered = x.flatten(0, 1).sort(0).values
        median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        bulk, tail = compare(_normal_scores(x)), compare(_normal_scores((x - median).abs()))
        return torch.maximum(bulk, tail)

    return _by_column(both, chains)


def ess(chains: Tensor) -> Tensor:
    """Bulk effective sample size: that of the mean of rank-normalised split chains.

    Args:
        chains: `(C, S, ...)`, `S >= 4`.

    Returns:
        `(...)`, in draws; up to `C S log10(C S)` for antithetic chains.

    References:
        As `rhat`; autocorrelations by Geyer's initial monotone sequence.

    Example:
        >>> chains = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> 1500 < ess(chains).item() < 2600
        True
    """
    _check(chains)
    return _by_column(lambda x: _effective_size(_normal_scores(_split(x))), chains)


def ess_tail(chains: Tensor) -> Tensor:
    """Tail effective sample size: the smaller of those of the 5 % and 95 % quantiles.

    Args:
        chains: `(C, S, ...)`, `S >= 4`.

    Returns:
        `(...)`, in draws.

    References:
        As `rhat`.
    """
    _check(chains)

    def tails(x: Tensor) -> Tensor:
        ordered, last = x.flatten(0, 1).sort(0).values, x.shape[0] * x.shape[1] - 1
        low, high = (ordered[round(q * last)] for q in (0.05, 0.95))
        return torch.minimum(*(_effective_size(_split((x <= q).double())) for q in (low, high)))

    return _by_column(tails, chains)


def ess_mean(chains: Tensor) -> Tensor:
    """Effective sample size of the mean of the draws as they are, `(...)`; see `ess`."""
    _check(chains)
    return _by_column(lambda x: _effective_size(_split(x)), chains)


def mcse_mean(chains: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean over `(C, S, ...)`: sd / √ESS of the raw draws."""
    _check(chains)
    return chains.flatten(0, 1).std(0) / ess_mean(chains).sqrt().to(chains)


def _by_column(figure: Callable[[Tensor], Tensor], chains: Tensor) -> Tensor:
    """Apply to `(C, S, k)` float64 blocks of scalars; draws that do not vary give NaN."""
    columns = chains.reshape(*chains.shape[:2], -1)
    width = max(1, BLOCK // (chains.shape[0] * chains.shape[1]))
    blocks = []
    for block in columns.split(width, dim=-1):
        x = block.double()
        still = (x == x[:1, :1]).flatten(0, 1).all(0) | ~torch.isfinite(x).flatten(0, 1).all(0)
        blocks.append(figure(x).masked_fill(still, torch.nan))
    return torch.cat(blocks).reshape(chains.shape[2:]).to(torch.get_default_dtype())


def _effective_size(chains: Tensor) -> Tensor:
    """Geyer's estimate over `(C, S, k)`: pairs of autocorrelations, positive and decreasing."""
    count, length = chains.shape[:2]
    centred = chains - chains.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 ** math.ceil(math.log2(2 * length)), dim=1)
    power = spectrum.real.square() + spectrum.imag.square()
    autocovariance = torch.fft.irfft(power.mean(0), dim=0)[:length] / length
    within = autocovariance[0] * length / (length - 1)
    total = autocovariance[0] + (chains.mean(1).var(0) if count > 1 else 0.0)
    rho = 1 - (within - autocovariance) / total
    rho[0] = 1.0
    pairs = rho[: length // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    kept = (pairs > 0).cumprod(0)
    monotone = pairs.cummin(0).values * kept
    after = kept.sum(0).clamp_max(len(pairs) - 1)
    next_even = rho[::2].gather(0, after.unsqueeze(0)).squeeze(0).clamp_min(0)
    tau = -1 + 2 * monotone.sum(0) + next_even
    size = count * length
    return size / tau.clamp_min(1 / math.log10(size))


def _split_rhat(chains: Tensor) -> Tensor:
    halves = _split(chains)
    length = halves.shape[1]
    within, between = halves.var(1).mean(0), halves.mean(1).var(0)
    return ((within * (length - 1) / length + between) / within).sqrt()


def _nested_rhat(chains: Tensor, superchains: int) -> Tensor:
    groups = chains.unflatten(0, (superchains, -1))  # (K, M, S, k)
    within = groups.var(2).mean(1) if groups.shape[2] > 1 else 0.0
    between_chains = groups.mean(2).var(1)
    between_groups = groups.mean((1, 2)).var(0)
    return (1 + between_groups / (between_chains + within).mean(0)).sqrt()


def _split(chains: Tensor) -> Tensor:
    half = chains.shape[1] // 2
    return torch.cat([chains[:, :half], chains[:, chains.shape[1] - half :]])


def _normal_scores(chains: Tensor) -> Tensor:
    columns = chains.flatten(0, 1).mT.contiguous()
    ordered = columns.sort(-1).values
    below, upto = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    ranks = (below + upto + 1).double() / 2  # equal draws share the mean of their ranks
    scores = torch.special.ndtri((ranks - 0.375) / (columns.shape[-1] + 0.25))
    return scores.mT.reshape(chains.shape)


def _check(chains: Tensor) -> None:
    if chains.dim() < 2 or chains.shape[1] < 4:
        raise ValueError(
            f"chains must be (C, S, ...) with S >= 4 draws; got {tuple(chains.shape)}"
        )
