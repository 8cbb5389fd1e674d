"""Images and label maps for validation during training."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from mfuser.data.augmentation import label_array


class ValidationDataset(Dataset):
    """
    Images prepared by an image processor, with their label maps at full size.

    Args:
        dataset (`datasets.Dataset`):
            Rows with the columns `image` and `label`.
        image_processor ([`MFuserImageProcessor`]):
            Resizes and normalises the images. The label maps are not resized.
    """

    def __init__(self, dataset, image_processor):
        self.dataset = dataset.select_columns(["image", "label"])
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.dataset[index]
        return validation_sample(row["image"], label_array(row["label"]), self.image_processor)


def validation_sample(image: Image.Image, label: np.ndarray, image_processor) -> dict[str, torch.Tensor]:
    """The prepared pixels of an image and its label map at full size, as the model takes them."""
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"][0]
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
