"""Semi-amortized inference: a few gradient steps from the encoder's answer."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae.guides.amortized import AbstractAmortizedGuide
from pyro_vae.log_joint import LogJoint
from pyro_vae.pair import Model, PairModule, frozen


class RefinedGuide(PairModule):
    r"""The encoder's $q$, improved for each datum by ascending its own ELBO.

    $$\lambda_0 = f(x), \qquad \lambda_{t+1} = \lambda_t + \eta\,\mathrm{Adam}\left(
      \nabla_\lambda \mathbb E_{q_\lambda}[\log p(x, z) - \log q_\lambda(z)]\right)$$

    Args:
        guide: an amortized guide; its parameters are the only ones here.
        model: the model of the pair. It is called, not owned.
        steps: of ascent.
        lr: η, in units of the features.
        draws: `z` for each gradient, the same points of randomised quasi-Monte Carlo at each
            step and for each datum; at least `4 L` are taken, as a scale that no point sees would
            grow without bound.
        seed: of these points.

    Warning:
        Steps are not differentiated through: to train the encoder, fit the amortized guide.
        A call costs `steps` times `draws` evaluations of the model for each datum.

    References:
        Yoon Kim, Sam Wiseman, Andrew Miller, David Sontag, Alexander Rush. *Semi-Amortized
        Variational Autoencoders*, 2018.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> amortized = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> x = torch.ones(5, 3)
        >>> before = pv.bounds(model, amortized, (x,)).elbo
        >>> after = pv.bounds(model, RefinedGuide(amortized, model), (x,)).elbo
        >>> bool((after > before).all())
        True
    """

    def __init__(
        self,
        guide: AbstractAmortizedGuide,
        model: Model,
        *,
        steps: int = 50,
        lr: float = 0.05,
        draws: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if steps < 1 or draws < 1 or not lr > 0:
            raise ValueError(
                f"steps and draws must be >= 1 and lr > 0; got {steps}, {draws} and {lr}"
            )
        self.guide = guide
        self._model = (model,)  # in a tuple, so that it is not registered here
        self.steps, self.lr, self.draws, self.seed = steps, lr, draws, seed

    def forward(self, *batch: Tensor) -> Tensor:
        """Sample the site `"z"` for each row of the batch."""
        posterior = self.posterior(*batch)
        with pyro.plate("data", len(batch[0])):
            return pyro.sample("z", posterior)

    def posterior(self, *batch: Tensor) -> dist.TorchDistribution:
        """q(z | x) after the steps: batch shape `(B,)`, event shape `(L,)`."""
        with torch.no_grad():
            start = self.guide.encoder(*batch)
        features = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([features], lr=self.lr)
        (model,) = self._model
        with poutine.block(), frozen(model, self.guide), torch.enable_grad():
            target = LogJoint(model, batch)
            for _ in range(self.steps):
                with _SameNoise(self.seed):
                    q = self.guide.distribution(features)
                    draws = max(self.draws, 4 * q.event_shape.numel())
                    z = q.rsample(torch.Size([draws]))
                    loss = (q.log_prob(z) - target.of_latent(z)).mean(0).sum()
                (features.grad,) = torch.autograd.grad(loss, [features])
                optimizer.step()
        return self.guide.distribution(features.detach())


class _SameNoise(TorchFunctionMode):
    """Normal noise `(S, B, ...)`, the same for each row, whatever its neighbours.

    Quantiles of scrambled Sobol points cover the normal law more evenly than draws do.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.normal_:
            return func(*args, **(kwargs or {}))
        (noise,) = args
        draws, _, *event = noise.shape
        sobol = torch.quasirandom.SobolEngine(math.prod(event), scramble=True, seed=self.seed)
        points = torch.special.ndtri(sobol.draw(draws, dtype=torch.float64).clamp(1e-9, 1 - 1e-9))
        return noise.copy_(points.view(draws, 1, *event))
