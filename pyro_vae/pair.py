"""The contract between a model and a guide, and what follows from it alone.

*A model is a callable that samples its latents from a prior and scores `x`; a guide is a
callable that samples the same latents given `x`. They agree on site names, one plate and
shapes, and on nothing else.*

- One plate, named `"data"`, at dim -1, as long as the batch.
- Latents such as `"z"` inside it, one event each; the observation is `"x"`.
- A batch is a tuple of tensors, `(x,)` or `(x, y)`; both are called with `*batch`.
- `model(None, size=n)` generates `n` data; networks keep leading batch dimensions.

Everything here reads a pair through its traces, so a pair written in plain Pyro is as good
as one of ours. Shapes: `B` data in the batch, `S` draws, `L` latent, `D` observed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

Batch = tuple[Tensor, ...]


class Model(Protocol):
    """Samples latents from a prior inside the plate `"data"` and scores `"x"`."""

    def __call__(self, *batch: Any, **options: Any) -> Any:
        """Run on a batch, or `model(None, size=n)` to generate."""


class Guide(Protocol):
    """Samples the model's latents given the batch, inside the plate `"data"`."""

    def __call__(self, *batch: Any) -> Any:
        """Run on a batch."""


class _AliasParameters(Messenger):
    """Lets `SVI` read parameters that are not in the global store.

    `SVI.step` asks each param site for `value.unconstrained()`, which only values that came
    out of the store have. A detached alias carries that method; the parameter stays as it is.
    """

    def _pyro_param(self, message: dict[str, Any]) -> None:
        value = message["fn"](*message["args"], **message["kwargs"])
        if not hasattr(value, "unconstrained"):
            parameter = value
            value = parameter.detach()
            value.unconstrained = lambda: parameter
        message["value"], message["done"] = value, True


class PairModule(PyroModule):
    """A `PyroModule` whose parameters live in itself, never in the global parameter store.

    Two models in one process never touch, whatever Pyro's settings, and stock `SVI`,
    `Trace_ELBO()(model, guide)`, `Predictive` and `MCMC` work as they are.

    Example:
        >>> class Weight(PairModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(()))
        ...     def forward(self):
        ...         return self.weight
        >>> Weight()().item(), len(pyro.get_param_store())
        (1.0, 0)
    """

    def __init__(self) -> None:
        with pyro.settings.context(module_local_params=True):
            super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` with parameters local to this module."""
        with pyro.settings.context(module_local_params=True), _AliasParameters():
            return super().__call__(*args, **kwargs)


class LogDensities(NamedTuple):
    """Per-datum log densities of draws from a guide, in nats, each of shape `(S, B)`."""

    likelihood: Tensor
    """log p(x | z)"""
    prior: Tensor
    """log p(z)"""
    guide: Tensor
    """log q(z | x)"""
    latents: dict[str, Tensor]
    """the draws themselves, each `(S, B, *event)`, in the order of the model"""
    factors: Tensor
    """log factors of the guide (`pyro.factor`), such as a commitment, which no bound contains"""
    scale: float | None
    """what the sites' densities are scaled by (N/B under subsampling); `None` if unequally"""

    @property
    def log_weight(self) -> Tensor:
        """Log p(x, z) − log q(z | x), `(S, B)`; its mean over `S` is the ELBO."""
        return self.likelihood + self.prior - self.guide


def log_densities(model: Model, guide: Guide, batch: Batch, draws: int) -> LogDensities:
    """Draw `z ~ q(z | x)` and score it under both sides of the pair.

    Scales (`poutine.scale`, a subsampled plate) are left out, but reported: these are the
    densities of one datum each. Masks are kept.

    Args:
        model: p(z) p(x | z).
        guide: q(z | x).
        batch: tensors of `B` rows.
        draws: `S`, the draws for each datum.

    Returns:
        `LogDensities` with leading shape `(S, B)`.
    """
    return densities(*trace_pair(model, guide, batch, draws), (draws, len(batch[0])))


def trace_pair(
    model: Model, guide: Guide, batch: Batch, draws: int
) -> tuple[poutine.Trace, poutine.Trace]:
    """Run the guide for `draws` particles, and the model on what it drew; both traces."""
    guide_trace = poutine.trace(with_draws(guide, draws)).get_trace(*batch)
    replayed = poutine.replay(with_draws(model, draws), trace=guide_trace)
    return poutine.trace(replayed).get_trace(*batch), guide_trace


def densities(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, shape: tuple[int, int]
) -> LogDensities:
    """Score the two traces of `trace_pair`, of leading shape `(S, B)`."""
    return LogDensities(
        likelihood=log_prob_of(observed_sites(model_trace), shape),
        prior=log_prob_of(latent_sites(model_trace), shape),
        guide=log_prob_of(latent_sites(guide_trace), shape),
        latents={site["name"]: site["value"] for site in latent_sites(model_trace)},
        factors=log_prob_of(observed_sites(guide_trace), shape),
        scale=_common_scale([*all_sites(model_trace), *all_sites(guide_trace)]),
    )


def observation(model: Model, latents: Mapping[str, Tensor], batch: Batch | None = None) -> Any:
    """p(x | z) as the model has it: the distribution at site `"x"`, batch shape `(B,)`.

    Args:
        model: p(z) p(x | z).
        latents: each `(B, *event)`.
        batch: what the model is called with; `None` calls `model(None, size=B)`.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x, size=None):
        ...     with pyro.plate("data", plate_size(x, size)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)
        >>> observation(model, {"z": torch.tensor([0.0, 1.0])}).mean
        tensor([0., 2.])
    """
    conditioned = poutine.trace(poutine.condition(model, data=dict(latents)))
    with preserved_rng(), evaluating(model), torch.no_grad():
        if batch is None:
            trace = conditioned.get_trace(None, size=len(next(iter(latents.values()))))
        else:
            trace = conditioned.get_trace(*batch)
    return trace.nodes["x"]["fn"]


def center(distribution: Any) -> Tensor:
    """The mean of p(x | z), and the likeliest value where it has none: categories.

    Example:
        >>> import pyro.distributions as dist
        >>> center(dist.Normal(2.0, 1.0)), center(dist.Categorical(torch.tensor([0.1, 0.9])))
        (tensor(2.), tensor(1))
    """
    mean: Tensor = distribution.mean
    return distribution.mode if mean.isnan().any() else mean


def simulate(model: Model, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
    """Draw z* ~ p(z) and x ~ p(x | z*): one simulated datum for each row of the batch.

    The batch gives the number of rows and what else the model is called with, such as labels;
    its `x` is replaced. z* is then an exact draw from p(z | x).

    Args:
        model: p(z) p(x | z).
        batch: tensors of `B` rows.

    Returns:
        The latents, each `(B, *event)`, and the batch with simulated `x`.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(5.0, 0.1))
        ...         pyro.sample("x", dist.Normal(z, 0.1), obs=x)
        >>> latents, (x,) = simulate(model, (torch.zeros(3),))
        >>> bool(((x - latents["z"]).abs() < 1).all())
        True
    """
    with evaluating(model), torch.no_grad():
        trace = poutine.trace(model).get_trace(*batch)
        likelihood: Any = trace.nodes["x"]["fn"]
        x = likelihood.sample().to(batch[0].dtype)
    return {site["name"]: site["value"] for site in latent_sites(trace)}, (x, *batch[1:])


def full_size(program: Model | Guide, batch: Batch) -> int | None:
    """`N` of a plate `"data"` that subsamples; `None` if the plate is as long as the batch.

    An ELBO of the pair is a sum over so many data, and over the rows of the batch otherwise.
    """
    with preserved_rng(), evaluating(program), torch.no_grad():
        trace = poutine.trace(program).get_trace(*batch)
    (frame, *_) = latent_sites(trace)[0]["cond_indep_stack"]
    full = frame.full_size or frame.size
    return None if full == frame.size else int(full)


def latent_sites(trace: poutine.Trace) -> list[Any]:
    """The unobserved sample sites of a trace, in order."""
    return [site for site in all_sites(trace) if not site["is_observed"]]


def observed_sites(trace: poutine.Trace) -> list[Any]:
    """The observed sample sites of a trace, in order."""
    return [site for site in all_sites(trace) if site["is_observed"]]


def all_sites(trace: poutine.Trace) -> list[Any]:
    """The sample sites of a trace, in order, without the indices of plates."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    ]


def side_by_side(sites: Mapping[str, Tensor], leading: int) -> Tensor:
    """All scalars of all sites in one last dimension.

    Args:
        sites: figures of each site, `(*lead, *event)`.
        leading: how many dimensions come before an event.

    Example:
        >>> side_by_side({"z": torch.zeros(5, 2), "scale": torch.ones(5)}, 1).shape
        torch.Size([5, 3])
    """
    return torch.cat([v.reshape(*v.shape[:leading], -1) for v in sites.values()], -1)


def unit_names(sites: Mapping[str, Tensor], leading: int) -> tuple[str, ...]:
    """The names of these scalars, in the order of `side_by_side`.

    Example:
        >>> unit_names({"z": torch.zeros(5, 2), "scale": torch.ones(5)}, 1)
        ('z[0]', 'z[1]', 'scale')
    """
    return tuple(
        f"{name}[{unit}]" if value.dim() > leading else name
        for name, value in sites.items()
        for unit in range(math.prod(value.shape[leading:]))
    )


def plate_size(x: Tensor | None, size: int | None) -> int:
    """How long the plate of a model is: the rows of `x`, or the `size` asked for.

    Raises:
        ValueError: neither or both were given, or `size` is below 1.

    Example:
        >>> plate_size(None, 3)
        3
    """
    if (x is None) == (size is None):
        raise ValueError("give x to score it, or size=n to generate n data: model(None, size=n)")
    length = len(x) if x is not None else int(size or 0)
    if length < 1:
        raise ValueError(f"a plate needs at least 1 row; got {length}")
    return length


@contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Leave torch's random state as it was, on every device; start from `seed` if given."""
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(*parts: object) -> Iterator[None]:
    """Hold those parts that are modules in eval mode: no dropout, no running statistics."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    training = [child for module in modules for child in module.modules() if child.training]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True


@contextmanager
def frozen(*parts: object) -> Iterator[None]:
    """Hold those parts that are modules in eval mode, without gradients to parameters."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with evaluating(*modules):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def with_draws(program: Callable[..., Any], draws: int) -> Callable[..., Any]:
    """The program inside a plate of `draws` at dim -2: its sites get a leading `S`."""
    return pyro.plate("_draws", draws, dim=-2)(program)


def log_prob_of(sites: Sequence[Any], shape: tuple[int, ...]) -> Tensor:
    """The summed log density of sites, unscaled, masks kept, expanded to `shape`."""
    total: Any = 0.0
    for site in sites:
        log_prob = site["fn"].log_prob(site["value"])
        total = total + scale_and_mask(log_prob, 1.0, site["mask"])
    return torch.as_tensor(total).expand(shape)


def _common_scale(sites: Sequence[Any]) -> float | None:
    scales = {float(site["scale"]) for site in sites}
    return scales.pop() if len(scales) == 1 else None
