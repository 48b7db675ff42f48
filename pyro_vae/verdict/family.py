"""The family that a guide answers from, as free numbers for each datum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import transform_to

from pyro_vae.checks import refuse
from pyro_vae.pair import Batch, Guide, latent_sites, log_prob_of, preserved_rng

REDUNDANT = {"covariance_matrix", "precision_matrix", "probs"}
"""Parameters that others of the same distribution determine."""
LARGEST_UNIT = 10.0


@dataclass(frozen=True)
class Family:
    """All distributions q(z | λ) of a guide's kind, and those it chose for `B` data.

    Attributes:
        start: λ of each datum, `(B, F)`, unconstrained.
        member: from `(B, F)` to the distribution of each latent site, batch shape `(B,)`.
        answer: from another batch of `B` rows to the λ that the guide chooses for them.
        masks: of each site, from the guide's trace.
    """

    start: Tensor
    member: Callable[[Tensor], dict[str, Any]]
    answer: Callable[[Batch], Tensor]
    masks: dict[str, Any]

    def draw(self, free: Tensor, draws: int, *, score: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Draw `z` at λ = `free`, reparameterized, and score it at λ = `score`.

        Returns:
            Latents, each `(S, B, *event)`, and log q(z | score), `(S, B)`.
        """
        members = self.member(free).items()
        latents = {name: q.expand((draws, *q.batch_shape)).rsample() for name, q in members}
        return latents, self.log_prob(score, latents, draws)

    def log_prob(self, free: Tensor, latents: dict[str, Tensor], draws: int) -> Tensor:
        """Log q(z | λ) of latents, each `(S, B, *event)`, `(S, B)` nats."""
        sites = [
            {"fn": q, "value": latents[name], "mask": self.masks[name]}
            for name, q in self.member(free).items()
        ]
        return log_prob_of(sites, (draws, len(free)))

    def unit(self, free: Tensor, draws: int) -> Tensor:
        """How far each λ moves before draws tell, `(B, F)`: 1 / √diagonal of the Fisher matrix.

        At most `LARGEST_UNIT`, and 0 where λ moves nothing.
        """
        free = free.detach().requires_grad_(True)
        with torch.no_grad():
            latents, _ = self.draw(free, draws, score=free)
        with torch.enable_grad():
            scores = self.log_prob(free, latents, draws).sum(-1)
        gradients = [torch.autograd.grad(s, free, retain_graph=True)[0] for s in scores]
        fisher = torch.stack(gradients).square().mean(0)
        return torch.where(fisher > 0, fisher.rsqrt().clamp_max(LARGEST_UNIT), 0.0)


def family_of(guide: Guide, batch: Batch) -> Family:
    """Read a guide's family off the guide.

    A guide that has `encoder(*batch)` and `distribution(features)`, or wraps such a one as
    `.guide`, says it by itself: λ are the features. Of any other, the distributions at its
    latent sites are taken apart: λ are their parameters, mapped to the reals.

    Args:
        guide: q(z | x), in eval mode.
        batch: tensors of `B` rows.

    Returns:
        `Family`.

    Raises:
        ValueError: sites that depend on each other's draws, a distribution whose parameters
            cannot be read, one without reparameterized draws or without a density.

    Example:
        >>> import pyro
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, torch.ones(3, 2)).to_event(1))
        >>> family_of(guide, (torch.zeros(3, 2),)).start.shape
        torch.Size([3, 4])
    """
    sites = _sites(guide, batch)
    for name, site in sites.items():
        _check_distribution(name, site["fn"])
    masks = {name: site["mask"] for name, site in sites.items()}
    amortized = _amortized(guide)
    if amortized is not None and len(sites) == 1:
        (name,) = sites

        def one(free: Tensor) -> dict[str, Any]:
            return {name: amortized.distribution(free)}

        def encode(batch: Batch) -> Tensor:
            features: Tensor = amortized.encoder(*batch)
            return features

        return Family(encode(batch), one, encode, masks)
    parts = {name: _parametrised(name, site["fn"]) for name, site in sites.items()}
    _check_independence(guide, batch, parts)
    sizes = [start.shape[-1] for start, _ in parts.values()]

    def member(free: Tensor) -> dict[str, Any]:
        pieces = free.split(sizes, dim=-1)
        return {
            name: rebuild(piece)
            for piece, (name, (_, rebuild)) in zip(pieces, parts.items(), strict=True)
        }

    def answer(batch: Batch) -> Tensor:
        own = [site["fn"] for site in _sites(guide, batch).values()]
        return torch.cat([_take_apart(q, q.batch_shape)[0] for q in own], -1)

    return Family(torch.cat([start for start, _ in parts.values()], -1), member, answer, masks)


def _sites(guide: Guide, batch: Batch) -> dict[str, Any]:
    trace = poutine.trace(guide).get_trace(*batch)
    return {site["name"]: site for site in latent_sites(trace)}


def _amortized(guide: Any) -> Any:
    while guide is not None and not (hasattr(guide, "encoder") and hasattr(guide, "distribution")):
        guide = getattr(guide, "guide", None)
    return guide


Part = tuple[Tensor, Callable[[Tensor], Any]]
"""λ of one distribution, `(B, F)`, and the way back."""


def _parametrised(name: str, q: Any) -> Part:
    """Take a distribution apart; putting it together again must give the same density."""
    try:
        start, rebuild = _take_apart(q, q.batch_shape)
        z = q.sample()
        torch.testing.assert_close(rebuild(start).log_prob(z), q.log_prob(z), rtol=1e-3, atol=1e-3)
    except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
        refuse(
            f"the family of the guide's distribution at {name!r} cannot be read",
            expected="a distribution given by its parameters, such as Normal or Gamma",
            got=type(_base(q)).__name__,
            advice="a guide with .encoder(*batch) -> features and .distribution(features)",
            cause=error,
        )
    return start, rebuild


def _take_apart(q: Any, batch_shape: torch.Size) -> Part:
    if isinstance(q, torch.distributions.Independent):
        events = q.reinterpreted_batch_ndims
        start, inner = _take_apart(q.base_dist, q.base_dist.batch_shape)
        return start, lambda free: inner(free).to_event(events)
    if isinstance(q, dist.MaskedDistribution):
        start, inner = _take_apart(q.base_dist, batch_shape)
        return start, lambda free: inner(free).mask(q._mask)
    if isinstance(q, dist.ExpandedDistribution):
        return _take_apart(q.base_dist, batch_shape)
    if not type(q).arg_constraints and isinstance(q, dist.TransformedDistribution):
        if any(isinstance(v, Tensor) for t in q.transforms for v in vars(t).values()):
            raise NotImplementedError("transforms with parameters")
        start, inner = _take_apart(q.base_dist, q.base_dist.batch_shape)
        return start, lambda free: dist.TransformedDistribution(inner(free), q.transforms)
    return _parameters(q, batch_shape)


def _parameters(q: Any, batch_shape: torch.Size) -> Part:
    names = [name for name in type(q).arg_constraints if name not in REDUNDANT]
    if not names:
        raise NotImplementedError("no parameters")
    transforms = [transform_to(type(q).arg_constraints[name]) for name in names]
    free = [
        transform.inv(_expanded(getattr(q, name), q.batch_shape, batch_shape))
        for name, transform in zip(names, transforms, strict=True)
    ]
    shapes = [value.shape for value in free]
    sizes = [value[0].numel() for value in free]

    def rebuild(stacked: Tensor) -> Any:
        pieces = stacked.split(sizes, dim=-1)
        values = [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        values = [transform(v) for transform, v in zip(transforms, values, strict=True)]
        return type(q)(**dict(zip(names, values, strict=True)))

    return torch.cat([value.reshape(len(value), -1) for value in free], -1), rebuild


def _expanded(value: Tensor, own: torch.Size, batch_shape: torch.Size) -> Tensor:
    return value.expand(batch_shape + value.shape[len(own) :])


def _check_independence(guide: Guide, batch: Batch, parts: dict[str, Part]) -> None:
    with preserved_rng(seed=1):
        again = _sites(guide, batch)
    for name, (start, _) in parts.items():
        other, _ = _take_apart(again[name]["fn"], again[name]["fn"].batch_shape)
        if not torch.equal(start, other):
            refuse(
                f"the guide's parameters at {name!r} change from draw to draw",
                expected="parameters for each datum, whatever other sites have drawn",
                got="a distribution that depends on another draw",
                advice="gaps of pairs with one latent site, or sites that x alone determines",
            )


def _check_distribution(name: str, q: Any) -> None:
    base = _base(q)
    if isinstance(base, dist.Delta) or not q.has_rsample:
        refuse(
            f"the guide's distribution at {name!r} has no best member to climb to",
            expected="a density with reparameterized draws, such as Normal",
            got=type(base).__name__,
            advice="a guide whose distribution has rsample",
        )


def _base(q: Any) -> Any:
    wrappers = (
        torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution
    )  # fmt: skip
    return _base(q.base_dist) if isinstance(q, wrappers) else q
