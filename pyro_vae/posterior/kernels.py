"""Markov transitions of many chains at once, each leaving its own datum's posterior as it is.

Chains `C` and data `B` advance together: positions `(C, B, L)`, log densities `(C, B)`. Random
numbers come from torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.log_joint import definite

LogDensity = Callable[[Tensor], Tensor]
"""From `(C, B, L)` to `(C, B)` nats, differentiable."""


class State(NamedTuple):
    """Where chains are."""

    position: Tensor
    """`(C, B, L)`"""
    log_density: Tensor
    """`(C, B)`, nats"""

    def where(self, accepted: Tensor, proposed: State) -> State:
        """The proposal where accepted, this elsewhere."""
        return State(
            torch.where(accepted.unsqueeze(-1), proposed.position, self.position),
            torch.where(accepted, proposed.log_density, self.log_density),
        )


class Transition(NamedTuple):
    """What a transition did."""

    state: State
    acceptance: Tensor
    """the probability with which the proposal was accepted, `(C, B)`"""
    diverging: Tensor
    """energy lost or won by more than 1,000 nats, `(C, B)`"""


def hamiltonian(
    log_density: LogDensity, state: State, step_size: Tensor, metric: Tensor, steps: int
) -> Transition:
    r"""One transition of Hamiltonian Monte Carlo.

    Momenta are drawn, `steps` leapfrog steps follow

    $$r \mathrel{+}= \tfrac\epsilon2 C^\top \nabla \log p(u), \quad
      u \mathrel{+}= \epsilon\, C r, \quad
      r \mathrel{+}= \tfrac\epsilon2 C^\top \nabla \log p(u)$$

    and the end is accepted with probability $\min(1, e^{-\Delta H})$.

    Args:
        log_density: the target.
        state: where the chains are.
        step_size: ε, `(B,)`.
        metric: C, a factor of each posterior's covariance, `(B, L, L)`.
        steps: of the leapfrog, one number for all chains: draw it anew for each transition.

    References:
        Radford M. Neal. *MCMC Using Hamiltonian Dynamics*, 2011.
    """
    step = step_size.unsqueeze(-1)
    start = torch.randn_like(state.position)
    position, (_, gradient) = state.position, _gradient(log_density, state.position)
    momentum = start + step / 2 * _whiten(gradient, metric)
    for i in range(steps):
        position = position + step * _colour(momentum, metric)
        log_density_here, gradient = _gradient(log_density, position)
        share = 1.0 if i < steps - 1 else 0.5
        momentum = momentum + share * step * _whiten(gradient, metric)
    kinetic = (start.square() - momentum.square()).sum(-1) / 2
    change = torch.nan_to_num(log_density_here - state.log_density + kinetic, nan=-torch.inf)
    accepted = torch.rand_like(change).log() < change
    proposed = State(position, log_density_here)
    acceptance = change.clamp_max(0).exp()
    return Transition(state.where(accepted, proposed), acceptance, change.abs() > 1000)


def jump(
    state: State, log_proposal: Tensor, proposals: State, log_proposals: Tensor
) -> tuple[State, Tensor, Tensor]:
    r"""A run of independence Metropolis transitions, from proposals drawn and scored beforehand.

    Proposal `t` is accepted with probability $\min(1, w_t / w)$, $w = p / g$: with a good $g$
    a fresh draw for one evaluation and no gradient.

    Args:
        state: where the chains are.
        log_proposal: log g there, `(C, B)`.
        proposals: `n` of them, with a leading `n`.
        log_proposals: log g there, `(n, C, B)`.

    Returns:
        The chain, with a leading `n`; log g along it, `(n, C, B)`; acceptance probabilities.

    References:
        Luke Tierney. *Markov Chains for Exploring Posterior Distributions*, 1994.
    """
    count = len(log_proposals)
    weights = torch.cat(
        [(state.log_density - log_proposal).unsqueeze(0), proposals.log_density - log_proposals]
    )
    threshold = torch.rand_like(log_proposals).log()
    index = torch.zeros_like(log_proposal, dtype=torch.long)
    held, path, changes = weights[0], [], []
    for t in range(count):
        change = torch.nan_to_num(weights[t + 1] - held, nan=-torch.inf, posinf=torch.inf)
        accepted = threshold[t] < change
        index = torch.where(accepted, t + 1, index)
        held = torch.where(accepted, weights[t + 1], held)
        path.append(index)
        changes.append(change)
    chosen = torch.stack(path)
    positions = torch.cat([state.position.unsqueeze(0), proposals.position])
    densities = torch.cat([state.log_density.unsqueeze(0), proposals.log_density])
    log_along = torch.cat([log_proposal.unsqueeze(0), log_proposals])
    wide = chosen.unsqueeze(-1).expand(-1, -1, -1, positions.shape[-1])
    chain = State(positions.gather(0, wide), densities.gather(0, chosen))
    return chain, log_along.gather(0, chosen), torch.stack(changes).clamp_max(0).exp()


def langevin(
    log_density: LogDensity, position: Tensor, step_size: Tensor, metric: Tensor
) -> Tensor:
    r"""One unadjusted Langevin step.

    $$u \mathrel{+}= \tfrac{\epsilon^2}2 C C^\top \nabla \log p(u) + \epsilon\, C \xi$$

    Nothing is accepted or rejected, so the chain's law is off by what ε leaves.

    References:
        Max Welling, Yee Whye Teh. *Bayesian Learning via Stochastic Gradient Langevin
        Dynamics*, 2011.
    """
    step = step_size.unsqueeze(-1)
    _, gradient = _gradient(log_density, position)
    drift = step / 2 * _whiten(gradient, metric)
    return position + step * _colour(drift + torch.randn_like(position), metric)


def _gradient(log_density: LogDensity, position: Tensor) -> tuple[Tensor, Tensor]:
    leaf = position.detach().requires_grad_(True)
    with torch.enable_grad():
        scored = log_density(leaf)
        (gradient,) = torch.autograd.grad(scored.sum(), leaf)
    return definite(scored.detach()), torch.nan_to_num(gradient, posinf=0.0, neginf=0.0)


def _colour(whitened: Tensor, metric: Tensor) -> Tensor:
    return torch.einsum("bij,cbj->cbi", metric, whitened)


def _whiten(gradient: Tensor, metric: Tensor) -> Tensor:
    return torch.einsum("bij,cbi->cbj", metric, gradient)
