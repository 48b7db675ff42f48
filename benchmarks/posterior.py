"""Samplers of many posteriors side by side: ours, Pyro's NUTS, BlackJAX, NumPyro.

    python benchmarks/posterior.py            7 minutes on 2 cores; writes results/posterior.json
    python benchmarks/posterior.py --scale    ours alone, from 10 to 100,000 data

Needs the extra `bench`. A VAE with two latent dimensions (decoder 2–128–128–64) on the 8×8 digits;
every sampler gets the same weights in single precision, 4 chains, and all cores that the process
may use, one sampler at a time: `taskset -c 0 python …` measures on one core.

The measure is ESS per second, warm-up counted, compilation apart. A datum's ESS is the smallest
over coordinates of those of z and of z² (antithetic chains flatter the first alone), of plain
split chains; it is summed over data. Sizes are interleaved; the median of 3 repeats is kept.

What bounds ours at 1,000 data: 5,410 densities and 1,120 gradients a datum, 2.1 and 0.4 for each
effective draw, against 3.9 gradients of the fastest peer, whose compiler fuses what we run
eagerly. By count of operations a density is 50 kflop and passes about 5 kB of activations, a
gradient twice and three times that: 0.38 Tflop and 44 GB a run. Of one thread on 300 data half the
time goes to p(x, z), whose matrix products are 28 % of the whole, and 27 % went to the scouts of
`posterior/scouts.py`, which became cheaper after the committed run. So it is not arithmetic that
bounds it, but many eager operations around it: a captured and fused graph is the way
past the peer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.log_joint import LogJoint
from pyro_vae.networks import MLP
from pyro_vae.posterior import convergence

SIZES = (1, 100, 1000)
CHAINS = 4
REPEATS = 3
SLOW = 20.0
"""Seconds above which a run is not repeated."""
LENGTHS = (2, 3, 5, 8)
"""Leapfrog steps that the peer's HMC may choose from, on 100 data beforehand."""
LOCKSTEP = {1: (300, 1000), 100: (150, 300), 1000: (60, 60)}
"""Warm-up and draws of vectorised NUTS by data, so that a run takes seconds."""


@dataclass
class Sampled:
    """What one run of a sampler gave, and what it cost."""

    draws: Tensor
    """`(C, T, B, L)`"""
    seconds: float
    """warm-up and sampling"""
    compile_seconds: float
    """once for this number of data"""
    gradients: int
    """evaluations of the gradient of log p(x, z), over all data and chains, warm-up included"""
    densities: int
    """evaluations of log p(x, z) without its gradient"""


@dataclass
class Row:
    """A line of the table: a sampler at one number of data."""

    sampler: str
    data: int
    ess_per_second: float
    ess_per_second_with_compilation: float
    ess_median: float
    ess_low: float
    unconverged: float
    gradients_per_ess: float
    densities_per_ess: float
    seconds: float
    compile_seconds: float
    peak_mib: float
    draws: int


Sampler = Callable[[Tensor], Sampled]


def ours(model: Any, guide: Any, x: Tensor, draws: int = 1000) -> Sampled:
    """`pv.posterior.hmc`: the one place here that knows how it is called."""
    start = time.perf_counter()
    found = pv.posterior.hmc(model, (x,), guide=guide, chains=CHAINS, draws=draws, progress=False)
    seconds = time.perf_counter() - start
    gradients, densities = (int(found.figures[k].sum()) for k in ("gradients", "densities"))
    return Sampled(found["z"], seconds, 0.0, gradients, densities)


def pyro_nuts(model: Any, x: Tensor) -> Sampled:
    """Pyro's own NUTS, datum after datum."""
    with counted(model.decoder) as rows:
        start = time.perf_counter()
        draws = pv.posterior.nuts(
            model, (x,), chains=CHAINS, warmup=150, draws=300, progress=False
        )
        seconds = time.perf_counter() - start
    return Sampled(draws["z"], seconds, 0.0, rows["gradients"], rows["densities"])


@contextmanager
def counted(decoder: nn.Module) -> Iterator[dict[str, int]]:
    """Count the latents that a decoder decodes, with and without a gradient."""
    rows = {"gradients": 0, "densities": 0}

    def count(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows["gradients" if output.requires_grad else "densities"] += output[..., 0].numel()

    handle = decoder.register_forward_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


class JaxSampler:
    """A peer's chain, vectorised over data and chains and compiled ahead of its run.

    Args:
        chain: `(key, x, start, warmup, draws)` to draws `(T, L)` and its gradient evaluations.
        schedule: warm-up and draws by number of data.
    """

    def __init__(self, chain: Callable[..., Any], schedule: dict[int, tuple[int, int]]) -> None:
        self.chain, self.schedule = chain, schedule
        self.compiled: dict[int, tuple[Any, float]] = {}
        self.seed = 0

    def __call__(self, x: Tensor) -> Sampled:
        """Sample all data from prior starts; compiled at the first call of each size."""
        import jax

        self.seed += 1
        shape = (len(x), CHAINS)
        chains, starts = jax.random.split(jax.random.key(self.seed))
        keys = jax.random.split(chains, shape)
        arguments = keys, x.numpy(), jax.random.normal(starts, (*shape, 2))
        if len(x) not in self.compiled:
            start = time.perf_counter()
            run = self._vectorised(len(x)).lower(*arguments).compile()
            self.compiled[len(x)] = run, time.perf_counter() - start
        run, compile_seconds = self.compiled[len(x)]
        start = time.perf_counter()
        draws, gradients = jax.block_until_ready(run(*arguments))
        seconds = time.perf_counter() - start
        draws = torch.from_dlpack(draws).permute(1, 2, 0, 3)
        return Sampled(draws, seconds, compile_seconds, int(gradients.sum()), 0)

    def _vectorised(self, size: int) -> Any:
        import jax

        warmup, draws = self.schedule[size]

        def datum(keys: Any, x: Any, starts: Any) -> Any:
            def chain(key: Any, start: Any) -> Any:
                return self.chain(key, x, start, warmup, draws)

            return jax.vmap(chain)(keys, starts)

        return jax.jit(jax.vmap(datum))


def jax_log_joint(decoder: nn.Module) -> Callable[[Any, Any], Any]:
    """The same log p(x, z) in JAX, from the same weights, for one datum."""
    import jax
    import jax.numpy as jnp

    linear = [layer for layer in decoder if isinstance(layer, nn.Linear)]  # type: ignore[attr-defined]
    weights = [
        (jnp.asarray(layer.weight.detach().T.numpy()), jnp.asarray(layer.bias.detach().numpy()))
        for layer in linear
    ]

    def log_joint(z: Any, x: Any) -> Any:
        hidden = z
        for weight, bias in weights[:-1]:
            hidden = jax.nn.silu(hidden @ weight + bias)
        logits = hidden @ weights[-1][0] + weights[-1][1]
        likelihood = (x * logits - jax.nn.softplus(logits)).sum()
        return likelihood - 0.5 * (z @ z) - 0.5 * len(z) * math.log(2 * math.pi)

    return log_joint


def blackjax_chain(log_joint: Any, algorithm: str, **options: Any) -> Callable[..., Any]:
    """A chain of BlackJAX's `hmc` or `nuts` with its window adaptation, dense metric."""
    import blackjax
    import jax

    kind = getattr(blackjax, algorithm)

    def chain(key: Any, x: Any, start: Any, warmup: int, draws: int) -> Any:
        def target(z: Any) -> Any:
            return log_joint(z, x)

        adaptation = blackjax.window_adaptation(
            kind, target, is_mass_matrix_diagonal=False,
            adaptation_info_fn=lambda state, info, tuned: info.num_integration_steps, **options,
        )  # fmt: skip
        first, second = jax.random.split(key)
        (state, tuned), spent = adaptation.run(first, start, warmup)
        kernel = kind(target, **tuned)

        def step(state: Any, key: Any) -> Any:
            state, info = kernel.step(key, state)
            return state, (state.position, info.num_integration_steps)

        _, (z, steps) = jax.lax.scan(step, state, jax.random.split(second, draws))
        return z, spent.sum() + steps.sum()

    return chain


def numpyro_chain(log_joint: Any) -> Callable[..., Any]:
    """A chain of NumPyro's NUTS, by its functional interface so that data are vectorised too."""
    import jax
    from numpyro.infer.hmc import hmc

    def chain(key: Any, x: Any, start: Any, warmup: int, draws: int) -> Any:
        initialise, sample = hmc(lambda z: -log_joint(z, x), algo="NUTS")

        def step(state: Any, _: None) -> Any:
            state = sample(state)
            return state, (state.z, state.num_steps)

        state = initialise(start, warmup, dense_mass=True, rng_key=key)
        _, (z, steps) = jax.lax.scan(step, state, None, length=warmup + draws)
        return z[warmup:], steps.sum()

    return chain


def jax_peers(model: Any, x: Tensor) -> dict[str, Sampler]:
    """The peers, with the leapfrog count that gives HMC most on 100 data."""
    log_joint = jax_log_joint(model.decoder)
    _check_port(log_joint, model, x)
    lengths = {
        length: JaxSampler(
            blackjax_chain(log_joint, "hmc", num_integration_steps=length),
            dict.fromkeys(SIZES, (200, 1000)),
        )
        for length in LENGTHS
    }
    speed = {
        length: measure(f"search, {length} steps", sampler, x[:100]).ess_per_second
        for length, sampler in lengths.items()
    }
    best = max(speed, key=lambda length: speed[length])
    return {
        f"BlackJAX HMC, {best} steps": lengths[best],
        "BlackJAX NUTS": JaxSampler(blackjax_chain(log_joint, "nuts"), LOCKSTEP),
        "NumPyro NUTS": JaxSampler(numpyro_chain(log_joint), LOCKSTEP),
    }


def _check_port(log_joint: Any, model: Any, x: Tensor) -> None:
    """The port is the model: its log joint at a few points is that of the model's trace."""
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    target = LogJoint(model, (x[:1],))(z.unsqueeze(1)).flatten()
    ported = [float(log_joint(point.numpy(), x[0].numpy())) for point in z]
    torch.testing.assert_close(torch.tensor(ported), target.detach(), rtol=1e-4, atol=1e-4)


def measure(name: str, sampler: Sampler, x: Tensor) -> Row:
    """Run a sampler once and say what its draws are worth."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed goes back,
    Path("/proc/self/clear_refs").write_text("5")  # and the peak starts anew
    before = memory("VmRSS")
    sampled = sampler(x)
    peak = memory("VmHWM") - before
    parts = sampled.draws.split(1000, dim=2)
    ess = torch.cat([datum_ess(part) for part in parts])
    rhat = torch.cat([convergence.rhat(part).max(-1).values for part in parts])
    total = ess.sum().item()
    row = Row(
        sampler=name,
        data=len(x),
        ess_per_second=total / sampled.seconds,
        ess_per_second_with_compilation=total / (sampled.seconds + sampled.compile_seconds),
        ess_median=ess.quantile(0.5).item(),
        ess_low=ess.quantile(0.05).item(),
        unconverged=(~(rhat <= 1.01)).double().mean().item(),
        gradients_per_ess=sampled.gradients / total,
        densities_per_ess=sampled.densities / total,
        seconds=sampled.seconds,
        compile_seconds=sampled.compile_seconds,
        peak_mib=peak,
        draws=math.prod(sampled.draws.shape[:2]),
    )
    figures = f"{row.ess_per_second:12,.0f} ESS/s {row.seconds:8.2f} s"
    print(f"{name:28} {len(x):6} data {figures}", flush=True)
    return row


def memory(field: str) -> float:
    """A line of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def datum_ess(draws: Tensor) -> Tensor:
    """The smallest ESS of z and z² over coordinates, `(C, T, B, L)` to `(B,)`; 0 if stuck."""
    chains = draws.double()
    each = [convergence.ess_mean(power) for power in (chains, chains.square())]
    return torch.cat(each, -1).nan_to_num(0.0).min(-1).values


def trained() -> tuple[Any, Any, Tensor]:
    """A VAE fitted to the digits, its guide, and 1,000 rows, those held out first."""
    digits = pv.data.load("digits")
    torch.manual_seed(0)
    guide = pv.guides.NormalGuide(MLP(64, 128, 128, 4))
    model = pv.models.VAE(
        MLP(2, 128, 128, 64),
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(),
    )
    pv.fit(model, guide, digits, epochs=150, lr=2e-3, progress=False)
    rows = torch.cat([digits.test[0], digits.validation[0], digits.train[0]])[: SIZES[-1]]
    return model, guide, rows


def interleaved(samplers: dict[str, Sampler], x: Tensor) -> list[Row]:
    """Every sampler at every size, `REPEATS` times over; the median run of each."""
    runs: dict[tuple[str, int], list[Row]] = {}
    for _ in range(REPEATS):
        for size in SIZES:
            for name, sampler in samplers.items():
                past = runs.setdefault((name, size), [])
                if not past or past[0].seconds < SLOW:
                    past.append(measure(name, sampler, x[:size]))
    return [
        sorted(past, key=lambda row: row.ess_per_second)[len(past) // 2] for past in runs.values()
    ]


def side_by_side() -> None:
    """Measure all samplers, print the table and the ratios, write the JSON."""
    model, guide, x = trained()
    peers = jax_peers(model, x)
    rows = interleaved({"ours": lambda x: ours(model, guide, x)} | peers, x)
    witness = measure("Pyro NUTS", lambda x: pyro_nuts(model, x), x[:2])
    print_table([*rows, witness])
    mine = {row.data: row for row in rows if row.sampler == "ours"}
    best = {
        size: max((row for row in rows if row.data == size and row.sampler != "ours"), key=key)
        for size, key in ((1, _with_compilation), (SIZES[-1], _without))
    }
    single = _with_compilation(mine[1]) / _with_compilation(best[1])
    ratios = {
        "ratio_pyro": _without(mine[SIZES[-1]]) / _without(witness),
        "ratio_best_peer": _without(mine[SIZES[-1]]) / _without(best[SIZES[-1]]),
    }
    write_json([*rows, witness], ratios | {"ratio_best_peer_single_with_compilation": single})
    print(f"one datum, compilation included: ratio_best_peer={single:.2f} ({best[1].sampler})")
    print(" ".join(f"{name}={value:.2f}" for name, value in ratios.items()))


def _with_compilation(row: Row) -> float:
    return row.ess_per_second_with_compilation


def _without(row: Row) -> float:
    return row.ess_per_second


def print_table(rows: list[Row]) -> None:
    """All figures, as a table in Markdown."""
    print("\n| sampler | data | ESS/s | with compilation | ESS median | 5 % | R-hat > 1.01 |"
          " gradients/ESS | densities/ESS | run s | compile s | peak MiB | draws |")  # fmt: skip
    print("|" + "---|" * 13)
    for row in rows:
        print(
            f"| {row.sampler} | {row.data} | {row.ess_per_second:,.0f} "
            f"| {row.ess_per_second_with_compilation:,.0f} | {row.ess_median:,.0f} "
            f"| {row.ess_low:,.0f} | {row.unconverged:.1%} | {row.gradients_per_ess:.2f} "
            f"| {row.densities_per_ess:.2f} | {row.seconds:.2f} | {row.compile_seconds:.1f} "
            f"| {row.peak_mib:,.0f} | {row.draws:,} |"
        )


def write_json(rows: list[Row], ratios: dict[str, float]) -> None:
    """Figures with the versions and the cores they were measured on."""
    import blackjax
    import jax
    import numpyro

    versions = {part.__name__: part.__version__ for part in (torch, jax, blackjax, numpyro)}
    device = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    record = {"versions": versions, "device": device, "chains": CHAINS, "repeats": REPEATS}
    record |= ratios | {"rows": [asdict(row) for row in rows]}
    path = Path(__file__).parent / "results" / "posterior.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


def scale() -> None:
    """Cost against the number of data, draws on disk: rows drawn with replacement.

    Memory is the anonymous part of the process: pages of the files are the system's to drop.
    """
    model, guide, x = trained()
    generator = torch.Generator().manual_seed(0)
    table = []
    print("| data | seconds | ms per datum | memory MiB | on disk MiB |")
    print("|" + "---|" * 5, flush=True)
    for size in (10, 100, 1000, 10_000, 100_000):
        rows = x[torch.randint(len(x), (size,), generator=generator)]
        with tempfile.TemporaryDirectory() as folder, _AnonymousMemory() as memory:
            start = time.perf_counter()
            pv.posterior.hmc(
                model, (rows,), guide=guide, chains=CHAINS, draws=250, folder=folder,
                progress=False,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            disk = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
        table.append([size, seconds, 1e3 * seconds / size, memory.peak, disk])
        print("| {:,} | {:.2f} | {:.2f} | {:,.0f} | {:,.0f} |".format(*table[-1]), flush=True)
    names = ("data", "seconds", "ms_per_datum", "memory_mib", "disk_mib")
    record = [dict(zip(names, row, strict=True)) for row in table]
    path = Path(__file__).parent / "results" / "posterior_scale.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


class _AnonymousMemory(threading.Thread):
    """The highest anonymous memory of this process meanwhile, MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0.0, threading.Event()

    def __enter__(self) -> _AnonymousMemory:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.join()

    def run(self) -> None:
        """Look every tenth of a second."""
        while not self.done.wait(0.1):
            status = Path("/proc/self/status").read_text()
            (kib,) = (line.split()[1] for line in status.splitlines() if "RssAnon" in line)
            self.peak = max(self.peak, int(kib) / 1024)


def main() -> None:
    """Run the comparison, or with `--scale` ours alone on ever more data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", action="store_true", help="cost against the number of data")
    scale() if parser.parse_args().scale else side_by_side()


if __name__ == "__main__":
    main()
