"""Diagnose a pair as a whole: units, rate, the aggregate posterior, and its holes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.checks import check_pair, refuse
from pyro_vae.pair import (
    Batch,
    Guide,
    Model,
    evaluating,
    latent_sites,
    log_prob_of,
    observation,
    observed_sites,
    preserved_rng,
    side_by_side,
    trace_pair,
    unit_names,
    with_draws,
)
from pyro_vae.verdict.diagnosis import Diagnosis, Estimate, Holes, Surgery, Units

LINES, STEPS = 100, 64
"""Straight lines that decoder jumps are looked for on, and steps of each."""


def diagnose(
    model: Model,
    guide: Guide,
    batch: Batch,
    *,
    draws: int = 10,
    active: float = 0.01,
    thin: float = math.log(100),
    chunk: int = 2**15,
    seed: int = 0,
) -> Diagnosis:
    r"""Diagnose a pair as a whole, on all rows of a data set.

    With the aggregate posterior $\bar q(z) = \frac1N \sum_m q(z \mid x_m)$ over *all* rows,
    `draws` z from each q(z | x_n) and as many from the prior give

    $$R = \mathbb E\left[\log\frac{q(z \mid x_n)}{p(z)}\right], \quad
      I_q(n; z) = \mathbb E\left[\log\frac{q(z \mid x_n)}{\bar q(z)}\right], \quad
      \mathrm{KL}(\bar q\|p) = \mathbb E\left[\log\frac{\bar q(z)}{p(z)}\right]$$

    Each is unbiased. A latent unit is active if $\mathrm{Var}_x(\mathbb E_q[z_d \mid x])$ is
    above `active`; where means come from draws, their noise is subtracted. Prior mass is thin
    where $\log \bar q(z) - \log p(z)$ is below −`thin`.

    Args:
        model: p(z) p(x | z).
        guide: q(z | x).
        batch: tensors of `N >= 2` rows: the full data set.
        draws: `S`, from guide and prior for each row, at least 2.
        active: the variance below which a unit is inactive, and the KL, in nats, below which
            it has collapsed.
        thin: nats; by default a hundredth of the prior's density.
        chunk: draws times rows evaluated at once, which bounds the memory.
        seed: of the draws; torch's random state is left as it was.

    Returns:
        `Diagnosis`. Standard errors are those of the draws, for these rows; they say nothing
        of other rows. That of `variance` takes draws for Gaussian, and is 0 where the guide
        knows its means; that of `thin_mass` is binomial, after one success and one failure
        more than seen.

    Warning:
        Costs 2 S N² densities of the guide. I_q cannot exceed log N: near it, it says that
        rows are told apart, not how well. In many dimensions a finite N leaves the prior thin
        almost everywhere: compare `thin_mass` at equal N. Under a guide that is a point, rate
        and surgery mean nothing. Data simulated from the same `seed` share its random numbers
        with the draws: take another.

    Raises:
        ValueError: a bad pair or batch, fewer than 2 rows, `draws` below 2.

    References:
        Yuri Burda, Roger Grosse, Ruslan Salakhutdinov. *Importance Weighted
        Autoencoders*, 2016 (active units).
        Matthew D. Hoffman, Matthew J. Johnson. *ELBO Surgery*, 2016.
        Ricky T. Q. Chen, Xuechen Li, Roger Grosse, David Duvenaud. *Isolating Sources of
        Disentanglement in Variational Autoencoders*, 2018 (total correlation).
        Alexander A. Alemi et al. *Fixing a Broken ELBO*, 2018 (rate and distortion).

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> found = diagnose(model, guide, (torch.ones(5, 3),))
        >>> found.units.active, bool(found.surgery.mutual_information.value < 1e-4)
        (tensor([False, False]), True)
    """
    check_pair(model, guide, batch)
    size = len(batch[0])
    if size < 2 or draws < 2 or chunk < 1:
        refuse(
            "diagnose cannot tell signal from noise with so little",
            expected="at least 2 rows, draws >= 2, chunk >= 1",
            got=f"{size} rows, draws={draws}, chunk={chunk}",
            advice="the full data set, and the defaults",
        )
    width = max(1, min(math.isqrt(chunk), chunk // draws))
    parts = [tuple(part[i : i + width] for part in batch) for i in range(0, size, width)]
    with preserved_rng(seed), evaluating(model, guide), torch.no_grad():
        z, log = _from_guide(model, guide, parts, draws)
        prior_z, at_prior = _from_prior(model, parts, draws)
        columns = min(log["guide"].shape[-1], log["prior"].shape[-1])
        log_guide, log_prior = log["guide"][..., :columns], log["prior"][..., :columns]
        score = _columns if columns > 1 else _joint
        log_aggregate = _log_aggregate(guide, z, parts, score, chunk)
        shared = _is_shared(model, prior_z, at_prior, parts)
        ratio = _log_aggregate(guide, prior_z, parts, _joint, chunk) - at_prior if shared else None
        jumps = _jumps(model, prior_z, batch, chunk)
    kl, marginal = log_guide - log_prior, log_aggregate - log_prior
    rate, distortion = kl[..., 0], -log["likelihood"]
    return Diagnosis(
        rate=_over_rows(rate),
        distortion=_over_rows(distortion),
        elbo=_over_rows(-rate - distortion),
        surgery=_surgery(log_guide, log_prior, log_aggregate, shared),
        units=Units(
            names=unit_names(z, 2),
            variance=_variance_of_means(log["means"]),
            kl=_over_rows(kl[..., 1:]) if columns > 1 else None,
            marginal_kl=_over_rows(marginal[..., 1:]) if shared and columns > 1 else None,
            mean=_over_rows(side_by_side(z, 2)),
            sd=_sd(side_by_side(z, 2)),
            prior_mean=_over_rows(side_by_side(prior_z, 2)),
            prior_sd=_sd(side_by_side(prior_z, 2)),
            threshold=active,
        ),
        holes=Holes(None if ratio is None else _share(~(ratio >= -thin)), jumps),
    )


def _from_guide(
    model: Model, guide: Guide, parts: Sequence[Batch], draws: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws of the guide by site, their log densities, and what the guide knows of its means."""
    latents, figures = [], []
    for rows in parts:
        model_trace, guide_trace = trace_pair(model, guide, rows, draws)
        shape = (draws, len(rows[0]))
        z = {site["name"]: site["value"] for site in latent_sites(model_trace)}
        sites = [guide_trace.nodes[name] for name in z]
        means = {name: _mean(guide_trace.nodes[name]["fn"]) for name in z}
        latents.append(z)
        figures.append({
            "likelihood": log_prob_of(observed_sites(model_trace), shape),
            "prior": _columns(latent_sites(model_trace), shape),
            "guide": _columns(sites, shape),
            "means": side_by_side({n: z[n] if m is None else m for n, m in means.items()}, 2),
        })  # fmt: skip
    return _join(latents), _join(figures)


def _from_prior(
    model: Model, parts: Sequence[Batch], draws: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of the prior by site, and their log densities, `(S, N, 1)`."""
    latents, log_prior = [], []
    for rows in parts:
        sites = latent_sites(poutine.trace(with_draws(model, draws)).get_trace(*rows))
        latents.append({site["name"]: site["value"] for site in sites})
        log_prior.append(_joint(sites, (draws, len(rows[0]))))
    return _join(latents), torch.cat(log_prior, dim=1)


def _joint(sites: Sequence[Any], shape: tuple[int, int]) -> Tensor:
    """The log density of all sites together, `(S, B, 1)`."""
    return log_prob_of(sites, shape).unsqueeze(-1)


def _columns(sites: Sequence[Any], shape: tuple[int, int]) -> Tensor:
    """That of all sites together, then that of each scalar if they are a product of these.

    `(S, B, 1 + L)` for a single site that is independent over its scalars, else `(S, B, 1)`.
    """
    (site, *others) = sites
    scalar = site["fn"]
    while isinstance(scalar, Independent):
        scalar = scalar.base_dist
    if others or scalar.event_shape or site["mask"] is not None:
        return _joint(sites, shape)
    log_prob = scalar.log_prob(site["value"]).reshape(*shape, -1)
    return torch.cat([log_prob.sum(-1, keepdim=True), log_prob], dim=-1)


def _score_at(
    program: Model | Guide, z: dict[str, Tensor], rows: Batch, score: Callable[..., Tensor]
) -> Tensor:
    """`_joint` or `_columns` of the program at values z, `(S, B, *event)` by site."""
    draws, size = next(iter(z.values())).shape[:2]
    conditioned = poutine.condition(with_draws(program, draws), data=z)
    with pyro.validation_enabled(False):  # a point outside a support has density 0, not an error
        trace = poutine.trace(conditioned).get_trace(*rows)
        return score([trace.nodes[name] for name in z], (draws, size))


def _log_aggregate(
    guide: Guide,
    z: dict[str, Tensor],
    parts: Sequence[Batch],
    score: Callable[..., Tensor],
    chunk: int,
) -> Tensor:
    """The score under q_agg at each of `(S, N)` points: over all rows, never some."""
    shape = next(iter(z.values())).shape[:2]
    width, size = len(parts[0][0]), sum(len(rows[0]) for rows in parts)
    flat = {name: value.flatten(0, 1).unsqueeze(1) for name, value in z.items()}
    found = []
    for piece in _split(flat, max(1, chunk // width), dim=0):
        log_sums = []
        for rows in parts:
            everywhere = {
                name: value.expand(-1, len(rows[0]), *value.shape[2:])
                for name, value in piece.items()
            }
            log_sums.append(_score_at(guide, everywhere, rows, score).logsumexp(1).double())
        found.append(torch.stack(log_sums).logsumexp(0) - math.log(size))
    return torch.cat(found).unflatten(0, shape)


def _is_shared(
    model: Model, z: dict[str, Tensor], log_prior: Tensor, parts: Sequence[Batch]
) -> bool:
    """Whether each row has the prior of the row before it."""
    before = {name: value[:1].roll(1, dims=1) for name, value in z.items()}
    pieces = _split(before, len(parts[0][0]), dim=1)
    here = [_score_at(model, z, rows, _joint) for z, rows in zip(pieces, parts, strict=True)]
    there = log_prior[:1].roll(1, dims=1)
    return torch.allclose(torch.cat(here, dim=1), there, rtol=1e-4, atol=1e-3)


def _jumps(model: Model, z: dict[str, Tensor], batch: Batch, chunk: int) -> Tensor | None:
    """`Holes.jumps`, on lines from the first to the second prior draw of rows far apart."""
    size = len(batch[0])
    chosen = torch.linspace(0, size - 1, min(size, LINES)).long()
    share = torch.linspace(0, 1, STEPS + 1)
    speeds = []
    for rows in chosen.split(max(1, chunk // len(share))):
        ends = {name: value[:2, rows] for name, value in z.items()}
        path = {
            name: torch.stack([start.lerp(end, t) for t in share.tolist()])
            for name, (start, end) in ends.items()
        }
        line = observation(with_draws(model, len(share)), path, tuple(p[rows] for p in batch))
        if (mean := _mean(line)) is None:
            return None
        step = mean.double().diff(dim=0).reshape(STEPS, len(rows), -1).norm(dim=-1)
        speeds.append(step * STEPS / side_by_side(ends, 2).diff(dim=0).norm(dim=-1))
    speed = torch.cat(speeds, dim=1).cpu()
    fastest = speed.max(0).values
    return torch.where(fastest == 0, 0.0, fastest / speed.median())


def _surgery(log_guide: Tensor, log_prior: Tensor, log_aggregate: Tensor, shared: bool) -> Surgery:
    """From columns at draws of the guide, `(S, N, 1 + L)` or `(S, N, 1)`."""
    marginal = log_aggregate - log_prior
    dependence = log_aggregate[..., 0] - log_aggregate[..., 1:].sum(-1)
    product = shared and marginal.shape[-1] > 1
    return Surgery(
        mutual_information=_over_rows((log_guide - log_aggregate)[..., 0]),
        marginal_kl=_over_rows(marginal[..., 0]) if shared else None,
        total_correlation=_over_rows(dependence) if product else None,
        dimension_kl=_over_rows(marginal[..., 1:].sum(-1)) if product else None,
    )


def _over_rows(values: Tensor) -> Estimate:
    """The mean of `(S, N, ...)` draws, with the error of the draws for these rows."""
    values = values.double().cpu()
    draws, size = values.shape[:2]
    return Estimate(values.mean((0, 1)), (values.var(0) / draws).sum(0).sqrt() / size)


def _sd(values: Tensor) -> Estimate:
    """The standard deviation of `(S, N, L)` draws; its error by the delta method."""
    variance = _over_rows((values - values.mean((0, 1))).square())
    sd = variance.value.sqrt()
    return Estimate(sd, variance.se / (2 * sd))


def _variance_of_means(values: Tensor) -> Estimate:
    """The variance over rows of each row's mean, without the noise of `(S, N, L)` draws."""
    values = values.double().cpu()
    draws, size = values.shape[:2]
    means, noise = values.mean(0), values.var(0) / draws
    shift = (means - means.mean(0)).square() - noise
    linear = (4 * shift * noise).sum(0).clamp_min(0)
    square = (2 * noise.square() * draws / (draws - 1)).sum(0)
    return Estimate(means.var(0) - noise.mean(0), (linear + square).sqrt() / size)


def _share(holds: Tensor) -> Estimate:
    """The share of draws for which it holds; the error is never 0."""
    count, seen = holds.numel(), holds.sum().double().cpu()
    share = (seen + 1) / (count + 2)
    return Estimate(seen / count, (share * (1 - share) / count).sqrt())


def _mean(distribution: Any) -> Tensor | None:
    """Its mean, unless it has none or does not know it."""
    try:
        mean: Tensor = distribution.mean
    except NotImplementedError:
        return None
    return None if mean.isnan().all() else mean


def _join(pieces: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]}


def _split(z: dict[str, Tensor], size: int, dim: int) -> list[dict[str, Tensor]]:
    pieces = zip(*(value.split(size, dim) for value in z.values()), strict=True)
    return [dict(zip(z, piece, strict=True)) for piece in pieces]
