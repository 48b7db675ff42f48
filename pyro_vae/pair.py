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
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to

Batch = tuple[Tensor, ...]


class Model(Protocol):
    """Samples latents from a prior inside the plate `"data"` and scores `"x"`."""

    def __call__(self, *batch: Any, **options: Any) -> Any: ...


class Guide(Protocol):
    """Samples the model's latents given the batch, inside the plate `"data"`."""

    def __call__(self, *batch: Any) -> Any: ...


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
    """the draws themselves, each `(S, B, *event)`"""

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) − log q(z | x), `(S, B)`; its mean over `S` is the ELBO."""
        return self.likelihood + self.prior - self.guide


def log_densities(model: Model, guide: Guide, batch: Batch, draws: int) -> LogDensities:
    """Draw `z ~ q(z | x)` and score it under both sides of the pair.

    Scales (`poutine.scale`, a subsampled plate) are left out: these are the densities of one
    datum each. Masks are kept.

    Args:
        model: p(z) p(x | z).
        guide: q(z | x).
        batch: tensors of `B` rows.
        draws: `S`, the draws for each datum.

    Returns:
        `LogDensities` with leading shape `(S, B)`.
    """
    guide_trace = poutine.trace(_drawn(guide, draws)).get_trace(*batch)
    replayed = poutine.replay(_drawn(model, draws), trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*batch)
    latents = {site["name"]: site["value"] for site in latent_sites(guide_trace)}
    shape = (draws, len(batch[0]))
    return LogDensities(
        likelihood=_log_prob(observed_sites(model_trace), shape),
        prior=_log_prob(latent_sites(model_trace), shape),
        guide=_log_prob(latent_sites(guide_trace), shape),
        latents=latents,
    )


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
        batch: the batch.

    Raises:
        ValueError: no latent in the plate, a latent outside it, or a discrete one.

    Example:
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
            _check_in_plate(site, "model", len(batch[0]))
        self._transforms = {site["name"]: biject_to(_support(site)) for site in sites}
        self._shapes = {
            site["name"]: tuple(
                self._transforms[site["name"]].inverse_shape(site["value"].shape)[1:]
            )
            for site in sites
        }
        self.size = sum(math.prod(shape) for shape in self._shapes.values())
        self.dtype = sites[0]["value"].dtype

    def __call__(self, unconstrained: Tensor) -> Tensor:
        """Score `(S, B, L)` unconstrained latents; returns `(S, B)` nats."""
        shape = tuple(unconstrained.shape[:-1])
        latents, log_jacobian = self._constrain(unconstrained)
        conditioned = poutine.condition(_drawn(self.model, shape[0]), data=latents)
        trace = poutine.trace(conditioned).get_trace(*self.batch)
        return _log_prob(all_sites(trace), shape) + log_jacobian

    def rows(self, index: Tensor | slice) -> LogJoint:
        """The same target for some rows of the batch."""
        return LogJoint(self.model, tuple(tensor[index] for tensor in self.batch))

    def constrain(self, unconstrained: Tensor) -> dict[str, Tensor]:
        """Map `(S, B, L)` unconstrained values to latents, each `(S, B, *event)`."""
        return self._constrain(unconstrained)[0]

    def unconstrain(self, latents: dict[str, Tensor]) -> Tensor:
        """Map latents, each `(S, B, *event)`, to `(S, B, L)` unconstrained values."""
        parts = [
            transform.inv(latents[name]).flatten(start_dim=2)
            if self._shapes[name]
            else transform.inv(latents[name]).unsqueeze(-1)
            for name, transform in self._transforms.items()
        ]
        return torch.cat(parts, dim=-1)

    def prior_draws(self, draws: int) -> Tensor:
        """Sample the prior of each datum; `(S, B, L)` unconstrained values."""
        with torch.no_grad():
            drawn = poutine.trace(_drawn(self.model, draws)).get_trace(*self.batch)
        return self.unconstrain({site["name"]: site["value"] for site in latent_sites(drawn)})

    def split(self, unconstrained: Tensor) -> dict[str, Tensor]:
        """Unstack `(S, B, L)` into the unconstrained value of each site, `(S, B, *event)`."""
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        parts = unconstrained.split(sizes, dim=-1)
        return {
            name: part.reshape(*unconstrained.shape[:-1], *shape)
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }

    def _constrain(self, unconstrained: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        leading = unconstrained.shape[:-1]
        latents, log_jacobian = {}, unconstrained.new_zeros(leading)
        for name, free in self.split(unconstrained).items():
            latents[name] = self._transforms[name](free)
            jacobian = self._transforms[name].log_abs_det_jacobian(free, latents[name])
            log_jacobian = log_jacobian + jacobian.reshape(*leading, -1).sum(-1)
        return latents, log_jacobian


@dataclass(frozen=True)
class _Finding:
    """One complaint in the house's form: what, expected, got, try."""

    what: str
    expected: object
    got: object
    advice: str

    def raise_(self, cause: Exception | None = None) -> None:
        raise ValueError(
            f"{self.what}\n  expected: {self.expected}\n  got:      {self.got}"
            f"\n  try:      {self.advice}"
        ) from cause


def check_batch(batch: Batch, what: str = "batch") -> None:
    """Refuse a batch that no pair can use.

    Args:
        batch: a tuple of tensors with equally many rows.
        what: the name it has in the message.

    Raises:
        ValueError: not a tuple of tensors, no rows, uneven rows, NaN or infinity.

    Example:
        >>> check_batch((torch.zeros(3, 2),))
    """
    if not isinstance(batch, tuple) or not all(isinstance(part, Tensor) for part in batch):
        kind = type(batch).__name__
        _Finding(f"{what} is no tuple of tensors", "(x,) or (x, y)", kind, "(x,)").raise_()
    rows = [len(part) if part.dim() else 0 for part in batch]
    if not rows or not all(rows):
        _Finding(f"{what} is empty", "at least one row", f"{rows} rows", "other data").raise_()
    if len(set(rows)) > 1:
        advice = "one label for each datum"
        _Finding(f"{what} has uneven parts", "equal rows", f"{rows} rows", advice).raise_()
    for name, part in zip("xyuvw", batch, strict=False):
        bad = ~torch.isfinite(part.reshape(len(part), -1)).all(-1)
        if bad.any():
            _Finding(
                f"{name} of {what} has NaN or infinite values",
                "finite numbers",
                f"{int(bad.sum())} bad rows, {_first_rows(bad)}",
                "drop these rows or fill them: x[torch.isfinite(x).all(-1)]",
            ).raise_()


def check_pair(model: Model, guide: Guide, batch: Batch) -> None:
    """Run a pair once and refuse what Pyro would accept in silence.

    Checks that all rows are finite and within the support of `"x"`; and, on a few rows, that
    both sides have the same latent sites, inside one plate `"data"` of the batch's length at
    dim -1, with the same event shape; that `"x"` is observed; and that networks keep leading
    batch dimensions. Leaves the random state as it was.

    Args:
        model: p(z) p(x | z).
        guide: q(z | x).
        batch: tensors of any number of rows.

    Raises:
        ValueError: the first of these that does not hold: what, expected, got, try.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("latent", dist.Normal(x / 2, 0.7))
        >>> check_pair(model, guide, (torch.zeros(3),))
        Traceback (most recent call last):
        ...
        ValueError: model and guide have different latent sites
          expected: ['z'], the model's
          got:      ['latent'], the guide's
          try:      give each guide site the name of the model's
    """
    check_batch(batch)
    x, batch = batch[0], tuple(part[:8] for part in batch)
    size = len(batch[0])
    with preserved_rng(), torch.no_grad(), pyro.validation_enabled(True):
        guide_trace = _traced("guide", guide, batch)
        sites = {site["name"]: site for site in latent_sites(guide_trace)}
        for site in sites.values():
            _check_in_plate(site, "guide", size)
        model_trace = _traced("model", poutine.replay(model, trace=guide_trace), batch)
        model_sites = {site["name"]: site for site in latent_sites(model_trace)}
        if set(sites) != set(model_sites):
            _Finding(
                "model and guide have different latent sites",
                f"{sorted(model_sites)}, the model's",
                f"{sorted(sites)}, the guide's",
                "give each guide site the name of the model's",
            ).raise_()
        for name, site in model_sites.items():
            _check_in_plate(site, "model", size)
            _check_same_event(site, sites[name])
        observed = [site for site in observed_sites(model_trace) if site["name"] == "x"]
        if not observed:
            _Finding(
                "model does not observe 'x'",
                "pyro.sample('x', ..., obs=x)",
                f"sites {sorted(site['name'] for site in all_sites(model_trace))}",
                "name the observation 'x' and pass obs=x",
            ).raise_()
        _check_in_plate(observed[0], "model", size)
        check_support(observed[0]["fn"], x)
        _check_draws(model, guide, batch)


def check_support(distribution: Any, x: Tensor) -> None:
    """Refuse data that a likelihood gives no probability to.

    Args:
        distribution: p(x | z); only its support and event shape are read.
        x: data, `(N, *event)`.

    Raises:
        ValueError: rows outside the support, or of another shape, with the remedy.

    Example:
        >>> check_support(dist.Bernoulli(torch.ones(4) / 2).to_event(1), torch.ones(3, 4))
    """
    event = tuple(distribution.event_shape)
    if event and tuple(x.shape[-len(event) :]) != event:
        _Finding(
            "x has another shape than p(x | z)",
            f"rows of shape {event}",
            f"rows of shape {tuple(x.shape[1:])}",
            "flatten images to (N, D), and give the decoder D outputs",
        ).raise_()
    inside = distribution.support.check(x)
    bad = ~inside.reshape(len(x), -1).all(-1)
    if bad.any():
        low, high = x.min().item(), x.max().item()
        _Finding(
            f"x is outside the support of {_name(distribution)}",
            f"values in the support, {distribution.support}",
            f"{int(bad.sum())} of {len(x)} rows outside, {_first_rows(bad)}; "
            f"values {low:g} to {high:g}",
            _support_advice(low, high),
        ).raise_()


def observation(model: Model, latents: Mapping[str, Tensor], batch: Batch | None = None) -> Any:
    """p(x | z) as the model has it: the distribution at site `"x"`, batch shape `(B,)`.

    Args:
        model: p(z) p(x | z).
        latents: each `(B, *event)`.
        batch: what the model is called with; `None` calls `model(None, size=B)`.

    Example:
        >>> def model(x, size=None):
        ...     with pyro.plate("data", plate_size(x, size)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)
        >>> observation(model, {"z": torch.tensor([0.0, 1.0])}).mean
        tensor([0., 2.])
    """
    conditioned = poutine.trace(poutine.condition(model, data=dict(latents)))
    with preserved_rng(), torch.no_grad():
        if batch is None:
            trace = conditioned.get_trace(None, size=len(next(iter(latents.values()))))
        else:
            trace = conditioned.get_trace(*batch)
    return trace.nodes["x"]["fn"]


def subsampling_factor(model: Model, batch: Batch) -> float:
    """How often the plate `"data"` counts each row: N/B if it subsamples, else 1."""
    with preserved_rng(), torch.no_grad():
        trace = poutine.trace(model).get_trace(*batch)
    (frame, *_) = latent_sites(trace)[0]["cond_indep_stack"]
    return float((frame.full_size or frame.size) / frame.size)


def latent_sites(trace: poutine.Trace) -> list[dict[str, Any]]:
    """The unobserved sample sites of a trace, in order."""
    return [site for site in all_sites(trace) if not site["is_observed"]]


def observed_sites(trace: poutine.Trace) -> list[dict[str, Any]]:
    """The observed sample sites of a trace, in order."""
    return [site for site in all_sites(trace) if site["is_observed"]]


def all_sites(trace: poutine.Trace) -> list[dict[str, Any]]:
    """The sample sites of a trace, in order, without the indices of plates."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    ]


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
def frozen(*parts: object) -> Iterator[None]:
    """Switch off gradients to the parameters of those parts that are modules."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    trainable = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _drawn(program: Callable[..., Any], draws: int) -> Callable[..., Any]:
    return pyro.plate("_draws", draws, dim=-2)(program)  # type: ignore[no-any-return]


def _log_prob(sites: Sequence[dict[str, Any]], shape: tuple[int, ...]) -> Tensor:
    total: Any = 0.0
    for site in sites:
        log_prob = site["fn"].log_prob(site["value"])
        total = total + scale_and_mask(log_prob, 1.0, site["mask"])
    return torch.as_tensor(total).expand(shape)


def _support(site: dict[str, Any]) -> Any:
    if site["fn"].support.is_discrete:
        _Finding(
            f"latent site {site['name']!r} is discrete",
            "latents with a density",
            _name(site["fn"]),
            "sum it out in the model, or leave it to the guide",
        ).raise_()
    return site["fn"].support


def _traced(side: str, program: Callable[..., Any], batch: Batch) -> poutine.Trace:
    try:
        return poutine.trace(program).get_trace(*batch)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        shapes = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in batch)
        _Finding(
            f"the {side} failed on a batch",
            f"{side}(*batch) to run",
            f"{type(error).__name__}: {error} (batch: {shapes})",
            "compare the batch's shape and dtype with the network's first layer; "
            "x.flatten(1) for images, x.float() for other dtypes",
        ).raise_(error)
        raise AssertionError from error


def _check_in_plate(site: dict[str, Any], side: str, size: int) -> None:
    where = f"site {site['name']!r} of the {side}"
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    if [(frame.name, frame.dim) for frame in frames] != [("data", -1)]:
        got = ", ".join(f"{frame.name!r} at dim {frame.dim}" for frame in frames)
        _Finding(
            f"{where} is not in the plate 'data' alone",
            "one plate 'data' at dim -1",
            got or "no plate",
            'with pyro.plate("data", len(x)): ..., and .to_event(1) for the other dims',
        ).raise_()
    if frames[0].size != size:
        _Finding(
            f"plate 'data' of the {side} has another size than the batch",
            f"{size}, the rows of x",
            str(frames[0].size),
            'pyro.plate("data", len(x)), or pass subsample=x to a larger plate',
        ).raise_()
    if site["fn"].batch_shape != (size,):
        _Finding(
            f"{where} has another batch shape than its plate",
            f"batch shape ({size},)",
            str(tuple(site["fn"].batch_shape)),
            ".to_event(1): one event for each datum",
        ).raise_()


def _check_same_event(model_site: dict[str, Any], guide_site: dict[str, Any]) -> None:
    name, prior, posterior = model_site["name"], model_site["fn"], guide_site["fn"]
    if prior.event_shape != posterior.event_shape:
        _Finding(
            f"site {name!r} has different event shapes",
            f"{tuple(prior.event_shape)}, the model's",
            f"{tuple(posterior.event_shape)}, the guide's",
            "the same latent dimension in the prior and in the guide, both .to_event(1)",
        ).raise_()
    if not prior.support.check(guide_site["value"]).all():
        _Finding(
            f"the guide draws {name!r} outside the support of the prior",
            str(prior.support),
            str(posterior.support),
            "a guide with the support of the prior",
        ).raise_()


def _check_draws(model: Model, guide: Guide, batch: Batch) -> None:
    try:
        log_densities(model, guide, batch, draws=2)
    except (RuntimeError, ValueError, IndexError) as error:
        _Finding(
            "the pair cannot take several draws at once",
            "networks that keep leading batch dimensions, (S, B, L) -> (S, B, D)",
            f"{type(error).__name__}: {error}",
            "z.reshape(*z.shape[:-1], ...) for z.view(-1, ...), dim=-1 for dim=1",
        ).raise_(error)


def _support_advice(low: float, high: float) -> str:
    if low >= 0 and 1 < high <= 255:
        return "x / 255 for pixels (x / 16 for scikit-learn's digits), then binarise"
    return (
        "binarise, x.bernoulli() or (x > 0.5).float(), for Bernoulli; "
        "or a likelihood for grey values, pv.likelihoods.Normal(scale)"
    )


def _first_rows(bad: Tensor) -> str:
    rows = bad.nonzero().flatten().tolist()
    return f"first {rows[:5]}" if len(rows) > 5 else f"rows {rows}"


def _name(distribution: Any) -> str:
    return type(getattr(distribution, "base_dist", distribution)).__name__
