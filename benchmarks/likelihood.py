"""IWAE-5,000 log-likelihood of MNIST: ours, and the loop over images of the reference code.

    PYRO_VAE_DATA=... python benchmarks/likelihood.py    3 minutes; writes results/likelihood.json

With OMP_NUM_THREADS=1 times are those of the CPU, which other work on the machine disturbs least.

The networks of the VampPrior paper, gated 784-300-300-2·40 and 40-300-300-784, Bernoulli pixels,
after a few seconds of fitting on static binarized MNIST; priors N(0, I) and VampPrior, K = 500.
Every turn measures, one after the other: the machine's matrix product (2,048 square), `pv.bounds`
as it is and with `compile=True`, and the loop. Medians over turns, of ratios within a turn.
Compiling is timed apart: the time of an image is that of a longer call less a shorter one.

The loop does what jmtomczak/vae_vampprior does in `calculate_likelihood`, in today's PyTorch, and
without the autograd graph: for each image S / MB passes, in each of which the image is encoded MB
times, and under a VampPrior the K pseudo-inputs once and the log density of (MB, K, L) numbers
taken by broadcasting. MB = 100, that code's default, and 500.

Floating-point operations are counted by hand, products alone, two to a multiply-add:
  a draw       2 (40·600 + 300·600 + 300·784)         =   878,400 to decode
               2 (2·40·500)                           =    80,000 under a VampPrior (in float64)
  a row        2 (784·600 + 300·600 + 300·80)         = 1,348,800 to encode
so an image of ours is 4.39 or 4.79 Gflop, whatever is computed beside that. The loop needs
11.1 Gflop an image, and S / MB times 0.67 more under a VampPrior: 44.9 at MB = 100, 17.9 at 500.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.checks import refuse

S, K, L, D = 5000, 500, 40, 784
TURNS, LONG, SHORT = 5, 16, 4
"""Turns, and the images of a longer and of a shorter call."""
CHUNKS = {"eager": 2**12, "compiled": 1000}
LOOPS = {"standard": (100, 500), "vamp": (100, 500)}
DECODE, ENCODE, MIX = 878_400, 1_348_800, 80_000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def images() -> tuple[Tensor, Tensor, str]:
    """Training and test rows, and what they are."""
    try:
        data = pv.data.load("binarized_mnist")
    except (ValueError, OSError) as error:
        print(f"random images instead of MNIST: {str(error).splitlines()[0]}")
        x = (torch.rand(5000, D) > 0.8).float()
        return x[:4000].to(DEVICE), x[4000:].to(DEVICE), "random"
    return data.train[0][:10_000].to(DEVICE), data.test[0].to(DEVICE), "static binarized MNIST"


def pair(prior: str, train: Tensor) -> tuple[Any, Any]:
    """Model and guide, from one seed."""
    torch.manual_seed(0)
    guide = pv.guides.NormalGuide(pv.networks.GatedMLP(D, 300, 300, 2 * L)).to(DEVICE)
    over: Any = pv.priors.StandardNormal(L)
    if prior == "vamp":
        over = pv.priors.VampPrior.from_data(guide.posterior, train, K)
    decoder = pv.networks.GatedMLP(L, 300, 300, D)
    model = pv.models.VAE(decoder, prior=over, likelihood=pv.likelihoods.Bernoulli())
    return model.to(DEVICE), guide


class Loop:
    """The reference implementation's: `calculate_likelihood` and what it calls."""

    def __init__(self, model: Any, guide: Any, size: int) -> None:
        self.model, self.guide, self.size = model, guide, size
        self.vamp = isinstance(model.prior, pv.priors.VampPrior)

    def __call__(self, x: Tensor) -> Tensor:
        """Log-likelihood of each row."""
        found = []
        with torch.no_grad():
            for j in range(len(x)):
                rows = x[j].unsqueeze(0).expand(self.size, D)
                a = torch.cat([self.log_weight(rows).cpu() for _ in range(S // self.size)])
                found.append(a.double().logsumexp(0) - math.log(len(a)))
        return torch.stack(found)

    def log_weight(self, x: Tensor) -> Tensor:
        mean, log_var = self.q_z(x)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        probs = self.model.decoder(z).sigmoid().clamp(1e-5, 1 - 1e-5)
        likelihood = (x * torch.log(probs) + (1 - x) * torch.log(1 - probs)).sum(1)
        return likelihood + self.log_p_z(z) - log_normal(z, mean, log_var, 1)

    def log_p_z(self, z: Tensor) -> Tensor:
        if not self.vamp:
            return -0.5 * (z**2 + math.log(2 * math.pi)).sum(1)
        mean, log_var = self.q_z(self.model.prior.pseudo_inputs)
        a = log_normal(z.unsqueeze(1), mean.unsqueeze(0), log_var.unsqueeze(0), 2) - math.log(K)
        highest = a.max(1).values
        return highest + (a - highest.unsqueeze(1)).exp().sum(1).log()

    def q_z(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.guide.encoder(x).chunk(2, -1)
        return mean, 2 * pv.networks.positive(raw).log()

    def flop(self) -> int:
        """Of an image."""
        passes = S // self.size
        return S * (ENCODE + DECODE) + (passes * K * ENCODE if self.vamp else 0)


def log_normal(x: Tensor, mean: Tensor, log_var: Tensor, dim: int) -> Tensor:
    """As the reference has it, with the constant that cancels there."""
    terms = log_var + (x - mean) ** 2 / log_var.exp() + math.log(2 * math.pi)
    return -0.5 * terms.sum(dim)


def seconds(call: Callable[[], Any], clock: Callable[[], float] | None = None) -> float:
    """Of one thread its CPU time, else wall time, the device waited for."""
    alone = DEVICE.type == "cpu" and torch.get_num_threads() == 1
    clock = clock or (time.process_time if alone else time.perf_counter)
    start = clock()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak() -> float:
    """Flop a second of the matrix product."""
    size = 2048 if DEVICE.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=DEVICE)
    out = torch.empty_like(a)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(4))


def measure(prior: str, train: Tensor, test: Tensor) -> dict[str, Any]:
    """Medians over turns, for one prior."""
    model, guide = pair(prior, train)
    pv.fit(model, guide, (train,), epochs=2, batch_size=100, lr=5e-4, progress=False)

    def ours(count: int, way: str) -> Any:
        options = {"compile": way == "compiled", "chunk": CHUNKS[way]}
        return pv.bounds(model, guide, (test[:count],), draws=S, keep=0, **options)

    loops = {f"loop MB={size}": Loop(model, guide, size) for size in LOOPS[prior]}
    compile_seconds = seconds(lambda: ours(1, "compiled"), time.perf_counter)
    same_numbers(ours(SHORT, "compiled"), loops[f"loop MB={LOOPS[prior][0]}"](test[:SHORT]))
    turns: dict[str, list[float]] = {name: [] for name in ("peak", *CHUNKS, *loops)}
    for _ in range(TURNS):
        turns["peak"].append(peak())
        for way in CHUNKS:
            longer, shorter = (seconds(lambda n=n, w=way: ours(n, w)) for n in (LONG, SHORT))  # type: ignore[misc]
            turns[way].append((longer - shorter) / (LONG - SHORT))
        for name, loop in loops.items():
            turns[name].append(seconds(lambda loop=loop: loop(test[:1])))  # type: ignore[misc]
    flop = {way: S * (DECODE + (MIX if prior == "vamp" else 0)) + ENCODE for way in CHUNKS}
    flop |= {name: loop.flop() for name, loop in loops.items()}
    return {
        "prior": prior,
        "peak_gflops": statistics.median(turns["peak"]) / 1e9,
        "first_compile_seconds": compile_seconds,
        "ways": {
            name: {
                "seconds_an_image": statistics.median(turns[name]),
                "images_a_second": 1 / statistics.median(turns[name]),
                "gflop_an_image": flop[name] / 1e9,
                "gflops": flop[name] / statistics.median(turns[name]) / 1e9,
                "share_of_peak": ratio(flop[name] / t / p for t, p in both(turns, name, "peak")),
                "compiled_is_faster": ratio(t / c for t, c in both(turns, name, "compiled")),
            }
            for name in flop
        },
    }


def both(turns: dict[str, list[float]], one: str, other: str) -> Any:
    return zip(turns[one], turns[other], strict=True)


def ratio(found: Any) -> float:
    return float(statistics.median(found))


def same_numbers(ours: Any, loop: Tensor) -> None:
    """Refuse a comparison of different things."""
    error = (ours.iwae - loop).abs()
    if not bool((error < 1 + 5 * ours.iwae_se).all()):
        refuse(
            "bounds and loop disagree", expected=loop.tolist(), got=ours.iwae.tolist(), advice=""
        )


def memory(draws: int) -> None:
    """Print by how many MiB this process grew at most in `bounds` with so many draws."""
    x = (torch.rand(100, D) > 0.8).float()
    model, guide = (part.cpu() for part in pair("vamp", torch.rand(1000, D, device=DEVICE)))
    pv.bounds(model, guide, (x[:1],), draws=50)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    pv.bounds(model, guide, (x[:10],), draws=draws, keep=0)
    print(resident("VmHWM") - before)


def resident(which: str) -> float:
    """MiB of this process, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def main() -> None:
    """Run all, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    draws = parser.parse_args().memory
    if draws:
        memory(draws)
        return
    train, test, what = images()
    rows = []
    for prior in LOOPS:
        row = measure(prior, train, test)
        rows.append(row)
        print(
            f"{prior}: product {row['peak_gflops']:.0f} Gflop/s, first compiled in "
            f"{row['first_compile_seconds']:.1f} s"
        )
        for name, way in row["ways"].items():
            print(
                f"  {name:11} {way['images_a_second']:6.2f} images/s, "
                f"{way['gflop_an_image']:5.2f} Gflop each, {way['gflops']:4.0f} Gflop/s, "
                f"{way['share_of_peak']:.2f} of peak; ours compiled is "
                f"{way['compiled_is_faster']:.1f} times as fast",
                flush=True,
            )
    command = [sys.executable, __file__, "--memory"]
    grown = {
        n: float(subprocess.check_output([*command, str(n)], text=True).splitlines()[-1])
        for n in (500, S)
    }
    print("memory: " + ", ".join(f"{mib:.0f} MiB at S = {n:,}" for n, mib in grown.items()))
    last = {row["prior"]: row["ways"]["compiled"]["share_of_peak"] for row in rows}
    of_loops = [w["compiled_is_faster"] for r in rows for n, w in r["ways"].items() if "MB" in n]
    last["loop_ratio"] = min(of_loops)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    name = f"likelihood_{device.replace(' ', '_')}" if DEVICE.type == "cuda" else "likelihood"
    result = {"about": about | {"data": what}, "rows": rows, "memory_mib": grown, "last": last}
    (Path(__file__).parent / "results" / f"{name}.json").write_text(json.dumps(result, indent=1))
    print(" ".join(f"{name}={value:.2f}" for name, value in last.items()))


if __name__ == "__main__":
    main()
