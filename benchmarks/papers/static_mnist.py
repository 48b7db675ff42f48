"""Static MNIST, the MLP VAE of the VampPrior paper (L = 40): test log-likelihood by IWAE-5,000.

Networks, rows, batch, optimiser and schedule are those of Tomczak & Welling 2018 and their code:
gated layers 784–300–300–40 and back, Larochelle's binarised MNIST 50,000/10,000/10,000, batch 100,
the KL warmed up over 100 epochs, at most 2,000 epochs, 50 without a better validation ELBO end it,
AdamNormGrad at 5e-4, K = 500 pseudo-inputs started at random. What differs: the KL's weight grows
by step, theirs by epoch; epochs without gain count from the first, theirs after the warm-up; the
encoder's scales are unbounded softpluses, theirs have log variances in [-6, 2]; weights start as
torch's do, theirs as He's; pseudo-inputs start around the mean pixel with sd 0.05, theirs around
0.05 with sd 0.01.

An "averaged" row goes on from its row's weights with Adam at 1e-4, an exponential average of the
weights over about 1,000 steps, and a patience of 10 epochs: the same networks, a better optimiser.
A "tighter" row goes on from there for 5 epochs, so many set beforehand, with the
importance-weighted bound of 5 draws (DReG) in the ELBO's place: the same networks, a better
objective.

A row is a fit that can be stopped and goes on; its figures are written when it is evaluated:

    python benchmarks/papers/static_mnist.py fit standard            # hours
    python benchmarks/papers/static_mnist.py evaluate standard       # IWAE-5,000, 10,000 images
    python benchmarks/papers/static_mnist.py confirm standard        # what it lacks, on 1,000
    python benchmarks/papers/static_mnist.py                         # the table

References: −85.57 for the VampPrior (as pythae quotes it; its own run reached −85.79), −88.56 for
the standard prior (from memory, not verified).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pyro_vae as pv
from pyro_vae.svi import objectives

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/papers/static_mnist.json"
COST = "hours on one busy core: standard 1, mixture 1.5, VampPrior 4; what goes on, minutes"
LATENT, HIDDEN, COMPONENTS, DRAWS = 40, (300, 300), 500, 5000


class AdamNormGrad(torch.optim.Adam):
    """Adam on gradients divided by their norm, tensor by tensor, as the paper's code has it."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, fused=True)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= parameter.grad.norm() + 1e-7
        return super().step(closure)


@dataclass(frozen=True)
class Row:
    """A row of the table: a prior, and how the pair is fitted."""

    prior: str
    paper: float | None = None
    source: str = ""
    start: str | None = None
    """The row whose weights it goes on from."""
    tighter: bool = False
    """Whether it does so with the importance-weighted bound."""


ROWS = {
    "standard": Row("standard", paper=-88.56, source="from memory, not verified"),
    "standard, averaged": Row("standard", start="standard"),
    "mixture": Row("mixture"),
    "flow": Row("flow"),
    "vamp": Row("vamp", paper=-85.57, source="quoted by pythae"),
    "vamp, averaged": Row("vamp", start="vamp"),
    "vamp, tighter": Row("vamp", start="vamp, averaged", tighter=True),
}


def build(row: Row, seed: int, mean: float) -> tuple[Any, Any]:
    """The pair of a row, untrained; pseudo-inputs start around `mean`, the mean pixel."""
    torch.manual_seed(seed)
    guide = pv.guides.NormalGuide(pv.networks.GatedMLP(784, *HIDDEN, 2 * LATENT))
    prior = {
        "standard": lambda: pv.priors.StandardNormal(LATENT),
        "mixture": lambda: pv.priors.GaussianMixture(LATENT, COMPONENTS),
        "vamp": lambda: pv.priors.VampPrior.at_random(
            guide.posterior, COMPONENTS, 784, mean=mean, sd=0.05, seed=seed
        ),
        "flow": lambda: pv.priors.FlowPrior(LATENT, hidden=(128, 128)),
    }[row.prior]()
    model = pv.models.VAE(
        pv.networks.GatedMLP(LATENT, *HIDDEN, 784),
        prior=prior, likelihood=pv.likelihoods.Bernoulli(),
    )  # fmt: skip
    return model, guide


def fit(
    name: str,
    seed: int,
    runs: Path,
    data: Any,
    *,
    epochs: int | None,
    warm_up: int,
    progress: bool,
) -> tuple[Any, Any, Any]:
    """Fit a row, or go on with it; `epochs` of `None`: only read what there is."""
    row, folder = ROWS[name], runs / f"{name.replace(', ', '_')}-{seed}"
    if row.start is None:
        model, guide = build(row, seed, data.train[0].mean().item())
        steps = -(-len(data.train[0]) // 100)
        settings = {
            "optimizer": AdamNormGrad, "lr": 5e-4, "patience": 50,
            "objective": objectives.Beta(objectives.warm_up(warm_up * steps)),
        }  # fmt: skip
    else:
        model, guide, _ = fit(
            row.start, seed, runs, data, epochs=None, warm_up=warm_up, progress=False
        )
        settings = {"lr": 1e-4, "average": 0.999, "patience": 10}
    if row.tighter:  # which epoch is best the ELBO does not say
        settings |= {"objective": objectives.DReG(5), "patience": None, "measure_every": 5}
        epochs = epochs and min(epochs, 5)
    if epochs is None:
        epochs = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["epoch"]
    run = pv.fit(
        model, guide, data, epochs=epochs, batch_size=100, draws=1, compile=True, folder=folder,
        seed=seed, progress=progress, **settings,
    )  # fmt: skip
    return model, guide, run


def evaluate(model: Any, guide: Any, batch: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Log-likelihood of rows with its standard error over rows, and what its weights say."""
    start = time.perf_counter()
    found = pv.bounds(model, guide, batch, draws=DRAWS, keep=0, compile=True)
    count = len(batch[0])
    return {
        "log_likelihood": found.iwae.mean().item(),
        "log_likelihood_se": (found.iwae.std() / count**0.5).item(),
        "elbo": found.elbo.mean().item(),
        "khat_above_0.7": (found.khat > 0.7).double().mean().item(),
        "median_ess": found.ess.median().item(),
        "rows": count,
        "draws": DRAWS,
        "evaluation_seconds": time.perf_counter() - start,
    }


def confirm(model: Any, guide: Any, batch: tuple[torch.Tensor, ...], rows: int) -> dict[str, Any]:
    """What IWAE lacks, on shuffled test rows: differences on the same images, and the sandwich.

    Where k-hat is high IWAE is too low, by how much annealing says; the distance of the two bounds
    on simulated images bounds in turn what annealing lacks. A refined guide is the same networks
    with steps of gradient ascent for each image: a better proposal of the same model.
    """
    index = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(0))[:rows]
    few = tuple(part[index] for part in batch)
    iwae = pv.bounds(model, guide, few, draws=DRAWS, keep=0, compile=True).iwae
    refined = pv.bounds(
        model, pv.guides.RefinedGuide(guide, model), few, draws=DRAWS, keep=0, chunk=DRAWS
    )
    path: dict[str, Any] = {"particles": 16, "temperatures": 64, "progress": False}
    ais = pv.posterior.annealed(model, few, guide=guide, **path).log_evidence.cpu()
    simulated = tuple(part[: max(2, len(index) // 10)] for part in few)
    both = pv.posterior.sandwich(model, simulated, guide=guide, **path)
    return {
        "few_rows": len(index),
        "few_refined_khat_above_0.7": (refined.khat > 0.7).double().mean().item(),
        **_mean("few_iwae", iwae),
        **_mean("few_refined_minus_iwae", refined.iwae - iwae),
        **_mean("few_refined_elbo_minus_iwae", refined.elbo - iwae),
        **_mean("few_ais_minus_iwae", ais - iwae),
        "sandwich_rows": len(both.upper),
        **_mean("sandwich_width", both.upper - both.lower),
    }


def _mean(name: str, values: torch.Tensor) -> dict[str, float]:
    """A mean over images and its standard error over them."""
    error = values.double().std().item() / len(values) ** 0.5
    return {name: values.double().mean().item(), f"{name}_se": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="?", default="table",
        choices=("fit", "evaluate", "confirm", "figure", "table"),
    )  # fmt: skip
    parser.add_argument("row", nargs="?", choices=tuple(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=100)
    parser.add_argument("--few", type=int, default=1000, help="test rows for what confirms")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/papers/static_mnist")
    options = parser.parse_args()
    if options.what in ("figure", "table"):
        return figure() if options.what == "figure" else table()
    if options.row is None:
        parser.error(f"which row? one of {', '.join(ROWS)}")
    data = pv.data.load("binarized_mnist")
    model, guide, run = fit(
        options.row, options.seed, options.runs, data,
        epochs=options.epochs if options.what == "fit" else None,
        warm_up=options.warm_up, progress=True,
    )  # fmt: skip
    if options.what == "fit":
        return print(run)
    if options.what == "confirm":
        keep(options.row, options.seed, confirm(model, guide, data.test, options.few))
        return table()
    record = evaluate(model, guide, data.test) | {
        "epochs": run.epochs[-1].epoch, "best_epoch": run.best_epoch,
        "stopped_early": run.stopped_early, "seconds": run.seconds,
        "curve": {
            part: [round(getattr(epoch, f"{part}_elbo"), 2) for epoch in run.epochs]
            for part in ("train", "validation")
        },
        "validation_elbo": run.best.validation_elbo, "device": platform.machine(),
        "cores": os.cpu_count(), "torch": torch.__version__, "pyro_vae": pv.__version__,
    }  # fmt: skip
    keep(options.row, options.seed, record)
    return table()


def keep(row: str, seed: int, figures: dict[str, Any]) -> None:
    """Add figures to the record of a row."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    records = {(r["row"], r["seed"]): r for r in known}
    records.setdefault((row, seed), {"row": row, "seed": seed}).update(figures)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted(records.values(), key=lambda r: (list(ROWS).index(r["row"]), r["seed"]))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def figure() -> None:
    """Draw how the rows were fitted, and their test log-likelihoods beside the published ones."""
    from matplotlib.figure import Figure

    known = json.loads(RESULTS.read_text())
    ends = {(r["row"], r["seed"]): r["best_epoch"] for r in known}
    page = Figure(figsize=(11, 4), dpi=150, layout="constrained")
    left, right = page.subplots(1, 2)
    names = {
        "ours": "IWAE-5,000",
        "ais": "and what it lacks by annealing, on the same images",
        "paper": "published",
    }
    for i, r in enumerate(known):
        first = sum(ends.get((name, r["seed"]), 0) for name in _before(r["row"]))
        for part, style in (("validation", "-"), ("train", ":")):
            curve = r["curve"][part]
            steps = range(first + r["epochs"] + 1 - len(curve), first + r["epochs"] + 1)
            left.plot(steps, curve, style, color=f"C{i}", lw=1.2, marker="." * (len(curve) == 1))
        ours = {"ours": (r["log_likelihood"], r["log_likelihood_se"], "o", f"C{i}")}
        if "few_ais_minus_iwae" in r:
            lacks, lacks_se = r["few_ais_minus_iwae"], r["few_ais_minus_iwae_se"]
            ours["ais"] = r["log_likelihood"] + lacks, lacks_se, "D", "none"
        for name, (value, error, marker, fill) in ours.items():
            right.errorbar(
                value, i, xerr=2 * error, fmt=marker, color=f"C{i}", mfc=fill,
                label=names.pop(name, None),
            )  # fmt: skip
        if (paper := ROWS[[*_before(r["row"]), r["row"]][0]].paper) is not None:
            right.plot(paper, i, "k|", markersize=16, label=names.pop("paper", None))
    best = max(max(r["curve"]["train"]) for r in known)
    left.set(xlabel="epoch", ylabel="ELBO, nats", ylim=(best - 20, best + 1))
    left.set_title("ELBO of validation (solid) and training rows (dotted)", fontsize=11)
    right.set_yticks(range(len(known)), [f"{r['row']}, seed {r['seed']}" for r in known])
    right.invert_yaxis()
    right.margins(y=0.3)
    right.set_xlabel("test log p(x), nats; bars: 2 standard errors over images")
    right.set_title("Static MNIST, L = 40", fontsize=11)
    right.legend(frameon=False, fontsize=8)
    page.savefig(ROOT / "docs/static_mnist.png")


def _before(name: str) -> list[str]:
    """The rows whose fits a row goes on from, the first first."""
    start = ROWS[name].start
    return [*_before(start), start] if start else []


def table() -> None:
    """Print what was measured beside what was published; ± are standard errors over images."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    print(
        "| row | seed | IWAE-5,000 | published | k-hat > 0.7 | refined − IWAE | annealed − IWAE "
        "| sandwich | epochs | hours |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in known:
        row = ROWS[r["row"]]
        cells = [
            r["row"],
            str(r["seed"]),
            _with_error(r, "log_likelihood"),
            "" if row.paper is None else f"{row.paper} ({row.source})",
            f"{r['khat_above_0.7']:.1%}",
            _with_error(r, "few_refined_minus_iwae"),
            _with_error(r, "few_ais_minus_iwae"),
            _with_error(r, "sandwich_width"),
            f"{r['best_epoch']} of {r['epochs']}" + (" more" if row.start else ""),
            f"{r['seconds'] / 3600:.1f}",
        ]
        print(f"| {' | '.join(cells)} |")


def _with_error(record: dict[str, Any], name: str) -> str:
    if name not in record:
        return "not yet"
    return f"{record[name]:.2f} ± {record[f'{name}_se']:.2f}"


if __name__ == "__main__":
    main()
