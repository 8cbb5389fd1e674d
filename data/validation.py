"""Images and label maps for validation during training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.data.augmentation import checked_label
from mfuser.data.label_maps import check_sizes, image_size
from mfuser.data.unreadable import UnreadableRowError, check_label, read_row
from mfuser.images_mfuser import rgb_image


class ValidationDataset(Dataset):
    """
    Images prepared by an image processor, with their label maps at full size.

    Args:
        dataset (`datasets.Dataset`):
            Rows with the columns `image` and `label`.
        image_processor ([`MFuserImageProcessor`]):
            Resizes and normalises the images. The label maps are not resized.
        num_labels (`int`, *optional*):
            Number of classes. A label map with another value than these and 255 cannot be read.
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            Whether a row that cannot be read is `{"error": message}`, which the trainer counts.

    Raises:
        ValueError: If (on access) a row cannot be read.
    """

    def __init__(self, dataset, image_processor, num_labels: int = IGNORE_INDEX, skip_unreadable: bool = False):
        self.dataset = dataset.select_columns(["image", "label"])
        self.image_processor = image_processor
        self.num_labels, self.skip_unreadable = num_labels, skip_unreadable

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return read_row(self.dataset, index, f"Row {index} of the validation data", self._sample)
        except UnreadableRowError as error:
            if not self.skip_unreadable:
                raise
            return {"error": str(error)}

    def _sample(self, row: dict[str, Any]) -> dict[str, Any]:
        label = checked_label(row["label"])
        check_label(label, self.num_labels)
        check_sizes(image_size(row["image"]), label.shape)
        return validation_sample(row["image"], label, self.image_processor)


def validation_sample(image: Image.Image, label: np.ndarray, image_processor) -> dict[str, torch.Tensor]:
    """The prepared pixels of an image and its label map at full size, as the model takes them."""
    pixel_values = image_processor(rgb_image(image), do_pad=False, return_tensors="pt")["pixel_values"][0]
    return {"pixel_values": pixel_values, "labels": torch.from_numpy(label.copy())}


def evenly_spaced(number: int | None, total: int) -> list[int]:
    """
    Positions of `number` rows out of `total`, evenly spaced; all of them for `None` or if there are fewer.

    Raises:
        ValueError: If `number` is less than 1.
    """
    if number is None or number >= total:
        return list(range(total))
    if number < 1:
        raise ValueError(f"the number of images is {number}; it must be at least 1")
    return [(2 * index + 1) * total // (2 * number) for index in range(number)]


def dataset_files(dataset) -> set[Path]:
    """The files on disk that hold the rows of a `datasets.Dataset`; none if the rows are in memory."""
    return {Path(file["filename"]).resolve() for file in getattr(dataset, "cache_files", ())}
