"""Grids over latents: where their nodes are, and which of their cells may matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DEPTH = 30.0
"""A grid covers all that is within so many nats of the highest density."""


class Grid(NamedTuple):
    """The grid of one datum: nodes at `center + axes @ t`, `t` at midpoints of [-1, 1]^L.

    Coordinates are unconstrained, as in `LogJoint`; float64, on the CPU.
    """

    center: Tensor
    """`(L,)`"""
    axes: Tensor
    """`(L, L)`, a half side a column"""
    probability: Tensor
    """of each cell, `(n_1, ..., n_L)`, sums to 1"""

    @property
    def nodes(self) -> Tensor:
        """`(n_1, ..., n_L, L)`."""
        unit = unit_nodes(self.probability.shape)
        return (self.center + unit @ self.axes.mT).reshape(*self.probability.shape, -1)

    @property
    def density(self) -> Tensor:
        """p(z | x) at each node, `(n_1, ..., n_L)`, per unit of volume."""
        cell = self.axes.det().abs() * 2 ** len(self.center) / self.probability.numel()
        return self.probability / cell

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        """`(S, L)` independent draws."""
        flat = self.probability.flatten()
        index = torch.searchsorted(
            flat.cumsum(0), torch.rand(draws, generator=generator, dtype=flat.dtype) * flat.sum()
        ).clamp_max(len(flat) - 1)
        unit = unit_nodes(self.probability.shape)
        side = 2 / torch.tensor(self.probability.shape, dtype=flat.dtype)
        middle = flat @ unit
        variance = flat @ (unit - middle).square()
        jitter = torch.rand(draws, len(self.center), generator=generator, dtype=flat.dtype) - 0.5
        pull = (variance / (variance + side**2 / 12)).sqrt()
        points = middle + pull * (unit[index] + side * jitter - middle)
        return self.center + points @ self.axes.mT


def unit_nodes(sides: Sequence[int]) -> Tensor:
    """Midpoints of the cells of [-1, 1]^L, `(n_1 · ... · n_L, L)`."""
    lines = [(torch.arange(n, dtype=torch.float64) + 0.5) * (2 / n) - 1 for n in sides]
    return torch.cartesian_prod(*lines).reshape(-1, len(lines))


def extent(values: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The part of [-1, 1]^L that may matter, and beyond where the border does; `(B, L)` each.

    A cell may matter whose value plus its steepest change to a neighbour comes within `DEPTH` of
    the highest.

    Args:
        values: log densities at the nodes of each datum, `(B, n, ..., n)`.
        side: `n`.
    """
    dim = values.dim() - 1
    top = values.flatten(1).max(1).values.reshape(-1, *[1] * dim)
    likely = values > top - DEPTH
    possible = values + _steepest(values) > top - DEPTH
    low, high = [], []
    for axis in range(1, dim + 1):
        others = [other for other in range(1, dim + 1) if other != axis]
        here, maybe = (seen.any(dim=others) if others else seen for seen in (likely, possible))
        start = (maybe.int().argmax(1) - 1.0).clamp_min(0)
        stop = (side + 1.0 - maybe.flip(1).int().argmax(1)).clamp_max(side)
        low.append(torch.where(here[:, 0], -side / 4, start))
        high.append(torch.where(here[:, -1], side * 1.25, stop))
    begin, end = (torch.stack(edges, 1).double() * 2 / side - 1 for edges in (low, high))
    return begin, end


def _steepest(values: Tensor) -> Tensor:
    """The largest change from each node to a neighbour along an axis, `(B, n, ..., n)`."""
    finite = values.clamp_min(torch.finfo(values.dtype).min / 4)
    slack = torch.zeros_like(values)
    for axis in range(1, values.dim()):
        change = finite.diff(dim=axis).abs()
        edge = torch.zeros_like(change.narrow(axis, 0, 1))
        slack = torch.maximum(slack, torch.cat([change, edge], axis))
        slack = torch.maximum(slack, torch.cat([edge, change], axis))
    return slack
