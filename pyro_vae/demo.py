"""The main job on scikit-learn's digits: fit, hold to account, draw, write down."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from pyro_vae import __version__, data, guides, likelihoods, models, networks, plots, priors
from pyro_vae.pair import preserved_rng
from pyro_vae.svi import Run, fit
from pyro_vae.svi.checkpoint import save_weights
from pyro_vae.verdict import Verdict, compare


def demo(
    folder: str | Path = "runs/demo", *, epochs: int = 150, digits: int = 16,
    seed: int = 0, progress: bool = True,
) -> tuple[Run, Verdict]:  # fmt: skip
    """Fit a VAE with two latent dimensions and compare its guide with exact and MCMC posteriors.

    Writes into `folder`: `table.csv`, `summary.csv`, `history.csv`, `demo.png`, draws of MCMC,
    guide and exact posterior as NetCDF, weights as safetensors, and `demo.json` with settings
    and versions.

    Args:
        folder: made if missing.
        epochs: of SVI.
        digits: held-out digits to judge.
        seed: of weights, rows and draws.
        progress: show bars.

    Returns:
        The run and the verdict.

    Raises:
        ValueError: a folder that cannot be written, or a count below 1, before the first step.
    """
    held_out = data.load("digits")
    if epochs < 1:
        raise ValueError(f"epochs must be an integer >= 1; got {epochs}")
    if not 1 <= digits <= len(held_out.test[0]):
        raise ValueError(f"digits must be 1..{len(held_out.test[0])}; got {digits}")
    folder = writable_folder(folder)
    with preserved_rng(seed):
        guide = guides.NormalGuide(networks.MLP(64, 128, 128, guides.NormalGuide.features(2)))
        model = models.VAE(
            networks.MLP(2, 128, 128, 64),
            prior=priors.StandardNormal(2),
            likelihood=likelihoods.Bernoulli(),
        )
    run = fit(model, guide, held_out, epochs=epochs, lr=2e-3, seed=seed, progress=progress)
    batch = (held_out.test[0][:digits],)
    verdict = compare(model, guide, batch, seed=seed, progress=progress)

    verdict.save(folder)
    save_weights(folder, model, guide)
    run.history.to_csv(folder / "history.csv", float_format="%.6g")
    _figure(run, verdict, model, held_out).savefig(folder / "demo.png")
    settings: dict[str, Any] = {"epochs": epochs, "digits": digits}
    versions = {"pyro_vae": __version__, "torch": torch.__version__}
    record = {"settings": settings | {"seed": seed}, "versions": versions}
    (folder / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    return run, verdict


def writable_folder(folder: str | Path) -> Path:
    """Make a folder, or say in one sentence why it cannot be written.

    Raises:
        ValueError: it is a file, or may not be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     writable_folder(Path(parent) / "new").is_dir()
        True
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(
            f"cannot write into the output folder {str(folder)!r}: {reason}"
            "\n  try:      another folder, --out FOLDER"
        ) from error
    return folder


def _figure(run: Run, verdict: Verdict, model: models.VAE, held_out: data.Dataset) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.4), dpi=150, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.05], squeeze=False)[:, 0]
    verdict.plot(held_out.image_shape, figure=top)
    top.suptitle("Held-out digits: exact posterior, MCMC, and the guide", fontsize=11)
    curves, grid = bottom.subplots(1, 2, width_ratios=[1.25, 1])
    plots.history(curves, run)
    curves.set_title("SVI with Trace_ELBO", fontsize=11)
    assert held_out.image_shape is not None
    plots.latent_grid(grid, model, held_out.image_shape)
    grid.set_title("Mean of $p(x|z)$ over the latent plane", fontsize=11)
    return figure
