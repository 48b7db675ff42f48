"""How far a guide is from the posterior, datum by datum, and why."""

from .bounds import Bounds as Bounds
from .bounds import bounds as bounds
from .compare import Limits as Limits
from .compare import Verdict as Verdict
from .compare import compare as compare
