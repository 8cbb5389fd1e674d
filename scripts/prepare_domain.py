"""`mfuser prepare`: from a dataset's official download to a folder that `datasets` loads, labels as train ids.

    mfuser prepare cityscapes ~/downloads/cityscapes data/cityscapes
    mfuser prepare mapillary ~/downloads/vistas data/mapillary --split validation --mapillary-map B
    mfuser prepare custom someone/their-dataset data/theirs --label-column mask --id2label classes.json

The result is what `Dataset.save_to_disk` writes, one folder a split, memory-mapped when loaded (no second copy in a
cache): columns `image` (the original file's bytes), `label` (8-bit PNG of train ids, 255 ignored), `name` (the image's
path in the download, the row's key) and, for ACDC, `condition`. Every pair is decoded and checked on the way; bad ones
are skipped and listed with the reason in `mfuser_preparation.json` beside the splits.

The work is cut into shards. A shard is written under a temporary name and renamed once it is whole, its record (input,
size, checksum, what was skipped) after it; so a run that was stopped goes on where it was, when started again.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
from huggingface_hub import HfApi
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.data.domains import (
    DOMAINS,
    PREPARATION_FILE,
    SPLIT_ALIASES,
    Domain,
    LabelMap,
    Pair,
    available_splits,
    check_sizes,
    class_names,
    find_pairs,
    has_split,
    image_size,
    open_columns,
    pick_split,
    read_label,
)

try:
    import datasets
    import pyarrow as pa
except ImportError:
    datasets = pa = None


# Part of every shard's key: raise it when the same input is to give other rows.
FORMAT = 1
BATCH_ROWS = 16
CUSTOM = "custom"


class Entry(NamedTuple):
    """One row before conversion: encoded files."""

    name: str
    image: bytes
    label: bytes | None
    condition: str | None


class Converted(NamedTuple):
    """One label after conversion. `size`: (height, width). `pixels`: how many of each train id (256,), int64."""

    label: bytes | None
    size: tuple[int, int]
    pixels: np.ndarray


def convert(entry: Entry, label_map: LabelMap, class_in_red_channel: bool) -> Converted:
    """Decodes and checks a pair and encodes its label as train ids. Raises ValueError with the reason if it is bad."""
    size = _decode("image", _loaded_size, entry.image)
    if entry.label is None:
        return Converted(None, size, np.zeros(256, dtype=np.int64))
    ids = _decode("label", read_label, entry.label, class_in_red_channel)
    check_sizes(size, ids.shape)
    train_ids = Image.fromarray(label_map(ids))
    encoded = BytesIO()
    train_ids.save(encoded, "PNG")
    return Converted(encoded.getvalue(), size, np.array(train_ids.histogram(), dtype=np.int64))


def _decode(kind: str, function: Callable, *arguments) -> Any:
    """Calls a decoder; whatever a damaged file leads Pillow to raise (it may be anything) becomes a ValueError."""
    try:
        return function(*arguments)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{kind}: not an image file") from error
    except Exception as error:
        raise ValueError(f"{kind}: {error}") from error


def _loaded_size(data: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(data)) as image:
        image.load()
        return image_size(image)


@dataclass(frozen=True)
class Shard:
    """A file to write. `key` identifies its input: another key, another content."""

    file: Path
    entries: Any  # list[Pair] of a download, or a datasets.Dataset with encoded columns
    first_row: int
    key: str
    label_map: LabelMap
    class_in_red_channel: bool
    conditions: bool

    @property
    def record_file(self) -> Path:
        return self.file.with_suffix(".json")

    def read(self) -> Iterator[Entry]:
        if isinstance(self.entries, list):
            for pair in self.entries:
                label = pair.label.read_bytes() if pair.label else None
                yield Entry(pair.name, pair.image.read_bytes(), label, pair.condition)
            return
        for row, entry in enumerate(self.entries, start=self.first_row):
            name = entry.get("name", f"{row:08d}")
            yield Entry(name, _encoded(entry["image"]), _encoded(entry["label"]), entry.get("condition"))


def _encoded(value: dict | None) -> bytes:
    """The bytes of an undecoded `datasets.Image` value, which holds them or the path of a file. An empty cell has
    none, which makes a bad pair."""
    if value is None:
        return b""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def prepared_features(conditions: bool):
    """The columns of a prepared dataset."""
    columns = {"image": datasets.Image(), "label": datasets.Image(), "name": datasets.Value("string")}
    return datasets.Features(columns | ({"condition": datasets.Value("string")} if conditions else {}))


def write_shard(shard: Shard) -> dict[str, Any]:
    """Converts a shard's pairs into its Arrow file and writes its record, which it returns. An error that is not a bad
    pair's own, such as a full disk or an unreadable folder, propagates and leaves no file."""
    schema = prepared_features(shard.conditions).arrow_schema
    skipped, sizes, pixels, rows = [], Counter(), np.zeros(256, dtype=np.int64), 0
    temporary = shard.file.with_name(f"{shard.file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            with pa.ipc.new_stream(stream, schema) as writer:
                batch: list[dict[str, Any]] = []
                for entry in shard.read():
                    try:
                        converted = convert(entry, shard.label_map, shard.class_in_red_channel)
                    except ValueError as error:
                        skipped.append({"name": entry.name, "reason": str(error)})
                        continue
                    label = None if converted.label is None else {"bytes": converted.label, "path": None}
                    image = {"bytes": entry.image, "path": entry.name.rsplit("/", 1)[-1]}
                    batch.append({"image": image, "label": label, "name": entry.name, "condition": entry.condition})
                    sizes["x".join(map(str, converted.size))] += 1
                    pixels += converted.pixels
                    rows += 1
                    if len(batch) == BATCH_ROWS:
                        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                        batch = []
                if batch:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            stream.flush()
            os.fsync(stream.fileno())
        record = {
            "key": shard.key,
            "rows": rows,
            "bytes": temporary.stat().st_size,
            "sha256": _sha256(temporary),
            "skipped": skipped,
            "sizes": dict(sizes),
            "pixels": pixels.tolist(),
        }
        os.replace(temporary, shard.file)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomically(shard.record_file, json.dumps(record))
    return record


def verify_shard(shard: Shard) -> dict[str, Any] | None:
    """The shard's record if the file of exactly this input is there, whole and unchanged; otherwise None."""
    try:
        record = json.loads(shard.record_file.read_text(encoding="utf-8"))
        whole = record["key"] == shard.key and record["bytes"] == shard.file.stat().st_size
        return record if whole and record["sha256"] == _sha256(shard.file) else None
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle, and a worker must not outlive a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _process_pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: forking a process that runs threads, as arrow's does, can hang the child.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)


def _run(function: Callable, shards: list[Shard], pool: Executor, description: str) -> list[Any]:
    """`function` of every shard, in order, with a progress bar in images."""
    try:
        futures = {pool.submit(function, shard): shard for shard in shards}
        with tqdm(total=sum(len(shard.entries) for shard in shards), desc=description, unit="image") as progress:
            for future in as_completed(futures):
                future.result()
                progress.update(len(futures[future].entries))
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


class SplitSource(NamedTuple):
    """The rows of one split, what identifies each for a shard's key, and what to record about where they come from."""

    entries: Any
    identities: list[Any]
    conditions: bool
    record: dict[str, Any]


def pairs_of_download(domain: Domain, root: Path, split: str) -> SplitSource:
    """One split of an official download."""
    found = find_pairs(domain, root, split)
    record = {
        "layout": found.layout.name,
        "expected_pairs": domain.splits[split].pairs,
        "images_without_label": found.images_without_label,
        "labels_without_image": found.labels_without_image,
        "missing_folders": found.missing_folders,
    }
    return SplitSource(found.pairs, [_identity(pair) for pair in found.pairs], bool(domain.conditions), record)


def _identity(pair: Pair) -> list[Any]:
    """Changes when a file was replaced, for instance downloaded again after it was found damaged."""
    files = [file.stat() for file in (pair.image, pair.label) if file]
    return [pair.name, pair.condition, *((status.st_size, status.st_mtime_ns) for status in files)]


def rows_of_dataset(source: str, split: str, image_column: str, label_column: str) -> SplitSource:
    """One split of any dataset with an image and a label column, left encoded."""
    dataset, split = open_columns(source, split, image_column, label_column)
    for column in ("image", "label"):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    if "name" in dataset.column_names and len(set(dataset["name"])) < len(dataset):
        print(f"{source}, {split}: names repeat, so rows are named by their position", file=sys.stderr)
        dataset = dataset.remove_columns("name")
    identities = [[dataset._fingerprint, row] for row in range(len(dataset))]
    record = {"layout": f"columns {image_column} and {label_column}", "expected_pairs": None}
    return SplitSource(dataset, identities, "condition" in dataset.column_names, record)


def prepare_split(
    source: SplitSource,
    folder: Path,
    split: str,
    label_map: LabelMap,
    classes: list[str],
    class_in_red_channel: bool,
    shard_size: int,
    workers: int,
    description: str,
) -> dict[str, Any]:
    """Writes one split's folder and returns what to record about it. Shards that are there and intact are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    rule = [FORMAT, label_map.lookup.tolist(), label_map.valid.tolist(), class_in_red_channel, source.conditions]
    count = -(-len(source.entries) // shard_size)
    shards = []
    for index in range(count):
        first, last = index * shard_size, min((index + 1) * shard_size, len(source.entries))
        is_list = isinstance(source.entries, list)
        entries = source.entries[first:last] if is_list else source.entries.select(range(first, last))
        key = hashlib.sha256(json.dumps([rule, source.identities[first:last]]).encode()).hexdigest()
        file = folder / f"data-{index:05d}-of-{count:05d}.arrow"
        shards.append(Shard(file, entries, first, key, label_map, class_in_red_channel, source.conditions))

    state_file = folder / "state.json"
    records: list[dict[str, Any] | None] = [None] * count
    if any(shard.record_file.exists() for shard in shards):
        # Threads will do: hashing releases the interpreter's lock.
        records = _run(verify_shard, shards, ThreadPoolExecutor(workers), f"{description}: checking what is there")
    pending = [index for index, record in enumerate(records) if record is None]
    if pending:
        state_file.unlink(missing_ok=True)
        _remove_leftovers(folder, shards)
        pool = _process_pool(min(workers, len(pending))) if workers > 1 else ThreadPoolExecutor(1)
        written = _run(write_shard, [shards[index] for index in pending], pool, description)
        for index, record in zip(pending, written, strict=True):
            records[index] = record

    sizes, pixels = Counter(), np.zeros(256, dtype=np.int64)
    for record in records:
        sizes.update(record["sizes"])
        pixels += record["pixels"]
    rows = sum(record["rows"] for record in records)
    skipped = [item for record in records for item in record["skipped"]]
    if not rows:
        raise ValueError(f"{description}: all {len(skipped)} pairs are bad; the first: {_reason(skipped[0])}")
    if pending or not state_file.exists():
        _finish(folder, split, shards, records, prepared_features(source.conditions), description)
    return source.record | {
        "pairs": len(source.entries),
        "rows": rows,
        "shards_kept": count - len(pending),
        "skipped": skipped,
        "sizes": dict(sorted(sizes.items())),
        "pixels": {name: int(pixels[index]) for index, name in enumerate(classes)},
        "ignored_pixels": int(pixels[IGNORE_INDEX]),
    }


def _remove_leftovers(folder: Path, shards: list[Shard]) -> None:
    """Files of killed runs, and shards of an earlier cut (the download grew, or the shard size changed)."""
    current = {file.name for shard in shards for file in (shard.file, shard.record_file)}
    for file in folder.glob("data-*-of-*"):
        if file.name not in current:
            file.unlink()


def _finish(folder: Path, split: str, shards: list[Shard], records: list, features, description: str) -> None:
    """Makes the shards a dataset: the two files `save_to_disk` writes beside its data, `state.json` last."""
    description = f"{description}, by mfuser prepare: labels are train ids, {IGNORE_INDEX} ignored"
    datasets.DatasetInfo(description=description, features=features).write_to_directory(str(folder))
    fingerprint = hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest()[:16]
    state = {
        "_data_files": [{"filename": shard.file.name} for shard in shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    write_atomically(folder / "state.json", json.dumps(state, indent=2))


def _reason(skipped: dict[str, str]) -> str:
    return f"{skipped['name']}: {skipped['reason']}"


def prepare(
    domain_name: str,
    root: str | Path,
    output: str | Path,
    splits: list[str] | None = None,
    label_map: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    id2label: dict[int, str] | str | Path | None = None,
    workers: int = 1,
    shard_size: int = 100,
) -> dict[str, Any]:
    """Prepares a domain (see the module's docstring).

    Args:
        domain_name (`str`): a key of `DOMAINS`, or "custom" for a dataset whose labels are train ids already.
        root (`str` or `Path`): folder the official archives were unpacked in. For "custom", "camvid", or when a column
            is named: anything `load_domain` opens.
        output (`str` or `Path`): folder to write; new, empty, or of an earlier run of the same domain and map.
        splits (`list[str]`, *optional*): default: every split found whose labels are public.
        label_map (`str`, *optional*): which of the domain's maps. Default: its first.
        image_column, label_column (`str`, *optional*): the columns, of a dataset that is not an official download.
        id2label (*optional*): class names of "custom"; see `load_domain`.
        workers (`int`): processes. The result does not depend on it.
        shard_size (`int`): pairs in a file.

    Returns:
        `dict`: what `mfuser_preparation.json` holds.

    Raises:
        FileNotFoundError: the download, or a split of it, is not at `root`.
        ValueError: an argument does not fit the domain, `output` holds something else, or all pairs of a split are
            bad.
        filelock.Timeout: another run is writing to `output`.
    """
    if datasets is None:
        raise ImportError("mfuser prepare needs the library datasets: pip install 'mfuser[train]'")
    if workers < 1 or shard_size < 1:
        raise ValueError(f"workers and shard_size must be at least 1, not {workers} and {shard_size}")
    domain = DOMAINS.get(domain_name)
    if domain is None and domain_name != CUSTOM:
        raise ValueError(f"no domain {domain_name!r}; known: {', '.join(DOMAINS)}, and {CUSTOM} for any other dataset")
    if domain and id2label is not None:
        raise ValueError(f"{domain.title} has its own class names; id2label is for {CUSTOM}")
    if label_map and not (domain and label_map in domain.label_maps):
        raise ValueError(f"{domain.title if domain else CUSTOM} has no label map {label_map!r}")

    root, output = str(root), Path(output)
    from_columns = domain is None or not domain.layouts or bool(image_column or label_column)
    if from_columns:
        available = available_splits(root)
        splits = [pick_split(available, split, root) for split in splits or available]
        columns = image_column or "image", label_column or "label"
        sources = {split: rows_of_dataset(root, split, *columns) for split in splits}
    else:
        splits = [SPLIT_ALIASES.get(split, split) for split in splits or _public_splits(domain, Path(root))]
        sources = {split: pairs_of_download(domain, Path(root), split) for split in splits}
    if domain:
        classes, conversion, title = list(domain.classes), domain.label_map(label_map), domain.title
        map_name = label_map or next(iter(domain.label_maps))
    else:
        classes = list(class_names(root, id2label).values())
        conversion, title, map_name = LabelMap.identity(len(classes)), Path(root).name, "trainIds"
    preparation = {
        "format": FORMAT,
        "domain": domain_name,
        "title": title,
        "label_map": map_name,
        "raw_to_train_id": {
            str(raw): int(conversion.lookup[raw]) for raw in np.flatnonzero(conversion.valid).tolist()
        },
        "classes": classes,
        "evaluation_classes": list(domain.evaluation_classes) if domain else classes,
        "ignore_index": IGNORE_INDEX,
        "splits": {},
    }

    output.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(output / ".lock", timeout=0):
        preparation["splits"] = _earlier_splits(output, preparation)
        write_atomically(output / PREPARATION_FILE, json.dumps(preparation, indent=2))
        for split, source in sources.items():
            record = prepare_split(
                source,
                output / split,
                split,
                conversion,
                classes,
                bool(domain and domain.class_in_red_channel),
                shard_size,
                workers,
                f"{title} {split}",
            )
            report(title, split, record, domain)
            preparation["splits"][split] = {key: value for key, value in record.items() if key != "shards_kept"}
            write_atomically(output / PREPARATION_FILE, json.dumps(preparation, indent=2))
            write_atomically(output / "dataset_dict.json", json.dumps({"splits": sorted(preparation["splits"])}))
    return preparation


def _public_splits(domain: Domain, root: Path) -> list[str]:
    """The splits found whose labels are public; if none is there, all, so that the search says what it misses."""
    public = [name for name, split in domain.splits.items() if split.labelled]
    return [name for name in public if has_split(domain, root, name)] or public


def _earlier_splits(output: Path, preparation: dict[str, Any]) -> dict[str, Any]:
    """The splits an earlier run finished, if `output` holds the same domain under the same map."""
    if not (output / PREPARATION_FILE).is_file():
        strangers = sorted(path.name for path in output.iterdir() if path.name != ".lock" and path.suffix != ".tmp")
        if strangers:
            raise ValueError(f"{output} holds other files, such as {strangers[0]}; give a new or empty folder")
        return {}
    earlier = json.loads((output / PREPARATION_FILE).read_text(encoding="utf-8"))
    for key in ("format", "domain", "label_map", "classes"):
        if earlier[key] != preparation[key]:
            raise ValueError(
                f"{output} holds another preparation: its {key} is {earlier[key]}, not {preparation[key]}; "
                "give another folder"
            )
    return earlier["splits"]


def report(title: str, split: str, record: dict[str, Any], domain: Domain | None, shown: int = 5) -> None:
    """Prints what became of a split: nothing that was left out goes unsaid."""
    print(f"{title} {split}: {record['rows']} of {record['pairs']} pairs prepared ({record['layout']})")
    if record["shards_kept"]:
        print(f"  {record['shards_kept']} intact shards of an earlier run kept")
    for key, words in (
        ("skipped", "bad pairs skipped"),
        ("images_without_label", "images without a label left out"),
        ("labels_without_image", "labels without an image left out"),
        ("missing_folders", "folders missing"),
    ):
        items = record.get(key, [])
        if items:
            lines = [_reason(item) if isinstance(item, dict) else item for item in items[:shown]]
            more = [f"... all {len(items)} in {PREPARATION_FILE}"] if len(items) > shown else []
            print("\n    ".join([f"  {len(items)} {words}:", *lines, *more]))
    if record["expected_pairs"] not in (None, record["pairs"]):
        print(f"  note: {record['expected_pairs']} pairs were expected")
    known = {f"{height}x{width}" for height, width in domain.sizes} if domain else set()
    unusual = {size: number for size, number in record["sizes"].items() if known and size not in known}
    if unusual:
        print(f"  note: unusual sizes (height x width, images): {unusual}; known: {', '.join(sorted(known))}")


def push_to_hub(output: str | Path, repo_id: str) -> None:
    """Uploads a prepared folder to a private dataset repository (the licences of most of these datasets forbid passing
    them on), with its record beside it."""
    datasets.load_from_disk(str(output)).push_to_hub(repo_id, private=True)
    HfApi().upload_file(
        path_or_fileobj=str(Path(output) / PREPARATION_FILE),
        path_in_repo=PREPARATION_FILE,
        repo_id=repo_id,
        repo_type="dataset",
    )


def parser() -> argparse.ArgumentParser:
    description = "Turn a dataset's official download into one that `datasets` loads, labels as train ids."
    parser = argparse.ArgumentParser(prog="mfuser prepare", description=description)
    parser.add_argument("domain", choices=[*DOMAINS, CUSTOM], help="which dataset; custom: any other")
    parser.add_argument("root", help="folder of the unpacked archives; otherwise a folder, parquet file or Hub id")
    parser.add_argument("output", type=Path, help="folder to write, or to go on with")
    parser.add_argument("--split", nargs="+", help="default: every split found whose labels are public")
    parser.add_argument("--mapillary-map", choices=["A", "B"], help="66-to-19 map (default A, as RobustNet and HRDA)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--shard-size", type=int, default=100, help="pairs in a file (%(default)s)")
    parser.add_argument("--image-column", help="of a dataset that is not an official download (image)")
    parser.add_argument("--label-column", help="of a dataset that is not an official download (label)")
    parser.add_argument("--id2label", help="class names of a custom dataset: a JSON file, or a domain's name")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this dataset repository, private")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.mapillary_map and options.domain != "mapillary":
            raise ValueError(f"--mapillary-map is for mapillary, not {options.domain}")
        prepare(
            options.domain,
            options.root,
            options.output,
            splits=options.split,
            label_map=options.mapillary_map,
            image_column=options.image_column,
            label_column=options.label_column,
            id2label=options.id2label,
            workers=options.workers,
            shard_size=options.shard_size,
        )
        if options.push_to_hub:
            push_to_hub(options.output, options.push_to_hub)
    except filelock.Timeout:
        print(f"mfuser prepare: another run is writing to {options.output}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        message = "a worker was killed (out of memory?); start again, with fewer --workers, to go on"
        print(f"mfuser prepare: {message}", file=sys.stderr)
        return 1
    except (ImportError, OSError, ValueError) as error:
        print(f"mfuser prepare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mfuser prepare: stopped; start again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
