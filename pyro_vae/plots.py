"""Pictures: every function draws on the axes it is given and returns them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse, Patch
from torch import Tensor

from pyro_vae.pair import Model, observation
from pyro_vae.posterior.draws import Draws
from pyro_vae.posterior.quadrature import Quadrature

if TYPE_CHECKING:
    from pyro_vae.svi import Run

GUIDE, MCMC, DENSITY = "#d1495b", "#22223b", "Blues"


def posterior(
    ax: Axes, exact: Quadrature | None, datum: int, *, guide: Draws | None = None,
    mcmc: Draws | None = None, points: int = 400,
) -> Axes:  # fmt: skip
    """The exact density of one datum, MCMC draws over it, and the guide's ellipse.

    In two dimensions a heat map, the draws as points, the guide by its 1 and 2 sd ellipses;
    in one dimension a curve, a histogram and the guide's histogram; in more, draws and ellipses
    of the first two.

    Args:
        ax: where to draw.
        exact: quadrature, or `None` where there is none.
        datum: which row.
        guide: draws of the guide for the same rows.
        mcmc: draws of a chain for the same rows.
        points: draws of the chain to show.

    Raises:
        ValueError: neither quadrature nor chains to draw.
    """
    truth = mcmc if exact is None else exact
    if truth is None:
        raise ValueError("posterior() draws quadrature or chains; both are None")
    size = truth.mean.shape[-1]
    if exact is not None and size == 1:
        nodes, density = exact.density(datum)
        ax.fill_between(nodes[:, 0].numpy(), density.numpy(), color="0.85", label="exact")
        for draws, colour, name in ((mcmc, MCMC, "MCMC"), (guide, GUIDE, "guide")):
            if draws is not None:
                values = draws.flat[:, datum, 0].numpy()
                ax.hist(values, bins=40, density=True, histtype="step", color=colour, label=name)
        ax.set_yticks([])
        return ax
    if exact is not None and size == 2:
        nodes, density = exact.density(datum)
        ax.pcolormesh(
            *nodes.permute(2, 0, 1).numpy(),
            density.numpy(),
            cmap=DENSITY,
            shading="gouraud",
            rasterized=True,
        )
    if mcmc is not None:
        shown = mcmc.flat[:: max(1, len(mcmc.flat) // points), datum, :2]
        ax.plot(*shown.T.numpy(), ".", color=MCMC, markersize=1.6, alpha=0.6)
    if guide is not None:
        _ellipses(ax, guide.flat[:, datum, :2].double())
    _frame(ax, truth.mean[datum, :2].double(), truth.sd[datum, :2].double(), datum, guide)
    return ax


def image(
    ax: Axes, x: Tensor, shape: tuple[int, int], title: str = "", *,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Axes:  # fmt: skip
    """One row of data as an image, ink dark: the lower limit white, the upper one black."""
    low, high = limits
    ax.imshow(x.reshape(shape).numpy(), cmap="Greys", vmin=low, vmax=high)
    ax.set_title(title, fontsize=7, pad=3)
    ax.set_axis_off()
    return ax


def images(ax: Axes, x: Tensor, shape: tuple[int, int], *, columns: int = 8) -> Axes:
    """Many rows of pixels as one sheet, from left to right and top to bottom.

    The axes count images: the first one covers 0 to 1 in both directions.

    Args:
        ax: where to draw.
        x: `(N, D)`.
        shape: `(height, width)`, `D` in all.
        columns: images in a row of the sheet.
    """
    columns = min(columns, len(x))
    rows = -(-len(x) // columns)
    finer = max(1, 32 // max(shape))  # a gap of 2 is then thin beside any image, and seen
    tiles = x.double().reshape(-1, *shape).repeat_interleave(finer, 1).repeat_interleave(finer, 2)
    height, width = (side * finer for side in shape)
    sheet = tiles.new_full((rows * columns, height + 2, width + 2), torch.nan)
    sheet[: len(x), :height, :width] = tiles
    tiled = sheet.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
    extent = (0, columns, rows, 0)
    ax.imshow(tiled[:-2, :-2].cpu().numpy(), cmap="gray_r", interpolation="nearest", extent=extent)
    ax.set_aspect(shape[0] / shape[1])
    ax.set_axis_off()
    return ax


def history(ax: Axes, run: Run) -> Axes:
    """ELBO against epochs, training and validation, with one standard error as a band."""
    table = run.history
    for split, colour in (("train", "0.45"), ("validation", GUIDE)):
        mean, error = table[f"{split}_elbo"], table[f"{split}_elbo_se"]
        ax.plot(table.index, mean, color=colour, label=split)
        ax.fill_between(table.index, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
    ax.axvline(run.best_epoch, color="0.7", lw=0.8, ls=":")
    ax.set_xlabel("epoch")
    ax.set_ylabel("ELBO (nats per datum)")
    ax.legend(frameon=False, loc="lower right")
    return ax


def rate_and_distortion(ax: Axes, run: Run) -> Axes:
    """KL and reconstruction against epochs on validation rows: the ELBO is their difference."""
    table = run.history
    (first,) = ax.plot(
        table.index, table["validation_reconstruction"], color=MCMC, label="reconstruction"
    )
    ax.set_ylabel("reconstruction (nats per datum)")
    ax.set_xlabel("epoch")
    other = ax.twinx()
    (second,) = other.plot(table.index, table["validation_kl"], color=GUIDE, label="KL")
    other.set_ylabel("KL (nats per datum)", color=GUIDE)
    ax.legend(handles=[first, second], frameon=False, loc="lower right")
    return ax


def latent_map(ax: Axes, z: Tensor, labels: Tensor | None = None) -> Axes:
    """Codes of many rows in the plane, coloured by class where there are classes.

    Args:
        ax: where to draw.
        z: `(N, 2)`.
        labels: `(N,)` classes; the colours repeat after twenty.
    """
    if labels is None:
        ax.plot(*z.T.numpy(), ".", color=GUIDE, markersize=2, alpha=0.6)
        return ax
    classes = labels.unique().tolist()
    colours = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    for place, label in enumerate(classes):
        own = z[labels == label]
        colour = colours(place % colours.N)
        ax.plot(*own.T.numpy(), ".", color=colour, markersize=2, alpha=0.7, label=f"{label:g}")
    if len(classes) <= 20:
        ax.legend(
            frameon=False, fontsize=7, markerscale=4, ncols=2, handletextpad=0, loc="best",
            columnspacing=0.5, labelspacing=0.3,
        )  # fmt: skip
    return ax


def aggregate(ax: Axes, posterior: Tensor, prior: Tensor) -> Axes:
    """Draws of the aggregate posterior under draws of the prior, in one or two dimensions.

    Args:
        ax: where to draw.
        posterior: a draw of q(z | x) for each of many rows, `(N, 1)` or `(N, 2)`.
        prior: as many draws of p(z).
    """
    drawn = ((posterior, GUIDE, "aggregate posterior"), (prior, MCMC, "prior"))
    for z, colour, name in drawn:
        if z.shape[1] == 1:
            ax.hist(
                z[:, 0].numpy(), bins=60, density=True, histtype="step", color=colour, label=name
            )
        else:
            ax.plot(*z.T.numpy(), ".", color=colour, markersize=1.8, alpha=0.5, label=name)
    ax.legend(frameon=False, fontsize=8, markerscale=5, loc="best")
    return ax


def ranks(ax: Axes, chains: Tensor, *, bins: int = 20) -> Axes:
    """Rank plot of a scalar: how each chain's draws rank among those of all, `(C, S)`.

    Histograms are flat, within the band of two standard deviations, where chains agree.

    References:
        Aki Vehtari, Andrew Gelman, Daniel Simpson, Bob Carpenter, Paul-Christian Bürkner.
        *Rank-Normalization, Folding, and Localization: An Improved R-hat*, 2021.
    """
    count, draws = chains.shape
    order = chains.flatten().argsort().argsort().view(count, draws)
    edges = torch.linspace(0, count * draws, bins + 1)
    expected, sd = draws / bins, (draws / bins * (1 - 1 / bins)) ** 0.5
    ax.axhspan(expected - 2 * sd, expected + 2 * sd, color="0.9", lw=0)
    for chain, colour in zip(order, _chain_colours(count), strict=True):
        heights = torch.histogram(chain.float(), edges).hist
        ax.stairs(heights.numpy(), edges.numpy(), color=colour, lw=1)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("rank among all chains")
    ax.set_ylabel("draws")
    return ax


def traces(ax: Axes, chains: Tensor) -> Axes:
    """Each chain's draws of a scalar, one after the other, `(C, S)`."""
    for chain, colour in zip(chains, _chain_colours(len(chains)), strict=True):
        ax.plot(chain.numpy(), color=colour, lw=0.4, alpha=0.8)
    ax.set_xlabel("draw")
    return ax


def energy(ax: Axes, energies: Tensor) -> Axes:
    """The law of the energy −log p(x, z), and that of its change between draws, `(C, S)`.

    References:
        Michael Betancourt. *A Conceptual Introduction to Hamiltonian Monte Carlo*, 2017.
    """
    centred, change = energies - energies.mean(), energies.diff(dim=1)
    for values, colour, name in ((centred, MCMC, "energy"), (change, GUIDE, "change")):
        ax.hist(
            values.flatten().numpy(), bins=50, density=True, histtype="step", color=colour,
            label=name,
        )  # fmt: skip
    ax.set_xlabel("nats from the mean")
    ax.set_yticks([])
    ax.legend(frameon=False, fontsize=8)
    return ax


def units(
    ax: Axes, names: Sequence[str], variance: Tensor, error: Tensor, threshold: float
) -> Axes:
    """Variance over data of each unit's posterior mean, the largest first, on a log scale.

    Args:
        ax: where to draw.
        names: of the `L` units.
        variance: `(L,)`.
        error: its standard error, `(L,)`; bars are two of them.
        threshold: below which a unit is inactive.
    """
    order = variance.argsort(descending=True)
    value = variance[order].clamp_min(threshold / 100).numpy()
    colours = [GUIDE if variance[i] > threshold else "0.6" for i in order]
    bars = 2 * error[order].numpy()
    ax.bar(range(len(order)), value, 0.6, color=colours, yerr=bars, ecolor="0.3")
    ax.axhline(threshold, color="0.4", ls="--", lw=1)
    ax.set_yscale("log")
    if len(order) <= 12:
        ax.set_xticks(range(len(order)), [names[i] for i in order])
    else:
        ax.set_xlabel("units, by variance")
    ax.set_ylabel("Var E[z | x]")
    return ax


def latent_grid(ax: Axes, model: Model, shape: tuple[int, int], *, side: int = 13) -> Axes:
    """Means of p(x | z) over the plane of two standard normal latents, at normal quantiles.

    Args:
        ax: where to draw.
        model: a model that generates by `model(None, size=n)`, with a single site `"z"`.
        shape: `(height, width)` of an image.
        side: images a side.
    """
    quantiles = torch.linspace(0.5 / side, 1 - 0.5 / side, side)
    line = torch.special.ndtri(quantiles)
    z = torch.stack(torch.meshgrid(line.flip(0), line, indexing="ij"), -1).flip(-1)
    height, width = shape
    means = observation(model, {"z": z.reshape(-1, 2)}).mean.reshape(side, side, height, width)
    tiles = torch.nn.functional.pad(means, (1, 1, 1, 1))
    height, width = height + 2, width + 2
    ax.imshow(tiles.transpose(1, 2).reshape(side * height, side * width).numpy(), cmap="Greys")
    for set_ticks, size, values in (
        (ax.set_xticks, width, line),
        (ax.set_yticks, height, line.flip(0)),
    ):
        marks = range(side // 10, side, max(1, side // 4))
        set_ticks([(i + 0.5) * size for i in marks], [f"{float(values[i]):.1f}" for i in marks])
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
    return ax


def comparison(
    figure: Figure | SubFigure, exact: Quadrature | None, guide: Draws, mcmc: Draws | None,
    data: Sequence[int], titles: Sequence[str], *, pictures: Sequence[Sequence[Tensor]] = (),
    shape: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """A column a datum: data and reconstruction side by side, the posterior panel below.

    Args:
        figure: an empty figure to fill.
        exact: quadrature, if there is any.
        guide: draws of the guide for the same rows.
        mcmc: draws of a chain for the same rows.
        data: which row in each column.
        titles: one a column; what follows its first line stands below the panel.
        pictures: data and reconstruction of each column, each of `D` numbers.
        shape: `(height, width)` of a picture.
    """
    rows = [1.0] if shape is None else [0.45, 1.0]
    grid = figure.add_gridspec(len(rows), 2 * len(data), height_ratios=rows)
    for column, datum in enumerate(data):
        place = slice(2 * column, 2 * column + 2)
        if shape is not None:
            seen = pictures[column][0]
            limits = min(0.0, float(seen.min())), max(1.0, float(seen.max()))
            for offset, (x, name) in enumerate(
                zip(pictures[column], ("data", "reconstruction"), strict=True)
            ):
                above = figure.add_subplot(grid[0, 2 * column + offset])
                image(above, x, shape, name, limits=limits)
        panel = figure.add_subplot(grid[-1, place])
        posterior(panel, exact, datum, guide=guide, mcmc=mcmc)
        title, _, below = titles[column].partition("\n")
        panel.set_title(title, fontsize=8)
        panel.set_xlabel(below, fontsize=7, linespacing=1.3)
        panel.tick_params(labelsize=6)
    handles: list[Patch | Line2D] = [Line2D([], [], color=GUIDE, label="guide, 1 and 2 sd")]
    if exact is not None:
        handles.insert(0, Patch(color=colormaps[DENSITY](0.6), label="exact density"))
    if mcmc is not None:
        handles.insert(-1, Line2D([], [], color=MCMC, ls="", marker=".", label="MCMC draws"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _chain_colours(count: int) -> list[tuple[float, float, float, float]]:
    return [colormaps["viridis"]((i + 0.5) / count) for i in range(count)]


def _frame(ax: Axes, mean: Tensor, sd: Tensor, datum: int, guide: Draws | None) -> None:
    """A square around 3 sd of the posterior and 2.2 sd of the guide."""
    low, high = mean - 3 * sd, mean + 3 * sd
    if guide is not None:
        middle, spread = (part[datum, :2].double() for part in (guide.mean, guide.sd))
        low = torch.minimum(low, middle - 2.2 * spread)
        high = torch.maximum(high, middle + 2.2 * spread)
    center, half = (low + high) / 2, float((high - low).max()) / 2
    ax.set_xlim(float(center[0]) - half, float(center[0]) + half)
    ax.set_ylim(float(center[1]) - half, float(center[1]) + half)
    ax.set_aspect("equal")
    ax.set_facecolor(colormaps[DENSITY](0.0))


def _ellipses(ax: Axes, draws: Tensor) -> None:
    values, vectors = torch.linalg.eigh(draws.T.cov())
    angle = math.degrees(math.atan2(float(vectors[1, 1]), float(vectors[0, 1])))
    for scale in (1, 2):
        width, height = (2 * scale * float(v) ** 0.5 for v in values.flip(0))
        center = (float(draws[:, 0].mean()), float(draws[:, 1].mean()))
        ax.add_patch(Ellipse(center, width, height, angle=angle, fill=False, color=GUIDE, lw=1.4))
