"""One optimizer step: ours, hand-written PyTorch, Pyro.

    python benchmarks/step.py            4 minutes on 2 cores; writes results/step.json

Six ways to take the same step, from rows in memory: hand-written eager (ELBO with the closed KL,
fused Adam), the same under `torch.compile`, Pyro's `SVI.step`, `Trace_ELBO()(model, guide)` with
fused Adam, `pv.fit` as it is and with `compile=True`. Nets D–H–L: 64–128–2 and 784–400–400–20,
Gaussian guide, Bernoulli pixels. Turns are interleaved; medians over 9 turns. Ratios are to the
hand-written eager step of the same turn. `replay` is what `compile=True` falls back to without a
compiler: the recorded operations, one by one.

What bounds ours on the large net: its matrix products, 666 Mflop a step, take 4.1 ms at the peak
of these cores (164 Gflop/s at these shapes, `torch.mm` timed alone), and near 5 ms in the step,
where weights and activations come from beyond the second cache; Adam's 28 MB of traffic take 0.4,
the elementwise functions 0.6, gather and call 0.2. Hand-written eager takes 7.0 ms alone and 9 in
this run, where seven models share the caches. Uncompiled, `fit` pays Pyro's handlers, about two
milliseconds a step whatever the net: 1.15 times the hand-written step is out of reach on a small
one.

On a machine with a GPU both run there, with CUDA graphs for ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import pyro_vae as pv
from pyro_vae.svi.fit import ADAM
from pyro_vae.svi.fitting import Fitting, lean
from pyro_vae.svi.rows import Rows
from pyro_vae.svi.steps import RecordedSteps

NETS = {"small": (64, (128,), 2), "large": (784, (400, 400), 20)}
BATCHES = {"small": (128, 16, 1024), "large": (128, 16, 1024)}
TURNS = 9
SECONDS = 0.25
"""Of one contestant's turn."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pair(net: str) -> tuple[Any, Any]:
    """A model and a guide, from one seed."""
    observed, hidden, latent = NETS[net]
    torch.manual_seed(0)
    guide = pv.guides.NormalGuide(pv.networks.MLP(observed, *hidden, 2 * latent)).to(DEVICE)
    decoder = pv.networks.MLP(latent, *hidden[::-1], observed)
    model = pv.models.VAE(
        decoder, prior=pv.priors.StandardNormal(latent), likelihood=pv.likelihoods.Bernoulli()
    ).to(DEVICE)
    return model, guide


def by_hand(model: Any, guide: Any, x: Tensor) -> Tensor:
    """Minus the ELBO per datum, with the closed KL."""
    loc, raw = guide.encoder(x).chunk(2, -1)
    scale = softplus(raw) + 1e-4
    z = loc + scale * torch.randn_like(loc)
    error = binary_cross_entropy_with_logits(model.decoder(z), x, reduction="none").sum(-1)
    kl = 0.5 * (scale.square() + loc.square() - 1 - 2 * scale.log()).sum(-1)
    return (error + kl).mean()


class Contestants:
    """Each takes one step when called."""

    def __init__(self, net: str, size: int) -> None:
        observed = NETS[net][0]
        rows = 64 * size
        self.x = (torch.rand(rows, observed) > 0.5).float().to(DEVICE)
        self.size, self.net, self.rows = size, net, rows
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, Callable[[], Any]] = {
            "hand": self.hand(compiled=False),
            "hand compiled": self.hand(compiled=True),
            "SVI.step": self.svi(),
            "ELBO module": self.module(),
            "ours": self.ours(compiled=False),
            "ours compiled": self.ours(compiled=True),
            "replay": self.replay(),
        }
        for name, call in self.calls.items():
            start = time.perf_counter()
            call()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            for _ in range(5):
                call()

    def batch(self) -> Tensor:
        return self.x[torch.randint(self.rows, (self.size,), device=DEVICE)]

    def hand(self, *, compiled: bool) -> Callable[[], Any]:
        model, guide = pair(self.net)
        adam = ADAM([*model.parameters(), *guide.parameters()], lr=1e-3)
        loss_of = partial(by_hand, model, guide)
        loss_of = torch.compile(loss_of) if compiled else loss_of

        def step() -> None:
            loss = loss_of(self.batch())
            adam.zero_grad()
            loss.backward()
            adam.step()

        return step

    def svi(self) -> Callable[[], Any]:
        svi = SVI(*pair(self.net), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        return lambda: svi.step(self.batch())

    def module(self) -> Callable[[], Any]:
        model, guide = pair(self.net)
        elbo = Trace_ELBO()(model, guide)
        adam = ADAM([*model.parameters(), *guide.parameters()], lr=1e-3)

        def step() -> None:
            loss = elbo(self.batch()) / self.size
            adam.zero_grad()
            loss.backward()
            adam.step()

        return step

    def ours(self, *, compiled: bool) -> Callable[[], Any]:
        fitting = self.fitting()
        start = time.perf_counter()
        if compiled:
            fitting.record()
            self.seconds["ours compiled"] = time.perf_counter() - start
        batches = self.endless(fitting)

        def step() -> None:
            fitting.take_step(*next(batches))

        return step

    def replay(self) -> Callable[[], Any]:
        fitting = self.fitting()
        fitting.record()
        assert isinstance(fitting.steps, RecordedSteps)
        fitting.steps.forget_compiled()
        batches = self.endless(fitting)
        return lambda: fitting.take_step(*next(batches))

    def fitting(self) -> Fitting:
        rows = Rows((self.x,), 0, (0, 1))
        return Fitting(
            *pair(self.net), rows, Trace_ELBO(), batch_size=self.size, lr=1e-3, optimizer=ADAM,
            schedule=None, clip=None, average=None, draws=8, precision="float32", fabric=None,
        )  # fmt: skip

    def endless(self, fitting: Fitting) -> Any:
        epoch = 0
        while True:
            epoch += 1
            yield from fitting.rows.batches(epoch, self.size)


def measure(net: str, size: int) -> dict[str, Any]:
    """Medians in microseconds and ratios to the hand-written eager step."""
    with lean("float32"):
        contestants = Contestants(net, size)
        turns: dict[str, list[float]] = {name: [] for name in contestants.calls}
        for _ in range(TURNS):
            for name, call in contestants.calls.items():
                count, start = 0, time.perf_counter()
                while time.perf_counter() - start < SECONDS:
                    call()
                    count += 1
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                turns[name].append((time.perf_counter() - start) / count)
    hand = turns["hand"]
    ratio = {
        name: statistics.median(a / b for a, b in zip(found, hand, strict=True))
        for name, found in turns.items()
    }
    saved = statistics.median(hand) * (1 - ratio["ours compiled"])
    return {
        "net": net,
        "batch": size,
        "microseconds": {n: 1e6 * statistics.median(found) for n, found in turns.items()},
        "ratio": ratio,
        "compile_seconds": contestants.seconds["ours compiled"],
        "hand_compile_seconds": contestants.seconds["hand compiled"],
        "break_even_steps": contestants.seconds["ours compiled"] / saved if saved > 0 else None,
    }


def compile_once() -> None:
    """Print the seconds that compiling the small net takes in this process."""
    with lean("float32"):
        contestants = object.__new__(Contestants)
        contestants.net, contestants.size, contestants.rows = "small", 128, 128
        contestants.x = torch.zeros(128, 64, device=DEVICE)
        fitting = contestants.fitting()
        start = time.perf_counter()
        fitting.record()
        print(time.perf_counter() - start)


def compile_seconds() -> dict[str, float]:
    """Seconds to compile with an empty cache, and in a second process."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--compile-once"]
        found = [
            float(subprocess.check_output(command, env=environment, text=True).splitlines()[-1])
            for _ in range(2)
        ]
    return {"first_process": found[0], "second_process": found[1]}


def main() -> None:
    """Run all, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile-once", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().compile_once:
        compile_once()
        return
    rows = []
    for net, sizes in BATCHES.items():
        for size in sizes:
            row = measure(net, size)
            rows.append(row)
            ratios = "  ".join(f"{name} {value:.2f}" for name, value in row["ratio"].items())
            even = row["break_even_steps"]
            print(
                f"{net:5} batch {size:4}: hand {row['microseconds']['hand']:6.0f} µs; {ratios}; "
                f"compiled in {row['compile_seconds']:.1f} s"
                + (f", even after {even:,.0f} steps" if even else ", never even"),
                flush=True,
            )
    cache = compile_seconds()
    print(f"compile: {cache['first_process']:.1f} s, again {cache['second_process']:.1f} s")
    small, large = (next(r for r in rows if r["net"] == n and r["batch"] == 128) for n in NETS)
    versus = [r["ratio"]["ours compiled"] / r["ratio"]["hand compiled"] for r in (small, large)]
    last = {
        "small": small["ratio"]["ours compiled"],
        "large": large["ratio"]["ours compiled"],
        "vs_compiled": max(versus),
        "eager": max(r["ratio"]["ours"] for r in (small, large)),
        "replay": max(r["ratio"]["replay"] for r in (small, large)),
    }
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    name = "step.json" if DEVICE.type == "cpu" else f"step_{device.replace(' ', '_')}.json"
    result = {"about": about, "rows": rows, "compile": cache, "last": last}
    (Path(__file__).parent / "results" / name).write_text(json.dumps(result, indent=1))
    print(" ".join(f"{name}={value:.2f}" for name, value in last.items()))


if __name__ == "__main__":
    main()
