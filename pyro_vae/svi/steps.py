"""One step of an optimizer on a batch: run by Pyro each time, or recorded once and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from pyro_vae.capture import CannotCaptureError, Recorded
from pyro_vae.ranks import summed
from pyro_vae.svi.adam import AdamUpdate

Arithmetic = Callable[[], AbstractContextManager[Any]]


class Steps:
    """Gradient, sum over ranks, clipping, update.

    Args:
        loss_of: the loss of a batch, per datum.
        optimizer: holds the parameters.
        parameters: those it was made with.
        clip: the norm above which the gradient of all parameters is scaled down, or `None`.
        arithmetic: makes a context for the loss, such as autocast.
        fabric: where several processes share each batch: sums their gradients.
    """

    def __init__(
        self,
        loss_of: Callable[..., Tensor],
        optimizer: Optimizer,
        parameters: list[Tensor],
        *,
        clip: float | None,
        arithmetic: Arithmetic,
        fabric: Any,
    ) -> None:
        self.loss_of, self.optimizer, self.parameters = loss_of, optimizer, parameters
        self.clip, self.arithmetic, self.fabric = clip, arithmetic, fabric

    def __call__(self, batch: tuple[Tensor, ...], share: float = 1.0) -> Tensor:
        """Take a step, on this process's `share` of a batch; returns the loss of the whole."""
        loss, *gradients = self.gradients(*batch)
        if self.fabric is not None:
            loss, *gradients = self._summed([loss, *gradients], share)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.clip is not None:
            clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return loss

    def gradients(self, *batch: Tensor) -> tuple[Any, ...]:
        """The loss of a batch, and its gradient by parameter; `None` for those not reached."""
        with self.arithmetic():
            loss = self.loss_of(*batch)
        return loss.detach(), *torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def settle(self) -> None:
        """Bring the optimizer's own count of steps up to date."""

    def _summed(self, parts: list[Tensor | None], share: float) -> list[Tensor | None]:
        """Loss and gradients of the whole batch, from each process's own."""
        present = [part for part in parts if part is not None]
        flat = torch.cat([part.flatten() for part in present]) * share
        flat = summed(flat, self.fabric)
        sums = iter(flat.split([part.numel() for part in present]))
        return [None if part is None else next(sums).view_as(part) for part in parts]


class RecordedSteps(Steps):
    """The same, with Pyro's effect handlers at the recording only.

    Batches of the first shape are compiled, with the update too where it is Adam's, one process
    works and the compiler can; others (the last of an epoch) replay a recording of their own.

    Args:
        *args: see `Steps`; the loss is a function of tensors alone.
        batch: of the shape to compile.
        **options: see `Steps`.

    Raises:
        CannotCaptureError: the loss cannot be recorded.
    """

    def __init__(self, *args: Any, batch: tuple[Tensor, ...], **options: Any) -> None:
        super().__init__(*args, **options)
        self.recordings: dict[tuple[int, ...], Callable[..., Any]] = {}
        recorded = Recorded(super().gradients, *batch)
        self.recordings[_shapes(batch)] = recorded
        self.whole: Callable[..., Tensor] | None = None
        try:
            self._compile(recorded, batch)
        except CannotCaptureError as error:
            warnings.warn(
                f"not compiled, recorded operations run one by one instead: {error}", stacklevel=5
            )

    def __call__(self, batch: tuple[Tensor, ...], share: float = 1.0) -> Tensor:
        """Take a step, in one call if the batch has the shape that was compiled."""
        if self.whole is None or _shapes(batch) != self.shape:
            self.settle()
            loss = super().__call__(batch, share)
            if self.whole is not None:
                self.update.read()
            return loss
        self.update.prepare()
        return self.whole(*batch).clone()

    def gradients(self, *batch: Tensor) -> tuple[Any, ...]:
        """The same by a recording of batches of this shape, made when the first comes."""
        shapes = _shapes(batch)
        if shapes not in self.recordings:
            self.recordings[shapes] = Recorded(super().gradients, *batch)
        return self.recordings[shapes](*batch)

    def settle(self) -> None:
        """Bring the optimizer's own count of steps up to date."""
        if self.whole is not None:
            self.update.settle()

    def forget_compiled(self) -> None:
        """Run recorded operations one by one from now on, as where nothing compiles."""
        self.settle()
        self.whole, self.recordings = None, {}

    def _compile(self, recorded: Recorded, batch: tuple[Tensor, ...]) -> None:
        self.shape = _shapes(batch)
        if self.fabric is not None or not AdamUpdate.knows(self.optimizer):
            self.recordings[self.shape] = recorded.compiled(*batch)
            return
        reached = [
            p for p, there in zip(self.parameters, recorded.present[1:], strict=True) if there
        ]
        self.update = AdamUpdate(self.optimizer, reached)

        def whole(*batch: Tensor) -> Tensor:
            loss, *gradients = super(RecordedSteps, self).gradients(*batch)
            with torch.no_grad():
                present = [g for g in gradients if g is not None]
                self.update(present if self.clip is None else _clipped(present, self.clip))
            return loss

        try:
            self.whole = Recorded(whole, *batch).compiled(*batch)
        except CannotCaptureError:  # the compiler knows the gradient more often than both
            self.recordings[self.shape] = recorded.compiled(*batch)


def _clipped(gradients: list[Tensor], clip: float) -> list[Tensor]:
    """As `clip_grad_norm_`, without a look at the norm."""
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    return [g * (clip / (norm + 1e-6)).clamp_max(1.0) for g in gradients]


def _shapes(batch: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(size for part in batch for size in (part.dim(), *part.shape))
