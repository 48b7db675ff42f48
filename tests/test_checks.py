"""Everything that is refused says what, expected, got, try."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor

import pyro_vae as pv
from pairs import Pair, digits_pair, guide_of
from pyro_vae.checks import check_batch, check_support


def _model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = z.sum(-1, keepdim=True).expand(*z.shape[:-1], x.shape[-1])
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def _guide(
    name: str = "z",
    size: int | None = None,
    dim: int | None = None,
    events: int = 1,
    latent: int = 2,
) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", size or len(x), dim=dim):
            rows = (size or len(x), 1) if dim == -2 else (size or len(x),)
            pyro.sample(name, dist.Normal(torch.zeros(*rows, latent), 1.0).to_event(events))

    return guide


def _without_plate(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(2))


def _unobserved(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def _positive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Exponential(torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def _flattening(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.view(len(x), 2), 1.0).to_event(1), obs=x)


def test_a_right_pair_passes_and_leaves_no_trace() -> None:
    pair = digits_pair()
    before = torch.get_rng_state()
    pv.check_pair(_model, _guide(), (torch.zeros(20, 2),))
    pv.check_pair(*pair, (torch.zeros(3, 64),))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        pytest.param(_model, _guide("latent"), r"different latent sites\n.*\['z'\].*\n.*\['latent'\]", id="name"),
        pytest.param(_model, _guide(size=1000), r"plate 'data' of the guide has another size.*\n.*4.*\n.*1000", id="plate size"),
        pytest.param(_model, _without_plate, r"'z' of the guide is not in the plate 'data'.*\n.*\n.*no plate", id="no plate"),
        pytest.param(_model, _guide(dim=-2), r"is not in the plate 'data' alone\n.*dim -1\n.*dim -2", id="plate dim"),
        pytest.param(_model, _guide(latent=3), r"'z' has different event shapes\n.*\(2,\).*\n.*\(3,\)", id="event"),
        pytest.param(_unobserved, _guide(), r"does not observe 'x'", id="no x"),
        pytest.param(_positive, _guide(), r"outside the support of its prior", id="support"),
        pytest.param(_flattening, _guide(), r"cannot take several draws at once", id="flattening"),
    ],
)  # fmt: skip
def test_what_pyro_accepts_in_silence_is_refused(model: Any, guide: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pv.check_pair(model, guide, (torch.zeros(4, 2),))
    assert all(word in str(caught.value) for word in ("expected:", "got:", "try:"))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        pytest.param((torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]),), r"NaN or infinite.*\n.*\n.*rows \[1\]", id="nan"),
        pytest.param((torch.full((9, 2), torch.inf),), r"9 of 9 rows bad, the first \[0, 1, 2, 3, 4\]", id="inf"),
        pytest.param((torch.zeros(0, 2),), "is empty", id="empty"),
        pytest.param((), "is empty", id="no part"),
        pytest.param((torch.zeros(3, 2), torch.zeros(4)), "uneven parts", id="uneven"),
        pytest.param(torch.zeros(3, 2), "no tuple of tensors", id="tensor"),
        pytest.param(([[0.0]],), "no tuple of tensors", id="list"),
    ],
)  # fmt: skip
def test_bad_batches(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch(batch)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        pytest.param(torch.full((4, 64), 0.5), r"outside the support of Bernoulli\n.*[Bb]oolean.*\n.*4 of 4 rows.*\n.*binarise", id="grey"),
        pytest.param(torch.full((4, 64), 200.0), r"x / 255", id="0..255"),
        pytest.param(torch.zeros(4, 63), r"the guide cannot take this batch\n.*\(4, 63\)", id="width"),
        pytest.param(torch.zeros(4, 1, 8, 8), r"the guide cannot take this batch.*(\n.*)*flatten", id="images"),
        pytest.param(torch.zeros(4, 64, dtype=torch.uint8), r"uint8(.*\n)*.*x.float\(\)", id="uint8"),
        pytest.param(torch.zeros(4, 64, dtype=torch.float64), r"float64(.*\n)*.*x.float\(\)", id="float64"),
        pytest.param(torch.full((4, 64), torch.nan), r"NaN", id="nan"),
        pytest.param(torch.zeros(0, 64), r"empty", id="empty"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("entry", ["fit", "compare", "check_pair"])
def test_bad_data_is_refused_before_the_first_step(entry: str, x: Tensor, message: str) -> None:
    pair = Pair(*digits_pair())
    before = [p.detach().clone() for p in pair.model.parameters()]
    call: dict[str, Callable[[], Any]] = {
        "fit": lambda: pv.fit(*pair, (x,), epochs=1, progress=False),
        "compare": lambda: pv.compare(*pair, (x,), progress=False),
        "check_pair": lambda: pv.check_pair(*pair, (x,)),
    }
    with pytest.raises(ValueError, match=message):
        call[entry]()
    for p, q in zip(pair.model.parameters(), before, strict=True):
        assert torch.equal(p, q)


def test_a_wrong_draw_is_named_before_it_breaks_the_models_network() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            weights = torch.linalg.cholesky(torch.diag_embed(rate))  # fails below 0
            pyro.sample("x", dist.Poisson(weights.diagonal(dim1=-2, dim2=-1)).to_event(1), obs=x)

    x = torch.ones(20, 2)
    with pytest.raises(ValueError, match="draws 'z' outside the support of its prior"):
        pv.check_pair(model, guide_of(lambda x: dist.Normal(-9 * x, 1.0).to_event(1)), (x,))
    with pytest.raises(ValueError, match=r"for such values.*x.round\(\)"):
        pv.check_pair(model, guide_of(lambda x: dist.Gamma(x.ceil(), 1.0).to_event(1)), (x + 0.5,))


def test_a_bad_row_late_in_the_data_is_found(digits: pv.data.Dataset) -> None:
    x = digits.train[0].clone()
    x[1000, 3] = 0.5
    with pytest.raises(ValueError, match=r"1 of 1297 rows outside, rows \[1000\]"):
        pv.fit(*digits_pair(), (x,), epochs=1, progress=False)


def test_support_looks_at_the_event_shape() -> None:
    with pytest.raises(ValueError, match=r"another shape.*\n.*\(3,\)\n.*\(2,\)"):
        check_support(dist.Normal(torch.zeros(3), 1.0).to_event(1), torch.zeros(5, 2))


class _Side(PyroModule):
    """A pair of modules in stock Pyro whose networks have one name."""

    def __init__(self, name: str, guide: bool) -> None:
        super().__init__()
        setattr(self, name, torch.nn.Linear(2, 2))
        self._network, self._guide = name, guide

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if self._guide:
                loc = getattr(self, self._network)(x)
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                loc = getattr(self, self._network)(z)
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def test_parameters_that_the_global_store_has_taken_are_refused() -> None:
    x = torch.zeros(4, 2)
    pv.check_pair(_Side("decoder", False), _Side("encoder", True), (x,))
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"of the (model|guide) is not its own"):
        pv.check_pair(_Side("net", False), _Side("net", True), (x,))
    pyro.clear_param_store()
    first = _Side("decoder", False), _Side("encoder", True)
    pv.check_pair(*first, (x,))
    with pytest.raises(ValueError, match=r"is not its own(.*\n)*.*clear_param_store"):
        pv.check_pair(_Side("decoder", False), _Side("encoder", True), (x,))
    pyro.clear_param_store()


def test_plates_that_stand_for_different_numbers_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 1000, subsample=x):
            _z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(_z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"different numbers of data(.*\n)*.*1000.*\n.*4"):
        pv.check_pair(model, _guide(), (torch.zeros(4, 2),))
    with pytest.raises(ValueError, match="NUTS would count each datum as often"):
        pv.posterior.nuts(model, (torch.zeros(4, 2),), progress=False)


def test_batch_normalisation_is_left_as_it_was() -> None:
    model, guide = digits_pair()
    guide.encoder = torch.nn.Sequential(torch.nn.BatchNorm1d(64), guide.encoder)
    x = torch.bernoulli(torch.full((20, 64), 0.3))
    before = [b.clone() for b in guide.buffers()]
    pv.check_pair(model, guide, (x,))
    one = pv.bounds(model, guide, (x,), draws=30).elbo
    assert all(torch.equal(a, b) for a, b in zip(before, guide.buffers(), strict=True))
    assert guide.training and guide.encoder[0].training
    assert torch.isfinite(one).all()


@pytest.mark.parametrize("entry", [pv.posterior.quadrature, pv.posterior.nuts])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 63), "another shape"),
        (torch.full((4, 64), 0.5), "outside the support"),
        (torch.full((4, 64), torch.nan), "NaN"),
    ],
    ids=["width", "grey", "nan"],
)
def test_ways_to_the_posterior_refuse_bad_data(entry: Any, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry(digits_pair().model, (x,))


def test_a_third_part_is_looked_at() -> None:
    with pytest.raises(ValueError, match="part 3 of the batch has NaN"):
        check_batch((torch.zeros(2), torch.zeros(2), torch.full((2,), torch.nan)))
