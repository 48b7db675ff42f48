"""Ways to p(z | x), each the witness of the next: quadrature, then Markov chains."""

from pyro_vae.posterior.draws import Draws as Draws
from pyro_vae.posterior.nuts import nuts as nuts
from pyro_vae.posterior.quadrature import Quadrature as Quadrature
from pyro_vae.posterior.quadrature import quadrature as quadrature
