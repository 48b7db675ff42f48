"""The training loop: SVI on `Trace_ELBO`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer import Trace_ELBO
from tqdm import tqdm

from pyro_vae.checks import check_pair
from pyro_vae.data import Dataset
from pyro_vae.pair import Batch, Guide, Model, preserved_rng
from pyro_vae.ranks import place
from pyro_vae.svi.fitting import Fitting, lean
from pyro_vae.svi.folder import RunFolder
from pyro_vae.svi.rows import Rows
from pyro_vae.svi.run import Epoch, Run
from pyro_vae.svi.schedules import Schedule

EVALUATION_DRAWS = 8
"""Draws for each datum behind the ELBO of an epoch."""
ADAM = partial(torch.optim.Adam, fused=True)
PRECISIONS = ("float32", "tf32", "bfloat16")


def fit(
    model: Model,
    guide: Guide,
    data: Dataset | Batch,
    *,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAM,
    schedule: Schedule | None = None,
    clip: float | None = None,
    average: float | None = None,
    objective: Any = None,
    patience: int | None = None,
    measure_every: int = 1,
    draws: int = EVALUATION_DRAWS,
    compile: bool = False,
    precision: Literal["float32", "tf32", "bfloat16"] = "float32",
    folder: str | Path | None = None,
    save_every: float = 60.0,
    on_epoch: Callable[[Epoch], None] | None = None,
    fabric: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    r"""Maximise the ELBO of a pair by stochastic gradients.

    $$\mathcal L = \mathbb E_{q(z \mid x)}\left[\log p(x \mid z)\right]
      - \mathrm{KL}(q(z \mid x) \,\|\, p(z)) \le \log p(x)$$

    Each step takes `Trace_ELBO()(model, guide)` of a mini-batch, per datum, and its gradient
    by reparameterization. After each epoch the ELBO and its two terms are measured on
    training and validation rows. At the end the pair holds the weights of the epoch with the
    highest validation ELBO: the plain one, whatever the objective, so that a fit of a tighter
    bound such as `DReG`, whose guide need not have a high ELBO, wants `measure_every=epochs`.

    Args:
        model: p(z) p(x | z).
        guide: q(z | x).
        data: a `Dataset`, or one batch `(x,)`, which then serves as its own validation. It is
            moved to the device of the pair, unless it lies in a memory-mapped file.
        epochs: passes over the training rows, at most.
        batch_size: rows a step; the last batch of an epoch may be smaller.
        lr: learning rate.
        optimizer: called with the parameters and `lr=`; Adam by default.
        schedule: factor on `lr` by the step, such as `svi.cosine(steps)`.
        clip: norm of all gradients together above which they are scaled down to it.
        average: decay of an exponential average of the parameters, such as 0.999, which is
            then what is measured and kept.
        objective: a Pyro ELBO with a `differentiable_loss`, `Trace_ELBO()` by default.
        patience: stop after so many epochs without a higher validation ELBO; `None`: never.
        measure_every: epochs between measurements, which have draws of their own and leave the
            fit as it is; the last epoch is always measured.
        draws: for each datum of a measurement.
        compile: record the step once and compile it. What Python decides, such as a branch or
            a count, is then decided once; torch's draws are fresh in every step, those of numpy
            or Python are not. Where a loss cannot be recorded, or nothing compiles, one warning
            says so and the fit goes on.
        precision: of products in the loss; `"tf32"` acts on GPUs only, `"bfloat16"` is
            autocast. Measurements are in full precision.
        folder: where settings, log and checkpoints go (`run.json`, `log.jsonl`,
            `checkpoint.pt`). A fit that finds its own checkpoint there goes on from it, on a
            CPU to the same weights bit for bit; more `epochs` than before prolong it.
        save_every: seconds between checkpoints; one is written at the end in any case.
        on_epoch: called with each measured epoch, for a log of your own; with `average`, the
            figures are those of averaged weights, which the pair does not hold then.
        fabric: a launched `lightning_fabric.Fabric`, to share every batch among processes.
        seed: of the order of rows and of the draws; torch's random state is left as it was.
            The initial weights are yours. Equal seeds give equal runs on one machine.
        progress: show a bar with ELBO, KL and time left.

    Returns:
        `Run`.

    Raises:
        ValueError: before the first step, for a bad pair, bad data, a count below 1, or a
            folder that holds another fit.
        FloatingPointError: a step that is not finite, with its epoch and batch; the pair is
            left with the weights of the last measured epoch.
        KeyboardInterrupt: as it came; the pair is left with the best weights so far.
        OSError: a checkpoint could not be written; the earlier one stands.
        RuntimeError: another process of `fabric` has stopped.

    References:
        Matthew D. Hoffman, David M. Blei, Chong Wang, John Paisley. *Stochastic Variational
        Inference*, 2013.
        Diederik P. Kingma, Max Welling. *Auto-Encoding Variational Bayes*, 2014.

    Example:
        >>> import pyro_vae as pv
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(64, 32, 4))
        >>> model = pv.models.VAE(pv.networks.MLP(2, 32, 64), prior=pv.priors.StandardNormal(2),
        ...                       likelihood=pv.likelihoods.Bernoulli())
        >>> run = fit(model, guide, pv.data.load("digits"), epochs=2, progress=False)
        >>> run.epochs[0].validation_elbo < run.epochs[1].validation_elbo
        True
    """
    objective = Trace_ELBO() if objective is None else objective
    counts = {
        "epochs": epochs, "batch_size": batch_size, "patience": patience,
        "measure_every": measure_every, "draws": draws,
    }  # fmt: skip
    _check_numbers(counts, lr, clip, average, save_every)
    _check_choices(objective, precision)
    ranks = rank, _ = place(fabric)
    rows = Rows(data, seed, ranks)
    few = rows.first(8)
    check_pair(model, guide, few if rows.per_batch else rows.train)
    check_pair(model, guide, rows.validation)
    bar = tqdm(total=epochs, desc="SVI", disable=rank > 0 or not progress)
    with preserved_rng(seed + 1_000_003 * rank), lean(precision), bar:
        fitting = Fitting(
            model, guide, rows, objective,
            batch_size=batch_size, lr=lr, optimizer=optimizer, schedule=schedule, clip=clip,
            average=average, draws=draws, precision=precision, fabric=fabric,
        )  # fmt: skip
        if folder is not None:
            fitting.resume(RunFolder(folder, fitting.settings() | {"seed": seed}), save_every)
        if compile and not fitting.ended(epochs, patience):
            fitting.record()
        bar.update(fitting.epoch)
        while not fitting.ended(epochs, patience):
            last = fitting.epoch + 1 == epochs
            measured = fitting.advance(last or (fitting.epoch + 1) % measure_every == 0)
            if measured is not None:
                bar.set_postfix_str(
                    f"ELBO {measured.validation_elbo:.2f}, KL {measured.validation_kl:.2f}"
                )
                if on_epoch is not None and rank == 0:
                    on_epoch(measured)
            bar.update()
        return fitting.finish(stopped_early=fitting.stale(patience))


def _check_numbers(
    counts: dict[str, int | None],
    lr: float,
    clip: float | None,
    average: float | None,
    save_every: float,
) -> None:
    for name, value in counts.items():
        if value is not None and (int(value) != value or value < 1 or isinstance(value, float)):
            raise ValueError(f"{name} must be an integer >= 1; got {value!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be > 0 and finite; got {lr}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0; got {clip}")
    if average is not None and not 0 < average < 1:
        raise ValueError(f"average must be a decay between 0 and 1; got {average}")
    if not save_every >= 0:
        raise ValueError(f"save_every must be seconds >= 0; got {save_every}")


def _check_choices(objective: Any, precision: str) -> None:
    if isinstance(objective, type) or not hasattr(objective, "differentiable_loss"):
        raise ValueError(
            f"objective {objective!r} has no differentiable_loss to call"
            "\n  expected: a Pyro ELBO such as Trace_ELBO()\n  try:      objective=Trace_ELBO()"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}; got {precision!r}")
