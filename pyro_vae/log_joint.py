"""The unnormalised posterior of each datum, from the model's trace alone."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.pair import (
    Batch,
    Guide,
    Model,
    all_sites,
    latent_sites,
    log_prob_of,
    preserved_rng,
    with_draws,
)


class _Reached(Exception):
    """The last latent is drawn."""


class _StopAfter(Messenger):
    """Ends a model once a site is drawn: what follows, the decoder above all, is not needed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_post_sample(self, message: dict[str, Any]) -> None:
        if message["name"] == self.name:
            raise _Reached


class LogJoint:
    r"""The unnormalised posterior of each datum, as a function of unconstrained latents.

    $$\log \tilde p_b(u) = \log p(x_b, z(u)) + \log\left|\det \partial z / \partial u\right|$$

    where `u` stacks all latent sites of one datum, in the order of the model, and `z(u)` maps
    each to its support. Built from the model's trace alone.

    Args:
        model: a model that meets the contract.
        batch: tensors of `B` rows.

    Attributes:
        size: `L`, the number of unconstrained latent dimensions of one datum.
        dtype: of the latents.
        transforms: of each site, from the reals to its support.
        batch: the batch.

    Raises:
        ValueError: no latent in the plate, a latent outside it, a discrete one, or one whose
            support depends on another.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> LogJoint(model, (torch.zeros(3),))(torch.zeros(5, 3, 1)).shape
        torch.Size([5, 3])
    """

    def __init__(self, model: Model, batch: Batch) -> None:
        self.model = model
        self.batch = batch
        with preserved_rng(), torch.no_grad():
            trace = poutine.trace(model).get_trace(*batch)
        sites = latent_sites(trace)
        if not sites:
            raise ValueError("model has no latent site; expected at least one, such as 'z'")
        for site in sites:
            _refuse_global_or_discrete(site)
        _refuse_moving_supports(model, batch, sites)
        self.transforms = {site["name"]: _bijection(site["fn"].support) for site in sites}
        self._shapes = {
            site["name"]: tuple(
                self.transforms[site["name"]].inverse_shape(site["value"].shape)[1:]
            )
            for site in sites
        }
        self.size = sum(math.prod(shape) for shape in self._shapes.values())
        self.dtype = sites[0]["value"].dtype

    def __call__(self, unconstrained: Tensor) -> Tensor:
        """Score `(S, B, L)` unconstrained latents; returns `(S, B)` nats."""
        log_prior, log_likelihood = self.parts(unconstrained)
        return log_prior + log_likelihood

    def parts(self, unconstrained: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(z(u)) |∂z/∂u|, which integrates to 1, and log p(x | z(u)); `(S, B)` nats each."""
        latents, log_jacobian = self.constrain(unconstrained)
        log_prior, log_likelihood = self._score(latents, tuple(unconstrained.shape[:-1]))
        return log_prior + log_jacobian, log_likelihood

    def of_latent(self, z: Tensor) -> Tensor:
        """Log p(x, z) at `(S, B, *event)` values of a single latent site, `(S, B)` nats."""
        (name,) = self.transforms
        log_prior, log_likelihood = self._score({name: z}, tuple(z.shape[:2]))
        return log_prior + log_likelihood

    def rows(self, index: Tensor | slice) -> LogJoint:
        """The same target for some rows of the batch."""
        return LogJoint(self.model, tuple(tensor[index] for tensor in self.batch))

    def unconstrain(self, latents: dict[str, Tensor]) -> Tensor:
        """Map latents, each `(S, B, *event)`, to `(S, B, L)` unconstrained values."""
        parts = [
            transform.inv(latents[name]).flatten(start_dim=2)
            if self._shapes[name]
            else transform.inv(latents[name]).unsqueeze(-1)
            for name, transform in self.transforms.items()
        ]
        return torch.cat(parts, dim=-1)

    def prior_draws(self, draws: int) -> Tensor:
        """Sample the prior of each datum; `(S, B, L)` unconstrained values."""
        recorded = poutine.trace()
        with torch.no_grad(), recorded, _StopAfter([*self.transforms][-1]), suppress(_Reached):
            with_draws(self.model, draws)(*self.batch)
        nodes: Any = recorded.trace.nodes
        return self.unconstrain({name: nodes[name]["value"] for name in self.transforms})

    def guide_draws(self, guide: Guide, draws: int) -> Tensor:
        """Sample q(z | x) of each datum; `(S, B, L)` unconstrained values."""
        with torch.no_grad():
            drawn = poutine.trace(with_draws(guide, draws)).get_trace(*self.batch)
        nodes: Any = drawn.nodes
        return self.unconstrain({name: nodes[name]["value"] for name in self.transforms})

    def _score(self, latents: dict[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        conditioned = poutine.condition(self.model, data=latents)
        sites = all_sites(poutine.trace(conditioned).get_trace(*self.batch))
        latent = [site for site in sites if site["name"] in self.transforms]
        observed = [site for site in sites if site["name"] not in self.transforms]
        return log_prob_of(latent, shape), log_prob_of(observed, shape)

    def split(self, unconstrained: Tensor) -> dict[str, Tensor]:
        """Unstack `(S, B, L)` into the unconstrained value of each site, `(S, B, *event)`."""
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        parts = unconstrained.split(sizes, dim=-1)
        return {
            name: part.reshape(*unconstrained.shape[:-1], *shape)
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }

    def constrain(self, unconstrained: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Map `(S, B, L)` to latents, each `(S, B, *event)`, and log |det ∂z/∂u|, `(S, B)`."""
        leading = unconstrained.shape[:-1]
        latents, log_jacobian = {}, unconstrained.new_zeros(leading)
        for name, free in self.split(unconstrained).items():
            latents[name] = self.transforms[name](free)
            jacobian = self.transforms[name].log_abs_det_jacobian(free, latents[name])
            log_jacobian = log_jacobian + jacobian.reshape(*leading, -1).sum(-1)
        return latents, log_jacobian


def definite(log_density: Tensor) -> Tensor:
    """A log density in which what is not a number counts as impossible, and infinity too.

    Warns:
        UserWarning: of infinity. A latent is rounded onto a border of its support at which its
            density has a pole: exp(-104) is 0 in single precision, exp(-746) in double.
            Gamma(0.05) has 0.6 % of its mass below the former, Gamma(0.01) 36 %.
    """
    if bool((log_density == torch.inf).any()):
        warnings.warn(
            "the density of a latent is infinite where it is rounded onto a border of its support;"
            " what mass lies there is left out: little, if latents are of double precision",
            stacklevel=2,
        )
    return torch.nan_to_num(log_density, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _refuse_moving_supports(model: Model, batch: Batch, sites: list[Any]) -> None:
    """A site whose support moves with another latent has no transform of its own."""
    if not any(bounds_of(site["fn"].support) for site in sites[1:]):
        return
    with preserved_rng(seed=1), torch.no_grad():
        again = latent_sites(poutine.trace(model).get_trace(*batch))
    for site, other in zip(sites, again, strict=True):
        pairs = zip(bounds_of(site["fn"].support), bounds_of(other["fn"].support), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise ValueError(
                f"the support of latent site {site['name']!r} depends on another latent"
                "\n  expected: supports that are fixed for each datum"
                "\n  try:      sample on a fixed support, and transform in the model"
            )


def bounds_of(support: Any) -> list[Tensor]:
    """The numbers that a constraint is parametrised by."""
    if base := getattr(support, "base_constraint", None):
        return bounds_of(base)
    return [torch.as_tensor(v) for v in vars(support).values() if isinstance(v, Tensor | float)]


def _bijection(support: Any) -> Any:
    if type(support).__name__ == "MixtureSameFamilyConstraint":  # torch registers no bijection
        support = support.base_constraint
    return biject_to(support)


def _refuse_global_or_discrete(site: dict[str, Any]) -> None:
    name, frames = site["name"], site["cond_indep_stack"]
    if [(frame.name, frame.dim) for frame in frames if frame.vectorized] != [("data", -1)]:
        raise ValueError(
            f"latent site {name!r} is not in the plate 'data' alone"
            "\n  expected: a latent of each datum"
            "\n  try:      with pyro.plate('data', len(x)): ..., or fix a global latent first"
        )
    if site["fn"].support.is_discrete:
        raise ValueError(
            f"latent site {name!r} is discrete ({type(site['fn']).__name__})\n  expected: latents"
            " with a density\n  try:      sum it out in the model"
        )
