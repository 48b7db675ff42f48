"""Generative models p(z) p(x | z), one family a file."""

from pyro_vae.models.autoencoder import Autoencoder as Autoencoder
from pyro_vae.models.conditional import ConditionalVAE as ConditionalVAE
from pyro_vae.models.hierarchical import HierarchicalVAE as HierarchicalVAE
from pyro_vae.models.ppca import PPCA as PPCA
from pyro_vae.models.vae import VAE as VAE
from pyro_vae.models.vector_quantized import Codebook as Codebook
from pyro_vae.models.vector_quantized import VectorQuantizedVAE as VectorQuantizedVAE
from pyro_vae.models.vector_quantized import perplexity as perplexity
