"""The recipes of the papers' tables, at a size that says nothing but that they run."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vae as pv

PAPERS = Path(__file__).parent.parent / "benchmarks/papers"

needs_data = pytest.mark.skipif(
    "PYRO_VAE_DATA" not in os.environ, reason="PYRO_VAE_DATA is not set"
)


def _recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe as a module."""
    monkeypatch.syspath_prepend(PAPERS)
    return importlib.import_module(name)


def _small(
    name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, **sizes: Any
) -> tuple[Any, Path]:
    """A recipe of other sizes on 60 images, and the file that it writes."""
    recipe = _recipe(name, monkeypatch)
    data = pv.data.load("binarized_mnist")
    few: Any = {n: (getattr(data, n)[0][:60],) for n in ("train", "validation", "test")}
    monkeypatch.setattr("pyro_vae.data.load", lambda name: replace(data, labels={}, **few))
    for step in (pv.fit, pv.bounds):
        plain = functools.partial(_uncompiled, step)
        monkeypatch.setattr(pv, step.__name__, plain)
    sizes |= {"ROOT": folder, "RESULTS": folder / "results.json"}
    for size, value in sizes.items():
        monkeypatch.setattr(recipe, size, value)
    (folder / "docs").mkdir()
    return recipe, sizes["RESULTS"]


def _uncompiled(step: Any, *args: Any, **options: Any) -> Any:
    return step(*args, **options | {"compile": False})


@needs_data
@pytest.mark.slow
def test_small_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"local": 2, "samplers": 2, "gaps": 2}
    recipe, results = _small(
        "small_latents", monkeypatch, tmp_path, EPOCHS=1, ROWS=4, CHUNK=3, FEW=few
    )
    gaps = pv.gaps
    monkeypatch.setattr(pv, "gaps", lambda *pair, **how: gaps(*pair, **how, steps=50))
    recipe.run("vamp", 0, tmp_path / "runs")
    (record,) = json.loads(results.read_text())
    amortized = ["mean-field", "full covariance", "flow"]
    local = ["local", "local, at the peak", "refined"]
    assert [*record["guides"]] == amortized + local
    for found in record["guides"].values():
        assert found["kl"] > -1e-3 and abs(found["iwae_500_below"]) < 0.05
    assert record["quadrature_error"] < 0.01
    recipe.table()
    assert capsys.readouterr().out.count("| vamp | 0 |") == 6
    recipe.figure("vamp", 0, tmp_path / "runs", digits=2)
    assert (tmp_path / "docs/small_latents.png").stat().st_size > 10_000

    for forbidden in ("quadrature", "hmc", "annealed"):  # all of it is on disk
        monkeypatch.delattr(pv.posterior, forbidden)
    recipe.run("vamp", 0, tmp_path / "runs")
    assert json.loads(results.read_text()) == [record]
    other, _, _ = recipe.fitted("vamp", 1, pv.data.load(""), tmp_path / "runs/other")
    with pytest.raises(AttributeError, match="quadrature"):  # of another fit nothing is
        recipe.truth(other, torch.zeros(1, 784), recipe.Kept(tmp_path / "runs/vamp-0", other))


def test_seeds_start_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _recipe("small_latents", monkeypatch)
    guide = pv.guides.NormalGuide(pv.networks.MLP(784, 8, 4))
    x = torch.rand(100, 784)
    for prior in ("mixture", "vamp"):
        one, again, other = (recipe.PRIORS[prior](guide, x, seed) for seed in (0, 0, 1))
        start = [next(part.parameters()) for part in (one, again, other)]
        assert torch.equal(start[0], start[1]) and not torch.equal(start[0], start[2])


def test_modes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _recipe("small_latents", monkeypatch)
    line = torch.linspace(-4, 4, 41)
    left, right = (torch.exp(-2 * ((line[:, None] - at) ** 2 + line**2)) for at in (-2.0, 2.0))
    both, faint = left + 0.5 * right, left + 0.01 * right
    ridge = torch.exp(-((line[:, None] - line**2 / 2) ** 2) / 0.1)  # sampled, it has many maxima
    found = [recipe.modes_of(density) for density in (left, both, faint, ridge)]
    assert found == [1, 2, 1, 1]


@needs_data
@pytest.mark.slow
def test_static_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, results = _small(
        "static_mnist", monkeypatch, tmp_path,
        EPOCHS=2, WARM_UP=1, COMPONENTS=10, DRAWS=200, CHUNK=40, FEW=3,
        PATH={"particles": 2, "temperatures": 2},
    )  # fmt: skip

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["r", *words, "--runs", str(tmp_path / "runs")])
        recipe.main()
        return capsys.readouterr().out

    for row in ("standard", "mixture", "flow", "vamp"):
        assert "ran 2 epochs" in call("fit", row)
    with pytest.raises(SystemExit):
        call("confirm", "vamp")
    assert "vamp of seed 0 is to be evaluated first" in capsys.readouterr().err
    call("evaluate", "vamp")
    call("confirm", "vamp")
    assert "quoted by pythae" in call("evaluate", "vamp, tighter")  # which fits it first
    call("confirm", "vamp, tighter")
    record, tighter = json.loads(results.read_text())
    assert record["epochs"] == 2 and record["rows"] == 60 and record["few_rows"] == 3
    assert record["draws"] == 200
    assert record["few_validation_elbo"] == record["validation_elbo"]
    assert record["elbo"] < record["log_likelihood"] < 0
    assert tighter["epochs"] == 5 and len(tighter["curve"]["train"]) == 1
    gain, own = tighter["few_iwae_gain"], tighter["few_iwae"]
    folder = next((tmp_path / "runs/vamp_averaged-0").glob("*/few.pt"))
    before = torch.load(folder)["found"]["iwae"].mean().item()
    assert gain == pytest.approx(own - before, abs=1e-6)
    call("figure")
    assert (tmp_path / "docs/static_mnist.png").stat().st_size > 10_000
