"""Posteriors of many data under one decoder, on lattices that neighbours share."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint
from pyro_vae.posterior.crossed import crossed, shares_latents
from pyro_vae.posterior.grid import Grid, extent, unit_nodes

SIDES = {1: 4096, 2: 192}
"""By `L`: nodes a side of a lattice. In three dimensions none is fine enough to settle much."""
FEWEST = 8
"""Data for which a lattice is cheaper than a grid of its own for each."""
ROWS = 2**10
"""Data whose densities are held at once."""
BLOCK = 2**6
"""Data whose densities are looked at together."""


class Shared:
    """What lattices tell of `B` data: the integrals of most, and where the others lie.

    The first lattice covers the prior's range. A datum is settled where all lattices of twice the
    spacing agree with it. The others part along each axis, at the median of where they lie, and
    lattices of as many nodes cover the boxes of those that lie together; until they are few, or a
    box would hardly shrink. For models that are not `shares_latents`, none is settled.

    Args:
        target: the posteriors of `B` data.
        low: where the prior's range begins, `(L,)`.
        high: where it ends.
        tolerance: in nats.
        chunk: latents decoded at once.

    Attributes:
        log_evidence: log p(x) of those settled, `(B,)`, float64.
        error: how far the farthest lattice of twice the spacing was from it; infinite for those
            that are not settled.
        grids: of those settled, by datum.
        low: where a box begins that holds the posterior, `(B, L)`.
        high: where it ends.
    """

    def __init__(
        self, target: LogJoint, low: Tensor, high: Tensor, tolerance: float, chunk: int
    ) -> None:
        count = len(target.batch[0])
        self.log_evidence = torch.zeros(count, dtype=torch.float64)
        self.error = torch.full_like(self.log_evidence, torch.inf)
        self.grids: dict[int, Grid] = {}
        self.low, self.high = low.repeat(count, 1), high.repeat(count, 1)
        self.tolerance, self.chunk = tolerance, chunk
        pays = target.size in SIDES and count >= FEWEST and shares_latents(target)
        groups = [torch.arange(count)] if pays else []
        while groups:
            group = groups.pop()
            box = self.low[group].amin(0), self.high[group].amax(0)
            for index in group.split(ROWS):
                self._integrate(target.rows(index), index, *box)
            groups += self._parts(group[self.error[group].isinf()], _volume(*box))

    def _integrate(self, target: LogJoint, index: Tensor, low: Tensor, high: Tensor) -> None:
        """Settle those data that one lattice resolves, and tell where the others lie."""
        dim, side = target.size, SIDES[target.size]
        center, half = (low + high) / 2, (high - low) / 2
        nodes = center + unit_nodes([side] * dim) * half
        device = target.batch[0].device
        values = crossed(target, nodes.to(device, target.dtype), chunk=self.chunk)
        assert values is not None  # asked before
        cell = (half * 2 / side).prod().log()
        for few, where in zip(values.split(BLOCK), index.split(BLOCK), strict=True):
            top = few.amax(1, keepdim=True)
            height = few - top
            begin, end = extent(height.float().reshape(-1, *[side] * dim), side)
            mass = height.exp_().reshape(-1, *[side // 2, 2] * dim)
            wider = mass.sum(tuple(range(1, 2 * dim, 2))).flatten(1) * 2**dim
            total = wider.mean(1)
            error = (wider / total.unsqueeze(1)).log().abs().amax(1)
            settled = ((begin >= -1) & (end <= 1)).all(1) & (error < self.tolerance)
            self.log_evidence[where] = total.log() + top.squeeze(1) + cell
            self.error[where] = error.where(settled, torch.inf)
            self.low[where], self.high[where] = center + begin * half, center + end * half
            mass = mass.reshape(-1, *[side] * dim)
            for j in settled.nonzero().flatten().tolist():
                first, last = (((edge[j] + 1) * side / 2).round().long() for edge in (begin, end))
                crop = mass[j][*(slice(a, b) for a, b in zip(first, last, strict=True))]
                b = int(where[j])
                self.grids[b] = Grid(
                    (self.low[b] + self.high[b]) / 2,
                    torch.diag((self.high[b] - self.low[b]) / 2),
                    crop / crop.sum(),
                )

    def _parts(self, group: Tensor, volume: Tensor) -> list[Tensor]:
        """Those of a group that lie together, where a lattice over their box is worth it."""
        own = _volume(self.low[group], self.high[group])
        group = group[own < volume / 4]  # others, such as far modes, would widen all boxes
        place = self.low[group] + self.high[group]
        if len(group) < FEWEST:
            return []
        above = (place > place.median(0).values).long()
        label = above @ (2 ** torch.arange(above.shape[1]))
        parts = [group[label == k] for k in label.unique()]
        return [
            part
            for part in parts
            if len(part) >= FEWEST
            and _volume(self.low[part].amin(0), self.high[part].amax(0)) < volume / 2
        ]


def _volume(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).prod(-1)
