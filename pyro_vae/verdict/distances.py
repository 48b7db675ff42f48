"""Distances between distributions, on tensors alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.verdict.moments import check_draws, coverage, moment_errors


def distances(
    draws: Tensor, reference: Tensor, *, points: int = 500, seed: int = 0
) -> dict[str, Tensor]:
    """Every distance of a guide from reference chains, each beside its own zero.

    The reference is split by chains into two halves. The guide is held against the first; so
    is the second half, with as many points, and that figure, `..._zero`, is what the distance
    comes to where nothing is wrong but the Monte Carlo error. All are in units of the
    reference's sd.

    Args:
        draws: of the guide, `(S, B, L)`.
        reference: chains of the sampler, `(C, T, B, L)`, `C >= 2`.
        points: at most so many draws of each side enter the distances between pairs, thinned
            evenly; the others take all draws.
        seed: of the directions.

    Returns:
        Columns of a table, each `(B,)`, with a `_zero` beside: `sliced_wasserstein`, `mmd`,
        `c2st`; and at the worst coordinate `mean_error` and `sd_error`, signed, and
        `coverage`, the share of the reference within the central 90 % of the draws.

    Warning:
        Chains that have not converged make both figures large, or, stuck in one mode
        together, neither: look at R-hat first.

    Raises:
        ValueError: one chain, or draws of other data.

    Example:
        >>> draws, chains = torch.randn(900, 3, 2), torch.randn(4, 400, 3, 2)
        >>> columns = distances(0.5 * draws, chains)
        >>> bool((columns["c2st"] > columns["c2st_zero"] + 0.05).all())
        True
    """
    if reference.dim() != 4 or len(reference) < 2:
        raise ValueError(
            "reference must be (C, T, B, L) with C >= 2 chains, one half to be the other's zero; "
            f"got {tuple(reference.shape)}"
        )
    first, second = (half.flatten(0, 1) for half in reference.tensor_split(2))
    check_draws(draws, first)
    count = min(points, len(draws), len(first), len(second))
    ours, zero = (_figures(side, first, count, seed) for side in (draws, second))
    return {
        f"{name}{suffix}": side[name]
        for name in ours
        for suffix, side in (("", ours), ("_zero", zero))
    }


def sliced_wasserstein(
    a: Tensor,
    b: Tensor,
    *,
    directions: int = 64,
    order: float = 2,
    chunk: int = 2**22,
    seed: int = 0,
) -> Tensor:
    r"""Wasserstein distance of projections on random lines.

    $$\mathrm{SW}_p(a, b) = \Big(\mathbb E_\theta \int_0^1
      \big|F^{-1}_{\theta^\top a}(u) - F^{-1}_{\theta^\top b}(u)\big|^p du\Big)^{1/p}$$

    with θ uniform on the sphere, the same for all data, and the integral over the empirical
    quantile functions exact, whether or not there are as many draws of `a` as of `b`.

    Args:
        a: draws, `(S, B, L)`.
        b: draws, `(S', B, L)`.
        directions: lines, whose mean has a standard error of about $1/\sqrt{\text{directions}}$
            of itself.
        order: p, at least 1.
        chunk: projections held at once, which bounds the memory.
        seed: of the directions.

    Returns:
        `(B,)`, in units of the latents.

    Warning:
        Above 0 for two samples of one law, by about $2.4 / \sqrt S$ sd for p = 2.

    Raises:
        ValueError: draws of other data.

    References:
        Nicolas Bonneel, Julien Rabin, Gabriel Peyré, Hanspeter Pfister. *Sliced and Radon
        Wasserstein Barycenters of Measures*, 2015.

    Example:
        >>> z = torch.randn(100, 3, 1)
        >>> bool(torch.allclose(sliced_wasserstein(z, z + 2), torch.full((3,), 2.0)))
        True
    """
    check_draws(a, b)
    generator = torch.Generator().manual_seed(seed)
    lines = torch.randn(a.shape[-1], directions, generator=generator).to(a)
    lines = lines / lines.norm(dim=0)
    of_a, of_b, width = _quantile_steps(len(a), len(b))

    def figure(a: Tensor, b: Tensor) -> Tensor:
        a, b = ((side @ lines).sort(0).values for side in (a, b))
        cost = (a[of_a] - b[of_b]).abs().pow(order)
        return torch.tensordot(width.to(cost), cost, 1).mean(-1).pow(1 / order)

    return _by_rows(figure, a, b, chunk // (directions * len(width)))


def mmd(a: Tensor, b: Tensor, *, bandwidth: float | None = None, chunk: int = 2**22) -> Tensor:
    r"""Squared maximum mean discrepancy with a Gaussian kernel, unbiased.

    $$\mathrm{MMD}^2 = \mathbb E\,k(a, a') + \mathbb E\,k(b, b') - 2\,\mathbb E\,k(a, b),
      \qquad k(x, y) = e^{-\|x - y\|^2 / 2 h^2}$$

    Args:
        a: draws, `(S, B, L)`, `S >= 2`.
        b: the reference, `(S', B, L)`, `S' >= 2`.
        bandwidth: h; by default the median distance between two draws of `b`, for each datum.
        chunk: pairs of draws held at once, at least those of one datum.

    Returns:
        `(B,)`, at most 2. In expectation 0 for two samples of one law, so it may be negative;
        its standard error is then below $1/S$, and grows to order $1/\sqrt S$ where the laws
        differ. NaN where most draws of `b` are the same.

    Warning:
        Chains that mix slowly make it too large, like anything that takes draws for
        independent: thin them.

    Raises:
        ValueError: draws of other data.

    References:
        Arthur Gretton, Karsten M. Borgwardt, Malte J. Rasch, Bernhard Schölkopf, Alexander
        Smola. *A Kernel Two-Sample Test*, 2012.

    Example:
        >>> z = torch.randn(100, 3, 2)
        >>> bool((mmd(z[:50] + 3, z[50:]) > 0.5).all())
        True
    """
    check_draws(a, b)

    def figure(a: Tensor, b: Tensor) -> Tensor:
        aa, ab, bb = (_pairwise(x, y) for x, y in ((a, a), (a, b), (b, b)))
        above = torch.ones(bb.shape[1:], dtype=torch.bool, device=bb.device).triu(1)
        h = bb[:, above].median(-1).values if bandwidth is None else bb.new_tensor(bandwidth)
        aa, ab, bb = ((d / h.view(-1, 1, 1)).square().mul(-0.5).exp() for d in (aa, ab, bb))
        return _mean_of_others(aa) + _mean_of_others(bb) - 2 * ab.mean((-1, -2))

    return _by_rows(figure, a, b, chunk // max(len(a), len(b)) ** 2)


def c2st(a: Tensor, b: Tensor, *, neighbours: int = 15, chunk: int = 2**22) -> Tensor:
    r"""Classifier two-sample test: how well nearest neighbours tell `a` from `b`.

    Each draw is classified by the majority of its k nearest neighbours among all others, in
    units of the sd of `b`. Under one law a draw has one rival fewer of its own kind, so the
    chance $\alpha_0$ that the majority is of its kind, a hypergeometric one, is below a half.
    The accuracy $\alpha$ is put on the scale of independent classes,
    $1 - (1 - \alpha) / 2(1 - \alpha_0)$.

    Args:
        a: draws, `(S, B, L)`.
        b: the reference, `(S, B, L)`, as many.
        neighbours: k, odd and below S.
        chunk: pairs of draws held at once, at least those of one datum.

    Returns:
        `(B,)`: 0.5 in expectation for two samples of one law, 1 for disjoint ones. Its standard
        error under one law is 0.4 to 0.5 of $1/\sqrt S$, more than that of 2 S coin tosses, as
        neighbours judge each other.

    Warning:
        Equal draws, as a chain that rejects has, are their own nearest neighbours and look
        like a difference: thin them.

    Raises:
        ValueError: unequal sizes, draws of other data, or `neighbours` even or out of range.

    References:
        David Lopez-Paz, Maxime Oquab. *Revisiting Classifier Two-Sample Tests*, 2017.
        Mark F. Schilling. *Multivariate Two-Sample Tests Based on Nearest Neighbors*, 1986.
        Norbert Henze. *A Multivariate Two-Sample Test Based on the Number of Nearest Neighbor
        Type Coincidences*, 1988.

    Example:
        >>> z = torch.randn(200, 3, 2)
        >>> c2st(z[:100], z[100:] + 50)
        tensor([1., 1., 1.])
    """
    check_draws(a, b)
    size = len(a)
    if len(b) != size or neighbours % 2 == 0 or not 0 < neighbours < size:
        raise ValueError(
            "c2st wants as many draws on both sides and an odd number of neighbours below it; "
            f"got {size} and {len(b)} draws, {neighbours} neighbours"
        )
    kind = torch.arange(2 * size, device=a.device) < size
    chance = _chance_of_own_majority(size, neighbours)

    def figure(a: Tensor, b: Tensor) -> Tensor:
        scaled = torch.cat([a, b]) / b.std(0)
        between = _pairwise(scaled, scaled)
        between.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        nearest = between.topk(neighbours, largest=False).indices
        own = (kind[nearest] == kind.unsqueeze(-1)).sum(-1) > neighbours / 2
        wrong = 1 - own.to(a).mean(-1)
        usable = torch.isfinite(scaled).all((0, 2))
        return torch.where(usable, 1 - wrong / (2 * (1 - chance)), torch.nan)

    return _by_rows(figure, a, b, chunk // (2 * size) ** 2)


def _figures(draws: Tensor, reference: Tensor, count: int, seed: int) -> dict[str, Tensor]:
    sd = reference.std(0)
    a, b = (_thinned(side, count) / sd for side in (draws, reference))
    errors = moment_errors(draws, reference)
    return {
        "sliced_wasserstein": sliced_wasserstein(a, b, seed=seed),
        "mmd": mmd(a, b),
        "c2st": c2st(a, b),
        "mean_error": _worst(errors.mean),
        "sd_error": _worst(errors.sd),
        "coverage": 0.9 + _worst(coverage(draws, reference) - 0.9),
    }


def _thinned(draws: Tensor, count: int) -> Tensor:
    return draws[torch.linspace(0, len(draws) - 1, count).round().long()]


def _worst(errors: Tensor) -> Tensor:
    return errors.gather(-1, errors.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _by_rows(
    figure: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, rows: int
) -> Tensor:
    """A figure of `(S, B, L)` and `(S', B, L)`, some data at once."""
    pieces = zip(a.split(max(1, rows), dim=1), b.split(max(1, rows), dim=1), strict=True)
    return torch.cat([figure(x, y) for x, y in pieces])


def _quantile_steps(size: int, other: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where two empirical quantile functions are both constant: order statistics, and width."""
    ends = torch.cat([torch.arange(1, size + 1) * other, torch.arange(1, other + 1) * size])
    ends = ends.unique()
    width = ends.diff(prepend=ends.new_zeros(1)).double() / (size * other)
    return (ends - 1) // other, (ends - 1) // size, width


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    """Distances `(B, S, S')`."""
    mode = "donot_use_mm_for_euclid_dist"  # the other cancels near 0
    return torch.cdist(a.transpose(0, 1), b.transpose(0, 1), compute_mode=mode)


def _mean_of_others(kernel: Tensor) -> Tensor:
    """Mean off the diagonal, which is 1."""
    size = kernel.shape[-1]
    return (kernel.sum((-1, -2)) - size) / (size * (size - 1))


def _chance_of_own_majority(size: int, neighbours: int) -> float:
    """For random neighbours: of the others, `size - 1` are of one's own kind."""
    majorities = range(neighbours // 2 + 1, neighbours + 1)
    ways = sum(math.comb(size - 1, k) * math.comb(size, neighbours - k) for k in majorities)
    return ways / math.comb(2 * size - 1, neighbours)
