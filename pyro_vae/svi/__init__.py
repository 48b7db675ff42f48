"""Stochastic variational inference: objectives, the training loop, weights on disk."""

from pyro_vae.svi import objectives as objectives
from pyro_vae.svi.checkpoint import load_weights as load_weights
from pyro_vae.svi.checkpoint import save_weights as save_weights
from pyro_vae.svi.fit import fit as fit
from pyro_vae.svi.repeat import repeat as repeat
from pyro_vae.svi.run import Epoch as Epoch
from pyro_vae.svi.run import Run as Run
from pyro_vae.svi.run import Runs as Runs
from pyro_vae.svi.schedules import cosine as cosine
from pyro_vae.svi.schedules import halving as halving
from pyro_vae.svi.tensorboard import tensorboard as tensorboard
