"""Guides q(z | x), one family a file."""

from pyro_vae.guides.amortized import MultivariateNormalGuide as MultivariateNormalGuide
from pyro_vae.guides.amortized import NormalGuide as NormalGuide
from pyro_vae.guides.corrupted import CorruptedGuide as CorruptedGuide
from pyro_vae.guides.corrupted import gaussian as gaussian
from pyro_vae.guides.corrupted import masking as masking
from pyro_vae.guides.delta import DeltaGuide as DeltaGuide
from pyro_vae.guides.flow import FlowGuide as FlowGuide
from pyro_vae.guides.hierarchical import HierarchicalGuide as HierarchicalGuide
from pyro_vae.guides.local import Table as Table
from pyro_vae.guides.quantized import QuantizedGuide as QuantizedGuide
from pyro_vae.guides.refined import RefinedGuide as RefinedGuide
