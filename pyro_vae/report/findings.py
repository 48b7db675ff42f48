"""What the figures of a report say in plain language, and what to change."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from pyro_vae.svi import Run
from pyro_vae.verdict import Calibration, Diagnosis, Verdict

if TYPE_CHECKING:
    import pandas as pd

CAUSES = {
    "encoder off": (
        "the encoder is at fault: it gives these rows another member of its family than the best",
        "Train longer, widen its layers, or refine its answers with guides.RefinedGuide.",
    ),
    "family too small": (
        "the guide's family is at fault: even its best member is far from the posterior",
        "Take a richer family: guides.MultivariateNormalGuide or guides.FlowGuide.",
    ),
    "heavy weights": (
        "importance weights have a heavy tail (k-hat)",
        "Take log p(x) from quadrature or posterior.annealed there, not from IWAE.",
    ),
    "not finite": (
        "densities are not finite",
        "Look at these rows, and at the scales of the likelihood.",
    ),
}
"""Reasons that a verdict gives for a row, and what to do."""

SYMPTOMS = ("mean off", "too narrow", "too wide")
"""Reasons whose cause is another."""


class Finding(NamedTuple):
    """A sentence about the pair.

    Attributes:
        kind: `good`, `note` or `bad`.
        text: what holds.
        advice: what to do about it; empty where nothing is to be done.
    """

    kind: str
    text: str
    advice: str = ""


def headline(verdict: Verdict) -> Finding:
    """Whether the guide can be trusted, in a sentence.

    Trusted means that every limit of `Verdict.limits` holds for the row. Rows where the
    reference itself is in doubt are not judged.
    """
    doubt = _in_doubt(verdict)
    judged = verdict.table[~doubt]
    count, good = len(judged), int((judged["why"] == "").sum())
    besides = f" {_rows(int(doubt.sum()))} cannot be judged." if doubt.any() else ""
    share = f"it passes on {good} of {_rows(count)}.{besides}"
    if count == 0:
        return Finding("note", f"The guide cannot be judged: no reference to trust.{besides}")
    if good >= 0.9 * count:
        return Finding("good", f"The guide can be trusted: {share}")
    if good >= 0.5 * count:
        return Finding("note", f"The guide can be trusted in part: {share}")
    return Finding("bad", f"The guide cannot be trusted: {share}")


def of_verdict(verdict: Verdict) -> list[Finding]:
    """Why rows are not trusted, the commonest reason first, and whether the chains are sound."""
    table, doubt = verdict.table, _in_doubt(verdict)
    judged = table[~doubt]
    reasons = Counter(reason for why in judged["why"] for reason in why.split(", ") if reason)
    summary = verdict.summary().loc["guide"]
    error = float((table["kl_se"] ** 2).sum() ** 0.5 / len(table))
    lost = f"The ELBO is {summary['kl']:.2f} ± {error:.1g} nats a row below log p(x)"
    if verdict.gaps is not None:
        lost += (
            f": the guide's family costs {summary['approximation']:.2f} of them and its encoder "
            f"{summary['amortization']:.2f}"
        )
    found = [Finding("note", f"{lost}. {verdict.rung[0].upper()}{verdict.rung[1:]}.")]
    if doubt.any():
        told = f"On {_rows(int(doubt.sum()))} the reference itself is in doubt."
        found.append(Finding("note", told, "More draws and chains, or more particles."))
    if seen := [f"{reason} on {reasons[reason]}" for reason in SYMPTOMS if reasons[reason]]:
        told = f"Of {_rows(len(judged))} the guide errs: {', '.join(seen)}."
        found.append(Finding("bad", told, "Report means and intervals of posterior.hmc there."))
    found += [
        Finding("bad", f"On {_rows(rows)} {CAUSES[reason][0]}.", CAUSES[reason][1])
        for reason, rows in reasons.most_common()
        if reason in CAUSES
    ]
    flagged = int((table["mcmc_trouble"] != "").sum())
    if flagged:
        advice = "They are flagged in the table; more draws or chains may settle them."
        found.append(Finding("note", f"On {_rows(flagged)} the chains did not converge.", advice))
    else:
        found.append(Finding("good", "The chains beside the guide converged on every row."))
    return found


def _in_doubt(verdict: Verdict) -> pd.Series[bool]:
    """Rows whose reference is not to be trusted, so that the guide cannot be judged by it."""
    return verdict.table["why"].str.contains("reference in doubt|evidence uncertain")


def of_calibration(calibration: Calibration) -> list[Finding]:
    """Whether the ranks are uniform, and how not."""
    summary = calibration.summary()
    wrong = summary[summary["verdict"] != "calibrated"]
    count = len(calibration.ranks)
    if wrong.empty:
        text = f"On {count:,} data that the model generates, the guide's ranks are uniform."
        return [Finding("good", text)]
    words = wrong.groupby("verdict", sort=False).groups
    told = "; ".join(f"{word} in {_few(list(names))}" for word, names in words.items())
    return [
        Finding(
            "bad",
            f"On {count:,} data that the model generates, the guide is {told}.",
            "It is so on average over data: look for the cause in the rows below.",
        )
    ]


def of_diagnosis(diagnosis: Diagnosis) -> list[Finding]:
    """Collapse, holes, and what a better prior would save."""
    units, active = diagnosis.units, int(diagnosis.units.active.sum())
    total, found = len(units.names), []
    if active == total:
        found.append(Finding("good", f"All {total} latent units are active."))
    else:
        asleep = [name for name, on in zip(units.names, units.active, strict=True) if not on]
        found.append(
            Finding(
                "note",
                f"{active} of {total} latent units are active; {_few(asleep)} say nothing of the "
                "data.",
                "If that is too few: warm the KL up (fit.warm_up), give it a floor "
                "(svi.objectives.FreeBits), or take fewer latent dimensions and lose nothing.",
            )
        )
    marginal, thin = diagnosis.surgery.marginal_kl, diagnosis.holes.thin_mass
    if marginal is not None and float(marginal.value) > 0.1:
        found.append(
            Finding(
                "note",
                f"The aggregate posterior is {_pm(marginal)} nats from the prior: so much a row "
                "could a better prior save.",
                "Swap the prior: priors.VampPrior, priors.GaussianMixture or priors.FlowPrior.",
            )
        )
    if thin is not None and float(thin.value) > 0.05:
        found.append(
            Finding(
                "note",
                f"{float(thin.value):.0%} of the prior's mass lies where the aggregate posterior "
                "is thin: samples from there ask the decoder for what it has not learned.",
                "Sample from a prior that fits the aggregate posterior.",
            )
        )
    jumps = diagnosis.holes.jumps
    if jumps is not None and bool(torch.isinf(jumps).any()):
        found.append(Finding("note", "The decoder jumps on lines between draws of the prior."))
    return found


def of_run(run: Run) -> list[Finding]:
    """Whether the fit had ended, and whether it learned its rows by heart."""
    best, last = run.best, run.epochs[-1].epoch
    found = []
    if not run.stopped_early and run.best_epoch > 0.9 * last:
        found.append(
            Finding(
                "note",
                f"The validation ELBO was best in epoch {run.best_epoch} of {last}: the fit had "
                "not ended.",
                "More epochs, with patience to stop them.",
            )
        )
    gap = best.train_elbo - best.validation_elbo
    if gap > 3 * (best.train_elbo_se**2 + best.validation_elbo_se**2) ** 0.5:
        found.append(
            Finding(
                "note",
                f"Training rows are {gap:.2f} nats likelier than validation rows.",
                "Fewer or smaller layers, or more data; dynamic binarisation of grey images.",
            )
        )
    return found


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _pm(estimate: tuple[torch.Tensor, torch.Tensor]) -> str:
    value, se = (float(part) for part in estimate)
    return f"{value:.2f} ± {se:.2f}" if se >= 0.005 else f"{value:.2f}"
