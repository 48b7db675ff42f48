"""Data sets: published ones by name and your own, split, binarised as you say."""

from pyro_vae.data.binarize import Binarize as Binarize
from pyro_vae.data.binarize import bernoulli as bernoulli
from pyro_vae.data.binarize import dynamic as dynamic
from pyro_vae.data.binarize import threshold as threshold
from pyro_vae.data.dataset import Dataset as Dataset
from pyro_vae.data.dataset import from_array as from_array
from pyro_vae.data.files import from_file as from_file
from pyro_vae.data.images import from_images as from_images
from pyro_vae.data.sets import load as load
