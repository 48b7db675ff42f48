"""The main job on scikit-learn's digits: fit, hold to account, draw, write down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyro_vae import plots
from pyro_vae.recipe import Recipe, Run, Settings, carry_out, load_rows
from pyro_vae.svi import Run as Fitted
from pyro_vae.verdict import Verdict, compare


def demo(
    folder: str | Path = "runs/demo", *, epochs: int = 150, digits: int = 16,
    seed: int = 0, progress: bool = True,
) -> tuple[Fitted, Verdict]:  # fmt: skip
    """Fit a VAE with two latent dimensions and compare its guide with exact and MCMC posteriors.

    Writes a run folder, as `pyro-vae fit` does, and beside it `demo.png`, `table.csv`,
    `summary.csv`, `distances.csv` and the draws of MCMC, guide and exact posterior as NetCDF.

    Args:
        folder: made if missing.
        epochs: of SVI.
        digits: held-out digits to judge.
        seed: of weights, rows and draws.
        progress: show bars.

    Returns:
        What the fit measured, and the verdict.

    Raises:
        ValueError: a folder that cannot be written, or a count below 1, before the first step.
    """
    recipe = Recipe(fit=Settings(epochs=epochs, lr=2e-3), seed=seed)
    held_out = len(load_rows(recipe.data).test[0])
    if not 1 <= digits <= held_out:
        raise ValueError(f"digits must be 1..{held_out}; got {digits}")
    run = carry_out(recipe, folder, progress=progress)
    batch = (run.data.test[0][:digits],)
    verdict = compare(run.model, run.guide, batch, seed=seed, progress=progress)
    verdict.save(run.folder)
    _figure(run, verdict).savefig(run.folder / "demo.png")
    return run.fitted, verdict


def _figure(run: Run, verdict: Verdict) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.4), dpi=150, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.05], squeeze=False)[:, 0]
    verdict.plot(run.data.image_shape, figure=top)
    top.suptitle("Held-out digits: exact posterior, MCMC, and the guide", fontsize=11)
    curves, grid = bottom.subplots(1, 2, width_ratios=[1.25, 1])
    plots.history(curves, run.fitted)
    curves.set_title("SVI with Trace_ELBO", fontsize=11)
    assert run.data.image_shape is not None
    plots.latent_grid(grid, run.model, run.data.image_shape)
    grid.set_title("Mean of $p(x|z)$ over the latent plane", fontsize=11)
    return figure
