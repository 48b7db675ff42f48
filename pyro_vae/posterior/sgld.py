"""Langevin dynamics without a Metropolis step: a witness of what unadjusted sampling costs."""

from __future__ import annotations

import pyro
import torch

from pyro_vae.checks import check_model
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import Batch, Model, frozen, preserved_rng
from pyro_vae.posterior.draws import Draws
from pyro_vae.posterior.kernels import langevin
from pyro_vae.posterior.path import Base, explore


def sgld(
    model: Model,
    batch: Batch,
    *,
    step_size: float = 0.3,
    draws: int = 1000,
    chains: int = 4,
    warmup: int = 100,
    seed: int = 0,
) -> Draws:
    r"""Sample p(z | x) of each datum by unadjusted Langevin dynamics.

    $$u \mathrel{+}= \tfrac{\epsilon^2}2 \Sigma \nabla \log p(x, u) + \epsilon\,\xi,
      \qquad \xi \sim \mathcal N(0, \Sigma)$$

    with Σ the covariance of a cloud that has come to the posterior. The latents of a datum have
    an exact gradient, so the noise of minibatches, which the method was made for, is absent:
    what is left of its error is that of the step.

    Args:
        model: p(z) p(x | z).
        batch: tensors of `B` rows.
        step_size: ε, in posterior sd.
        draws: `S`, kept from each chain.
        chains: `C`.
        warmup: steps before them, dropped.
        seed: torch's random state is left as it was.

    Returns:
        `Draws`; `.trouble` sees what does not mix, never a bias.

    Warning:
        The chain's law is not p(z | x): for a Gaussian its variance is too large by
        1 / (1 − ε²/4), for others the error is unknown. Take `hmc` for answers.

    Raises:
        ValueError: counts or a step size below their minimum, or a bad batch.

    References:
        Max Welling, Yee Whye Teh. *Bayesian Learning via Stochastic Gradient Langevin
        Dynamics*, 2011.

    Example:
        >>> from pyro_vae.models import PPCA
        >>> model = PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> sgld(model, (torch.zeros(5, 3),), draws=10)["z"].shape
        torch.Size([4, 10, 5, 2])
    """
    check_model(model, batch)
    if draws < 1 or chains < 1 or warmup < 0 or not 0 < step_size < 2:
        raise ValueError(
            "sgld wants draws >= 1, chains >= 1, warmup >= 0 and a step size between 0 and 2; "
            f"got {draws}, {chains}, {warmup}, {step_size}"
        )
    with preserved_rng(seed), frozen(model), pyro.validation_enabled(False):
        target = LogJoint(model, batch)
        cloud = explore(Base(target, None), max(32, chains), 256)
        if not cloud.possible.all():
            data = (~cloud.possible).nonzero().flatten().tolist()[:5]
            raise ValueError(f"data {data} have no likelihood at any draw from the prior")
        position, metric = cloud.position[:chains], cloud.rungs[-1].metric
        step = torch.full_like(position[0, :, 0], step_size)
        kept = []
        for _ in range(warmup + draws):
            position = langevin(target, position, step, metric)
            kept.append(position.cpu())
        path = torch.stack(kept[warmup:], 1).to(position.device)  # (C, S, B, L)
        sites, _ = target.constrain(path.flatten(0, 1))
    return Draws(
        {name: value.unflatten(0, (chains, draws)).cpu() for name, value in sites.items()},
        method="SGLD",
    )
