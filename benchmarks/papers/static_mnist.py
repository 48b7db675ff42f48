"""Static MNIST, the MLP VAE of the VampPrior paper (L = 40): test log-likelihood by IWAE-5,000.

Networks, rows, batch, optimiser and schedule are those of Tomczak & Welling 2018 and their code:
gated layers 784–300–300–40 and back, Larochelle's binarised MNIST 50,000/10,000/10,000, batch 100,
the KL warmed up over 100 epochs, at most 2,000 epochs, 50 without a better validation ELBO end it,
AdamNormGrad at 5e-4, K = 500 pseudo-inputs started at random. What differs: the KL's weight grows
by step, theirs by epoch; epochs without gain count from the first, theirs after the warm-up; the
encoder's scales are unbounded softpluses, theirs have log variances in [-6, 2]; pixels have
logits, theirs probabilities clamped to [1e-5, 1 - 1e-5]; the last layers start as torch's do,
theirs as He's, as do the gated layers of both; pseudo-inputs are sigmoids that start around the
mean pixel with sd 0.05, within [0.05, 0.95], theirs are clamped to [0, 1] and start around 0.05
with sd 0.01.

An "averaged" row goes on from its row's weights with Adam at 1e-4, an exponential average of the
weights over about 1,000 steps, and a patience of 10 epochs: the same networks, a better optimiser.
A "tighter" row goes on from there for 5 epochs, so many set beforehand, with the
importance-weighted bound of 5 draws (DReG) in the ELBO's place: the same networks, a better
objective. It was added for the VampPrior alone, after "vamp, averaged" had been evaluated on the
test images and was 0.35 nats above the paper, not 0.5.

A row is a fit that can be stopped and goes on; its figures are written when it is evaluated, and
what was worked out for them stays on disk too:

    python benchmarks/papers/static_mnist.py fit standard            # hours
    python benchmarks/papers/static_mnist.py evaluate standard       # IWAE-5,000, 10,000 images
    python benchmarks/papers/static_mnist.py confirm standard        # what it lacks, on 1,000
    python benchmarks/papers/static_mnist.py                         # the table

References: −85.57 for the VampPrior (as pythae quotes it; its own run reached −85.79), −88.56 for
the standard prior (from memory, not verified).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from records import Kept, machine, mean, read, write
from torch import Tensor

import pyro_vae as pv
from pyro_vae.svi import objectives

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/papers/static_mnist.json"
COST = (
    "hours on one busy core: standard 1, mixture 1.5, flow 2, VampPrior 4; what goes on, "
    "minutes; evaluate, half an hour a row; confirm, as much"
)
LATENT, HIDDEN, COMPONENTS = 40, (300, 300), 500
EPOCHS, WARM_UP = 2000, 100
DRAWS, CHUNK = 5000, 2500
"""Of IWAE, and images that are evaluated between two savings."""
FEW = 1000
"""Shuffled test images for what confirms."""
PATH: dict[str, Any] = {"particles": 16, "temperatures": 64}
"""Of annealing."""


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
        "mixture": lambda: pv.priors.GaussianMixture(LATENT, COMPONENTS, seed=seed),
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


def fit(name: str, seed: int, runs: Path, data: Any, *, progress: bool) -> tuple[Any, Any, Any]:
    """Fit a row, or go on with it; what has been fitted is only read."""
    row, epochs = ROWS[name], EPOCHS
    if row.start is None:
        model, guide = build(row, seed, data.train[0].mean().item())
        steps = -(-len(data.train[0]) // 100)
        settings = {
            "optimizer": AdamNormGrad, "lr": 5e-4, "patience": 50,
            "objective": objectives.Beta(objectives.warm_up(WARM_UP * steps)),
        }  # fmt: skip
    else:
        model, guide, _ = fit(row.start, seed, runs, data, progress=progress)
        settings = {"lr": 1e-4, "average": 0.999, "patience": 10}
    if row.tighter:  # which epoch is best the ELBO does not say
        settings |= {"objective": objectives.DReG(5), "patience": None, "measure_every": 5}
        epochs = 5
    run = pv.fit(
        model, guide, data, epochs=epochs, batch_size=100, draws=1, compile=True, seed=seed,
        folder=_folder(name, seed, runs), progress=progress, **settings,
    )  # fmt: skip
    return model, guide, run


def _folder(name: str, seed: int, runs: Path) -> Path:
    return runs / f"{name.replace(', ', '_')}-{seed}"


def evaluate(name: str, seed: int, runs: Path, data: Any) -> dict[str, Any]:
    """Log-likelihood of the test images, with its standard error over them; how it was fitted."""
    model, guide, run = fit(name, seed, runs, data, progress=True)
    kept = Kept(_folder(name, seed, runs), model, guide)
    (x,) = data.test
    parts = [
        kept(f"bounds-{k}-of-{CHUNK}", lambda rows=rows, k=k: weighed(
            model, guide, rows, seed=seed + k
        ))
        for k, rows in enumerate(x.split(CHUNK))
    ]  # fmt: skip
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {
        "row": name, "seed": seed,
        **mean("log_likelihood", found["iwae"]),
        "elbo": found["elbo"].mean().item(),
        "khat_above_0.7": (found["khat"] > 0.7).double().mean().item(),
        "median_ess": found["ess"].median().item(),
        "rows": len(x), "draws": DRAWS,
        "epochs": run.epochs[-1].epoch, "best_epoch": run.best_epoch,
        "stopped_early": run.stopped_early, "validation_elbo": run.best.validation_elbo,
        "seconds": run.seconds, "evaluation_seconds": sum(kept.seconds.values()),
        "curve": {
            part: [round(getattr(epoch, f"{part}_elbo"), 2) for epoch in run.epochs]
            for part in ("train", "validation")
        },
        **machine(),
    }  # fmt: skip


def weighed(model: Any, guide: Any, x: Tensor, **how: Any) -> dict[str, Tensor]:
    """Bounds of log p(x) of some images by weighted draws of a guide."""
    found = pv.bounds(model, guide, (x,), draws=DRAWS, keep=0, **{"compile": True} | how)
    return {name: getattr(found, name) for name in ("iwae", "elbo", "khat", "ess")}


def confirm(name: str, seed: int, runs: Path, data: Any) -> dict[str, Any]:
    """What IWAE lacks, on shuffled test images: differences on the same images, and the sandwich.

    Where k-hat is high IWAE is too low, by how much annealing says; the distance of the two bounds
    on simulated images bounds in turn what annealing lacks. A refined guide is the same networks
    with steps of gradient ascent for each image: a better proposal of the same model. What a row
    gains on the one it goes on from is told by each of the three. Where the row was fitted anew
    for this, on another machine say, the validation ELBO tells how far apart both fits are.
    """
    own, about = _looked_at(name, seed, runs, data)
    iwae, start = own["iwae"], ROWS[name].start
    before = _looked_at(start, seed, runs, data)[0] if start else {}
    return {
        "few_rows": len(iwae),
        "few_refined_khat_above_0.7": (own["refined_khat"] > 0.7).double().mean().item(),
        **mean("few_iwae", iwae),
        **mean("few_refined_minus_iwae", own["refined"] - iwae),
        **mean("few_refined_elbo_minus_iwae", own["refined_elbo"] - iwae),
        **mean("few_ais_minus_iwae", own["ais"] - iwae),
        **{
            key: value
            for what in ("iwae", "refined", "ais") if before
            for key, value in mean(f"few_{what}_gain", own[what] - before[what]).items()
        },
        "sandwich_rows": len(own["width"]),
        **mean("sandwich_width", own["width"]),
        **about,
    }  # fmt: skip


def _looked_at(
    name: str, seed: int, runs: Path, data: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Log p(x) of a few test images in three ways, the sandwich; of which fit, and how long."""
    model, guide, run = fit(name, seed, runs, data, progress=True)
    kept = Kept(_folder(name, seed, runs), model, guide)
    (x,) = data.test
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:FEW]]
    path = {"guide": guide, "progress": False} | PATH
    better = pv.guides.RefinedGuide(guide, model)

    def sandwich() -> Tensor:
        both = pv.posterior.sandwich(model, (x[: max(2, len(x) // 10)],), **path)
        return both.upper - both.lower

    amortized = kept("few", lambda: weighed(model, guide, x))
    refined = kept("refined", lambda: weighed(model, better, x, compile=False, chunk=DRAWS))
    found = {
        "iwae": amortized["iwae"], "refined": refined["iwae"],
        "refined_elbo": refined["elbo"], "refined_khat": refined["khat"],
        "ais": kept("annealed", lambda: pv.posterior.annealed(model, (x,), **path).log_evidence),
        "width": kept("sandwich", sandwich),
    }  # fmt: skip
    return found, {
        "few_validation_elbo": run.best.validation_elbo,
        "confirm_seconds": sum(kept.seconds.values()),
    }


def main() -> None:
    """Fit, evaluate or confirm a row, draw the figure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="?", default="table",
        choices=("fit", "evaluate", "confirm", "figure", "table"),
    )  # fmt: skip
    parser.add_argument("row", nargs="?", choices=tuple(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/papers/static_mnist")
    options = parser.parse_args()
    if options.what in ("figure", "table"):
        return figure() if options.what == "figure" else table()
    if options.row is None:
        parser.error(f"which row? one of {', '.join(ROWS)}")
    which = options.row, options.seed, options.runs, pv.data.load("binarized_mnist")
    if options.what == "fit":
        return print(fit(*which, progress=True)[2])
    if options.what == "evaluate":
        record = evaluate(*which)
    else:
        known = [r for r in read(RESULTS) if (r["row"], r["seed"]) == which[:2]]
        if not known:
            parser.error(f"{options.row} of seed {options.seed} is to be evaluated first")
        record = known[0] | confirm(*which)
    write(RESULTS, record, ("row", "seed"), list(ROWS))
    return table()


def figure() -> None:
    """Draw how the rows were fitted, and their test log-likelihoods beside the published ones."""
    from matplotlib.figure import Figure

    known = read(RESULTS)
    ends = {(r["row"], r["seed"]): r["best_epoch"] for r in known}
    page = Figure(figsize=(11, 4), dpi=150, layout="constrained")
    left, right = page.subplots(1, 2)
    names = {
        "ours": "IWAE-5,000",
        "ais": "with what annealing adds, on 1,000 of the images",
        "paper": "published",
    }
    for i, r in enumerate(known):
        first = sum(ends.get((name, r["seed"]), 0) for name in _before(r["row"]))
        for part, style in (("validation", "-"), ("train", ":")):
            curve = r["curve"][part]
            steps = range(first + r["epochs"] + 1 - len(curve), first + r["epochs"] + 1)
            left.plot(steps, curve, style, color=f"C{i}", lw=1.2, marker="*" * (len(curve) == 1))
        ours = {"ours": (r["log_likelihood"], r["log_likelihood_se"], "o", f"C{i}")}
        if "few_ais_minus_iwae" in r:
            lacks, lacks_se = r["few_ais_minus_iwae"], r["few_ais_minus_iwae_se"]
            error = math.hypot(r["log_likelihood_se"], lacks_se)
            ours["ais"] = r["log_likelihood"] + lacks, error, "D", "none"
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
    for i, name in enumerate(right.get_yticklabels()):
        name.set_color(f"C{i}")
    right.invert_yaxis()
    right.margins(y=0.15)
    right.set_xlabel("test log p(x), nats; bars: 2 standard errors over images")
    right.set_title("Static MNIST, L = 40", fontsize=11)
    page.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    page.savefig(ROOT / "docs/static_mnist.png")


def _before(name: str) -> list[str]:
    """The rows whose fits a row goes on from, the first first."""
    start = ROWS[name].start
    return [*_before(start), start] if start else []


def table() -> None:
    """Print what was measured beside what was published; ± are standard errors over images.

    Gains are those on the row it goes on from, on the same images.
    """
    known = read(RESULTS)
    print(
        "| row | seed | IWAE-5,000 | published | k-hat > 0.7 | median ESS | refined − IWAE "
        "| annealed − IWAE | sandwich | gain by IWAE | refined | annealed | epochs | hours |"
    )
    print("|---" * 14 + "|")
    for r in known:
        row = ROWS[r["row"]]
        cells = [
            r["row"],
            str(r["seed"]),
            _with_error(r, "log_likelihood"),
            "" if row.paper is None else f"{row.paper} ({row.source})",
            f"{r['khat_above_0.7']:.1%}",
            f"{r['median_ess']:.0f} of {r['draws']:,}",
            _with_error(r, "few_refined_minus_iwae"),
            _with_error(r, "few_ais_minus_iwae"),
            _with_error(r, "sandwich_width"),
            *(_with_error(r, f"few_{what}_gain") for what in ("iwae", "refined", "ais")),
            f"{r['best_epoch']} of {r['epochs']}" + (" more" if row.start else ""),
            f"{r['seconds'] / 3600:.1f}",
        ]
        print(f"| {' | '.join(cells)} |")


def _with_error(record: dict[str, Any], name: str) -> str:
    if name not in record:
        return ""
    return f"{record[name]:.2f} ± {record[f'{name}_se']:.2f}"


if __name__ == "__main__":
    main()
