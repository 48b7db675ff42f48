"""Why reparameterization matters: the variance of gradient estimators of one bound.

    python benchmarks/gradient_variance.py    seconds; writes results/gradient_variance.json

A VAE on the 8×8 digits, at the start of its fit and after it. For each estimator: the total
variance over the guide's parameters, relative to that of `Trace_ELBO`, and the ratio of the norm
of the mean gradient, less its bias, to its standard deviation (the higher, the fewer steps are
wasted).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae.networks import MLP
from pyro_vae.svi.objectives import IWAE, AnalyticELBO, DReG, ScoreFunctionELBO, gradients

REPEATS = 400
ESTIMATORS: dict[str, Any] = {
    "Trace_ELBO, reparameterized": Trace_ELBO(),
    "AnalyticELBO, closed KL": AnalyticELBO(),
    "ScoreFunctionELBO": ScoreFunctionELBO(),
    "IWAE, 16 draws": IWAE(16),
    "DReG, 16 draws": DReG(16),
}


def main() -> None:
    """Measure all estimators before and after a fit, print the table, write the JSON."""
    digits = pv.data.load("digits")
    torch.manual_seed(0)
    guide = pv.guides.NormalGuide(MLP(64, 64, 4))
    prior, likelihood = pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli()
    model = pv.models.VAE(MLP(2, 64, 64), prior=prior, likelihood=likelihood)
    batch = (digits.train[0][:128],)
    rows: dict[str, dict[str, float]] = {name: {} for name in ESTIMATORS}
    for when in ("start", "end"):
        if when == "end":
            pv.fit(model, guide, digits, epochs=80, lr=3e-3, progress=False)
        torch.manual_seed(1)
        for name, estimator in ESTIMATORS.items():
            sample = gradients(estimator, model, guide, batch, repeats=REPEATS)
            variance = sample.var(0).sum().item()
            rows[name][f"variance_{when}"] = variance
            signal = sample.mean(0).square().sum().item() - variance / REPEATS  # unbiased
            rows[name][f"signal_{when}"] = (max(0.0, signal) / variance) ** 0.5
    base = rows["Trace_ELBO, reparameterized"]
    print("| estimator | variance, start | end | signal to noise, start | end |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        relative = [
            row[f"variance_{when}"] / base[f"variance_{when}"] for when in ("start", "end")
        ]
        cells = [f"{value:.3g}×" for value in relative]
        cells += [f"{row[f'signal_{when}']:.2f}" for when in ("start", "end")]
        print(f"| {name} | {' | '.join(cells)} |")
    path = Path(__file__).parent / "results" / "gradient_variance.json"
    path.write_text(json.dumps({"repeats": REPEATS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
