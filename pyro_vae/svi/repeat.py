"""The same fit from several seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pyro_vae.data import Dataset
from pyro_vae.pair import Batch, Guide, Model, preserved_rng
from pyro_vae.svi.fit import fit
from pyro_vae.svi.run import Runs


def repeat(
    build: Callable[[], tuple[Model, Guide]],
    data: Dataset | Batch,
    *,
    seeds: Iterable[int] = range(3),
    **options: Any,
) -> Runs:
    """Build a pair and fit it, once for each seed: initial weights, order and draws.

    Args:
        build: makes a new model and guide, with torch seeded.
        data: as for `fit`.
        seeds: one run each, one after the other.
        **options: of `fit`, but `seed`; each seed has a folder of its own within `folder`.

    Returns:
        `Runs`, with mean and standard error over seeds.

    Raises:
        ValueError: no seed.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> def build():
        ...     model = pv.models.PPCA(torch.randn(3, 2), torch.zeros(3), noise=1.0)
        ...     return model, pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> runs = repeat(build, (torch.rand(9, 3),), seeds=(0, 1), epochs=2, progress=False)
        >>> runs.table.shape[0]
        2
    """
    runs = {}
    folder = options.pop("folder", None)
    for seed in seeds:
        with preserved_rng(seed):
            model, guide = build()
        own = None if folder is None else Path(folder) / f"seed-{seed}"
        runs[seed] = fit(model, guide, data, seed=seed, folder=own, **options)
    if not runs:
        raise ValueError("repeat wants at least one seed")
    return Runs(runs)
