"""The recipes of published and own tables, with their cost and last result: `make papers`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Print each recipe: what, cost, and its table so far."""
    sys.path.insert(0, str(HERE))
    for path in sorted(HERE.glob("*.py")):
        if path.stem == "list":
            continue
        recipe = importlib.import_module(path.stem)
        what = (recipe.__doc__ or "").splitlines()[0]
        done = json.loads(recipe.RESULTS.read_text()) if recipe.RESULTS.exists() else []
        print(f"\n## {path.name}: {what}\nCost: {recipe.COST}. Finished rows: {len(done)}.\n")
        recipe.table()


if __name__ == "__main__":
    main()
