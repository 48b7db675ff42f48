"""Thousands of posteriors at once: Hamiltonian Monte Carlo for each datum, with global jumps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_vae.checks import check_model, check_pair
from pyro_vae.log_joint import LogJoint, definite
from pyro_vae.pair import Batch, Guide, Model, frozen, full_size
from pyro_vae.posterior.draws import Draws
from pyro_vae.posterior.kernels import State, Transition, hamiltonian, jump
from pyro_vae.posterior.mixture import Mixture, fit_mixture
from pyro_vae.posterior.path import ACCEPTANCE, LEAPFROG, Base, Cloud, explore
from pyro_vae.posterior.store import Part, by_chunks

PARTICLES = 32
"""Of the cloud that finds the modes of a datum."""
POOL = 1024
"""Weighted draws from which the cloud starts: what they miss, nothing tells. A quarter of them
missed a lobe in silence on 7 of 500 posteriors of MNIST digits, these on 1."""
TRIALS = 256
"""Weighted draws from which the mixture of a datum is fitted anew."""
ROUNDS = 4
"""Of such fits at most; they end when half the draws are effective."""
EVALUATIONS = 2**13
"""Log densities evaluated at once; more would not fit the caches."""
PRIOR_SHARE = 0.05
"""Of the jumps."""
BLOCK = 32
"""Draws whose jumps are evaluated together."""
PERIODS = {0.3: 32, 0.1: 4, 0.0: 1}
"""By acceptance of jumps: every how many draws a Hamiltonian transition is made."""


def hmc(
    model: Model,
    batch: Batch,
    *,
    guide: Guide | None = None,
    draws: int = 1000,
    chains: int = 4,
    warmup: int = 32,
    superchains: int | None = None,
    chunk: int = 1024,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Draws:
    r"""Sample p(z | x) of all data at once, each with a step size and a metric of its own.

    1. A cloud of particles goes from prior and guide to the posterior by adaptive sequential
       Monte Carlo. In up to three dimensions, where one decoder serves all data, it also starts
       from the best of up to 65,536 prior draws that they share. Its covariance is the metric; a
       Gaussian mixture fitted to it, once more to weighted draws of itself, is the proposal of
       jumps. A twentieth of the jumps is drawn from the prior, so that any place with a
       likelihood can be reached.
    2. Chains start over-dispersed: half from the prior, half from the guide twice as wide.
       `warmup` transitions bring them in and tune step sizes by dual averaging.
    3. Everything is frozen. Then each draw is a jump, accepted with probability
       $\min(1, w' / w)$, $w = p(x, z) / g(z)$, and every so many draws a Hamiltonian
       transition with a jittered number of leapfrog steps follows: every 32 draws where jumps
       are often accepted, every draw where they are not.

    Both kinds of transition leave p(z | x) as it is. Jumps need no gradient, move between
    modes, and are evaluated in blocks, as they do not depend on where the chain is.

    Args:
        model: p(z) p(x | z), without subsampling.
        batch: tensors of `B` rows.
        guide: q(z | x), for starts and metric; chains target p(z | x) whatever it is.
        draws: `S`, kept from each chain.
        chains: `C`.
        warmup: transitions before them, dropped.
        superchains: start the chains in so many groups from one point each, and judge them by
            nested R-hat: for many short chains.
        chunk: rows worked on at once, which bounds the memory.
        folder: where draws live as memory-mapped files instead of memory; a run that was
            interrupted goes on from the last finished chunk.
        seed: torch's random state is left as it was.
        progress: show a bar.

    Returns:
        `Draws` with `(C, S, B, *event)` for each site; statistics `acceptance_rate`,
        `diverging`; figures `step_size`, `jump_rate`, `period`, `gradients` and `densities`
        (evaluations of log p(x, z) with and without gradient) of each datum. `.trouble` says
        which data did not converge, and why. Rows without any likelihood are NaN.

    Warning:
        A mode that neither the cloud nor a jump has met is missed, and R-hat does not tell.
        Its share of the evidence is small unless it is far narrower than the prior's draws
        are dense: 1,024 for each datum, or those that are shared.

    Raises:
        ValueError: counts below their minimum (`draws >= 4`, or 1 with superchains; the others
            1), a bad pair or batch, a folder of another run.

    Warns:
        UserWarning: a latent is rounded onto a border of its support where its density is
            infinite, as Gamma(0.05) is at 0; the mass that lies there is left out.

    References:
        Radford M. Neal. *MCMC Using Hamiltonian Dynamics*, 2011.
        Matthew D. Hoffman. *Learning Deep Latent Gaussian Models with Markov Chain Monte
        Carlo*, 2017.
        Marylou Gabrié, Grant M. Rotskoff, Eric Vanden-Eijnden. *Adaptive Monte Carlo Augmented
        with Normalizing Flows*, 2022.

    Example:
        >>> from pyro_vae.models import PPCA
        >>> model = PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> draws = hmc(model, (torch.zeros(5, 3),), draws=200, progress=False)
        >>> draws["z"].shape, draws.trouble
        (torch.Size([4, 200, 5, 2]), ['', '', '', '', ''])
    """
    if guide is None:
        check_model(model, batch)
    else:
        check_pair(model, guide, batch)
    if draws < (4 if superchains is None else 1) or chains < 1 or warmup < 1 or chunk < 1:
        raise ValueError(
            "hmc wants draws >= 4 (for R-hat; 1 with superchains), chains >= 1, warmup >= 1, "
            f"chunk >= 1; got draws={draws}, chains={chains}, warmup={warmup}, chunk={chunk}"
        )
    if superchains is not None and (superchains < 2 or chains % superchains):
        raise ValueError(
            f"superchains must be 2 or more and divide the {chains} chains; got {superchains}"
        )
    if (size := full_size(model, tuple(part[:1] for part in batch))) is not None:
        raise ValueError(
            f"the model's plate stands for {size} data, and each datum would count as often"
            "\n  expected: pyro.plate('data', len(x))\n  try:      the model without subsample="
        )
    with frozen(model, guide), pyro.validation_enabled(False):
        target = LogJoint(model, batch)
        start = superchains or chains

        def work(rows: slice) -> Part:
            return _sample(target.rows(rows), guide, draws, chains, warmup, start)

        arrays, figures = by_chunks(
            work, target, chunk, seed=seed, folder=folder, progress=progress,
            settings={"method": "HMC", "draws": draws, "chains": chains, "warmup": warmup,
                      "superchains": superchains},
        )  # fmt: skip
    stats = {name: arrays.pop(name) for name in ("acceptance_rate", "diverging")}
    return Draws(arrays, stats, method="HMC", figures=figures, superchains=superchains)


@dataclass
class _Tuned:
    """What is frozen before the first kept draw, for each datum."""

    proposal: Mixture
    step_size: Tensor
    metric: Tensor
    jump_rate: Tensor

    def rows(self, index: Tensor) -> _Tuned:
        return _Tuned(
            self.proposal.rows(index),
            self.step_size[index],
            self.metric[index],
            self.jump_rate[index],
        )


class _Chains(NamedTuple):
    """Where chains are, and log g there."""

    state: State
    log_proposal: Tensor

    def rows(self, index: Tensor) -> _Chains:
        state = State(self.state.position[:, index], self.state.log_density[:, index])
        return _Chains(state, self.log_proposal[:, index])


class _Block(NamedTuple):
    """A run of draws: where they are, how they came there, and what they cost a chain."""

    position: Tensor
    acceptance: Tensor
    diverging: Tensor
    gradients: int


def _sample(
    target: LogJoint, guide: Guide | None, draws: int, chains: int, warmup: int, starts: int
) -> Part:
    base = Base(target, guide)
    cloud = explore(base, max(PARTICLES, 4 * target.size), POOL)
    count = len(cloud.possible)
    kept = torch.full((chains, draws, count, target.size), torch.nan, dtype=target.dtype)
    stats = {
        "acceptance_rate": torch.zeros(chains, draws, count, dtype=torch.float32),
        "diverging": torch.zeros(chains, draws, count, dtype=torch.bool),
    }
    names = ("step_size", "jump_rate", "period", "gradients", "densities")
    figures = {name: torch.zeros(count, dtype=torch.float32) for name in names}
    index = cloud.possible.nonzero().flatten()
    if len(index):
        part = target.rows(index)
        tuned, here, gradients, densities = _warm_up(
            part, base.rows(index), cloud, index, chains, starts, warmup
        )
        figures["step_size"][index] = tuned.step_size.cpu().float()
        figures["jump_rate"][index] = tuned.jump_rate.cpu().float()
        figures["gradients"][index] = (
            cloud.gradients[index].cpu().float() * len(cloud.position) + gradients * chains
        )
        figures["densities"][index] = densities.cpu().float() + (warmup + draws) * chains
        for period, own in _groups(tuned.jump_rate):
            where, first = index[own].cpu(), 0
            figures["period"][where] = period
            for block in _run(
                target.rows(index[own]), tuned.rows(own), here.rows(own), draws, period
            ):
                slots = slice(first, first + len(block.position))
                kept[:, slots, where] = block.position.movedim(0, 1).cpu()
                stats["acceptance_rate"][:, slots, where] = (
                    block.acceptance.movedim(0, 1).cpu().float()
                )
                stats["diverging"][:, slots, where] = block.diverging.movedim(0, 1).cpu()
                figures["gradients"][where] += float(block.gradients * chains)
                first = slots.stop
    flat = kept.flatten(0, 1).to(target.batch[0].device)
    sites = {name: value.cpu() for name, value in target.constrain(flat)[0].items()}
    return {name: v.unflatten(0, (chains, draws)) for name, v in sites.items()} | stats, figures


def _warm_up(
    target: LogJoint, base: Base, cloud: Cloud, index: Tensor, chains: int, starts: int, count: int
) -> tuple[_Tuned, _Chains, int, Tensor]:
    """Fit the proposal, bring the chains in, tune step sizes; with what it cost."""
    proposal, metric, densities = _proposal(target, cloud, index)
    tuner = _DualAveraging(cloud.rungs[-1].step_size[index])
    tuned = _Tuned(proposal, tuner.step_size, metric, torch.zeros_like(tuner.step_size))
    start = _starts(target, base, cloud.position[:, index], starts).repeat_interleave(
        chains // starts, 0
    )
    here = _at(target, proposal, start)
    blocks, accepted, gradients = _proposals(target, proposal, count, chains), [], 0
    for t in range(count):
        here, rate = _jumps(here, blocks, slice(t, t + 1))[1:]
        here, transition, steps = _transition(target, tuned, here)
        tuned.step_size = tuner.update(transition.acceptance.mean(0))
        accepted.append(rate.mean((0, 1)))
        gradients += steps
    tuned.step_size = tuner.settled
    tuned.jump_rate = torch.stack(accepted[count // 2 :]).mean(0)
    return tuned, here, gradients, densities


def _run(
    target: LogJoint, tuned: _Tuned, here: _Chains, draws: int, period: int
) -> Iterator[_Block]:
    """Draws in blocks whose jumps are proposed and scored at once."""
    for first in range(0, draws, BLOCK):
        count = min(BLOCK, draws - first)
        blocks = _proposals(target, tuned.proposal, count, len(here.log_proposal))
        positions, acceptances, divergences, gradients = [], [], [], 0
        for t in range(0, count, period):
            some = slice(t, min(t + period, count))
            path, here, rate = _jumps(here, blocks, some)
            diverging = torch.zeros(rate.shape, dtype=torch.bool, device=rate.device)
            if some.stop - t == period:
                here, transition, steps = _transition(target, tuned, here)
                path = torch.cat([path[:-1], here.state.position.unsqueeze(0)])
                rate = torch.cat([rate[:-1], transition.acceptance.unsqueeze(0)])
                diverging[-1] = transition.diverging
                gradients += steps
            positions.append(path)
            acceptances.append(rate)
            divergences.append(diverging)
        yield _Block(
            torch.cat(positions), torch.cat(acceptances), torch.cat(divergences), gradients
        )


def _jumps(here: _Chains, proposals: _Chains, some: slice) -> tuple[Tensor, _Chains, Tensor]:
    """Positions `(n, C, B, L)` of a run of jumps, where it ends, acceptance probabilities."""
    state = State(*(part[some] for part in proposals.state))
    chain, log_along, rate = jump(*here, state, proposals.log_proposal[some])
    end = _Chains(State(chain.position[-1], chain.log_density[-1]), log_along[-1])
    return chain.position, end, rate


def _transition(target: LogJoint, tuned: _Tuned, here: _Chains) -> tuple[_Chains, Transition, int]:
    """A Hamiltonian transition, and the gradients it took."""
    steps = int(torch.randint(1, LEAPFROG + 1, ()))
    transition = hamiltonian(target, here.state, tuned.step_size, tuned.metric, steps)
    log_prior = _scored(target, transition.state.position)[1]
    log_proposal = _log_proposal(tuned.proposal, transition.state.position, log_prior)
    return _Chains(transition.state, log_proposal), transition, steps + 1


def _proposals(target: LogJoint, proposal: Mixture, count: int, chains: int) -> _Chains:
    """Jumps proposed for all chains, `(n, C, B)`: a share from the prior."""
    total = count * chains
    u = proposal.sample(total)
    from_prior = torch.rand(u.shape[:2]).to(u) < PRIOR_SHARE
    order = from_prior.cumsum(0)  # as few draws of the prior as will do: it runs the model
    prior = target.prior_draws(max(1, int(order[-1].max())))
    drawn = prior.gather(0, (order - 1).clamp_min(0).unsqueeze(-1).expand_as(u))
    u = torch.where(from_prior.unsqueeze(-1), drawn, u)
    found = _at(target, proposal, u)
    state = State(*(part.unflatten(0, (count, chains)) for part in found.state))
    return _Chains(state, found.log_proposal.unflatten(0, (count, chains)))


def _at(target: LogJoint, proposal: Mixture, u: Tensor) -> _Chains:
    log_joint, log_prior = _scored(target, u)
    return _Chains(State(u, log_joint), _log_proposal(proposal, u, log_prior))


def _scored(target: LogJoint, u: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(x, z) and log p(z) at `(S, B, L)`, few enough at once to stay in the caches."""
    with torch.no_grad():
        parts = [target.parts(some) for some in u.split(max(1, EVALUATIONS // u.shape[1]))]
    log_prior, log_likelihood = (torch.cat(part) for part in zip(*parts, strict=True))
    return definite(log_prior + log_likelihood), log_prior


def _log_proposal(proposal: Mixture, u: Tensor, log_prior: Tensor) -> Tensor:
    return torch.logaddexp(
        proposal.log_prob(u) + math.log1p(-PRIOR_SHARE), log_prior + math.log(PRIOR_SHARE)
    )


def _proposal(target: LogJoint, cloud: Cloud, index: Tensor) -> tuple[Mixture, Tensor, Tensor]:
    """A mixture fitted to all weighted draws so far, then to draws of itself as well.

    Returns it, the metric it implies, and how many densities it cost, `(B,)`.
    """
    components = max(1, min(6, (PARTICLES + TRIALS) // (8 * (target.size + 1))))
    share = cloud.pool_log_weight[:, index].softmax(0)
    drawn = torch.multinomial(share.T, TRIALS, replacement=True).T
    pool = cloud.pool[:, index].take_along_dim(drawn.unsqueeze(-1), 0)
    each = (_effective(share) / TRIALS).expand(TRIALS, -1)
    u = torch.cat([cloud.position[:, index], pool])
    weight = torch.cat([torch.full_like(u[: len(cloud.position), :, 0], 0.25), each])
    fitted = fit_mixture(u, weight, components)
    cost = torch.full_like(share[0], float(POOL))
    active = torch.arange(len(index), device=u.device)
    for _ in range(ROUNDS):
        trials = _proposals(target.rows(active), fitted.rows(active).widened(2.0, 0.2), TRIALS, 1)
        position, log_joint = (part.squeeze(1) for part in trials.state)
        share = (log_joint - trials.log_proposal.squeeze(1)).softmax(0)
        effective = _effective(share)
        cost[active] += TRIALS
        u, weight = torch.cat([u, position]), torch.cat([weight, share * effective])
        for part, new in zip(fitted, fit_mixture(u, weight, components), strict=True):
            part[active] = new
        poor = effective < 0.5 * TRIALS
        active, u, weight = active[poor], u[:, poor], weight[:, poor]
        if not len(active):
            break
    return fitted.widened(2.0, 0.1), torch.linalg.cholesky(fitted.moments()[1]), cost


def _effective(share: Tensor) -> Tensor:
    """Effective size of normalised weights `(S, B)`, `(B,)`."""
    return 1 / share.square().sum(0)


def _starts(target: LogJoint, base: Base, cloud: Tensor, starts: int) -> Tensor:
    """Over-dispersed places: half from the prior, half from the guide twice as wide.

    Where none of several has a likelihood, a particle of the cloud.
    """
    tries, from_prior = 16, (starts + 1) // 2 if base.guide else starts
    pool = target.prior_draws(tries * starts).unflatten(0, (tries, starts))
    if base.guide is not None:
        middle = base.guide.mean[:, 0]
        wide = middle + (base.guide.sample(tries * starts) - middle) * (2 / 1.5)
        pool[:, from_prior:] = wide.unflatten(0, (tries, starts))[:, from_prior:]
    possible = torch.isfinite(_scored(target, pool.flatten(0, 1))[0]).unflatten(0, (tries, starts))
    first = possible.int().argmax(0)
    chosen = pool.gather(0, first[None, ..., None].expand(1, -1, -1, pool.shape[-1]))[0]
    instead = cloud[torch.randint(len(cloud), (starts,))]
    return torch.where(possible.any(0).unsqueeze(-1), chosen, instead)


class _DualAveraging:
    """Step sizes of all data, driven to the wanted acceptance; settled at their average.

    Matthew D. Hoffman, Andrew Gelman. *The No-U-Turn Sampler*, 2014, section 3.2.
    """

    def __init__(self, step_size: Tensor) -> None:
        self.step_size = step_size
        self.center = step_size.log() + math.log(2)
        self.deficit = torch.zeros_like(step_size)
        self.average = step_size.log()
        self.count = 0

    def update(self, acceptance: Tensor) -> Tensor:
        """The next step size, `(B,)`."""
        self.count += 1
        gain = 1 / (self.count + 10)
        self.deficit = torch.lerp(self.deficit, ACCEPTANCE - acceptance, gain)
        log_step = self.center - math.sqrt(self.count) / 0.1 * self.deficit
        self.average = torch.lerp(self.average, log_step, self.count**-0.75)
        return log_step.exp()

    @property
    def settled(self) -> Tensor:
        """The step size to keep."""
        return self.average.exp()


def _groups(jump_rate: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Data that make a Hamiltonian transition equally often, and how often."""
    left = torch.ones_like(jump_rate, dtype=torch.bool)
    for rate, period in PERIODS.items():
        own = left & (jump_rate >= rate)
        if own.any():
            yield period, own.nonzero().flatten()
        left &= ~own
