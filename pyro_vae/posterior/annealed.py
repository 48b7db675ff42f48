"""Annealed importance sampling: log p(x) with an error bar, and a sandwich on simulated data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_vae.checks import check_model, check_pair
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import Batch, Guide, Model, frozen, preserved_rng, simulate
from pyro_vae.posterior.draws import Draws
from pyro_vae.posterior.kernels import State, hamiltonian
from pyro_vae.posterior.path import LEAPFROG, Base, Bridge, Rung, ends, explore
from pyro_vae.posterior.store import Part, by_chunks
from pyro_vae.tables import Tabular, by_datum

if TYPE_CHECKING:
    import pandas as pd

PILOT = 32
"""Particles that tune a path."""
SALT = 2**31
"""Parts the random stream of simulated latents from those of the chains that start beside them."""


@dataclass(frozen=True, repr=False)
class Annealed(Tabular):
    """What annealed importance sampling says of `B` data.

    Attributes:
        log_evidence: log p(x), nats, `(B,)`; in expectation below it. −inf where no particle
            had a likelihood.
        error: its standard error, nats, `(B,)`.
        log_weight: of each particle, nats, `(P, B)`.
        draws: the particles, one chain; to be weighted by `log_weight`.
        gradients: evaluations of log p(x, z) and its gradient for each datum, `(B,)`.
    """

    log_evidence: Tensor
    error: Tensor
    log_weight: Tensor
    draws: Draws
    gradients: Tensor

    @property
    def table(self) -> pd.DataFrame:
        """A row a datum: log p(x), its error, the effective sample size of the particles."""
        names = ("log_evidence", "error", "ess", "gradients")
        return by_datum({name: getattr(self, name) for name in names})

    @cached_property
    def ess(self) -> Tensor:
        """Effective sample size of the weights, (Σw)²/Σw², `(B,)`."""
        return 1 / self.log_weight.softmax(0).square().sum(0)

    @cached_property
    def mean(self) -> Tensor:
        """Posterior mean, `(B, L)`."""
        return (self.log_weight.softmax(0).unsqueeze(-1) * self.draws.flat).sum(0)

    @cached_property
    def covariance(self) -> Tensor:
        """Posterior covariance, `(B, L, L)`."""
        centred = (self.draws.flat - self.mean).movedim(0, 1)
        return (centred * self.log_weight.softmax(0).T.unsqueeze(-1)).mT @ centred

    def resample(self, draws: int, *, seed: int = 0) -> Draws:
        """Unweighted draws: particles chosen by weight, with replacement; one chain."""
        generator = torch.Generator().manual_seed(seed)
        weight = self.log_weight.softmax(0).T
        chosen = torch.multinomial(weight, draws, replacement=True, generator=generator).T
        row = torch.arange(chosen.shape[1])
        sites = {
            name: value[0][chosen, row].unsqueeze(0) for name, value in self.draws.sites.items()
        }
        return Draws(sites, method=self.draws.method)


@dataclass(frozen=True, repr=False)
class Sandwich(Tabular):
    """Log p(x) of simulated data between two bounds, each in expectation on its own side.

    Attributes:
        lower: forward annealing, nats, `(B,)`.
        upper: annealing back from an exact draw of the posterior, nats, `(B,)`.
        lower_error: standard error of `lower`, `(B,)`.
        upper_error: standard error of `upper` given the exact draw, `(B,)`.
        latents: the exact draws z*, each `(B, *event)`.
        batch: the simulated data.
        gradients: evaluations for each datum, both ways, `(B,)`.
    """

    lower: Tensor
    upper: Tensor
    lower_error: Tensor
    upper_error: Tensor
    latents: dict[str, Tensor]
    batch: Batch
    gradients: Tensor

    @property
    def table(self) -> pd.DataFrame:
        """A row a datum: both bounds and their errors."""
        names = ("lower", "lower_error", "upper", "upper_error", "gradients")
        return by_datum({name: getattr(self, name) for name in names})

    @property
    def width(self) -> Tensor:
        """Upper − lower, nats, `(B,)`."""
        return self.upper - self.lower


def annealed(
    model: Model,
    batch: Batch,
    *,
    guide: Guide | None = None,
    particles: int = 64,
    temperatures: int = 32,
    chunk: int = 2**14,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Annealed:
    r"""Estimate log p(x) of each datum by annealed importance sampling.

    Particles start from the base b, half the prior and half a widened Gaussian of the guide's
    moments, in up to three dimensions also of the best prior draws where one decoder serves all
    data, and are moved by Hamiltonian Monte Carlo through
    $\pi_\beta \propto b^{1-\beta}\, p(x, z)^\beta$, each gathering

    $$\log w = \sum_t (\beta_t - \beta_{t-1}) \log \frac{p(x, z_{t-1})}{b(z_{t-1})},
      \qquad \mathbb E[w] = p(x)$$

    The schedule, step sizes and metrics of each datum are tuned on particles of their own and
    frozen before the first that counts, so the weights are exactly unbiased.

    Args:
        model: p(z) p(x | z).
        batch: tensors of `B` rows.
        guide: where half the particles start; any guide will do, a good one saves steps.
        particles: `P`, for each datum.
        temperatures: `T`, steps of the path.
        chunk: particles, at least the 32 that tune a path, times rows that are scored at once;
            most of the memory.
        folder: where finished chunks are kept; a run that was interrupted goes on from there.
        seed: torch's random state is left as it was.
        progress: show a bar.

    Returns:
        `Annealed`.

    Warning:
        A mode in which no particle starts is missed. `error` comes from the weights alone and
        is too small where one of them outweighs all others: look at `ess`.

    Raises:
        ValueError: a bad pair or batch; `particles` below 2, `temperatures` below 1.

    Warns:
        UserWarning: a latent is rounded onto a border of its support where its density is
            infinite, as Gamma(0.05) is at 0; the mass that lies there is left out.

    References:
        Radford M. Neal. *Annealed Importance Sampling*, 2001.
        Yuhuai Wu, Yuri Burda, Ruslan Salakhutdinov, Roger Grosse. *On the Quantitative Analysis
        of Decoder-Based Generative Models*, 2017.

    Example:
        >>> from pyro_vae.models import PPCA
        >>> model = PPCA(torch.eye(3, 2), torch.zeros(3), noise=0.5)
        >>> x = torch.ones(4, 3)
        >>> found = annealed(model, (x,), progress=False)
        >>> bool(((found.log_evidence - model.log_evidence(x)).abs() < 6 * found.error).all())
        True
    """
    _check(model, guide, batch, particles, temperatures)
    with frozen(model, guide), pyro.validation_enabled(False):
        target = LogJoint(model, batch)

        def work(rows: slice) -> Part:
            base = Base(target.rows(rows), guide)
            schedule = _tuned(base, particles, temperatures)
            weighed = _forward(base, schedule.rungs, particles)
            log_weight = weighed.log_weight.masked_fill(~schedule.possible, -torch.inf)
            sites, _ = base.target.constrain(weighed.position)
            draws = {name: value.unsqueeze(0) for name, value in sites.items()}
            gradients = schedule.gradients + weighed.gradients * particles
            return draws | {"log_weight": log_weight.unsqueeze(0)}, {"gradients": gradients}

        sites, figures = by_chunks(
            work, target, _rows(chunk, particles), seed=seed, folder=folder, progress=progress,
            settings={"method": "AIS", "particles": particles, "temperatures": temperatures},
        )  # fmt: skip
    log_weight = sites.pop("log_weight")[0].double()
    log_evidence, error = _mean(log_weight)
    return Annealed(
        log_evidence, error, log_weight, Draws(sites, method="AIS"), figures["gradients"]
    )


def sandwich(
    model: Model,
    batch: Batch,
    *,
    guide: Guide | None = None,
    particles: int = 64,
    temperatures: int = 32,
    chunk: int = 2**14,
    seed: int = 0,
    progress: bool = True,
) -> Sandwich:
    r"""Bound log p(x) of simulated data from both sides: bidirectional Monte Carlo.

    Data are drawn with their latents, z* ~ p(z), x ~ p(x | z*), so z* is an exact draw from
    p(z | x). The forward chain of `annealed` bounds log p(x) from below; the same chain run
    backwards from z* gives weights with $\mathbb E[1/w] = 1/p(x)$, hence an upper bound,
    $-\log \frac1P \sum_i e^{-\log w_i}$. Their distance bounds the error of `annealed` on
    data that look like the model's own.

    Args:
        model: p(z) p(x | z).
        batch: tensors of `B` rows: how many data, and what else the model is called with.
        guide: where half the particles start.
        particles: `P`, both ways.
        temperatures: `T`, steps of the path.
        chunk: particles, at least 32, times rows that are scored at once.
        seed: torch's random state is left as it was.
        progress: show a bar.

    Returns:
        `Sandwich`.

    Warning:
        It speaks of data that the model generates, not of real ones.

    Raises:
        ValueError: as `annealed`.

    References:
        Roger B. Grosse, Zoubin Ghahramani, Ryan P. Adams. *Sandwiching the Marginal Likelihood
        Using Bidirectional Monte Carlo*, 2015.

    Example:
        >>> from pyro_vae.models import PPCA
        >>> model = PPCA(torch.eye(3, 2), torch.zeros(3), noise=0.5)
        >>> found = sandwich(model, (torch.zeros(4, 3),), progress=False)
        >>> bool((found.width < 1).all())
        True
    """
    _check(model, guide, batch, particles, temperatures)
    with preserved_rng(seed + SALT):
        latents, simulated = simulate(model, batch)
    with frozen(model, guide), pyro.validation_enabled(False):
        target = LogJoint(model, simulated)
        exact = target.unconstrain({name: value.unsqueeze(0) for name, value in latents.items()})

        def work(rows: slice) -> Part:
            base = Base(target.rows(rows), guide)
            schedule = _tuned(base, particles, temperatures)
            there = _forward(base, schedule.rungs, particles)
            back = _backward(base, schedule.rungs, exact[:, rows].expand(particles, -1, -1))
            lower, lower_error = _mean(there.log_weight.double())
            upper, upper_error = _mean(-back.log_weight.double())
            gradients = schedule.gradients + (there.gradients + back.gradients) * particles
            return {}, {
                "lower": lower, "lower_error": lower_error, "upper": -upper,
                "upper_error": upper_error, "gradients": gradients,
            }  # fmt: skip

        _, figures = by_chunks(
            work, target, _rows(chunk, particles), seed=seed, folder=None, progress=progress,
            settings={"method": "BDMC"},
        )  # fmt: skip
    return Sandwich(**figures, latents=latents, batch=simulated)


def _rows(chunk: int, particles: int) -> int:
    return max(1, chunk // max(particles, PILOT))


class _Schedule(NamedTuple):
    rungs: list[Rung]
    possible: Tensor
    gradients: Tensor
    """evaluations of each datum"""


class _Weighed(NamedTuple):
    position: Tensor
    log_weight: Tensor
    gradients: int


def _tuned(base: Base, particles: int, temperatures: int) -> _Schedule:
    """A path of `temperatures` steps, spaced as a pilot's, which lost as much at each."""
    pilot = explore(base, PILOT, PILOT, threshold=0.7)
    if not pilot.rungs:
        return _Schedule([], pilot.possible, pilot.gradients * PILOT)
    betas = torch.stack([torch.zeros_like(pilot.rungs[0].beta), *(r.beta for r in pilot.rungs)])
    step_sizes = torch.stack([rung.step_size for rung in pilot.rungs])
    metrics = torch.stack([rung.metric for rung in pilot.rungs])
    length = (betas < 1).sum(0).clamp_max(len(pilot.rungs))  # rungs of each datum
    row = torch.arange(betas.shape[1])
    rungs = []
    for t in range(1, temperatures + 1):
        place = length.to(betas) * (t / temperatures)
        lower = place.ceil().long().clamp_min(1) - 1
        lower = lower.minimum(length - 1)
        beta = torch.lerp(betas[lower, row], betas[lower + 1, row], place - lower)
        beta = torch.ones_like(beta) if t == temperatures else beta
        rungs.append(Rung(beta, step_sizes[lower, row], metrics[lower, row]))
    return _Schedule(rungs, pilot.possible, pilot.gradients * PILOT)


def _forward(base: Base, rungs: list[Rung], particles: int) -> _Weighed:
    with torch.no_grad():
        u = base.sample(particles)
    log_weight, beta, gradients = u.new_zeros(u.shape[:2]), torch.zeros_like(u[0, :, 0]), 0
    for rung in rungs:
        log_weight = log_weight + (rung.beta - beta) * _log_ratio(base, u)
        u, steps = _move(base, rung, u)
        beta, gradients = rung.beta, gradients + steps
    return _Weighed(u, log_weight, gradients)


def _backward(base: Base, rungs: list[Rung], u: Tensor) -> _Weighed:
    """The forward chain in reverse: what it did last comes first."""
    log_weight, gradients = u.new_zeros(u.shape[:2]), 0
    below = [torch.zeros_like(rungs[0].beta), *(rung.beta for rung in rungs[:-1])]
    for rung, beta in zip(reversed(rungs), reversed(below), strict=True):
        u, steps = _move(base, rung, u)
        log_weight = log_weight + (rung.beta - beta) * _log_ratio(base, u)
        gradients += steps
    return _Weighed(u, log_weight, gradients)


def _log_ratio(base: Base, u: Tensor) -> Tensor:
    with torch.no_grad():
        log_base, log_joint = ends(base, u)
    return torch.nan_to_num(log_joint - log_base, nan=-torch.inf)


def _move(base: Base, rung: Rung, u: Tensor) -> tuple[Tensor, int]:
    bridge = Bridge(base, rung.beta)
    steps = int(torch.randint(1, LEAPFROG + 1, ()))
    with torch.no_grad():
        state = State(u, bridge(u))
    moved = hamiltonian(bridge, state, rung.step_size, rung.metric, steps)
    return moved.state.position, steps + 3


def _mean(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean weight and its standard error by the delta method, `(B,)` each."""
    count = len(log_weight)
    log_mean = log_weight.logsumexp(0) - math.log(count)
    relative = (log_weight - log_mean).exp()
    return log_mean, relative.std(0) / math.sqrt(count)


def _check(
    model: Model, guide: Guide | None, batch: Batch, particles: int, temperatures: int
) -> None:
    if guide is None:
        check_model(model, batch)
    else:
        check_pair(model, guide, batch)
    if particles < 2 or temperatures < 1:
        raise ValueError(
            "annealing wants particles >= 2 and temperatures >= 1; "
            f"got particles={particles}, temperatures={temperatures}"
        )
