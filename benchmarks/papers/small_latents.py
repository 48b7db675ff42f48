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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import Trace_ELBO
from records import Kept, machine, mean, read, write
from scipy.ndimage import label, maximum
from torch import Tensor

import pyro_vae as pv

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/papers/small_latents.json"
COST = "an hour of one core for a prior and seed"
HIDDEN, COMPONENTS, EPOCHS, IWAE = (200, 200), 50, 60, (5, 50, 500)
ROWS, CHUNK = 10_000, 2500
"""Test images, and how many are integrated at once."""
FEW = {"local": 1000, "samplers": 250, "gaps": 64}
"""Test images, at most, for what takes long."""
FAMILIES: dict[str, tuple[Any, list[int]]] = {
    "mean-field": (pv.guides.NormalGuide, [0, 1, 2, 3]),
    "full covariance": (pv.guides.MultivariateNormalGuide, [0, 1, 2, 4]),
    "flow": (lambda net: pv.guides.FlowGuide(net, 2, hidden=(64,)), [0, 1, 2, 3]),
}
"""Amortized guides, and which of their features are means and raw scales."""
FEATURES = {"mean-field": 4, "full covariance": 5, "flow": pv.guides.FlowGuide.features(2)}
PRIORS: dict[str, Callable[[Any, Tensor, int], Any]] = {
    "standard": lambda guide, x, seed: pv.priors.StandardNormal(2),
    "mixture": lambda guide, x, seed: pv.priors.GaussianMixture(2, COMPONENTS, seed=seed),
    "vamp": lambda guide, x, seed: pv.priors.VampPrior.from_data(
        guide.posterior, x, COMPONENTS, seed=seed
    ),
}
FIT: dict[str, Any] = {
    "batch_size": 250, "lr": 2e-3, "average": 0.999, "draws": 1, "compile": True,
    "progress": False,
}  # fmt: skip


def fitted(prior: str, seed: int, data: Any, folder: Path) -> tuple[Any, Any, Any]:
    """The VAE and its amortized mean-field guide, fitted once and read from the folder after."""
    torch.manual_seed(seed)
    guide = pv.guides.NormalGuide(pv.networks.MLP(784, *HIDDEN, 4))
    model = pv.models.VAE(
        pv.networks.MLP(2, *HIDDEN, 784),
        prior=PRIORS[prior](guide, data.train[0], seed), likelihood=pv.likelihoods.Bernoulli(),
    )  # fmt: skip
    run = pv.fit(model, guide, data, epochs=EPOCHS, seed=seed, folder=folder / "pair", **FIT)
    return model.requires_grad_(False), guide.requires_grad_(False), run


def amortized(
    name: str, first: Any, model: Any, seed: int, data: Any, folder: Path
) -> tuple[Any, Any]:
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
    run = pv.fit(model, guide, data, epochs=-(-EPOCHS // 4), seed=seed, **settings)
    return guide, run


def local(x: Tensor, features: Tensor) -> Any:
    """A mean-field Gaussian of each image's own."""
    return pv.guides.NormalGuide(pv.guides.Table(x, 4, start=lambda _: features))


def climbed(model: Any, x: Tensor, start: Tensor, seed: int, steps: int = 400) -> Tensor:
    """Features of each image's own Gaussian, climbed to from those given."""
    own = local(x, start)
    epochs = -(-steps // -(-len(x) // 1000))
    pv.fit(
        model, own, (x,), epochs=epochs, batch_size=1000, lr=0.03, schedule=pv.svi.cosine(steps),
        objective=Trace_ELBO(num_particles=8, vectorize_particles=True), measure_every=epochs,
        progress=False, seed=seed,
    )  # fmt: skip
    return own.encoder(x).detach()


def at_peak(exact: dict[str, Tensor], rows: int) -> Tensor:
    """Features of a round Gaussian at the highest density, and as high."""
    sd = (2 * np.pi * exact["height"][:rows]).rsqrt()
    raw = pv.networks.raw_positive(sd.clamp_min(1e-3)).unsqueeze(-1).expand(-1, 2)
    return torch.cat([exact["peak"][:rows], raw], -1).float()


def truth(model: Any, x: Tensor, kept: Kept) -> dict[str, Tensor]:
    """Log p(x), moments, modes and peak of each posterior, by quadrature."""
    parts = [
        kept(f"truth-{k}-of-{CHUNK}", lambda rows=rows: integrated(model, rows))
        for k, rows in enumerate(x.split(CHUNK))
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def integrated(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What quadrature tells of some images."""
    exact = pv.posterior.quadrature(model, (x,))
    densities = [exact.density(b) for b in range(len(x))]
    highest = [(z.flatten(0, 1)[d.argmax()], d.max()) for z, d in densities]
    return {
        "log_evidence": exact.log_evidence, "error": exact.error,
        "mean": exact.mean, "sd": exact.sd,
        "modes": torch.tensor([modes_of(density) for _, density in densities]),
        "peak": torch.stack([z for z, _ in highest]),
        "height": torch.stack([height for _, height in highest]),
    }  # fmt: skip


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
    model: Any, guide: Any, x: Tensor, exact: dict[str, Tensor], seed: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A guide against the truth, in nats: means with standard errors over images, and by image."""
    evidence, several = exact["log_evidence"][: len(x)], exact["modes"][: len(x)] > 1
    found = pv.bounds(model, guide, (x,), draws=max(IWAE), seed=seed)
    kl = evidence - found.elbo
    off = ((found.draws.mean - exact["mean"][: len(x)]) / exact["sd"][: len(x)]).abs().amax(-1)
    bad, high = kl > 0.2, found.khat > 0.7
    below = {f"iwae_{max(IWAE)}": evidence - found.iwae} | {
        f"iwae_{k}": evidence - pv.bounds(model, guide, (x,), draws=k, keep=0, seed=seed + k).iwae
        for k in IWAE[:-1]
    }
    wrong = below[f"iwae_{max(IWAE)}"] > 0.1
    figures = {
        "rows": len(x),
        **mean("kl", kl),
        "kl_median": kl.median().item(),
        "kl_share_of_worst_20th": (
            kl.sort(descending=True).values[: max(1, len(x) // 20)].sum() / kl.sum()
        ).item(),
        **mean("kl_one_mode", kl[~several]),
        **mean("kl_several_modes", kl[several]),
        **{k: v for name, gap in below.items() for k, v in mean(f"{name}_below", gap).items()},
        **mean("kl_above_0.2", bad),
        **mean("mean_off_by_half_sd", off > 0.5),
        **mean("khat_above_0.7", high),
        **mean("khat_above_0.7_of_bad", high[bad]),
        **mean("khat_above_0.7_of_good", high[~bad]),
        **mean("iwae_wrong", wrong),
        **mean("khat_above_0.7_of_iwae_wrong", high[wrong]),
        **mean("khat_above_0.7_of_iwae_right", high[~wrong]),
    }
    return figures, {"kl": kl, "khat": found.khat}


def sampled(
    model: Any, guide: Any, x: Tensor, exact: dict[str, Tensor], seed: int
) -> dict[str, Any]:
    """Hamiltonian Monte Carlo and annealing against the truth."""
    evidence, center, sd = (exact[name][: len(x)] for name in ("log_evidence", "mean", "sd"))
    draws = pv.posterior.hmc(model, (x,), guide=guide, draws=500, seed=seed, progress=False)
    off = ((draws.mean.double() - center) / sd).abs().amax(-1) > 0.5
    flagged = torch.tensor([bool(trouble) for trouble in draws.trouble])
    ais = pv.posterior.annealed(model, (x,), guide=guide, particles=16, seed=seed, progress=False)
    below = evidence - ais.log_evidence.cpu()
    return {
        "rows": len(x),
        **mean("hmc_mean_off_by_half_sd", off),
        **mean("hmc_flagged", flagged),
        **mean("hmc_off_and_not_flagged", off & ~flagged),
        "hmc_median_ess": draws.ess["z"].amin(-1).median().item(),
        **mean("ais_below", below),
        "ais_below_median": below.median().item(),
    }


def split(
    model: Any, guide: Any, x: Tensor, exact: dict[str, Tensor], seed: int
) -> dict[str, Any]:
    """How much of a guide's gap is its family's, and how much its encoder's."""
    evidence = exact["log_evidence"][: len(x)]
    found = pv.gaps(model, guide, (x,), log_evidence=evidence, seed=seed, progress=False)
    return {"rows": len(x), "settled": found.settled.double().mean().item()} | {
        key: value
        for name in ("approximation", "amortization")
        for key, value in mean(name, getattr(found, name)).items()
    }


def run(prior: str, seed: int, runs: Path) -> None:
    """One prior and one seed, from the fit to the record."""
    data = pv.data.load("binarized_mnist")
    x = shuffled(data.test[0])[:ROWS]
    folder = runs / f"{prior}-{seed}"
    model, first, pair = fitted(prior, seed, data, folder)
    kept = Kept(folder, model, first)
    exact = truth(model, x, kept)
    fits = {name: amortized(name, first, model, seed, data, kept.folder) for name in FAMILIES}
    guides = {name: guide for name, (guide, _) in fits.items()}
    mean_field, few = guides["mean-field"], x[: FEW["local"]]
    starts = {
        "local": mean_field.encoder(few).detach(), "local, at the peak": at_peak(exact, len(few))
    }  # fmt: skip
    features = {
        name: kept(f"{name}, climbed", lambda start=start: climbed(model, few, start, seed))
        for name, start in starts.items()
    }
    guides |= {name: local(few, own) for name, own in features.items()}
    guides["refined"] = pv.guides.RefinedGuide(mean_field, model)
    told = {
        name: kept(name, lambda own=own, name=name: judged(
            model, own, x if name in FAMILIES else few, exact, seed
        ))
        for name, own in guides.items()
    }  # fmt: skip
    for figures, images in told.values():
        alone = told["mean-field"][1]["kl"][: len(images["kl"])]
        figures |= mean("kl_beyond_mean_field", images["kl"] - alone)
    near = [told[name][1]["kl"] for name in starts]
    best = torch.minimum(*near)
    parts = {
        "family": best, "search": near[0] - best,
        "amortization": told["mean-field"][1]["kl"][: len(few)] - near[0],
    }  # fmt: skip
    record = {
        "prior": prior, "seed": seed, "rows": len(x), "epochs": EPOCHS,
        **mean("log_evidence", exact["log_evidence"]),
        "quadrature_error": exact["error"].max().item(),
        "quadrature_error_above_1e-4": int((exact["error"] > 1e-4).sum()),
        **mean("several_modes", exact["modes"] > 1),
        "guides": {name: figures for name, (figures, _) in told.items()},
        "parts": {
            "rows": len(few),
            **{k: v for name, part in parts.items() for k, v in mean(name, part).items()},
            **{f"{name}_median": part.median().item() for name, part in parts.items()},
            **mean("family_above_0.2", best > 0.2),
            **mean("search_above_0.2", parts["search"] > 0.2),
        },
        "gaps": {
            name: kept(f"gaps of {name}", lambda name=name: split(
                model, guides[name], x[: FEW["gaps"]], exact, seed
            ))
            for name in ("mean-field", "full covariance")
        },
        "samplers": kept(
            "samplers", lambda: sampled(model, mean_field, x[: FEW["samplers"]], exact, seed)
        ),
        "seconds": {"pair": pair.seconds}
        | {f"{name}, fitted": fit.seconds for name, (_, fit) in fits.items()} | kept.seconds,
        **machine(),
    }  # fmt: skip
    write(RESULTS, record, ("prior", "seed"), list(PRIORS))


def shuffled(x: Tensor) -> Tensor:
    """Rows in an order of their own, the same for every run: a subset is the first of them."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def table() -> None:
    """Print what was measured; ± are standard errors over seeds, or images where there is one."""
    records = read(RESULTS)
    print(
        "| prior | seeds | log p(x) | several modes | guide | images | KL(q‖p) | median "
        "| worst 5 % | beyond mean-field | IWAE-50 below | KL > 0.2 | k-hat > 0.7 of these "
        "| of the others | IWAE-500 below by > 0.1 | k-hat > 0.7 of these | of the others |"
    )
    print("|---" * 17 + "|")
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
                f"{own[0]['rows']:,}",
                _over(own, "kl", 2),
                f"{np.mean([g['kl_median'] for g in own]):.2f}",
                f"{np.mean([g['kl_share_of_worst_20th'] for g in own]):.0%}",
                _over(own, "kl_beyond_mean_field", 2),
                _over(own, "iwae_50_below", 2),
                *(
                    _over(own, share, 1, percent=True)
                    for share in (
                        "kl_above_0.2",
                        "khat_above_0.7_of_bad",
                        "khat_above_0.7_of_good",
                        "iwae_wrong",
                        "khat_above_0.7_of_iwae_wrong",
                        "khat_above_0.7_of_iwae_right",
                    )
                ),
            ]
            print(f"| {' | '.join(cells)} |")

    print(
        "\n| prior | family | > 0.2 | search | > 0.2 | amortization | medians "
        "| `gaps`: approximation | amortization | AIS-16 below | median "
        "| HMC mean off by half a sd | flagged | off, not flagged | median ESS |"
    )
    print("|---" * 15 + "|")
    for prior in PRIORS:
        mine = [r for r in records if r["prior"] == prior]
        if not mine:
            continue
        parts, samplers = ([r[of] for r in mine] for of in ("parts", "samplers"))
        gaps = [r["gaps"]["mean-field"] for r in mine]
        medians = (
            np.mean([p[f"{name}_median"] for p in parts])
            for name in ("family", "search", "amortization")
        )
        cells = [
            prior,
            _over(parts, "family", 2),
            _over(parts, "family_above_0.2", 1, percent=True),
            _over(parts, "search", 2),
            _over(parts, "search_above_0.2", 1, percent=True),
            _over(parts, "amortization", 2),
            ", ".join(f"{median:.2f}" for median in medians),
            *(_over(gaps, name, 2) for name in ("approximation", "amortization")),
            _over(samplers, "ais_below", 2),
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


def figure(prior: str, seed: int, runs: Path, digits: int = 6) -> None:
    """Draw the table, what k-hat sees, and posteriors that no Gaussian can represent."""
    from matplotlib.figure import Figure

    data = pv.data.load("binarized_mnist")
    x = shuffled(data.test[0])[:ROWS]
    model, first, _ = fitted(prior, seed, data, runs / f"{prior}-{seed}")
    kept = Kept(runs / f"{prior}-{seed}", model, first)
    exact = truth(model, x, kept)
    names = ("local", "local, at the peak")
    found = torch.stack([_kept(kept, name)[1]["kl"] for name in names])
    best, which = found.min(0)
    worst = best.argsort(descending=True)[:digits]
    rows = (x[worst],)

    page = Figure(figsize=(12, 7.6), dpi=150, layout="constrained")
    top, bottom = page.subfigures(2, 1, height_ratios=[1, 1.15])
    left, right = top.subplots(1, 2, width_ratios=[1.5, 1])
    _dots(left, read(RESULTS))
    _khat(right, _kept(kept, "mean-field")[1], f"{prior} prior, seed {seed}, mean-field")
    features = torch.stack([_kept(kept, f"{name}, climbed") for name in names])
    draws = pv.bounds(model, local(*rows, features[which[worst], worst]), rows, draws=1000).draws
    means = pv.observation(model, {"z": draws.mean.to(rows[0])}, rows).mean
    pv.plots.comparison(
        bottom, pv.posterior.quadrature(model, rows), draws, None, range(len(worst)),
        [f"modes: {exact['modes'][b]}, KL {best[b]:.2f} nats" for b in worst],
        pictures=list(zip(rows[0], means, strict=True)), shape=data.image_shape,
    )  # fmt: skip
    bottom.suptitle(
        f"{prior} prior, seed {seed}: the images of {len(best):,} that their own Gaussian "
        "represents worst\n"
        "(the better of one climbed to from the encoder's answer and one from the exact peak)",
        fontsize=11,
    )
    page.savefig(ROOT / "docs/small_latents.png")


def _kept(kept: Kept, name: str) -> Any:
    """A part that `run` has worked out."""

    def missing() -> Any:
        raise SystemExit(f"{name!r} is not there: first `run` this prior and seed")

    return kept(name, missing)


def _dots(ax: Any, records: list[dict[str, Any]]) -> None:
    guides = records[0]["guides"]
    for offset, (prior, marker) in enumerate(zip(PRIORS, "osD", strict=True)):
        mine = [r["guides"] for r in records if r["prior"] == prior]
        places = np.arange(len(guides)) + 0.2 * (offset - 1)
        for i, record in enumerate(mine):
            ax.errorbar(
                [record[name]["kl"] for name in guides], places,
                xerr=[2 * record[name]["kl_se"] for name in guides],
                fmt=marker, color=f"C{offset}", markersize=5, alpha=0.8,
                label=None if i else prior,
            )  # fmt: skip
            ax.plot(
                [record[name]["kl_median"] for name in guides], places, marker,
                color=f"C{offset}", mfc="none", markersize=5, alpha=0.8,
            )  # fmt: skip
    labels = [f"{name}\n({own['rows']:,} images)" for name, own in guides.items()]
    ax.set_yticks(range(len(guides)), labels, fontsize=8)
    ax.set_ylim(len(guides) - 0.5, -0.5)
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
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/papers/small_latents")
    options = parser.parse_args()
    which = options.prior, options.seed, options.runs
    if options.what == "run":
        run(*which)
    if options.what == "figure":
        return figure(*which)
    table()


if __name__ == "__main__":
    main()
