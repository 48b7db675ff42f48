"""Each prior is a density, samples from it, and VampPrior is the mixture it says it is."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pairs import GUIDES, PRIORS, catalogue_pair
from pyro_vae.pair import evaluating
from pyro_vae.priors import NormalMixture, VampPrior
from truth import assert_drawn_from, assert_z


def _prior(name: str, latent_dim: int) -> Any:
    """A prior away from where it starts."""
    x = torch.rand(40, 64)
    prior = PRIORS[name](GUIDES["mean-field"](x, latent_dim), x, latent_dim)
    for parameter in prior.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return prior


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("name", PRIORS)
def test_it_integrates_to_one(double: None, name: str, latent_dim: int) -> None:
    prior = _prior(name, latent_dim)()
    line = torch.linspace(-12, 12, 2001 if latent_dim == 1 else 501)
    grid = torch.cartesian_prod(*[line] * latent_dim).reshape(-1, latent_dim)
    total = prior.log_prob(grid).exp().sum() * (line[1] - line[0]) ** latent_dim
    assert prior.event_shape == (latent_dim,)
    # Splines have kinks, at which the trapezoid rule is only of second order.
    assert total.item() == pytest.approx(1, abs=3e-3 if name == "flow" else 1e-6)


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("name", PRIORS)
def test_its_samples_match_its_density(name: str, latent_dim: int) -> None:
    prior = _prior(name, latent_dim)()
    with torch.no_grad():
        z = prior.sample(torch.Size([20_000]))
        assert_drawn_from(z, prior.log_prob)
        with pytest.raises(AssertionError, match="over"):
            assert_drawn_from(z + 0.2 * z.std(0), prior.log_prob)


def _vamp(guide: Any = None, components: int = 7, **options: Any) -> tuple[VampPrior, Any]:
    guide = guide or pv.guides.MultivariateNormalGuide(pv.networks.MLP(16, 32, 5))
    return VampPrior(guide.posterior, torch.rand(components, 16), **options), guide


def test_vamp_is_the_mixture_of_its_posteriors() -> None:
    prior, guide = _vamp(learned_weights=True)
    with torch.no_grad():
        prior.logits.copy_(torch.randn(7))
    z = torch.randn(50, 2)
    parts = torch.stack([guide.posterior(u.unsqueeze(0)).log_prob(z) for u in prior.pseudo_inputs])
    expected = (parts + prior.logits.log_softmax(0).unsqueeze(-1)).logsumexp(0)
    torch.testing.assert_close(prior().log_prob(z), expected)


def test_vamp_samples_every_component() -> None:
    places = torch.linspace(-30, 30, 11)

    def posterior(u: Tensor) -> Any:
        return dist.Normal(places.unsqueeze(-1), 0.1).to_event(1)

    prior = VampPrior(posterior, torch.rand(11, 4))
    z = prior().sample(torch.Size([3000]))
    nearest = (z - places).abs().argmin(-1).bincount(minlength=11)
    assert (nearest > 3000 / 11 / 2).all()
    usage = prior().usage(z)
    torch.testing.assert_close(usage, nearest / 3000, atol=1e-3, rtol=0)
    assert usage.sum().item() == pytest.approx(1)


def test_vamp_starts_where_it_is_told_and_stays_in_range() -> None:
    x = (torch.rand(30, 16) > 0.5).float()
    guide = pv.guides.NormalGuide(pv.networks.MLP(16, 4))
    prior = VampPrior.from_data(guide.posterior, x, 12, seed=3)
    rows = (prior.pseudo_inputs > 0.5).float()
    assert all(bool((row == x).all(-1).any()) for row in rows)
    assert len(rows.unique(dim=0)) == len(
        x[torch.randperm(30, generator=torch.Generator().manual_seed(3))[:12]].unique(dim=0)
    )
    assert 0.04 < prior.pseudo_inputs.min() and prior.pseudo_inputs.max() < 0.96
    noise = VampPrior.at_random(guide.posterior, 12, 16, mean=0.3, sd=0.02)
    assert noise.pseudo_inputs.mean().item() == pytest.approx(0.3, abs=0.01)
    data = 5 * torch.randn(4, 16)
    real = VampPrior(guide.posterior, data, data_range=None)
    assert torch.equal(real.pseudo_inputs, data)
    with torch.no_grad():
        real.raw.add_(1.0)
    assert not torch.equal(real.pseudo_inputs, data), "the data are not written to"


def test_gradients_reach_encoder_and_all_pseudo_inputs() -> None:
    prior, guide = _vamp(learned_weights=True)
    prior().log_prob(torch.randn(20, 2)).sum().backward()
    for parameter in (*prior.parameters(), *guide.parameters()):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    assert prior.raw.grad is not None
    assert prior.raw.grad.ne(0).double().mean() > 0.99, "no dead pixels"
    fixed, _ = _vamp()
    assert [name for name, p in fixed.named_parameters() if p.requires_grad] == ["raw"]


def test_components_are_cached_in_eval_mode_and_only_there() -> None:
    calls = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.training)
            return super().forward(x)

    guide: Any = pv.guides.NormalGuide(Counting(16, 4))
    prior, _ = _vamp(guide)
    prior(), prior()
    assert calls == [True, True]
    with evaluating(prior), torch.no_grad():
        first = prior()
        assert prior() is first and not first.component_distribution.mean.requires_grad
    assert calls == [True, True, False], "encoder in eval mode, once"
    assert guide.training and guide.encoder.training and prior.training
    prior.eval()
    assert prior() is not first, "gradients are wanted"
    prior.requires_grad_(False)
    assert prior() is first
    with torch.no_grad():
        guide.encoder.weight.add_(1.0)
    assert prior() is not first, "the encoder has changed"
    second = prior()
    with torch.no_grad():
        prior.raw.add_(1.0)
    assert prior() is not second, "the pseudo-inputs have changed"
    third = prior()
    guide.encoder.bias.data.mul_(3)
    assert prior() is not third, "the encoder has changed behind autograd's back"
    prior.double(), guide.double()
    assert prior().mean.dtype == torch.float64


def test_dropout_of_the_encoder_is_off_in_evaluation() -> None:
    guide = pv.guides.NormalGuide(
        nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    )
    prior, _ = _vamp(guide)
    z = torch.randn(5, 2)
    assert not torch.equal(prior().log_prob(z), prior().log_prob(z))
    prior.eval()
    reference = VampPrior(guide.eval().posterior, torch.rand(7, 16))
    reference.load_state_dict(prior.state_dict())
    torch.testing.assert_close(prior().log_prob(z), reference().log_prob(z))


def test_a_mixture_goes_where_gaussians_go() -> None:
    mixture = NormalMixture(
        dist.Categorical(torch.ones(3)), dist.Normal(torch.randn(3, 2), 1.0).to_event(1)
    )
    wide = mixture.expand(torch.Size([5, 4]))
    assert wide.support is mixture.support and wide.sample().shape == (5, 4, 2)
    assert wide.sample((3,)).shape == (3, 5, 4, 2)
    assert wide.log_prob(torch.zeros(2)).shape == (5, 4)
    z = torch.randn(6, 2)
    responsibilities = mixture.responsibilities(z)
    torch.testing.assert_close(responsibilities.sum(-1), torch.ones(6))


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_a_matrix_product_loses_no_digit_of_the_mixture(scale: float) -> None:
    """Against broadcasting in float64, near components and far from them."""
    loc = 5 * torch.randn(30, 40)
    scales = scale * (0.5 + torch.rand(30, 40))
    logits = torch.randn(30)
    near = loc[torch.randint(30, (200,))]
    z = torch.cat([near + scale * torch.randn(200, 40), 10 * torch.randn(20, 40)])
    mixture = NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scales).to_event(1))
    wide = dist.Normal(loc.double(), scales.double()).to_event(1)
    parts = wide.log_prob(z.double().unsqueeze(1)) + logits.double().log_softmax(0)
    # Single precision is in the answer alone; float64 cancels by 1e-4 nats at the floor of scales.
    found = mixture.log_prob(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), parts.logsumexp(1), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(mixture.responsibilities(z).sum(-1), torch.ones(220))


def test_a_mixture_draws_each_component_as_often_and_as_wide_as_it_is() -> None:
    loc = torch.tensor([[-50.0, 0.0], [0.0, 50.0], [50.0, 0.0]])
    scale = torch.tensor([[0.1, 3.0], [1.0, 1.0], [5.0, 0.2]])
    weight = torch.tensor([0.7, 0.2, 0.1])
    mixture = NormalMixture(dist.Categorical(weight), dist.Normal(loc, scale).to_event(1))
    z = mixture.sample((20_000,))
    nearest = torch.cdist(z, loc).argmin(-1)
    drawn = nearest.bincount(minlength=3)
    assert_z(drawn / 20_000, weight, (weight * (1 - weight) / 20_000).sqrt())
    for k, count in enumerate(drawn):
        own = z[nearest == k]
        assert_z(own.mean(0), loc[k], scale[k] / count.sqrt())
        assert_z(own.std(0), scale[k], scale[k] / (2 * count).sqrt())


@pytest.mark.parametrize(
    "parts",
    [
        dist.MultivariateNormal(torch.zeros(3, 2), torch.eye(2)),
        dist.Normal(torch.zeros(5, 3, 2), 1.0).to_event(1),
        dist.Normal(torch.zeros(5, 3), 1.0),
        dist.LogNormal(torch.zeros(5, 3), 1.0),
    ],
    ids=["full covariance", "a batch", "scalars", "not normal"],
)
def test_what_is_no_mixture_of_factorised_normals_is_drawn_as_torch_draws_it(parts: Any) -> None:
    weight = dist.Categorical(torch.ones((*parts.batch_shape[:-1], 3)))
    mixture = NormalMixture(weight, parts)
    torch.manual_seed(3)
    z = mixture.sample((7,))
    torch.manual_seed(3)
    assert torch.equal(z, torch.distributions.MixtureSameFamily.sample(mixture, torch.Size([7])))


class _Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, made.numel() if isinstance(made, Tensor) else 0)
        return made


def test_a_draw_of_a_mixture_is_drawn_from_one_component() -> None:
    prior = pv.priors.GaussianMixture(40, 500)()
    with _Largest() as largest:
        assert prior.expand((7,)).sample((1000,)).shape == (1000, 7, 40)
    assert largest.numel == 7000 * 40  # not 500 times as many


def test_a_batch_of_mixtures_scores_row_by_row() -> None:
    loc, scale, logits = torch.randn(4, 3, 2), torch.rand(4, 3, 2) + 0.5, torch.randn(4, 3)
    z = torch.randn(7, 4, 2)
    together = NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))
    for b in range(4):
        alone = NormalMixture(
            dist.Categorical(logits=logits[b]), dist.Normal(loc[b], scale[b]).to_event(1)
        )
        torch.testing.assert_close(together.log_prob(z)[:, b], alone.log_prob(z[:, b]))


def test_gradients_of_the_matrix_product_are_those_of_broadcasting(double: None) -> None:
    loc, raw, logits = (torch.randn(s, requires_grad=True) for s in ((5, 3), (5, 3), (5,)))
    z = torch.randn(6, 3, requires_grad=True)
    parts = dist.Normal(loc, raw.exp()).to_event(1)
    expected = (parts.log_prob(z.unsqueeze(1)) + logits.log_softmax(0)).logsumexp(1).sum()
    again = dist.Normal(loc, raw.exp()).to_event(1)
    found = NormalMixture(dist.Categorical(logits=logits), again).log_prob(z).sum()
    inputs = (loc, raw, logits, z)
    for one, other in zip(
        torch.autograd.grad(found, inputs),
        torch.autograd.grad(expected, inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_vamp_prior_of_a_pair_is_not_owned_twice() -> None:
    pair = catalogue_pair(torch.rand(40, 64), "vamp")
    names = dict(pair.model.named_parameters())
    assert not any("encoder" in name for name in names)
    assert {"prior.raw", "prior.logits"} <= set(names)


GUIDE = pv.guides.NormalGuide(pv.networks.MLP(16, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pv.priors.GaussianMixture(2, 1), "more than one component"),
        (lambda: pv.priors.GaussianMixture(0, 5), "latent_dim"),
        (lambda: pv.priors.FlowPrior(0), "latent_dim"),
        (lambda: pv.priors.DiagonalNormal(-1), "latent_dim"),
        (lambda: VampPrior(GUIDE.posterior, torch.rand(1, 16)), "more than one component"),
        (lambda: VampPrior(GUIDE.posterior, torch.rand(16)), r"shape \(K, D\)"),
        (
            lambda: VampPrior(GUIDE.posterior, 3 + torch.rand(5, 16)),
            "outside the range of the data",
        ),
        (lambda: VampPrior.from_data(GUIDE.posterior, torch.rand(9, 16), 10), r"components <= 9"),
        (
            lambda: VampPrior(lambda u: dist.Normal(u, 1.0), torch.rand(5, 16))(),
            r"event shape \(L,\)",
        ),
    ],
    ids=[
        "one",
        "L = 0",
        "flow L = 0",
        "L < 0",
        "vamp of one",
        "vector",
        "range",
        "K > N",
        "posterior",
    ],
)
def test_bad_priors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_prior_of_another_size_than_the_guide_is_refused() -> None:
    pair = catalogue_pair(torch.ones(10, 64))
    pair.model.prior = pv.priors.GaussianMixture(3, 5)
    with pytest.raises(
        ValueError,
        match=r"different event shapes|the model cannot take this batch",
    ):
        pv.check_pair(*pair, (torch.ones(10, 64),))


def test_an_encoder_that_fails_leaves_its_mode() -> None:
    guide = pv.guides.NormalGuide(pv.networks.MLP(15, 4))
    prior, _ = _vamp(guide)
    prior.eval()
    with pytest.raises(RuntimeError, match="shapes"):
        prior()
    assert guide.training and guide.encoder.training


def test_a_conditional_normal_wants_pairs_of_features() -> None:
    with pytest.raises(ValueError, match="wants 2 L features; got 3"):
        pv.priors.ConditionalNormal(nn.Linear(3, 3))(torch.zeros(2, 3))
