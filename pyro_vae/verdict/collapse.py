"""Which directions a linear model switches off: posterior collapse in closed form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.checks import check_batch, refuse


class LinearCollapse(NamedTuple):
    """Which principal directions a linear VAE leaves unused; what `linear_collapse` returns."""

    eigenvalues: Tensor
    """of the covariance of the data, descending, `(D,)`"""
    collapsed: Tensor
    """no larger than the variance of the noise, `(D,)`"""


def linear_collapse(x: Tensor, noise: float) -> LinearCollapse:
    r"""Where posterior collapse is no fault of the guide: the linear VAE, in closed form.

    At the optimum of $p(x \mid z) = \mathcal N(\mu + W z, \sigma^2 I)$ for fixed σ, of its
    ELBO as of its likelihood, the direction of the i-th eigenvector of the covariance has
    $|w_i|^2 = \max(0, \lambda_i - \sigma^2)$: it is dead if and only if $\lambda_i \le \sigma^2$.

    Args:
        x: data, `(N, D)`, `N >= 2`.
        noise: σ, positive, in the units of `x`.

    Returns:
        `LinearCollapse(eigenvalues, collapsed)`; a model of `L` latents uses the first `L`
        directions at most.

    Warning:
        A deep decoder may use directions that are dead here, and collapse for other reasons.

    Raises:
        ValueError: data that are no matrix, or noise that is not positive.

    References:
        James Lucas, George Tucker, Roger Grosse, Mohammad Norouzi. *Don't Blame the ELBO! A
        Linear VAE Perspective on Posterior Collapse*, 2019.

    Example:
        >>> x = torch.tensor([[2.0, 0.1], [-2.0, 0.1], [2.0, -0.1], [-2.0, -0.1]])
        >>> linear_collapse(x, noise=1.0).collapsed
        tensor([False,  True])
    """
    check_batch((x,), "data")
    if x.dim() != 2 or len(x) < 2 or not noise > 0:
        refuse(
            "the linear VAE has no such data or noise",
            expected="x of shape (N, D), N >= 2, and noise > 0",
            got=f"x of shape {tuple(x.shape)}, noise={noise}",
            advice="x.flatten(1), and the standard deviation of p(x | z)",
        )
    centred = x - x.mean(0)
    values = torch.linalg.eigvalsh(centred.mT @ centred / len(x)).flip(0).clamp_min(0)
    return LinearCollapse(values, values <= noise**2)
