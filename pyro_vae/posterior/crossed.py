"""Log p(x, z) of many data at the same latents, with the decoder run once a latent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal
from torch.nn.functional import softplus

from pyro_vae.log_joint import LogJoint, definite
from pyro_vae.pair import all_sites, log_prob_of, observed_sites

PIXELS = 2**22
"""Pixels of all latents that are decoded at once, at most."""


def crossed(target: LogJoint, points: Tensor, *, chunk: int = 2**12) -> tuple[Tensor, Tensor]:
    r"""Score each of `B` data at each of `M` latents, for a target that `shares_latents`.

    $$\log p(x_b, z_m) = \log p(z_m) + T(x_b)^\top \eta(z_m) - A(z_m) + c$$

    for a likelihood of an exponential family: the decoder is run at each latent, with the first
    datum in the rows, not for each datum at each latent; a matrix product does the rest.

    Args:
        target: the posteriors of `B` data.
        points: unconstrained latents, `(M, L)`.
        chunk: latents decoded at once, at most.

    Returns:
        Log p(z), `(M,)`, and log p(x | z), `(B, M)`, nats, float64, on the CPU.
    """
    data = [_flat(site["value"]) for site in _observed(target)]
    log_prior = torch.empty(len(points), dtype=torch.float64)
    log_likelihood = torch.empty(len(data[0]), len(points), dtype=torch.float64)
    with pyro.validation_enabled(False):
        for part, decoded in _decode(target, points, chunk, cycle=False):
            log_prior[part] = decoded.log_prior.cpu().double()
            scores = zip(decoded.families, data, strict=True)
            log_likelihood[:, part] = sum(family.log_prob(x).cpu() for family, x in scores)
    log_likelihood.nan_to_num_(-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    return definite(log_prior), log_likelihood


def shares_latents(target: LogJoint, points: Tensor, *, chunk: int = 2**12) -> bool:
    """Whether `crossed` is the target: one decoder for all data, which are only observed.

    The likelihood must be Bernoulli or Normal, of a plate as long as the batch, without masks.
    Then all data take turns in the rows: what the model makes of a latent must be the same, to
    the last bit, as with the first datum there.

    Args:
        target: the posteriors of `B` data.
        points: where to ask, unconstrained, `(M, L)`; many, and wherever posteriors may lie.
        chunk: latents decoded at once, at most.
    """
    if not all(_is_known(site) for site in _observed(target.rows(slice(0, 1)))):
        return False
    one, all_in_turn = (_decode(target, points, chunk, cycle=cycle) for cycle in (False, True))
    with pyro.validation_enabled(False):  # a latent may lie outside another datum's support
        return all(
            torch.equal(ours, theirs)
            for (_, first), (_, other) in zip(one, all_in_turn, strict=True)
            for ours, theirs in zip(first.parameters(), other.parameters(), strict=True)
        )


class _Bernoulli(NamedTuple):
    """`(M, D)` logits."""

    logits: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """`(B, M)`, float64, of `(B, D)` data."""
        normaliser = softplus(self.logits).sum(-1, dtype=torch.float64)
        return x.double() @ self.logits.double().mT - normaliser


class _Normal(NamedTuple):
    """`(M, D)` means and scales."""

    mean: Tensor
    scale: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """`(B, M)`, float64, of `(B, D)` data; about their mean, where the least cancels."""
        x, precision = x.double(), self.scale.double().pow(-2)
        middle = x.mean(0)
        x, mean = x - middle, self.mean.double() - middle
        statistics = torch.cat([x, x.square()], -1)
        natural = torch.cat([mean * precision, -precision / 2], -1)
        normaliser = (mean.square() * precision / 2 + self.scale.double().log()).sum(-1)
        return statistics @ natural.mT - normaliser - math.log(2 * math.pi) / 2 * x.shape[1]


class _Decoded(NamedTuple):
    """What a model makes of `M` latents: log p(z), `(M,)`, and its likelihoods."""

    log_prior: Tensor
    families: list[_Bernoulli | _Normal]

    def parameters(self) -> list[Tensor]:
        return [self.log_prior, *(part for family in self.families for part in family)]


def _decode(
    target: LogJoint, points: Tensor, chunk: int, *, cycle: bool
) -> Iterator[tuple[slice, _Decoded]]:
    """Run the model at a few latents at a time, over its first datum or over all in turn."""
    first = target.rows(slice(0, 1))
    observed = {site["name"]: site["value"].numel() for site in _observed(first)}
    step = max(1, min(chunk, PIXELS // sum(observed.values())))
    for start in range(0, len(points), step):
        part = points[start : start + step]
        turns = torch.arange(start, start + len(part)) % (len(target.batch[0]) if cycle else 1)
        rows = tuple(tensor[turns] for tensor in target.batch)
        latents, log_jacobian = first.constrain(part)
        trace = poutine.trace(poutine.condition(target.model, data=latents)).get_trace(*rows)
        prior = [site for site in all_sites(trace) if site["name"] in latents]
        log_prior = log_prob_of(prior, (len(part),)) + log_jacobian
        families = [_family(trace.nodes[name]) for name in observed]
        yield slice(start, start + len(part)), _Decoded(log_prior, families)


def _observed(target: LogJoint) -> list[Any]:
    """What the model observes of the batch, with its values."""
    trace = poutine.trace(target.model).get_trace(*target.batch)
    return [site for site in observed_sites(trace) if not site["infer"].get("_deterministic")]


def _is_known(site: Any) -> bool:
    """Whether a site of one row is a Bernoulli or Normal of each datum, and nothing more."""
    fn = _base(site)
    plates = [(frame.name, frame.size) for frame in site["cond_indep_stack"] if frame.vectorized]
    return (
        type(fn).log_prob in (Bernoulli.log_prob, Normal.log_prob)
        and fn.batch_shape == site["value"].shape
        and plates == [("data", 1)]
        and site["mask"] is None
        and float(site["scale"]) == 1  # not so in a plate that stands for more rows
    )


def _family(site: Any) -> _Bernoulli | _Normal:
    fn = _base(site)
    if isinstance(fn, Bernoulli):
        return _Bernoulli(_flat(fn.logits))
    return _Normal(_flat(fn.loc), _flat(fn.scale))


def _base(site: Any) -> Any:
    fn = site["fn"]
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1)
