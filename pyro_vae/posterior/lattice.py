"""Posteriors of many data under one decoder, on lattices that neighbours share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint
from pyro_vae.posterior.crossed import crossed, shares_latents
from pyro_vae.posterior.grid import Grid, extent, unit_nodes

SIDES = {1: (4096,), 2: (192, 512)}
"""By `L`: nodes a side of a lattice, and of those for data that these do not resolve. In three
dimensions none is fine enough to settle much."""
FEWEST = 8
"""Data for which a lattice is cheaper than a grid of its own for each."""
HELD = 2**25
"""Densities held at once, of all data and nodes."""
TOGETHER = 2**21
"""Densities looked at together: what that needs stays in the heap."""


@dataclass(frozen=True)
class Shared:
    """What lattices tell of `B` data: the integrals of most, and where all of them lie.

    Attributes:
        log_evidence: log p(x), `(B,)`, float64; of no use where `error` is infinite.
        error: how far the farthest lattice of twice the spacing was from it; infinite for data
            that no lattice resolves.
        low: where a box begins that holds the posterior, `(B, L)`.
        high: where it ends.
        grids: of the data that are settled.
    """

    log_evidence: Tensor
    error: Tensor
    low: Tensor
    high: Tensor
    grids: dict[int, Grid]


def share(
    target: LogJoint, low: Tensor, high: Tensor, *, tolerance: float, max_nodes: int, chunk: int
) -> Shared:
    """Integrate many data on lattices over boxes that hold many posteriors.

    The first lattice covers the prior's range. A datum is settled where all lattices of twice the
    spacing agree with it. The others part along each axis, at the median of where they lie, and
    lattices of as many nodes cover the boxes of those that lie together; until they are few, or a
    box would hardly shrink. Those that are left then, elongated or with far modes, go the same way
    with lattices of more nodes. None is settled where the target is not one that `shares_latents`.

    Args:
        target: the posteriors of `B` data.
        low: where the prior's range begins, `(L,)`.
        high: where it ends.
        tolerance: in nats.
        max_nodes: for one datum.
        chunk: latents decoded at once, at most.
    """
    count = len(target.batch[0])
    found = Shared(
        torch.zeros(count, dtype=torch.float64),
        torch.full((count,), torch.inf, dtype=torch.float64),
        low.repeat(count, 1), high.repeat(count, 1), {},
    )  # fmt: skip
    sides = [n for n in SIDES.get(target.size, ()) if n**target.size <= max_nodes]
    if count < FEWEST or not sides:
        return found
    if not shares_latents(target, _nodes(target, low, high, sides[0]), chunk=chunk):
        return found
    for side in sides:
        left = found.error.isinf().nonzero().flatten()
        groups = [left] if len(left) >= FEWEST else []
        while groups:
            group = groups.pop()
            low, high = found.low[group].amin(0), found.high[group].amax(0)
            for index in group.split(HELD // side**target.size):
                _integrate(found, target.rows(index), index, low, high, side, tolerance, chunk)
            groups += _parts(found, group[found.error[group].isinf()], _volume(low, high))
    return found


def _integrate(
    found: Shared,
    target: LogJoint,
    index: Tensor,
    low: Tensor,
    high: Tensor,
    side: int,
    tolerance: float,
    chunk: int,
) -> None:
    """Settle those data that one lattice resolves, and tell where all of them lie."""
    dim = target.size
    center, half = (low + high) / 2, (high - low) / 2
    cell = (half * 2 / side).prod().log()
    log_prior, scores = crossed(target, _nodes(target, low, high, side), chunk=chunk)
    scores += log_prior
    few = max(1, TOGETHER // side**dim)
    for values, where in zip(scores.split(few), index.split(few), strict=True):
        top = values.amax(1, keepdim=True)
        height = values - top
        begin, end = extent(height.float().reshape(-1, *[side] * dim), side)
        mass = height.exp_().reshape(-1, *[side // 2, 2] * dim)
        wider = mass.sum(tuple(range(1, 2 * dim, 2))).flatten(1) * 2**dim
        total = wider.mean(1)
        error = (wider / total.unsqueeze(1)).log().abs().amax(1)
        settled = ((begin >= -1) & (end <= 1)).all(1) & (error < tolerance)
        found.log_evidence[where] = total.log() + top.squeeze(1) + cell
        found.error[where] = error.where(settled, torch.inf)
        found.low[where], found.high[where] = center + begin * half, center + end * half
        mass = mass.reshape(-1, *[side] * dim)
        for j in settled.nonzero().flatten().tolist():
            first, last = (((edge[j] + 1) * side / 2).round().long() for edge in (begin, end))
            crop = mass[j][*(slice(a, b) for a, b in zip(first, last, strict=True))]
            b = int(where[j])
            found.grids[b] = Grid(
                (found.low[b] + found.high[b]) / 2,
                torch.diag((found.high[b] - found.low[b]) / 2),
                crop / crop.sum(),
            )


def _parts(found: Shared, group: Tensor, volume: Tensor) -> list[Tensor]:
    """Those of a group that lie together, where a lattice over their box is worth it."""
    own = _volume(found.low[group], found.high[group])
    group = group[own < volume / 4]  # others, such as far modes, would widen all boxes
    if len(group) < FEWEST:
        return []
    place = found.low[group] + found.high[group]
    above = (place > place.median(0).values).long()
    label = above @ (2 ** torch.arange(above.shape[1]))
    parts = [group[label == k] for k in label.unique()]
    return [
        part
        for part in parts
        if len(part) >= FEWEST
        and _volume(found.low[part].amin(0), found.high[part].amax(0)) < volume / 2
    ]


def _nodes(target: LogJoint, low: Tensor, high: Tensor, side: int) -> Tensor:
    unit = unit_nodes([side] * target.size)
    nodes = (low + high) / 2 + unit * (high - low) / 2
    return nodes.to(target.batch[0].device, target.dtype)


def _volume(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).prod(-1)
