"""The main job on scikit-learn's digits: fit, hold to account, draw, write down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyro_vae import data, models, plots
from pyro_vae.recipe import Recipe, Settings, begin_run, build, refuse_another, writable_folder
from pyro_vae.svi import Run, fit, save_weights
from pyro_vae.verdict import Verdict, compare


def demo(
    folder: str | Path = "runs/demo", *, epochs: int = 150, digits: int = 16,
    seed: int = 0, progress: bool = True,
) -> tuple[Run, Verdict]:  # fmt: skip
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
        The run and the verdict.

    Raises:
        ValueError: a folder that cannot be written, or a count below 1, before the first step.
    """
    recipe = Recipe(fit=Settings(epochs=epochs, lr=2e-3), seed=seed)
    held_out, model, guide = build(recipe)
    if epochs < 1:
        raise ValueError(f"epochs must be an integer >= 1; got {epochs}")
    if not 1 <= digits <= len(held_out.test[0]):
        raise ValueError(f"digits must be 1..{len(held_out.test[0])}; got {digits}")
    folder = writable_folder(folder)
    refuse_another(folder, recipe)
    begin_run(folder, recipe)
    run = fit(
        model, guide, held_out, **recipe.fit.options(), seed=seed, folder=folder, progress=progress
    )
    batch = (held_out.test[0][:digits],)
    verdict = compare(model, guide, batch, seed=seed, progress=progress)

    verdict.save(folder)
    save_weights(folder, model, guide)
    run.history.to_csv(folder / "history.csv", float_format="%.6g")
    _figure(run, verdict, model, held_out).savefig(folder / "demo.png")
    return run, verdict


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
