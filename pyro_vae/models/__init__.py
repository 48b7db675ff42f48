"""Generative models p(z) p(x | z), one family a file."""

from .ppca import PPCA as PPCA
from .vae import VAE as VAE
