"""Draws from p(z | x), whatever drew them, and their way into ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.pair import side_by_side, unit_names
from pyro_vae.posterior import convergence
from pyro_vae.tables import Tabular

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 8
"""Data whose draws are summed up where they are printed."""


@dataclass(frozen=True, repr=False)
class Draws(Tabular):
    """Posterior draws of `B` data.

    Those of a guide are independent: R-hat and ESS then say nothing of whether they are right.

    Attributes:
        sites: each latent site, `(C, S, B, *event)`: chains, draws, data.
        stats: sampler statistics, each `(C, S, B)`, named as ArviZ names them.
        method: what drew them.
        figures: what the sampler settled on and spent for each datum, each `(B,)`.
        superchains: groups of chains that share their start, judged by nested R-hat.

    Example:
        >>> draws = Draws({"z": torch.randn(4, 100, 3, 2)}, method="example")
        >>> draws.rhat["z"].shape, draws.flat.shape
        (torch.Size([3, 2]), torch.Size([400, 3, 2]))
    """

    sites: Mapping[str, Tensor]
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    method: str = ""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    superchains: int | None = None

    @classmethod
    def joined(cls, parts: Sequence[Draws]) -> Draws:
        """The draws of several batches as those of one."""
        first = parts[0]

        def join(field: str, axis: int) -> dict[str, Tensor]:
            names = getattr(first, field)
            return {n: torch.cat([getattr(part, field)[n] for part in parts], axis) for n in names}

        sites, stats, figures = join("sites", 2), join("stats", 2), join("figures", 0)
        return cls(sites, stats, first.method, figures, first.superchains)

    def __getitem__(self, site: str) -> Tensor:
        return self.sites[site]

    @property
    def flat(self) -> Tensor:
        """All chains and sites together: `(C S, B, L)`."""
        return side_by_side(self.sites, 3).flatten(0, 1)

    @property
    def mean(self) -> Tensor:
        """Posterior mean, `(B, L)`."""
        return self._by_site(lambda value: value.flatten(0, 1).mean(0))

    @property
    def sd(self) -> Tensor:
        """Posterior standard deviation, `(B, L)`."""
        return self._by_site(lambda value: value.flatten(0, 1).std(0))

    @property
    def table(self) -> pd.DataFrame:
        """A row a scalar of a datum, as ArviZ summarises: moments, errors, convergence."""
        import pandas as pd

        columns = {"mean": self.mean, "sd": self.sd} | {
            figure: side_by_side(getattr(self, figure), 1)
            for figure in ("mcse", "rhat", "ess", "ess_tail")
        }
        names = unit_names(self.sites, 3)
        index = pd.MultiIndex.from_product(
            [range(len(self.mean)), names], names=["datum", "latent"]
        )
        return pd.DataFrame({n: v.flatten().numpy() for n, v in columns.items()}, index=index)

    def _told(self) -> Sequence[str | pd.DataFrame]:
        chains, draws, data = next(iter(self.sites.values())).shape[:3]
        few = Draws({name: v[:, :, :SHOWN] for name, v in self.sites.items()},
                    superchains=self.superchains)  # fmt: skip
        of = f", the first {SHOWN} of them below" if data > SHOWN else ""
        head = (
            f"Draws by {self.method or 'unknown'}: {chains} × {draws} for each of {data} data{of}"
        )
        return [head, few.table] if draws else [head]

    @cached_property
    def rhat(self) -> dict[str, Tensor]:
        """Rank-normalised R-hat of each scalar, split or nested, `(B, *event)` by site."""
        return {
            name: convergence.rhat(value, superchains=self.superchains)
            for name, value in self.sites.items()
        }

    @cached_property
    def ess(self) -> dict[str, Tensor]:
        """Bulk effective sample size of each scalar, `(B, *event)` by site."""
        return {name: convergence.ess(value) for name, value in self.sites.items()}

    @cached_property
    def ess_tail(self) -> dict[str, Tensor]:
        """Tail effective sample size of each scalar, `(B, *event)` by site."""
        return {name: convergence.ess_tail(value) for name, value in self.sites.items()}

    @cached_property
    def mcse(self) -> dict[str, Tensor]:
        """Monte Carlo standard error of each mean, `(B, *event)` by site."""
        return {name: convergence.mcse_mean(value) for name, value in self.sites.items()}

    @cached_property
    def trouble(self) -> list[str]:
        """Why the draws of a datum are not to be averaged; empty where they are.

        R-hat at most 1.01, bulk and tail ESS at least 400 (100 a chain in four), less than 1 %
        of the draws diverging, and finite. With groups of M chains each, R-hat alone is asked,
        at most √(1.02 + 1/M), as the means of so few chains differ by chance.

        References:
            Aki Vehtari, Andrew Gelman, Daniel Simpson, Bob Carpenter, Paul-Christian Bürkner.
            *Rank-Normalization, Folding, and Localization: An Improved R-hat*, 2021.
        """
        chains, _, count = next(iter(self.sites.values())).shape[:3]
        groups = self.superchains
        limit = 1.01 if groups is None else (1.02 + groups / chains) ** 0.5
        finite = self._by_site(lambda v: torch.isfinite(v).flatten(0, 1).all(0)).bool().all(1)
        still = self._by_site(lambda v: (v == v[:1, :1]).flatten(0, 1).all(0)).bool().any(1)
        reasons = {
            "no likelihood anywhere": ~finite,
            "chains never moved": finite & still,
            f"R-hat above {limit:.2f}": finite
            & ~still
            & ~(_worst(self.rhat, torch.amax) <= limit),
        }
        if self.superchains is None:
            size = torch.minimum(_worst(self.ess, torch.amin), _worst(self.ess_tail, torch.amin))
            reasons["ESS below 400"] = finite & ~still & ~(size >= 400)
        if "diverging" in self.stats:
            share = self.stats["diverging"].float().mean((0, 1))
            reasons["diverging"] = share >= 0.01
        return [
            ", ".join(reason for reason, holds in reasons.items() if holds[b])
            for b in range(count)
        ]

    def to_arviz(self) -> Any:
        """An `InferenceData` (ArviZ 0.23) or a `DataTree` (ArviZ 1): the same groups and dims.

        Group `posterior` has dims `(chain, draw, datum, latent)`, group `sample_stats`
        `(chain, draw, datum)`. Needs at least one draw; works for draws of a guide as well.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of ArviZ 0.23, of itself, once a day
            import arviz

        posterior = {name: value.detach().cpu().numpy() for name, value in self.sites.items()}
        stats = {name: value.detach().cpu().numpy() for name, value in self.stats.items()}
        groups: dict[str, Any] = {"posterior": posterior} | (
            {"sample_stats": stats} if stats else {}
        )
        dims = {name: self._dims(name) for name in self.sites} | {n: ["datum"] for n in stats}
        attributes = {"inference_library": "pyro_vae", "method": self.method}
        if int(arviz.__version__.split(".")[0]) >= 1:
            tree = arviz.from_dict(groups, dims=dims)
            tree.attrs.update(attributes)
            return tree
        return arviz.from_dict(**groups, dims=dims, attrs=attributes)

    def _by_site(self, figure: Callable[[Tensor], Tensor]) -> Tensor:
        return side_by_side({name: figure(value) for name, value in self.sites.items()}, 1)

    def _dims(self, site: str) -> list[str]:
        event = self.sites[site].dim() - 3
        latent = "latent" if len(self.sites) == 1 else f"{site}_latent"
        return ["datum", *([latent] if event == 1 else [f"{latent}_{i}" for i in range(event)])]

    def save(self, path: str | Path) -> None:
        """Write NetCDF, which either major of ArviZ opens: `arviz.from_netcdf(path)`."""
        self.to_arviz().to_netcdf(str(path))


def _worst(figures: Mapping[str, Tensor], extreme: Callable[..., Tensor]) -> Tensor:
    """The largest or smallest over all scalars of each datum, `(B,)`; NaN is the worst."""
    return extreme(side_by_side(figures, 1), dim=-1)
