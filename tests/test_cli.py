"""The command line: from data to a judged guide, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

import pyro_vae as pv
from pyro_vae import cli, recipe
from pyro_vae.recipe import Part, Recipe

QUICK = ["--fit.epochs", "2", "--hidden", "[16]", "--quiet"]


def _run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(word) for word in arguments])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert cli.main(["fit", "--out", str(folder), *QUICK]) == 0
    return folder


def test_a_run_folder_holds_what_repeats_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml", "run.json", "log.jsonl", "history.csv", "checkpoint.pt",
        "model.safetensors", "guide.safetensors",
    }  # fmt: skip
    config = finished / "config.yaml"
    code, _, _ = _run(
        capsys, "fit", "--config", str(config), "--out", str(tmp_path / "b"), "--quiet"
    )
    assert code == 0
    a, b = (recipe.open_run(folder) for folder in (finished, tmp_path / "b"))
    for part, other in ((a.model, b.model), (a.guide, b.guide)):
        state = other.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())


def test_options_override_a_configuration(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "mine.toml"
    toml.write_text('hidden = [8]\nprior = "DiagonalNormal"\n[fit]\nepochs = 9\n')
    code, _, errors = _run(
        capsys, "fit", "--config", str(toml), "--out", str(tmp_path / "c"), "--fit.epochs", "1",
        "--quiet",
    )  # fmt: skip
    assert code == 0, errors
    found = recipe.read_recipe(tmp_path / "c" / "config.yaml")
    assert found.hidden == (8,) and found.fit.epochs == 1 and found.prior == Part("DiagonalNormal")


def test_evaluate_gives_what_bounds_gives(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _run(capsys, "evaluate", str(finished), "--rows", "20", "--draws", "50")
    assert code == 0 and "log p(x), IWAE" in out
    run = recipe.open_run(finished)
    found = pv.bounds(run.model, run.guide, (run.data.test[0][:20],), draws=50, seed=0)
    written = json.loads((finished / "evaluation.json").read_text())
    assert written["log_likelihood"] == pytest.approx(found.iwae.mean().item(), abs=1e-4)
    assert len(pd.read_csv(finished / "evaluation.csv")) == 20


@pytest.mark.slow
def test_compare_and_sample(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "compare", str(finished), "--rows", "3", "--quiet")
    assert code == 0 and "MCMC" in out
    assert len(pd.read_csv(finished / "verdict" / "table.csv")) == 3
    assert (finished / "verdict" / "posteriors.png").stat().st_size > 10_000
    assert _run(capsys, "sample", str(finished), "--count", "10")[0] == 0
    drawn = np.load(finished / "samples.npy")
    assert drawn.shape == (10, 64) and set(np.unique(drawn)) <= {0, 1}


def test_a_folder_of_images_and_a_file(
    tmp_path: Path, digits: pv.data.Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a command of its own: real digits as PNGs, and as an `.npz`."""
    x = digits.train[0][:60].reshape(-1, 8, 8).numpy()
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(x):
        Image.fromarray((255 * image).astype(np.uint8)).save(images / f"{number:03}.png")
    np.savez(tmp_path / "x.npz", x=x.reshape(60, -1))
    for number, source in enumerate((images, tmp_path / "x.npz")):
        command = [
            sys.executable, "-m", "pyro_vae.cli", "fit", "--out", str(tmp_path / f"run{number}"),
            "--data.name", str(source), "--data.binarize", "threshold", *QUICK,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "validation ELBO" in done.stdout


@pytest.mark.parametrize(
    "part",
    [
        {"prior": Part("GaussianMixture", {"components": 4})},
        {"prior": Part("VampPrior", {"components": 4})},
        {"prior": Part("FlowPrior")},
        {"guide": Part("FlowGuide", {"hidden": [8]})},
        {"guide": Part("MultivariateNormalGuide")},
        {"likelihood": Part("ContinuousBernoulli")},
        {"likelihood": Part("Categorical", {"levels": 2})},
        {"network": "GatedMLP"},
    ],
    ids=str,
)
def test_parts_by_name(part: dict[str, Any]) -> None:
    built = recipe.build(Recipe(hidden=(8,), **part))
    pv.check_pair(built.model, built.guide, (built.data.test[0][:5],))


def test_a_class_of_ones_own_is_imported_if_allowed_and_never_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_parts.py").write_text(
        "from pathlib import Path\nfrom pyro_vae.priors import DiagonalNormal\n"
        "Path('it_ran').touch()\nclass Mine(DiagonalNormal):\n    '''A prior.'''\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    named = ["fit", "--out", "run", "--prior.name", "my_parts:Mine", *QUICK]
    code, _, errors = _run(capsys, *named)
    assert code == 1 and "is of a module that is not allowed" in errors
    assert not Path("it_ran").exists()
    assert _run(capsys, *named, "--allow", "[my_parts]")[0] == 0 and Path("it_ran").exists()
    code, _, errors = _run(capsys, "evaluate", "run")
    assert code == 1 and "--allow my_parts" in errors
    assert _run(capsys, "evaluate", "run", "--allow", "[my_parts]", "--rows", "5")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fit", "--fit.epocs", "3"], 2, "--fit.epochs"),
        (["fti"], 2, "fit"),
        ([], 2, "pyro-vae --help"),
        (["fit", "--fit.epochs", "many"], 2, "many"),
        (["fit", "--prior.name", "VampPrio"], 1, "'VampPrior'?"),
        (["fit", "--data.name", "mnits"], 1, "unknown data set"),
        (["fit", "--prior.options.wide", "3"], 1, "unknown option of StandardNormal 'wide'"),
        (["fit", "--config", "absent.yaml"], 1, "absent.yaml' cannot be read: No such file"),
        (["evaluate", "nowhere"], 1, "is no run folder"),
        (["fit", "--fit.epochs", "0"], 1, "epochs must be an integer >= 1"),
    ],
)
def test_errors_are_one_sentence_and_the_nearest(
    arguments: list[str], code: int, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found, _, errors = _run(capsys, *arguments)
    assert found == code and message in errors and "Traceback" not in errors
    assert errors.startswith("pyro-vae: ")


def test_bad_configurations_and_folders(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = yaml.safe_load((finished / "config.yaml").read_text())
    bad = tmp_path / "config.yaml"
    for change, message in (
        ({"latnet": 3}, "unknown key 'latnet'\n  try:      'latent'?"),
        ({"fit": {"epoch": 3}}, "unknown key 'epoch'\n  try:      'epochs'?"),
        ({"version": "99.0"}, "is of pyro_vae 99.0"),
    ):
        bad.write_text(yaml.safe_dump(plain | change))
        code, _, errors = _run(capsys, "fit", "--config", str(bad), "--out", str(tmp_path / "x"))
        assert code == 1 and message in errors, errors
    bad.write_text("!!python/object/apply:os.system ['touch evil']")
    assert _run(capsys, "fit", "--config", str(bad))[0] == 1 and not Path("evil").exists()
    bad.write_text(yaml.safe_dump(plain))
    code, _, errors = _run(capsys, "evaluate", str(tmp_path))
    assert code == 1 and "is not finished" in errors
    for name in ("model.safetensors", "guide.safetensors", "finished.json", "log.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    bad.write_text(yaml.safe_dump(plain | {"hidden": [4]}))
    code, _, errors = _run(capsys, "evaluate", str(tmp_path))
    assert code == 1 and "are not those of its config.yaml" in errors
    bad.write_text(yaml.safe_dump(plain))
    (tmp_path / "model.safetensors").write_bytes(b"half of it")
    code, _, errors = _run(capsys, "evaluate", str(tmp_path))
    assert code == 1 and "model.safetensors is damaged" in errors


def test_a_relative_path_to_data_is_the_same_rows_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.eye(12, dtype=np.float32)[np.arange(60) % 12])
    Path("digits").write_text("no data set")  # a file of a set's name is no rows
    recipe = {"data": {"name": "rows.npy"}, "hidden": [4], "fit": {"epochs": 1}}
    Path("first.yaml").write_text(yaml.safe_dump(recipe))
    for out in ("a", "a"):
        assert _run(capsys, "fit", "--config", "first.yaml", "--out", out)[0] == 0
    (tmp_path / "a/config.yaml").write_text(yaml.safe_dump(recipe))
    assert _run(capsys, "fit", "--config", "a/config.yaml", "--out", "a")[0] == 0
    assert _run(capsys, "fit", "--out", "b", *QUICK)[0] == 0


def test_rows_that_fail_later_leave_a_folder_that_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last batch of one row, which this network refuses."""
    (tmp_path / "my_net.py").write_text(
        "from pyro_vae.networks import MLP\nclass Picky(MLP):\n    def forward(self, x):\n"
        "        if x.shape[-2] == 1: raise ValueError('one row')\n        return super().forward(x)"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    np.save(tmp_path / "rows.npy", np.zeros((60, 4), dtype=np.float32))
    source = recipe.Source(str(tmp_path / "rows.npy"))
    settings = recipe.Settings(epochs=1, batch_size=len(recipe.load_rows(source).train[0]) - 1)
    chosen = Recipe(source, network="my_net:Picky", fit=settings)
    with pytest.raises(ValueError, match="one row"):
        recipe.carry_out(chosen, tmp_path / "run", allow=["my_net"], progress=False)
    assert (tmp_path / "run/run.json").exists() and (tmp_path / "run/config.yaml").exists()


def test_a_refused_fit_leaves_a_run_as_it_is(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "config.yaml").read_text()
    for change in (["--likelihood.name", "ContinuousBernoulli"], ["--fit.warm_up", "5"]):
        code, _, errors = _run(capsys, "fit", "--out", str(finished), *QUICK, *change)
        assert code == 1 and "another configuration" in errors
    assert (finished / "config.yaml").read_text() == before


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder"):
        cli.main(["evaluate", str(tmp_path), "--debug"])


@pytest.mark.slow
def test_ctrl_c_keeps_the_checkpoint_and_the_same_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pyro_vae.cli", "fit", "--out", str(out), "--hidden", "[16]"]
    command += ["--fit.save_every", "0.5", "--quiet"]
    endless = subprocess.Popen(
        [*command, "--fit.epochs", "100000"], stderr=subprocess.PIPE, text=True
    )
    kept = [out / "log.jsonl", out / "checkpoint.pt"]
    late = time.monotonic() + 300  # a busy machine takes a minute to import and compile
    while time.monotonic() < late and not all(path.exists() for path in kept):
        time.sleep(0.1)
    endless.send_signal(signal.SIGINT)
    _, errors = endless.communicate(timeout=60)
    assert endless.returncode == 130
    assert f"interrupted; kept in {out}: checkpoint.pt, config.yaml, log.jsonl" in errors
    with pytest.raises(ValueError, match="not finished"):
        recipe.open_run(out)
    done = len((out / "log.jsonl").read_text().splitlines())
    again = subprocess.run(
        [*command, "--fit.epochs", str(done + 1)], capture_output=True, text=True, env=os.environ
    )
    assert again.returncode == 0, again.stderr
    assert len((out / "log.jsonl").read_text().splitlines()) >= done


@pytest.mark.parametrize(
    ("command", "where"),
    [("evaluate", "verdict.bounds"), ("compare", "verdict.compare"), ("report", "report.page")],
)
def test_ctrl_c_in_any_command_names_what_is_kept(
    command: str, where: str, finished: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"pyro_vae.{where}", interrupted)
    code, _, error = _run(capsys, command, str(finished))
    assert code == 130 and f"kept in {finished}: checkpoint.pt, config.yaml" in error


def test_a_report_beside_a_run_that_may_not_be_written(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    before = {path.name for path in finished.iterdir()}
    code, said, _ = _run(capsys, "report", finished, "--rows", "2", "--quiet", "--out", out)
    assert code == 0 and "The guide can" in said
    assert {path.name for path in out.iterdir()} == {"report.html", "verdict"}
    assert {path.name for path in finished.iterdir()} == before
    page = (out / "report.html").read_text()
    assert "hidden 16, L = 2" in page and "epochs 2, batch_size 128" in page

    def refused(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    for command in ("evaluate", "compare", "sample", "report"):
        code, _, error = _run(capsys, command, finished)
        assert code == 1 and "Permission denied\n  try:      another folder, --out" in error


def test_a_plain_terminal_without_display(finished: Path, tmp_path: Path) -> None:
    """ASCII alone, no colour, no display, and a plotting backend that wants one."""
    plain = {"PYTHONIOENCODING": "ascii", "TERM": "dumb", "MPLBACKEND": "tkagg"}
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | plain
    done = subprocess.run(
        [sys.executable, "-m", "pyro_vae.cli", "compare", str(finished), "--rows", "1",
         "--out", str(tmp_path)], capture_output=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).isascii() and b"\x1b[" not in done.stdout
    assert (tmp_path / "verdict" / "posteriors.png").stat().st_size > 10_000


def test_the_help_names_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for home in (pv.priors, pv.likelihoods, pv.guides):
        assert set(recipe.parts_of(home)) <= set(told.replace(",", " ").replace(".", " ").split())


def test_a_prolonged_fit_that_is_killed_is_no_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log moves on while the weights stay behind."""
    out = tmp_path / "run"
    longer = ["fit", "--out", str(out), *QUICK, "--fit.epochs", "4"]
    assert _run(capsys, "fit", "--out", out, *QUICK)[0] == 0

    def killed(*given: Any, **options: Any) -> None:
        pv.fit(*given, **options | {"epochs": 3})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pyro_vae.recipe.run.fit", killed)
        assert _run(capsys, *longer)[0] == 130
    code, _, error = _run(capsys, "evaluate", out)
    assert code == 1 and "is not finished" in error
    assert _run(capsys, *longer)[0] == 0
    run = recipe.open_run(out)
    again = pv.bounds(run.model, run.guide, run.data.validation, draws=200).elbo
    assert again.mean().item() == pytest.approx(run.fitted.best.validation_elbo, abs=0.3)
    assert len(run.fitted.epochs) == 4 and not run.fitted.stopped_early


def test_what_a_fit_refuses_leaves_a_finished_run_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert _run(capsys, "fit", "--out", out, *QUICK)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, error = _run(capsys, "fit", "--out", out, *QUICK, "--fit.epochs", "0")
    assert code == 1 and "epochs must be" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert _run(capsys, "evaluate", out, "--draws", "30")[0] == 0
    assert _run(capsys, "fit", "--out", tmp_path / "new", *QUICK, "--fit.epochs", "0")[0] == 1
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden", 5, "tuple"), ("latent", "two", "int"), ("seed", "x", "int"),
        ("network", None, "str"), ("prior", {"name": 3}, "str"), ("prior", {"options": {}}, "name"),
        ("fit", {"epochs": "many"}, "int"), ("data", {"name": 5}, "str"), ("fit", [1], "keys"),
        ("guide", {"name": "NormalGuide", "options": 3}, "dict"),
        ("prior", {"name": "VampPrior", "options": {"components": "abc"}}, "1 or more"),
        ("prior", ":X", "unknown prior"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_one_sentence(
    key: str, value: Any, expected: str, finished: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = yaml.safe_load((finished / "config.yaml").read_text()) | {key: value}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    code, _, error = _run(capsys, "fit", "--config", path, "--out", tmp_path / "out")
    assert code == 1 and expected in error and "Error" not in error
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_an_abbreviated_option_is_no_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = _run(capsys, "fit", "--conf", "absent.yaml", "--out", tmp_path / "out")
    assert code == 2 and "--config" in error


@pytest.mark.parametrize("home", [pv.priors, pv.likelihoods, pv.guides, pv.networks])
def test_every_part_that_is_named_can_be_built(home: Any) -> None:
    options: dict[str, dict[str, Any]] = {
        "GaussianMixture": {"components": 3}, "VampPrior": {"components": 3},
        "Normal": {"scale": 1.0}, "Categorical": {"levels": 2},
    }  # fmt: skip
    kind = home.__name__.rpartition(".")[2].removesuffix("s")
    for name in recipe.parts_of(home):
        part: Any = name if home is pv.networks else Part(name, options.get(name, {}))
        built = recipe.build(Recipe(**{kind: part}))
        assert built.model(None, size=3).shape == (3, 64)
