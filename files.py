"""Files on disk: atomic writing of files and folders, JSON, and SHA-256 hashes."""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """
    Opens a binary file that replaces `path` atomically when the block ends.

    If the block raises, `path` keeps its previous content. The data is flushed to disk before the file is renamed. If
    the process is killed, a file `.<number>.tmp` may remain next to it.

    Args:
        path (`str` or `Path`):
            The file to write. Its folder must exist.

    Raises:
        OSError: If the file cannot be written, with its name; for example because the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.tmp")  # short, as `path` may have the longest possible name
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` atomically, encoded as UTF-8."""
    with atomic_writer(path) as stream:
        stream.write(text.encode("utf-8"))


def write_image(path: str | Path, image: Image.Image, **options: Any) -> None:
    """Writes an image to `path` atomically, in the format of its suffix, with PIL's `options` for that format."""
    with atomic_writer(path) as stream:
        image.save(stream, format=Image.registered_extensions()[Path(path).suffix.lower()], **options)


def make_folder(path: Path) -> None:
    """Creates a folder and its parents, unless it exists. Raises `ValueError` if a file has the name of a folder."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path} cannot be created: {error.filename} is a file; choose another folder") from None


def check_new_folder(path: Path) -> None:
    """Raises `ValueError` unless `path` does not exist or is an empty folder."""
    if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
        kind = "is not empty" if path.is_dir() else "is a file"
        raise ValueError(f"{path} {kind}; choose a new folder, so that nothing is overwritten")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """
    Creates a folder that appears as `path`, complete, when the block ends.

    If the block raises, nothing remains. If the process is killed, a folder `.mfuser-*` may remain next to `path`.

    Args:
        path (`Path`):
            The folder. It must be new or empty.

    Yields:
        `Path`: The folder to write into, which has the same name.

    Raises:
        ValueError: If `path` holds anything.
        OSError: If a file cannot be written.
    """
    check_new_folder(path)
    path = path.resolve()
    make_folder(path.parent)
    workspace = Path(tempfile.mkdtemp(prefix=".mfuser-", dir=path.parent))
    try:
        folder = workspace / path.name
        folder.mkdir()
        yield folder
        flush(folder)
        os.replace(folder, path)  # fails if anything was written to `path` in the meantime
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def flush(folder: Path) -> None:
    """Flushes the files of a folder to disk."""
    for file in filter(Path.is_file, folder.rglob("*")):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `ValueError` with the file's name if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of the encoding
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not a usable JSON file: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; it must hold a JSON object, {{...}}")
    return value


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
