"""What every test starts from, and leaves as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pyro
import pytest
import torch

import pyro_vae as pv
from pairs import Pair, digits_pair

matplotlib.use("agg")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


@pytest.fixture(autouse=True)
def nothing_global_moves() -> Iterator[None]:
    """Fail a test that leaves the world changed; start each from one seed and an empty store."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    before = _world()
    yield
    assert _world() == before, "global state was changed and left so"
    assert not len(pyro.get_param_store()), "the global parameter store is not empty"


def _world() -> dict[str, object]:
    validation = torch.distributions.Distribution._validate_args
    return {"validation": validation, "dtype": torch.get_default_dtype(), **pyro.settings.get()}


@pytest.fixture
def double() -> Iterator[None]:
    """Compute in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def digits() -> pv.data.Dataset:
    return pv.data.load("digits")


@pytest.fixture(scope="session")
def trained(digits: pv.data.Dataset) -> Pair:
    """A VAE with two latent dimensions, fitted to the digits for a few seconds."""
    torch.manual_seed(0)
    pair = digits_pair()
    pv.fit(*pair, digits, epochs=25, lr=3e-3, progress=False)
    return pair


@pytest.fixture(scope="session")
def real_data() -> Path:
    root = os.environ.get("PYRO_VAE_DATA")
    if root is None:
        pytest.skip("PYRO_VAE_DATA names no folder with real data sets")
    return Path(root)
