"""A fit that is killed goes on to the same weights; a folder in a bad state says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyro_vae as pv
from pairs import Pair, digits_pair
from pyro_vae.svi import objectives
from pyro_vae.svi.fitting import Fitting

OPTIONS: dict[str, Any] = {
    "epochs": 6,
    "progress": False,
    "average": 0.9,
    "clip": 1.0,
    "schedule": pv.svi.cosine(60),
    "save_every": 0.0,
}


def _fit(folder: Path | None, **options: Any) -> tuple[Pair, Any]:
    torch.manual_seed(0)
    pair = digits_pair()
    objective = objectives.Beta(objectives.warm_up(30))
    data = pv.data.load("digits", binarize=pv.data.dynamic(0))
    chosen: dict[str, Any] = OPTIONS | {"objective": objective, "folder": folder} | options
    return pair, pv.fit(*pair, data, **chosen)


def _state(pair: Pair) -> list[torch.Tensor]:
    return [value for part in pair for value in part.state_dict().values()]


def _same(a: Pair, b: Pair) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_state(a), _state(b), strict=True))


class _Stop(BaseException):
    pass


@lru_cache
def _uninterrupted(compiled: bool = False) -> tuple[Pair, Any]:
    return _fit(None, compile=compiled)


@pytest.mark.parametrize(
    ("steps", "compiled"), [(3, False), (11, False), (25, False), (61, False), (25, True)]
)
def test_an_interrupted_fit_goes_on_bit_for_bit(
    steps: int, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after some steps, in the middle of an epoch and at its end (11 steps each)."""
    whole, run = _uninterrupted(compiled)
    take, left = Fitting.take_step, [steps]

    def take_some(self: Fitting, *args: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise _Stop
        return take(self, *args)

    monkeypatch.setattr(Fitting, "take_step", take_some)
    with pytest.raises(_Stop):
        _fit(tmp_path, compile=compiled)
    monkeypatch.setattr(Fitting, "take_step", take)
    resumed, again = _fit(tmp_path, compile=compiled)
    assert _same(whole, resumed)
    columns = run.history.columns.drop("seconds")
    assert run.history[columns].equals(again.history[columns])


KILLED = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from test_resume import _fit

_fit(None, epochs=1)  # what is imported here is not imported in every child
for kill in range(int(sys.argv[2])):
    folder, delays = Path(sys.argv[1]) / str(kill), random.Random(kill)
    for attempt in range(50):
        child = os.fork()
        if child == 0:
            pair, _ = _fit(folder)
            torch.save([v for part in pair for v in part.state_dict().values()], folder / "end.pt")
            os._exit(0)
        time.sleep(delays.uniform(0.02, 0.3 + 0.1 * attempt))  # a busy machine is slow
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            break
        print("killed", kill, flush=True)
    else:
        sys.exit("never finished")
"""


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    """`kill -9` at random moments, writing of checkpoints included, until a run gets through."""
    whole, _ = _uninterrupted()
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), "10"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("killed") >= 20, "too few kills for a test"
    for folder in tmp_path.iterdir():
        ends = torch.load(folder / "end.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(ends, _state(whole), strict=True))
        assert not list(folder.glob("*.tmp"))


def test_more_epochs_prolong_a_fit(tmp_path: Path) -> None:
    whole, _ = _uninterrupted()
    _fit(tmp_path, epochs=4, save_every=60.0)
    resumed, run = _fit(tmp_path, epochs=6, save_every=60.0)
    assert _same(whole, resumed) and len(run.epochs) == 6
    again, finished = _fit(tmp_path, epochs=6, save_every=60.0)
    assert _same(whole, again) and len(finished.epochs) == 6
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(log) == 6 and '"epoch": 6' in log[-1]


def test_a_finished_fit_is_read_and_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, run = _fit(tmp_path)
    monkeypatch.delattr(Fitting, "record")
    written = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    again, known = _fit(tmp_path, compile=True)
    assert _same(first, again) and known == run
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == written


def test_an_explosion_does_not_replace_a_good_checkpoint(tmp_path: Path) -> None:
    """The rate explodes within an epoch; a checkpoint is due after every step."""
    wild = lambda step: 1.0 if step < 15 else 1e30  # noqa: E731
    with pytest.raises(FloatingPointError, match=r"epoch 2, batch \d+"):
        _fit(tmp_path, schedule=wild, clip=None)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(part).all() for part in state["weights"])
    assert 15 <= state["counts"][2] <= 16


def test_the_last_good_state_is_kept_over_a_resumption(tmp_path: Path) -> None:
    """The best epoch and the last measured one differ; an explosion restores the last."""

    def explode(step: int) -> float:
        return 1.0 if step < 66 else 1e30

    ends = []
    for folder, cuts in ((tmp_path / "a", (7,)), (tmp_path / "b", (6, 7))):
        for epochs in cuts:
            torch.manual_seed(0)
            pair = digits_pair()
            data = pv.data.load("digits")
            options: dict[str, Any] = {"schedule": explode, "lr": 0.05, "save_every": 0.0}
            if epochs == 7:
                with pytest.raises(FloatingPointError, match="weights after epoch 6"):
                    pv.fit(*pair, data, epochs=7, folder=folder, progress=False, **options)
            else:
                pv.fit(*pair, data, epochs=6, folder=folder, progress=False, **options)
        ends.append(pair)
    assert _same(*ends)


def test_measurements_leave_the_fit_as_it_is() -> None:
    whole, _ = _uninterrupted()
    rarely, run = _fit(None, measure_every=6)
    assert _same(whole, rarely) and len(run.epochs) == 1


def test_a_fit_is_opened_while_another_process_writes_it(tmp_path: Path) -> None:
    _fit(tmp_path, epochs=1)
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"the other's draft")
    _fit(tmp_path, epochs=1)
    assert (tmp_path / "checkpoint.pt.tmp").exists()


def test_another_fit_is_refused(tmp_path: Path) -> None:
    _fit(tmp_path, epochs=1)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"holds another fit\n  expected: the same clip\n.*2\.0 here"
    ):
        _fit(tmp_path, clip=2.0)
    with pytest.raises(ValueError, match="the same seed"):
        _fit(tmp_path, seed=3)
    with pytest.raises(ValueError, match="the same schedule"):
        _fit(tmp_path, schedule=pv.svi.halving(3))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def _likelihood(likelihood: Any, folder: Path, **options: Any) -> None:
    torch.manual_seed(0)
    model, guide = digits_pair()
    model.likelihood = likelihood
    chosen: dict[str, Any] = {"epochs": 1, "progress": False, "folder": folder} | options
    pv.fit(model, guide, pv.data.load("digits"), **chosen)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pv.likelihoods.Bernoulli(), pv.likelihoods.ContinuousBernoulli()),
        (pv.likelihoods.Normal(0.1), pv.likelihoods.Normal(1.0)),
    ],
)
def test_another_model_of_the_same_shapes_is_refused(
    first: Any, second: Any, tmp_path: Path
) -> None:
    _likelihood(first, tmp_path)
    with pytest.raises(ValueError, match="the same model"):
        _likelihood(second, tmp_path)


def test_another_warm_up_is_refused(tmp_path: Path) -> None:
    _fit(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="the same objective"):
        _fit(tmp_path, objective=objectives.Beta(objectives.warm_up(3000)))


def test_batch_norm_resumes_bit_for_bit_under_compile(tmp_path: Path) -> None:
    def fit(folder: Path | None, epochs: int) -> Pair:
        torch.manual_seed(0)
        model, _ = digits_pair()
        encoder = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
        pair = Pair(model, pv.guides.NormalGuide(encoder))
        data = pv.data.load("digits")
        pv.fit(*pair, data, epochs=epochs, folder=folder, progress=False, compile=True)
        return pair

    fit(tmp_path, 1)
    resumed, whole = fit(tmp_path, 2), fit(None, 2)
    assert _same(resumed, whole)
    assert whole.guide.encoder[1].num_batches_tracked == 22


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil_ran",)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _poison(path: Path) -> None:
    torch.save({"format": 1, "settings": _Evil()}, path)


BROKEN: dict[str, Callable[[Path], Any]] = {
    "truncated": _truncate,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "malicious": _poison,
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_checkpoint_is_refused_and_runs_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _fit(tmp_path / "run", epochs=1)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    BROKEN[kind](checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt' (is no checkpoint|holds something)"):
        _fit(tmp_path / "run")
    assert checkpoint.read_bytes() == before
    assert not (tmp_path / "evil_ran").exists()


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    _fit(tmp_path, epochs=1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"format": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="written by a newer pyro_vae"):
        _fit(tmp_path)


FULL = """
import resource, signal, sys
from pathlib import Path
from test_resume import _fit
folder = Path(sys.argv[1])
_fit(folder, epochs=2)
before = (folder / "checkpoint.pt").read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    _fit(folder, epochs=4)
except OSError as error:
    print(error)
assert (folder / "checkpoint.pt").read_bytes() == before
assert not list(folder.glob("*.tmp"))
"""


def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert "could not be written" in found.stdout and "the file as it was before" in found.stdout


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OSError, match="file"):
        _fit(blocked / "run")


def test_a_signal_leaves_the_best_weights_and_the_checkpoint(tmp_path: Path) -> None:

    def stop(epoch: Any) -> None:
        if epoch.epoch == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path, on_epoch=stop)
    whole, _ = _uninterrupted()
    resumed, _ = _fit(tmp_path)
    assert _same(whole, resumed)
