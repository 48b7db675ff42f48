"""What a person touches: the demo, the command line, the pictures, the notebooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import arviz
import matplotlib.pyplot as plt
import pandas as pd
import pytest

import pyro_vae as pv
from pairs import Pair, digits_pair
from pyro_vae import cli, plots
from pyro_vae.recipe import writable_folder

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_demo_as_a_command(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "pyro_vae.cli", "demo", "--out", str(out), "--epochs", "3"]
    done = subprocess.run(
        [*command, "--digits", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SVI" in done.stderr and "HMC" in done.stderr, "progress bars"
    assert "pooled" in done.stdout and "demo.png" in done.stdout
    table = pd.read_csv(out / "table.csv")
    assert len(table) == 4 and table["rhat"].notna().all()
    assert arviz.from_netcdf(str(out / "mcmc.nc"))["posterior"]["z"].dims[2:] == (
        "datum",
        "latent",
    )
    assert (out / "demo.png").stat().st_size > 50_000
    pair = Pair(
        pv.models.VAE(
            pv.networks.MLP(2, 128, 128, 64),
            prior=pv.priors.StandardNormal(2),
            likelihood=pv.likelihoods.Bernoulli(),
        ),
        pv.guides.NormalGuide(pv.networks.MLP(64, 128, 128, 4)),
    )
    pv.load_weights(out, *pair)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["demo", *arguments])
    return code, capsys.readouterr().err


def test_an_unwritable_folder_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, error = _run(capsys, "--out", str(tmp_path / "file" / "demo"))
    assert code == 1 and "cannot write into the output folder" in error
    assert "Traceback" not in error
    with pytest.raises(ValueError, match="cannot write"):
        cli.main(["demo", "--debug", "--out", str(tmp_path / "file")])
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="Permission denied"):
            writable_folder(tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--epochs", "0"), "epochs must be an integer >= 1; got 0"),
        (("--digits", "0"), "digits must be 1..250"),
        (("--digits", "251"), "digits must be 1..250"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_counts_write_nothing(
    option: tuple[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = _run(capsys, *option, "--out", str(tmp_path / "out"))
    assert code == 1 and message in error
    assert list((tmp_path / "out").glob("*")) == []


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_vae.demo.demo", interrupted)
    code, error = _run(capsys)
    assert code == 130 and "interrupted" in error


def test_pictures_return_their_axes(trained: Pair, digits: Any) -> None:
    figure, axes = plt.subplots(1, 3)
    run = pv.fit(*digits_pair(), digits, epochs=2, progress=False)
    assert plots.history(axes[0], run) is axes[0]
    assert plots.latent_grid(axes[1], trained.model, (8, 8), side=5) is axes[1]
    tiles: Any = axes[1].images[0].get_array()
    assert tiles.shape == (50, 50)
    assert plots.image(axes[2], digits.test[0][0], (8, 8), "data") is axes[2]
    plt.close(figure)
