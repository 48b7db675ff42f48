"""How far weights can be raised before too few draws carry them."""

from __future__ import annotations

import torch
from torch import Tensor


def tempered(log_weight: Tensor, room: Tensor, threshold: float, count: int) -> Tensor:
    r"""The largest power of weights that leaves enough draws effective, for each datum.

    $$\max \beta \le \text{room}: \frac{(\sum_s w_s^\beta)^2}{\sum_s w_s^{2\beta}}
      \ge \text{threshold} \cdot \min(\text{count}, S)$$

    by bisection, where `S` counts the draws that have a weight at all.

    Args:
        log_weight: of `(S, B)` draws, nats.
        room: the largest power wanted, `(B,)`.
        threshold: a share.
        count: of draws that will be resampled.

    Returns:
        `(B,)`, at least 1e-6.
    """
    wanted = threshold * (log_weight > -torch.inf).sum(0).to(room).clamp_max(count)

    def enough(power: Tensor, which: Tensor | slice) -> Tensor:
        share = (power * log_weight[:, which]).softmax(0)
        return torch.linalg.vector_norm(share, dim=0).pow(-2) >= (1 - 1e-6) * wanted[which]

    found = room.clone()
    left = (~enough(room, slice(None))).nonzero().flatten()
    low, high = torch.zeros_like(room[left]), room[left]
    for _ in range(30 if len(left) else 0):
        middle = (low + high) / 2
        good = enough(middle, left)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    found[left] = low.clamp_min(1e-6).minimum(room[left])
    return found
