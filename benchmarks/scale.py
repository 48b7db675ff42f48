"""Seconds of an epoch and memory against N, in memory and on disk; one process against two.

    uv pip install --requirements requirements.lock           has lightning-fabric
    PYRO_VAE_DATA=... python benchmarks/scale.py                3 minutes on 2 cores

- `memory`: copies of the digits, `(N, 64)` float32, net 64–32–2.
- `mapped`: 100,000 rows of binarised MNIST in a file of bytes, net 784–100–10, gathered from
  the file and, for comparison, from memory.
- `processes`: 12,800 rows of 784, net 784–400–50, batch 256, as one process of one thread, one
  of two threads, and two of one thread that share each batch (gloo, under `torchrun`).

All by `pv.fit(..., compile=True)` with a validation of 128 rows; seconds are medians over the
epochs after the first. Memory is the anonymous part of a process at its highest, above what it
was before there were data; pages of files are the system's to drop. Each row of the table has
a process of its own, of one thread where none is said. Writes results/scale.json.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from posterior import _AnonymousMemory
from torch import Tensor

import pyro_vae as pv

SIZES = (1_000, 10_000, 100_000, 1_000_000)
MAPPED_ROWS = 100_000
EPOCHS = 4
FEW = 128


def fitted(
    data: pv.data.Dataset, hidden: int, latent: int, batch_size: int, fabric: Any = None
) -> tuple[float, list[Tensor]]:
    """Seconds of an epoch, and the weights at the end."""
    torch.manual_seed(0)
    guide = pv.guides.NormalGuide(pv.networks.MLP(data.observed, hidden, 2 * latent))
    decoder = pv.networks.MLP(latent, hidden, data.observed)
    model = pv.models.VAE(
        decoder, prior=pv.priors.StandardNormal(latent), likelihood=pv.likelihoods.Bernoulli()
    )
    run = pv.fit(
        model, guide, data, epochs=EPOCHS, batch_size=batch_size, draws=1, compile=True,
        progress=False, fabric=fabric,
    )  # fmt: skip
    ends = [epoch.seconds for epoch in run.epochs]
    seconds = statistics.median(end - start for start, end in pairwise(ends))
    return seconds, [*model.parameters(), *guide.parameters()]


def dataset(x: Tensor) -> pv.data.Dataset:
    return pv.data.Dataset("copies", (x,), (x[:FEW],), (x[:FEW],))


def in_memory(rows: int) -> dict[str, Any]:
    """An epoch of so many digits."""
    digits = pv.data.load("digits").train[0]
    with _AnonymousMemory() as before:
        before.done.wait(0.3)
    with _AnonymousMemory() as memory:
        x = digits.repeat(-(-rows // len(digits)), 1)[:rows]
        seconds, _ = fitted(dataset(x), 32, 2, 128)
    return {
        "rows": rows,
        "seconds": seconds,
        "microseconds_per_row": 1e6 * seconds / rows,
        "data_mib": x.nbytes / 2**20,
        "peak_mib": memory.peak - before.peak,
    }


def from_disk(path: str, *, mapped: bool) -> dict[str, Any]:
    """An epoch of the rows of a file."""
    with _AnonymousMemory() as before:
        before.done.wait(0.3)
    with _AnonymousMemory() as memory:
        data = pv.data.from_file(path, held_out=FEW, white=1, memory_map=mapped)
        seconds, _ = fitted(data, 100, 10, 128)
    return {
        "rows": len(data.train[0]),
        "mapped": mapped,
        "seconds": seconds,
        "data_mib": data.train[0].nbytes / 2**20,
        "peak_mib": memory.peak - before.peak,
    }


def shared() -> dict[str, Any]:
    """An epoch of MNIST's size of rows, by as many processes as `torchrun` has started."""
    count, fabric = int(os.environ.get("WORLD_SIZE", "1")), None
    if count > 1:
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=count, strategy="ddp")
        fabric.launch()
    torch.manual_seed(1)
    x = (torch.rand(12_800, 784) > 0.5).float()
    seconds, parameters = fitted(dataset(x), 400, 50, 256, fabric)
    sums = [sum(p.double().sum().item() for p in parameters)]
    if fabric is not None:
        mine, sums = sums[0], [0.0] * count
        torch.distributed.all_gather_object(sums, mine)
    return {
        "processes": count,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "equal_weights": len(set(sums)) == 1,
    }


def in_a_process(*arguments: object, threads: int, processes: int = 1) -> Any:
    """What a worker of this script prints, as rank 0."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--worker"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "found.json"
        subprocess.run([*command, str(written), *map(str, arguments)], env=environment, check=True)
        return json.loads(written.read_text())


def work(path: str, part: str, *arguments: str) -> None:
    """One part, in a process of its own."""
    if part == "memory":
        found = in_memory(int(arguments[0]))
    elif part == "processes":
        found = shared()
    else:
        found = from_disk(arguments[0], mapped=part == "mapped")
    if os.environ.get("RANK", "0") == "0":
        Path(path).write_text(json.dumps(found))


def against_rows() -> list[dict[str, Any]]:
    found = []
    for rows in SIZES:
        found.append(in_a_process("memory", rows, threads=1))
        print("memory   {rows:9,} rows {seconds:8.3f} s {microseconds_per_row:6.2f} µs a row"
              "  {data_mib:6.1f} MiB of data, peak {peak_mib:7.1f} MiB".format(**found[-1]),
              flush=True)  # fmt: skip
    return found


def on_disk() -> list[dict[str, Any]]:
    mnist = pv.data.load("mnist").train[0].byte()
    rows = mnist.repeat(-(-MAPPED_ROWS // len(mnist)), 1)[:MAPPED_ROWS]
    rows = rows[torch.randperm(MAPPED_ROWS)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.npy"
        np.save(path, rows.numpy())
        for part in ("mapped", "read"):
            found.append(in_a_process(part, path, threads=1))
            print("{0:8} {rows:9,} rows {seconds:8.3f} s {1:16}  {data_mib:6.1f} MiB of data,"
                  " peak {peak_mib:7.1f} MiB".format(part, "", **found[-1]),
                  flush=True)  # fmt: skip
    return found


def processes() -> list[dict[str, Any]]:
    found = []
    for count, threads in ((1, 1), (1, 2), (2, 1)):
        found.append(in_a_process("processes", threads=threads, processes=count))
        print("{processes} process(es) of {threads} thread(s): {seconds:.3f} s,"
              " equal weights: {equal_weights}".format(**found[-1]), flush=True)  # fmt: skip
    return found


def main() -> None:
    """Run all, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    worker = parser.parse_args().worker
    if worker:
        work(*worker)
        return
    memory, disk, ranks = against_rows(), on_disk(), processes()
    few, many = memory[0], memory[-1]
    growth = many["peak_mib"] - few["peak_mib"]
    last = {
        "time_per_row": many["microseconds_per_row"] / memory[1]["microseconds_per_row"],
        "memory_per_byte": growth / (many["data_mib"] - few["data_mib"]),
        "mapped": disk[0]["seconds"] / disk[1]["seconds"],
        "two_processes": ranks[0]["seconds"] / ranks[2]["seconds"],
        "two_threads": ranks[0]["seconds"] / ranks[1]["seconds"],
    }
    about = {"device": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    result = {"about": about, "memory": memory, "disk": disk, "processes": ranks, "last": last}
    path = Path(__file__).parent / "results" / "scale.json"
    path.write_text(json.dumps(result, indent=1))
    print(" ".join(f"{name}={value:.2f}" for name, value in last.items()))


if __name__ == "__main__":
    main()
