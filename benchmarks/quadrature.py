"""Quadrature of many MNIST posteriors under one decoder: shared lattices against own grids.

    PYRO_VAE_DATA=... python benchmarks/quadrature.py

A VAE with two latents (784–200–200–2 and back) is fitted to static MNIST; log p(x) of test images
is integrated with lattices that they share and with a grid for each, in turn, in one process.
Prints medians of the turns' seconds of CPU an image, their ratio, the largest difference in nats,
and writes results/quadrature.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from statistics import median

import torch

import pyro_vae as pv
from pyro_vae.posterior import lattice

RESULTS = Path(__file__).parent / "results/quadrature.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = pv.data.load("binarized_mnist")
    guide = pv.guides.NormalGuide(pv.networks.MLP(784, 200, 200, 4))
    model = pv.models.VAE(
        pv.networks.MLP(2, 200, 200, 784),
        prior=pv.priors.StandardNormal(2), likelihood=pv.likelihoods.Bernoulli(),
    )  # fmt: skip
    pv.fit(model, guide, data, epochs=options.epochs, batch_size=250, lr=2e-3, progress=False)
    x = data.test[0][: options.rows]
    fewest = {"shared": lattice.FEWEST, "own": len(x) + 1}
    seconds: dict[str, list[float]] = {name: [] for name in fewest}
    found = {}
    for _ in range(options.turns):
        for name, count in fewest.items():
            lattice.FEWEST = count
            start = time.process_time()
            found[name] = pv.posterior.quadrature(model, (x,)).log_evidence
            seconds[name].append((time.process_time() - start) / len(x))
            print(f"{name:8} {seconds[name][-1]:.3f} s an image", flush=True)
    shared, own = (median(seconds[name]) for name in ("shared", "own"))
    apart = (found["shared"] - found["own"]).abs().max()
    print(f"{len(x):,} images: {shared:.3f} and {own:.3f} s an image, ratio {shared / own:.2f}")
    print(f"largest difference of log p(x): {apart:.1e} nats")
    record = {
        "rows": len(x), "cpu_seconds_per_row": seconds, "largest_difference": apart.item(),
        "device": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "pyro_vae": pv.__version__,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
