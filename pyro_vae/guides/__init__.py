"""Guides q(z | x), one family a file."""

from .amortized import MultivariateNormalGuide as MultivariateNormalGuide
from .amortized import NormalGuide as NormalGuide
