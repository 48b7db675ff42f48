"""Bounds on log p(x) from draws of the guide, datum by datum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyro
import torch
from torch import Tensor

from pyro_vae.capture import CannotCaptureError, Recorded
from pyro_vae.checks import check_pair
from pyro_vae.pair import Batch, Guide, Model, evaluating, log_densities, preserved_rng
from pyro_vae.posterior.draws import Draws
from pyro_vae.tables import Tabular, by_datum

if TYPE_CHECKING:
    import pandas as pd


FIGURES = ("elbo", "elbo_se", "iwae", "iwae_se", "ess", "khat")
"""Of `Bounds`, each `(B,)`."""


@dataclass(frozen=True, repr=False)
class Bounds(Tabular):
    """What the importance weights w = p(x, z) / q(z | x) of `S` draws say of `B` data.

    Attributes:
        elbo: mean log w, nats, `(B,)`; below log p(x) by KL(q‖p(z|x)).
        elbo_se: its standard error.
        iwae: log of the mean w, nats, `(B,)`; in expectation below log p(x), above the ELBO
            (Burda, Grosse, Salakhutdinov. *Importance Weighted Autoencoders*, 2016).
        iwae_se: its standard error by the delta method; too small where k-hat is high.
        ess: effective sample size of the weights, (Σw)²/Σw², `(B,)`.
        khat: Pareto tail index of the weights, `(B,)`; see `pareto_khat`. NaN below 25 draws.
        draws: the first draws of the guide, one chain.
    """

    elbo: Tensor
    elbo_se: Tensor
    iwae: Tensor
    iwae_se: Tensor
    ess: Tensor
    khat: Tensor
    draws: Draws

    @property
    def table(self) -> pd.DataFrame:
        """A row a datum, a column a figure."""
        return by_datum({name: getattr(self, name) for name in FIGURES})

    @classmethod
    def joined(cls, parts: Sequence[Bounds]) -> Bounds:
        """The bounds of several batches as those of one."""
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in FIGURES}
        return cls(**tensors, draws=Draws.joined([part.draws for part in parts]))


def bounds(
    model: Model,
    guide: Guide,
    batch: Batch,
    *,
    draws: int = 1000,
    keep: int = 1000,
    chunk: int = 2**12,
    compile: bool = False,
    seed: int = 0,
) -> Bounds:
    r"""Draw from the guide and weigh, for each datum.

    $$\mathrm{ELBO} = \mathbb E_q[\log w] \le \log p(x), \qquad w = p(x, z) / q(z \mid x)$$

    Args:
        model: p(z) p(x | z).
        guide: q(z | x).
        batch: tensors of `B` rows.
        draws: `S` for each datum, at least 2.
        keep: draws that are returned, at most; weights are not.
        chunk: draws times rows evaluated at once, which bounds the memory whatever `S` is; the
            guide runs once a chunk. Some thousand keep what a decoder computes in the cache.
        compile: score a chunk by a recording of the pair, compiled: half the time or less, after
            some seconds. It draws the same. Where that is impossible it warns and goes on.
        seed: of the draws; torch's random state is left as it was.

    Returns:
        `Bounds`.

    Raises:
        ValueError: a count below its least, or a bad batch.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> b = bounds(model, guide, (torch.zeros(5, 3),))
        >>> bool((b.elbo <= b.iwae).all()), b.khat.shape
        (True, torch.Size([5]))
    """
    check_pair(model, guide, batch)
    if draws < 2:
        raise ValueError(f"bounds wants at least 2 draws a datum; got {draws}")
    if chunk < 1 or keep < 0:
        raise ValueError(f"bounds wants chunk >= 1 and keep >= 0; got {chunk} and {keep}")
    count, keep = len(batch[0]), min(keep, draws)
    rows, at_once = _evenly(count, max(1, chunk // draws)), _evenly(draws, chunk)
    # All that stays is allocated first: small tensors left among large ones that come and go would
    # split the holes that the large ones leave, and memory would grow with the rows.
    figures = torch.empty(6, count, dtype=torch.float64)
    log_weight = torch.empty(math.ceil(draws / at_once) * at_once, rows, dtype=torch.float64)
    with preserved_rng(seed), evaluating(model, guide), torch.no_grad():
        drawn = log_densities(model, guide, tuple(p[:1] for p in batch), 1).latents
        sites = {
            name: torch.empty(keep, count, *value.shape[2:], dtype=value.dtype)
            for name, value in drawn.items()
        }
        score = _scoring(model, guide, at_once)
        if compile:
            score = _compiled(score, tuple(p[:rows] for p in batch))
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            index = torch.arange(start, start + rows, device=batch[0].device).clamp_max(count - 1)
            inputs = tuple(p[index] for p in batch)
            for done in range(0, draws, at_once):
                log_weight[done : done + at_once], *values = score(*inputs)
                for site, value in zip(sites.values(), values, strict=True):
                    few = value[: max(0, keep - done), : stop - start]
                    site[done : done + at_once, start:stop] = few
            figures[:, start:stop] = torch.stack(_figures(log_weight[:draws, : stop - start]))
    elbo, elbo_se, iwae, iwae_se, ess, khat = figures
    chain = {name: value.unsqueeze(0) for name, value in sites.items()}
    return Bounds(elbo, elbo_se, iwae, iwae_se, ess, khat, Draws(chain, method="guide"))


Scoring = Callable[..., tuple[Tensor, ...]]
"""From the rows of a batch to log w, `(S, B)`, and the latents that were drawn."""


def _scoring(model: Model, guide: Guide, draws: int) -> Scoring:
    def score(*batch: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = log_densities(model, guide, batch, draws)
        return found.log_weight, *found.latents.values()

    return score


def _compiled(score: Scoring, inputs: Batch) -> Scoring:
    try:
        with pyro.validation_enabled(False), preserved_rng():
            return Recorded(score, *inputs).compiled(*inputs)
    except CannotCaptureError as error:
        warnings.warn(f"bounds are not compiled: {error}", stacklevel=3)
        return score


def _evenly(total: int, most: int) -> int:
    """The size of equal parts of `total`, each of `most` or fewer."""
    return math.ceil(total / math.ceil(total / most))


def _figures(log_weight: Tensor) -> tuple[Tensor, ...]:
    """The figures of `Bounds` from weights `(S, B)`, in their order."""
    count = len(log_weight)
    iwae = log_weight.logsumexp(0) - math.log(count)
    return (
        log_weight.mean(0),
        log_weight.std(0) / math.sqrt(count),
        iwae,
        (log_weight - iwae).exp().std(0) / math.sqrt(count),
        (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp(),
        pareto_khat(log_weight) if count >= 25 else torch.full_like(iwae, torch.nan),
    )


def pareto_khat(log_weight: Tensor) -> Tensor:
    r"""Shape of a generalised Pareto distribution fitted to the largest weights of each datum.

    The tail holds the $M = \min(S/5, 3\sqrt S)$ largest weights. The fit is Zhang and
    Stephens's, with the weak prior that Vehtari et al. put on k.

    Args:
        log_weight: `(S, B)`, nats, `S >= 25`.

    Returns:
        `(B,)`. Below 0.5 the weights have finite variance and importance sampling repairs the
        guide; above 0.7 it does not. −inf where the largest weights agree within 0.1 %, as
        under an exact guide; inf where a few outweigh all others by hundreds of nats.

    Warning:
        It speaks of what the guide has drawn: a mode that no draw has met is not seen.

    Raises:
        ValueError: fewer than 25 draws.

    References:
        Jin Zhang, Michael A. Stephens. *A New and Efficient Estimation Method for the
        Generalized Pareto Distribution*, 2009.
        Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry. *Pareto Smoothed
        Importance Sampling*, 2024.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> exponential = torch.rand(4000, 1, generator=generator).log().neg()
        >>> abs(pareto_khat(0.5 * exponential).item() - 0.5) < 0.1
        True
    """
    count = len(log_weight)
    if count < 25:
        raise ValueError(f"pareto_khat wants at least 25 draws a datum; got {count}")
    size = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
    relative = (log_weight - log_weight.max(0).values).double()
    top = relative.topk(size + 1, 0).values.flip(0)
    excess = top[1:].exp() - top[0].clamp_min(math.log(torch.finfo(torch.float64).tiny)).exp()
    alike = top[-1] - top[0] < 1e-3
    extreme = ~alike & (excess[len(excess) // 4] <= 0)
    ramp = torch.linspace(0.1, 1, len(excess), dtype=excess.dtype).unsqueeze(-1)
    k = _generalised_pareto_shape(torch.where(alike | extreme, ramp, excess))
    return torch.where(alike, -torch.inf, torch.where(extreme, torch.inf, k))


def _generalised_pareto_shape(x: Tensor) -> Tensor:
    """`k` by columns of ascending, positive `(M, B)`; Zhang and Stephens (2009), section 3."""
    count = len(x)
    points = 30 + math.isqrt(count)
    grid = torch.arange(1, points + 1, dtype=x.dtype, device=x.device) - 0.5
    quartile = x[int(count / 4 + 0.5) - 1]
    theta = 1 / x[-1] + (1 - (points / grid).sqrt()).unsqueeze(-1) / (3 * quartile)  # (points, B)
    k = torch.log1p(-theta.unsqueeze(1) * x).mean(1)
    profile = count * ((-theta / k).log() - k - 1)
    mean = (profile.softmax(0) * theta).sum(0)
    k = torch.log1p(-mean * x).mean(0)
    return (k * count + 5) / (count + 10)
