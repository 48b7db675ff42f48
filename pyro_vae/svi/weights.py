"""The trainable parameters of a pair and its buffers: found, copied, put back, averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.pair import Batch, Guide, Model


class Weights:
    """What a fit moves.

    Args:
        loss_of: the training loss of a batch; it is run once to see what it reaches.
        model: p(z) p(x | z).
        guide: q(z | x).
        batch: a few rows.
        average: decay of an exponential average of the parameters, which then stands for them
            wherever they are judged or kept; `None`: no average.

    Attributes:
        parameters: leaves that a gradient reaches.
        buffers: of both modules, running statistics among them.

    Raises:
        ValueError: no trainable parameter, or one that belongs to neither.
    """

    def __init__(
        self,
        loss_of: Callable[..., Tensor],
        model: Model,
        guide: Guide,
        batch: Batch,
        average: float | None = None,
    ) -> None:
        modules = [part for part in (model, guide) if isinstance(part, nn.Module)]
        self.buffers = [buffer for module in modules for buffer in module.buffers()]
        before = [buffer.clone() for buffer in self.buffers]
        with poutine.trace(param_only=True) as capture:
            loss = loss_of(*batch)
        for buffer, value in zip(self.buffers, before, strict=True):
            buffer.copy_(value)  # a look moves no running statistics
        sites: Any = capture.trace.nodes.values()
        found = [site["value"].unconstrained() for site in sites]
        self.parameters = list({id(p): p for p in found if p.requires_grad}.values())
        if not self.parameters:
            raise ValueError("nothing to fit: neither model nor guide has a trainable parameter")
        if strangers := _leaves(loss) - {id(p) for p in self.parameters}:
            raise ValueError(
                f"the loss reaches {len(strangers)} trainable tensors of neither model nor guide"
                "\n  expected: parameters of the pair\n  try:      copy model and guide together, "
                "deepcopy((model, guide)), where one calls the other; or register the module that "
                "holds them, or freeze it"
            )
        self.decay = average
        self.averaged = [p.detach().clone() for p in self.parameters] if average else []

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    @property
    def finite(self) -> bool:
        """Whether every parameter is a finite number."""
        return all(bool(torch.isfinite(p).all()) for p in self.parameters)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the average towards the parameters, after a step; faster in the first steps."""
        if self.decay is not None:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.averaged, self.parameters, 1 - decay)

    def copy(self) -> list[Tensor]:
        """Parameters, then buffers, as they are."""
        return [tensor.detach().clone() for tensor in (*self.parameters, *self.buffers)]

    def judged(self) -> list[Tensor]:
        """A copy in which averages stand for the parameters, if there is an average."""
        copy = self.copy()
        return [*(p.clone() for p in self.averaged), *copy[len(self.averaged) :]]

    @torch.no_grad()
    def restore(self, copy: list[Tensor]) -> None:
        """Put a copy back."""
        for tensor, value in zip((*self.parameters, *self.buffers), copy, strict=True):
            tensor.copy_(value)

    @contextmanager
    def holding(self, copy: list[Tensor]) -> Iterator[None]:
        """The pair with the values of a copy, for a while."""
        before = self.copy()
        self.restore(copy)
        try:
            yield
        finally:
            self.restore(before)


def _leaves(loss: Tensor) -> set[int]:
    """The identities of the tensors that a gradient of the loss would reach."""
    found, seen, stack = set(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(parent for parent, _ in node.next_functions)
    return found
