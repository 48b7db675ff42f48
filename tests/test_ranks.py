"""Two processes: equal weights, every row counted once, a dead one named."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vae as pv
from pairs import digits_pair
from pyro_vae.posterior import Draws

WORKER = """
import json, os, signal, sys, warnings
from pathlib import Path
import torch
from lightning_fabric import Fabric
import pyro_vae as pv
from pairs import digits_pair

folder, mode = Path(sys.argv[1]), sys.argv[2]
fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
fabric.launch()
rank = fabric.global_rank
torch.manual_seed(rank)
pair = digits_pair()
digits = pv.data.load("digits")


def die(rows):
    if mode == "die" and rank == 1 and (folder / "run" / "log.jsonl").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return rows


data = pv.data.Dataset("d", digits.train, digits.validation, digits.test, per_batch=die)
try:
    run = pv.fit(*pair, data, epochs=4, lr=3e-3, progress=False, fabric=fabric, clip=5.0,
                 folder=folder / "run", compile=mode == "compile")
except RuntimeError as error:
    (folder / f"error{rank}.txt").write_text(str(error))
    os._exit(3)
parts = pv.sharded(lambda b, r: pv.bounds(*pair, b, draws=200, seed=r), digits.test, fabric)
bounds = type(parts[0]).joined(parts)
chains = pv.sharded(
    lambda b, r: pv.posterior.hmc(pair[0], b, guide=pair[1], draws=50, chains=2, seed=r,
                                  progress=False),
    (digits.test[0][:5],), fabric,
)
result = {
    "weights": [p.double().sum().item() for part in pair for p in part.parameters()],
    "elbo": run.best.validation_elbo, "se": run.best.validation_elbo_se,
    "epochs": len(run.epochs), "losses": [epoch.loss for epoch in run.epochs],
    "bounds": bounds.elbo.tolist(), "hmc": list(type(chains[0]).joined(chains).sites["z"].shape),
}
(folder / f"rank{rank}.json").write_text(json.dumps(result))
pv.save_weights(folder / f"weights{rank}", *pair)
"""

pytest.importorskip("lightning_fabric", reason="needs the extra `distributed`")


def _launch(folder: Path, mode: str) -> subprocess.CompletedProcess[str]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(script), str(folder), mode,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module", params=["eager", "compile"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    done = _launch(folder, request.param)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_hold_equal_weights_and_figures(two: Any) -> None:
    _, (first, second) = two
    assert first == second
    assert first["epochs"] == 4 and first["losses"][-1] < first["losses"][0]


@pytest.mark.slow
def test_every_row_is_counted_once(two: Any) -> None:
    """The figures are those of one process with the same weights, to the noise of the draws."""
    folder, (first, _) = two
    pair = digits_pair()
    pv.load_weights(folder / "weights0", *pair)
    digits = pv.data.load("digits")
    found = pv.bounds(*pair, digits.validation, draws=500)
    assert first["elbo"] == pytest.approx(found.elbo.mean().item(), abs=3 * first["se"] / 8)
    assert first["se"] == pytest.approx((found.elbo.std() / 250**0.5).item(), rel=0.1)
    alone = pv.bounds(*pair, digits.test, draws=500)
    together = torch.tensor(first["bounds"])
    assert together.shape == alone.elbo.shape
    z = (together - alone.elbo) / (alone.elbo_se * 3.5**0.5)  # 200 draws against 500
    assert z.abs().mean() < 1.2 and first["hmc"] == [2, 50, 5, 2]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_PORT": str(port)}
    own |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    own |= {"PYTHONPATH": str(Path(__file__).parent)}
    processes = [  # without torchrun, which ends the other process itself
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(tmp_path), "die"],
            env=os.environ | own | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    assert [process.wait(timeout=200) for process in processes] == [3, -9]
    message = (tmp_path / "error0.txt").read_text()
    assert "process 0 of 2 waits for another that has stopped" in message
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    resumed = _launch(tmp_path, "go on")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    found = json.loads((tmp_path / "rank0.json").read_text())
    assert 1 <= len(log) < found["epochs"] == 4


def test_alone_it_is_the_work_itself() -> None:
    batch = (torch.arange(6.0).reshape(3, 2),)
    ((block, rank),) = pv.sharded(lambda block, rank: (block, rank), batch, None)
    assert torch.equal(block[0], batch[0]) and rank == 0


def test_draws_join_along_data() -> None:
    parts = [Draws({"z": torch.randn(2, 3, n, 1)}, figures={"n": torch.ones(n)}) for n in (2, 3)]
    joined = Draws.joined(parts)
    assert joined.sites["z"].shape == (2, 3, 5, 1) and joined.figures["n"].shape == (5,)
