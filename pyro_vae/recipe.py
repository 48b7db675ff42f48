"""A fit as plain configuration: which data, which parts, which settings; and its run folder."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import nn

from pyro_vae import __version__, data, guides, likelihoods, models, networks, priors
from pyro_vae.atomic import replace_file
from pyro_vae.pair import preserved_rng
from pyro_vae.svi import Run as Fitted
from pyro_vae.svi import load_weights, objectives, schedules
from pyro_vae.svi.folder import read_log

BINARIZE: dict[str, Any] = {
    "usual": ...,
    "none": None,
    "threshold": data.threshold,
    "static": data.bernoulli(0),
    "dynamic": data.dynamic(0),
}
"""By name; `usual` is what papers do with the set."""


@dataclass(frozen=True)
class Part:
    """A class and its options.

    Attributes:
        name: of a class of this package, such as `GaussianMixture`, or `module:Class` of a
            module that is allowed by name.
        options: for its constructor.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def told(self) -> str:
        """As one would call it."""
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        name: a published set, a `.npy` or `.npz` file, or a folder of images.
        root: folder with published sets; `PYRO_VAE_DATA` by default.
        binarize: `usual`, `none`, `threshold`, `static` or `dynamic`.
        size: height and width to bring images of a folder to.
    """

    name: str = "digits"
    root: str | None = None
    binarize: str = "usual"
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Settings:
    """What `fit` is called with; see there.

    Attributes:
        epochs: passes over the training rows, at most.
        batch_size: rows a step.
        lr: learning rate.
        patience: epochs without a better validation ELBO to stop after.
        clip: largest norm of the gradient.
        average: decay of averaged weights.
        compile: record the step and compile it.
        warm_up: steps over which a weight on the KL grows from 0 to `beta`.
        beta: weight on the KL; 1 is the ELBO.
        cosine: steps over which the learning rate falls to 0.
        save_every: seconds between checkpoints.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float = 1e-3
    patience: int | None = None
    clip: float | None = None
    average: float | None = None
    compile: bool = False
    warm_up: int | None = None
    beta: float = 1.0
    cosine: int | None = None
    save_every: float = 60.0

    def options(self) -> dict[str, Any]:
        """For `fit`."""
        plain = ("epochs", "batch_size", "lr", "patience", "clip", "average", "compile")
        chosen: dict[str, Any] = {name: getattr(self, name) for name in (*plain, "save_every")}
        if self.cosine is not None:
            chosen["schedule"] = schedules.cosine(self.cosine)
        if self.warm_up is not None:
            chosen["objective"] = objectives.Beta(objectives.warm_up(self.warm_up, end=self.beta))
        elif self.beta != 1.0:
            chosen["objective"] = objectives.Beta(self.beta)
        return chosen


@dataclass(frozen=True)
class Recipe:
    """A VAE, its guide and how they are fitted.

    Attributes:
        data: the rows.
        latent: `L`, latent dimensions.
        hidden: widths of the hidden layers of the encoder; the decoder's are its mirror image.
        network: `MLP` or `GatedMLP`, or a class of yours that takes widths.
        prior: p(z).
        likelihood: p(x | z) given features.
        guide: q(z | x).
        fit: settings of the fit.
        seed: of weights, rows and draws.
    """

    data: Source = field(default_factory=Source)
    latent: int = 2
    hidden: tuple[int, ...] = (128, 128)
    network: str = "MLP"
    prior: Part = field(default_factory=lambda: Part("StandardNormal"))
    likelihood: Part = field(default_factory=lambda: Part("Bernoulli"))
    guide: Part = field(default_factory=lambda: Part("NormalGuide"))
    fit: Settings = field(default_factory=Settings)
    seed: int = 0

    def told(self) -> dict[str, str]:
        """What a reader of a report wants to know of it."""
        widths = "–".join(map(str, self.hidden))
        chosen = {k: v for k, v in asdict(self.fit).items() if v not in (None, False)}
        return {
            "networks": f"{self.network}, hidden {widths}, L = {self.latent}",
            **{name: getattr(self, name).told() for name in ("prior", "likelihood", "guide")},
            "settings": ", ".join(f"{name} {value}" for name, value in chosen.items()),
            "seed": str(self.seed),
        }


class Run(NamedTuple):
    """A run folder, opened."""

    folder: Path
    recipe: Recipe
    data: data.Dataset
    model: models.VAE
    guide: Any

    @property
    def fitted(self) -> Fitted:
        """What its fit measured."""
        return read_log(self.folder, asked=self.recipe.fit.epochs)


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
        raise ValueError(_unknown("binarize", source.binarize, BINARIZE))
    choice, path = BINARIZE[source.binarize], Path(source.name)
    own = None if choice is ... else choice
    if path.is_dir():
        return data.from_images(path, size=source.size, binarize=own)
    if path.suffix in (".npy", ".npz"):
        return data.from_file(path, binarize=own)
    return data.load(source.name, root=source.root, binarize=choice)


def begin_run(folder: Path, recipe: Recipe) -> None:
    """Write `config.yaml`, to edit and to fit again; weights of before are no result of it."""
    import yaml

    for name in ("model.safetensors", "guide.safetensors", "history.csv"):
        (folder / name).unlink(missing_ok=True)
    path = Path(recipe.data.name)
    if path.exists():  # from whatever folder the run is opened
        recipe = replace(recipe, data=replace(recipe.data, name=str(path.resolve())))
    plain = json.loads(json.dumps(asdict(recipe)))
    text = yaml.safe_dump({"version": __version__, **plain}, sort_keys=False)
    replace_file(folder / "config.yaml", text)


def writable_folder(folder: str | Path) -> Path:
    """Make a folder, or say in one sentence why it cannot be written.

    Raises:
        ValueError: it is a file, or may not be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     writable_folder(Path(parent) / "new").is_dir()
        True
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(
            f"cannot write into the output folder {str(folder)!r}: {reason}"
            "\n  try:      another folder, --out FOLDER"
        ) from error
    return folder


def open_run(folder: str | Path, *, allow: Sequence[str] = ()) -> Run:
    """Build what a run folder describes, with its weights; no code of the folder's is run.

    Raises:
        ValueError: no run, an unfinished one, one of a newer version, or one that does not fit.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise ValueError(
            f"{str(path)!r} is no run folder: it has no config.yaml"
            "\n  try:      a folder that `pyro-vae fit --out FOLDER` made"
        )
    if not (path / "guide.safetensors").is_file():
        raise ValueError(
            f"the run in {str(path)!r} is not finished: it has no weights yet"
            f"\n  try:      pyro-vae fit --config {path / 'config.yaml'} --out {path}: it goes on"
        )
    recipe = read_recipe(path / "config.yaml")
    built = build(recipe, allow=allow)
    try:
        load_weights(path, built.model, built.guide)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"the weights in {str(path)!r} are not those of its config.yaml: "
            f"{str(error).splitlines()[0]}\n  try:      undo the change of config.yaml"
        ) from error
    return Run(path, recipe, *built)


def read_recipe(path: str | Path) -> Recipe:
    """A recipe from a YAML or TOML file.

    Raises:
        ValueError: no such file, another format, an unknown key, with the nearest known.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text()
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds no configuration")
    version = str(found.pop("version", __version__))
    if _numbers(version) > _numbers(__version__):
        raise ValueError(
            f"{str(path)!r} is of pyro_vae {version}, this is {__version__}"
            "\n  try:      pip install --upgrade pyro-vae"
        )
    return _from_plain(Recipe, found, str(path))


def recipe_of(options: Any) -> Recipe:
    """A recipe from parsed options of the same names."""
    plain = {f.name: getattr(options, f.name) for f in fields(Recipe)}
    plain = {k: v.as_dict() if hasattr(v, "as_dict") else v for k, v in plain.items()}
    return _from_plain(Recipe, plain, "options")


def refuse_another(folder: Path, recipe: Recipe) -> None:
    """Leave a folder alone that holds the run of another recipe.

    Raises:
        ValueError: it does; what only prolongs or hastens a fit may differ.
    """
    if not (folder / "config.yaml").exists():
        return
    free = ("epochs", "patience", "save_every", "compile")
    found, wanted = (
        {**asdict(r), "fit": {k: v for k, v in asdict(r.fit).items() if k not in free}}
        for r in (read_recipe(folder / "config.yaml"), recipe)
    )
    for plain in (found, wanted):
        if (path := Path(plain["data"]["name"])).exists():
            plain["data"]["name"] = str(path.resolve())
    other = [key for key in wanted if found[key] != wanted[key]]
    if other:
        raise ValueError(
            f"folder {str(folder)!r} holds the run of another configuration: {', '.join(other)} "
            f"differ\n  expected: that of {folder / 'config.yaml'}\n  try:      another --out"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _from_plain(kind: Any, found: Any, where: str) -> Any:
    """A dataclass from nested mappings."""
    if isinstance(found, str) and kind in (Part, Source):
        found = {"name": found}
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected keys, got {found!r}")
    kinds = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in found.items():
        if key not in kinds:
            raise ValueError(f"{where}: {_unknown('key', key, kinds)}")
        if not is_dataclass(hints[key]) and not _fits(value, hints[key]):
            raise ValueError(
                f"{where}: {key} is of another kind\n  expected: {_named(hints[key])}"
                f"\n  got:      {value!r}"
            )
        nested = {"data": Source, "fit": Settings}.get(key)
        nested = Part if key in ("prior", "likelihood", "guide") else nested
        values[key] = _from_plain(nested, value, f"{where}, {key}") if nested else value
    for name, own in kinds.items():
        if name not in values and own.default is MISSING and own.default_factory is MISSING:
            raise ValueError(f"{where}: {name} is missing")
    return kind(**_tuples(values))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from a file is of a type: numbers, text, lists and mappings."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        sizes = get_args(hint)
        counted = sizes[-1] is Ellipsis or len(sizes) == len(value) if _is_list(value) else False
        return counted and all(_fits(item, sizes[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _named(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace("NoneType", "null")


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
                _unknown(home.__name__.rpartition(".")[2].removesuffix("s"), name, known)
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
            raise ValueError(_unknown(f"option of {part.name}", option, list(known)))
    offered = {name: value for name, value in offered.items() if name in known}
    try:
        return make(*given, **{**offered, **_tuples(part.options)})
    except TypeError as error:
        raise ValueError(f"{part.name} cannot be made: {error}") from error


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _unknown(what: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"{near[0]!r}?" if near else f"one of {sorted(known)}"
    return f"unknown {what} {name!r}\n  try:      {hint}"
