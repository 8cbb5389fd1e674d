"""
Shards of a prepared split: Arrow files of checked images and train ids, each with a record of its content.

A shard is written under a temporary name and renamed once it is complete, and its record (input, size, checksum,
skipped pairs) is written after it. When an interrupted run is started again, it keeps the complete shards. A shard
of a prepared split is not overwritten with other rows: the split remains complete until the new one is complete.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from mfuser.data.label_maps import LabelMap, check_sizes, image_size, read_label
from mfuser.data.rows import EncodedRow, Rows
from mfuser.files import atomic_writer, sha256, write_text
from mfuser.images_mfuser import rgb_image

try:
    import datasets
    import pyarrow as pa
except ImportError:
    datasets = pa = None


# Part of every shard's key. Increase it when a change of the code gives other rows for the same input.
FORMAT = 1
BATCH_ROWS = 16


@dataclass(frozen=True)
class Conversion:
    """
    The conversion of a dataset's label files to train ids.

    Args:
        label_map (`LabelMap`):
            The map from the ids in the files to train ids.
        classes (`tuple[str]`):
            The name of each train id.
        class_in_red_channel (`bool`, *optional*, defaults to `False`):
            Whether the files are colour PNGs with the class in the red channel.
    """

    label_map: LabelMap
    classes: tuple[str, ...]
    class_in_red_channel: bool = False


class Converted(NamedTuple):
    """
    One converted pair.

    Args:
        label (`bytes`, *optional*):
            The encoded label; `None` without a label.
        size (`tuple[int, int]`):
            (height, width).
        pixels (`np.ndarray` of shape `(256,)`, int64):
            The number of pixels of each train id.
    """

    label: bytes | None
    size: tuple[int, int]
    pixels: np.ndarray


def convert(row: EncodedRow, conversion: Conversion) -> Converted:
    """
    Decodes and checks a pair, and encodes its label as an 8-bit PNG of train ids.

    Raises:
        ValueError: If the pair cannot be used, with the reason.
    """
    size = _decode("image", _decoded_size, row.image)
    if row.label is None:
        return Converted(None, size, np.zeros(256, dtype=np.int64))
    ids = _decode("label", read_label, row.label, conversion.class_in_red_channel)
    check_sizes(size, ids.shape)
    train_ids = Image.fromarray(conversion.label_map(ids))
    encoded = BytesIO()
    train_ids.save(encoded, "PNG")
    return Converted(encoded.getvalue(), size, np.array(train_ids.histogram(), dtype=np.int64))


def _decode(kind: str, function: Callable, *arguments) -> Any:
    """Calls a decoder and converts its exceptions to ValueError: Pillow may raise any type for a damaged file."""
    try:
        return function(*arguments)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{kind}: not an image file") from error
    except Exception as error:
        raise ValueError(f"{kind}: {error}") from error


def _decoded_size(data: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(data)) as image:
        rgb_image(image)  # which a model takes
        return image_size(image)


@dataclass(frozen=True)
class Shard:
    """
    A file to write.

    Args:
        file (`Path`):
            The Arrow file.
        rows (`Rows`):
            Its rows.
        conversion (`Conversion`):
            The conversion of its labels.
        key (`str`):
            A hash of the input: another input has another key.
    """

    file: Path
    rows: Rows
    conversion: Conversion
    key: str

    @property
    def record_file(self) -> Path:
        return self.file.with_suffix(".json")


def cut_into_shards(rows: Rows, folder: Path, conversion: Conversion, shard_size: int) -> list[Shard]:
    """Cuts the rows of a split into shards of at most `shard_size` rows, to be written into `folder`."""
    label_map = conversion.label_map
    rule = [
        FORMAT,
        label_map.lookup.tolist(),
        label_map.valid.tolist(),
        conversion.class_in_red_channel,
        rows.has_conditions,
    ]
    identities, listed = rows.identities, listed_files(folder)
    starts = range(0, len(rows), shard_size)
    shards = []
    for index, first in enumerate(starts):
        last = min(first + shard_size, len(rows))
        key = hashlib.sha256(json.dumps([rule, identities[first:last]]).encode()).hexdigest()
        file = folder / f"data-{index:05d}-of-{len(starts):05d}.arrow"
        if file.name in listed and _recorded_key(file) not in (None, key):
            file = file.with_name(f"{file.stem}-{key[:8]}.arrow")
        shards.append(Shard(file, rows.slice(first, last), conversion, key))
    return shards


STATE_FILE = "state.json"  # of `save_to_disk`: the files of a split


def listed_files(folder: Path) -> set[str]:
    """The files of a complete split; none if it is incomplete."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        names = {item["filename"] for item in state["_data_files"]}
    except (FileNotFoundError, ValueError, KeyError):
        return set()
    return names if all((folder / name).is_file() for name in names) else set()


def _recorded_key(file: Path) -> str | None:
    """The key in the record of a shard, if there is one."""
    try:
        return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["key"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


def prepared_features(conditions: bool):
    """The columns of a prepared dataset."""
    columns = {"image": datasets.Image(), "label": datasets.Image(), "name": datasets.Value("string")}
    return datasets.Features(columns | ({"condition": datasets.Value("string")} if conditions else {}))


def write_shard(shard: Shard) -> dict[str, Any]:
    """
    Converts the pairs of a shard into its Arrow file and writes its record.

    An error that does not concern a single pair, such as a full disk or an unreadable folder, propagates and leaves no
    file.

    Returns:
        `dict`: The record.
    """
    schema = prepared_features(shard.rows.has_conditions).arrow_schema
    skipped: list[dict[str, str]] = []
    sizes: Counter[str] = Counter()
    pixels = np.zeros(256, dtype=np.int64)
    batch: list[dict[str, Any]] = []
    with atomic_writer(shard.file) as stream, pa.ipc.new_stream(stream, schema) as writer:
        for row in shard.rows.encoded():
            try:
                converted = convert(row, shard.conversion)
            except ValueError as error:
                skipped.append({"name": row.name, "reason": str(error)})
                continue
            batch.append(_arrow_row(row, converted.label))
            sizes["x".join(map(str, converted.size))] += 1
            pixels += converted.pixels
            if len(batch) == BATCH_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch.clear()
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    record = {
        "key": shard.key,
        "rows": sizes.total(),
        "bytes": shard.file.stat().st_size,
        "sha256": sha256(shard.file),
        "skipped": skipped,
        "sizes": dict(sizes),
        "pixels": pixels.tolist(),
    }
    write_text(shard.record_file, json.dumps(record))
    return record


def _arrow_row(row: EncodedRow, label: bytes | None) -> dict[str, Any]:
    """A row as the columns of `prepared_features`."""
    return {
        "image": {"bytes": row.image, "path": row.name.rsplit("/", 1)[-1]},
        "label": None if label is None else {"bytes": label, "path": None},
        "name": row.name,
        "condition": row.condition,
    }


def verify_shard(shard: Shard) -> dict[str, Any] | None:
    """The shard's record if the file of exactly this input exists, complete and unchanged; otherwise `None`."""
    try:
        record = json.loads(shard.record_file.read_text(encoding="utf-8"))
        complete = record["key"] == shard.key and record["bytes"] == shard.file.stat().st_size
        return record if complete and record["sha256"] == sha256(shard.file) else None
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None


def remove_leftovers(folder: Path, shards: list[Shard]) -> None:
    """Deletes files of killed runs and shards of an earlier partition, but none that belongs to a complete split."""
    current = {file.name for shard in shards for file in (shard.file, shard.record_file)}
    for name in listed_files(folder):
        current |= {name, Path(name).with_suffix(".json").name}
    remove_temporary(folder)
    for file in folder.glob("data-*-of-*"):
        if file.name not in current:
            file.unlink()


_TEMPORARY = re.compile(r"\.([0-9a-f]{12}|mfuser-.*)\.tmp")  # of `atomic_writer` and of `prepare_split`


def is_temporary(path: Path) -> bool:
    """Whether a file or folder has a temporary name of this package, as killed runs leave behind."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporary(folder: Path) -> None:
    """Deletes the temporary files and folders of killed runs."""
    for path in filter(is_temporary, folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Worker processes that ignore Ctrl-C, which their parent handles, and end when it is killed."""
    # Spawned, not forked: forking a process that runs threads, as Arrow's does, can deadlock the child.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent) -> None:
    """Ends this process when its parent ends."""
    parent.join()
    os._exit(1)


def run(function: Callable[[Shard], Any], shards: list[Shard], pool: Executor, description: str) -> list[Any]:
    """Applies `function` to every shard, with a progress bar in images, and returns the results in order."""
    try:
        futures = {pool.submit(function, shard): shard for shard in shards}
        with tqdm(total=sum(len(shard.rows) for shard in shards), desc=description, unit="image") as progress:
            for future in as_completed(futures):
                future.result()
                progress.update(len(futures[future].rows))
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
