"""The training loop: SVI on `Trace_ELBO`, one page."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.checks import check_pair
from pyro_vae.data import Dataset
from pyro_vae.pair import Batch, Guide, Model, evaluating, full_size, log_densities, preserved_rng

if TYPE_CHECKING:
    import pandas as pd

Loss = Callable[..., Tensor]

EVALUATION_DRAWS = 8
"""Draws for each datum behind the ELBO of an epoch."""


@dataclass(frozen=True)
class Epoch:
    """What was measured after one pass over the training data; nats per datum.

    Training and validation are measured alike: after the epoch, at the same weights, without
    weights on the KL, with several draws a datum; training on at most as many rows as
    validation has. ELBO = reconstruction − KL; `_se` is the standard error over rows.
    """

    epoch: int
    loss: float
    """mean of the training objective over the epoch's batches, lower is better"""
    train_elbo: float
    train_elbo_se: float
    train_reconstruction: float
    train_kl: float
    validation_elbo: float
    validation_elbo_se: float
    validation_reconstruction: float
    validation_kl: float
    seconds: float
    """since the start of the run"""


@dataclass(frozen=True)
class Run:
    """A finished fit. The model and the guide hold the weights of `best_epoch`.

    Attributes:
        epochs: what each epoch measured, in order.
        best_epoch: the one with the highest validation ELBO.
        stopped_early: whether patience ended the run.
    """

    epochs: tuple[Epoch, ...]
    best_epoch: int
    stopped_early: bool

    @property
    def history(self) -> pd.DataFrame:
        """A row an epoch, a column a field of `Epoch`."""
        import pandas as pd

        return pd.DataFrame([asdict(epoch) for epoch in self.epochs]).set_index("epoch")

    @property
    def best(self) -> Epoch:
        """The epoch whose weights were kept."""
        return self.epochs[self.best_epoch - 1]

    @property
    def seconds(self) -> float:
        """Wall time of the fit."""
        return self.epochs[-1].seconds

    def __repr__(self) -> str:
        best = self.best
        end = "converged" if self.stopped_early else "ran"
        return (
            f"Run: {end} {len(self.epochs)} epochs in {self.seconds:.1f} s; epoch {best.epoch} "
            f"kept, validation ELBO {best.validation_elbo:.2f} ± {best.validation_elbo_se:.2f} "
            f"nats (reconstruction {best.validation_reconstruction:.2f}, KL "
            f"{best.validation_kl:.2f})"
        )


def fit(
    model: Model,
    guide: Guide,
    data: Dataset | Batch,
    *,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    objective: Any = None,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    r"""Maximise the ELBO of a pair by stochastic gradients.

    $$\mathcal L = \mathbb E_{q(z \mid x)}\left[\log p(x \mid z)\right]
      - \mathrm{KL}(q(z \mid x) \,\|\, p(z)) \le \log p(x)$$

    Each step takes `Trace_ELBO()(model, guide)` of a mini-batch, per datum, and its gradient
    by reparameterization. After each epoch the ELBO and its two terms are measured on
    training and validation rows. At the end the pair holds the weights of the epoch with the
    highest validation ELBO.

    Args:
        model: p(z) p(x | z).
        guide: q(z | x).
        data: a `Dataset`, or one batch `(x,)`, which then serves as its own validation.
        epochs: passes over the training rows, at most.
        batch_size: rows a step; the last batch of an epoch may be smaller.
        lr: learning rate.
        optimizer: called with the parameters and `lr=`.
        objective: a Pyro ELBO with a `differentiable_loss`, `Trace_ELBO()` by default.
        patience: stop after so many epochs without a higher validation ELBO; `None`: never.
        seed: of the order of rows and of the draws; torch's random state is left as it was.
            The initial weights are yours. Equal seeds give equal runs on one machine.
        progress: show a bar with ELBO, KL and time left.

    Returns:
        `Run`.

    Raises:
        ValueError: before the first step, for a bad pair, bad data or a count below 1.
        FloatingPointError: a step that is not finite, with its epoch and batch; the pair is
            left with the weights of the last whole epoch.
        KeyboardInterrupt: as it came; the pair is left with the best weights so far.

    References:
        Matthew D. Hoffman, David M. Blei, Chong Wang, John Paisley. *Stochastic Variational
        Inference*, 2013.
        Diederik P. Kingma, Max Welling. *Auto-Encoding Variational Bayes*, 2014.

    Example:
        >>> import pyro_vae as pv
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(64, 32, 4))
        >>> model = pv.models.VAE(pv.networks.MLP(2, 32, 64), prior=pv.priors.StandardNormal(2),
        ...                       likelihood=pv.likelihoods.Bernoulli())
        >>> run = fit(model, guide, pv.data.load("digits"), epochs=2, progress=False)
        >>> run.epochs[0].validation_elbo < run.epochs[1].validation_elbo
        True
    """
    train, validation = (
        (data.train, data.validation) if isinstance(data, Dataset) else (data, data)
    )
    objective = objective or Trace_ELBO()
    _check(model, guide, train, validation, epochs, batch_size, patience, lr, objective)
    loss_of = partial(objective.differentiable_loss, model, guide)
    few = _take(train, slice(0, 2))
    history: list[Epoch] = []
    best = 0
    with preserved_rng(seed), _lean(), tqdm(total=epochs, desc="SVI", disable=not progress) as bar:
        weights = _Weights(loss_of, model, guide, few)
        if hasattr(objective, "step"):
            objective.step = 0
        stepper = optimizer(weights.parameters, lr=lr)
        size = full_size(guide, few)
        kept = whole = weights.copy()
        start = time.perf_counter()
        for epoch in range(1, epochs + 1):
            try:
                loss = _sweep(loss_of, stepper, train, batch_size, size)
                with evaluating(model, guide):
                    terms = _measure(model, guide, train, validation)
            except KeyboardInterrupt:
                weights.restore(kept)
                raise
            except FloatingPointError as error:
                weights.restore(whole)
                raise FloatingPointError(
                    f"epoch {epoch}, {error}\n  kept:     the weights after epoch {epoch - 1}"
                    f"\n  try:      a lower learning rate than {lr:g}, or look at those rows"
                ) from error
            whole = weights.copy()
            history.append(
                Epoch(epoch=epoch, loss=loss, seconds=time.perf_counter() - start, **terms)
            )
            if not best or terms["validation_elbo"] > history[best - 1].validation_elbo:
                best, kept = epoch, whole
            bar.set_postfix_str(
                f"ELBO {terms['validation_elbo']:.2f}, KL {terms['validation_kl']:.2f}"
            )
            bar.update()
            if stopped_early := patience is not None and epoch - best >= patience:
                break
        weights.restore(kept)
    return Run(tuple(history), best, stopped_early)


class _Weights:
    """The trainable parameters of a pair and its buffers, to copy and to put back."""

    def __init__(self, loss_of: Loss, model: Model, guide: Guide, batch: Batch) -> None:
        with poutine.trace(param_only=True) as capture:
            loss = loss_of(*batch)
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
        modules = [part for part in (model, guide) if isinstance(part, nn.Module)]
        self._tensors = [*self.parameters, *(b for module in modules for b in module.buffers())]

    def copy(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors]

    @torch.no_grad()
    def restore(self, copy: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors, copy, strict=True):
            tensor.copy_(value)


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


def _sweep(
    loss_of: Loss, stepper: torch.optim.Optimizer, train: Batch, batch_size: int, size: int | None
) -> float:
    """One pass over shuffled mini-batches; the mean loss per datum."""
    total = 0.0
    for number, index in enumerate(torch.randperm(len(train[0])).split(batch_size), 1):
        loss = loss_of(*_take(train, index)) / (size or len(index))
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(
                f"batch {number}: the loss is {value}\n  rows:     {index.tolist()[:8]}, ..."
            )
        total += value * len(index)
    return total / len(train[0])


@torch.no_grad()
def _measure(model: Model, guide: Guide, train: Batch, validation: Batch) -> dict[str, float]:
    rows = min(len(train[0]), len(validation[0]))
    terms: dict[str, float] = {}
    for split, batch in (("train", _take(train, slice(0, rows))), ("validation", validation)):
        densities = [
            log_densities(model, guide, _take(batch, index), EVALUATION_DRAWS)
            for index in torch.arange(len(batch[0])).split(1024)
        ]
        elbo, likelihood = (
            torch.cat([getattr(part, name).mean(0).double() for part in densities])
            for name in ("log_weight", "likelihood")
        )
        if not torch.isfinite(elbo).all():
            raise FloatingPointError(f"after the last batch: the {split} ELBO is not finite")
        terms[f"{split}_elbo"] = elbo.mean().item()
        several = len(elbo) > 1
        terms[f"{split}_elbo_se"] = elbo.std().item() / len(elbo) ** 0.5 if several else math.nan
        terms[f"{split}_reconstruction"] = likelihood.mean().item()
        terms[f"{split}_kl"] = (likelihood - elbo).mean().item()
    return terms


@contextmanager
def _lean() -> Iterator[None]:
    """No validation inside the loop: the pair was checked, and `_sweep` looks at every loss."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


def _take(batch: Batch, index: Tensor | slice) -> Batch:
    return tuple(part[index] for part in batch)


def _check(
    model: Model, guide: Guide, train: Batch, validation: Batch,
    epochs: int, batch_size: int, patience: int | None, lr: float,
    objective: Any,
) -> None:  # fmt: skip
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if value is not None and (int(value) != value or value < 1 or isinstance(value, float)):
            raise ValueError(f"{name} must be an integer >= 1; got {value!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be > 0 and finite; got {lr}")
    if isinstance(objective, type) or not hasattr(objective, "differentiable_loss"):
        raise ValueError(
            f"objective {objective!r} has no differentiable_loss to call"
            "\n  expected: a Pyro ELBO such as Trace_ELBO()\n  try:      objective=Trace_ELBO()"
        )
    for batch in (train, validation):
        check_pair(model, guide, batch)
