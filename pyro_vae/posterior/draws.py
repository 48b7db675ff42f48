"""Draws from p(z | x), whatever drew them, and their way into ArviZ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.posterior import convergence


@dataclass(frozen=True)
class Draws:
    """Posterior draws of `B` data.

    Attributes:
        sites: each latent site, `(C, S, B, *event)`: chains, draws, data.
        stats: sampler statistics, each `(C, S, B)`, named as ArviZ names them.
        method: what drew them.

    Example:
        >>> draws = Draws({"z": torch.randn(4, 100, 3, 2)}, method="example")
        >>> draws.rhat["z"].shape, draws.flat.shape
        (torch.Size([3, 2]), torch.Size([400, 3, 2]))
    """

    sites: Mapping[str, Tensor]
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    method: str = ""

    def __getitem__(self, site: str) -> Tensor:
        return self.sites[site]

    @property
    def flat(self) -> Tensor:
        """All chains and sites together: `(C S, B, L)`."""
        parts = [value.flatten(0, 1) for value in self.sites.values()]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], dim=-1)

    @property
    def mean(self) -> Tensor:
        """Posterior mean, `(B, L)`."""
        return self.flat.mean(0)

    @property
    def sd(self) -> Tensor:
        """Posterior standard deviation, `(B, L)`."""
        return self.flat.std(0)

    @cached_property
    def rhat(self) -> dict[str, Tensor]:
        """Rank-normalised split R-hat of each scalar, `(B, *event)` by site."""
        return {name: convergence.rhat(value) for name, value in self.sites.items()}

    @cached_property
    def ess(self) -> dict[str, Tensor]:
        """Bulk effective sample size of each scalar, `(B, *event)` by site."""
        return {name: convergence.ess(value) for name, value in self.sites.items()}

    @cached_property
    def mcse(self) -> dict[str, Tensor]:
        """Monte Carlo standard error of each mean, `(B, *event)` by site."""
        return {name: convergence.mcse_mean(value) for name, value in self.sites.items()}

    def to_arviz(self) -> Any:
        """An `InferenceData` (ArviZ 0.23) or a `DataTree` (ArviZ 1): the same groups and dims.

        Group `posterior` has dims `(chain, draw, datum, latent)`, group `sample_stats`
        `(chain, draw, datum)`. Needs at least one draw; works for draws of a guide as well.
        """
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

    def _dims(self, site: str) -> list[str]:
        event = self.sites[site].dim() - 3
        latent = "latent" if len(self.sites) == 1 else f"{site}_latent"
        return ["datum", *([latent] if event == 1 else [f"{latent}_{i}" for i in range(event)])]

    def save(self, path: str | Path) -> None:
        """Write NetCDF, which either major of ArviZ opens: `arviz.from_netcdf(path)`."""
        self.to_arviz().to_netcdf(str(path))
