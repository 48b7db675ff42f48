"""Ways to p(z | x), each the witness of the next: quadrature, then Markov chains."""

from .draws import Draws as Draws
from .nuts import nuts as nuts
from .quadrature import Quadrature as Quadrature
from .quadrature import quadrature as quadrature
