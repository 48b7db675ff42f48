"""A recording is the function: same values, same draws, live constants, nothing done twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vae as pv
from pairs import (
    GUIDES,
    PRIORS,
    Pair,
    catalogue_pair,
    digits_pair,
    hierarchical_pair,
    quantized_pair,
)
from pyro_vae.capture import CannotCaptureError, Recorded
from pyro_vae.svi import objectives

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def test_random_draws_are_fresh_and_those_of_the_seed() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn_like(x)

    recorded = Recorded(noisy, X)
    compiled = recorded.compiled(X)
    for call in (recorded, compiled):
        torch.manual_seed(3)
        first, second = call(X), call(X)
        torch.manual_seed(3)
        assert torch.equal(first, noisy(X)) and torch.equal(second, noisy(X))
        assert not torch.equal(first, second)


def test_constants_are_looked_up_in_every_call_and_changed_in_place() -> None:
    weight, count = torch.ones(3), torch.zeros(2)

    def counted(x: Tensor) -> Tensor:
        count.add_(1)
        return x * weight

    recorded = Recorded(counted, X)
    assert count.sum() == 0, "a recording does nothing"
    compiled = recorded.compiled(X)
    assert count.sum() == 0
    calls: tuple[Callable[..., Tensor], ...] = (recorded, compiled)
    for number, call in enumerate(calls, 1):
        weight.fill_(number + 1.0)
        assert torch.equal(call(X), X * weight)
        assert count.tolist() == [number] * 2


def test_a_recording_leaves_modules_and_random_state_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    recorded = Recorded(lambda x: net(x).sum(), X)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    recorded(X)
    assert not torch.equal(net.state_dict()["1.running_mean"], before["1.running_mean"])


def test_gradients_are_those_of_autograd() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    parameters = list(net.parameters())

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(net(x).square().mean(), parameters)

    recorded = Recorded(gradients, X)
    for call in (recorded, recorded.compiled(X)):
        for a, b in zip(call(X), gradients(X), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: 1 / 0,
    ],
)
def test_what_looks_at_values_is_refused(function: Any) -> None:
    with pytest.raises(CannotCaptureError):
        Recorded(function, X).compiled(X)


OBJECTIVES: dict[str, Callable[[], Any]] = {
    "ELBO": lambda: objectives.ELBO(),
    "ELBO(3)": lambda: objectives.ELBO(3),
    "Beta": lambda: objectives.Beta(0.3),
    "analytic": lambda: objectives.AnalyticELBO(),
    "free bits": lambda: objectives.FreeBits(0.2),
    "IWAE": lambda: objectives.IWAE(4),
    "DReG": lambda: objectives.DReG(4),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_recorded_objective_is_the_objective(name: str) -> None:
    model, guide = digits_pair()
    x = (torch.rand(16, 64) > 0.5).float()
    objective = OBJECTIVES[name]()
    parameters = [p for part in (model, guide) for p in part.parameters()]

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        loss = objective.tensor_loss(model, guide, x)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    with pyro.validation_enabled(False):
        recorded = Recorded(gradients, x)
    torch.manual_seed(1)
    ours = recorded(x)
    torch.manual_seed(1)
    loss = objective.differentiable_loss(model, guide, x)
    loss.backward()
    torch.testing.assert_close(ours[0], loss.detach())
    for a, p in zip(ours[1:], parameters, strict=True):
        torch.testing.assert_close(a, p.grad)


def test_the_elbo_is_that_of_trace_elbo_for_the_same_noise() -> None:
    model, guide = digits_pair()
    x = (torch.rand(16, 64) > 0.5).float()
    found = []
    for objective in (Trace_ELBO(), objectives.ELBO()):
        torch.manual_seed(1)
        loss = objective.differentiable_loss(model, guide, x)
        parameters = [p for part in (model, guide) for p in part.parameters()]
        found.append((loss, *torch.autograd.grad(loss, parameters)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


CATALOGUE: dict[str, Callable[[Tensor], Pair]] = {
    **{f"prior {name}": partial(catalogue_pair, prior=name) for name in PRIORS},
    **{f"guide {name}": partial(catalogue_pair, guide=name) for name in GUIDES if name != "local"},
    "hierarchical": hierarchical_pair,
    "quantized": lambda x: quantized_pair(),
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_recording_of_any_pair_of_the_catalogue_is_the_pair(
    name: str, digits: pv.data.Dataset
) -> None:
    x = digits.train[0][:32]
    model, guide = CATALOGUE[name](x)
    parameters = [p for part in (model, guide) for p in part.parameters() if p.requires_grad]

    def gradients(x: Tensor) -> tuple[Any, ...]:
        loss = objectives.ELBO().tensor_loss(model, guide, x)
        return loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)

    with pyro.validation_enabled(False):
        recorded = Recorded(gradients, x)
        for seed in (1, 2):
            torch.manual_seed(seed)
            ours = recorded(x.flip(0))
            torch.manual_seed(seed)
            for a, b in zip(ours, gradients(x.flip(0)), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_table_looks_at_its_rows_and_is_refused(digits: pv.data.Dataset) -> None:
    x = digits.train[0][:32]
    pair = catalogue_pair(x, guide="local")
    with pyro.validation_enabled(False), pytest.raises(CannotCaptureError, match="data-dependent"):
        Recorded(lambda x: objectives.ELBO().tensor_loss(*pair, x), x)


OPTIONS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "AdamW": {"optimizer": torch.optim.AdamW},
    "decoupled Adam": {
        "optimizer": lambda p, lr: torch.optim.Adam(
            p, lr=lr, weight_decay=0.5, decoupled_weight_decay=True
        )
    },
    "decayed Adam": {"optimizer": lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=0.1)},
    "SGD": {"optimizer": torch.optim.SGD, "lr": 1e-2},
    "clipped": {"clip": 0.5},
    "scheduled": {"schedule": pv.svi.cosine(30, warm_up=5)},
    "averaged": {"average": 0.9},
    "warmed up": {"objective": objectives.Beta(objectives.warm_up(15))},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_compiled_fit_is_the_fit(name: str, digits: pv.data.Dataset) -> None:
    """Weights after 2 epochs with a short last batch, from the same seed, to rounding."""
    ends, losses = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        pair = digits_pair()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run = pv.fit(
                *pair, digits, epochs=2, progress=False, compile=compiled, **OPTIONS[name]
            )
        ends.append([p.detach() for part in pair for p in part.parameters()])
        losses.append([epoch.validation_elbo for epoch in run.epochs])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_vamp_prior_left_in_eval_mode_learns_under_compile(digits: pv.data.Dataset) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, guide = catalogue_pair(digits.train[0], prior="vamp")
        model.prior.eval()
        pv.fit(model, guide, digits, epochs=2, progress=False, compile=compiled)
        found.append(model.prior.pseudo_inputs.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        found[0], catalogue_pair(digits.train[0], prior="vamp").model.prior.pseudo_inputs
    )


def test_a_mixture_prior_is_compiled_and_learns_the_same(digits: pv.data.Dataset) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, guide = catalogue_pair(digits.train[0], prior="mixture")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pv.fit(model, guide, digits, epochs=2, progress=False, compile=compiled)
        found.append([p.detach() for p in model.prior.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_where_the_update_does_not_compile_the_gradient_does(
    digits: pv.data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, called = Recorded.compiled, []

    def stumble(self: Recorded, *inputs: Tensor) -> Any:
        called.append(self)
        if len(called) == 1:
            raise CannotCaptureError("KeyError: 'buf50'")
        return compiled(self, *inputs)

    monkeypatch.setattr(Recorded, "compiled", stumble)
    ends = []
    for wanted in (True, False):
        torch.manual_seed(0)
        pair = digits_pair()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pv.fit(*pair, digits, epochs=2, progress=False, compile=wanted)
        ends.append([p.detach() for part in pair for p in part.parameters()])
    assert len(called) == 2
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_generator_of_ones_own_cannot_be_recorded() -> None:
    generator = torch.Generator()
    with pytest.raises(CannotCaptureError):
        Recorded(lambda x: x + torch.rand(x.shape, generator=generator), X)


def _branching() -> Pair:
    class Branching(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z @ torch.ones(2, 64) if z.sum() > 0 else -(z @ torch.ones(2, 64))

    model, guide = digits_pair()
    model.decoder = Branching()
    return Pair(model, guide)


def test_what_cannot_be_recorded_falls_back_with_one_warning(digits: pv.data.Dataset) -> None:
    with pytest.warns(UserWarning, match="compile=True has no effect here") as found:
        run = pv.fit(*_branching(), digits, epochs=2, progress=False, compile=True)
    assert len(found) == 1 and len(run.epochs) == 2


def test_a_score_function_guide_falls_back(digits: pv.data.Dataset) -> None:
    model, _ = digits_pair()
    encoder = nn.Linear(64, 2).requires_grad_(False)

    def stiff(x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            loc = encoder(x)
            q = dist.Independent(NonreparameterizedNormal(loc, torch.ones_like(loc)), 1)
            return pyro.sample("z", q)

    with pytest.warns(UserWarning, match="'z' is not reparameterized"):
        pv.fit(model, stiff, digits, epochs=1, progress=False, compile=True)
    pyro.clear_param_store()


def test_without_a_compiler_the_recording_is_replayed(
    digits: pv.data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no C++ compiler found")

    ends = []
    monkeypatch.setattr(torch._inductor, "compile", broken)
    complaint = pytest.warns(UserWarning, match=r"one by one instead: .*no C\+\+ compiler")
    for compiled, watching in ((False, nullcontext()), (True, complaint)):
        torch.manual_seed(0)
        pair = digits_pair()
        with watching:
            pv.fit(*pair, digits, epochs=2, progress=False, compile=compiled)
        ends.append([p.detach() for part in pair for p in part.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_pair_in_plain_pyro_is_compiled() -> None:
    encoder = nn.Linear(3, 4)

    def model(x: Tensor) -> None:
        shift = pyro.param("shift", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
            loc = torch.cat([z, z[..., :1]], -1) + shift
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, raw = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    batch = (3 + torch.randn(64, 3),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = pv.fit(model, guide, batch, epochs=300, lr=2e-2, progress=False, compile=True)
    assert run.best.validation_elbo > run.epochs[0].validation_elbo + 3
    assert (pyro.param("shift") - 3).abs().max() < 1
    pyro.clear_param_store()
