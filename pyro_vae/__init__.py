"""Deep latent-variable models in Pyro whose variational posteriors are held to account.

Nothing below is imported until it is used: `import pyro_vae` costs what Pyro costs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data as data
    from . import guides as guides
    from . import likelihoods as likelihoods
    from . import models as models
    from . import networks as networks
    from . import plots as plots
    from . import posterior as posterior
    from . import priors as priors
    from . import report as report
    from . import svi as svi
    from . import verdict as verdict
    from .checks import check_pair as check_pair
    from .pair import PairModule as PairModule
    from .pair import observation as observation
    from .ranks import sharded as sharded
    from .svi.checkpoint import load_weights as load_weights
    from .svi.checkpoint import save_weights as save_weights
    from .svi.fit import fit as fit
    from .verdict.bounds import bounds as bounds
    from .verdict.calibration import calibrate as calibrate
    from .verdict.compare import compare as compare
    from .verdict.diagnostics import diagnose as diagnose
    from .verdict.gaps import gaps as gaps

__version__ = "0.1.0"

_MODULES = (
    "data",
    "guides",
    "likelihoods",
    "models",
    "networks",
    "plots",
    "posterior",
    "priors",
    "report",
    "svi",
    "verdict",
)
_FUNCTIONS = {
    "bounds": "verdict.bounds",
    "calibrate": "verdict.calibration",
    "check_pair": "checks",
    "compare": "verdict.compare",
    "diagnose": "verdict.diagnostics",
    "fit": "svi.fit",
    "gaps": "verdict.gaps",
    "observation": "pair",
    "PairModule": "pair",
    "load_weights": "svi.checkpoint",
    "save_weights": "svi.checkpoint",
    "sharded": "ranks",
}

__all__ = ["__version__", *_MODULES, *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _FUNCTIONS:
        return getattr(import_module(f".{_FUNCTIONS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
