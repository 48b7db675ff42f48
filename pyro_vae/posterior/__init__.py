"""Ways to p(z | x), each the witness of the next: quadrature, Markov chains, annealing."""

from pyro_vae.posterior.annealed import Annealed as Annealed
from pyro_vae.posterior.annealed import Sandwich as Sandwich
from pyro_vae.posterior.annealed import annealed as annealed
from pyro_vae.posterior.annealed import sandwich as sandwich
from pyro_vae.posterior.draws import Draws as Draws
from pyro_vae.posterior.hmc import hmc as hmc
from pyro_vae.posterior.nuts import nuts as nuts
from pyro_vae.posterior.quadrature import Quadrature as Quadrature
from pyro_vae.posterior.quadrature import quadrature as quadrature
from pyro_vae.posterior.sgld import sgld as sgld
