"""The path from what can be drawn, prior and guide, to the posterior, and a cloud along it."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint, definite
from pyro_vae.pair import Guide
from pyro_vae.posterior.kernels import State, hamiltonian
from pyro_vae.posterior.mixture import Mixture, weighted_moments
from pyro_vae.posterior.scouts import scouted
from pyro_vae.posterior.tempering import tempered

LEAPFROG = 5
"""Most leapfrog steps of a move; each move draws its number from 1 on."""
ACCEPTANCE = 0.8
"""What step sizes are tuned to."""
POOLED = 2**14
"""Draws times rows of a pool that are scored at once."""


class Base:
    r"""Where the path starts: half the prior, half what is known of the posterior.

    Known are the guide, of which only draws are asked, as a Gaussian 1.5 times as wide, and what
    scouts have found among the prior's draws. Both can be drawn and scored for any pair. Where
    nothing is known, the prior is all.
    """

    def __init__(self, target: LogJoint, guide: Guide | None) -> None:
        self.target = target
        self.guide = None if guide is None else _widened(target, guide)
        self.normal = self.guide
        if (found := scouted(target)) is not None:
            own = found.mixture
            self.normal = own if self.guide is None else self.guide.beside(own, found.power / 2)

    def sample(self, draws: int) -> Tensor:
        """Draw `(S, B, L)`, the first half from the prior."""
        if self.normal is None:
            return self.target.prior_draws(draws)
        from_prior = self.target.prior_draws(max(1, draws // 2))
        return torch.cat([from_prior, self.normal.sample(draws - len(from_prior))])

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        """Log density at `(S, B, L)`, given the prior's there; `(S, B)` nats."""
        if self.normal is None:
            return log_prior
        return torch.logaddexp(log_prior, self.normal.log_prob(u)) - math.log(2)

    def rows(self, index: Tensor) -> Base:
        """The start of the path for some data."""
        part = copy(self)
        part.target = self.target.rows(index)
        part.guide = None if self.guide is None else self.guide.rows(index)
        part.normal = None if self.normal is None else self.normal.rows(index)
        return part


def _widened(target: LogJoint, guide: Guide) -> Mixture:
    drawn = target.guide_draws(guide, max(100, 4 * target.size))
    lost = ~torch.isfinite(drawn).all(0).all(-1)  # drawn onto a border, or broken
    if lost.any():
        drawn[:, lost] = target.rows(lost.nonzero().flatten()).prior_draws(len(drawn))
    even = torch.ones(drawn.shape[:2]).to(drawn)
    mean, covariance = weighted_moments(drawn, even)
    prior_scale = target.prior_draws(32).std(0).amax(-1, keepdim=True)
    ridge = torch.diag_embed((0.02 * prior_scale).square().expand_as(mean))
    factor = 1.5 * torch.linalg.cholesky(covariance + ridge)
    return Mixture(even[:1].T.log(), mean.unsqueeze(1), factor.unsqueeze(1))


@dataclass
class Bridge:
    r"""The densities between: $\log \pi_\beta = (1 - \beta) \log b + \beta \log p(x, z)$."""

    base: Base
    beta: Tensor
    """`(B,)`"""

    def __call__(self, u: Tensor) -> Tensor:
        """Score `(S, B, L)`, `(S, B)` nats."""
        return _mixed(*ends(self.base, u), self.beta)


def ends(base: Base, u: Tensor) -> tuple[Tensor, Tensor]:
    """Log densities of both ends of the path at `(S, B, L)`, `(S, B)` nats each."""
    log_prior, log_likelihood = base.target.parts(u)
    return base.log_prob(u, log_prior), log_prior + log_likelihood


class Rung(NamedTuple):
    """One step of a path, tuned."""

    beta: Tensor
    """`(B,)`, 0 to 1"""
    step_size: Tensor
    """`(B,)`"""
    metric: Tensor
    """a factor of the cloud's covariance, `(B, L, L)`"""


class Cloud(NamedTuple):
    """Particles that have come to the posterior, and the path they took."""

    position: Tensor
    """`(P, B, L)`, equally weighted"""
    rungs: list[Rung]
    """from β > 0 on; data that are there already repeat their last"""
    possible: Tensor
    """`(B,)`; no particle of the others had a likelihood"""
    pool: Tensor
    """what was drawn from the base, `(Q, B, L)`"""
    pool_log_weight: Tensor
    """log p(x, z) − log b(z) of these, `(Q, B)`"""
    gradients: Tensor
    """evaluations for each particle, `(B,)`"""


def explore(base: Base, particles: int, pool: int, *, threshold: float = 0.5) -> Cloud:
    r"""Take particles from the base to the posterior by adaptive sequential Monte Carlo.

    The first are resampled from a pool of more: it costs no gradients, and a mode that it
    misses is missed for good. Each datum steps to the next β at which its weights
    $w = (p(x, z) / b(z))^{\Delta\beta}$ keep an effective size of `threshold` times the
    particles, which are resampled by weight and moved by Hamiltonian Monte Carlo with the
    cloud's own covariance. Step sizes follow the acceptance.

    References:
        Pierre Del Moral, Arnaud Doucet, Ajay Jasra. *Sequential Monte Carlo Samplers*, 2006.
    """
    with torch.no_grad():
        u = base.sample(pool)
        rows, size = u.shape[1:]
        parts = [ends(base, part) for part in u.split(max(1, POOLED // rows))]
        log_base, log_joint = (definite(torch.cat(end)) for end in zip(*parts, strict=True))
    beta = u.new_zeros(rows)
    step_size = u.new_full((rows,), 1.0 / size**0.25)
    possible = torch.isfinite(log_joint).any(0)
    pooled = u, definite(log_joint - log_base)  # both are -inf where nothing is possible
    rungs: list[Rung] = []
    metric = torch.eye(size).to(u).expand(rows, -1, -1)
    gradients = u.new_zeros(rows)
    while bool((beta[possible] < 1).any()) and len(rungs) < 10_000:
        log_ratio = definite(log_joint - log_base)
        index = torch.nonzero(possible & (beta < 1)).flatten()
        change = tempered(log_ratio[:, index], 1 - beta[index], threshold, particles)
        weight = (change * log_ratio[:, index]).softmax(0)
        beta[index] = torch.where(change >= 1 - beta[index], 1.0, beta[index] + change)
        chosen = _systematic(weight, particles)
        here = u[:, index].gather(0, chosen.unsqueeze(-1).expand(-1, -1, size))
        log_base_here = log_base[:, index].gather(0, chosen)
        log_joint_here = log_joint[:, index].gather(0, chosen)
        if not rungs:  # the pool has done its work
            u, log_base, log_joint = (end[:particles].clone() for end in (u, log_base, log_joint))
        metric = metric.clone()
        metric[index] = _factor(here)
        bridge = Bridge(base.rows(index), beta[index])
        state = State(here, _mixed(log_base_here, log_joint_here, beta[index]))
        steps = int(torch.randint(1, LEAPFROG + 1, ()))
        moved = hamiltonian(bridge, state, step_size[index], metric[index], steps)
        surplus = moved.acceptance.mean(0) - ACCEPTANCE
        step_size[index] *= (1.5 * surplus).exp().clamp(0.3, 1.5)
        gradients[index] += steps + 1
        u[:, index] = moved.state.position
        with torch.no_grad():
            both = ends(bridge.base, moved.state.position)
        log_base[:, index], log_joint[:, index] = (definite(end) for end in both)
        rungs.append(Rung(beta.clone(), step_size.clone(), metric))
    return Cloud(u, rungs, possible, *pooled, gradients)


def _systematic(weight: Tensor, count: int) -> Tensor:
    """Indices `(P, B)` of particles resampled by weight with one random number a datum."""
    places = (torch.arange(count).to(weight) + torch.rand(weight.shape[1], 1).to(weight)) / count
    upto = weight.T.double().cumsum(1)
    chosen = torch.searchsorted(upto / upto[:, -1:], places.double())
    return chosen.clamp_max(len(weight) - 1).T


def _factor(u: Tensor) -> Tensor:
    """Cholesky factor of the covariance of `(P, B, L)`, shrunk to its diagonal if `P` is small."""
    count, _, size = u.shape
    _, covariance = weighted_moments(u, torch.ones(u.shape[:2]).to(u))
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    shrunk = torch.lerp(covariance, diagonal, min(1.0, 2 * size / count))
    floor = 1e-12 + 1e-6 * diagonal.amax((-2, -1), keepdim=True)
    return torch.linalg.cholesky(shrunk + floor * torch.eye(size).to(u))


def _mixed(log_base: Tensor, log_joint: Tensor, beta: Tensor) -> Tensor:
    return torch.where(beta < 1, torch.lerp(log_base, log_joint, beta), log_joint)
