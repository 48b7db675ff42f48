"""The recipes of the papers' tables, at a size that says nothing but that they run."""

from __future__ import annotations

import importlib.util
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("PYRO_VAE_DATA" not in os.environ, reason="PYRO_VAE_DATA is not set"),
]


def _recipe(name: str, monkeypatch: pytest.MonkeyPatch, results: Path) -> Any:
    """A recipe as a module, on 60 images, writing elsewhere."""
    spec = importlib.util.spec_from_file_location(name, PAPERS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, recipe)
    spec.loader.exec_module(recipe)
    data = pv.data.load("binarized_mnist")
    few: Any = {n: (getattr(data, n)[0][:60],) for n in ("train", "validation", "test")}
    monkeypatch.setattr("pyro_vae.data.load", lambda name: replace(data, labels={}, **few))
    monkeypatch.setattr(recipe, "RESULTS", results)
    return recipe


def test_small_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe("small_latents", monkeypatch, tmp_path / "r.json")
    monkeypatch.setattr(recipe, "SLOW_ROWS", dict.fromkeys(recipe.SLOW_ROWS, 2))
    monkeypatch.setattr(recipe, "FIT", recipe.FIT | {"compile": False})
    gaps = pv.gaps
    monkeypatch.setattr(pv, "gaps", lambda *pair, **how: gaps(*pair, **how, steps=50))
    recipe.run("vamp", 0, 4, 1, tmp_path / "runs")
    (record,) = json.loads((tmp_path / "r.json").read_text())
    amortized = ["mean-field", "full covariance", "flow"]
    local = ["local", "local, at the peak", "refined"]
    assert [*record["guides"]] == amortized + local
    for found in record["guides"].values():
        assert found["kl"] > -1e-3 and abs(found["iwae_500_below"]) < 0.05
    assert record["quadrature_error"] < 0.01
    recipe.table()
    assert capsys.readouterr().out.count("| vamp | 0 |") == 6
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    recipe.figure(tmp_path / "runs", "vamp", digits=2)
    assert (tmp_path / "docs/small_latents.png").stat().st_size > 10_000


def test_modes_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = _recipe("small_latents", monkeypatch, tmp_path / "r.json")
    line = torch.linspace(-4, 4, 41)
    left, right = (torch.exp(-2 * ((line[:, None] - at) ** 2 + line**2)) for at in (-2.0, 2.0))
    both, faint = left + 0.5 * right, left + 0.01 * right
    ridge = torch.exp(-((line[:, None] - line**2 / 2) ** 2) / 0.1)  # sampled, it has many maxima
    found = [recipe.modes_of(density) for density in (left, both, faint, ridge)]
    assert found == [1, 2, 1, 1]


def test_static_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe("static_mnist", monkeypatch, tmp_path / "r.json")
    monkeypatch.setattr(recipe, "COMPONENTS", 10)
    monkeypatch.setattr(recipe, "DRAWS", 200)
    fit = pv.fit
    monkeypatch.setattr(pv, "fit", lambda *pair, **how: fit(*pair, **how | {"compile": False}))
    runs = ["--runs", str(tmp_path / "runs"), "--warm-up", "1"]
    monkeypatch.setattr(sys, "argv", ["r", "fit", "vamp", "--epochs", "2", *runs])
    recipe.main()
    assert "ran 2 epochs" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["r", "evaluate", "vamp", *runs])
    recipe.main()
    assert "not yet" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["r", "confirm", "vamp", "--few", "3", *runs])
    recipe.main()
    for row in ("vamp, averaged", "vamp, tighter"):
        monkeypatch.setattr(sys, "argv", ["r", "fit", row, "--epochs", "1", *runs])
        recipe.main()
    monkeypatch.setattr(sys, "argv", ["r", "evaluate", "vamp, tighter", *runs])
    recipe.main()
    record, tighter = json.loads((tmp_path / "r.json").read_text())
    assert record["epochs"] == 2 and record["draws"] == 200 and record["few_rows"] == 3
    assert record["elbo"] < record["log_likelihood"] < 0
    assert tighter["epochs"] == len(tighter["curve"]["train"]) == 1
    assert "quoted by pythae" in capsys.readouterr().out
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    recipe.figure()
    assert (tmp_path / "docs/static_mnist.png").stat().st_size > 10_000
