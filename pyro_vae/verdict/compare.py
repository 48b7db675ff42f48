"""The verdict: a guide against the exact posterior, and MCMC against it beside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae import posterior
from pyro_vae.checks import check_pair
from pyro_vae.pair import Batch, Guide, Model, observation
from pyro_vae.posterior import Draws, Quadrature
from pyro_vae.verdict.bounds import Bounds, bounds

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure, SubFigure


SHORT = {
    "log_evidence": "log p(x)",
    "exact_error": "error",
    "elbo": "ELBO",
    "kl": "KL",
    "kl_se": "±",
    "khat": "k-hat",
    "guide_mean_error": "guide mean",
    "guide_sd_error": "guide sd",
    "nuts_mean_error": "NUTS mean",
    "nuts_sd_error": "NUTS sd",
    "nuts_mcse": "±MCSE",
    "rhat": "R-hat",
    "ess": "ESS",
}
"""Column heads of the printed table; errors are in posterior sd."""


@dataclass(frozen=True)
class Limits:
    """Where a guide stops being trusted for a datum.

    Attributes:
        mean: error of the mean, in posterior sd, any coordinate.
        sd: relative error of the sd, any coordinate.
        kl: KL(q‖p(z|x)), nats; 0.2 is what a Gaussian shifted by 0.63 sd has.
        khat: Pareto index of the importance weights (Vehtari et al., 2024).
        exact: error that quadrature admits to, nats; above it nothing is judged.
    """

    mean: float = 0.5
    sd: float = 0.3
    kl: float = 0.2
    khat: float = 0.7
    exact: float = 0.01


@dataclass(frozen=True, repr=False)
class Verdict:
    """A guide held against the exact posterior of `B` data, and NUTS on some of them.

    Attributes:
        exact: quadrature of all data.
        bounds: draws of the guide and their weights, all data.
        mcmc: NUTS draws of the first data, or `None`.
        limits: what `table` trusts.
    """

    exact: Quadrature
    bounds: Bounds
    mcmc: Draws | None
    limits: Limits
    _model: Model
    _batch: Batch

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a datum; nats, and errors in units of the exact posterior sd.

        `kl` is log p(x) − ELBO = KL(q‖p(z|x)), with its standard error. `_mean_error` and
        `_sd_error` are those of the coordinate where the error is largest, signed;
        `exact_error` is what quadrature admits to; for NUTS
        `nuts_mcse` is the standard error that its mean admits to. `why` is empty where the
        guide is trusted.
        """
        import pandas as pd

        guide_mean, guide_sd = _errors(self.bounds.draws, self.exact)
        kl = self.exact.log_evidence - self.bounds.elbo
        columns: dict[str, Any] = {
            "log_evidence": self.exact.log_evidence,
            "exact_error": self.exact.error,
            "elbo": self.bounds.elbo,
            "kl": kl,
            "kl_se": self.bounds.elbo_se,
            "khat": self.bounds.khat,
            "guide_mean_error": guide_mean,
            "guide_sd_error": guide_sd,
        }
        table = pd.DataFrame({name: value.numpy() for name, value in columns.items()})
        table.index.name = "datum"
        for name, value in self._mcmc_columns().items():
            table[name] = pd.Series(value.numpy())
        table["why"] = [_why(row, self.limits) for row in table.to_dict("records")]
        return table

    def summary(self) -> pd.DataFrame:
        """Pooled over data: a row for the guide, and one for NUTS on the data it sampled.

        `log_evidence`, `elbo`, `kl` are means over data; errors are root mean squares; `khat`
        and `rhat` are the largest, `ess` the smallest; `trusted` is a share of the data.
        """
        import pandas as pd

        table = self.table
        rows = {
            "guide": {
                "data": len(table),
                "log_evidence": table["log_evidence"].mean(),
                "elbo": table["elbo"].mean(),
                "kl": table["kl"].mean(),
                "mean_error": _rms(table["guide_mean_error"]),
                "sd_error": _rms(table["guide_sd_error"]),
                "khat": table["khat"].max(skipna=False),
                "trusted": (table["why"] == "").mean(),
            }
        }
        if self.mcmc is not None:
            sampled = table.iloc[: self.mcmc.flat.shape[1]]
            rows["NUTS"] = {
                "data": len(sampled),
                "log_evidence": sampled["log_evidence"].mean(),
                "mean_error": _rms(sampled["nuts_mean_error"]),
                "sd_error": _rms(sampled["nuts_sd_error"]),
                "rhat": sampled["rhat"].max(skipna=False),
                "ess": sampled["ess"].min(skipna=False),
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def plot(
        self, image_shape: tuple[int, int] | None = None, *,
        figure: Figure | SubFigure | None = None,
    ) -> Figure | SubFigure:  # fmt: skip
        """A panel for each datum that NUTS sampled, or for the first six.

        Args:
            image_shape: `(height, width)`, to show data and reconstructions above.
            figure: an empty figure to fill; a new one by default.

        Returns:
            The figure.
        """
        from matplotlib.figure import Figure

        from pyro_vae import plots

        count = min(6, len(self.table)) if self.mcmc is None else self.mcmc.flat.shape[1]
        if figure is None:
            size = (2.1 * count, 2.7 if image_shape is None else 3.7)
            figure = Figure(figsize=size, dpi=150, layout="constrained")
        rows = tuple(part[:count] for part in self._batch)
        center = {
            name: value[0, :, :count].mean(0) for name, value in self.bounds.draws.sites.items()
        }
        means = observation(self._model, center, rows).mean
        table = self.table
        titles = [f"KL {table['kl'][b]:.2f} nats" + _lines(table["why"][b]) for b in range(count)]
        plots.comparison(
            figure, self.exact, self.bounds.draws, self.mcmc, titles,
            pictures=list(zip(rows[0], means, strict=True)), shape=image_shape,
        )  # fmt: skip
        return figure

    def save(self, folder: str | Path) -> None:
        """Write `table.csv`, `summary.csv`, `guide.nc`, `exact.nc`, and `nuts.nc` if sampled.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.table.to_csv(folder / "table.csv", float_format="%.6g")
        self.summary().to_csv(folder / "summary.csv", float_format="%.6g")
        self.bounds.draws.save(folder / "guide.nc")
        self.exact.sample(1000).save(folder / "exact.nc")
        if self.mcmc is not None:
            self.mcmc.save(folder / "nuts.nc")
        else:
            (folder / "nuts.nc").unlink(missing_ok=True)  # of an earlier verdict

    def __repr__(self) -> str:
        import pandas as pd

        with pd.option_context("display.width", 120, "display.max_columns", None):
            table = self.table.rename(columns=SHORT)
            return (
                f"{table.to_string(float_format='{:.2f}'.format, na_rep='')}\n\npooled\n"
                f"{self.summary().to_string(float_format='{:.2f}'.format, na_rep='')}"
            )

    def _mcmc_columns(self) -> dict[str, Tensor]:
        if self.mcmc is None:
            return {}
        mean_error, sd_error = _errors(self.mcmc, self.exact)
        mcse = torch.cat([_scalars(value) for value in self.mcmc.mcse.values()], -1)
        rhat = torch.cat([_scalars(value) for value in self.mcmc.rhat.values()], -1)
        ess = torch.cat([_scalars(value) for value in self.mcmc.ess.values()], -1)
        return {
            "nuts_mean_error": mean_error,
            "nuts_sd_error": sd_error,
            "nuts_mcse": (mcse / self.exact.sd[: len(mcse)]).max(-1).values,
            "rhat": rhat.max(-1).values,
            "ess": ess.min(-1).values,
        }


def compare(
    model: Model,
    guide: Guide,
    batch: Batch,
    *,
    draws: int = 4000,
    witnesses: int = 6,
    chains: int = 2,
    nuts_draws: int = 250,
    nuts_warmup: int = 150,
    limits: Limits = Limits(),
    seed: int = 0,
    progress: bool = True,
) -> Verdict:
    """Hold a guide against the exact posterior, datum by datum.

    Quadrature gives log p(x), mean and covariance of p(z | x); draws of the guide give ELBO,
    moments and k-hat; Pyro's NUTS samples the first data, so that the guide's errors stand
    beside those of a sampler that knows nothing of the guide. A guide is not trusted for a
    datum if one of `limits` is passed, a KL only by more than two standard errors.

    Args:
        model: p(z) p(x | z) with at most 3 latent dimensions a datum.
        guide: q(z | x).
        batch: tensors of `B` rows.
        draws: of the guide, for each datum.
        witnesses: data that NUTS samples, from the first on; 0 for none. Seconds each.
        chains: of NUTS.
        nuts_draws: kept from each chain.
        nuts_warmup: steps of adaptation before them.
        limits: where trust ends.
        seed: of all draws; torch's random state is left as it was.
        progress: show a bar.

    Returns:
        `Verdict`.

    Raises:
        ValueError: a bad pair or batch, or more than 3 latent dimensions.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> verdict = compare(model, guide, (torch.ones(5, 3),), witnesses=0, progress=False)
        >>> bool((verdict.table["kl"] > 0).all())
        True
    """
    check_pair(model, guide, batch)
    if draws < 25 or witnesses < 0 or nuts_draws < 4 or nuts_warmup < 1 or chains < 1:
        raise ValueError(
            "compare wants draws >= 25, witnesses >= 0, chains >= 1, nuts_draws >= 4, nuts_warmup "
            f">= 1; got {draws}, {witnesses}, {chains}, {nuts_draws}, {nuts_warmup}"
        )
    exact = posterior.quadrature(model, batch, seed=seed)
    weighed = bounds(model, guide, batch, draws=draws, seed=seed)
    sampled = None
    if witnesses > 0:
        first = tuple(part[:witnesses] for part in batch)
        sampled = posterior.nuts(
            model, first, draws=nuts_draws, warmup=nuts_warmup, chains=chains, seed=seed,
            progress=progress,
        )  # fmt: skip
    return Verdict(exact, weighed, sampled, limits, model, batch)


def _errors(draws: Draws, exact: Quadrature) -> tuple[Tensor, Tensor]:
    """Signed errors of mean and sd in posterior sd, at the worst coordinate; `(B,)` each."""
    mean, sd = draws.mean.double(), draws.sd.double()
    true_mean, true_sd = exact.mean[: len(mean)], exact.sd[: len(mean)]
    return _worst((mean - true_mean) / true_sd), _worst(sd / true_sd - 1)


def _worst(errors: Tensor) -> Tensor:
    return errors.gather(-1, errors.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _why(row: dict[Any, Any], limits: Limits) -> str:
    measured = ("kl", "guide_mean_error", "guide_sd_error")
    reasons = {
        "not finite": not all(math.isfinite(row[name]) for name in measured),
        "mean off": abs(row["guide_mean_error"]) > limits.mean,
        "too narrow": row["guide_sd_error"] < -limits.sd,
        "too wide": row["guide_sd_error"] > limits.sd,
        "high KL": row["kl"] - 2 * row["kl_se"] > limits.kl,
        "heavy weights": not row["khat"] <= limits.khat,
        "exact value uncertain": not row["exact_error"] <= limits.exact,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def _lines(why: str) -> str:
    reasons = why.split(", ") if why else ["trusted"]
    pairs = [", ".join(reasons[i : i + 2]) for i in range(0, len(reasons), 2)]
    return "\n" + "\n".join(pairs)


def _scalars(value: Tensor) -> Tensor:
    return value.reshape(len(value), -1)


def _rms(errors: pd.Series[float]) -> float:
    return float((errors**2).mean() ** 0.5)
