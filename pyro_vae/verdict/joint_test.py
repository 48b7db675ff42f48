"""Does a Markov kernel leave the posterior as it is? Geweke's joint test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.checks import check_model, refuse
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import (
    Batch,
    Model,
    evaluating,
    observation,
    preserved_rng,
    side_by_side,
    simulate,
    unit_names,
)
from pyro_vae.tables import Tabular

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class JointTest(Tabular):
    """Whether a kernel leaves its target as it is; what `joint_test` returns.

    Attributes:
        table: a row a test function: its `mean` after the sweeps, its `prior_mean`, the `se`
            of their difference, and `z`, standard normal if the kernel is right.
    """

    table: pd.DataFrame

    @property
    def pvalue(self) -> float:
        """Of the largest |z|, with Bonferroni's correction; 0 if anything is not finite."""
        z = torch.tensor(self.table["z"].to_numpy()).abs().nan_to_num(nan=torch.inf)
        return min(1.0, len(z) * math.erfc(float(z.max()) / math.sqrt(2)))

    def _told(self) -> Sequence[str | pd.DataFrame]:
        return [self.table, f"p-value of all {self.pvalue:.2g}"]


def joint_test(
    model: Model,
    batch: Batch,
    step: Callable[[LogJoint, Tensor], Tensor],
    *,
    sweeps: int = 20,
    replicates: int = 5000,
    seed: int = 0,
) -> JointTest:
    r"""Geweke's joint test of a Markov kernel.

    Start at $(z, x) \sim p(z, x)$, and alternate

    $$z \leftarrow \mathrm{step}(z;\, p(z \mid x)), \qquad x \sim p(x \mid z)$$

    A kernel that leaves every p(z | x) as it is leaves p(z, x) as it is. After the sweeps, the
    unconstrained latents' first and second moments and products, and the log densities, are
    compared with fresh draws of p(z, x). Replicates advance together and know nothing of each
    other, so that their standard errors are those of independent draws.

    Args:
        model: p(z) p(x | z).
        batch: gives the dtype of `x` and what else the model is called with; its rows are
            repeated as often as it takes.
        step: takes `LogJoint` of the replicates' data, and unconstrained latents `(1, N, L)`;
            returns them moved.
        sweeps: alternations; more of them amplify a fault.
        replicates: `N`, independent, at least 50.
        seed: of all draws; torch's random state is left as it was.

    Returns:
        `JointTest`.

    Warning:
        It tests that the target is left alone, not that it is found: a kernel that never moves
        passes, and so does one that heeds only the first data it has met.

    Raises:
        ValueError: a bad model or batch, no sweep, too few replicates, or a step that returns
            another shape or what is not finite.

    References:
        John Geweke. *Getting It Right: Joint Distribution Tests of Posterior Simulators*, 2004.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.ones(1, 1), torch.zeros(1), noise=1.0)
        >>> def no_accept_step(target, u):
        ...     return u + 0.3 * torch.randn_like(u)
        >>> joint_test(model, (torch.zeros(1, 1),), no_accept_step).pvalue < 1e-3
        True
    """
    check_model(model, batch)
    if sweeps < 1 or replicates < 50:
        raise ValueError(
            f"joint_test wants sweeps >= 1 and replicates >= 50; got {sweeps}, {replicates}"
        )
    index = torch.arange(replicates) % len(batch[0])
    rows = tuple(part[index] for part in batch)
    with preserved_rng(seed), evaluating(model):
        fresh = _test_functions(*_start(model, rows))
        target, u = _start(model, rows)
        for _ in range(sweeps):
            u = _moved(step, target, u)
            target = LogJoint(model, _renewed(target, u))
        return JointTest(_compared(_test_functions(target, u), fresh))


def _moved(step: Callable[[LogJoint, Tensor], Tensor], target: LogJoint, u: Tensor) -> Tensor:
    moved = step(target, u).detach()
    if moved.shape != u.shape or not torch.isfinite(moved).all():
        refuse(
            "step returns no new latents",
            expected=f"finite numbers of shape {tuple(u.shape)}",
            got=f"{int((~torch.isfinite(moved)).sum())} not finite of {tuple(moved.shape)}",
            advice="reject proposals whose log density is not finite",
        )
    return moved


def _start(model: Model, batch: Batch) -> tuple[LogJoint, Tensor]:
    latents, simulated = simulate(model, batch)
    target = LogJoint(model, simulated)
    return target, target.unconstrain({site: z.unsqueeze(0) for site, z in latents.items()})


def _renewed(target: LogJoint, u: Tensor) -> Batch:
    """The batch with x ~ p(x | z(u))."""
    x, *others = target.batch
    return _likelihood(target, u).sample().to(x.dtype), *others


def _likelihood(target: LogJoint, u: Tensor) -> Any:
    latents = {site: z[0] for site, z in target.constrain(u)[0].items()}
    return observation(target.model, latents, target.batch)


@torch.no_grad()
def _test_functions(target: LogJoint, u: Tensor) -> dict[str, Tensor]:
    """Each `(N,)`."""
    sites = target.split(u[0].double())
    values = dict(zip(unit_names(sites, 1), side_by_side(sites, 1).unbind(-1), strict=True))
    squares = {f"{name}²": value.square() for name, value in values.items()}
    products = {f"{a} × {b}": values[a] * values[b] for a, b in combinations(values, 2)}
    x = target.batch[0]
    densities = {
        "log p(x | z)": _likelihood(target, u).log_prob(x).double().expand(len(x)),
        "log p(x, z)": target(u)[0].double(),
    }
    return values | squares | products | densities


def _compared(after: dict[str, Tensor], fresh: dict[str, Tensor]) -> pd.DataFrame:
    import pandas as pd

    ours, prior = (torch.stack(list(values.values())) for values in (after, fresh))
    difference = ours.mean(-1) - prior.mean(-1)
    se = ((ours.var(-1) + prior.var(-1)) / ours.shape[-1]).sqrt()
    columns = {
        "mean": ours.mean(-1),
        "prior_mean": prior.mean(-1),
        "se": se,
        "z": (difference / se).where(difference != 0, 0.0),
    }
    table = pd.DataFrame({name: value.numpy() for name, value in columns.items()})
    table.index = pd.Index(list(after), name="function")
    return table
