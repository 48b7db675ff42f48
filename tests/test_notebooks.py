"""Every notebook runs, at the smoke sizes it carries; what is committed was run in full."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    (sizes,) = [cell for cell in notebook.cells if "sizes" in cell.metadata.get("tags", [])]
    sizes.source = sizes.metadata["smoke"]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()


def test_it_is_committed_with_its_pictures(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture inside"
    assert not any(output.get("name") == "stderr" for output in outputs), "warnings inside"
    text = path.read_text()
    assert str(ROOT) not in text
    assert not re.search(r"/(site-packages|tmp|home|root)/", text), "a path of some machine"


def test_it_begins_and_ends_as_all_do(path: Path) -> None:
    prose = [
        c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"
    ]
    assert prose[0].startswith("# ") and "**What you will see.**" in prose[0]
    assert "## What to try" in prose[-1]


def test_its_full_run_is_on_record(path: Path) -> None:
    """`make notebooks` runs all in full and notes the wall time, under three minutes each."""
    record = json.loads((ROOT / "benchmarks/results/notebooks.json").read_text())
    assert record["seconds"][path.stem] < 180
