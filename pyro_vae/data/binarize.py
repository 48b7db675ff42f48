"""From grey values in [0, 1] to 0 and 1: at one half, drawn once, or drawn for each batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.checks import refuse

Binarize = Callable[[Tensor], Tensor]
"""Grey rows in [0, 1] -> binary rows of the same shape."""


def threshold(x: Tensor) -> Tensor:
    """Binarise grey values in [0, 1] at one half.

    Raises:
        ValueError: values outside [0, 1].

    Example:
        >>> threshold(torch.tensor([0.2, 0.5, 0.7]))
        tensor([0., 0., 1.])
    """
    _check_grey(x)
    return (x > 0.5).to(x.dtype)


def bernoulli(seed: int = 0) -> Binarize:
    """Binarise grey values in [0, 1] by one Bernoulli draw each, once, from a fixed seed.

    Raises:
        ValueError: values outside [0, 1].

    References:
        Ruslan Salakhutdinov, Iain Murray. *On the Quantitative Analysis of Deep Belief
        Networks*, 2008.

    Example:
        >>> bernoulli(seed=0)(torch.full((4,), 0.5))
        tensor([1., 0., 1., 1.])
    """

    def sample(x: Tensor) -> Tensor:
        _check_grey(x)
        generator = torch.Generator().manual_seed(seed)
        return torch.bernoulli(x.cpu(), generator=generator).to(x)

    return sample


@dataclass(frozen=True)
class dynamic:
    """Keep training rows grey and draw each training batch anew; draw held-out rows once.

    The draws are noise that a model cannot learn by heart: log-likelihoods are higher than, and
    not comparable with, those after one fixed draw.

    Attributes:
        seed: of the one draw of validation and test rows.

    References:
        Yuri Burda, Roger Grosse, Ruslan Salakhutdinov. *Importance Weighted Autoencoders*, 2016.

    Example:
        >>> from pyro_vae.data import load
        >>> digits = load("digits", binarize=dynamic(seed=0))
        >>> digits.train[0].unique().numel(), digits.test[0].unique().numel()
        (17, 2)
        >>> digits.per_batch(digits.train[0][:128]).unique()
        tensor([0., 1.])
    """

    seed: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """The held-out rows, drawn once."""
        return bernoulli(self.seed)(x)


def _check_grey(x: Tensor) -> None:
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):
        refuse(
            "these values cannot be binarised",
            expected="grey values in [0, 1]",
            got=f"values from {x.min():g} to {x.max():g}",
            advice="x / 255 for pixels of 8 bits, or binarize=None",
        )
