"""Run the notebooks in full, in place, and note what each took: `make notebooks`.

About a minute each on 2 cores. Nothing but cells and outputs is kept: no times, no paths.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
os.environ["TORCH_LOGS"] = "-torch.utils.cpp_extension"  # which warns of a GPU that is not there
RESULTS = ROOT / "benchmarks/results/notebooks.json"


def main() -> None:
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"seconds": {}}
    chosen = sys.argv[1:] or [str(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for path in map(Path, chosen):
        notebook = nbformat.read(path, as_version=4)
        start = time.perf_counter()
        NotebookClient(
            notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(ROOT)}}
        ).execute()
        record["seconds"][path.stem] = round(time.perf_counter() - start, 1)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)
        print(f"{path.name}: {record['seconds'][path.stem]:.0f} s", flush=True)
    record["seconds"] = dict(sorted(record["seconds"].items()))
    record |= {
        "python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()
    }  # fmt: skip
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
