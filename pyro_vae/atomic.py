"""Files that a kill leaves old or new, never half of either."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a draft beside the file, force it to disk, rename it over the file.

    Raises:
        OSError: the folder cannot be written to, or the disk is full: the old file stands.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder) / "a.txt", "new")
        ...     (Path(folder) / "a.txt").read_text()
        'new'
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{error.strerror}: {str(path)!r} could not be written"
            f"\n  kept:     {'the file as it was before' if path.exists() else 'nothing'}"
            "\n  try:      a folder that can be written to, with room left",
        ) from error
