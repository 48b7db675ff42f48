"""The swap matrix: parts of the catalogue meet, and each pair does all that a pair must."""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor

import pyro_vae as pv
from pairs import (
    GUIDES,
    PRIORS,
    Pair,
    catalogue_pair,
    conditional_pair,
    hierarchical_pair,
    quantized_pair,
)
from pyro_vae.models import Autoencoder
from pyro_vae.networks import MLP, ConvDecoder, ConvEncoder, GatedConv, GatedMLP
from pyro_vae.pair import evaluating
from pyro_vae.posterior import nuts, quadrature

ROWS = 128


def _levels(x: Tensor) -> Tensor:
    return (x * 16).round()


LIKELIHOODS: dict[str, tuple[Any, Any]] = {
    "bernoulli": (pv.likelihoods.Bernoulli, lambda x: (x > 0.5).float()),
    "continuous bernoulli": (pv.likelihoods.ContinuousBernoulli, lambda x: x),
    "normal": (lambda: pv.likelihoods.Normal(0.5), lambda x: x),
    "normal, shared": (pv.likelihoods.LearnedNormal, lambda x: x),
    "normal, per pixel": (lambda: pv.likelihoods.LearnedNormal(64), lambda x: x),
    "categorical": (lambda: pv.likelihoods.Categorical(17), _levels),
    "discretised logistic": (lambda: pv.likelihoods.DiscretizedLogistic(17), lambda x: x),
    "poisson": (pv.likelihoods.Poisson, _levels),
    "negative binomial": (lambda: pv.likelihoods.NegativeBinomial(64), _levels),
}

PAIRS: dict[str, Any] = {
    **{
        f"{prior} × {guide}": (prior, guide)
        for prior, guide in product(PRIORS, [*GUIDES, "refined"])
        if not ("vamp" in prior and guide == "local")  # a VampPrior wants an amortized posterior
    },
    **{f"bernoulli ← {name}": name for name in LIKELIHOODS if name != "bernoulli"},
    **{f"hierarchical ← {prior}": f"hierarchical ← {prior}" for prior in PRIORS},
    "conditional": "conditional",
    "conditional, p(z|y)": "conditional, p(z|y)",
    "quantized": "quantized",
    "autoencoder": "autoencoder",
    "gated": "gated",
    "convolutional": "convolutional",
    "gated convolutional": "gated convolutional",
}


@pytest.fixture(scope="module")
def grey() -> pv.data.Dataset:
    return pv.data.load("digits", binarize=None)


def _build(name: str, grey: pv.data.Dataset) -> tuple[Pair, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    x, y = grey.train[0][:ROWS], grey.labels["train"][:ROWS]
    what = PAIRS[name]
    binary = (x > 0.5).float()
    if not isinstance(what, str):
        return catalogue_pair(binary, *what), (binary,)
    if what in LIKELIHOODS:
        make, transform = LIKELIHOODS[what]
        return catalogue_pair(transform(x), likelihood=make()), (transform(x),)
    if what.startswith("hierarchical"):
        return hierarchical_pair(binary, what.removeprefix("hierarchical ← ")), (binary,)
    if what.startswith("conditional"):
        network = torch.nn.Sequential(pv.networks.OneHot(10), MLP(10, 4))
        given = pv.priors.ConditionalNormal(network) if "p(z|y)" in what else None
        return conditional_pair(given), (binary, y)
    if what == "quantized":
        return quantized_pair(), (binary,)
    if what == "autoencoder":
        plain = Autoencoder(MLP(2, 32, 64), 2, pv.likelihoods.Bernoulli())
        return Pair(plain, pv.guides.DeltaGuide(MLP(64, 32, 2))), (binary,)
    networks: dict[str, Any] = {
        "gated": (GatedMLP(2, 32, 64), GatedMLP(64, 32, 4)),
        "convolutional": (ConvDecoder(2, (8, 4), (8, 8)), ConvEncoder((8, 8), (4, 8), 4)),
        "gated convolutional": (
            ConvDecoder(2, (8, 4), (8, 8), block=GatedConv),
            ConvEncoder((8, 8), (4, 8), 4, block=GatedConv),
        ),
    }
    decoder, encoder = networks[what]
    prior, likelihood = pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli()
    model = pv.models.VAE(decoder, prior=prior, likelihood=likelihood)
    return Pair(model, pv.guides.NormalGuide(encoder)), (binary,)


@pytest.fixture(params=PAIRS)
def built(request: pytest.FixtureRequest, grey: pv.data.Dataset) -> Any:
    return (*_build(request.param, grey), request.param)


def _loss(pair: Pair, batch: tuple[Tensor, ...]) -> float:
    with evaluating(*pair), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        return float(loss(*pair)(*batch)) / ROWS


def test_it_passes_the_check_and_twenty_steps_lower_its_loss(built: Any) -> None:
    pair, batch, _ = built
    pv.check_pair(pair.model, pair.guide, batch)
    before = _loss(pair, batch)
    run = pv.fit(
        pair.model, pair.guide, batch, epochs=20, batch_size=ROWS, lr=1e-2, progress=False
    )
    after = _loss(pair, batch)
    assert after < before - 0.5
    assert len(run.epochs) == 20


def test_it_generates_and_predicts(built: Any) -> None:
    pair, batch, name = built
    if name != "autoencoder":
        ask = {"y": batch[1][:5]} if len(batch) == 2 else {"size": 5}
        generated = pair.model(None, **ask)
        assert generated.shape == (5, 64) and torch.isfinite(generated).all()
        assert Predictive(pair.model, num_samples=3)(None, **ask)["x"].shape == (3, 5, 64)
    few = tuple(part[:4] for part in batch)
    found = Predictive(pair.model, guide=pair.guide, num_samples=3, parallel=True)(*few)
    assert all(value.shape[:2] == (3, 4) for value in found.values())


def test_state_dict_float64_and_device(built: Any, grey: pv.data.Dataset) -> None:
    pair, batch, name = built
    loss = _loss(pair, batch)
    torch.manual_seed(1)
    other = _build(name, grey)[0]
    for part in other:
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter)
    for part, twin in zip(other, pair, strict=True):
        part.load_state_dict(twin.state_dict())
    assert _loss(other, batch) == pytest.approx(loss, rel=1e-5)
    model, guide = deepcopy(pair)
    model, guide = model.to("cpu").double(), guide.to("cpu").double()
    wide = tuple(part.double() if part.is_floating_point() else part for part in batch)
    # One seed draws other numbers in float64, so this is two estimates from 4 draws a datum.
    assert _loss(Pair(model, guide), wide) == pytest.approx(loss, rel=0.1, abs=0.5)
    meta = deepcopy(pair.model).to("meta")
    assert all(p.device.type == "meta" for p in (*meta.parameters(), *meta.buffers()))


CONTINUOUS = [
    name
    for name in PAIRS
    if name not in ("quantized", "autoencoder")
    and not name.endswith(("local", "refined", "corrupted"))
]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_it_goes_through_quadrature(name: str, grey: pv.data.Dataset) -> None:
    pair, batch = _build(name, grey)
    few = tuple(part[:2] for part in batch)
    exact = quadrature(pair.model, few, tolerance=1e-3)
    bound = pv.bounds(*pair, few, draws=300)
    assert torch.isfinite(exact.log_evidence).all()
    assert (exact.log_evidence - bound.elbo > -5 * bound.elbo_se).all()


@pytest.mark.parametrize(
    "name", [n for n in CONTINUOUS if "×" not in n or n.endswith("mean-field")]
)
def test_it_goes_through_nuts(name: str, grey: pv.data.Dataset) -> None:
    pair, batch = _build(name, grey)
    datum = tuple(part[:1] for part in batch)
    draws = nuts(pair.model, datum, draws=5, warmup=5, chains=1, progress=False)
    assert torch.isfinite(draws.flat).all() and draws.flat.shape[:2] == (5, 1)


def test_codes_are_no_density_to_integrate(grey: pv.data.Dataset) -> None:
    pair, (x,) = _build("quantized", grey)
    with pytest.raises(ValueError, match="'z' is discrete"):
        quadrature(pair.model, (x[:2],))
