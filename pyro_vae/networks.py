"""Networks that keep leading batch dimensions, and safe heads for scales.

An encoder maps `x` to the features of a guide, a decoder maps `z` to the features of a
likelihood; any `nn.Module` on `(..., in)` will do.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import softplus


class MLP(nn.Sequential):
    r"""A multilayer perceptron, $h_{k+1} = \phi(W_k h_k + b_k)$, linear at its end.

    Args:
        *widths: input, hidden layers, output.
        activation: makes $\phi$; smooth by default, which quadrature and HMC thank you for.

    Shape:
        `(..., widths[0])` to `(..., widths[-1])`.

    Raises:
        ValueError: fewer than two widths, or one that is not a positive integer.

    Example:
        >>> import torch
        >>> MLP(64, 128, 2)(torch.zeros(5, 3, 64)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(self, *widths: int, activation: Callable[[], nn.Module] = nn.SiLU) -> None:
        if len(widths) < 2 or any(not isinstance(w, int) or w < 1 for w in widths):
            raise ValueError(f"MLP wants at least two widths, integers >= 1; got {widths}")
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])


def positive(raw: Tensor, floor: float = 1e-4) -> Tensor:
    """Map the reals to (floor, ∞): softplus, since exp overflows on a wild first step.

    Example:
        >>> import torch
        >>> positive(torch.tensor([-1e3, 0.0, 1e3]))
        tensor([1.0000e-04, 6.9325e-01, 1.0000e+03])
    """
    return softplus(raw) + floor
