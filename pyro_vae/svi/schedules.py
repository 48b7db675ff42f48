"""Learning rates that change: functions of the step, from 0, to the factor on `lr`."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def cosine(steps: int, *, warm_up: int = 0, end: float = 0.0) -> Schedule:
    r"""Rise linearly over `warm_up` steps to 1, then fall as a half cosine to `end` at `steps`.

    $$\eta(t) = e + (1 - e)\,\tfrac12\left(1 + \cos \pi\,\tfrac{t - w}{T - w}\right)$$

    Raises:
        ValueError: `steps` not above `warm_up`.

    References:
        Ilya Loshchilov, Frank Hutter. *SGDR: Stochastic Gradient Descent with Warm
        Restarts*, 2017.

    Example:
        >>> rate = cosine(8, warm_up=4)
        >>> [round(rate(step), 3) for step in (0, 3, 4, 6, 8, 99)]
        [0.25, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if not 0 <= warm_up < steps:
        raise ValueError(f"cosine wants 0 <= warm_up < steps; got {warm_up} and {steps}")

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        part = min((step - warm_up) / (steps - warm_up), 1.0)
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * part))

    return factor


def halving(every: int, *, factor: float = 0.5) -> Schedule:
    """Multiply by `factor` after each `every` steps.

    Raises:
        ValueError: `every` below 1, or a factor outside (0, 1].

    Example:
        >>> rate = halving(100)
        >>> rate(99), rate(100), rate(250)
        (1.0, 0.5, 0.25)
    """
    if every < 1 or not 0 < factor <= 1:
        raise ValueError(f"halving wants every >= 1 and 0 < factor <= 1; got {every}, {factor}")
    return lambda step: float(factor ** (step // every))
