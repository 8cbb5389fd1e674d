"""Images and label maps for validation during training."""

import torch
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
        pixel_values = self.image_processor(row["image"], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(label_array(row["label"]).copy())}
