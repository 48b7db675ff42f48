"""What is refused before the first step, each with: what, expected, got, try."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.log_joint import bounds_of
from pyro_vae.pair import (
    Batch,
    Guide,
    Model,
    all_sites,
    evaluating,
    latent_sites,
    log_densities,
    observed_sites,
    preserved_rng,
)


def refuse(
    what: str, *, expected: object, got: object, advice: str, cause: Exception | None = None
) -> NoReturn:
    """Raise the house's `ValueError`.

    Example:
        >>> refuse("L is too small", expected="L >= 1", got=0, advice="L = 2")
        Traceback (most recent call last):
        ...
        ValueError: L is too small
          expected: L >= 1
          got:      0
          try:      L = 2
    """
    message = f"{what}\n  expected: {expected}\n  got:      {got}\n  try:      {advice}"
    raise ValueError(message) from cause


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
        refuse(
            f"{what} is no tuple of tensors",
            expected="(x,) or (x, y)",
            got=type(batch).__name__,
            advice="(torch.as_tensor(x),), with the comma",
        )
    rows = [len(part) if part.dim() else 0 for part in batch]
    if not rows or not all(rows):
        refuse(
            f"{what} is empty", expected="at least one row", got=f"{rows} rows", advice="more data"
        )
    if len(set(rows)) > 1:
        refuse(
            f"{what} has uneven parts",
            expected="as many rows in each part",
            got=f"{rows} rows",
            advice="one label for each datum",
        )
    for number, part in enumerate(batch):
        name = ("x", "y")[number] if number < 2 else f"part {number + 1}"
        bad = ~torch.isfinite(part.reshape(len(part), -1)).all(-1)
        if bad.any():
            refuse(
                f"{name} of the {what} has NaN or infinite values",
                expected="finite numbers",
                got=f"{int(bad.sum())} of {len(part)} rows bad, {_first_rows(bad)}",
                advice="drop these rows, x[torch.isfinite(x).all(-1)], or fill them",
            )


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
        >>> import pyro.distributions as dist
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
          expected: ['z'], as in the model
          got:      ['latent'] in the guide
          try:      give each guide site the name of the model's
    """
    check_batch(batch)
    few = tuple(part[:8] for part in batch)
    with preserved_rng(), evaluating(model, guide), torch.no_grad(), pyro.validation_enabled(True):
        guide_trace = _traced("guide", guide, few)
        guide_sites = {site["name"]: site for site in latent_sites(guide_trace)}
        for site in guide_sites.values():
            _check_plate(site, "guide", len(few[0]))
        model_trace = _traced("model", model, few)  # alone: a wrong draw may break its networks
        model_sites = {site["name"]: site for site in latent_sites(model_trace)}
        if set(guide_sites) != set(model_sites):
            refuse(
                "model and guide have different latent sites",
                expected=f"{sorted(model_sites)}, as in the model",
                got=f"{sorted(guide_sites)} in the guide",
                advice="give each guide site the name of the model's",
            )
        for name, site in model_sites.items():
            _check_plate(site, "model", len(few[0]))
            _check_event(site, guide_sites[name])
        model_trace = _traced("model", poutine.replay(model, trace=guide_trace), few)
        _check_observation(model_trace, batch)
        for side, program, trace in (("model", model, model_trace), ("guide", guide, guide_trace)):
            _check_parameters(side, program, trace)
        _check_draws(model, guide, few)


def check_model(model: Model, batch: Batch) -> None:
    """What `check_pair` asks of the model alone, for ways to p(z | x) that need no guide.

    Args:
        model: p(z) p(x | z).
        batch: tensors of any number of rows.

    Raises:
        ValueError: the first of these that does not hold: what, expected, got, try.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> check_model(model, (torch.zeros(3),))
    """
    check_batch(batch)
    few = tuple(part[:8] for part in batch)
    with preserved_rng(), evaluating(model), torch.no_grad(), pyro.validation_enabled(True):
        trace = _traced("model", model, few)
        for site in latent_sites(trace):
            _check_plate(site, "model", len(few[0]))
        _check_observation(trace, batch)


def check_support(distribution: Any, x: Tensor) -> None:
    """Refuse data to which a likelihood gives no probability.

    Args:
        distribution: p(x | z); only its support and event shape are read.
        x: data, `(N, *event)`.

    Raises:
        ValueError: rows outside the support, or of another shape, with the remedy.

    Example:
        >>> import pyro.distributions as dist
        >>> check_support(dist.Bernoulli(torch.ones(4) / 2).to_event(1), torch.ones(3, 4))
    """
    event = tuple(distribution.event_shape)
    if tuple(x.shape[1:]) != event:
        refuse(
            "x has another shape than p(x | z)",
            expected=f"rows of shape {event}",
            got=f"rows of shape {tuple(x.shape[1:])}",
            advice="x.flatten(1) for images, and a decoder with as many outputs",
        )
    bad = ~distribution.support.check(x)
    if bad.any():
        low, high = x.min().item(), x.max().item()
        refuse(
            f"x is outside the support of {_name(distribution)}",
            expected=f"values in {_kind(distribution.support)}",
            got=f"{int(bad.sum())} of {len(x)} rows outside, {_first_rows(bad)}; "
            f"values from {low:g} to {high:g}",
            advice=_remedy(distribution, low, high),
        )


def _check_observation(trace: poutine.Trace, batch: Batch) -> None:
    site = next((site for site in observed_sites(trace) if site["name"] == "x"), None)
    if site is None:
        refuse(
            "model does not observe 'x'",
            expected="pyro.sample('x', ..., obs=x)",
            got=f"sites {[site['name'] for site in all_sites(trace)]}",
            advice="name the observation 'x' and pass obs=x",
        )
    _check_plate(site, "model", len(site["value"]))
    if all(bound.dim() == 0 for bound in bounds_of(site["fn"].support)):
        check_support(site["fn"], batch[0])


def _check_parameters(side: str, program: Callable[..., Any], trace: poutine.Trace) -> None:
    """Refuse a module whose parameter Pyro's store has replaced by one of the same name."""
    own = dict(program.named_parameters()) if isinstance(program, nn.Module) else {}
    nodes: dict[str, Any] = trace.nodes
    for name, site in nodes.items():
        parameter = own.get(name.replace("$$$", ".")) if site["type"] == "param" else None
        if parameter is not None and site["value"].unconstrained() is not parameter:
            refuse(
                f"parameter {name!r} of the {side} is not its own: Pyro's global store holds "
                "another of that name",
                expected="names that no other module has used",
                got="a parameter that no step would move",
                advice="other attribute names, pv.PairModule for PyroModule, or "
                "pyro.clear_param_store()",
            )


def _traced(side: str, program: Callable[..., Any], batch: Batch) -> poutine.Trace:
    try:
        return poutine.trace(program).get_trace(*batch)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        shapes = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in batch)
        refuse(
            f"the {side} cannot take this batch",
            expected=f"{side}(*batch) to run on {shapes}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            advice="compare shape and dtype with the network's first layer; x.flatten(1) for "
            "images, x.float() for other dtypes",
            cause=error,
        )


def _check_plate(site: dict[str, Any], side: str, size: int) -> None:
    where = f"site {site['name']!r} of the {side}"
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    if [(frame.name, frame.dim) for frame in frames] != [("data", -1)]:
        refuse(
            f"{where} is not in the plate 'data' alone",
            expected="one plate 'data' at dim -1",
            got=", ".join(f"{frame.name!r} at dim {frame.dim}" for frame in frames) or "no plate",
            advice='with pyro.plate("data", len(x)): ..., and .to_event(1) for other dims',
        )
    if frames[0].size != size:
        refuse(
            f"plate 'data' of the {side} has another size than the batch",
            expected=f"{size}, the rows of x",
            got=frames[0].size,
            advice='pyro.plate("data", len(x)), or subsample=x for a larger plate',
        )
    if site["fn"].batch_shape != (size,):
        refuse(
            f"{where} has another batch shape than its plate",
            expected=f"batch shape ({size},)",
            got=tuple(site["fn"].batch_shape),
            advice=".to_event(1): one event for each datum",
        )


def _check_event(model_site: dict[str, Any], guide_site: dict[str, Any]) -> None:
    name, prior, posterior = model_site["name"], model_site["fn"], guide_site["fn"]
    full, other = (site["cond_indep_stack"][0].full_size for site in (model_site, guide_site))
    if full != other:
        refuse(
            "the plates 'data' of model and guide stand for different numbers of data",
            expected=f"{full}, as in the model",
            got=f"{other} in the guide",
            advice="the same pyro.plate('data', N, subsample=x) on both sides",
        )
    if prior.event_shape != posterior.event_shape:
        refuse(
            f"site {name!r} has different event shapes",
            expected=f"{tuple(prior.event_shape)}, as in the model",
            got=f"{tuple(posterior.event_shape)} in the guide",
            advice="one latent dimension for prior, decoder and guide",
        )
    if not prior.support.check(guide_site["value"]).all():
        refuse(
            f"the guide draws {name!r} outside the support of its prior",
            expected=f"values in {_kind(prior.support)}",
            got=f"values in {_kind(posterior.support)}",
            advice="a guide with the support of the prior",
        )


def _check_draws(model: Model, guide: Guide, batch: Batch) -> None:
    try:
        log_densities(model, guide, batch, draws=2)
    except (RuntimeError, ValueError, IndexError) as error:
        refuse(
            "the pair cannot take several draws at once",
            expected="networks that keep leading dimensions, (S, B, L) -> (S, B, D)",
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            advice="z.reshape(*z.shape[:-1], ...) for z.view(-1, ...), dim=-1 for dim=1",
            cause=error,
        )


def _first_rows(bad: Tensor) -> str:
    rows = bad.nonzero().flatten().tolist()
    return f"the first {rows[:5]}" if len(rows) > 5 else f"rows {rows}"


def _remedy(distribution: Any, low: float, high: float) -> str:
    if _name(distribution) in ("Poisson", "NegativeBinomial", "Categorical"):
        return "a likelihood for such values, such as pv.likelihoods.Normal(scale), or x.round()"
    if low >= 0 and 1 < high <= 255:
        return "x / 255 for pixels of 8 bits, then binarise"
    return (
        "binarise, x.bernoulli() or (x > 0.5).float(), or take a likelihood for such values, "
        "pv.likelihoods.Normal(scale)"
    )


def _name(distribution: Any) -> str:
    return type(getattr(distribution, "base_dist", distribution)).__name__


def _kind(support: Any) -> str:
    return str(getattr(support, "base_constraint", support)).removesuffix("()")
