"""How far a guide is from the posterior, datum by datum, and why."""

from pyro_vae.verdict.bounds import Bounds as Bounds
from pyro_vae.verdict.bounds import bounds as bounds
from pyro_vae.verdict.compare import Limits as Limits
from pyro_vae.verdict.compare import Verdict as Verdict
from pyro_vae.verdict.compare import compare as compare
