"""Opening datasets with an image and a label column from any location, in a uniform form."""

import logging
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from mfuser.class_names_mfuser import IGNORE_INDEX, checked_class_names
from mfuser.data.label_maps import LabelMap, check_sizes, image_size, label_ids
from mfuser.data.layouts import has_split
from mfuser.data.tables import DOMAINS
from mfuser.errors import one_line
from mfuser.files import read_json

try:
    import datasets
    import pyarrow as pa
except ImportError:
    datasets = None


logger = logging.getLogger(__name__)

# Written into a prepared folder: its domain, classes and label map, and the pairs that were skipped with the reason.
PREPARATION_FILE = "mfuser_preparation.json"
NAMES_FILE = "id2label.json"  # the class names of any other dataset
LONGEST_CAUSE = 200  # characters of an error of `datasets`, which may list every column of every file
SPLIT_ALIASES = {"training": "train", "val": "validation", "valid": "validation", "testing": "test"}


class LoadedDomain(NamedTuple):
    """
    A dataset opened by `load_domain`.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Columns `image` and `label`, decoded to PIL images (label values are train ids, 255 ignored), and, where
            the source has them, `name` and `condition`.
        id2label (`dict[int, str]`):
            The name of each train id.
        preparation (`dict`):
            The record that `mfuser prepare` wrote; empty for other sources.
    """

    dataset: Any
    id2label: dict[int, str]
    preparation: dict[str, Any]


def load_domain(
    source: str | Path,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    id2label: dict[int, str] | str | Path | None = None,
    streaming: bool = False,
    skip_unreadable: bool = False,
) -> LoadedDomain:
    """
    Opens a dataset with an image and a label column.

    Args:
        source (`str` or `Path`):
            A folder written by `mfuser prepare` or `save_to_disk`, a parquet file, a folder of parquet files named
            after their splits, or anything else that `datasets.load_dataset` accepts, such as a Hub id.
        split (`str`, *optional*):
            The split. Required if the source has several.
        image_column, label_column (`str`, *optional*, defaults to `"image"` and `"label"`):
            The names of the two columns in the source.
        id2label (`dict[int, str]`, `str` or `Path`, *optional*):
            The class names: a dictionary, a JSON file, or the name of a known domain. Not required for a prepared
            folder, nor if the folder or the Hub repository contains an `id2label.json`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return an `IterableDataset`, without copying or downloading the data first.
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            Whether a sampled row that cannot be read is a warning.

    Returns:
        `LoadedDomain`: The dataset, its class names and the record of its preparation.

    Raises:
        FileNotFoundError: If `source` is a path that does not exist.
        ValueError: If the split is missing or ambiguous, a column is missing or of another type, the class names are
            unknown or not numbered 0 to n - 1, or one of a few sampled labels holds colours or values without a name.
    """
    source = str(source)
    dataset, split = open_columns(source, split, image_column, label_column, streaming)
    preparation = _side_file(source, PREPARATION_FILE) or {}
    names = class_names(source, id2label, preparation)
    positions = [0] if streaming else _first_middle_last(dataset)
    _check_samples(positions, dataset, LabelMap.identity(len(names)), f"{source}, split {split}", skip_unreadable)
    return LoadedDomain(dataset, names, preparation)


def parse_id2label(names: dict | str | Path) -> dict[int, str]:
    """
    Class names as a dictionary from ids to names, in the order of the ids.

    Args:
        names (`dict`, `str` or `Path`):
            A dictionary whose keys are integers or digits, a JSON file of one, or the name of a known domain.

    Raises:
        ValueError: If `names` is none of these, the ids are not 0 to n - 1 with n at most 255, or names repeat or are
            empty.
    """
    if isinstance(names, (str, Path)):
        if str(names) in DOMAINS:
            return DOMAINS[str(names)].id2label
        if not Path(names).is_file():
            raise ValueError(f"class names: {names} is neither a JSON file nor a domain ({', '.join(DOMAINS)})")
        given = read_json(Path(names))
    else:
        given = names
    try:
        ordered = {int(index): name for index, name in sorted(given.items(), key=lambda item: int(item[0]))}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"class names must be a dictionary from ids to names, not {given!r}") from None
    if list(ordered) != list(range(len(ordered))) or not 1 <= len(ordered) <= IGNORE_INDEX:
        raise ValueError(
            f"class ids are {list(ordered)}; they must be 0 to n - 1 with n from 1 to {IGNORE_INDEX} (255 is ignored)"
        )
    return dict(enumerate(checked_class_names(list(ordered.values()))))


def pick_split(available: list[str], wanted: str | None, source: str) -> str:
    """
    The split to open.

    Args:
        available (`list[str]`):
            The splits of the source.
        wanted (`str`, *optional*):
            The requested split. `val` and the folder names of Mapillary are understood. By default the only split.
        source (`str`):
            The name of the source in error messages.

    Raises:
        ValueError: If there is no such split, or no split is requested and there are several.
    """
    if wanted is None and len(available) == 1:
        return available[0]
    for candidate in (wanted, SPLIT_ALIASES.get(wanted or "")):
        if candidate in available:
            return candidate
    problem = "has several splits; name one of them" if wanted is None else f"has no split {wanted!r}; it has"
    raise ValueError(f"{source} {problem}: {', '.join(available)}")


def parquet_splits(source: str | Path) -> dict[str, list[str]]:
    """The parquet files of each split, of one file or of a folder (train.parquet, train-00000-of-00002.parquet)."""
    source = Path(source)
    files = [source] if source.suffix == ".parquet" else sorted(source.glob("*.parquet"))
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(re.sub(r"-\d+-of-\d+$", "", file.stem), []).append(str(file))
    return splits


def available_splits(source: str | Path) -> list[str]:
    """
    The splits of anything that `load_domain` opens.

    Raises:
        FileNotFoundError: If `source` is a path that does not exist.
        ValueError: If `source` is a download that must be prepared first, or is not completely prepared.
    """
    _require_datasets()
    source, path = str(source), Path(source)
    if not path.exists() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise FileNotFoundError(f"{source} does not exist")
    if (path / "dataset_dict.json").is_file():
        return read_json(path / "dataset_dict.json")["splits"]
    if (path / "state.json").is_file():
        return [read_json(path / "state.json")["_split"] or path.name]
    if path.is_dir() and _side_file(source, PREPARATION_FILE):
        raise ValueError(f"{source} is not completely prepared: run the same `mfuser prepare` command again")
    if files := parquet_splits(path):
        return list(files)
    for domain in DOMAINS.values():
        if path.is_dir() and any(has_split(domain, path, split) for split in domain.splits):
            raise ValueError(
                f"{source} looks like the download of {domain.title}: "
                f"run `mfuser prepare {domain.name} {source} OUTPUT` once and load OUTPUT"
            )
    return datasets.get_dataset_split_names(source)


def open_columns(
    source: str | Path, split: str | None, image_column: str, label_column: str, streaming: bool = False
) -> tuple[Any, str]:
    """
    Opens a source of `load_domain` without reading its labels.

    Args:
        source, split, image_column, label_column, streaming:
            As in `load_domain`.

    Returns:
        `tuple(datasets.Dataset or datasets.IterableDataset, str)`: The dataset with columns `image` and `label`, cast
        to `datasets.Image`, and `name` and `condition` where it has them; and the name of the split.
    """
    _require_datasets()
    source = str(source)
    with _naming_the_source(source):
        split = pick_split(available_splits(source), split, source)
        dataset = _open(source, split, streaming)
    return _normalise_columns(dataset, image_column, label_column, source), split


def _open(source: str, split: str, streaming: bool):
    path = Path(source)
    folder = path / split if (path / "dataset_dict.json").is_file() else path
    if (folder / "state.json").is_file():
        dataset = datasets.load_from_disk(str(folder))
        if streaming:
            files = read_json(folder / "state.json")["_data_files"]
            dataset = dataset.to_iterable_dataset(num_shards=max(1, min(len(files), len(dataset))))
        return dataset
    if folder != path:
        raise ValueError(f"{folder} is not completely prepared: run the same `mfuser prepare` command again")
    if files := parquet_splits(path):
        return datasets.load_dataset("parquet", data_files={split: files[split]}, split=split, streaming=streaming)
    return datasets.load_dataset(source, split=split, streaming=streaming)


def class_names(source: str, id2label=None, preparation: dict | None = None) -> dict[int, str]:
    """
    The class names of a source of `load_domain`.

    Args:
        source (`str`):
            The source.
        id2label (`dict[int, str]`, `str` or `Path`, *optional*):
            The names as given by the user, see `load_domain`. By default those of the source.
        preparation (`dict`, *optional*):
            The record of the preparation, if the source was prepared.

    Raises:
        ValueError: If no names are known, or `id2label` differs from those of the source.
    """
    own: dict[int, str] | None
    if preparation:
        own, origin = parse_id2label(dict(enumerate(preparation["classes"]))), "was prepared with"
    else:
        own, origin = names_beside(source), f"has an {NAMES_FILE} with"
    if id2label is None:
        if own is None:
            raise ValueError(
                f"{source} does not name its classes: give id2label, a dictionary, a JSON file or one of "
                f"{', '.join(DOMAINS)}"
            )
        return own
    names = parse_id2label(id2label)
    if own and names != own:
        different = [index for index in sorted(own | names) if own.get(index) != names.get(index)]
        listed = ", ".join(f"{index} is {own.get(index)!r}, not {names.get(index)!r}" for index in different[:3])
        more = f", and {len(different) - 3} more" if len(different) > 3 else ""
        given = "id2label" if isinstance(id2label, dict) else id2label
        raise ValueError(f"{source} {origin} other classes than {given}: {listed}{more}")
    return names


def names_beside(source: str) -> dict[int, str] | None:
    """
    The names of the ids in the labels of a source by its `id2label.json`; `None` without such a file.

    Raises:
        ValueError: If the file does not hold class names.
    """
    names = _side_file(source, NAMES_FILE)
    try:
        return None if names is None else parse_id2label(names)
    except ValueError as error:
        raise ValueError(f"{source}, {NAMES_FILE}: {error}") from None


def _side_file(source: str, file_name: str) -> dict | None:
    """A JSON file of a source: in its folder or the parent (a split was named), or in its Hub repository."""
    path = Path(source)
    if path.exists():
        found = (folder / file_name for folder in (path, path.parent) if (folder / file_name).is_file())
        file = next(found, None)
        return None if file is None else read_json(file)
    try:
        return read_json(Path(hf_hub_download(source, file_name, repo_type="dataset")))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None


def _require_datasets() -> None:
    if datasets is None:
        raise ImportError("loading a dataset requires the library datasets: pip install 'mfuser[train]'")


@contextmanager
def _naming_the_source(source: str) -> Iterator[None]:
    """Replaces errors of `datasets` that name neither the source nor the problem."""
    try:
        yield
    except (datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        cause = textwrap.shorten(one_line(error.__cause__ or error), LONGEST_CAUSE, placeholder="...")
        raise ValueError(
            f"{source} cannot be read as a dataset ({cause}); it must be a folder written by `mfuser "
            "prepare` or `save_to_disk`, parquet files named after their splits, or the Hub id of a dataset"
        ) from error


def _normalise_columns(dataset, image_column: str, label_column: str, source: str):
    """The dataset with its image and label columns cast to `datasets.Image` and named `image` and `label`."""
    if image_column == label_column:
        raise ValueError(f"image and label cannot both be column {image_column!r} of {source}")
    features = dataset.features or dataset._resolve_features().features
    for role, column in (("image", image_column), ("label", label_column)):
        if column not in features:
            raise ValueError(f"{source} has no {role} column {column!r}; its columns are {', '.join(features)}")
        if not _holds_images(features[column]):
            raise ValueError(f"column {column!r} of {source} holds {features[column]}, not {role} images")
        dataset = dataset.cast_column(column, datasets.Image())
    optional = [column for column in ("name", "condition") if column in features]
    kept = [column for column in optional if column not in (image_column, label_column)]
    dataset = dataset.select_columns([image_column, label_column, *kept])
    # Renamed in one step, so that swapped names (image_column="label") work too.
    renamed = {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    return dataset.rename_columns(renamed) if renamed else dataset


def _holds_images(feature) -> bool:
    """Whether a column holds images or can be cast to them: encoded bytes, paths, or {bytes, path}."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary", "string", "large_string")
    return isinstance(feature, datasets.Image)


def _first_middle_last(dataset) -> list[int]:
    """The positions of those three rows, fewer if the dataset has fewer."""
    return sorted({0, len(dataset) // 2, len(dataset) - 1}) if len(dataset) else []


def _check_samples(
    positions: list[int], dataset: Any, label_map: LabelMap, source: str, skip_unreadable: bool
) -> None:
    """Checks a few rows, so that wrong columns, colour labels and unnamed classes are found early."""
    if not positions:
        raise ValueError(f"{source} is empty")
    for position in positions:
        try:
            row = next(iter(dataset.take(1))) if not hasattr(dataset, "__len__") else dataset[position]
            if row["label"] is not None:
                check_sizes(image_size(row["image"]), label_map(label_ids(row["label"])).shape)
        except StopIteration:
            raise ValueError(f"{source} is empty") from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises errors of almost any type for damaged files
            if not skip_unreadable:
                raise ValueError(f"{source}: row {position}: {error}") from error
            logger.warning("%s: row %d: %s", source, position, error)
