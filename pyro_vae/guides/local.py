"""Variational parameters of their own for each datum: what came before amortization."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Table(nn.Module):
    r"""An encoder that is a table: a row of free parameters $\lambda_n$ for each datum.

    Under any amortized family it makes the local one: `NormalGuide(Table(x, 4))` has
    $q(z_n) = \mathcal N(\mu_n, \mathrm{diag}\,\sigma_n^2)$. Rows are found by their content, so
    batches may come in any order; equal rows share their parameters, as they share their
    posterior.

    Args:
        x: the data that have parameters, `(N, D)`.
        features: `F`, what the guide wants: `NormalGuide.features(L)`.
        start: an encoder, or another function of `x`, whose answers are the first parameters;
            zeros by default.

    Warning:
        It knows nothing of other data; dynamic binarisation makes every batch other data. From
        zeros a row may climb to a minor mode of its posterior: `start` from a fitted encoder.

    Raises:
        ValueError: a `start` of another width; when called, a row that is not in the table.

    References:
        Matthew D. Hoffman, David M. Blei, Chong Wang, John Paisley. *Stochastic Variational
        Inference*, 2013.

    Example:
        >>> x = torch.rand(100, 64)
        >>> Table(x, 4)(x[[7, 3]]).shape
        torch.Size([2, 4])
    """

    keys: Tensor
    order: Tensor
    weights: Tensor

    def __init__(
        self, x: Tensor, features: int, *, start: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        bounds = -(2**62), 2**62
        self.register_buffer("weights", torch.randint(*bounds, (x.shape[1],), generator=generator))
        keys, order = self._fingerprint(x).sort()
        self.register_buffer("keys", keys)
        self.register_buffer("order", order)
        with torch.no_grad():
            rows = torch.zeros(len(x), features) if start is None else start(x)
        if rows.shape != (len(x), features):
            raise ValueError(
                f"start must give {features} features for each of {len(x)} rows; "
                f"got {tuple(rows.shape)}"
            )
        self.parameters_of = nn.Parameter(rows.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Look up `(B, D)` rows; returns `(B, F)`."""
        wanted = self._fingerprint(x)
        place = torch.searchsorted(self.keys, wanted).clamp_max(len(self.keys) - 1)
        missing = self.keys[place] != wanted
        if missing.any():
            rows = missing.nonzero().flatten().tolist()
            raise ValueError(
                f"{len(rows)} of {len(x)} rows are not in the table, the first {rows[:5]}"
                "\n  expected: rows of the data that the table was made for"
                "\n  try:      Table(x, features) for these data, or an amortized encoder"
            )
        return self.parameters_of[self.order[place]]

    def _fingerprint(self, x: Tensor) -> Tensor:
        """Exact for equal rows whatever the batch: integer sums do not depend on their order."""
        bits = (x + 0.0).double().view(torch.int64)  # −0.0 + 0.0 = 0.0
        mixed = (bits ^ (bits >> 29)) * self.weights
        return ((mixed ^ (mixed >> 31)) * self.weights.roll(1)).sum(-1)
