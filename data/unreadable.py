"""Rows that cannot be read: an error that names the row, or skipped with a warning and counted."""

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from transformers.utils import logging

from mfuser.class_names_mfuser import IGNORE_INDEX

logger = logging.get_logger("transformers.mfuser.data")
T = TypeVar("T")


class UnreadableRowError(ValueError):
    """An image or a label cannot be decoded, or they do not fit together. The message names the row."""


def read_row(dataset: Any, row: int, title: str, make: Callable[[dict[str, Any]], T]) -> T:
    """
    Decodes a row of a dataset and passes it to a function.

    Args:
        dataset (`datasets.Dataset`):
            The dataset.
        row (`int`):
            The row.
        title (`str`):
            The name of the row in the error message.
        make (`Callable`):
            Takes the decoded row.

    Raises:
        UnreadableRowError: If decoding or `make` fails. Pillow raises errors of almost any type for damaged files.
    """
    try:
        return make(dataset[row])
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableRowError(f"{title}: {error}") from error


def check_label(label: np.ndarray, num_labels: int) -> None:
    """Raises `ValueError` if a label map holds a value that is neither a class id nor 255."""
    unknown = label[(label >= num_labels) & (label != IGNORE_INDEX)]
    if unknown.size:
        values = np.unique(unknown)[:10].tolist()
        raise ValueError(
            f"the label holds {values}, which are neither classes (0..{num_labels - 1}) nor {IGNORE_INDEX}"
        )


class SkippedRows:
    """
    The rows that were skipped, counted over all worker processes of a data loader.

    Args:
        num_rows (`int`):
            Number of rows of the dataset.
        skip (`bool`):
            Whether rows that cannot be read are skipped. Otherwise they are errors.
    """

    def __init__(self, num_rows: int, skip: bool):
        self.skip = skip
        self.flags = torch.zeros(num_rows, dtype=torch.bool).share_memory_()

    def first_readable(self, read: Callable[[int], T], row: int, rows: range) -> T:
        """
        The result of `read` for a row, or for the next one that can be read.

        Args:
            read (`Callable`):
                Reads a row.
            row (`int`):
                The row.
            rows (`range`):
                The rows that may replace it.

        Raises:
            UnreadableRowError: If rows are not skipped, or none can be read.
        """
        for candidate in chain(range(row, rows.stop), range(rows.start, row)):
            try:
                return read(candidate)
            except UnreadableRowError as error:
                if not self.skip:
                    raise
                if not self.flags[candidate]:
                    logger.warning(f"{error}; the row is skipped.")
                self.flags[candidate] = True
        raise UnreadableRowError(f"none of the rows {rows.start} to {rows.stop - 1} can be read")


__all__ = ["SkippedRows", "UnreadableRowError", "check_label", "read_row"]
