"""The loop: repeatable, honest about its terms, stops when asked, survives what goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pairs import Pair, catalogue_pair, digits_pair, quantized_pair, random_ppca
from pyro_vae.pair import log_densities
from pyro_vae.svi import Run


def _fit(pair: Pair, data: Any, **options: Any) -> Run:
    return pv.fit(*pair, data, progress=False, **{"epochs": 3, **options})


def _state(pair: Pair) -> list[Tensor]:
    return [p.detach().clone() for part in pair for p in part.parameters()]


def test_equal_seeds_give_equal_runs_and_leave_the_random_state(digits: Any) -> None:
    runs, states = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        pair = digits_pair()
        before = torch.get_rng_state()
        runs.append(_fit(pair, digits, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        states.append(_state(pair))
    columns = runs[0].history.columns.drop("seconds")
    assert runs[0].history[columns].equals(runs[1].history[columns])
    assert all(torch.equal(p, q) for p, q in zip(states[0], states[1], strict=True))
    assert not torch.equal(states[0][0], states[2][0])


def test_history_holds_what_a_fresh_measurement_finds(digits: Any) -> None:
    pair = digits_pair()
    run = _fit(pair, digits, epochs=8)
    best = run.best
    assert best.validation_elbo == max(epoch.validation_elbo for epoch in run.epochs)
    for name, batch in (("train", digits.train), ("validation", digits.validation)):
        with torch.no_grad():
            found = log_densities(*pair, batch, draws=50)
        values = {
            "elbo": found.log_weight.mean().item(),
            "reconstruction": found.likelihood.mean().item(),
            "kl": (found.guide - found.prior).mean().item(),
        }
        error = getattr(best, f"{name}_elbo_se")
        assert 0 < error < 1
        for term, value in values.items():
            # The rows are the same: what is left is the noise of 8 and of 50 draws a row.
            assert getattr(best, f"{name}_{term}") == pytest.approx(value, abs=error)
    assert run.history.shape == (8, 10)
    assert run.history.index.tolist() == list(range(1, 9))
    assert best.validation_elbo == pytest.approx(
        best.validation_reconstruction - best.validation_kl, abs=1e-9
    )


def test_it_learns(digits: Any) -> None:
    run = _fit(digits_pair(), digits, epochs=30, lr=3e-3)
    first, last = run.epochs[0], run.best
    assert last.validation_elbo > first.validation_elbo + 6
    assert "epoch" in repr(run) and "validation ELBO" in repr(run)


def test_the_best_weights_are_kept(digits: Any) -> None:
    pair = digits_pair()
    torch.manual_seed(1)
    small = pv.data.from_array(digits.train[0][:60])
    run = _fit(pair, small, epochs=150, lr=1e-2)
    assert run.best_epoch < len(run.epochs), "a set this small is overfitted before the end"
    with torch.no_grad():
        found = log_densities(*pair, small.validation, draws=400).log_weight.mean().item()
    ends = run.epochs[-1].validation_elbo
    assert abs(found - run.best.validation_elbo) < abs(found - ends)


def test_patience(digits: Any) -> None:
    run = _fit(
        digits_pair(), pv.data.from_array(digits.train[0][:60]), epochs=500, lr=1e-2, patience=5
    )
    assert run.stopped_early and len(run.epochs) == run.best_epoch + 5 < 500


@pytest.mark.parametrize("objective", [Trace_ELBO(num_particles=3), TraceMeanField_ELBO()])
def test_other_objectives(objective: Any, digits: Any) -> None:
    run = _fit(digits_pair(), digits, objective=objective, optimizer=torch.optim.RMSprop)
    assert run.epochs[-1].validation_elbo > run.epochs[0].validation_elbo


def test_an_objective_without_a_loss_is_refused(digits: Any) -> None:
    with pytest.raises(ValueError, match=r"RenyiELBO.*has no differentiable_loss"):
        _fit(digits_pair(), digits, objective=RenyiELBO())


def test_a_pair_in_plain_pyro_with_a_subsampled_plate() -> None:
    x = 3 + torch.randn(400, 1)

    def model(x: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", 1000, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    encoder = nn.Linear(1, 1)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", 1000, subsample=x):
            pyro.sample("z", dist.Normal(encoder(x), 0.5**0.5).to_event(1))

    run = pv.fit(model, guide, (x,), epochs=150, lr=3e-2, progress=False)
    assert pyro.param("shift").item() == pytest.approx(x.mean().item(), abs=0.15)
    truth = dist.Normal(x.mean(), 2**0.5).log_prob(x).mean().item()
    assert run.best.validation_elbo == pytest.approx(truth, abs=0.05)
    assert run.epochs[-1].loss == pytest.approx(-truth, abs=0.1), "the loss is per datum"
    pyro.clear_param_store()


class _Fuse(nn.Module):
    """A layer that turns its output to NaN in the n-th training call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.layer, self.left = nn.Linear(2, 64), calls

    def forward(self, z: Tensor) -> Tensor:
        self.left -= torch.is_grad_enabled()
        burns = torch.is_grad_enabled() and self.left == 0
        return self.layer(z) * (torch.nan if burns else 1.0)


def test_a_step_that_is_not_finite_is_named_and_undone(digits: Any) -> None:
    pair = digits_pair()
    pair.model.decoder = _Fuse(1 + 2 * 11 + 3)  # one call to find parameters, 11 batches an epoch
    with pytest.raises(
        FloatingPointError, match=r"epoch 3, batch 3: the loss is nan\n(.*\n)*.*after epoch 2"
    ):
        _fit(pair, digits, epochs=5)
    assert all(torch.isfinite(p).all() for p in _state(pair))
    with torch.no_grad():
        elbo = log_densities(*pair, digits.validation, 4).log_weight.mean()
    assert torch.isfinite(elbo)


def test_a_learning_rate_that_explodes(digits: Any) -> None:
    pair = digits_pair()
    before = _state(pair)
    with pytest.raises(FloatingPointError, match="lower learning rate than 1e"):
        _fit(pair, digits, lr=1e30)
    assert all(torch.equal(p, q) for p, q in zip(_state(pair), before, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1; got 0"),
        ({"epochs": -1}, "epochs"),
        ({"epochs": 2.0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"patience": 0}, "patience"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"lr": float("nan")}, "lr must be > 0"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str, digits: Any) -> None:
    with pytest.raises(ValueError, match=message):
        _fit(digits_pair(), digits, **options)


def test_nothing_to_fit() -> None:
    model = random_ppca().requires_grad_(False)
    x = model(None, size=10).detach()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    with pytest.raises(ValueError, match="nothing to fit"):
        pv.fit(model, guide, (x,), progress=False)


def test_weights_come_back(digits: Any, tmp_path: Path) -> None:
    pair, other = digits_pair(), digits_pair()
    pv.save_weights(tmp_path, *pair)
    pv.load_weights(tmp_path, *other)
    assert all(torch.equal(p, q) for p, q in zip(_state(pair), _state(other), strict=True))
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    with pytest.raises(FileNotFoundError):
        pv.load_weights(tmp_path / "nowhere", *other)
    with pytest.raises(RuntimeError, match="size mismatch"):
        pv.load_weights(tmp_path, *digits_pair(latent_dim=3))


def test_ctrl_c_leaves_the_best_weights(digits: Any) -> None:
    pair = digits_pair()
    once = digits_pair()
    for part, twin in zip(once, pair, strict=True):
        part.load_state_dict(twin.state_dict())
    _fit(once, digits, epochs=1)

    class Interrupted(Trace_ELBO):
        steps = 0

        def differentiable_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            if self.steps == 1 + 11 + 5:
                raise KeyboardInterrupt
            return super().differentiable_loss(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        _fit(pair, digits, objective=Interrupted())
    assert all(torch.equal(p, q) for p, q in zip(_state(pair), _state(once), strict=True))


def test_one_row_has_no_standard_error() -> None:
    run = _fit(digits_pair(), (torch.ones(1, 64),), epochs=1)
    assert run.best.validation_elbo_se != run.best.validation_elbo_se
    with pytest.raises(ValueError, match=r"Trace_ELBO.*has no differentiable_loss to call"):
        _fit(digits_pair(), (torch.ones(1, 64),), objective=Trace_ELBO)


def test_half_a_copy_is_refused(digits: Any) -> None:
    from copy import deepcopy

    x = digits.train[0][:50]
    model, guide = catalogue_pair(x, "vamp")
    with pytest.raises(ValueError, match=r"trainable tensors of neither model nor guide"):
        pv.fit(deepcopy(model), guide, (x,), epochs=1, progress=False)
    quantized = quantized_pair()
    with pytest.raises(ValueError, match=r"neither model nor guide(.*\n)*.*deepcopy\(\(model"):
        pv.fit(quantized.model, deepcopy(quantized.guide), (x,), epochs=1, progress=False)
    both = deepcopy((model, guide))
    pv.fit(*both, (x,), epochs=1, progress=False)


# What else one expects of a loop


def test_batches_are_drawn_anew_where_the_data_say_so() -> None:
    seen: list[Tensor] = []

    def per_batch(x: Tensor) -> Tensor:
        seen.append(torch.bernoulli(x))
        return seen[-1]

    grey = pv.data.load("digits", binarize=pv.data.dynamic(0))
    data = pv.data.Dataset("d", grey.train, grey.validation, grey.test, per_batch=per_batch)
    run = _fit(digits_pair(), data, epochs=2)
    assert len(run.epochs) == 2 and all(set(x.unique().tolist()) <= {0, 1} for x in seen)
    draws = torch.cat(seen)
    assert draws.mean().item() == pytest.approx(grey.train[0].mean().item(), abs=0.02)


def test_a_schedule_is_the_rate_of_each_step(digits: Any) -> None:
    """A rate of zero after the first epoch leaves the weights where they are."""
    pair, short = digits_pair(), digits_pair()
    for part, other in zip(pair, short, strict=True):
        other.load_state_dict(part.state_dict())
    steps = -(-len(digits.train[0]) // 128)
    _fit(pair, digits, epochs=1)
    _fit(short, digits, epochs=3, schedule=lambda step: float(step < steps), optimizer=_plain_adam)
    for a, b in zip(_state(pair), _state(short), strict=True):
        torch.testing.assert_close(a, b)


def test_a_schedule_keeps_the_rates_of_groups(digits: Any) -> None:
    def groups(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            [{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:]}], lr
        )

    pair = digits_pair()
    before = _state(pair)
    _fit(pair, digits, epochs=1, optimizer=groups, schedule=lambda step: 1.0)
    assert sum(torch.equal(a, b) for a, b in zip(before, _state(pair), strict=True)) == 1


def test_patience_waits_for_a_measurement(digits: Any) -> None:
    run = _fit(digits_pair(), digits, epochs=30, measure_every=10, patience=5)
    assert [epoch.epoch for epoch in run.epochs] == [10, 20, 30] and not run.stopped_early


def test_an_optimizer_with_a_closure_is_refused(digits: Any) -> None:
    with pytest.raises(ValueError, match="LBFGS wants a closure"):
        _fit(digits_pair(), digits, optimizer=torch.optim.LBFGS)


def _plain_adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)


def test_clipping_bounds_a_step_of_sgd(digits: Any) -> None:
    pair = digits_pair()
    before = _state(pair)
    _fit(
        pair, digits.train, epochs=1, batch_size=2000, optimizer=torch.optim.SGD, lr=1.0, clip=0.1
    )
    moved = sum((a - b).square().sum() for a, b in zip(_state(pair), before, strict=True))
    assert float(moved) ** 0.5 == pytest.approx(0.1, rel=1e-3)


def test_an_average_lags_behind_the_weights_by_its_formula() -> None:
    model, guide = digits_pair()
    x = (torch.rand(1, 64) > 0.5).float()
    path = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            path.append(weight.detach().clone())

    weight = model.decoder[0].weight
    start = weight.detach().clone()
    _fit(Pair(model, guide), (x,), epochs=5, average=0.5, optimizer=Watched, lr=1e-2, draws=200)
    average, found = start, []
    for step, weights in enumerate(path, 1):
        average = torch.lerp(average, weights, 1 - min(0.5, (1 + step) / (10 + step)))
        found.append(average)
    assert min((weight - a).abs().max().item() for a in found) < 1e-7


def test_measurements_can_be_rare(digits: Any) -> None:
    seen: list[int] = []
    run = _fit(
        digits_pair(), digits, epochs=7, measure_every=3, on_epoch=lambda e: seen.append(e.epoch)
    )
    assert [epoch.epoch for epoch in run.epochs] == seen == [3, 6, 7]
    assert run.best.epoch == run.best_epoch and run.history.index.tolist() == seen


def test_several_seeds_give_a_mean_with_its_error(digits: Any, tmp_path: Path) -> None:
    runs = pv.svi.repeat(digits_pair, digits, seeds=(0, 1, 2), epochs=2, progress=False)
    again = pv.svi.repeat(digits_pair, digits, seeds=(1,), epochs=2, progress=False)
    elbos = runs.table["validation_elbo"]
    assert runs.validation_elbo == pytest.approx(elbos.mean())
    assert runs.validation_elbo_se == pytest.approx(elbos.std() / 3**0.5)
    assert elbos[1] == again.table["validation_elbo"][1] and elbos.nunique() == 3
    assert "3 seeds" in repr(runs)
    each = pv.svi.repeat(
        digits_pair, digits, seeds=(0, 1), epochs=1, progress=False, folder=tmp_path
    )
    assert len(each.runs) == 2 and (tmp_path / "seed-1" / "checkpoint.pt").exists()
    with pytest.raises(ValueError, match="at least one seed"):
        pv.svi.repeat(digits_pair, digits, seeds=())


def test_bfloat16_products_learn_too_and_are_measured_in_full(digits: Any) -> None:
    run = _fit(digits_pair(), digits, epochs=10, lr=3e-3, precision="bfloat16")
    assert run.best.validation_elbo > run.epochs[0].validation_elbo
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "clip must be > 0"),
        ({"average": 1.0}, "average must be a decay"),
        ({"precision": "half"}, "precision must be one of"),
        ({"measure_every": 0}, "measure_every must be an integer >= 1"),
        ({"save_every": -1.0}, "save_every must be seconds"),
    ],
)
def test_bad_new_options(options: dict[str, Any], message: str, digits: Any) -> None:
    with pytest.raises(ValueError, match=message):
        _fit(digits_pair(), digits, **options)


def test_tensorboard_reads_what_it_wrote(tmp_path: Path, digits: Any) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="extra `tensorboard`"
    )
    run = _fit(digits_pair(), digits, on_epoch=pv.svi.tensorboard(tmp_path))
    found = reader.EventAccumulator(str(tmp_path)).Reload().Scalars("validation/elbo")
    assert [point.value for point in found] == pytest.approx(
        [epoch.validation_elbo for epoch in run.epochs]
    )
