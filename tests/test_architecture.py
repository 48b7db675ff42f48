"""The house stands: arrows point down, imports are light, the README's example runs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"pair", "capture", "atomic", "tables"},
    {"log_joint", "ranks"},
    {"checks", "networks", "flows"},
    {"likelihoods", "priors", "data"},
    {"models", "guides", "svi", "posterior"},
    {"plots"},
    {"verdict"},
    {"report"},
    {"recipe"},
    {"demo"},
    {"cli"},
]
"""From the ground up. Rooms on one floor do not import each other."""
SOURCES = sorted((ROOT / "pyro_vae").rglob("*.py"))


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    """All modules of the package that a file names, lazily or not, types included."""
    module, found = _module(path), set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            target = ".".join(part for part in (base, node.module) if part)
            found |= {f"{target}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("pyro_vae.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path: Path) -> None:
    room = _room(_module(path))
    if room == "pyro_vae":  # the public face re-exports every room
        return
    below = set().union(*FLOORS[: next(i for i, floor in enumerate(FLOORS) if room in floor)])
    reached = {_room(name) for name in _imports(path)} - {room, "__version__"}
    assert reached <= below, f"{path.name} imports {reached - below} from its own floor or above"


def test_every_room_has_a_floor() -> None:
    rooms = {_room(_module(path)) for path in SOURCES} - {"pyro_vae"}
    assert rooms == set().union(*FLOORS)


def test_no_circle_within_a_room() -> None:
    graph = {_module(path): _imports(path) for path in SOURCES if path.name != "__init__.py"}
    edges = {
        name: {other for other in graph for t in targets if f"{t}.".startswith(f"{other}.")}
        for name, targets in graph.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in edges[name] - {name}:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_faces_know_models_and_guides() -> None:
    faces = {"cli", "demo", "recipe", "models", "guides", "pyro_vae"}
    for path in SOURCES:
        if _room(_module(path)) not in faces:
            assert not {_room(name) for name in _imports(path)} & {"models", "guides"}, path.name


IMPORT = """
import json, sys, time
import torch, pyro
state = (torch.distributions.Distribution._validate_args, torch.get_default_dtype(),
         torch.get_rng_state().sum().item(), sorted(pyro.settings.get().items(), key=str))
start = time.perf_counter()
import pyro_vae as pv
cost = time.perf_counter() - start
pv.fit, pv.models, pv.guides, pv.priors, pv.likelihoods, pv.networks, pv.data, pv.posterior
pv.compare
after = (torch.distributions.Distribution._validate_args, torch.get_default_dtype(),
         torch.get_rng_state().sum().item(), sorted(pyro.settings.get().items(), key=str))
heavy = {"arviz", "matplotlib", "torchvision", "sklearn", "pandas"} & set(sys.modules)
print(json.dumps({"cost": cost, "same": str(state) == str(after), "heavy": sorted(heavy)}))
"""


def test_import_is_light_and_changes_nothing() -> None:
    run = [sys.executable, "-c", IMPORT]
    answer = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert answer["cost"] <= 0.3
    assert answer["same"], "validation defaults, dtype, random state or settings changed"
    assert answer["heavy"] == []


def test_links_at_the_root_are_signposts() -> None:
    for name in ("models", "guides"):
        assert (ROOT / name).is_symlink()
        assert (ROOT / name).resolve() == ROOT / "pyro_vae" / name


def test_readme_example_runs() -> None:
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[:1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    shortened = example.replace("epochs=100", "epochs=1, progress=False")
    shortened = shortened.replace("guide, (x,))", "guide, (x,), search=0)")
    namespace: dict[str, object] = {}
    exec(compile(shortened, "README.md", "exec"), namespace)
    assert "verdict" in namespace
