"""p(z | x) and log p(x) on a grid: exact for one, two and three latent dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.checks import check_model
from pyro_vae.log_joint import LogJoint, definite
from pyro_vae.pair import Batch, Model, evaluating, preserved_rng
from pyro_vae.posterior.draws import Draws
from pyro_vae.posterior.grid import Grid, extent, unit_nodes
from pyro_vae.posterior.lattice import share
from pyro_vae.tables import Tabular, by_datum

if TYPE_CHECKING:
    import pandas as pd

NODES = {1: (129, 128), 2: (41, 48), 3: (17, 24)}
"""By `L`: nodes a side while the grid is being placed, and at its first evaluation."""
BLOCK = 2**15
"""Nodes of all data whose grids are placed together."""


@dataclass(frozen=True, repr=False)
class Quadrature(Tabular):
    """The posteriors of `B` data, each on a grid.

    Attributes:
        log_evidence: log p(x), nats, `(B,)`, float64.
        error: how far a grid of half as many nodes a side was from it, nats, `(B,)`; the farthest
            of them where several are at hand. For smooth densities the true error is far smaller:
            it is about the square.
        mean: posterior mean of the stacked latents, `(B, L)`.
        covariance: posterior covariance, `(B, L, L)`.
        grids: where the nodes are, and the probability of each cell.
    """

    log_evidence: Tensor
    error: Tensor
    mean: Tensor
    covariance: Tensor
    grids: tuple[Grid, ...]
    _target: LogJoint

    @property
    def table(self) -> pd.DataFrame:
        """A row a datum: log p(x), its error, mean and sd of each latent."""
        moments = {
            f"{name}[{i}]": value[:, i]
            for name, value in (("mean", self.mean), ("sd", self.sd))
            for i in range(value.shape[1])
        }
        return by_datum({"log_evidence": self.log_evidence, "error": self.error} | moments)

    @property
    def sd(self) -> Tensor:
        """Posterior standard deviation, `(B, L)`."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    def density(self, datum: int) -> tuple[Tensor, Tensor]:
        """The nodes of one datum as latents, `(n, ..., n, L)`, and p(z | x) at each.

        Raises:
            ValueError: a latent on a simplex or the like, which has no density per volume of z.
        """
        grid = self.grids[datum]
        nodes = grid.nodes.flatten(0, -2).unsqueeze(1)
        latents, log_jacobian = self._target.rows(slice(datum, datum + 1)).constrain(nodes)
        z = torch.cat([value.reshape(len(nodes), -1) for value in latents.values()], -1)
        if z.shape[-1] != nodes.shape[-1]:
            raise ValueError("these latents have fewer degrees of freedom than coordinates")
        jacobian = log_jacobian.exp().reshape(grid.probability.shape)
        return z.reshape(grid.nodes.shape), grid.density / jacobian

    def sample(self, draws: int, *, seed: int = 0) -> Draws:
        """Draw independently: a node by its probability, then a point of its cell.

        The spread within a cell would add (its side)²/12 to the variance along each axis of the
        grid; draws are pulled to the mean by that much, so that mean and covariance are those
        of the grid. What is left is a shape smoothed over a cell, 0.1 to 0.6 sd wide.

        Args:
            draws: `S`.
            seed: of the draws.

        Returns:
            `Draws` of one chain, `(1, S, B, *event)`.
        """
        generator = torch.Generator().manual_seed(seed)
        points = torch.stack([grid.sample(draws, generator) for grid in self.grids], dim=1)
        points = points.to(self._target.batch[0].device, self._target.dtype)
        sites, _ = self._target.constrain(points)
        return Draws({name: v.unsqueeze(0) for name, v in sites.items()}, method="quadrature")


def quadrature(
    model: Model,
    batch: Batch,
    *,
    tolerance: float = 1e-5,
    max_nodes: int = 2**18,
    chunk: int = 2**12,
    seed: int = 0,
) -> Quadrature:
    r"""Integrate p(x, z) over the latents of each datum.

    $$\log p(x) = \log \int p(x, z)\,dz \approx \log \sum_i p(x, z_i) + \log |\text{cell}|$$

    Many data under one decoder (8 or more, in one and two dimensions; Bernoulli or Normal; the
    rows only observed) share lattices first: a latent is decoded once for some hundred data, and
    a matrix product scores it for each. The first lattice covers the prior's range, the next ones
    the neighbourhoods of data that it does not resolve; in two dimensions lattices of more nodes
    follow for those that are left. Whether rows are only observed is asked at each node of the
    first lattice, with all rows in turn.

    Each datum that no lattice resolves gets a grid of its own. It starts from where a lattice
    found it, or from the range of the prior's draws, grows where density reaches its border,
    shrinks to all cells that may hold density (a cell is kept while its value plus its steepest
    change to a neighbour comes within 30 nats of the highest, so that a peak between coarse nodes
    survives where its flanks show), and turns to the posterior's principal axes. Then nodes double
    until log p(x) is settled. The midpoint rule converges faster than any power of the spacing for
    smooth densities; at kinks (ReLU), like its square.

    Args:
        model: p(z) p(x | z) with at most 3 latent dimensions a datum.
        batch: tensors of `B` rows.
        tolerance: stop doubling when log p(x) changes by less, in nats.
        max_nodes: nor use more nodes than this for one datum; `error` says what is left.
        chunk: nodes decoded at once. Some thousand keep what a decoder computes in the cache.
        seed: of the prior's draws; torch's random state is left as it was.

    Returns:
        `Quadrature`.

    Warning:
        A second mode so narrow that no node of the first, prior-wide grid sees its flanks is
        missed, in silence: 0.01 of the prior's range in two dimensions, 0.002 where data share
        lattices. Compare with MCMC where that may be. Where a density jumps, `error` is no guide.

    Raises:
        ValueError: more than 3 latent dimensions; a datum without likelihood; a density
            that does not fall off.

    Warns:
        UserWarning: a latent is rounded onto a border of its support where its density is
            infinite, as Gamma(0.05) is at 0; the mass that lies there is left out.

    References:
        Lloyd N. Trefethen, J. A. C. Weideman. *The Exponentially Convergent Trapezoidal
        Rule*, 2014.

    Example:
        >>> from pyro_vae.models import PPCA
        >>> model = PPCA(torch.eye(3, 2), torch.zeros(3), noise=0.5)
        >>> x = torch.ones(1, 3)
        >>> exact = quadrature(model, (x,))
        >>> bool((exact.log_evidence - model.log_evidence(x)).abs() < 1e-4)
        True
    """
    check_model(model, batch)
    with preserved_rng(seed), evaluating(model), torch.no_grad():
        target = LogJoint(model, batch)
        if target.size > 3:
            raise ValueError(
                f"quadrature is for at most 3 latent dimensions; this model has {target.size}"
                "\n  try:      pv.posterior.nuts(model, batch)"
            )
        limits: dict[str, Any] = {"tolerance": tolerance, "max_nodes": max_nodes, "chunk": chunk}
        shared = share(target, *_prior_range(target, chunk), **limits)
        found = {
            b: _Found(shared.log_evidence[b], shared.error[b], grid)
            for b, grid in shared.grids.items()
        }
        left = torch.tensor([b for b in range(len(batch[0])) if b not in found], dtype=torch.long)
        step = max(1, BLOCK // NODES[target.size][0] ** target.size)
        for index in left.split(step) if len(left) else ():
            low, high = shared.low[index], shared.high[index]
            box = _Box((low + high) / 2, torch.diag_embed((high - low) / 2))
            own = _integrate(target.rows(index), box, index, **limits)
            found |= dict(zip(index.tolist(), own, strict=True))
        rows = [found[b] for b in range(len(batch[0]))]
        moments = [_moments(target, b, row.grid) for b, row in enumerate(rows)]
    return Quadrature(
        log_evidence=torch.stack([row.log_evidence for row in rows]),
        error=torch.stack([row.error for row in rows]),
        mean=torch.stack([mean for mean, _ in moments]),
        covariance=torch.stack([covariance for _, covariance in moments]),
        grids=tuple(row.grid for row in rows),
        _target=target,
    )


class _Found(NamedTuple):
    """What is found for one datum."""

    log_evidence: Tensor
    error: Tensor
    grid: Grid


class _Box(NamedTuple):
    """Boxes of `B` data: `center (B, L)`, `axes (B, L, L)` with half sides as columns."""

    center: Tensor
    axes: Tensor

    def rows(self, index: Tensor) -> _Box:
        return _Box(self.center[index], self.axes[index])

    def nodes(self, side: int) -> Tensor:
        """`(side**L, B, L)`."""
        unit = unit_nodes([side] * self.center.shape[-1])
        return self.center + torch.einsum("blk,mk->mbl", self.axes, unit)


def _integrate(
    target: LogJoint, box: _Box, index: Tensor, *, tolerance: float, max_nodes: int, chunk: int
) -> list[_Found]:
    """Integrate each datum on a grid of its own, which starts from its box."""
    dim = target.size
    coarse, side = NODES[dim]
    for _ in range(2):
        box = _turn(*_fit(target, box, coarse, index, chunk), coarse)
    box, _, _ = _fit(target, box, coarse, index, chunk)

    log_evidence = _log_sum(_evaluate(target, box.nodes(side // 2), chunk), box, side // 2)
    found: dict[int, _Found] = {}
    todo = torch.arange(len(index))
    while len(todo):
        part, sub = target.rows(todo), box.rows(todo)
        values = _evaluate(part, sub.nodes(side), chunk)
        finer = _log_sum(values, sub, side)
        error = (finer - log_evidence[todo]).abs()
        log_evidence[todo] = finer
        done = (error < tolerance) | ((2 * side) ** dim > max_nodes)
        for j in done.nonzero().flatten().tolist():
            probability = values[:, j].softmax(0).reshape([side] * dim)
            grid = Grid(sub.center[j], sub.axes[j], probability)
            found[int(todo[j])] = _Found(finer[j], error[j], grid)
        todo, side = todo[~done], 2 * side
    return [found[j] for j in range(len(index))]


def _fit(
    target: LogJoint, box: _Box, side: int, index: Tensor, chunk: int
) -> tuple[_Box, Tensor, Tensor]:
    """Grow and shrink each box until it just holds all cells that may matter.

    Returns the boxes, and the last nodes `(M, B, L)` and values `(M, B)` that told so.
    """
    center, axes = box.center.clone(), box.axes.clone()
    active = torch.arange(len(center))
    seen = box.nodes(side)
    values = seen.new_empty(seen.shape[:2])
    for _ in range(60):
        part, sub = target.rows(active), box.rows(active)
        seen[:, active] = sub.nodes(side)
        values[:, active] = _evaluate(part, seen[:, active], chunk)
        shaped = values[:, active].T.reshape(-1, *[side] * target.size)
        _refuse_impossible(shaped, index[active])
        low, high = extent(shaped, side)
        grows = (low < -1.01) | (high > 1.01)
        low = torch.where(grows, low.clamp_max(-1), low)  # an axis that grows does not shrink
        high = torch.where(grows, high.clamp_min(1), high)
        center[active] = sub.center + torch.einsum("blk,bk->bl", sub.axes, (low + high) / 2)
        axes[active] = sub.axes * ((high - low) / 2).unsqueeze(1)
        box = _Box(center, axes)
        settled = ((high - low > 1.8) & ~grows).all(1)
        active = active[~settled]
        if not len(active):
            return box, seen, values
    raise ValueError(
        f"no box holds the posterior of data {index[active].tolist()[:5]}: it does not fall off"
        "\n  expected: a proper prior"
        "\n  try:      pv.check_pair(model, guide, batch), and look at the prior's scales"
    )


def _refuse_impossible(values: Tensor, index: Tensor) -> None:
    impossible = values.flatten(1).max(1).values == -torch.inf
    if impossible.any():
        raise ValueError(
            f"data {index[impossible].tolist()[:5]} have no likelihood anywhere on the grid"
            "\n  expected: a finite log p(x, z) for some z"
            "\n  try:      pv.check_pair(model, guide, batch)"
        )


def _turn(box: _Box, nodes: Tensor, values: Tensor, side: int) -> _Box:
    """Turn each box to the principal axes of its posterior, covering the old one."""
    weights = values.softmax(0)
    centred = nodes - torch.einsum("mb,mbl->bl", weights, nodes)
    spread = torch.einsum("mb,mbk,mbl->bkl", weights, centred, centred)
    cell = box.axes @ box.axes.mT / (3 * side**2)  # the variance within a cell
    directions = torch.linalg.eigh(spread + cell).eigenvectors
    reach = (directions.mT @ box.axes).abs().sum(-1)
    return _Box(box.center, directions * reach.unsqueeze(1))


def _evaluate(target: LogJoint, nodes: Tensor, chunk: int) -> Tensor:
    """Log p(x, z) at `(M, B, L)` nodes, `chunk` at a time; `(M, B)` float64 on the CPU."""
    step = max(1, chunk // nodes.shape[1])
    values = [
        target(part.to(target.batch[0].device, target.dtype)).double().cpu()
        for part in nodes.split(step)
    ]
    return definite(torch.cat(values))


def _log_sum(values: Tensor, box: _Box, side: int) -> Tensor:
    cell = box.axes.det().abs() * (2 / side) ** box.center.shape[-1]
    return values.logsumexp(0) + cell.log()


def _moments(target: LogJoint, datum: int, grid: Grid) -> tuple[Tensor, Tensor]:
    nodes = grid.nodes.flatten(0, -2).unsqueeze(1).to(target.batch[0].device, target.dtype)
    sites, _ = target.rows(slice(datum, datum + 1)).constrain(nodes)
    z = torch.cat([value.reshape(len(nodes), -1) for value in sites.values()], -1).double().cpu()
    weights = grid.probability.flatten()
    mean = weights @ z
    return mean, (z - mean).mT @ ((z - mean) * weights.unsqueeze(-1))


def _prior_range(target: LogJoint, chunk: int) -> tuple[Tensor, Tensor]:
    draws, ends = 256, []
    rows = max(1, chunk // draws)
    for first in range(0, len(target.batch[0]), rows):
        drawn = target.rows(slice(first, first + rows)).prior_draws(draws)
        ends.append(drawn.double().cpu().flatten(0, 1).aminmax(dim=0))
    low = torch.stack([end.min for end in ends]).min(0).values
    high = torch.stack([end.max for end in ends]).max(0).values
    margin = (high - low) / 4
    return low - margin, high + margin
