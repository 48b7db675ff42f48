"""A fit as plain configuration: which data, which parts, which settings."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pyro_vae.svi import objectives, schedules


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

    @property
    def path(self) -> Path | None:
        """The file or folder of rows, where the name is no published set's."""
        path = Path(self.name)
        return path if path.is_dir() or path.suffix in (".npy", ".npz") else None

    def absolute(self) -> Source:
        """The same rows, from whatever folder one asks for them."""
        name = self.name if self.path is None else str(self.path.resolve())
        return replace(self, name=name, root=self.root and str(Path(self.root).resolve()))


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


def tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Lists of a file as the tuples that constructors want."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def unknown(what: str, name: str, known: Any) -> str:
    """A message that a name is not known, with the nearest that is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"{near[0]!r}?" if near else f"one of {sorted(known)}"
    return f"unknown {what} {name!r}\n  try:      {hint}"
