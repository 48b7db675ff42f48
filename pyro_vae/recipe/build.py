"""From a recipe to data, model and guide."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from pyro_vae import data, guides, likelihoods, models, networks, priors
from pyro_vae.pair import preserved_rng
from pyro_vae.recipe.recipe import Part, Recipe, Source, tuples, unknown

BINARIZE: dict[str, Any] = {
    "usual": ...,
    "none": None,
    "threshold": data.threshold,
    "static": data.bernoulli(0),
    "dynamic": data.dynamic(0),
}
"""By name; `usual` is what papers do with the set."""


class Built(NamedTuple):
    """What a recipe makes."""

    data: data.Dataset
    model: models.VAE
    guide: Any


def build(recipe: Recipe, *, allow: Sequence[str] = ()) -> Built:
    """Load the data and make the pair, weights seeded by the recipe.

    Args:
        recipe: what to make.
        allow: modules, by name, that classes may be taken from besides this package; nothing
            else is imported, whatever the recipe says.

    Raises:
        ValueError: an unknown name or option, with the nearest known; a module not allowed.

    Example:
        >>> built = build(Recipe(prior=Part("GaussianMixture", {"components": 5})))
        >>> built.model(None, size=3).shape
        torch.Size([3, 64])
    """
    rows = load_rows(recipe.data)
    with preserved_rng(recipe.seed):
        find = _Finder(allow)
        network = find(recipe.network, networks)
        family = find(recipe.guide.name, guides)
        encoder = network(rows.observed, *recipe.hidden, family.features(recipe.latent))
        guide = _made(family, recipe.guide, encoder, latent_dim=recipe.latent)
        kind = find(recipe.prior.name, priors)
        if kind is priors.VampPrior:
            components = recipe.prior.options.get("components")
            if not isinstance(components, int) or components < 1:
                raise ValueError(f"VampPrior: components must be 1 or more; got {components!r}")
            few = rows.train[0][: 100 * components]
            x = few if rows.per_batch is None else rows.per_batch(few)
            make = kind.from_data
            prior = _made(make, recipe.prior, guide.posterior, x)
        else:
            prior = _made(kind, recipe.prior, latent_dim=recipe.latent)
        family = find(recipe.likelihood.name, likelihoods)
        likelihood = _made(family, recipe.likelihood, observed=rows.observed)
        outputs = likelihood.features(rows.observed)
        decoder = network(recipe.latent, *recipe.hidden[::-1], outputs)
    return Built(rows, models.VAE(decoder, prior=prior, likelihood=likelihood), guide)


def load_rows(source: Source) -> data.Dataset:
    """The data of a recipe.

    Raises:
        ValueError: nothing of that name.
    """
    if source.binarize not in BINARIZE:
        raise ValueError(unknown("binarize", source.binarize, BINARIZE))
    choice = BINARIZE[source.binarize]
    own = None if choice is ... else choice
    if source.path is None:
        return data.load(source.name, root=source.root, binarize=choice)
    if source.path.is_dir():
        return data.from_images(source.path, size=source.size, binarize=own)
    return data.from_file(source.path, binarize=own)


class _Finder:
    """Classes by name, of this package and of modules that are allowed."""

    def __init__(self, allow: Sequence[str]) -> None:
        self.allow = allow

    def __call__(self, name: str, home: ModuleType) -> Any:
        module, colon, cls = name.rpartition(":")
        if colon and module:
            if module not in self.allow:
                raise ValueError(
                    f"{name!r} is of a module that is not allowed\n  expected: a class of "
                    f"pyro_vae, or --allow {module}, if you trust its code"
                )
            try:
                found = getattr(importlib.import_module(module), cls, None)
            except ModuleNotFoundError as error:
                raise ValueError(
                    f"{error}\n  try:      PYTHONPATH=FOLDER, the one that {module}.py lies in"
                ) from error
            if found is None:
                raise ValueError(f"module {module!r} has no {cls!r}")
            return found
        known = parts_of(home)
        if name not in known:
            raise ValueError(
                unknown(home.__name__.rpartition(".")[2].removesuffix("s"), name, known)
            )
        return known[name]


def parts_of(home: ModuleType) -> dict[str, Any]:
    """The classes of priors, likelihoods, guides or networks that a recipe can build."""
    fit_in = {
        networks: lambda kind: issubclass(kind, networks.MLP | networks.GatedMLP),
        priors: lambda kind: (
            "latent_dim" in inspect.signature(kind).parameters or kind is priors.VampPrior
        ),
        likelihoods: lambda kind: hasattr(kind, "features"),
        guides: lambda kind: hasattr(kind, "features"),
    }[home]
    return {
        name: value
        for name, value in vars(home).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and fit_in(value)
    }


def _made(make: Callable[..., Any], part: Part, *given: Any, **offered: Any) -> Any:
    """Call a constructor with the options of a part, and those of ours that it takes."""
    known = inspect.signature(make).parameters
    for option in part.options:
        if option not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise ValueError(unknown(f"option of {part.name}", option, list(known)))
    offered = {name: value for name, value in offered.items() if name in known}
    try:
        return make(*given, **{**offered, **tuples(part.options)})
    except TypeError as error:
        raise ValueError(f"{part.name} cannot be made: {error}") from error
