"""Batched chains against closed forms and the grid; what does not converge is named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pairs import Pair, random_ppca, sparse, two_levels
from pyro_vae.log_joint import LogJoint
from pyro_vae.posterior import Draws, convergence, hmc, quadrature, sgld
from pyro_vae.posterior import kernels as kernel
from pyro_vae.posterior.kernels import State
from pyro_vae.posterior.mixture import Mixture, fit_mixture
from pyro_vae.verdict import joint_test
from truth import assert_z


def _five_modes(x: Tensor) -> None:
    """A mixture prior whose components a weak likelihood does not choose between."""
    means = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [-5.0, 0.0], [0.0, -5.0]])
    weights = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25])
    parts = dist.Normal(means, 0.3).to_event(1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), parts))
        pyro.sample("x", dist.Normal(z, 8.0).to_event(1), obs=x)


def _bounded(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(3 * rate), obs=x)


def _holds(draws: Draws, mean: Tensor, covariance: Tensor) -> None:
    """Means, second moments and products in MCSE, Bonferroni over all data."""
    z = torch.cat([v if v.dim() > 3 else v.unsqueeze(-1) for v in draws.sites.values()], -1)
    z = z.double()
    assert_z(z.flatten(0, 1).mean(0), mean, convergence.mcse_mean(z))
    centred = z - mean
    i, j = torch.triu_indices(z.shape[-1], z.shape[-1])
    products = centred[..., i] * centred[..., j]
    found = products.flatten(0, 1).mean(0)
    assert_z(found, covariance[:, i, j], convergence.mcse_mean(products))


@pytest.mark.parametrize("latent_dim", [2, 6])
def test_it_agrees_with_closed_forms_on_256_data(latent_dim: int) -> None:
    model = random_ppca(20, latent_dim)
    x = model(None, size=256).detach()
    before = torch.get_rng_state()
    draws = hmc(model, (x,), draws=600, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    posterior = model.posterior(x)
    _holds(draws, posterior.mean.detach().double(), posterior.covariance_matrix.detach().double())
    assert (draws.rhat["z"] < 1.05).float().mean() > 0.97
    with pytest.raises(AssertionError, match="allowed"):
        wrong = model.posterior(x + 3)
        _holds(draws, wrong.mean.detach(), wrong.covariance_matrix.detach())


def test_it_agrees_with_the_grid_on_digits(trained: Pair, digits: Any) -> None:
    x = digits.train[0][:256]
    exact = quadrature(trained.model, (x,))
    draws = hmc(trained.model, (x,), guide=trained.guide, progress=False)
    sound = torch.tensor([why == "" for why in draws.trouble])
    assert sound.float().mean() > 0.98
    kept = Draws({"z": draws["z"][:, :, sound]})
    _holds(kept, exact.mean[sound], exact.covariance[sound])
    assert draws.figures["gradients"].min() > 0 and draws.figures["densities"].min() >= 4000


def test_five_separated_modes_come_out_with_the_right_weights() -> None:
    x = torch.randn(64, 2)
    exact = quadrature(_five_modes, (x,))
    draws = hmc(_five_modes, (x,), progress=False)
    _holds(draws, exact.mean, exact.covariance)
    assert draws.trouble.count("") >= 62


def test_two_sites_and_a_bounded_one() -> None:
    x = torch.randn(256, 1) * 2
    draws = hmc(two_levels, (x,), draws=400, progress=False)
    assert list(draws.sites) == ["z2", "z1"]
    covariance = torch.tensor([[2.0, 1.0], [1.0, 2.0]]) / 3
    _holds(draws, torch.cat([(6 + x) / 3, (3 + 2 * x) / 3], 1), covariance.expand(256, 2, 2))
    counts = torch.arange(256.0) % 12
    draws = hmc(_bounded, (counts,), draws=400, progress=False)
    mean, variance = (counts + 2) / 4, (counts + 2) / 16  # Gamma(2 + x, 1 + 3)
    assert (draws["rate"] > 0).all() and draws["rate"].shape == (4, 400, 256)
    _holds(draws, mean.unsqueeze(-1), variance[:, None, None])


@pytest.mark.filterwarnings("ignore:the density of a latent is infinite")
@pytest.mark.parametrize("guided", [False, True])
def test_a_pole_at_a_border(guided: bool) -> None:
    def guide(x: Tensor) -> None:
        mean, variance = torch.digamma(x + 0.05) - 0.7, torch.polygamma(1, x + 0.05)
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(mean, variance.sqrt()))

    counts = torch.arange(4.0).repeat(32)
    guides = guide if guided else None
    draws = hmc(sparse(0.05), (counts,), guide=guides, draws=400, progress=False)
    found = draws["rate"].mean((0, 1)).double().view(32, 4).mean(0)
    error = convergence.mcse_mean(draws["rate"].unsqueeze(-1).double()).view(32, 4)
    truth = (torch.arange(4.0) + 0.05) / 2  # Gamma(0.05 + x, 1 + 1)
    assert_z(found, truth, error.square().mean(0).sqrt() / 32**0.5)


def test_a_wrong_guide_does_not_move_the_answer() -> None:
    model = random_ppca()
    x = model(None, size=64).detach()

    def far(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((len(x), 2), 9.0), 0.01).to_event(1))

    draws = hmc(model, (x,), guide=far, draws=400, progress=False)
    posterior = model.posterior(x)
    _holds(draws, posterior.mean.detach(), posterior.covariance_matrix.detach())


def test_it_is_reproducible_and_knows_no_rows_but_its_own() -> None:
    model = random_ppca()
    x = model(None, size=9).detach()
    once = hmc(model, (x,), draws=20, chunk=4, progress=False)["z"]
    assert torch.equal(once, hmc(model, (x,), draws=20, chunk=4, progress=False)["z"])
    assert torch.equal(
        once[:, :, :4], hmc(model, (x[:4],), draws=20, chunk=4, progress=False)["z"]
    )
    assert not torch.equal(once, hmc(model, (x,), draws=20, chunk=4, seed=1, progress=False)["z"])
    assert all(p.requires_grad for p in pv.models.VAE(
        pv.networks.MLP(2, 4, 3), prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(),
    ).parameters())  # fmt: skip


def test_many_short_chains_are_judged_by_nested_rhat() -> None:
    model = random_ppca()
    x = model(None, size=16).detach()
    draws = hmc(model, (x,), draws=4, chains=256, superchains=16, progress=False)
    assert draws.trouble.count("") >= 14
    posterior = model.posterior(x)
    ends = draws["z"][:, -1].double()
    error = posterior.variance.detach().sqrt() / 256**0.5
    assert_z(ends.mean(0), posterior.mean.detach(), error)
    apart = torch.randn(64, 2, 3, generator=torch.Generator().manual_seed(0))
    assert (convergence.rhat(apart, superchains=8) < 1.1).all()
    apart[:8] += 2
    assert (convergence.rhat(apart, superchains=8) > 1.1).all()


def test_data_that_cannot_be_sampled_are_flagged_by_name() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    draws = hmc(model, (torch.tensor([0.0, 50.0, 1.0]),), draws=300, progress=False)
    assert draws.trouble[1] == "no likelihood anywhere" and draws["z"][:, :, 1].isnan().all()
    assert torch.isfinite(draws["z"][:, :, [0, 2]]).all()
    assert ((draws["z"][:, :, 2] > 0) & (draws["z"][:, :, 2] < 2)).all()
    still = Draws({"z": torch.ones(4, 100, 2, 1) * torch.tensor([[1.0], [2.0]])})
    assert still.trouble == ["chains never moved"] * 2
    short = hmc(model, (torch.zeros(1),), draws=8, progress=False)
    assert "ESS below 400" in short.trouble[0]


@pytest.mark.parametrize(
    "options", [{"draws": 3}, {"chains": 0}, {"warmup": 0}, {"chunk": 0}], ids=str
)
def test_empty_work_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="hmc wants draws >= 4"):
        hmc(random_ppca(), (torch.zeros(1, 6),), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="superchains must be 2 or more and divide the 4 chains"):
        hmc(random_ppca(), (torch.zeros(1, 6),), superchains=3)


def test_global_and_discrete_latents_are_refused() -> None:
    def shared(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="'m' of the model is not in the plate 'data' alone"):
        hmc(shared, (torch.zeros(2),), progress=False)
    with pytest.raises(ValueError, match="discrete"):
        hmc(discrete, (torch.zeros(2),), progress=False)


# The kernels, by Geweke's joint test, and mutations of them


def _hamiltonian(target: LogJoint, u: Tensor) -> Tensor:
    rows = u.shape[1]
    step, metric = torch.full((rows,), 0.7), torch.eye(u.shape[2]).expand(rows, -1, -1)
    return kernel.hamiltonian(target, State(u, target(u)), step, metric, 3).state.position


def _jump(target: LogJoint, u: Tensor) -> Tensor:
    wide = Mixture(
        torch.zeros(u.shape[1], 1),
        torch.full((u.shape[1], 1, u.shape[2]), 0.3),
        (1.5 * torch.eye(u.shape[2])).expand(u.shape[1], 1, -1, -1),
    )
    proposed = wide.sample(2).unsqueeze(1)  # (n, C, B, L)
    scored = State(proposed.squeeze(1), target(proposed.squeeze(1)))
    state = State(proposed, scored.log_density.unsqueeze(1))
    here = State(u, target(u))
    log_g = wide.log_prob(proposed.squeeze(1)).unsqueeze(1)
    chain, _, _ = kernel.jump(here, wide.log_prob(u), state, log_g)
    return chain.position[-1]


def _unadjusted(target: LogJoint, u: Tensor) -> Tensor:
    step = torch.full((u.shape[1],), 1.2)
    return kernel.langevin(target, u, step, torch.eye(u.shape[2]).expand(u.shape[1], -1, -1))


@pytest.mark.parametrize("step", [_hamiltonian, _jump])
def test_kernels_pass_the_joint_test(step: Any) -> None:
    for model, x in ((two_levels, torch.zeros(50, 1)), (_bounded, torch.zeros(50))):
        assert joint_test(model, (x,), step, replicates=10_000).pvalue > 1e-3


def test_broken_kernels_fail_the_joint_test(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(50, 1)
    assert joint_test(two_levels, (x,), _unadjusted, replicates=10_000).pvalue < 1e-6
    right = torch.rand_like
    monkeypatch.setattr(
        "pyro_vae.posterior.kernels.torch.rand_like", lambda like: right(like) * 1e-30
    )
    assert joint_test(two_levels, (x,), _jump, replicates=10_000).pvalue < 1e-6


def test_a_lost_jacobian_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(self: LogJoint, u: Tensor) -> Any:
        latents, _ = self.constrain(u)
        return self._score(latents, tuple(u.shape[:-1]))

    monkeypatch.setattr(LogJoint, "parts", parts)
    counts = torch.arange(64.0) % 12
    draws = hmc(_bounded, (counts,), draws=400, progress=False)
    with pytest.raises(AssertionError, match="allowed"):
        _holds(draws, ((counts + 2) / 4).unsqueeze(-1), ((counts + 2) / 16)[:, None, None])


def test_mixtures_are_densities_and_find_their_parts() -> None:
    generator = torch.Generator().manual_seed(3)
    centers = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    which = torch.randint(3, (600, 5), generator=generator)
    u = centers[which] + 0.3 * torch.randn(600, 5, 2, generator=generator)
    fitted = fit_mixture(u, torch.ones(600, 5), 3)
    assert (fitted.log_weight.exp().sum(1) - 1).abs().max() < 1e-5
    found = fitted.mean.sum(1)
    torch.testing.assert_close(found, centers.sum(0).expand(5, 2), atol=0.2, rtol=0)
    draws = fitted.widened(2.0, 0.1).sample(20_000)
    mean, covariance = fitted.widened(2.0, 0.1).moments()
    assert_z(draws.mean(0), mean, draws.std(0) / 20_000**0.5)
    # ∫ g = 1, by importance sampling from a wider Gaussian
    wide = dist.MultivariateNormal(mean, 9 * covariance)
    points = wide.sample(torch.Size([20_000]))
    weight = (fitted.log_prob(points) - wide.log_prob(points)).exp()
    assert_z(weight.mean(0), torch.ones(5), weight.std(0) / 20_000**0.5)


def test_langevin_is_off_by_what_theory_says() -> None:
    model = random_ppca()
    x = model(None, size=32).detach()
    draws = sgld(model, (x,), step_size=1.0, draws=2000)
    ratio = (draws.sd**2 / model.posterior(x).variance.detach()).mean()
    assert 1.2 < ratio < 1.5  # 1/(1 − ε²/4) = 1.33, the metric being estimated
    assert draws.trouble.count("") > 28, "and no diagnostic of chains tells"
    with pytest.raises(ValueError, match="step size between 0 and 2"):
        sgld(model, (x,), step_size=2.0)


# Chunks on disk

SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_hmc import thirty
from pyro_vae.posterior import hmc
model, x = thirty()
hmc(model, (x,), draws=100, chunk=2, folder=sys.argv[1], progress=False)
"""


def thirty() -> tuple[pv.models.PPCA, Tensor]:
    """A model and thirty data, the same in every process."""
    torch.manual_seed(0)
    model = random_ppca()
    return model, model(None, size=30).detach()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(Path(__file__).parent)]
    note = tmp_path / "run.json"
    for ending in (signal.SIGKILL, signal.SIGINT):
        before = _finished(note)
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as run:
            while _finished(note) < before + 3 and run.poll() is None:
                time.sleep(0.01)
            run.send_signal(ending)
        assert before + 3 <= _finished(note) < 15
    model, x = thirty()
    options: dict[str, Any] = {"draws": 100, "chunk": 2, "progress": False}
    resumed = hmc(model, (x,), folder=tmp_path, **options)
    assert torch.equal(resumed["z"], hmc(model, (x,), **options)["z"])


def _finished(note: Path) -> int:
    return len(json.loads(note.read_text())["finished"]) if note.exists() else 0


def test_draws_on_disk_are_those_in_memory_and_know_their_run(tmp_path: Path) -> None:
    model = random_ppca()
    x = model(None, size=7).detach()
    memory = hmc(model, (x,), draws=20, chunk=3, progress=False)
    disk = hmc(model, (x,), draws=20, chunk=3, folder=tmp_path, progress=False)
    assert torch.equal(memory["z"], disk["z"])
    assert torch.equal(memory.figures["gradients"], disk.figures["gradients"])
    again = hmc(model, (x,), draws=20, chunk=3, folder=tmp_path, progress=False)
    assert torch.equal(memory["z"], again["z"])
    with pytest.raises(ValueError, match=r"another run\n  expected: the same draws"):
        hmc(model, (x,), draws=21, chunk=3, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="the same batch, model"):
        hmc(random_ppca(), (x + 1,), draws=20, chunk=3, folder=tmp_path, progress=False)
