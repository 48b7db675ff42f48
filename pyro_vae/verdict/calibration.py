"""Is a guide right on average over its own model? Ranks of what generated the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.checks import check_pair
from pyro_vae.pair import (
    Batch,
    Guide,
    Model,
    all_sites,
    evaluating,
    log_densities,
    log_prob_of,
    preserved_rng,
    side_by_side,
    simulate,
    unit_names,
)
from pyro_vae.tables import Tabular

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

GRID = torch.arange(1, 100, dtype=torch.float64) / 100
"""Where the ECDF of ranks is held against the diagonal."""

COLOURS = {
    "calibrated": "0.55",
    "too narrow": "#d1495b",
    "too wide": "#2e86ab",
    "biased high": "#e09f3e",
    "biased low": "#6a4c93",
    "misshapen": "#3d7a4a",
}
"""Of the verdicts of a summary."""


@dataclass(frozen=True, repr=False)
class Calibration(Tabular):
    r"""Ranks of what generated the data among draws of the guide, by test quantity.

    The quantities are every scalar latent, the product of each two of at most four, centred,
    and log p(x, z). A right guide has uniform ranks in each.

    Attributes:
        names: of the `Q` quantities: `z[0]`, `z[1]`, `z[0] × z[1]`, `log p(x, z)`.
        ranks: how many draws lie below, ties at random, `(N, Q)`, 0 to `draws`.
        draws: `S`, of the guide for each simulated datum.
        uniform: the ranks spread over [0, 1], $(r + U) / (S + 1)$ with uniform `U`, `(N, Q)`;
            exactly uniform where the ranks are.
    """

    names: tuple[str, ...]
    ranks: Tensor
    draws: int
    uniform: Tensor

    @property
    def pvalue(self) -> Tensor:
        r"""Of Neyman's smooth test for uniformity, `(Q,)`.

        $$N \sum_{k=1}^4 \bar\varphi_k^2 \sim \chi^2_4, \qquad
          \varphi_k(u) = \sqrt{2k + 1}\, P_k(2u - 1)$$

        with Legendre's polynomials: of bias, width, skewness and tails.

        References:
            Jerzy Neyman. *"Smooth Test" for Goodness of Fit*, 1937.
        """
        order = torch.arange(1, 5)
        x = 2 * self.uniform.unsqueeze(-1) - 1
        waves = torch.special.legendre_polynomial_p(x, order) * (2 * order + 1).sqrt()
        statistic = len(x) * waves.mean(0).square().sum(-1)
        return torch.special.gammaincc(torch.full_like(statistic, 2.0), statistic / 2)

    def coverage(self, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95)) -> pd.DataFrame:
        """How often central intervals of the guide hold what generated the data.

        Args:
            levels: of the intervals, between 0 and 1.

        Returns:
            A row a quantity and level, with `coverage` and `se`, the binomial standard error
            that a right guide has.
        """
        import pandas as pd

        inside = {level: ((2 * self.uniform - 1).abs() < level).double() for level in levels}
        rows = {
            (name, level): (
                inside[level][:, q].mean().item(),
                math.sqrt(level * (1 - level) / len(self.uniform)),
            )
            for q, name in enumerate(self.names)
            for level in levels
        }
        table = pd.DataFrame.from_dict(rows, orient="index", columns=["coverage", "se"])
        table.index = pd.MultiIndex.from_tuples(rows, names=["quantity", "level"])
        return table

    def ecdf_difference(self) -> Tensor:
        """Share of ranks up to each of `GRID`, less `GRID` itself, `(99, Q)`."""
        ordered = self.uniform.T.contiguous().sort(-1).values
        below = torch.searchsorted(ordered, GRID.expand(len(self.names), -1).contiguous())
        return (below.double() / len(self.uniform)).T - GRID.unsqueeze(-1)

    def band(self, probability: float = 0.95) -> Tensor:
        r"""Half width of a simultaneous band around 0 for `ecdf_difference`, `(99,)`.

        $c \sqrt{t (1 - t) / N}$, with c such that a right guide's curve stays inside at all
        99 points with this probability; c is found from 4,000 simulated curves.

        Args:
            probability: of staying inside, of one quantity.

        References:
            Teemu Säilynoja, Paul-Christian Bürkner, Aki Vehtari. *Graphical Test for Discrete
            Uniformity and its Applications in Goodness-of-Fit Evaluation and Multiple Sample
            Comparison*, 2022 (whose bands have binomial instead of these normal margins).
        """
        sd = (GRID * (1 - GRID) / len(self.uniform)).sqrt()
        peak = (_uniform_ecdf_differences(len(self.uniform)) / sd).abs().max(-1).values
        return peak.quantile(probability) * sd

    def summary(self, false_alarm: float = 0.01) -> pd.DataFrame:
        """A row a quantity, and what is wrong with it in a word.

        `shift` is how far the guide lies above (+) or below (−) what generated the data, in sd
        of the guide, and `width` how wide it is for its errors, 1 being right; both come from
        normal scores of the ranks, with standard errors. They are right for Gaussians and
        cannot pass what `draws` can tell: about 2.5 sd of shift for 100 draws.

        Args:
            false_alarm: how often any row of a right guide is found fault with.

        Returns:
            Columns `shift`, `shift_se`, `width`, `width_se`, `pvalue` and `verdict`:
            "calibrated", "too narrow" (ranks like a U), "too wide" (a hump), "biased high" or
            "biased low" (a slope), or "misshapen".
        """
        import pandas as pd

        scores = torch.special.ndtri(self.uniform)
        count = len(scores)
        mean, sd = scores.mean(0), scores.std(0)
        columns = {
            "shift": -mean,
            "shift_se": sd / math.sqrt(count),
            "width": 1 / sd,
            "width_se": 1 / sd / math.sqrt(2 * count),
            "pvalue": self.pvalue,
        }
        table = pd.DataFrame({name: value.numpy() for name, value in columns.items()})
        table.index = pd.Index(self.names, name="quantity")
        limit = false_alarm / len(table)
        table["verdict"] = [_word(row, count, limit) for row in table.to_dict("records")]
        return table

    def plot(self, axes: Axes | None = None, *, probability: float = 0.95) -> Axes:
        """ECDF of the ranks less that of a uniform law, with its simultaneous band.

        A curve like an S, first above and then below, is a guide that is too narrow; an arch
        above is one biased high, below low. Quantities share a colour if they share a verdict.

        Args:
            axes: where to draw; new ones by default.
            probability: that a right guide stays in the band everywhere, for each curve.

        Returns:
            The axes.
        """
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(4.5, 3.2), dpi=150, layout="constrained").add_subplot()
        band, verdicts = self.band(probability), self.summary()["verdict"]
        axes.fill_between(GRID, -band, band, color="0.9", lw=0, label=f"{probability:.0%} band")
        curves = self.ecdf_difference()
        for word, colour in COLOURS.items():
            told = (verdicts == word).to_numpy().nonzero()[0]
            if len(told):
                few = ", ".join(self.names[q] for q in told[:3]) + ", …" * (len(told) > 3)
                lines = axes.plot(GRID, curves[:, told], color=colour, lw=1)
                lines[0].set_label(f"{word}: {few}")
        axes.set_xlim(0, 1)
        axes.set_xlabel("rank / draws")
        axes.set_ylabel("ECDF − uniform")
        axes.margins(y=0.3)
        axes.legend(frameon=False, fontsize=7)
        return axes

    def _told(self) -> Sequence[str | pd.DataFrame]:
        return [self.summary()]


def calibrate(
    model: Model,
    guide: Guide,
    batch: Batch,
    *,
    replicates: int = 1000,
    draws: int = 200,
    chunk: int = 2**15,
    seed: int = 0,
) -> Calibration:
    r"""Simulation-based calibration of an amortized guide, without a refit.

    $$z^* \sim p(z), \quad x \sim p(x \mid z^*), \quad z_1 \dots z_S \sim q(z \mid x):
      \qquad \#\{s: f(z_s, x) < f(z^*, x)\} \sim \mathrm{Uniform}\{0 \dots S\}$$

    holds for every test quantity f if q is the posterior, as z* is then one more draw of it.
    Coordinates see their marginals alone; their products see correlations, and log p(x, z)
    sees a guide that ignores the data.

    Variational SBC (Yao et al., 2018) fits a new q to each simulated data set and asks of the
    ranks of global parameters no more than symmetry. Here one q serves all data, and all of
    its uniformity is asked for.

    Args:
        model: p(z) p(x | z).
        guide: q(z | x).
        batch: gives the dtype of `x` and what else the model is called with, such as labels;
            its rows are repeated as often as it takes.
        replicates: `N`, simulated data, at least 50.
        draws: `S` of the guide for each, at least 20.
        chunk: draws times rows evaluated at once, which bounds the memory.
        seed: of the simulations and draws; torch's random state is left as it was.

    Returns:
        `Calibration`.

    Warning:
        It speaks of data that the model generates, on average: faults that cancel over data
        are not seen, and real data may lie where the guide is worse.

    Raises:
        ValueError: a bad pair or batch, too few replicates or draws.

    References:
        Sean Talts, Michael Betancourt, Daniel Simpson, Aki Vehtari, Andrew Gelman. *Validating
        Bayesian Inference Algorithms with Simulation-Based Calibration*, 2018.
        Martin Modrák, Angie H. Moon, Shinyoung Kim, Paul-Christian Bürkner, Niko Huurre,
        Kateřina Faltejsková, Andrew Gelman, Aki Vehtari. *Simulation-Based Calibration Checking
        for Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity*, 2023.
        Yuling Yao, Aki Vehtari, Daniel Simpson, Andrew Gelman. *Yes, but Did It Work?:
        Evaluating Variational Inference*, 2018.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> calibration = calibrate(model, guide, (torch.zeros(1, 3),), replicates=200)
        >>> calibration.names
        ('z[0]', 'z[1]', 'z[0] × z[1]', 'log p(x, z)')
        >>> calibration.pvalue.min() < 1e-3
        tensor(True)
    """
    check_pair(model, guide, batch)
    if replicates < 50 or draws < 20:
        raise ValueError(
            f"calibrate wants replicates >= 50 and draws >= 20; got {replicates}, {draws}"
        )
    parts = _repeated(batch, replicates, max(1, chunk // draws))
    with preserved_rng(seed), evaluating(model, guide), torch.no_grad():
        columns = [
            {name: _ranks(value).cpu() for name, value in values.items()}
            for values in (_test_quantities(model, guide, part, draws) for part in parts)
        ]
        names = tuple(columns[0])
        ranks = torch.stack([torch.cat([part[name] for part in columns]) for name in names], -1)
        spread = torch.rand(ranks.shape, dtype=torch.float64)
    return Calibration(names, ranks, draws, (ranks + spread) / (draws + 1))


def _repeated(batch: Batch, count: int, rows: int) -> Iterator[Batch]:
    """`count` rows of the batch, again from the first after the last, some at once."""
    index = torch.arange(count) % len(batch[0])
    for some in index.split(rows):
        yield tuple(part[some] for part in batch)


def _test_quantities(model: Model, guide: Guide, batch: Batch, draws: int) -> dict[str, Tensor]:
    """Each `(1 + S, B)`: of what generated the data, then of the guide's draws."""
    truth, simulated = simulate(model, batch)
    drawn = log_densities(model, guide, simulated, draws)
    sites = {
        site: torch.cat([value.unsqueeze(0), drawn.latents[site]]) for site, value in truth.items()
    }
    scalars = side_by_side(sites, 2).double().unbind(-1)
    values = dict(zip(unit_names(sites, 2), scalars, strict=True))
    if len(values) <= 4:
        centred = {name: value - value.mean(0) for name, value in values.items()}
        values |= {f"{a} × {b}": centred[a] * centred[b] for a, b in combinations(centred, 2)}
    conditioned = poutine.trace(poutine.condition(model, data=truth)).get_trace(*simulated)
    own = log_prob_of(all_sites(conditioned), (1, len(batch[0])))
    return values | {"log p(x, z)": torch.cat([own, drawn.likelihood + drawn.prior])}


def _ranks(values: Tensor) -> Tensor:
    """Of the first of `(1 + S, B)` among the others, ties at random."""
    truth, drawn = values[0], values[1:]
    ties = (drawn == truth).sum(0)
    lucky = torch.rand(ties.shape, device=ties.device) * (ties + 1)
    return (drawn < truth).sum(0) + lucky.long()


def _uniform_ecdf_differences(count: int) -> Tensor:
    """ECDF less diagonal of `count` uniform numbers on `GRID`, 4,000 times, `(4000, 99)`."""
    generator = torch.Generator().manual_seed(0)
    below, last, curves = torch.zeros(4000, dtype=torch.float64), 0.0, []
    for t in GRID.tolist():
        chance = torch.full_like(below, (t - last) / (1 - last))
        below, last = below + torch.binomial(count - below, chance, generator=generator), t
        curves.append(below / count - t)
    return torch.stack(curves, -1)


def _word(row: dict[Any, Any], count: int, limit: float) -> str:
    if row["pvalue"] >= limit:
        return "calibrated"
    slope = row["shift"] * math.sqrt(count)
    bend = (1 / row["width"] - 1) * math.sqrt(2 * count)
    if max(abs(slope), abs(bend)) < 3:
        return "misshapen"
    if abs(slope) >= abs(bend):
        return "biased high" if slope > 0 else "biased low"
    return "too narrow" if bend > 0 else "too wide"
