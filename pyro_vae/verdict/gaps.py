"""Why a guide is below log p(x): its family, or its encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pyro_vae.checks import check_pair, refuse
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import (
    Batch,
    Guide,
    Model,
    all_sites,
    frozen,
    log_densities,
    log_prob_of,
    preserved_rng,
    simulate,
)
from pyro_vae.posterior.scouts import heaviest
from pyro_vae.tables import Tabular, by_datum
from pyro_vae.verdict.family import Family, family_of

if TYPE_CHECKING:
    import pandas as pd

SWEEPS = 4
"""Sweeps of the step size; the last one tells whether there was more to gain."""
DECAY = 1e-3
"""What the step size falls to within a sweep, relative to `lr`."""
STARTS = 1024
"""Simulated data whose answers are tried as another start."""
SETTLED = 0.01
"""Nats that the last sweep may gain where the search is called settled."""
ROUNDING = 1.0
"""Nats above log p(x) from which an ELBO is taken for a failure of single precision."""


@dataclass(frozen=True, repr=False)
class Gaps(Tabular):
    """The inference gap of `B` data in its two parts; nats, `(B,)` each, float64.

    Attributes:
        log_evidence: log p(x), as given.
        log_evidence_se: its standard error.
        log_weight: log p(x, z) − log q(z | x) of the guide's draws, `(S, B)`.
        best_log_weight: the same of draws of q*, from the same random numbers.
        drift: what the last quarter of the search still gained.
        drift_se: its standard error.
    """

    log_evidence: Tensor
    log_evidence_se: Tensor
    log_weight: Tensor
    best_log_weight: Tensor
    drift: Tensor
    drift_se: Tensor

    @property
    def table(self) -> pd.DataFrame:
        """A row a datum: the inference gap, its two parts, and their standard errors."""
        names = ("inference", "approximation", "amortization")
        return by_datum({n: getattr(self, n) for name in names for n in (name, f"{name}_se")})

    @cached_property
    def inference(self) -> Tensor:
        """Log p(x) − L[q] = KL(q‖p(z|x)): the sum of the two gaps."""
        return self.log_evidence - self.log_weight.mean(0)

    @cached_property
    def inference_se(self) -> Tensor:
        """Standard error of `inference`."""
        return torch.hypot(_se(self.log_weight), self.log_evidence_se)

    @cached_property
    def approximation(self) -> Tensor:
        """Log p(x) − L[q*]: what the family cannot express."""
        return self.log_evidence - self.best_log_weight.mean(0)

    @cached_property
    def approximation_se(self) -> Tensor:
        """Standard error of `approximation`."""
        return torch.hypot(_se(self.best_log_weight), self.log_evidence_se)

    @cached_property
    def amortization(self) -> Tensor:
        """L[q*] − L[q]: what the encoder leaves; 0 where the guide's own answer was kept."""
        return (self.best_log_weight - self.log_weight).mean(0)

    @cached_property
    def amortization_se(self) -> Tensor:
        """Standard error of `amortization`, of paired draws."""
        return _se(self.best_log_weight - self.log_weight)

    @cached_property
    def settled(self) -> Tensor:
        """Whether the last quarter of the search gained nothing that matters, `(B,)` bool.

        Where it did, `amortization` is too small and `approximation` too large.
        """
        return self.drift < SETTLED + 2 * self.drift_se


def gaps(
    model: Model,
    guide: Guide,
    batch: Batch,
    *,
    log_evidence: Tensor,
    log_evidence_se: Tensor | None = None,
    steps: int = 1000,
    lr: float = 0.2,
    draws: int = 32,
    evaluation_draws: int = 2000,
    chunk: int = 2**14,
    seed: int = 0,
    progress: bool = True,
) -> Gaps:
    r"""Split the inference gap of each datum into approximation and amortization gap.

    $$\underbrace{\log p(x) - \mathcal L[q]}_{\text{inference}}
      = \underbrace{\log p(x) - \mathcal L[q^*]}_{\text{approximation}}
      + \underbrace{\mathcal L[q^*] - \mathcal L[q]}_{\text{amortization}}$$

    $q^*$ is the best member of the guide's own family for that datum. It is climbed to by Adam on
    fresh draws, all data together, with the gradient of Roeder et al., which has no noise where
    $q^*$ is exact, and with steps in units of the diagonal Fisher information. In each of four
    sweeps the step size falls from `lr`; a datum keeps what a sweep found if it does better on
    held-out draws, and what the last one gained is `drift`. The first sweep has two starts:
    the guide's answer and, as that may lie at a minor mode, whichever of its answers to 1,024
    simulated data suits the datum best. In up to three latent dimensions, where data share one
    decoder, draws of the prior tell where most of a posterior is, the better the more data
    there are, and a third start is the answer under which that place is likeliest. The guide's
    own answer is kept where nothing beats it. All ELBOs are then measured on further draws, from
    the same random numbers for q and $q^*$.

    Args:
        model: p(z) p(x | z).
        guide: q(z | x), of one site or of several that do not depend on each other's draws;
            see `family_of`.
        batch: tensors of `B` rows.
        log_evidence: log p(x), nats, `(B,)`: of quadrature, or annealed.
        log_evidence_se: its standard error, `(B,)`; 0 by default.
        steps: of the climb, at least 4. A thousand reach about 30 sd of q far.
        lr: first step size of each sweep, in Fisher units: for a mean, the sd of q.
        draws: `z` for each gradient.
        evaluation_draws: `S`, for the ELBOs, at least 2.
        chunk: draws times rows evaluated at once, which bounds the memory.
        seed: torch's random state is left as it was.
        progress: show a bar.

    Returns:
        `Gaps`.

    Warning:
        The family is that of the distribution at the site, its parameters free for each datum,
        also those that the guide shares between data. A family with several optima, such as a
        Gaussian on a posterior of two modes, may have a better one than these climbs reach, and
        a guide that answers only to data it knows, or a likelihood that cannot be drawn from,
        leaves the guide's own answer as the one start. Where `settled` is false, more `steps` are
        due.

    Raises:
        ValueError: a bad pair or batch, counts below their minimum, `log_evidence` of another
            shape, or a guide whose family cannot be read.

    References:
        Chris Cremer, Xuechen Li, David Duvenaud. *Inference Suboptimality in Variational
        Autoencoders*, 2018.
        Geoffrey Roeder, Yuhuai Wu, David Duvenaud. *Sticking the Landing: Simple,
        Lower-Variance Gradient Estimators for Variational Inference*, 2017.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> x = torch.ones(5, 3)
        >>> evidence = model.log_evidence(x).detach()
        >>> found = gaps(
        ...     model, guide, (x,), log_evidence=evidence, steps=400, progress=False
        ... )
        >>> bool((found.approximation.abs() < 0.01).all()), bool((found.amortization > 0.1).all())
        (True, True)
    """
    check_pair(model, guide, batch)
    if steps < SWEEPS or draws < 1 or evaluation_draws < 2 or not lr > 0:
        raise ValueError(
            f"gaps wants steps >= {SWEEPS}, draws >= 1, evaluation_draws >= 2, lr > 0; "
            f"got {steps}, {draws}, {evaluation_draws}, {lr}"
        )
    error = torch.zeros_like(log_evidence) if log_evidence_se is None else log_evidence_se
    _check_evidence(log_evidence, error, len(batch[0]))
    rows = max(1, chunk // draws)
    slices = [slice(i, i + rows) for i in range(0, len(batch[0]), rows)]
    sweep = steps // SWEEPS
    blocks = math.ceil(evaluation_draws / draws)
    bar = tqdm(total=SWEEPS * sweep * len(slices), desc="gaps", disable=not progress)
    with bar, preserved_rng(seed), frozen(model, guide), pyro.validation_enabled(False):
        parts = []
        for index in slices:
            chosen = tuple(part[index] for part in batch)
            search = _Search(model, guide, chosen, log_evidence[index], draws, blocks, bar)
            parts.append(search(sweep, lr))
    weights = [torch.cat(part, dim=1).double().cpu() for part in zip(*parts, strict=True)]
    amortized, best, before, after = (weight[:evaluation_draws] for weight in weights)
    return Gaps(
        log_evidence.double().cpu(), error.double().cpu(), amortized, best,
        (after - before).mean(0), _se(after - before),
    )  # fmt: skip


Draw = Callable[[], Tensor]
"""Draws and weighs: `(S, B)` log weights."""


@dataclass(frozen=True)
class _Search:
    """The climb of some rows, all together."""

    model: Model
    guide: Guide
    batch: Batch
    log_evidence: Tensor
    draws: int
    blocks: int
    bar: tqdm[None]

    def __call__(self, steps: int, lr: float) -> tuple[Tensor, ...]:
        """Log weights of q, of q*, and of the search before and after its last sweep."""
        own = self.family.start
        starts = [own, *self._elsewhere()]
        self.bar.total += (len(starts) - 1) * steps
        climbed = [self._climb(start, steps, lr) for start in starts]
        free = before = self._best(own, *climbed)
        for _ in range(1, SWEEPS):
            before, free = free, self._best(free, self._climb(free, steps, lr))
        better = self._higher(self._member(free), self._amortized)
        kinds = self._amortized, self._member(before), self._member(free)
        q, first, last = self._weigh(*kinds)
        return q, torch.where(better, last, q), first, last

    @cached_property
    def family(self) -> Family:
        with torch.no_grad(), poutine.block():
            return family_of(self.guide, self.batch)

    def _elsewhere(self) -> list[Tensor]:
        """Of the guide's answers to simulated data those that suit each datum best."""
        with torch.no_grad(), poutine.block():
            try:
                answers = self._answers(self.model, math.ceil(STARTS / len(self.batch[0])))
            except (ValueError, NotImplementedError):  # it knows its own data alone, or no x
                return []
            found = [self._suited(answers, self._drawn_well)]
            with suppress(ValueError, NotImplementedError, KeyError):  # a pair that hides places
                if (places := self._places()) is not None:
                    there = poutine.condition(self.model, data=places)
                    answers = torch.cat([answers, self._answers(there, 1)])
                    found.append(self._suited(answers, partial(self._told, places)))
        return found

    def _answers(self, model: Model, times: int) -> Tensor:
        answer = self.family.answer
        return torch.cat([answer(simulate(model, self.batch)[1]) for _ in range(times)])

    def _suited(self, answers: Tensor, suits: Callable[[Tensor], Tensor]) -> Tensor:
        """Of answers `(A, F)` the one that suits each datum best."""
        scores = torch.cat([suits(some) for some in answers.split(len(self.batch[0]))])
        return answers[scores.nan_to_num(-torch.inf, posinf=-torch.inf).argmax(0)]

    def _drawn_well(self, answers: Tensor) -> Tensor:
        """How likely each datum finds a draw of each answer, `(A, B)`."""
        drawn = self.family.draw(answers, 1, score=answers)[0]
        blocks = _blocks({name: z[0] for name, z in drawn.items()}, self.draws, len(answers))
        return torch.cat([self._log_joint(z) for _, z in blocks])

    def _told(self, places: dict[str, Tensor], answers: Tensor) -> Tensor:
        """How likely each answer finds the place of each datum, `(A, B)`."""
        family = replace(self.family, masks=dict.fromkeys(places))
        blocks = _blocks(places, self.draws, len(answers))
        return torch.cat([family.log_prob(answers, z, count) for count, z in blocks]).T

    def _places(self) -> dict[str, Tensor] | None:
        """Latents where most of each posterior is, `(B, *event)`, if that can be known."""
        target = LogJoint(self.model, self.batch)
        if (u := heaviest(target, self.draws)) is None:
            return None
        return {name: z[0] for name, z in target.constrain(u.unsqueeze(0))[0].items()}

    def _best(self, first: Tensor, *others: Tensor) -> Tensor:
        """Of several λ the one with the highest ELBO, for each datum."""
        for other in others:
            better = self._higher(self._member(other), self._member(first))
            first = torch.where(better.unsqueeze(-1), other, first)
        return first

    def _climb(self, start: Tensor, steps: int, lr: float) -> Tensor:
        unit = self.family.unit(start, self.draws)
        move = torch.zeros_like(start).requires_grad_(True)
        optimizer = torch.optim.Adam([move], lr=lr, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY ** (1 / steps))
        for _ in range(steps):
            with torch.enable_grad():
                loss = -self._log_weight(start + unit * move).mean(0).sum()
            (move.grad,) = torch.autograd.grad(loss, [move])
            optimizer.step()
            schedule.step()
            self.bar.update()
        return start + unit * move.detach()

    def _log_weight(self, free: Tensor) -> Tensor:
        """Log p(x, z) − log q(z | λ), `(S, B)`; its gradient flows through `z` alone."""
        latents, log_q = self.family.draw(free, self.draws, score=free.detach())
        return self._log_joint(latents) - log_q

    def _log_joint(self, latents: dict[str, Tensor]) -> Tensor:
        """Log p(x, z) of latents, each `(S, B, *event)`; `(S, B)`."""
        with poutine.block():
            conditioned = poutine.condition(self.model, data=latents)
            trace = poutine.trace(conditioned).get_trace(*self.batch)
        draws, rows = next(iter(latents.values())).shape[:2]
        return log_prob_of(all_sites(trace), (draws, rows))

    def _member(self, free: Tensor) -> Draw:
        return lambda: self._log_weight(free)

    def _amortized(self) -> Tensor:
        return log_densities(self.model, self.guide, self.batch, self.draws).log_weight

    def _weigh(self, *kinds: Draw) -> list[Tensor]:
        """Log weights of each kind, `(S, B)`, all from the same fresh random numbers."""
        seed, weights = int(torch.randint(2**31, ())), []
        for draw in kinds:
            with preserved_rng(seed), torch.no_grad():
                weights.append(torch.cat([draw() for _ in range(self.blocks)]))
        return weights

    def _higher(self, one: Draw, other: Draw) -> Tensor:
        """Where one has the higher ELBO, and one that log p(x) allows, `(B,)` bool."""
        elbo, rival = (weight.mean(0) for weight in self._weigh(one, other))
        return (elbo > rival) & (elbo < self.log_evidence.to(elbo) + ROUNDING)


def _blocks(
    latents: dict[str, Tensor], size: int, rows: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Latents `(A, *event)` as draws of each of `rows` data, `(size, rows, *event)` at a time."""
    for parts in zip(*(z.split(size) for z in latents.values()), strict=True):
        count = len(parts[0])
        wide = (z.unsqueeze(1).expand(count, rows, *z.shape[1:]) for z in parts)
        yield count, dict(zip(latents, wide, strict=True))


def _check_evidence(value: Tensor, error: Tensor, size: int) -> None:
    if value.shape != (size,) or error.shape != (size,):
        refuse(
            "log_evidence is not a figure for each datum",
            expected=f"shape ({size},)",
            got=f"{tuple(value.shape)}, with errors {tuple(error.shape)}",
            advice="pv.posterior.quadrature(model, batch).log_evidence",
        )


def _se(sample: Tensor) -> Tensor:
    return sample.std(0) / math.sqrt(len(sample))
