"""Pyro's own NUTS, one datum at a time: slow, and owing nothing to this package's code."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor
from tqdm import tqdm

from pyro_vae.checks import check_model
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import Batch, Model, frozen, full_size, preserved_rng
from pyro_vae.posterior.draws import Draws


def nuts(
    model: Model,
    batch: Batch,
    *,
    draws: int = 500,
    warmup: int = 300,
    chains: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> Draws:
    """Sample p(z | x) of each datum by `MCMC(NUTS(model))`, chain after chain.

    Every chain starts at its own draw from the prior, which over-disperses the starts. The
    model's parameters are frozen meanwhile. Chains run in this process: Pyro's parallel chains
    fork, and hang once torch has used its threads.

    Args:
        model: p(z) p(x | z), without subsampling.
        batch: tensors of `B` rows.
        draws: `S`, kept from each chain.
        warmup: adaptation steps before them, dropped.
        chains: `C`.
        seed: of starts and transitions; torch's random state is left as it was.
        progress: show a bar, one step a datum.

    Returns:
        `Draws` with `(C, S, B, *event)` for each site, and `diverging`, `acceptance_rate`,
        `step_size` as statistics.

    Warning:
        Seconds a datum. A posterior with several separated modes is not mixed by NUTS; R-hat
        across chains tells, one chain never does.

    Raises:
        ValueError: counts below their minimum (`draws >= 4`, the others 1), or a bad batch.

    References:
        Matthew D. Hoffman, Andrew Gelman. *The No-U-Turn Sampler*, 2014.

    Example:
        >>> from pyro_vae.models import PPCA
        >>> model = PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> nuts(model, (torch.zeros(1, 3),), draws=10, warmup=10, progress=False)["z"].shape
        torch.Size([2, 10, 1, 2])
    """
    check_model(model, batch)
    if draws < 4 or warmup < 1 or chains < 1:
        raise ValueError(
            "nuts wants draws >= 4, warmup >= 1, chains >= 1; "
            f"got draws={draws}, warmup={warmup}, chains={chains}"
        )
    if (size := full_size(model, tuple(part[:1] for part in batch))) is not None:
        raise ValueError(
            f"the model's plate stands for {size} data, and NUTS would count each datum as often"
            "\n  expected: pyro.plate('data', len(x))\n  try:      the model without subsample="
        )
    with preserved_rng(seed), frozen(model):
        per_datum = [
            [_chain(model, tuple(part[b : b + 1] for part in batch), draws, warmup)
             for _ in range(chains)]
            for b in tqdm(range(len(batch[0])), desc="NUTS", unit="datum", disable=not progress)
        ]  # fmt: skip
    names = LogJoint(model, batch).transforms  # in the order of the model; Pyro sorts them
    sites = {name: _stack(per_datum, name) for name in names}
    statistics = ("diverging", "acceptance_rate", "step_size")
    stats = {name: _stack(per_datum, name) for name in statistics}
    return Draws(sites, stats, method="Pyro NUTS")


def _chain(model: Model, datum: Batch, draws: int, warmup: int) -> dict[str, Tensor]:
    target = LogJoint(model, datum)
    inverses = {name: bijection.inv for name, bijection in target.transforms.items()}
    kernel = NUTS(model, transforms=inverses, init_strategy=init_to_sample)
    mcmc = MCMC(
        kernel,
        num_samples=draws,
        warmup_steps=warmup,
        initial_params=_start(target),
        disable_progbar=True,
    )
    mcmc.run(*datum)
    diagnostics: Any = mcmc.diagnostics()
    samples: dict[str, Tensor] = mcmc.get_samples()
    diverging = torch.zeros(draws, 1, dtype=torch.bool)
    diverging[diagnostics["divergences"]["chain 0"]] = True
    return samples | {
        "diverging": diverging,
        "acceptance_rate": torch.full((draws, 1), diagnostics["acceptance rate"]["chain 0"]),
        "step_size": torch.full((draws, 1), float(kernel.step_size)),
    }


def _start(target: LogJoint) -> dict[str, Tensor]:
    """A draw from the prior at which the datum has a likelihood."""
    candidates = target.prior_draws(100)
    with pyro.validation_enabled(False):
        possible = torch.isfinite(target(candidates)).flatten().nonzero().flatten()
    if not len(possible):
        raise ValueError(
            "a datum has no likelihood at any of 100 draws from the prior: NUTS cannot start"
            "\n  expected: a finite log p(x, z)\n  try:      pv.check_pair(model, guide, batch)"
        )
    return {k: v[0] for k, v in target.split(candidates[possible[:1]]).items()}


def _stack(per_datum: list[list[dict[str, Tensor]]], name: str) -> Tensor:
    return torch.cat(
        [torch.stack([chain[name] for chain in chains]) for chains in per_datum], dim=2
    )
