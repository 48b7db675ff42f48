"""Fitting a pair by stochastic variational inference."""

from pyro_vae.svi import objectives as objectives
from pyro_vae.svi.fit import Epoch as Epoch
from pyro_vae.svi.fit import Run as Run
from pyro_vae.svi.fit import fit as fit
