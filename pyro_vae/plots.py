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


def image(ax: Axes, x: Tensor, shape: tuple[int, int], title: str = "") -> Axes:
    """One row of data as an image, ink dark, 0 white and 1 black."""
    ax.imshow(x.reshape(shape).numpy(), cmap="Greys", vmin=0, vmax=1)
    ax.set_title(title, fontsize=7, pad=3)
    ax.set_axis_off()
    return ax


def images(ax: Axes, x: Tensor, shape: tuple[int, int], *, columns: int = 8) -> Axes:
    """Many rows of pixels as one sheet, from left to right and top to bottom.

    Args:
        ax: where to draw.
        x: `(N, D)`.
        shape: `(height, width)`, `D` in all.
        columns: images in a row of the sheet.
    """
    height, width = shape
    columns = min(columns, len(x))
    rows = -(-len(x) // columns)
    sheet = x.new_full((rows * columns, height + 1, width + 1), float(x.max()) / 2)
    sheet[: len(x), :height, :width] = x.reshape(-1, height, width)
    tiled = sheet.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
    ax.imshow(tiled[:-1, :-1].cpu().numpy(), cmap="gray_r", interpolation="nearest")
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
    titles: Sequence[str], *, pictures: Sequence[Sequence[Tensor]] = (),
    shape: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """A column a datum: data and reconstruction side by side, the posterior panel below.

    Args:
        figure: an empty figure to fill.
        exact: quadrature of at least as many data as there are titles, if there is any.
        guide: draws of the guide for the same rows.
        mcmc: draws of a chain for the same rows.
        titles: one a column; what follows its first line stands below the panel.
        pictures: data and reconstruction of each column, each of `D` numbers.
        shape: `(height, width)` of a picture.
    """
    count = len(titles)
    rows = [1.0] if shape is None else [0.45, 1.0]
    grid = figure.add_gridspec(len(rows), 2 * count, height_ratios=rows)
    for datum in range(count):
        place = slice(2 * datum, 2 * datum + 2)
        if shape is not None:
            for offset, (x, name) in enumerate(
                zip(pictures[datum], ("data", "reconstruction"), strict=True)
            ):
                image(figure.add_subplot(grid[0, 2 * datum + offset]), x, shape, name)
        panel = figure.add_subplot(grid[-1, place])
        posterior(panel, exact, datum, guide=guide, mcmc=mcmc)
        title, _, below = titles[datum].partition("\n")
        panel.set_title(title, fontsize=8)
        panel.set_xlabel(below, fontsize=7, linespacing=1.3)
        panel.tick_params(labelsize=6)
    handles: list[Patch | Line2D] = [Line2D([], [], color=GUIDE, label="guide, 1 and 2 sd")]
    if exact is not None:
        handles.insert(0, Patch(color=colormaps[DENSITY](0.6), label="exact density"))
    if mcmc is not None:
        handles.insert(-1, Line2D([], [], color=MCMC, ls="", marker=".", label="MCMC draws"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


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
