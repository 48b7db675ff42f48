"""KL divergences of Gaussians, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def normal_kl(mean: Tensor, sd: Tensor, other_mean: Tensor, other_sd: Tensor) -> Tensor:
    r"""KL divergence of one factorised Gaussian from another, in nats.

    $$\mathrm{KL}(q\|p) = \sum_i \log\frac{\sigma'_i}{\sigma_i}
      + \frac{\sigma_i^2 + (\mu_i - \mu'_i)^2}{2 \sigma_i'^2} - \frac12$$

    Args:
        mean: of q, `(..., L)`.
        sd: of q, `(..., L)`, positive.
        other_mean: of p, `(..., L)`.
        other_sd: of p, `(..., L)`, positive.

    Returns:
        `(...)`, at least 0.

    References:
        Diederik P. Kingma, Max Welling. *Auto-Encoding Variational Bayes*, 2014, appendix B.

    Example:
        >>> one = torch.ones(2)
        >>> normal_kl(one, one, 0 * one, one)
        tensor(1.)
    """
    ratio = sd / other_sd
    shift = (mean - other_mean) / other_sd
    return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).sum(-1)


def multivariate_normal_kl(
    mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor
) -> Tensor:
    r"""KL divergence of one Gaussian from another, full covariances, in nats.

    $$\mathrm{KL}(q\|p) = \frac12\left(\mathrm{tr}(\Sigma'^{-1}\Sigma)
      + (\mu'-\mu)^\top \Sigma'^{-1} (\mu'-\mu) - L + \log\frac{|\Sigma'|}{|\Sigma|}\right)$$

    Args:
        mean: of q, `(..., L)`.
        covariance: of q, `(..., L, L)`, positive definite.
        other_mean: of p, `(..., L)`.
        other_covariance: of p, `(..., L, L)`, positive definite.

    Returns:
        `(...)`, at least 0.

    Raises:
        torch.linalg.LinAlgError: a covariance that is not positive definite.

    Example:
        >>> zero, eye = torch.zeros(2), torch.eye(2)
        >>> multivariate_normal_kl(zero + 1, eye, zero, eye)
        tensor(1.)
    """
    tril = torch.linalg.cholesky(covariance)
    other_tril = torch.linalg.cholesky(other_covariance)
    whitened = torch.linalg.solve_triangular(other_tril, tril, upper=False)
    shift = torch.linalg.solve_triangular(
        other_tril, (mean - other_mean).unsqueeze(-1), upper=False
    ).squeeze(-1)
    log_ratio = (_log_diagonal(other_tril) - _log_diagonal(tril)).sum(-1)
    squares = whitened.square().sum((-1, -2)) + shift.square().sum(-1)
    return 0.5 * (squares - mean.shape[-1]) + log_ratio


def _log_diagonal(tril: Tensor) -> Tensor:
    return tril.diagonal(dim1=-2, dim2=-1).log()
