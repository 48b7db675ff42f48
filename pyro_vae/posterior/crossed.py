"""Log p(x, z) of many data at the same latents, with the decoder run once a latent."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal
from torch.nn.functional import softplus

from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import all_sites, log_prob_of


def crossed(target: LogJoint, points: Tensor, *, chunk: int = 2**12) -> Tensor | None:
    r"""Score each of `B` data at each of `M` latents.

    $$\log p(x_b, z_m) = \log p(z_m) + T(x_b)^\top \eta(z_m) - A(z_m) + c(x_b)$$

    for a likelihood of an exponential family: the decoder is run at each latent, not for each
    datum at each latent, and a matrix product does the rest. The model is asked with its first
    row repeated: `shares_latents` says whether that holds for the others.

    Args:
        target: the posteriors of `B` data.
        points: unconstrained latents, `(M, L)`.
        chunk: latents decoded at once.

    Returns:
        `(B, M)` nats, float64, on the CPU; `None` for a likelihood other than Bernoulli and
        Normal, or one with a mask.
    """
    first = target.rows(slice(0, 1))
    trace = poutine.trace(target.model).get_trace(*target.batch)
    data = {site["name"]: site["value"] for site in all_sites(trace)}
    scores = []
    for part in points.split(chunk):
        latents, log_jacobian = first.constrain(part)
        rows = tuple(tensor.expand(len(part), *tensor.shape[1:]) for tensor in first.batch)
        model = poutine.condition(target.model, data=latents)
        sites = all_sites(poutine.trace(model).get_trace(*rows))
        latent = [site for site in sites if site["name"] in first.transforms]
        score = (log_prob_of(latent, (len(part),)) + log_jacobian).double()
        for site in sites:
            if site["name"] not in first.transforms:
                family = _family(site, data[site["name"]])
                if family is None:
                    return None
                score = score + family.log_prob()
        scores.append(score.cpu())
    return torch.cat(scores, -1).nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def shares_latents(target: LogJoint) -> bool:
    """Whether `crossed` is the target: one decoder for all data, which are only observed.

    Asked at two draws of the prior, for all data.
    """
    points = target.prior_draws(2)[:, 0]
    scores = crossed(target, points)
    if scores is None:
        return False
    direct = target(points.unsqueeze(1).expand(-1, len(scores), -1)).mT.double().cpu()
    return torch.allclose(scores, direct, rtol=1e-4, atol=1e-3)


class _Family(NamedTuple):
    """An exponential family of independent pixels: `M` parameters, `B` data."""

    statistics: Tensor
    """T(x), `(B, F)`"""
    natural: Tensor
    """η(z), `(M, F)`"""
    normaliser: Tensor
    """A(z), `(M, D)`"""
    carrier: float
    """c(x), of all pixels of any datum"""

    def log_prob(self) -> Tensor:
        """`(B, M)`, float64."""
        normaliser = self.normaliser.sum(-1, dtype=torch.float64)
        return self.statistics.double() @ self.natural.double().mT - normaliser + self.carrier


def _family(site: Any, data: Tensor) -> _Family | None:
    """The likelihood of a site at `M` latents and data of `B` rows."""
    fn = site["fn"]
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if site["mask"] is not None or fn.batch_shape != site["value"].shape:
        return None
    x = data.reshape(len(data), -1)
    if isinstance(fn, Bernoulli):
        logits = fn.logits.reshape(len(fn.logits), -1)
        return _Family(x, logits, softplus(logits), 0.0)
    if isinstance(fn, Normal):
        x, mean, scale = (v.double().reshape(len(v), -1) for v in (x, fn.loc, fn.scale))
        precision = scale.pow(-2)
        return _Family(
            torch.cat([x, x.square()], -1),
            torch.cat([mean * precision, -precision / 2], -1),
            mean.square() * precision / 2 + scale.log(),
            -math.log(2 * math.pi) / 2 * x.shape[1],
        )
    return None
