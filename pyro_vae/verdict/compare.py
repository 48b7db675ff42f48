"""The verdict: a guide against the posterior, datum by datum, and MCMC against it beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae import posterior
from pyro_vae.checks import check_pair
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import (
    Batch,
    Guide,
    Model,
    center,
    evaluating,
    observation,
    preserved_rng,
    side_by_side,
)
from pyro_vae.posterior import Annealed, Draws, Quadrature
from pyro_vae.tables import Tabular, by_datum
from pyro_vae.verdict.bounds import Bounds, bounds
from pyro_vae.verdict.distances import distances
from pyro_vae.verdict.family import family_of
from pyro_vae.verdict.gaps import SWEEPS, Gaps, gaps
from pyro_vae.verdict.heads import HEADS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure, SubFigure


@dataclass(frozen=True)
class Limits:
    """Where a guide stops being trusted for a datum.

    Attributes:
        mean: error of the mean, in posterior sd, any coordinate.
        sd: relative error of the sd, any coordinate.
        kl: KL(q‖p(z|x)), nats; 0.2 is what a Gaussian shifted by 0.63 sd has.
        khat: Pareto index of the importance weights (Vehtari et al., 2024).
        evidence: error of log p(x), nats; above it nothing is judged.
    """

    mean: float = 0.5
    sd: float = 0.3
    kl: float = 0.2
    khat: float = 0.7
    evidence: float = 0.1


@dataclass(frozen=True, repr=False)
class Verdict(Tabular):
    """A guide held against the posterior of `B` data, and MCMC beside it.

    Attributes:
        rung: what stands for the truth, and why.
        exact: quadrature, up to three latent dimensions; `None` above.
        annealed: log p(x) by annealed importance sampling above; `None` below.
        mcmc: batched Hamiltonian Monte Carlo of all data.
        bounds: draws of the guide and what their weights say.
        gaps: KL split into family and encoder; `None` if not asked for, or if the guide's
            family cannot be read.
        limits: what `table` trusts.
    """

    rung: str
    exact: Quadrature | None
    annealed: Annealed | None
    mcmc: Draws
    bounds: Bounds
    gaps: Gaps | None
    limits: Limits
    _model: Model
    _batch: Batch

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a datum; nats, and errors in units of the posterior sd.

        `kl` is log p(x) − ELBO = KL(q‖p(z|x)), with its standard error; `approximation` and
        `amortization` are its shares due to the guide's family and to its encoder.
        `_mean_error` and `_sd_error` are those of the coordinate where the error is largest,
        signed, of guide and chains against the exact posterior; without one, of the guide
        against the chains, and of the second half of the chains against the first.
        `mcmc_mcse` is the standard error that the chains' mean admits to. `why` is empty where
        the guide is trusted; where the truth itself is in doubt it says so first.
        """
        log_evidence, error = self._evidence()
        guide_mean, guide_sd = _errors(_moments(self.bounds.draws), self._reference())
        mcmc_mean, mcmc_sd = self._witness()
        columns: dict[str, Tensor] = {
            "log_evidence": log_evidence,
            "log_evidence_se": error,
            "elbo": self.bounds.elbo,
            "kl": log_evidence - self.bounds.elbo,
            "kl_se": torch.hypot(self.bounds.elbo_se, error),
        }
        if self.gaps is not None:
            columns["approximation"] = self.gaps.approximation
            columns["amortization"] = self.gaps.amortization
        columns |= {
            "khat": self.bounds.khat,
            "guide_mean_error": guide_mean,
            "guide_sd_error": guide_sd,
            "mcmc_mean_error": mcmc_mean,
            "mcmc_sd_error": mcmc_sd,
            "mcmc_mcse": (side_by_side(self.mcmc.mcse, 1) / self._reference()[1]).amax(-1),
            "rhat": side_by_side(self.mcmc.rhat, 1).amax(-1),
            "ess": side_by_side(self.mcmc.ess, 1).amin(-1),
        }
        table = by_datum(columns)
        rows = zip(table.to_dict("records"), self.mcmc.trouble, strict=True)
        doubtful = self.exact is None  # then the guide is measured against the chains
        table["why"] = [
            _why(row, self.limits, trouble if doubtful else "") for row, trouble in rows
        ]
        table["mcmc_trouble"] = self.mcmc.trouble
        return table

    @cached_property
    def distances(self) -> pd.DataFrame:
        """Distances of guide and chains, a row a datum, each beside its own zero.

        The columns of `pyro_vae.verdict.distances.distances`: `_zero` is the same figure for
        one half of the chains against the other.
        """
        chains = side_by_side(self.mcmc.sites, 3)
        points = min(200, len(self.bounds.draws.flat), chains.shape[1])
        found = distances(self.bounds.draws.flat, chains, points=points)
        return by_datum(found)

    def summary(self) -> pd.DataFrame:
        """Pooled over data: a row for the guide, and one for MCMC.

        `log_evidence`, `elbo`, `kl` and its shares are means over data; errors are root mean
        squares; `khat` and `rhat` are the largest, `ess` the smallest; `trusted` is a share of
        the data. Data whose chains did not converge stay out of the row of MCMC, and are
        missing from its count.
        """
        import pandas as pd

        table = self.table
        sound = table[table["mcmc_trouble"] == ""]
        means = ["log_evidence", "elbo", "kl", "approximation", "amortization"]
        guide = {"data": len(table)} | {
            name: table[name].mean() for name in means if name in table
        }
        guide |= {
            "mean_error": _rms(table["guide_mean_error"]),
            "sd_error": _rms(table["guide_sd_error"]),
            "khat": table["khat"].max(skipna=False),
            "trusted": (table["why"] == "").mean(),
        }
        mcmc = {
            "data": len(sound),
            "log_evidence": sound["log_evidence"].mean(),
            "mean_error": _rms(sound["mcmc_mean_error"]),
            "sd_error": _rms(sound["mcmc_sd_error"]),
            "rhat": sound["rhat"].max(),
            "ess": sound["ess"].min(),
        }
        return pd.DataFrame.from_dict({"guide": guide, "MCMC": mcmc}, orient="index")

    def plot(
        self, image_shape: tuple[int, int] | None = None, *,
        data: Sequence[int] | None = None, figure: Figure | SubFigure | None = None,
    ) -> Figure | SubFigure:  # fmt: skip
        """A panel for each of some data.

        Args:
            image_shape: `(height, width)`, to show data and reconstructions above.
            data: which rows; the first six by default.
            figure: an empty figure to fill; a new one by default.

        Returns:
            The figure.
        """
        from matplotlib.figure import Figure

        from pyro_vae import plots

        table = self.table
        data = list(range(min(6, len(table))) if data is None else data)
        if figure is None:
            size = (2.1 * len(data), 2.7 if image_shape is None else 3.7)
            figure = Figure(figsize=size, dpi=150, layout="constrained")
        rows = tuple(part[data] for part in self._batch)
        latents = {
            name: value[0, :, data].mean(0) for name, value in self.bounds.draws.sites.items()
        }
        means = center(observation(self._model, latents, rows))
        titles = [f"KL {table['kl'][b]:.2f} nats" + _lines(table["why"][b]) for b in data]
        plots.comparison(
            figure, self.exact, self.bounds.draws, self.mcmc, data, titles,
            pictures=list(zip(rows[0], means, strict=True)), shape=image_shape,
        )  # fmt: skip
        return figure

    def save(self, folder: str | Path) -> None:
        """Write tables as CSV and draws as NetCDF.

        `table.csv`, `summary.csv`, `distances.csv`, `guide.nc`, `mcmc.nc`, and `exact.nc` where
        there is quadrature.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("table", "summary", "distances"):
            table = self.summary() if name == "summary" else getattr(self, name)
            table.to_csv(folder / f"{name}.csv", float_format="%.6g")
        self.bounds.draws.save(folder / "guide.nc")
        self.mcmc.save(folder / "mcmc.nc")
        if self.exact is not None:
            self.exact.sample(1000).save(folder / "exact.nc")
        else:
            (folder / "exact.nc").unlink(missing_ok=True)  # of an earlier verdict

    def _told(self) -> Sequence[str | pd.DataFrame]:
        table = self.table.drop(columns="mcmc_trouble").rename(
            columns={name: head for name, (head, _) in HEADS.items()}
        )
        return [table.round(2), f"{self.rung}; pooled:", self.summary()]

    def _evidence(self) -> tuple[Tensor, Tensor]:
        """Log p(x) and its error, nats, `(B,)` each."""
        if self.exact is not None:
            return self.exact.log_evidence, self.exact.error
        assert self.annealed is not None
        return self.annealed.log_evidence, self.annealed.error

    def _reference(self) -> tuple[Tensor, Tensor]:
        """Mean and sd that the guide is measured against, `(B, L)` each."""
        return _moments(self.mcmc) if self.exact is None else (self.exact.mean, self.exact.sd)

    def _witness(self) -> tuple[Tensor, Tensor]:
        if self.exact is not None:
            return _errors(_moments(self.mcmc), self._reference())
        half = next(iter(self.mcmc.sites.values())).shape[1] // 2
        halves = (
            Draws({name: value[:, part] for name, value in self.mcmc.sites.items()})
            for part in (slice(half), slice(half, 2 * half))
        )
        first, second = (_moments(draws) for draws in halves)
        return _errors(second, first)


def compare(
    model: Model,
    guide: Guide,
    batch: Batch,
    *,
    draws: int = 4000,
    mcmc_draws: int = 1000,
    chains: int = 4,
    search: int = 400,
    limits: Limits = Limits(),
    seed: int = 0,
    progress: bool = True,
) -> Verdict:
    r"""Hold a guide against the posterior of each datum, and MCMC against it beside.

    The truth is the highest rung of the ladder that fits: quadrature up to three latent
    dimensions, which is exact; above, annealed importance sampling for log p(x) and batched
    Hamiltonian Monte Carlo for the moments, each with its own error. Chains are run in either
    case, so that each error of the guide stands beside that of a sampler.

    Args:
        model: p(z) p(x | z).
        guide: q(z | x).
        batch: tensors of `B` rows.
        draws: of the guide, for each datum.
        mcmc_draws: kept from each chain.
        chains: of Hamiltonian Monte Carlo, for each datum.
        search: steps of the search for the best member of the guide's family, which says
            whether the family or the encoder is at fault; 0 for none.
        limits: where trust ends.
        seed: of all draws; torch's random state is left as it was.
        progress: show bars.

    Returns:
        `Verdict`.

    Raises:
        ValueError: a bad pair or batch, or counts below their minimum.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> verdict = compare(model, guide, (torch.ones(5, 3),), search=0, progress=False)
        >>> bool((verdict.table["kl"] > 0).all())
        True
    """
    check_pair(model, guide, batch)
    if draws < 25 or mcmc_draws < 4 or chains < 2 or search < 0 or 0 < search < SWEEPS:
        raise ValueError(
            f"compare wants draws >= 25, mcmc_draws >= 4, chains >= 2, search 0 or >= {SWEEPS}; "
            f"got {draws}, {mcmc_draws}, {chains}, {search}"
        )
    size = LogJoint(model, batch).size
    exact = annealed = None
    if size <= 3:
        exact = posterior.quadrature(model, batch, seed=seed)
        rung = f"truth: quadrature, as there are {size} latent dimensions"
    else:
        annealed = posterior.annealed(
            model, batch, guide=guide, particles=256, seed=seed, progress=progress
        )
        rung = (
            f"truth: annealed importance sampling and Hamiltonian Monte Carlo, as {size} latent "
            "dimensions are too many for quadrature"
        )
    mcmc = posterior.hmc(
        model, batch, guide=guide, draws=mcmc_draws, chains=chains, seed=seed, progress=progress
    )
    weighed = bounds(model, guide, batch, draws=draws, keep=draws, seed=seed + 1)
    verdict = Verdict(rung, exact, annealed, mcmc, weighed, None, limits, model, batch)
    log_evidence, error = verdict._evidence()
    if search == 0 or not torch.isfinite(log_evidence).all() or not _readable(guide, batch):
        return verdict
    split = gaps(
        model, guide, batch, log_evidence=log_evidence, log_evidence_se=error, steps=search,
        seed=seed, progress=progress,
    )  # fmt: skip
    return replace(verdict, gaps=split)


def _readable(guide: Guide, batch: Batch) -> bool:
    """Whether the family of the guide can be read off it."""
    try:
        with preserved_rng(0), evaluating(guide), torch.no_grad():
            family_of(guide, batch)
    except ValueError:
        return False
    return True


def _moments(draws: Draws) -> tuple[Tensor, Tensor]:
    return draws.mean.double(), draws.sd.double()


def _errors(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Signed errors of mean and sd in posterior sd, at the worst coordinate; `(B,)` each."""
    (mean, sd), (true_mean, true_sd) = found, truth
    return _worst((mean - true_mean) / true_sd), _worst(sd / true_sd - 1)


def _worst(errors: Tensor) -> Tensor:
    return errors.gather(-1, errors.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _why(row: dict[Any, Any], limits: Limits, trouble: str) -> str:
    measured = ("kl", "guide_mean_error", "guide_sd_error")
    high = row["kl"] - 2 * row["kl_se"] > limits.kl
    to_family = row.get("approximation", math.nan) > row.get("amortization", math.nan)
    reasons = {
        "not finite": not all(math.isfinite(row[name]) for name in measured),
        f"reference in doubt ({trouble})": trouble != "",
        "mean off": abs(row["guide_mean_error"]) > limits.mean,
        "too narrow": row["guide_sd_error"] < -limits.sd,
        "too wide": row["guide_sd_error"] > limits.sd,
        "high KL": high,
        "family too small": high and to_family,
        "encoder off": high and "amortization" in row and not to_family,
        "heavy weights": not row["khat"] <= limits.khat,
        "evidence uncertain": not row["log_evidence_se"] <= limits.evidence,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def _lines(why: str) -> str:
    reasons = why.split(", ") if why else ["trusted"]
    pairs = [", ".join(reasons[i : i + 2]) for i in range(0, len(reasons), 2)]
    return "\n" + "\n".join(pairs)


def _rms(errors: pd.Series[float]) -> float:
    return float((errors**2).mean() ** 0.5)
