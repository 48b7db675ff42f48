"""A fit in progress: where it stands, how it goes on, what it writes down."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from inspect import Parameter, signature
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_vae.capture import CannotCaptureError
from pyro_vae.pair import (
    Guide,
    Model,
    evaluating,
    full_size,
    latent_sites,
    preserved_rng,
    trace_pair,
)
from pyro_vae.ranks import gathered, place
from pyro_vae.svi.folder import RunFolder, State
from pyro_vae.svi.measure import measure
from pyro_vae.svi.objectives import ELBO, Beta, Objective
from pyro_vae.svi.rows import Rows
from pyro_vae.svi.run import Epoch, Run
from pyro_vae.svi.schedules import Schedule
from pyro_vae.svi.steps import RecordedSteps, Steps
from pyro_vae.svi.weights import Weights

LOOKED_AT = 32
"""Steps between looks at the losses, each of which waits for a GPU to finish."""
PROBED_STEPS = (0, 1, 10, 100, 1000, 10_000)
"""Where a schedule is read to tell it from another."""


class Fitting:
    """The state of `fit`, whose arguments these are.

    Attributes:
        epoch: whole epochs done.
        batch: batches done of the next.
        step: all steps taken.
    """

    def __init__(
        self,
        model: Model,
        guide: Guide,
        rows: Rows,
        objective: Any,
        *,
        batch_size: int,
        lr: float,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Schedule | None,
        clip: float | None,
        average: float | None,
        draws: int,
        precision: str,
        fabric: Any,
    ) -> None:
        self.model, self.guide, self.rows, self.objective = model, guide, rows, objective
        self.batch_size, self.lr, self.schedule = batch_size, lr, schedule
        self.draws, self.precision, self.fabric = draws, precision, fabric
        few = rows.first(8)
        self.full_size = full_size(guide, few)
        self.weights = Weights(self._loss_of(objective), model, guide, few, average)
        if fabric is not None:
            self.weights.restore(fabric.broadcast(self.weights.copy()))
        rows.to(self.weights.device)
        self.optimizer = optimizer(self.weights.parameters, lr=lr)
        _refuse_closure(self.optimizer)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.steps = self._steps(Steps, objective, clip)
        self.clip = clip
        self.epoch = self.batch = self.step = self.best = 0
        self.losses: list[Tensor] = []
        self.history: list[Epoch] = []
        self.kept = self.whole = self.weights.copy()
        self.folder: RunFolder | None = None
        self.on_disk: tuple[int, ...] = ()
        self.save_every = math.inf
        self.saved = self.started = time.perf_counter()

    def record(self) -> None:
        """Record the step and compile it; one warning where that cannot be."""
        try:
            with preserved_rng():
                batch = self._full_batch()
                objective = _of_tensors(self.objective, self.model, self.guide, batch)
                self.steps = self._steps(RecordedSteps, objective, self.clip, batch=batch)
            self.objective = objective
        except CannotCaptureError as error:
            warnings.warn(
                f"compile=True has no effect here: every step is run by Pyro: {error}",
                stacklevel=3,
            )

    def advance(self, measured: bool) -> Epoch | None:
        """Go on to the end of an epoch, and measure there if asked to."""
        try:
            loss = self._sweep()
            self.epoch, self.batch, self.losses = self.epoch + 1, 0, []
            found = self._measure(loss) if measured else None
        except KeyboardInterrupt:
            self.weights.restore(self.kept)
            raise
        except FloatingPointError as error:
            self.weights.restore(self.whole)
            good = self.history[-1].epoch if self.history else 0
            raise FloatingPointError(
                f"epoch {self.epoch + bool(self.losses)}, {error}"
                f"\n  kept:     the weights after epoch {good}"
                f"\n  try:      a lower learning rate than {self.lr:g}, clip=1.0, or look at "
                "those rows"
            ) from error
        if self.fabric is not None or time.perf_counter() - self.saved >= self.save_every:
            self._save()
        return found

    def stale(self, patience: int | None) -> bool:
        """Whether so many epochs brought no higher validation ELBO."""
        return (
            patience is not None
            and bool(self.history)
            and self.history[-1].epoch - self.best >= patience
        )

    def ended(self, epochs: int, patience: int | None) -> bool:
        """Whether nothing is left to do."""
        return self.epoch >= epochs or self.stale(patience)

    def finish(self, *, stopped_early: bool) -> Run:
        """Keep the best weights; a folder that holds them already is not touched."""
        if self.on_disk != (self.epoch, self.step, len(self.history)):
            self._save()
        self.weights.restore(self.kept)
        return Run(tuple(self.history), self.best, stopped_early)

    def settings(self) -> dict[str, Any]:
        """What makes a fit the same, as JSON values."""
        schedule = self.schedule or (lambda step: 1.0)
        return {
            "rows": self.rows.digest(),
            "parameters": [list(p.shape) for p in self.weights.parameters],
            "model": _structure(self.model),
            "guide": _structure(self.guide),
            "objective": _description(self.objective),
            "optimizer": _description(self.optimizer, self.optimizer.defaults),
            "batch_size": self.batch_size,
            "lr": self.lr,
            "schedule": [schedule(step) for step in PROBED_STEPS],
            "clip": self.clip,
            "average": self.weights.decay,
            "draws": self.draws,
            "precision": self.precision,
            "processes": place(self.fabric)[1],
        }

    def resume(self, folder: RunFolder, save_every: float) -> None:
        """Work in a folder, from its checkpoint if it holds one."""
        self.folder, self.save_every = folder, save_every
        state = folder.open(write=self.rows.rank == 0)
        if state is None:
            return
        self.weights.restore(state["weights"])
        self.weights.averaged = [part.to(self.weights.device) for part in state["averaged"]]
        self.kept, self.whole = state["kept"], state["whole"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.batch, self.step, self.best = state["counts"]
        self.losses = list(state["losses"].unbind())
        self.history = [Epoch(**row) for row in state["history"]]
        self.on_disk = self.epoch, self.step, len(self.history)
        self.started = time.perf_counter() - state["seconds"]
        torch.set_rng_state(state["rng"][self.rows.rank])
        if self.weights.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"][self.rows.rank])

    def _save(self) -> None:
        if self.folder is None or not self.weights.finite:
            return  # what the next look will refuse does not replace a good checkpoint
        on_gpu = self.weights.device.type == "cuda"
        self.steps.settle()
        state: State = {
            "weights": self.weights.copy(),
            "averaged": self.weights.averaged,
            "kept": self.kept,
            "whole": self.whole,
            "optimizer": self.optimizer.state_dict(),
            "counts": [self.epoch, self.batch, self.step, self.best],
            "losses": torch.stack(self.losses) if self.losses else torch.zeros(0),
            "history": [asdict(epoch) for epoch in self.history],
            "seconds": time.perf_counter() - self.started,
            "rng": gathered(torch.get_rng_state(), self.fabric),
            "cuda_rng": gathered(torch.cuda.get_rng_state(), self.fabric) if on_gpu else [],
        }
        if self.rows.rank == 0:
            self.folder.log(self.history)
            self.folder.save(state)
        self.on_disk = self.epoch, self.step, len(self.history)
        self.saved = time.perf_counter()

    def _sweep(self) -> float:
        """Take the steps that are left of an epoch; the mean loss per datum of all of it."""
        alone = self.fabric is None
        for batch, share in self.rows.batches(self.epoch + 1, self.batch_size, self.batch):
            self.losses.append(self.take_step(batch, share))
            self.batch += 1
            if self.batch % LOOKED_AT == 0:
                self._look()
            if alone and time.perf_counter() - self.saved >= self.save_every:
                self._look()
                self._save()
        self._look()
        losses = torch.stack(self.losses).double().cpu()
        sizes = torch.full_like(losses, self.batch_size)
        sizes[-1] = len(self.rows) - self.batch_size * (len(losses) - 1)
        return float((losses * sizes).sum() / len(self.rows))

    def take_step(self, batch: tuple[Tensor, ...], share: float) -> Tensor:
        """Move the weights by one batch; its loss per datum."""
        if isinstance(self.objective, Objective):
            self.objective.at(self.step)
            self.objective.step = self.step + 1
        if self.schedule is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.schedule(self.step)
        loss = self.steps(batch, share)
        self.step += 1
        self.weights.follow(self.step)
        return loss

    def _look(self) -> None:
        """Refuse losses that are not finite."""
        finite = torch.isfinite(torch.stack(self.losses))
        if not finite.all():
            number = int((~finite).nonzero()[0])
            rows = self.rows.where(self.epoch + 1, self.batch_size, number)
            raise FloatingPointError(
                f"batch {number + 1}: the loss is {self.losses[number].item()}"
                f"\n  rows:     {rows[:8]}, ..."
            )

    def _measure(self, loss: float) -> Epoch:
        judged = self.weights.judged()
        validation = self.rows.validation
        draws_of_epoch = 1_000_003 * (self.rows.seed + self.epoch) + self.rows.rank
        with self.weights.holding(judged), preserved_rng(draws_of_epoch):
            few = self.rows.first(len(validation[0]))
            terms = {
                name: value
                for split, batch in (("train", few), ("validation", validation))
                for name, value in measure(
                    self.model, self.guide, batch, self.draws, split=split, fabric=self.fabric
                ).items()
            }
        seconds = time.perf_counter() - self.started
        found = Epoch(epoch=self.epoch, loss=loss, seconds=seconds, **terms)
        bests = [epoch.validation_elbo for epoch in self.history if epoch.epoch == self.best]
        if not bests or found.validation_elbo > bests[0]:
            self.best, self.kept = self.epoch, judged
        self.whole = judged
        self.history.append(found)
        return found

    def _loss_of(self, objective: Any) -> Callable[..., Tensor]:
        tensors = isinstance(objective, Objective)
        loss_of = objective.tensor_loss if tensors else objective.differentiable_loss

        def per_datum(*batch: Tensor) -> Tensor:
            return loss_of(self.model, self.guide, *batch) / (self.full_size or len(batch[0]))

        return per_datum

    def _steps(self, kind: type[Steps], objective: Any, clip: float | None, **more: Any) -> Steps:
        device = self.weights.device.type
        cast = self.precision == "bfloat16"
        return kind(
            self._loss_of(objective), self.optimizer, self.weights.parameters, clip=clip,
            arithmetic=lambda: torch.autocast(device, torch.bfloat16) if cast else nullcontext(),
            fabric=self.fabric, **more,
        )  # fmt: skip

    def _full_batch(self) -> tuple[Tensor, ...]:
        rows = min(self.batch_size, len(self.rows))
        return self.rows.first(-(-(rows - self.rows.rank) // self.rows.count))


@contextmanager
def lean(precision: str) -> Iterator[None]:
    """No validation inside the loop: the pair was checked, and every loss is looked at."""
    products = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Encountered NaN")
            yield
    finally:
        torch.set_float32_matmul_precision(products)


def _of_tensors(objective: Any, model: Model, guide: Guide, batch: tuple[Tensor, ...]) -> Any:
    """An objective with the same loss that can be recorded."""
    if type(objective) is not Trace_ELBO:
        return objective
    with evaluating(model, guide), torch.no_grad():
        _, guide_trace = trace_pair(model, guide, batch, 1)
    for site in latent_sites(guide_trace):
        if not site["fn"].has_rsample:
            raise CannotCaptureError(f"the guide's site {site['name']!r} is not reparameterized")
    return ELBO(objective.num_particles)


def _description(thing: Any, options: dict[str, Any] | None = None) -> str:
    """A class and its plain settings."""
    found = vars(thing) if options is None else options
    plain = {k: v for k, v in found.items() if isinstance(v, int | float | str) and k != "step"}
    if isinstance(thing, Beta) and callable(thing.beta):
        plain["beta"] = str([thing.beta(step) for step in PROBED_STEPS])
    return f"{type(thing).__name__} {sorted(plain.items())}"


def _structure(program: Any) -> str:
    """What a module is made of, and the constants in it; the name of a plain function.

    Buffers of torch's own layers are statistics that a fit moves, and left out.
    """
    if not isinstance(program, nn.Module):
        return str(getattr(program, "__qualname__", type(program).__name__))
    digest = hashlib.sha256()
    for name, part in program.named_modules():
        digest.update(f"{name} {type(part).__qualname__} {part.extra_repr()}\n".encode())
        if not type(part).__module__.startswith("torch."):
            for buffer in part.buffers(recurse=False):
                digest.update(buffer.detach().cpu().contiguous().numpy().tobytes())
    return f"{type(program).__name__} {digest.hexdigest()[:16]}"


def _refuse_closure(optimizer: torch.optim.Optimizer) -> None:
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} wants a closure, to see the loss again within a step"
            "\n  expected: an optimizer for noisy gradients\n  try:      torch.optim.Adam"
        )
