"""The folder of a fit: what it was asked, what it measured, and where it stands."""

from __future__ import annotations

import io
import json
import pickle
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pyro_vae import __version__
from pyro_vae.atomic import replace_file
from pyro_vae.svi.run import Epoch

FORMAT = 1
"""Of the checkpoint; a higher one was written by a newer version."""

UNREADABLE = (RuntimeError, LookupError, TypeError, ValueError, EOFError, pickle.PickleError)
"""What torch may raise over bytes that are no checkpoint."""

State = dict[str, Any]
"""Tensors, numbers and text."""


class RunFolder:
    """`run.json` (settings and versions), `log.jsonl` (a row an epoch), `checkpoint.pt`.

    Each is replaced whole, so that a kill at any moment leaves a folder to go on from. The
    checkpoint holds tensors, numbers and text, and is read as such: no code in it is run.

    Args:
        path: made if missing.
        settings: what makes a fit the same, as JSON values.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))

    def open(self, *, write: bool = True) -> State | None:
        """The state to go on from; `None` for a new run. The settings are noted.

        Args:
            write: whether this process is the one that writes.

        Raises:
            ValueError: the folder holds another fit, or a checkpoint that is damaged, foreign or
                of a newer version.
            OSError: the folder cannot be written to.
        """
        checkpoint = self.path / "checkpoint.pt"
        state = _read(checkpoint) if checkpoint.exists() else None
        if state is not None:
            _compare(self.path, state["settings"], self.settings)
        if write:
            self._note()
        return state

    def _note(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        versions = {
            "pyro_vae": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        about = {"settings": self.settings, "versions": versions}
        replace_file(self.path / "run.json", json.dumps(about, indent=1))

    def save(self, state: State) -> None:
        """Replace the checkpoint.

        Raises:
            OSError: no room, or no right to write; the earlier checkpoint stands.
        """
        content = io.BytesIO()
        torch.save(state | {"format": FORMAT, "settings": self.settings}, content)
        replace_file(self.path / "checkpoint.pt", content.getvalue())

    def log(self, epochs: Sequence[Epoch]) -> None:
        """Replace the log."""
        rows = "".join(json.dumps(asdict(epoch)) + "\n" for epoch in epochs)
        replace_file(self.path / "log.jsonl", rows)


def read_log(path: Path) -> tuple[Epoch, ...]:
    """What the fit in a folder measured so far.

    Raises:
        OSError: there is no log.
        ValueError: a line is no epoch.
    """
    lines = (path / "log.jsonl").read_text().splitlines()
    return tuple(Epoch(**json.loads(line)) for line in lines)


def _read(path: Path) -> State:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zip files that torch did not write
            state = torch.load(path, map_location="cpu", weights_only=True)
        known = isinstance(state, dict) and isinstance(state.get("format"), int)
    except UNREADABLE as error:
        raise ValueError(
            f"{str(path)!r} is no checkpoint of a fit: it is damaged or foreign, and nothing in "
            "it was run\n  try:      remove it to start anew, or restore a copy"
        ) from error
    if not known:
        raise ValueError(
            f"{str(path)!r} holds something else than a fit\n  try:      another folder"
        )
    if state["format"] > FORMAT:
        raise ValueError(
            f"{str(path)!r} was written by a newer pyro_vae (format {state['format']}, this one "
            f"reads {FORMAT})\n  try:      pip install --upgrade pyro-vae"
        )
    return dict(state)


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    other = [name for name in wanted if found.get(name) != wanted[name]]
    if other:
        pairs = "; ".join(
            f"{name}: {found.get(name)} there, {wanted[name]} here" for name in other
        )
        raise ValueError(
            f"folder {str(path)!r} holds another fit\n  expected: the same {', '.join(other)}"
            f"\n  got:      {pairs}\n  try:      another folder, or the same settings"
        )
