"""Two latent dimensions on static MNIST: every guide and bound against the exact posterior.

A VAE (784–200–200–2 and back, Bernoulli) is fitted with a given prior and a mean-field guide;
its decoder then stands still, so that log p(x), by quadrature, is one number for each test image.
Beside the amortized mean-field guide stand one with full covariance and one with a flow, both
trained on the training images; local parameters of each test image's own; and the mean-field guide
refined by gradient steps. IWAE, annealing and Hamiltonian Monte Carlo are held to the same truth.

    python benchmarks/papers/small_latents.py run --prior standard --seed 0   # stops, goes on
    python benchmarks/papers/small_latents.py figure                          # for the README
    python benchmarks/papers/small_latents.py                                 # the table

No one has published this table, so there is nothing to meet.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_vae as pv

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/papers/small_latents.json"
RUNS = ROOT / "runs/papers/small_latents"
COST = "not measured yet"
HIDDEN, COMPONENTS, IWAE = (200, 200), 50, (5, 50, 500)
SLOW_ROWS = {"refined": 1000, "samplers": 250, "gaps": 64}
"""Test images, at most, for what takes long."""
MEANS_AND_SCALES = {"full covariance": [0, 1, 2, 4], "flow": [0, 1, 2, 3]}
"""Among the features of a family."""
PRIORS: dict[str, Callable[[Any, Tensor], Any]] = {
    "standard": lambda guide, x: pv.priors.StandardNormal(2),
    "mixture": lambda guide, x: pv.priors.GaussianMixture(2, COMPONENTS),
    "vamp": lambda guide, x: pv.priors.VampPrior.from_data(guide.posterior, x, COMPONENTS),
}
FIT: dict[str, Any] = {
    "batch_size": 250, "lr": 2e-3, "average": 0.999, "draws": 1, "compile": True,
    "progress": False,
}  # fmt: skip


def pair(prior: str, seed: int, x: Tensor) -> tuple[Any, Any]:
    """The VAE and its amortized mean-field guide, untrained."""
    torch.manual_seed(seed)
    guide = pv.guides.NormalGuide(encoder(pv.guides.NormalGuide))
    model = pv.models.VAE(
        pv.networks.MLP(2, *HIDDEN, 784),
        prior=PRIORS[prior](guide, x), likelihood=pv.likelihoods.Bernoulli(),
    )  # fmt: skip
    return model, guide


def encoder(kind: Any) -> Any:
    """The encoder that a family wants."""
    return pv.networks.MLP(784, *HIDDEN, kind.features(2))


def fitted(prior: str, seed: int, data: Any, epochs: int, folder: Path) -> tuple[Any, Any]:
    """The VAE and its guide, fitted once and read from the folder after."""
    model, guide = pair(prior, seed, data.train[0])
    pv.fit(model, guide, data, epochs=epochs, seed=seed, folder=folder / "mean-field", **FIT)
    return model.requires_grad_(False), guide.requires_grad_(False)


def amortized(
    name: str, first: Any, model: Any, seed: int, data: Any, epochs: int, folder: Path
) -> Any:
    """A guide of another family, for a model that stands still; a quarter of the epochs do.

    It starts as the mean-field guide: from nothing an encoder does not find its way about the
    latent plane of a finished decoder (7 nats worse after 30 epochs).
    """
    torch.manual_seed(seed + 1)
    if name == "flow":
        guide: Any = pv.guides.FlowGuide(encoder(pv.guides.FlowGuide), 2, hidden=(64,))
    else:
        guide = pv.guides.MultivariateNormalGuide(encoder(pv.guides.MultivariateNormalGuide))
    own, other = (list(g.encoder.parameters()) for g in (guide, first))
    with torch.no_grad():
        for mine, theirs in zip(own, other, strict=True):
            rows = slice(None) if mine.shape == theirs.shape else MEANS_AND_SCALES[name]
            mine.zero_()[rows] = theirs
    settings = FIT | {"compile": False, "folder": folder / name.replace(" ", "_")}
    pv.fit(model, guide, data, epochs=-(-epochs // 4), seed=seed, **settings)
    return guide


def local(guide: Any, model: Any, x: Tensor) -> Any:
    """Parameters of each test image's own, from where the encoder would have put them."""
    own = pv.guides.NormalGuide(pv.guides.Table(x, 4, start=guide.encoder))
    pv.fit(
        model, own, (x,), epochs=300, batch_size=500, lr=1e-2, measure_every=100, progress=False
    )
    return own


def truth(model: Any, x: Tensor, folder: Path) -> dict[str, Tensor]:
    """Log p(x), moments and the count of modes of each posterior, by quadrature; kept on disk."""
    parts = []
    for start in range(0, len(x), 250):
        path = folder / f"truth/{start}-{min(start + 250, len(x))}.npz"
        if not path.exists():
            exact = pv.posterior.quadrature(model, (x[start : start + 250],))
            modes = [modes_of(exact.density(b)[1]) for b in range(len(exact.mean))]
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(
                path, log_evidence=exact.log_evidence, error=exact.error, mean=exact.mean,
                sd=exact.sd, modes=modes,
            )  # fmt: skip
        parts.append(dict(np.load(path)))
    return {
        name: torch.as_tensor(np.concatenate([part[name] for part in parts])) for name in parts[0]
    }


def modes_of(density: Tensor, share: float = 0.05) -> int:
    """Local maxima of a density on a grid that are above a share of the highest."""
    around = torch.nn.functional.max_pool2d(density[None, None], 3, stride=1, padding=1)[0, 0]
    return int(((density == around) & (density > share * density.max())).sum())


def judged(
    model: Any, guide: Any, x: Tensor, exact: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A guide against the truth, in nats: means with standard errors over images, and by image."""
    evidence, several = exact["log_evidence"][: len(x)], exact["modes"][: len(x)] > 1
    found = pv.bounds(model, guide, (x,), draws=max(IWAE))
    kl = evidence - found.elbo
    off = ((found.draws.mean - exact["mean"][: len(x)]) / exact["sd"][: len(x)]).abs().amax(-1)
    bad, high = kl > 0.2, found.khat > 0.7
    below = {f"iwae_{max(IWAE)}": evidence - found.iwae} | {
        f"iwae_{k}": evidence - pv.bounds(model, guide, (x,), draws=k, keep=0, seed=k).iwae
        for k in IWAE[:-1]
    }
    figures = {
        "rows": len(x),
        **_mean("kl", kl),
        **_mean("kl_one_mode", kl[~several]),
        **_mean("kl_several_modes", kl[several]),
        **{k: v for name, gap in below.items() for k, v in _mean(f"{name}_below", gap).items()},
        "share_kl_above_0.2": bad.double().mean().item(),
        "share_mean_off": (off > 0.5).double().mean().item(),
        "share_khat_above_0.7": high.double().mean().item(),
        "caught_by_khat": (high & bad).sum().item() / max(1, int(bad.sum())),
        "false_alarms_of_khat": (high & ~bad).sum().item() / max(1, int(high.sum())),
    }
    return figures, {"kl": kl, "khat": found.khat}


def sampled(model: Any, guide: Any, x: Tensor, exact: dict[str, Tensor]) -> dict[str, Any]:
    """Hamiltonian Monte Carlo and annealing against the truth."""
    evidence, mean, sd = (exact[name][: len(x)] for name in ("log_evidence", "mean", "sd"))
    start = time.perf_counter()
    draws = pv.posterior.hmc(model, (x,), guide=guide, draws=500, progress=False)
    seconds = time.perf_counter() - start
    z = (draws.mean.double() - mean) / draws.mcse["z"].double()
    ais = pv.posterior.annealed(model, (x,), guide=guide, particles=16, progress=False)
    return {
        "rows": len(x),
        "hmc_seconds": seconds,
        "hmc_rms_z_of_means": z.square().mean().sqrt().item(),
        "hmc_worst_mean_error_sd": ((draws.mean.double() - mean) / sd).abs().max().item(),
        "hmc_in_trouble": sum(bool(t) for t in draws.trouble) / len(x),
        **_mean("ais_below", evidence - ais.log_evidence.cpu()),
    }


def split(model: Any, guide: Any, x: Tensor, exact: dict[str, Tensor]) -> dict[str, Any]:
    """How much of a guide's gap is its family's, and how much its encoder's."""
    evidence = exact["log_evidence"][: len(x)]
    found = pv.gaps(model, guide, (x,), log_evidence=evidence, progress=False)
    return {"rows": len(x), "settled": found.settled.double().mean().item()} | {
        key: value
        for name in ("approximation", "amortization")
        for key, value in _mean(name, getattr(found, name)).items()
    }


def _mean(name: str, values: Tensor) -> dict[str, float | None]:
    """A mean over images and its standard error; none of none."""
    values = values.double()
    return {
        name: values.mean().item() if len(values) else None,
        f"{name}_se": (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None,
    }


def run(prior: str, seed: int, rows: int, epochs: int, runs: Path) -> None:
    """One prior and one seed, from the fit to the record."""
    start, folder = time.process_time(), runs / f"{prior}-{seed}"
    data = pv.data.load("binarized_mnist")
    x = shuffled(data.test[0])[:rows]
    model, guide = fitted(prior, seed, data, epochs, folder)
    exact = truth(model, x, folder)
    guides = {
        "mean-field": guide,
        "full covariance": amortized("full covariance", guide, model, seed, data, epochs, folder),
        "flow": amortized("flow", guide, model, seed, data, epochs, folder),
        "local": local(guide, model, x),
        "refined": pv.guides.RefinedGuide(guide, model),
    }
    told = {
        name: judged(model, own, x[: SLOW_ROWS.get(name, rows)], exact)
        for name, own in guides.items()
    }
    few = x[: SLOW_ROWS["gaps"]]
    record = {
        "prior": prior, "seed": seed, "rows": len(x), "epochs": epochs,
        **_mean("log_evidence", exact["log_evidence"]),
        "quadrature_error": exact["error"].max().item(),
        "several_modes": (exact["modes"] > 1).double().mean().item(),
        "guides": {name: figures for name, (figures, _) in told.items()},
        "gaps": {
            name: split(model, guides[name], few, exact)
            for name in ("mean-field", "full covariance")
        },
        "samplers": sampled(model, guide, x[: SLOW_ROWS["samplers"]], exact),
        "cpu_seconds_of_this_call": time.process_time() - start, "device": platform.machine(),
        "cores": os.cpu_count(), "torch": torch.__version__, "pyro_vae": pv.__version__,
    }  # fmt: skip
    torch.save({name: images for name, (_, images) in told.items()}, folder / "images.pt")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [r for r in known if (r["prior"], r["seed"]) != (prior, seed)]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    kept = sorted([*kept, record], key=lambda r: (list(PRIORS).index(r["prior"]), r["seed"]))
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def shuffled(x: Tensor) -> Tensor:
    """Rows in an order of their own, the same for every run: a subset is the first of them."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def table() -> None:
    """Print what was measured: a row a guide, averaged over seeds."""
    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    print(
        "| prior | seeds | rows | log p(x) | several modes | guide | KL(q‖p) | KL > 0.2 "
        "| IWAE-50 below | k-hat > 0.7 | of KL > 0.2, k-hat finds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for prior in PRIORS:
        mine = [r for r in records if r["prior"] == prior]
        if not mine:
            continue
        seeds = ", ".join(str(r["seed"]) for r in mine)
        head = f"| {prior} | {seeds} | {mine[0]['rows']} | {_over(mine, 'log_evidence', 2)} | "
        head += f"{_share(mine, 'several_modes')} "
        for name in mine[0]["guides"]:
            own = [r["guides"][name] for r in mine]
            cells = [name, _over(own, "kl", 3), _share(own, "share_kl_above_0.2")]
            cells += [_over(own, "iwae_50_below", 4), _share(own, "share_khat_above_0.7")]
            print(f"{head}| {' | '.join([*cells, _share(own, 'caught_by_khat')])} |")


def _over(records: list[dict[str, Any]], name: str, digits: int) -> str:
    """Mean and standard error over seeds, or over images where there is one seed."""
    values = [r[name] for r in records]
    error = (
        float(np.std(values, ddof=1)) / len(values) ** 0.5
        if len(values) > 1
        else records[0][f"{name}_se"]
    )
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def _share(records: list[dict[str, Any]], name: str) -> str:
    return f"{np.mean([r[name] for r in records]):.1%}"


def figure(runs: Path, prior: str = "standard", seed: int = 0, digits: int = 6) -> None:
    """Draw the table, what k-hat sees, and the digits that no Gaussian can represent."""
    from matplotlib.figure import Figure

    records = json.loads(RESULTS.read_text())
    (record,) = [r for r in records if (r["prior"], r["seed"]) == (prior, seed)]
    folder, data = runs / f"{prior}-{seed}", pv.data.load("binarized_mnist")
    x = shuffled(data.test[0])[: record["rows"]]
    model, guide = fitted(prior, seed, data, record["epochs"], folder)
    full = amortized("full covariance", guide, model, seed, data, record["epochs"], folder)
    images, modes = torch.load(folder / "images.pt"), truth(model, x, folder)["modes"]
    kl = images["full covariance"]["kl"].where(modes > 1, -torch.inf)
    worst = kl.topk(digits).indices

    page = Figure(figsize=(12, 8), dpi=150, layout="constrained")
    top, bottom = page.subfigures(2, 1, height_ratios=[1, 1.15])
    left, right = top.subplots(1, 2, width_ratios=[1.5, 1])
    _dots(left, records)
    _khat(right, images["mean-field"])
    rows = (x[worst],)
    draws = pv.bounds(model, full, rows, draws=1000).draws
    means = pv.observation(model, {"z": draws.mean.to(rows[0])}, rows).mean
    pv.plots.comparison(
        bottom, pv.posterior.quadrature(model, rows), draws, None, range(digits),
        [f"{modes[b]} modes, KL {kl[b]:.2f} nats" for b in worst],
        pictures=list(zip(rows[0], means, strict=True)), shape=data.image_shape,
    )  # fmt: skip
    bottom.suptitle(
        "What a Gaussian cannot represent: the guide with full covariance where it is worst",
        fontsize=11,
    )
    page.savefig(ROOT / "docs/small_latents.png")


def _dots(ax: Any, records: list[dict[str, Any]]) -> None:
    names = list(records[0]["guides"])
    for offset, (prior, marker) in enumerate(zip(PRIORS, "osD", strict=True)):
        mine = [r["guides"] for r in records if r["prior"] == prior]
        for record in mine:
            ax.errorbar(
                [record[name]["kl"] for name in names],
                np.arange(len(names)) + 0.2 * (offset - 1),
                xerr=[2 * record[name]["kl_se"] for name in names],
                fmt=marker, color=f"C{offset}", markersize=5, alpha=0.8,
                label=prior if record is mine[0] else None,
            )  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("KL(q(z|x) ‖ p(z|x)), nats an image; bars: 2 standard errors over images")
    ax.set_title("Distance from the exact posterior, by guide and prior", fontsize=11)
    ax.legend(title="prior", frameon=False)
    ax.grid(axis="x", alpha=0.3)


def _khat(ax: Any, images: dict[str, Tensor]) -> None:
    kl = images["kl"].clamp_min(1e-3)
    ax.plot(kl, images["khat"], ".", markersize=2, alpha=0.5, rasterized=True)
    ax.axhline(0.7, color="0.4", lw=0.8)
    ax.axvline(0.2, color="0.4", lw=0.8)
    ax.set_xscale("log")
    ax.set_xlabel("KL(q ‖ p), nats")
    ax.set_ylabel("k-hat")
    missed = ((images["khat"] <= 0.7) & (images["kl"] > 0.2)).double().mean()
    ax.set_title(f"What k-hat misses: {missed:.0%} of images, at the lower right", fontsize=11)


def main() -> None:
    """Run a prior and seed, draw the figure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "figure", "table"), default="table")
    parser.add_argument("--prior", choices=tuple(PRIORS), default="standard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=10_000, help="test images, shuffled")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=RUNS)
    options = parser.parse_args()
    if options.what == "run":
        run(options.prior, options.seed, options.rows, options.epochs, options.runs)
    if options.what == "figure":
        return figure(options.runs)
    table()


if __name__ == "__main__":
    main()
