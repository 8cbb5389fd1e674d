"""The rows of a domain in one form, whether they are files of a download or rows of a `datasets.Dataset`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mfuser.data.label_maps import check_sizes, label_ids, read_label
from mfuser.data.layouts import Pair
from mfuser.images_mfuser import rgb_image

try:
    import datasets
    import pyarrow.compute
except ImportError:
    datasets = None


class Row(NamedTuple):
    """
    One decoded row.

    Args:
        image (`Image.Image`):
            The image as RGB, rotated as its EXIF tag says.
        ids (`np.ndarray` of shape `(height, width)`, uint8, *optional*):
            The ids of the label, as they are in the file; `None` without a label.
    """

    image: Image.Image
    ids: np.ndarray | None


class EncodedRow(NamedTuple):
    """One row as the content of its files. `label` is `None` without a label."""

    name: str
    image: bytes
    label: bytes | None
    condition: str | None


class Rows(ABC):
    """The rows of one split of a domain."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def slice(self, first: int, last: int) -> "Rows":
        """Rows `first` to `last` - 1. Their names do not change."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The name of every row; its position where the source has no names."""

    @property
    @abstractmethod
    def has_conditions(self) -> bool:
        """Whether the source names a condition for its rows."""

    @property
    @abstractmethod
    def conditions(self) -> list[str | None]:
        """The condition of every row."""

    @property
    @abstractmethod
    def labelled(self) -> bool:
        """Whether any row has a label; no file is read. Benchmarks publish no labels of test splits."""

    @property
    @abstractmethod
    def identities(self) -> list[Any]:
        """For every row, a JSON-serialisable value that changes when the content of the row changes."""

    @abstractmethod
    def encoded(self) -> Iterator[EncodedRow]:
        """Iterates over the content of the rows' files, without decoding it."""

    @abstractmethod
    def _decode(self, index: int) -> Row:
        """One row, decoded but not checked."""

    def read(self, index: int) -> Row:
        """
        Decodes one row and checks that the image and the label have the same size.

        Raises:
            Exception: What Pillow raises for a file that it cannot decode; ValueError if the sizes differ or the label
                is not an image of ids.
        """
        row = self._decode(index)
        if row.ids is not None:
            check_sizes((row.image.height, row.image.width), row.ids.shape)
        return row


@dataclass(frozen=True)
class DownloadRows(Rows):
    """
    The pairs of an official download.

    Args:
        pairs (`list[Pair]`):
            The pairs, as `find_pairs` lists them.
        class_in_red_channel (`bool`, *optional*, defaults to `False`):
            Whether labels are colour PNGs with the class in the red channel.
    """

    pairs: list[Pair]
    class_in_red_channel: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    def slice(self, first: int, last: int) -> "DownloadRows":
        return DownloadRows(self.pairs[first:last], self.class_in_red_channel)

    @property
    def names(self) -> list[str]:
        return [pair.name for pair in self.pairs]

    @property
    def has_conditions(self) -> bool:
        return self.pairs[0].condition is not None

    @property
    def conditions(self) -> list[str | None]:
        return [pair.condition for pair in self.pairs]

    @property
    def labelled(self) -> bool:
        return any(pair.label is not None for pair in self.pairs)

    @property
    def identities(self) -> list[Any]:
        return [_identity(pair) for pair in self.pairs]

    def encoded(self) -> Iterator[EncodedRow]:
        for pair in self.pairs:
            label = pair.label.read_bytes() if pair.label else None
            yield EncodedRow(pair.name, pair.image.read_bytes(), label, pair.condition)

    def _decode(self, index: int) -> Row:
        pair = self.pairs[index]
        with Image.open(pair.image) as file:
            image = rgb_image(ImageOps.exif_transpose(file))
        if pair.label is None:
            return Row(image, None)
        return Row(image, read_label(pair.label.read_bytes(), self.class_in_red_channel))


def _identity(pair: Pair) -> list[Any]:
    """Changes when a file is replaced, for instance downloaded again because it was damaged."""
    return [pair.name, pair.condition, *(_size_and_time(file) for file in (pair.image, pair.label) if file)]


def _size_and_time(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class DatasetRows(Rows):
    """
    The rows of a dataset with columns `image` and `label` and, where the source has them, `name` and `condition`.

    Args:
        dataset (`datasets.Dataset`):
            The dataset, as `open_columns` returns it.
        first (`int`, *optional*, defaults to 0):
            The position of the first row in the whole split, from which rows without a name are named.
    """

    dataset: Any
    first: int = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def slice(self, first: int, last: int) -> "DatasetRows":
        return DatasetRows(self.dataset.select(range(first, last)), self.first + first)

    @property
    def names(self) -> list[str]:
        if "name" in self.dataset.column_names:
            return list(self.dataset["name"])
        return [f"{self.first + row:08d}" for row in range(len(self))]

    @property
    def has_conditions(self) -> bool:
        return "condition" in self.dataset.column_names

    @property
    def conditions(self) -> list[str | None]:
        return list(self.dataset["condition"]) if self.has_conditions else [None] * len(self)

    @property
    def labelled(self) -> bool:
        labels = self._undecoded.select_columns("label").with_format("arrow")
        return any(batch["label"].null_count < len(batch["label"]) for batch in labels.iter(1000))

    @property
    def identities(self) -> list[Any]:
        identities: list[Any] = [[self._undecoded._fingerprint, self.first + row] for row in range(len(self))]
        for column in ("image", "label"):
            cells = self._undecoded.select_columns(column).with_format("arrow")
            paths = (path for batch in cells.iter(1000) for path in _paths_without_content(batch[column]))
            for identity, path in zip(identities, paths, strict=True):
                if path is not None and Path(path).is_file():
                    identity.append(_size_and_time(Path(path)))
        return identities

    @cached_property
    def _undecoded(self):
        """The dataset with its images and labels as encoded bytes or paths."""
        dataset = self.dataset
        for column in ("image", "label"):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        return dataset

    def encoded(self) -> Iterator[EncodedRow]:
        for name, row in zip(self.names, self._undecoded, strict=True):
            yield EncodedRow(name, _file_content(row["image"]), _file_content(row["label"]), row.get("condition"))

    def _decode(self, index: int) -> Row:
        row = self.dataset[index]
        image = rgb_image(ImageOps.exif_transpose(row["image"]))
        return Row(image, None if row["label"] is None else label_ids(row["label"]))


def _paths_without_content(cells) -> list[str | None]:
    """The path in each undecoded image of an Arrow column; `None` for those that hold the content of a file."""
    content, paths = (pyarrow.compute.struct_field(cells, field) for field in ("bytes", "path"))
    return pyarrow.compute.if_else(pyarrow.compute.is_null(content), paths, None).to_pylist()


def _file_content(value: dict | None) -> bytes:
    """The bytes of an undecoded image, which holds them or a path; none for an empty cell, which is a bad pair."""
    if value is None:
        return b""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
