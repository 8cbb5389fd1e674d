"""JSON results of commands: an earlier result remains until the new one is complete."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mfuser.files import make_folder, write_text


def check_writable(folder: Path) -> None:
    """Raises `ValueError` or `OSError` if a folder cannot be created, or written into. Creates nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{folder} cannot be created: {existing} is a file; choose another folder")
    with tempfile.TemporaryFile(dir=existing):
        pass


def check_result_file(file: Path) -> None:
    """Creates the folder of a file. Raises `ValueError` or `OSError` if the file cannot be written."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder; choose a file")
    make_folder(file.parent)
    check_writable(file.parent)


def write_result(file: Path, result: dict[str, Any], complete: bool) -> None:
    """
    Writes a result as JSON, atomically: to `NAME.partial.json` next to `NAME.json` until it is complete.

    Args:
        file (`Path`):
            The file of the complete result, which replaces the partial one.
        result (`dict`):
            The result.
        complete (`bool`):
            Whether it is complete.
    """
    partial = file.with_name(f"{file.stem}.partial{file.suffix}")
    write_text(partial, json.dumps(result, indent=2, allow_nan=False) + "\n")
    if complete:
        os.replace(partial, file)
