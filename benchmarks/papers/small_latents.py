"""Two latent dimensions on static MNIST: every guide and bound against the exact posterior.

A VAE (784–200–200–2 and back, Bernoulli) is fitted with a given prior and a mean-field guide;
its decoder then stands still, so that log p(x), by quadrature, is one number for each test image.
Beside the amortized mean-field guide stand one with full covariance and one with a flow, both
trained on the training images; local parameters of each test image's own; and the mean-field guide
refined by gradient steps. IWAE, annealing and Hamiltonian Monte Carlo are held to the same truth.

    python benchmarks/papers/small_latents.py run --prior standard --seed 0   # stops, goes on
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
COST = "not measured yet; hours for all priors and seeds on 2 cores"
HIDDEN, COMPONENTS = (200, 200), 50
PRIORS: dict[str, Callable[[Any, Tensor], Any]] = {
    "standard": lambda guide, x: pv.priors.StandardNormal(2),
    "mixture": lambda guide, x: pv.priors.GaussianMixture(2, COMPONENTS),
    "vamp": lambda guide, x: pv.priors.VampPrior.from_data(guide.posterior, x, COMPONENTS),
}
QUIET: dict[str, Any] = {"progress": False}


def fitted(prior: str, seed: int, data: Any, epochs: int, folder: Path) -> tuple[Any, Any]:
    """The VAE and its amortized mean-field guide."""
    torch.manual_seed(seed)
    guide = pv.guides.NormalGuide(encoder(pv.guides.NormalGuide))
    model = pv.models.VAE(
        pv.networks.MLP(2, *HIDDEN, 784),
        prior=PRIORS[prior](guide, data.train[0]), likelihood=pv.likelihoods.Bernoulli(),
    )  # fmt: skip
    pv.fit(
        model, guide, data, epochs=epochs, patience=30, average=0.999, draws=1, seed=seed,
        compile=True, folder=folder / "mean-field", **QUIET,
    )  # fmt: skip
    return model.requires_grad_(False), guide.requires_grad_(False)


def encoder(kind: Any) -> Any:
    """The encoder that a family wants."""
    return pv.networks.MLP(784, *HIDDEN, kind.features(2))


def others(
    model: Any, guide: Any, seed: int, data: Any, x: Tensor, epochs: int, folder: Path
) -> dict[str, Any]:
    """The other guides of a fixed model: amortized ones, local and refined."""
    torch.manual_seed(seed + 1)
    flow = pv.guides.FlowGuide(encoder(pv.guides.FlowGuide), 2, hidden=(64,))
    full = pv.guides.MultivariateNormalGuide(encoder(pv.guides.MultivariateNormalGuide))
    guides = {"full covariance": full, "flow": flow}
    for name, own in guides.items():
        pv.fit(
            model, own, data, epochs=epochs, patience=30, average=0.999, draws=1, seed=seed,
            compile=name != "flow", folder=folder / name.replace(" ", "_"), **QUIET,
        )  # fmt: skip
    local = pv.guides.NormalGuide(pv.guides.Table(x, 4, start=guide.encoder))
    pv.fit(model, local, (x,), epochs=300, batch_size=500, lr=1e-2, measure_every=100, **QUIET)
    return guides | {"local": local, "refined": pv.guides.RefinedGuide(guide, model)}


def truth(model: Any, x: Tensor, folder: Path) -> dict[str, np.ndarray]:
    """Log p(x), moments and the count of modes of each posterior, by quadrature; kept on disk."""
    path = folder / f"truth-{len(x)}.npz"
    if path.exists():
        return dict(np.load(path))
    parts = []
    for rows in x.split(250):
        exact = pv.posterior.quadrature(model, (rows,))
        modes = [modes_of(exact.density(b)[1]) for b in range(len(rows))]
        parts.append({
            "log_evidence": exact.log_evidence.numpy(), "error": exact.error.numpy(),
            "mean": exact.mean.numpy(), "sd": exact.sd.numpy(), "modes": np.array(modes),
        })  # fmt: skip
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    np.savez(path, **found)
    return found


def modes_of(density: Tensor, share: float = 0.05) -> int:
    """Local maxima of a density on a grid that are above a share of the highest."""
    around = torch.nn.functional.max_pool2d(density[None, None], 3, stride=1, padding=1)[0, 0]
    return int(((density == around) & (density > share * density.max())).sum())


def judged(model: Any, guide: Any, x: Tensor, exact: dict[str, np.ndarray]) -> dict[str, Any]:
    """A guide against the truth; nats an image, standard errors over images."""
    found = pv.bounds(model, guide, (x,), draws=500, chunk=2**13)
    evidence = torch.as_tensor(exact["log_evidence"])
    kl = (evidence - found.elbo).double()
    mean, sd = (torch.as_tensor(exact[name]) for name in ("mean", "sd"))
    errors = ((found.draws.mean - mean) / sd).abs().amax(-1)
    bad = kl > 0.2
    high = found.khat > 0.7
    several = torch.as_tensor(exact["modes"]) > 1
    return {
        "elbo": found.elbo.mean().item(),
        "kl": kl.mean().item(),
        "kl_se": (kl.std() / len(x) ** 0.5).item(),
        "kl_one_mode": kl[~several].mean().item(),
        "kl_several_modes": kl[several].mean().item() if several.any() else None,
        "iwae_500_below": (evidence - found.iwae).mean().item(),
        "share_kl_above_0.2": bad.double().mean().item(),
        "share_mean_off": (errors > 0.5).double().mean().item(),
        "share_khat_above_0.7": high.double().mean().item(),
        "caught_by_khat": (high & bad).sum().item() / max(1, int(bad.sum())),
        "false_alarms_of_khat": (high & ~bad).sum().item() / max(1, int(high.sum())),
    }


def sampled(model: Any, guide: Any, x: Tensor, exact: dict[str, np.ndarray]) -> dict[str, Any]:
    """Hamiltonian Monte Carlo and annealing against the truth, on the first images."""
    start = time.perf_counter()
    draws = pv.posterior.hmc(model, (x,), guide=guide, draws=500, **QUIET)
    seconds = time.perf_counter() - start
    mean, sd = (torch.as_tensor(exact[name])[: len(x)] for name in ("mean", "sd"))
    z = (draws.mean.double() - mean) / draws.mcse["z"].double()
    ais = pv.posterior.annealed(model, (x,), guide=guide, particles=16, **QUIET)
    below = torch.as_tensor(exact["log_evidence"])[: len(x)] - ais.log_evidence
    return {
        "rows": len(x),
        "hmc_seconds": seconds,
        "hmc_rms_z_of_means": z.square().mean().sqrt().item(),
        "hmc_worst_mean_error": ((draws.mean.double() - mean) / sd).abs().max().item(),
        "hmc_in_trouble": sum(bool(t) for t in draws.trouble) / len(x),
        "ais_below": below.mean().item(),
        "ais_below_se": (below.std() / len(x) ** 0.5).item(),
    }


def run(prior: str, seed: int, rows: int, epochs: int, runs: Path) -> None:
    """One prior and one seed, from the fit to the record."""
    start = time.perf_counter()
    folder = runs / f"{prior}-{seed}"
    data = pv.data.load("binarized_mnist")
    index = torch.randperm(len(data.test[0]), generator=torch.Generator().manual_seed(0))[:rows]
    x = data.test[0][index]
    model, guide = fitted(prior, seed, data, epochs, folder)
    exact = truth(model, x, folder)
    guides = {"mean-field": guide} | others(model, guide, seed, data, x, epochs, folder)
    record = {
        "prior": prior, "seed": seed, "rows": len(x),
        "log_evidence": float(exact["log_evidence"].mean()),
        "log_evidence_se": float(exact["log_evidence"].std() / len(x) ** 0.5),
        "quadrature_error": float(exact["error"].max()),
        "several_modes": float((exact["modes"] > 1).mean()),
        "guides": {name: judged(model, own, x, exact) for name, own in guides.items()},
        "gaps": gaps(model, guide, x[:256], exact),
        "samplers": sampled(model, guide, x[:1000], exact),
        "seconds": time.perf_counter() - start, "device": platform.machine(),
        "cores": os.cpu_count(), "torch": torch.__version__, "pyro_vae": pv.__version__,
    }  # fmt: skip
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    same = (prior, seed, len(x))
    kept = [r for r in known if (r["prior"], r["seed"], r["rows"]) != same]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps([*kept, record], indent=1) + "\n")


def gaps(model: Any, guide: Any, x: Tensor, exact: dict[str, np.ndarray]) -> dict[str, float]:
    """How much of the mean-field guide's gap is its family's, how much its encoder's."""
    evidence = torch.as_tensor(exact["log_evidence"])[: len(x)]
    found = pv.gaps(model, guide, (x,), log_evidence=evidence, **QUIET)
    return {n: getattr(found, n).mean().item() for n in ("approximation", "amortization")}


def table() -> None:
    """Print what was measured."""
    print("| prior | seed | log p(x) | modes > 1 | guide | KL | KL > 0.2 | k-hat > 0.7 | caught |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in json.loads(RESULTS.read_text()) if RESULTS.exists() else []:
        head = f"| {r['prior']} | {r['seed']} | {r['log_evidence']:.2f} ± "
        head += f"{r['log_evidence_se']:.2f} | {r['several_modes']:.1%} "
        for name, g in r["guides"].items():
            cells = [f"{g['kl']:.3f} ± {g['kl_se']:.3f}", f"{g['share_kl_above_0.2']:.1%}"]
            cells += [f"{g['share_khat_above_0.7']:.1%}", f"{g['caught_by_khat']:.1%}"]
            print(f"{head}| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Run a prior and seed, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "table"), default="table")
    parser.add_argument("--prior", choices=tuple(PRIORS), default="standard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=10_000, help="test images, shuffled")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/papers/small_latents")
    options = parser.parse_args()
    if options.what == "run":
        run(options.prior, options.seed, options.rows, options.epochs, options.runs)
    table()


if __name__ == "__main__":
    main()
