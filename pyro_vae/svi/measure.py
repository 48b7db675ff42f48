"""The ELBO of a pair and its terms on rows, nats per datum."""

from __future__ import annotations

import math
from typing import Any

import torch

from pyro_vae.pair import Batch, Guide, Model, evaluating, log_densities
from pyro_vae.ranks import place, summed

CHUNK = 1024
"""Rows scored at once."""


@torch.no_grad()
def measure(
    model: Model, guide: Guide, batch: Batch, draws: int, *, split: str, fabric: Any
) -> dict[str, float]:
    """Mean ELBO with its standard error over rows, reconstruction and KL, named by split.

    Rows are shared among processes; each is counted once.

    Raises:
        FloatingPointError: an ELBO that is not finite.
    """
    rank, count = place(fabric)
    totals = torch.zeros(4, dtype=torch.float64)
    with evaluating(model, guide):
        for index in torch.arange(rank, len(batch[0]), count).split(CHUNK):
            found = log_densities(model, guide, tuple(part[index] for part in batch), draws)
            elbo, likelihood = (
                part.mean(0).double() for part in (found.log_weight, found.likelihood)
            )
            sums = [elbo.sum(), elbo.square().sum(), likelihood.sum()]
            totals += torch.stack([torch.tensor(len(index)).to(elbo), *sums]).cpu()
    if fabric is not None:
        totals = summed(totals, fabric).cpu()
    if not torch.isfinite(totals).all():
        raise FloatingPointError(f"after the last batch: the {split} ELBO is not finite")
    rows, total, squares, likelihood = totals.tolist()
    mean = total / rows
    variance = max(squares - rows * mean**2, 0.0) / (rows - 1) if rows > 1 else math.nan
    return {
        f"{split}_elbo": mean,
        f"{split}_elbo_se": math.sqrt(variance / rows),
        f"{split}_reconstruction": likelihood / rows,
        f"{split}_kl": (likelihood - total) / rows,
    }
