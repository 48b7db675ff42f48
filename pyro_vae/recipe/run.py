"""The run folder of a recipe: made by a fit, opened by everything after it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from pyro_vae import __version__, data, models
from pyro_vae.atomic import replace_file
from pyro_vae.recipe.build import build
from pyro_vae.recipe.files import read_recipe
from pyro_vae.recipe.recipe import Recipe
from pyro_vae.svi import Run as Fitted
from pyro_vae.svi import fit, load_weights, save_weights
from pyro_vae.svi.folder import read_log


class Run(NamedTuple):
    """A run folder, finished."""

    folder: Path
    recipe: Recipe
    data: data.Dataset
    model: models.VAE
    guide: Any
    fitted: Fitted


def carry_out(
    recipe: Recipe, folder: str | Path, *, allow: Sequence[str] = (), progress: bool = True
) -> Run:
    """Fit what a recipe describes into a folder, or go on with it there.

    Args:
        recipe: what to fit.
        folder: gets `config.yaml` to edit and fit again, log and checkpoints of the fit, and, as
            it ends, weights, `history.csv` and `finished.json`.
        allow: modules, by name, that classes may be taken from besides this package.
        progress: show a bar.

    Raises:
        ValueError: a bad recipe, a folder that cannot be written or holds the run of another
            recipe; the folder is then left as it was. Or rows that the model refuses in a later
            batch: what was fitted until then is kept.
    """
    path = writable_folder(folder)
    recipe = replace(recipe, data=recipe.data.absolute())
    _refuse_another(path, recipe)
    rows, model, guide = build(recipe, allow=allow)
    config = path / "config.yaml"
    before = config.read_text() if config.exists() else None
    replace_file(config, _as_yaml(recipe))
    try:
        fitted = fit(
            model, guide, rows, **recipe.fit.options(), seed=recipe.seed, folder=path,
            progress=progress,
        )  # fmt: skip
    except ValueError:
        if before is not None:
            replace_file(config, before)
        elif not (path / "run.json").exists():  # nothing was begun
            config.unlink()
        raise
    save_weights(path, model, guide)
    fitted.history.to_csv(path / "history.csv", float_format="%.6g")
    ending = {
        "epochs": fitted.epochs[-1].epoch,
        "best_epoch": fitted.best_epoch,
        "stopped_early": fitted.stopped_early,
    }
    replace_file(path / "finished.json", json.dumps(ending, indent=1) + "\n")
    return Run(path, recipe, rows, model, guide, fitted)


def open_run(folder: str | Path, *, allow: Sequence[str] = ()) -> Run:
    """Build what a run folder describes, with its weights; no code of the folder's is run.

    Raises:
        ValueError: no run, an unfinished one, one of a newer version, or one that does not fit.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise ValueError(
            f"{str(path)!r} is no run folder: it has no config.yaml"
            "\n  try:      a folder that `pyro-vae fit --out FOLDER` made"
        )
    recipe, fitted = read_recipe(path / "config.yaml"), _finished(path)
    built = build(recipe, allow=allow)
    try:
        load_weights(path, built.model, built.guide)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"the weights in {str(path)!r} are not those of its config.yaml: "
            f"{str(error).splitlines()[0]}\n  try:      undo the change of config.yaml"
        ) from error
    return Run(path, recipe, *built, fitted)


def writable_folder(folder: str | Path) -> Path:
    """Make a folder, or say in one sentence why it cannot be written.

    Raises:
        ValueError: it is a file, or may not be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     writable_folder(Path(parent) / "new").is_dir()
        True
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ValueError(
            f"cannot write into the output folder {str(folder)!r}: {reason}"
            "\n  try:      another folder, --out FOLDER"
        ) from error
    return folder


def _finished(path: Path) -> Fitted:
    """What the fit in a folder measured, if its weights are those that it ended with."""
    try:
        ending = json.loads((path / "finished.json").read_text())
        epochs = read_log(path)
        if ending["epochs"] == epochs[-1].epoch:
            return Fitted(epochs, ending["best_epoch"], ending["stopped_early"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"the record of the run in {str(path)!r} is damaged: {error}") from error
    raise ValueError(
        f"the run in {str(path)!r} is not finished: it has no weights of its last epoch"
        f"\n  try:      pyro-vae fit --config {path / 'config.yaml'} --out {path}: it goes on"
    )


def _as_yaml(recipe: Recipe) -> str:
    import yaml

    plain = json.loads(json.dumps(asdict(recipe)))
    return str(yaml.safe_dump({"version": __version__, **plain}, sort_keys=False))


def _refuse_another(folder: Path, recipe: Recipe) -> None:
    """Leave a folder alone that holds the run of another recipe.

    Raises:
        ValueError: it does; what only prolongs or hastens a fit may differ.
    """
    if not (folder / "config.yaml").exists():
        return
    free = ("epochs", "patience", "save_every", "compile")
    there = read_recipe(folder / "config.yaml")
    found, wanted = (
        {**asdict(r), "fit": {k: v for k, v in asdict(r.fit).items() if k not in free}}
        for r in (replace(there, data=there.data.absolute()), recipe)
    )
    other = [key for key in wanted if found[key] != wanted[key]]
    if other:
        raise ValueError(
            f"folder {str(folder)!r} holds the run of another configuration: {', '.join(other)} "
            f"differ\n  expected: that of {folder / 'config.yaml'}\n  try:      another --out"
        )
