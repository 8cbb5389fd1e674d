"""
Preparation of a dataset: from an official download to a folder that `datasets` loads, with labels as train ids.

The result is what `Dataset.save_to_disk` writes, one folder per split, memory-mapped when loaded (no second copy in a
cache): columns `image` (the content of the original file), `label` (8-bit PNG of train ids, 255 ignored), `name` (the
path of the image in the download, which is unique) and, for ACDC, `condition`. Every pair is decoded and checked.
Pairs that cannot be used are skipped and listed, with the reason, in `mfuser_preparation.json` next to the splits.
"""

import hashlib
import json
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.data.domain import Domain
from mfuser.data.label_maps import LabelMap
from mfuser.data.layouts import find_pairs, has_split
from mfuser.data.loading import (
    NAMES_FILE,
    PREPARATION_FILE,
    SPLIT_ALIASES,
    available_splits,
    class_names,
    names_beside,
    open_columns,
    pick_split,
)
from mfuser.data.rows import DatasetRows, DownloadRows, Rows
from mfuser.data.shards import (
    FORMAT,
    STATE_FILE,
    Conversion,
    Shard,
    cut_into_shards,
    is_temporary,
    listed_files,
    prepared_features,
    process_pool,
    remove_leftovers,
    remove_temporary,
    run,
    verify_shard,
    write_shard,
)
from mfuser.data.tables import DOMAINS
from mfuser.files import write_text

try:
    import datasets
except ImportError:
    datasets = None


CUSTOM = "custom"
INFO_FILE = "dataset_info.json"  # of `save_to_disk`


class SplitSource(NamedTuple):
    """
    One split to prepare.

    Args:
        rows (`Rows`):
            The rows.
        conversion (`Conversion`):
            The conversion of the labels.
        label_map (`str`):
            The name of the label map that gives the train ids.
        record (`dict`):
            What to record about the origin of the rows.
    """

    rows: Rows
    conversion: Conversion
    label_map: str
    record: dict[str, Any]


def pairs_of_download(domain: Domain, root: Path, split: str, label_map: str | None = None) -> SplitSource:
    """One split of an official download, or of a copy whose labels another toolbox converted to train ids."""
    found = find_pairs(domain, root, split)
    reading = domain.label_reading(found.layout, label_map)
    record = {
        "layout": found.layout.name,
        "expected_pairs": domain.splits[split].pairs,
        "images_without_label": found.images_without_label,
        "labels_without_image": found.labels_without_image,
        "missing_folders": found.missing_folders,
    }
    conversion = Conversion(reading.label_map, domain.classes, reading.class_in_red_channel)
    return SplitSource(DownloadRows(found.pairs, reading.class_in_red_channel), conversion, reading.name, record)


def rows_of_dataset(source: str, split: str, image_column: str, label_column: str) -> tuple[Rows, dict[str, Any]]:
    """The rows of one split of any dataset with an image and a label column, and what to record about them."""
    dataset, split = open_columns(source, split, image_column, label_column)
    if "name" in dataset.column_names and len(set(dataset["name"])) < len(dataset):
        print(f"{source}, {split}: names repeat, so rows are named by their position", file=sys.stderr)
        dataset = dataset.remove_columns("name")
    record = {"layout": f"columns {image_column} and {label_column}", "expected_pairs": None}
    return DatasetRows(dataset), record


def prepare_split(source: SplitSource, folder: Path, title: str, shard_size: int, workers: int) -> dict[str, Any]:
    """
    Writes one split. Shards of an earlier run that are intact are kept.

    Args:
        source (`SplitSource`):
            The split.
        folder (`Path`):
            The folder to write, named after the split.
        title (`str`):
            The name of the dataset in messages and in the description of the split.
        shard_size (`int`):
            Pairs per shard.
        workers (`int`):
            Number of processes.

    Returns:
        `dict`: What to record about the split.

    Raises:
        ValueError: If no pair can be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = f"{title} {folder.name}"
    shards = cut_into_shards(source.rows, folder, source.conversion, shard_size)
    records: list[dict[str, Any] | None] = [None] * len(shards)
    if any(shard.record_file.exists() for shard in shards):
        # Threads suffice: hashing releases the GIL.
        records = run(verify_shard, shards, ThreadPoolExecutor(workers), f"{description}: checking existing shards")
    pending = [index for index, record in enumerate(records) if record is None]
    listed = listed_files(folder)
    if not listed:
        (folder / STATE_FILE).unlink(missing_ok=True)  # it may name files that no longer exist
    if pending:
        remove_leftovers(folder, shards)
        pool = process_pool(min(workers, len(pending))) if workers > 1 else ThreadPoolExecutor(1)
        written = run(write_shard, [shards[index] for index in pending], pool, description)
        for index, record in zip(pending, written, strict=True):
            records[index] = record
    result = _split_record(source, records) | {"shards_kept": len(shards) - len(pending)}
    if not result["rows"]:
        skipped = result["skipped"]
        raise ValueError(f"{description}: all {len(skipped)} pairs are bad; the first: {_reason(skipped[0])}")
    if pending or listed != {shard.file.name for shard in shards}:
        _finish(folder, shards, records, prepared_features(source.rows.has_conditions), description)
        remove_leftovers(folder, shards)  # of the earlier state
    return result


def _split_record(source: SplitSource, records: list) -> dict[str, Any]:
    """What to record about a split whose shards have these records."""
    sizes: Counter[str] = Counter()
    pixels = np.zeros(256, dtype=np.int64)
    for record in records:
        sizes.update(record["sizes"])
        pixels += record["pixels"]
    return source.record | {
        "pairs": len(source.rows),
        "rows": sum(record["rows"] for record in records),
        "skipped": [item for record in records for item in record["skipped"]],
        "sizes": dict(sorted(sizes.items())),
        "pixels": {name: int(pixels[index]) for index, name in enumerate(source.conversion.classes)},
        "ignored_pixels": int(pixels[IGNORE_INDEX]),
    }


def _finish(folder: Path, shards: list[Shard], records: list, features, description: str) -> None:
    """Writes the two files that `save_to_disk` writes next to its data, `state.json` last."""
    description = f"{description}, by mfuser prepare: labels are train ids, {IGNORE_INDEX} ignored"
    with tempfile.TemporaryDirectory(prefix=".mfuser-", suffix=".tmp", dir=folder) as written:
        datasets.DatasetInfo(description=description, features=features).write_to_directory(written)
        write_text(folder / INFO_FILE, Path(written, INFO_FILE).read_text(encoding="utf-8"))
    fingerprint = hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest()[:16]
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard.file.name} for shard in shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    write_text(folder / STATE_FILE, json.dumps(state, indent=2))


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
    """
    Prepares a dataset, and prints for each split how many pairs were prepared and what was left out.

    Args:
        domain_name (`str`):
            A key of `DOMAINS`, or "custom" for a dataset whose labels are already train ids.
        root (`str` or `Path`):
            The folder in which the official archives were unpacked. For "custom", "camvid", or if a column is named:
            anything that `load_domain` opens.
        output (`str` or `Path`):
            The folder to write. It must be new, empty, or from an earlier run with the same domain and label map.
        splits (`list[str]`, *optional*):
            The splits. By default every split that is found and has public labels.
        label_map (`str`, *optional*):
            One of the domain's label maps. By default the first.
        image_column, label_column (`str`, *optional*):
            The columns of a dataset that is not an official download.
        id2label (`dict[int, str]`, `str` or `Path`, *optional*):
            The class names of "custom", see `load_domain`.
        workers (`int`, *optional*, defaults to 1):
            Number of processes. The result does not depend on it.
        shard_size (`int`, *optional*, defaults to 100):
            Pairs per file.

    Returns:
        `dict`: The content of `mfuser_preparation.json`.

    Raises:
        FileNotFoundError: If the download, or a split of it, is not at `root`.
        ValueError: If an argument does not fit the domain, `output` holds something else, or no pair of a split can
            be used.
        filelock.Timeout: If another run is writing to `output`.
    """
    if datasets is None:
        raise ImportError("mfuser prepare requires the library datasets: pip install 'mfuser[train]'")
    domain = _check_arguments(domain_name, label_map, id2label, workers, shard_size)
    root, output = str(root), Path(output)
    if domain and domain.layouts and not (image_column or label_column):
        sources = _sources_of_download(domain, Path(root), splits, label_map)
        map_name = _common_label_map(domain, sources)
    else:
        if domain:
            conversion = Conversion(domain.label_map(label_map), domain.classes, domain.class_in_red_channel)
            map_name = domain.label_map_name(label_map)
            _check_names_of_ids(root, domain, map_name)
        else:
            classes = tuple(class_names(root, id2label).values())
            conversion, map_name = Conversion(LabelMap.identity(len(classes)), classes), "trainIds"
        sources = {
            split: SplitSource(rows, conversion, map_name, record)
            for split, (rows, record) in _rows_of_splits(
                root, splits, image_column or "image", label_column or "label"
            ).items()
        }
    title = domain.title if domain else Path(root).name
    preparation: dict[str, Any] = {"format": FORMAT, "domain": domain_name, "title": title, "label_map": map_name}
    preparation |= _conversion_record(next(iter(sources.values())).conversion, domain)

    output.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(output / ".lock", timeout=0):
        preparation["splits"] = _earlier_splits(output, preparation)
        remove_temporary(output)
        write_text(output / PREPARATION_FILE, json.dumps(preparation, indent=2))
        for split, source in sources.items():
            record = prepare_split(source, output / split, title, shard_size, workers)
            report(title, split, record, domain)
            preparation["splits"][split] = {key: value for key, value in record.items() if key != "shards_kept"}
            write_text(output / PREPARATION_FILE, json.dumps(preparation, indent=2))
            write_text(output / "dataset_dict.json", json.dumps({"splits": sorted(preparation["splits"])}))
    return preparation


def _check_arguments(
    domain_name: str, label_map: str | None, id2label: Any, workers: int, shard_size: int
) -> Domain | None:
    """The domain of that name, `None` for a custom dataset, if the arguments of `prepare` fit it."""
    if workers < 1 or shard_size < 1:
        raise ValueError(f"workers is {workers} and shard_size is {shard_size}; both must be at least 1")
    domain = DOMAINS.get(domain_name)
    if domain is None and domain_name != CUSTOM:
        raise ValueError(
            f"there is no domain {domain_name!r}; the domains are {', '.join(DOMAINS)}, and {CUSTOM} for any other "
            "dataset"
        )
    if domain and id2label is not None:
        raise ValueError(f"{domain.title} has its own class names; id2label is for {CUSTOM}")
    if domain is None and label_map:
        raise ValueError(f"{CUSTOM} has no label map {label_map!r}; its labels are train ids")
    if domain:
        domain.label_map_name(label_map)  # raises ValueError if there is no such map
    return domain


def _check_names_of_ids(root: str, domain: Domain, map_name: str) -> None:
    """Raises `ValueError` if an `id2label.json` beside the data contradicts the label map of a domain."""
    ids = domain.label_maps[map_name]
    named = names_beside(root) or {}
    if named and ids == {**domain.id2label, IGNORE_INDEX: None}:
        class_names(root, domain.name)  # the ids are train ids, so all names must be equal
    # Other ids may have finer names, several of which the map merges.
    wrong = [raw for raw, name in named.items() if name in domain.classes and ids.get(raw) != name]
    if wrong:
        raw = wrong[0]
        raise ValueError(
            f"{root} has an {NAMES_FILE} in which {raw} is {named[raw]!r}; in the {map_name} of {domain.title}, it is "
            f"{ids.get(raw) or 'no class'}. Use `{CUSTOM}` for labels that are train ids"
        )


def _rows_of_splits(
    source: str, splits: list[str] | None, image_column: str, label_column: str
) -> dict[str, tuple[Rows, dict[str, Any]]]:
    """The requested splits of any dataset with an image and a label column, by default all."""
    available = available_splits(source)
    picked = [pick_split(available, split, source) for split in splits or available]
    return {split: rows_of_dataset(source, split, image_column, label_column) for split in picked}


def _sources_of_download(
    domain: Domain, root: Path, splits: list[str] | None, label_map: str | None
) -> dict[str, SplitSource]:
    """The requested splits of an official download, by default those that are found and have public labels."""
    if not splits:
        public = [name for name, split in domain.splits.items() if split.labelled]
        # If none is found, all are tried, so that the error message lists the missing folders.
        splits = [name for name in public if has_split(domain, root, name)] or public
    names = [SPLIT_ALIASES.get(split, split) for split in splits]
    return {name: pairs_of_download(domain, root, name, label_map) for name in names}


def _common_label_map(domain: Domain, sources: dict[str, SplitSource]) -> str:
    """The label map of all splits; raises ValueError if they have different ones."""
    names = {split: source.label_map for split, source in sources.items()}
    if len(set(names.values())) > 1:
        found = ", ".join(f"{split} by {name}" for split, name in names.items())
        raise ValueError(
            f"{domain.title}: the labels of its splits are converted by different label maps ({found}); prepare them "
            "into different folders with --split"
        )
    return next(iter(names.values()))


def _conversion_record(conversion: Conversion, domain: Domain | None) -> dict[str, Any]:
    """What to record about the conversion of the labels."""
    label_map, classes = conversion.label_map, list(conversion.classes)
    return {
        "raw_to_train_id": {str(raw): int(label_map.lookup[raw]) for raw in np.flatnonzero(label_map.valid).tolist()},
        "classes": classes,
        "evaluation_classes": list(domain.evaluation_classes) if domain else classes,
        "ignore_index": IGNORE_INDEX,
    }


def _earlier_splits(output: Path, preparation: dict[str, Any]) -> dict[str, Any]:
    """The splits that an earlier run finished, if `output` holds the same domain and label map."""
    if not (output / PREPARATION_FILE).is_file():
        unknown = sorted(path.name for path in output.iterdir() if path.name != ".lock" and not is_temporary(path))
        if unknown:
            raise ValueError(f"{output} holds other files, such as {unknown[0]}; give a new or empty folder")
        return {}
    earlier = json.loads((output / PREPARATION_FILE).read_text(encoding="utf-8"))
    for key in ("format", "domain", "label_map", "classes"):
        if earlier.get(key) != preparation[key]:
            raise ValueError(
                f"{output} holds another preparation: its {key} is {earlier.get(key)}, not {preparation[key]}; "
                "give another folder"
            )
    return earlier["splits"]


def report(title: str, split: str, record: dict[str, Any], domain: Domain | None, shown: int = 5) -> None:
    """Prints how many pairs of a split were prepared, and everything that was left out."""
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
            lines = [_reason(item) if key == "skipped" else item for item in items[:shown]]
            more = [f"... all {len(items)} in {PREPARATION_FILE}"] if len(items) > shown else []
            print("\n    ".join([f"  {len(items)} {words}:", *lines, *more]))
    if record["expected_pairs"] not in (None, record["pairs"]):
        print(f"  note: {record['expected_pairs']} pairs were expected")
    known = {f"{height}x{width}" for height, width in domain.sizes} if domain else set()
    unusual = {size: number for size, number in record["sizes"].items() if known and size not in known}
    if unusual:
        print(f"  note: unusual sizes (height x width, images): {unusual}; known: {', '.join(sorted(known))}")


def _reason(skipped: dict[str, str]) -> str:
    return f"{skipped['name']}: {skipped['reason']}"
