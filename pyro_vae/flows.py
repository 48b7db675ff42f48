"""Normalising flows of zuko as Pyro distributions, for priors and for guides."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints


class FlowDistribution(dist.TorchDistribution):
    """A zuko flow that Pyro can expand, sample and score: in SVI, `Predictive` and NUTS.

    Args:
        flow: a zuko distribution over vectors.

    Example:
        >>> flow = FlowDistribution(spline_flow(2)())
        >>> flow.expand(torch.Size([3])).rsample().shape, flow.log_prob(torch.zeros(5, 2)).shape
        (torch.Size([3, 2]), torch.Size([5]))
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: Any) -> None:
        self.flow = flow
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Sample with gradients, `(*sample, *batch, L)`."""
        return self.flow.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Score `(..., L)`, in nats."""
        return self.flow.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same flow for a larger batch shape."""
        return FlowDistribution(self.flow.expand(torch.Size(batch_shape)))


def spline_flow(
    size: int,
    *,
    context: int = 0,
    transforms: int = 3,
    hidden: tuple[int, ...] = (64, 64),
    coupling: bool = False,
) -> nn.Module:
    """A neural spline flow: a module that returns a zuko distribution when called.

    Args:
        size: `L`.
        context: width of what it is conditioned on; 0 for none.
        transforms: how many splines are stacked.
        hidden: widths of the networks that give the splines' knots.
        coupling: two passes for either direction, instead of one to score and `L` to sample.

    References:
        Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. *Neural Spline
        Flows*, 2019.
        François Rozet et al. *Zuko: Normalizing flows in PyTorch*, 2022.

    Example:
        >>> spline_flow(2, context=4)(torch.zeros(3, 4)).sample().shape
        torch.Size([3, 2])
    """
    validate = torch.distributions.Distribution._validate_args
    try:
        import zuko
    except ImportError as error:
        raise ImportError("flows need zuko: pip install 'pyro-vae[flows]'") from error
    finally:  # zuko switches validation off for all of torch when it is imported
        torch.distributions.Distribution._validate_args = validate
    flow: nn.Module = zuko.flows.NSF(
        size,
        context,
        transforms=transforms,
        hidden_features=hidden,
        passes=2 if coupling and size > 1 else None,
    )
    return flow
