"""An amortized flow: a posterior of any shape for each datum."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.flows import FlowDistribution, spline_flow
from pyro_vae.guides.amortized import AbstractAmortizedGuide
from pyro_vae.networks import positive

CONTEXT = 8
"""Features of a datum that its flow is conditioned on, besides mean and scale."""


class FlowGuide(AbstractAmortizedGuide):
    r"""A spline flow per datum, $z = \mu(x) + \sigma(x) \odot f(\epsilon; h(x))$.

    Couplings, so that sampling costs two passes whatever `L`.

    Args:
        encoder: maps `x`, `(..., D)`, to `(..., 2 L + 8)`: means, raw scales, context `h`.
        latent_dim: `L`.
        transforms: splines stacked.
        hidden: widths of the networks that give their knots.

    Warning:
        Splines act within 5 scales of the mean and are the identity beyond.

    Raises:
        ValueError: another number of features.

    References:
        Danilo J. Rezende, Shakir Mohamed. *Variational Inference with Normalizing Flows*, 2015.
        Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. *Neural Spline
        Flows*, 2019.

    Example:
        >>> import torch
        >>> guide = FlowGuide(nn.Linear(64, FlowGuide.features(2)), 2)
        >>> guide.posterior(torch.zeros(5, 64)).rsample().shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        *,
        transforms: int = 2,
        hidden: tuple[int, ...] = (64, 64),
    ) -> None:
        super().__init__(encoder)
        self.latent_dim = latent_dim
        self.flow = spline_flow(
            latent_dim, context=CONTEXT, transforms=transforms, hidden=hidden, coupling=True
        )

    @staticmethod
    def features(latent_dim: int) -> int:
        """2 L + 8: means, raw scales, and the context of the flow."""
        return 2 * latent_dim + CONTEXT

    def distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The flow with these means, raw scales and context, `(..., 2 L + 8)`."""
        size = self.latent_dim
        if features.shape[-1] != self.features(size):
            raise ValueError(
                f"FlowGuide of {size} latents wants {self.features(size)} features from its "
                f"encoder; got {features.shape[-1]}"
            )
        loc, raw_scale, context = features.split([size, size, CONTEXT], dim=-1)
        base = FlowDistribution(self.flow(context))
        affine = dist.transforms.AffineTransform(loc, positive(raw_scale), event_dim=1)
        return dist.TransformedDistribution(base, [affine], validate_args=False)
