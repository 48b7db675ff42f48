"""Models beyond the VAE: what each is for, shown on the digits."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import pyro_vae as pv
from pairs import conditional_pair, hierarchical_pair, quantized_pair
from pyro_vae.log_joint import LogJoint
from pyro_vae.models import Autoencoder, Codebook, perplexity
from truth import assert_z


def test_the_hierarchy_is_the_product_of_its_parts(digits: Any) -> None:
    x = digits.train[0][:6]
    model, _ = hierarchical_pair(x, "mixture")
    z2, z1 = torch.randn(3, 6, 1), torch.randn(3, 6, 2)
    target = LogJoint(model, (x,))
    assert list(target.transforms) == ["z2", "z1"]
    hand = (
        model.prior().log_prob(z2)
        + model.conditional(z2).log_prob(z1)
        + model.likelihood(model.decoder(z1, z2)).log_prob(x)
    )
    torch.testing.assert_close(target(torch.cat([z2, z1], -1)), hand)


def test_the_conditional_vae_generates_the_digit_it_is_asked_for(digits: Any) -> None:
    data = digits.with_labels()
    torch.manual_seed(0)
    pair = conditional_pair()
    run = pv.fit(*pair, data, epochs=60, lr=3e-3, progress=False)
    x, y = data.train
    classifier = LogisticRegression(max_iter=2000).fit(x.numpy(), y.numpy())
    assert classifier.score(data.test[0].numpy(), data.test[1].numpy()) > 0.9
    wanted = torch.arange(10).repeat(100)
    with torch.no_grad():
        generated = pair.model(None, wanted)
    agreement = (torch.as_tensor(classifier.predict(generated.numpy())) == wanted).float().mean()
    assert agreement >= 0.9
    unconditional = pv.bounds(*pair, (data.test[0], data.test[1]), draws=50).elbo.mean()
    assert unconditional == pytest.approx(run.best.validation_elbo, abs=1.5)


def test_the_conditional_vae_wants_labels_in_range() -> None:
    model, guide = conditional_pair()
    with pytest.raises(ValueError, match="wants labels rather than size=3"):
        model(None, size=3)
    x, y = torch.ones(4, 64), torch.tensor([0, 3, 9, 10])
    with pytest.raises(ValueError, match=r"class 10 is out of range 0\.\.9, classes 10"):
        pv.check_pair(model, guide, (x, y))
    with pytest.raises(ValueError, match="out of range"):
        model(None, torch.tensor([-1]))


def test_a_codebook_quantises_to_the_nearest() -> None:
    codebook = Codebook(codes=8, width=3, positions=4)
    encoded = torch.randn(50, 12)
    vectors, index = codebook.quantize(encoded)
    parts = encoded.reshape(50, 4, 1, 3)
    distance = (parts - codebook.vectors).norm(dim=-1)
    assert torch.equal(index, distance.argmin(-1))
    assert torch.equal(vectors.reshape(50, 4, 3), codebook.vectors[index])
    assert torch.equal(codebook.quantize(vectors)[1], index)


def test_the_prior_of_codes_sums_to_one_and_is_fitted_by_counting() -> None:
    codebook = Codebook(codes=5, width=2, positions=2)
    everything = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    vectors = codebook.vectors[everything].flatten(1)
    assert codebook().log_prob(vectors).exp().sum().item() == pytest.approx(1, abs=1e-5)
    codes = torch.stack([torch.randint(0, 2, (4000,)), torch.randint(2, 5, (4000,))], 1)
    codebook.fit(codes)
    assert codebook().log_prob(vectors).exp().sum().item() == pytest.approx(1, abs=1e-5)
    drawn = codebook.quantize(codebook().sample(torch.Size([4000])))[1]
    share = (drawn[:, 0] == 0).float().mean()
    assert_z(share, (codes[:, 0] == 0).float().mean(), torch.tensor(0.5 / 4000**0.5 * 2**0.5))
    assert (drawn[:, 0] < 2).float().mean() > 0.99 and (drawn[:, 1] >= 2).float().mean() > 0.99


def test_gradients_pass_straight_through(digits: Any) -> None:
    x = digits.train[0][:16]
    model, guide = quantized_pair()
    z = guide(x)
    vectors, _ = model.codebook.quantize(guide.encoder(x))
    torch.testing.assert_close(z, vectors)
    (gradient,) = torch.autograd.grad(z.sum(), [guide.encoder[-1].bias])
    torch.testing.assert_close(gradient, torch.full((16,), 16.0))


def test_the_vq_vae_uses_its_codebook_and_generates(digits: Any) -> None:
    torch.manual_seed(0)
    pair = quantized_pair()
    (x,) = digits.train
    with torch.no_grad():
        pair.model.codebook.start(pair.guide.encoder(x))
    run = pv.fit(*pair, digits, epochs=60, lr=3e-3, progress=False)
    codes = pair.guide.codes(x)
    used = perplexity(codes, 32)
    assert used > 8, f"perplexity {used:.1f} of 32 codes"
    uniform = pair.model.codebook().log_prob(pair.guide(x)).mean()
    assert uniform.item() == pytest.approx(-4 * torch.tensor(32.0).log().item(), rel=1e-5)
    assert run.best.validation_kl == pytest.approx(-uniform.item(), rel=1e-4), "M log K"
    before = pv.bounds(*pair, digits.test, draws=2).elbo.mean()
    pair.model.codebook.fit(codes)
    after = pv.bounds(*pair, digits.test, draws=2).elbo.mean()
    assert after > before + 0.5, "a prior fitted to the codes says more than a uniform one"
    with torch.no_grad():
        generated = pair.model(None, size=500)
    ink = x.mean(0), generated.mean(0)
    assert torch.corrcoef(torch.stack(ink))[0, 1] > 0.95


@pytest.mark.parametrize("arguments", [(1, 2, 2), (4, 0, 2), (4, 2, 0)])
def test_bad_codebooks(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="codes >= 2, width >= 1, positions >= 1"):
        Codebook(*arguments)


def test_an_autoencoder_reconstructs_better_and_leaves_holes(digits: Any) -> None:
    """What the V buys: codes of the autoencoder lie far from where a prior would look."""
    torch.manual_seed(0)
    plain = (
        Autoencoder(pv.networks.MLP(2, 64, 64), 2, pv.likelihoods.Bernoulli()),
        pv.guides.DeltaGuide(pv.networks.MLP(64, 64, 2)),
    )
    vae = (
        pv.models.VAE(
            pv.networks.MLP(2, 64, 64),
            prior=pv.priors.StandardNormal(2),
            likelihood=pv.likelihoods.Bernoulli(),
        ),
        pv.guides.NormalGuide(pv.networks.MLP(64, 64, 4)),
    )
    pairs: list[Any] = [plain, vae]
    runs = [pv.fit(m, g, digits, epochs=40, lr=5e-3, progress=False) for m, g in pairs]
    assert runs[0].best.train_reconstruction > runs[1].best.train_reconstruction
    assert runs[0].best.train_kl == 0
    (x,) = digits.train
    with torch.no_grad():
        codes, means = plain[1](x), vae[1].posterior(x).mean
    normal = dist.Normal(0.0, 1.0)
    assert normal.log_prob(codes).sum(-1).mean() < normal.log_prob(means).sum(-1).mean() - 2
    with pytest.raises(ValueError, match="no prior to generate from"):
        plain[0](None, size=3)
    with pytest.raises(ValueError, match="latent_dim"):
        Autoencoder(pv.networks.MLP(2, 64), 0, pv.likelihoods.Bernoulli())


def test_codes_of_another_shape_are_refused() -> None:
    codebook = Codebook(codes=8, width=2, positions=3)
    with pytest.raises(ValueError, match="8 codes want at least as many encodings; got 3"):
        codebook.start(torch.randn(1, 6))
    with pytest.raises(ValueError, match=r"codes must be \(N, 3\); got \(10, 1\)"):
        codebook.fit(torch.zeros(10, 1, dtype=torch.int64))


@pytest.mark.parametrize("bad", [-1.0, 3.0, 1.5, float("nan")])
def test_no_class_is_made_up(bad: float) -> None:
    with pytest.raises(ValueError, match=r"class .* is out of range 0\.\.2"):
        pv.networks.OneHot(3)(torch.tensor([0.0, bad]))
    with pytest.raises(ValueError, match=r"token .* is out of range 0\.\.2"):
        pv.networks.Tokens(3, 2, 4)(torch.tensor([[0.0, bad]]))
