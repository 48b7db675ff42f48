"""Fitting a pair by stochastic variational inference."""

from .fit import Epoch as Epoch
from .fit import Run as Run
from .fit import fit as fit
