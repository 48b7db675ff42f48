"""The figures of a report: each takes a pair and data, and returns a figure and its caption."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import plots
from pyro_vae.data import Dataset
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import (
    Batch,
    Guide,
    Model,
    center,
    evaluating,
    log_densities,
    observation,
    preserved_rng,
    side_by_side,
    simulate,
    unit_names,
)
from pyro_vae.posterior import Draws
from pyro_vae.svi import Run
from pyro_vae.verdict import Calibration, Diagnosis, Verdict

Latents = Mapping[str, Tensor]


class Picture(NamedTuple):
    """A figure as a page shows it."""

    source: str
    """a data URI"""
    alt: str
    caption: str
    width: int
    """in CSS pixels"""


def picture(figure: Figure, alt: str, caption: str) -> Picture:
    """A figure as a lossless image inside the page, on a transparent ground."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=160, transparent=True, pil_kwargs={"lossless": True})
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(source, alt, caption, round(96 * figure.get_figwidth()))


def pool(data: Dataset, rows: int, seed: int) -> tuple[Batch, Tensor | None]:
    """Training rows as the guide sees them, at most so many, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(data.train[0]), generator=generator)[:rows]
    x, *rest = (part[index] for part in data.train)
    with preserved_rng(seed):
        x = x if data.per_batch is None else data.per_batch(x)
    labels = data.labels.get("train")
    return (x, *rest), None if labels is None else labels[index]


class Codes(NamedTuple):
    """Draws of the aggregate posterior and of the prior, a row of each for a row of data."""

    posterior: Latents
    prior: Latents
    labels: Tensor | None


def codes(model: Model, guide: Guide, rows: Batch, labels: Tensor | None, seed: int) -> Codes:
    """Draw one z from q(z | x) for each row, and one from the prior."""
    with preserved_rng(seed), evaluating(model, guide), torch.no_grad():
        drawn = log_densities(model, guide, rows, 1).latents
        prior, _ = simulate(model, rows)
    return Codes({name: value[0] for name, value in drawn.items()}, prior, labels)


def curves(run: Run) -> Picture:
    """ELBO, reconstruction and KL by epoch."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    elbo, parts = figure.subplots(1, 2)
    plots.history(elbo, run)
    plots.rate_and_distortion(parts, run)
    best = run.best
    return picture(
        figure,
        f"ELBO by epoch; the best validation ELBO is {best.validation_elbo:.2f} nats in epoch "
        f"{best.epoch}. Beside it KL and reconstruction.",
        "Left: ELBO of training and validation rows, with one standard error; the dotted line is "
        "the epoch whose weights were kept. Right: its parts on validation rows.",
    )


def reconstructions(model: Model, guide: Guide, rows: Batch, shape: tuple[int, int]) -> Picture:
    """Data above the mean of p(x | z) at the guide's mean."""
    few = tuple(part[:12] for part in rows)
    means = _decoded(model, _guide_means(model, guide, few), few)
    return picture(
        _sheet(torch.cat([few[0], means]), shape, len(few[0])),
        f"{len(few[0])} test rows as images, above their reconstructions",
        "Test rows, and below each the mean of p(x | z) at the guide's mean.",
    )


def samples(model: Model, rows: Batch, shape: tuple[int, int], seed: int) -> Picture:
    """Means of p(x | z) at draws from the prior."""
    some = tuple(part[:48] for part in rows)
    with preserved_rng(seed):
        latents, _ = simulate(model, some)
    return picture(
        _sheet(_decoded(model, latents, some), shape, 16),
        f"{len(some[0])} images generated from the prior",
        "Mean of p(x | z) at draws z from the prior.",
    )


def interpolations(model: Model, guide: Guide, rows: Batch, shape: tuple[int, int]) -> Picture:
    """Means of p(x | z) on straight lines between the guide's means of neighbouring rows."""
    lines, steps = min(4, len(rows[0]) // 2), 11
    ends = tuple(part[: 2 * lines] for part in rows)
    share = torch.linspace(0, 1, steps)
    between = {
        name: torch.stack([torch.lerp(v[0::2], v[1::2], s) for s in share], 1).flatten(0, 1)
        for name, v in _guide_means(model, guide, ends).items()
    }
    context = tuple(part[0::2].repeat_interleave(steps, 0) for part in ends)
    return picture(
        _sheet(_decoded(model, between, context), shape, steps),
        f"{lines} rows of images that change from one test row to another",
        "Mean of p(x | z) on straight lines between the guide's means of two test rows.",
    )


def traversals(
    model: Model, guide: Guide, rows: Batch, shape: tuple[int, int], found: Codes,
    diagnosis: Diagnosis,
) -> Picture:  # fmt: skip
    """Means of p(x | z) as one unit moves over the range that the data use."""
    units = diagnosis.units.variance.value.argsort(descending=True)[:6].tolist()
    steps = 11
    base, pool = (
        side_by_side(_guide_means(model, guide, tuple(p[:1] for p in rows)), 1),
        found.posterior,
    )
    z = base.repeat(len(units) * steps, 1)
    spread = (
        side_by_side(pool, 1)
        .double()
        .quantile(torch.linspace(0.01, 0.99, steps, dtype=torch.float64), 0)
    )
    for row, unit in enumerate(units):
        z[row * steps : (row + 1) * steps, unit] = spread[:, unit].to(z)
    context = tuple(part[:1].expand(len(z), *part.shape[1:]) for part in rows)
    names = [diagnosis.units.names[unit] for unit in units]
    figure = _sheet(_decoded(model, _by_site(z, pool), context), shape, steps)
    for row, name in enumerate(names):
        figure.axes[0].text(-0.1, row + 0.5, name, ha="right", va="center", fontsize=8)
    return picture(
        figure,
        f"A row of images for each of {', '.join(names)} as it moves",
        "From the guide's mean of the first test row one unit moves, from the 1 % to the 99 % "
        "quantile of the aggregate posterior; units that vary most come first.",
    )


def latent_map(found: Codes, diagnosis: Diagnosis | None) -> Picture:
    """The aggregate posterior by class, and beside it the prior."""
    posterior, prior = side_by_side(found.posterior, 1), side_by_side(found.prior, 1)
    names = unit_names(found.posterior, 1)
    if diagnosis is None:
        pair = list(range(posterior.shape[1]))[:2]
    else:
        pair = diagnosis.units.variance.value.argsort(descending=True)[:2].sort().values.tolist()
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    if len(pair) == 1:
        axes = figure.subplots()
        plots.aggregate(axes, posterior[:, pair], prior[:, pair])
        axes.set_xlabel(names[pair[0]])
    else:
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        plots.latent_map(left, posterior[:, pair], found.labels)
        plots.aggregate(right, posterior[:, pair], prior[:, pair])
        for axes in (left, right):
            axes.set_xlabel(names[pair[0]])
        left.set_ylabel(names[pair[1]])
    which = "" if posterior.shape[1] <= 2 else ", the two units that vary most"
    by_class = ", coloured by class" if len(pair) == 2 and found.labels is not None else ""
    return picture(
        figure,
        f"Latent codes of training rows{by_class}, and draws of the prior over them",
        f"A draw of q(z | x) for each of {len(posterior):,} training rows{which}; and the prior "
        "against this aggregate posterior. Where they part, samples are poor or codes are wasted.",
    )


def panel(verdict: Verdict, datum: int, shape: tuple[int, int] | None) -> Picture:
    """Exact posterior, chains and guide of one row, with the row and its reconstruction."""
    figure = Figure(figsize=(2.7, 2.6 if shape is None else 3.6), layout="constrained")
    verdict.plot(shape, data=[datum], figure=figure)
    figure.legends.clear()  # the page says it once
    row = verdict.table.loc[datum]
    return picture(
        figure,
        f"Posterior of row {datum}: KL {row['kl']:.2f} nats, {row['why'] or 'trusted'}",
        f"row {datum}",
    )


def chains(model: Model, rows: Batch, draws: Draws) -> Picture:
    """Ranks, traces and energies of the row whose chains agree least."""
    rhat = side_by_side(draws.rhat, 1)
    datum, unit = divmod(int(rhat.nan_to_num(torch.inf).argmax()), rhat.shape[1])
    count = next(iter(draws.sites.values())).shape[:2]
    flat = draws.flat.unflatten(0, count)[:, :, datum, unit]
    target = LogJoint(model, tuple(part[datum : datum + 1] for part in rows))
    z = {name: value[:, :, datum : datum + 1].flatten(0, 1) for name, value in draws.sites.items()}
    with torch.no_grad():
        energy = -target(target.unconstrain(z)).reshape(count)
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    ranks, traces, energies = figure.subplots(1, 3)
    name = unit_names(draws.sites, 3)[unit]
    plots.ranks(ranks, flat)
    plots.traces(traces, flat)
    traces.set_ylabel(name)
    plots.energy(energies, energy)
    worst = float(rhat[datum, unit])
    told = f"R-hat {worst:.3f}" if worst == worst else "R-hat undefined, they never moved"
    return picture(
        figure,
        f"Rank, trace and energy plots of row {datum}, {name}, {told}",
        f"The row whose chains agree least: row {datum}, {name}, {told}. "
        "Ranks are flat and traces overlap where chains agree. Energy is −log p(x, z): its change "
        "from draw to draw should be as wide as its law.",
    )


def calibration(found: Calibration) -> Picture:
    """ECDF of the ranks less the uniform."""
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    found.plot(figure.subplots())
    wrong = int((found.summary()["verdict"] != "calibrated").sum())
    return picture(
        figure,
        f"Rank curves; {wrong} of {len(found.names)} leave uniformity",
        f"Ranks of what generated {len(found.ranks):,} simulated data among {found.draws} draws "
        "of the guide. A right guide's curve stays in the band.",
    )


def units(found: Diagnosis) -> Picture:
    """What each latent unit carries."""
    width = min(9.0, 2.5 + 0.5 * len(found.units.names))
    figure = Figure(figsize=(width, 2.8), layout="constrained")
    found.plot(figure.subplots())
    return picture(
        figure,
        f"{int(found.units.active.sum())} of {len(found.units.names)} latent units are active",
        "Variance of the guide's mean over rows, with two standard errors; a unit below the "
        "dashed line carries nothing.",
    )


def _sheet(x: Tensor, shape: tuple[int, int], columns: int) -> Figure:
    columns = min(columns, len(x))
    height = 9 / columns * -(-len(x) // columns) * shape[0] / shape[1]
    figure = Figure(figsize=(9, height), layout="constrained")
    plots.images(figure.subplots(), x, shape, columns=columns)
    return figure


def _guide_means(model: Model, guide: Guide, rows: Batch) -> Latents:
    with preserved_rng(0), evaluating(model, guide), torch.no_grad():
        drawn = log_densities(model, guide, rows, 200).latents
    return {name: value.mean(0) for name, value in drawn.items()}


def _decoded(model: Model, latents: Latents, rows: Batch) -> Tensor:
    return center(observation(model, latents, rows))


def _by_site(flat: Tensor, like: Latents) -> Latents:
    """`side_by_side` undone."""
    parts = flat.split([value[0].numel() for value in like.values()], -1)
    return {
        name: part.reshape(len(flat), *value.shape[1:])
        for (name, value), part in zip(like.items(), parts, strict=True)
    }
