"""The recipes of published and own tables, with their cost and last result: `make papers`."""

from __future__ import annotations

import importlib
from pathlib import Path

import records

HERE = Path(__file__).parent


def main() -> None:
    """Print each recipe: what, cost, and its table so far."""
    for path in sorted(HERE.glob("*.py")):
        recipe = importlib.import_module(path.stem)
        if not hasattr(recipe, "COST"):  # what recipes share
            continue
        what = (recipe.__doc__ or "").splitlines()[0]
        done = len(records.read(recipe.RESULTS))
        print(f"\n## {path.name}: {what}\nCost: {recipe.COST}. Finished rows: {done}.\n")
        recipe.table()


if __name__ == "__main__":
    main()
