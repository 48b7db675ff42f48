"""What a pair has learned as a whole, and how it is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.tables import Tabular

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class Estimate(NamedTuple):
    """A Monte Carlo figure and its standard error, both of one shape, float64."""

    value: Tensor
    se: Tensor


@dataclass(frozen=True)
class Surgery:
    r"""Where the rate goes, in nats per datum; scalars.

    $$R = I_q(n; z) + \mathrm{KL}(\bar q\|p), \qquad
      \mathrm{KL}(\bar q\|p) = \mathrm{TC}(\bar q) + \sum_d \mathrm{KL}(\bar q(z_d)\|p(z_d))$$

    Attributes:
        mutual_information: $I_q(n; z)$ of the index of a row and its code, in [0, log N].
        marginal_kl: $\mathrm{KL}(\bar q\|p)$, what a better prior would save; `None` where
            the prior differs from row to row.
        total_correlation: $\mathrm{KL}(\bar q\|\prod_d \bar q(z_d))$; `None` unless guide and
            prior have one latent site that is a product over its scalars.
        dimension_kl: $\sum_d \mathrm{KL}(\bar q(z_d)\|p(z_d))$, defined where both are.
    """

    mutual_information: Estimate
    marginal_kl: Estimate | None
    total_correlation: Estimate | None
    dimension_kl: Estimate | None


@dataclass(frozen=True)
class Units:
    r"""The latent scalars, all sites side by side, `(L,)` each.

    Attributes:
        names: such as `"z[0]"`.
        variance: $\mathrm{Var}_x(\mathbb E_q[z_d \mid x])$ over the rows.
        kl: mean KL(q(z_d | x)‖p(z_d)), nats; `None` unless guide and prior are products.
        marginal_kl: $\mathrm{KL}(\bar q(z_d)\|p(z_d))$, nats, defined where `dimension_kl` is.
        mean: of the aggregate posterior.
        sd: of the aggregate posterior.
        prior_mean: of draws from the prior.
        prior_sd: of draws from the prior.
        threshold: what `active` and `collapsed` compare with.
    """

    names: tuple[str, ...]
    variance: Estimate
    kl: Estimate | None
    marginal_kl: Estimate | None
    mean: Estimate
    sd: Estimate
    prior_mean: Estimate
    prior_sd: Estimate
    threshold: float

    @property
    def active(self) -> Tensor:
        """Where `variance` is above the threshold by more than two standard errors."""
        return self.variance.value - 2 * self.variance.se > self.threshold

    @property
    def collapsed(self) -> Tensor | None:
        """Inactive, with a KL within two standard errors of the threshold; `None` without KL.

        A unit that is neither has a posterior that differs from the prior, alike for all rows.
        """
        if self.kl is None:
            return None
        return ~self.active & (self.kl.value - 2 * self.kl.se < self.threshold)


@dataclass(frozen=True)
class Holes:
    """Where the decoder is asked for what it has not learned.

    Attributes:
        thin_mass: share of the prior's mass where the aggregate posterior is thin; `None`
            where the prior differs from row to row.
        jumps: on each line between two prior draws, the decoder mean's largest speed per unit
            of z over the median speed of all lines; `None` where p(x | z) has no mean. A few
            for a smooth decoder whatever the step, inf for a step function.
    """

    thin_mass: Estimate | None
    jumps: Tensor | None


@dataclass(frozen=True, repr=False)
class Diagnosis(Tabular):
    """What `diagnose` found, in nats per datum over all `N` rows.

    Attributes:
        rate: R, the mean of KL(q(z | x)‖p(z)).
        distortion: D, minus the mean of E_q log p(x | z).
        elbo: −(R + D).
        surgery: what the rate consists of.
        units: each latent scalar.
        holes: of the prior under the aggregate posterior, and of the decoder.
    """

    rate: Estimate
    distortion: Estimate
    elbo: Estimate
    surgery: Surgery
    units: Units
    holes: Holes

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a latent scalar; columns of what is not defined are left out."""
        import pandas as pd

        units = self.units
        columns: dict[str, Any] = {}
        for name in ("variance", "kl", "marginal_kl", "mean", "sd", "prior_mean", "prior_sd"):
            if (estimate := getattr(units, name)) is not None:
                columns[name], columns[f"{name}_se"] = (part.numpy() for part in estimate)
        columns["active"] = units.active.numpy()
        if units.collapsed is not None:
            columns["collapsed"] = units.collapsed.numpy()
        return pd.DataFrame(columns, index=pd.Index(units.names, name="unit"))

    def summary(self) -> pd.DataFrame:
        """A row a figure of the whole: `value` and `se`, both missing where not defined.

        The `jumps` are quantiles over lines; their largest has no standard error.
        """
        import pandas as pd

        jumps = self.holes.jumps
        figures = {
            "rate": self.rate,
            "distortion": self.distortion,
            "elbo": self.elbo,
            **vars(self.surgery),
            "thin_mass": self.holes.thin_mass,
            "jumps_median": None if jumps is None else _quantile(jumps, 0.5),
            "jumps_90%": None if jumps is None else _quantile(jumps, 0.9),
        }
        rows = {
            name: [math.nan] * 2 if figure is None else [part.item() for part in figure]
            for name, figure in figures.items()
        }
        rows["jumps_max"] = [math.nan if jumps is None else jumps.max().item(), math.nan]
        rows["active_units"] = [self.units.active.sum().item(), math.nan]
        return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "se"])

    def plot(self, axes: Axes | None = None) -> Axes:
        """What each latent unit carries: the variance over rows of its posterior mean.

        Args:
            axes: where to draw; new ones by default.

        Returns:
            The axes.
        """
        from pyro_vae import plots

        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(6, 3), dpi=150, layout="constrained").add_subplot()
        variance = self.units.variance
        return plots.units(
            axes, self.units.names, variance.value, variance.se, self.units.threshold
        )

    def _told(self) -> Sequence[str | pd.DataFrame]:
        return [self.summary(), self.table]


def _quantile(values: Tensor, share: float) -> Estimate:
    """A quantile, and half the distance between those one binomial error to either side."""
    error = math.sqrt(share * (1 - share) / len(values))
    around = torch.tensor([share - error, share, share + error]).clamp(0, 1).to(values)
    low, middle, high = values.quantile(around, interpolation="higher")
    return Estimate(middle, (high - low) / 2)
