"""Two latent dimensions on static MNIST: every guide and bound against the exact posterior.

A VAE (784–200–200–2 and back, Bernoulli) is fitted with a given prior and a mean-field guide;
its decoder then stands still, so that log p(x), by quadrature, is one number for each test image.
Amortized guides, mean-field, with full covariance and with a flow, go on from there on the
training images, as long each; beside them stand local parameters of each test image's own, climbed
to from where the encoder puts them and from the exact posterior's peak, and the mean-field guide
refined by gradient steps. The gap of the mean-field guide has three parts then: what the better of
both local Gaussians leaves is the family's, what the climb from the encoder leaves more is the
search's, and the rest is amortization. IWAE, annealing and Hamiltonian Monte Carlo are
held to the same truth.

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
from pyro.infer import Trace_ELBO
from scipy.ndimage import label, maximum
from torch import Tensor

import pyro_vae as pv

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/papers/small_latents.json"
RUNS = ROOT / "runs/papers/small_latents"
COST = "35 minutes of one core for a prior and seed, 10,000 images; fitting the guides aside"
HIDDEN, COMPONENTS, IWAE = (200, 200), 50, (5, 50, 500)
SLOW_ROWS = {"local": 1000, "refined": 1000, "samplers": 250, "gaps": 64}
"""Test images, at most, for what takes long."""
FAMILIES: dict[str, tuple[Any, list[int]]] = {
    "mean-field": (pv.guides.NormalGuide, [0, 1, 2, 3]),
    "full covariance": (pv.guides.MultivariateNormalGuide, [0, 1, 2, 4]),
    "flow": (lambda net: pv.guides.FlowGuide(net, 2, hidden=(64,)), [0, 1, 2, 3]),
}
"""Amortized guides, and which of their features are means and raw scales."""
FEATURES = {"mean-field": 4, "full covariance": 5, "flow": pv.guides.FlowGuide.features(2)}
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
    guide = pv.guides.NormalGuide(pv.networks.MLP(784, *HIDDEN, 4))
    model = pv.models.VAE(
        pv.networks.MLP(2, *HIDDEN, 784),
        prior=PRIORS[prior](guide, x), likelihood=pv.likelihoods.Bernoulli(),
    )  # fmt: skip
    return model, guide


def fitted(prior: str, seed: int, data: Any, epochs: int, folder: Path) -> tuple[Any, Any]:
    """The VAE and its guide, fitted once and read from the folder after."""
    model, guide = pair(prior, seed, data.train[0])
    pv.fit(model, guide, data, epochs=epochs, seed=seed, folder=folder / "pair", **FIT)
    return model.requires_grad_(False), guide.requires_grad_(False)


def amortized(
    name: str, first: Any, model: Any, seed: int, data: Any, epochs: int, folder: Path
) -> Any:
    """A guide of some family, for a model that stands still, after a quarter of the epochs.

    Its encoder starts as that of the pair: from nothing one does not find its way about the latent
    plane of a finished decoder.
    """
    torch.manual_seed(seed + 1)
    family, rows = FAMILIES[name]
    guide = family(pv.networks.MLP(784, *HIDDEN, FEATURES[name]))
    with torch.no_grad():
        for own, there in zip(guide.encoder.parameters(), first.encoder.parameters(), strict=True):
            place = rows if len(own) == FEATURES[name] else slice(None)
            own.zero_()[place] = there
    settings = FIT | {"compile": False, "folder": folder / name.replace(" ", "_")}
    pv.fit(model, guide, data, epochs=-(-epochs // 4), seed=seed, **settings)
    return guide


def local(model: Any, x: Tensor, start: Callable[[Tensor], Tensor], steps: int = 400) -> Any:
    """Parameters of each test image's own, climbed to from where `start` puts them."""
    own = pv.guides.NormalGuide(pv.guides.Table(x, 4, start=start))
    epochs = -(-steps // -(-len(x) // 1000))
    pv.fit(
        model, own, (x,), epochs=epochs, batch_size=1000, lr=0.03, schedule=pv.svi.cosine(steps),
        objective=Trace_ELBO(num_particles=8, vectorize_particles=True), measure_every=epochs,
        progress=False,
    )  # fmt: skip
    return own


def peak(exact: dict[str, Tensor], rows: int) -> Callable[[Tensor], Tensor]:
    """Where the exact density is highest, with the sd of a round Gaussian that is as high."""
    sd = (2 * np.pi * exact["height"][:rows]).rsqrt()
    raw = sd.expm1().log().unsqueeze(-1).expand(-1, 2)
    return lambda x: torch.cat([exact["peak"][:rows], raw], -1).to(x)


def truth(model: Any, x: Tensor, folder: Path) -> dict[str, Tensor]:
    """Log p(x), moments, modes and peak of each posterior, by quadrature; kept on disk."""
    parts = []
    for start in range(0, len(x), 2500):
        rows = x[start : start + 2500]
        path = folder / f"truth/{start}-{start + len(rows)}.npz"
        if not path.exists():
            exact = pv.posterior.quadrature(model, (rows,))
            densities = [exact.density(b) for b in range(len(exact.mean))]
            highest = [(z.flatten(0, 1)[d.argmax()], d.max()) for z, d in densities]
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(
                path.with_suffix(".part.npz"), log_evidence=exact.log_evidence,
                error=exact.error, mean=exact.mean, sd=exact.sd,
                modes=[modes_of(density) for _, density in densities],
                peak=torch.stack([z for z, _ in highest]),
                height=torch.stack([height for _, height in highest]),
            )  # fmt: skip
            path.with_suffix(".part.npz").replace(path)
        parts.append(dict(np.load(path)))
    return {
        name: torch.as_tensor(np.concatenate([part[name] for part in parts])) for name in parts[0]
    }


def modes_of(density: Tensor) -> int:
    """Modes of a density on a grid: peaks at least twice as high as the pass between them.

    At a level t those are the connected parts of {density > t} that reach 2t; of all levels from
    the highest down to a fortieth of it, the one with most counts.
    """
    values = (density / density.max()).numpy()
    counts = []
    for level in np.geomspace(0.5, 0.025, 12):
        parts, count = label(values > level, structure=np.ones((3, 3)))
        peaks = maximum(values, parts, range(1, count + 1))
        counts.append(int((peaks >= 2 * level).sum()))
    return max(counts)


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
        "kl_median": kl.median().item(),
        **_mean("kl_one_mode", kl[~several]),
        **_mean("kl_several_modes", kl[several]),
        **{k: v for name, gap in below.items() for k, v in _mean(f"{name}_below", gap).items()},
        **_mean("kl_above_0.2", bad),
        **_mean("mean_off_by_half_sd", off > 0.5),
        **_mean("khat_above_0.7", high),
        **_mean("khat_above_0.7_of_bad", high[bad]),
        **_mean("khat_above_0.7_of_good", high[~bad]),
    }
    return figures, {"kl": kl, "khat": found.khat}


def sampled(model: Any, guide: Any, x: Tensor, exact: dict[str, Tensor]) -> dict[str, Any]:
    """Hamiltonian Monte Carlo and annealing against the truth."""
    evidence, mean, sd = (exact[name][: len(x)] for name in ("log_evidence", "mean", "sd"))
    draws = pv.posterior.hmc(model, (x,), guide=guide, draws=500, progress=False)
    off = ((draws.mean.double() - mean) / sd).abs().amax(-1) > 0.5
    flagged = torch.tensor([bool(trouble) for trouble in draws.trouble])
    ais = pv.posterior.annealed(model, (x,), guide=guide, particles=16, progress=False)
    below = evidence - ais.log_evidence.cpu()
    return {
        "rows": len(x),
        **_mean("hmc_mean_off_by_half_sd", off),
        **_mean("hmc_flagged", flagged),
        **_mean("hmc_off_and_not_flagged", off & ~flagged),
        "hmc_median_ess": draws.ess["z"].amin(-1).median().item(),
        **_mean("ais_below", below),
        "ais_below_median": below.median().item(),
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
    start, folder = time.process_time(), runs / f"{prior}-{seed}-{epochs}"
    data = pv.data.load("binarized_mnist")
    x = shuffled(data.test[0])[:rows]
    model, guide = fitted(prior, seed, data, epochs, folder)
    exact = truth(model, x, folder)
    guides = {name: amortized(name, guide, model, seed, data, epochs, folder) for name in FAMILIES}
    mean_field = guides["mean-field"]
    few = SLOW_ROWS["local"]
    guides["local"] = local(model, x[:few], mean_field.encoder)
    guides["local, at the peak"] = local(model, x[:few], peak(exact, few))
    guides["refined"] = pv.guides.RefinedGuide(mean_field, model)
    told = {
        name: judged(model, own, x[: SLOW_ROWS.get(name.split(",")[0], rows)], exact)
        for name, own in guides.items()
    }
    for figures, images in told.values():
        first = told["mean-field"][1]["kl"][: len(images["kl"])]
        figures |= _mean("kl_beyond_mean_field", images["kl"] - first)
    near = [told[name][1]["kl"] for name in ("local", "local, at the peak")]
    best = torch.minimum(*near)
    record = {
        "prior": prior, "seed": seed, "rows": len(x), "epochs": epochs,
        **_mean("log_evidence", exact["log_evidence"]),
        "quadrature_error": exact["error"].max().item(),
        **_mean("several_modes", exact["modes"] > 1),
        "guides": {name: figures for name, (figures, _) in told.items()},
        "parts": {
            "rows": len(best),
            **_mean("family", best),
            **_mean("family_above_0.2", best > 0.2),
            **_mean("search", near[0] - best),
            **_mean("amortization", told["mean-field"][1]["kl"][: len(best)] - near[0]),
        },
        "gaps": {
            name: split(model, guides[name], x[: SLOW_ROWS["gaps"]], exact)
            for name in ("mean-field", "full covariance")
        },
        "samplers": sampled(model, mean_field, x[: SLOW_ROWS["samplers"]], exact),
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
    """Print what was measured; ± are standard errors over seeds, or images where there is one."""
    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    print(
        "| prior | seeds | log p(x) | several modes | guide | images | KL(q‖p) | median "
        "| beyond mean-field | IWAE-50 below | KL > 0.2 | k-hat > 0.7 of these | of the others |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for prior in PRIORS:
        mine = [r for r in records if r["prior"] == prior]
        for name in mine[0]["guides"] if mine else ():
            own = [r["guides"][name] for r in mine]
            cells = [
                prior,
                ", ".join(str(r["seed"]) for r in mine),
                _over(mine, "log_evidence", 2),
                _over(mine, "several_modes", 1, percent=True),
                name,
                ", ".join(sorted({f"{g['rows']:,}" for g in own})),
                _over(own, "kl", 2),
                f"{np.mean([g['kl_median'] for g in own]):.2f}",
                _over(own, "kl_beyond_mean_field", 2),
                _over(own, "iwae_50_below", 2),
                *(
                    _over(own, share, 1, percent=True)
                    for share in (
                        "kl_above_0.2",
                        "khat_above_0.7_of_bad",
                        "khat_above_0.7_of_good",
                    )
                ),
            ]
            print(f"| {' | '.join(cells)} |")

    print(
        "\n| prior | family | > 0.2 | search | amortization | `gaps`: approximation "
        "| amortization | AIS-16 below, median | HMC mean off by half a sd | flagged "
        "| off, not flagged | median ESS |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for prior in PRIORS:
        mine = [r for r in records if r["prior"] == prior]
        if not mine:
            continue
        parts, split = ([r[of] for r in mine] for of in ("parts", "gaps"))
        samplers, split = [r["samplers"] for r in mine], [s["mean-field"] for s in split]
        cells = [
            prior,
            _over(parts, "family", 2),
            _over(parts, "family_above_0.2", 1, percent=True),
            *(_over(parts, name, 2) for name in ("search", "amortization")),
            *(_over(split, name, 2) for name in ("approximation", "amortization")),
            f"{np.mean([s['ais_below_median'] for s in samplers]):.2f}",
            *(
                _over(samplers, f"hmc_{share}", 1, percent=True)
                for share in ("mean_off_by_half_sd", "flagged", "off_and_not_flagged")
            ),
            f"{np.mean([s['hmc_median_ess'] for s in samplers]):,.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


def _over(records: list[dict[str, Any]], name: str, digits: int, *, percent: bool = False) -> str:
    """Mean and standard error over seeds, or over images where there is one seed."""
    values, factor = [r[name] for r in records], 100 if percent else 1
    if None in values:
        return "–"
    error = records[0][f"{name}_se"]
    if len(values) > 1:
        error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    if error is None:
        return "–"
    unit = " %" if percent else ""
    return f"{factor * np.mean(values):.{digits}f} ± {factor * error:.{digits}f}{unit}"


def figure(runs: Path, prior: str = "standard", seed: int = 0, digits: int = 6) -> None:
    """Draw the table, what k-hat sees, and posteriors that no Gaussian can represent."""
    from matplotlib.figure import Figure

    records = json.loads(RESULTS.read_text())
    (record,) = [r for r in records if (r["prior"], r["seed"]) == (prior, seed)]
    folder = runs / f"{prior}-{seed}-{record['epochs']}"
    data = pv.data.load("binarized_mnist")
    x = shuffled(data.test[0])[: record["rows"]]
    model, _ = fitted(prior, seed, data, record["epochs"], folder)
    images, exact = torch.load(folder / "images.pt"), truth(model, x, folder)
    near = images["local, at the peak"]["kl"]
    best = torch.minimum(images["local"]["kl"], near)
    worst = torch.where(near == best, best, -torch.inf).argsort(descending=True)[:digits]
    rows = (x[worst],)

    page = Figure(figsize=(12, 7.6), dpi=150, layout="constrained")
    top, bottom = page.subfigures(2, 1, height_ratios=[1, 1.15])
    left, right = top.subplots(1, 2, width_ratios=[1.5, 1])
    _dots(left, records)
    _khat(right, images["mean-field"], f"{prior} prior, amortized mean-field")
    guide = local(model, rows[0], peak({name: v[worst] for name, v in exact.items()}, digits))
    draws = pv.bounds(model, guide, rows, draws=1000).draws
    means = pv.observation(model, {"z": draws.mean.to(rows[0])}, rows).mean
    pv.plots.comparison(
        bottom, pv.posterior.quadrature(model, rows), draws, None, range(len(worst)),
        [f"modes: {exact['modes'][b]}, KL {best[b]:.2f} nats" for b in worst],
        pictures=list(zip(rows[0], means, strict=True)), shape=data.image_shape,
    )  # fmt: skip
    bottom.suptitle(
        f"{prior} prior: the images of {len(best):,} that a Gaussian of their own, climbed to "
        "from the exact posterior's peak, represents worst",
        fontsize=11,
    )
    page.savefig(ROOT / "docs/small_latents.png")


def _dots(ax: Any, records: list[dict[str, Any]]) -> None:
    names = list(records[0]["guides"])
    for offset, (prior, marker) in enumerate(zip(PRIORS, "osD", strict=True)):
        mine = [r["guides"] for r in records if r["prior"] == prior]
        places = np.arange(len(names)) + 0.2 * (offset - 1)
        for i, record in enumerate(mine):
            ax.errorbar(
                [record[name]["kl"] for name in names], places,
                xerr=[2 * record[name]["kl_se"] for name in names],
                fmt=marker, color=f"C{offset}", markersize=5, alpha=0.8,
                label=None if i else prior,
            )  # fmt: skip
            ax.plot(
                [record[name]["kl_median"] for name in names], places, marker,
                color=f"C{offset}", mfc="none", markersize=5, alpha=0.8,
            )  # fmt: skip
    ax.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xscale("log")
    ax.set_xlabel("KL(q(z|x) ‖ p(z|x)), nats: mean, 2 standard errors over images; hollow: median")
    ax.set_title("Distance from the exact posterior, by guide and prior", fontsize=11)
    ax.legend(title="prior", frameon=False)
    ax.grid(axis="x", alpha=0.3)


def _khat(ax: Any, images: dict[str, Tensor], whose: str) -> None:
    kl = images["kl"].clamp_min(1e-3)
    ax.plot(kl, images["khat"], ".", markersize=2, alpha=0.5, rasterized=True)
    ax.axhline(0.7, color="0.4", lw=0.8)
    ax.axvline(0.2, color="0.4", lw=0.8)
    ax.set_xscale("log")
    ax.set_xlabel(f"KL(q ‖ p), nats; {whose}")
    ax.set_ylabel("k-hat")
    bad = images["kl"] > 0.2
    missed = (images["khat"][bad] <= 0.7).double().mean()
    ax.set_title(f"k-hat misses {missed:.0%} of images with KL > 0.2", fontsize=11)


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
