"""Label files: reading the ids they hold, and mapping them to train ids."""

from collections.abc import Iterable
from io import BytesIO

import numpy as np
from PIL import Image

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.images_mfuser import check_is_lossless

EXIF_ORIENTATION = 0x0112


class LabelMap:
    """
    A table from the ids in a dataset's label files to train ids.

    Args:
        targets (`dict[int, int]`):
            The train id of each raw id. Valid raw ids that are not listed become 255, ignored.
        valid_ids (`Iterable[int]`):
            Every raw id that a label file of this dataset may hold.

    Attributes:
        lookup (`np.ndarray` of shape `(256,)`, uint8):
            The train id of each raw id.
        valid (`np.ndarray` of shape `(256,)`, bool):
            Whether a label file may hold the raw id.
    """

    def __init__(self, targets: dict[int, int], valid_ids: Iterable[int]):
        self.lookup = np.full(256, IGNORE_INDEX, dtype=np.uint8)
        self.lookup[list(targets)] = list(targets.values())
        self.valid = np.zeros(256, dtype=bool)
        self.valid[list(valid_ids)] = True

    @classmethod
    def identity(cls, num_labels: int) -> "LabelMap":
        """The map for labels that are train ids already: 0 to `num_labels` - 1, and 255 ignored."""
        return cls({index: index for index in range(num_labels)}, [*range(num_labels), IGNORE_INDEX])

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """
        Maps raw ids to train ids.

        Args:
            ids (`np.ndarray` of shape `(height, width)`, uint8):
                The raw ids of a label.

        Returns:
            `np.ndarray` of shape `(height, width)`, uint8: Train ids.

        Raises:
            ValueError: If the label holds an id that is not valid.
        """
        # Pillow's histogram and table look-up are about four times as fast as numpy's and use no extra memory.
        image = Image.fromarray(ids)
        unexpected = np.flatnonzero((np.array(image.histogram()) > 0) & ~self.valid).tolist()
        if unexpected:
            raise ValueError(f"label values {unexpected} are not among the valid ids {_ranges(self.valid)}")
        return np.array(image.point(self.lookup.tolist()))


def _ranges(mask: np.ndarray) -> str:
    """The true positions of a boolean array as text, for example '0-18, 255'."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    spans = [(first, after - 1) for first, after in edges.reshape(-1, 2).tolist()]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def image_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image after it is rotated as its EXIF tag says."""
    width, height = image.size
    rotated = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    return (width, height) if rotated else (height, width)


def check_sizes(image: tuple[int, int], label: tuple[int, int]) -> None:
    """Raises ValueError unless an image and its label, given as (height, width), have the same size."""
    if image != label:
        raise ValueError(
            f"the image has {image[0]}x{image[1]} pixels, its label {label[0]}x{label[1]} (height x width)"
        )


def label_ids(label: Image.Image) -> np.ndarray:
    """
    The ids of a label image: its values, or the palette indices of a palette image.

    Args:
        label (`Image.Image`):
            A label of one channel.

    Returns:
        `np.ndarray` of shape `(height, width)`, uint8: Ids.

    Raises:
        ValueError: If the label is a JPEG or a colour image, or holds an id above 255.
    """
    check_is_lossless(label)
    if label.mode in ("L", "P", "1"):
        return np.asarray(label).astype(np.uint8, copy=False)
    if label.mode.startswith("I"):
        ids = np.asarray(label)
        if ids.min() < 0 or ids.max() > 255:
            raise ValueError(f"label values range from {ids.min()} to {ids.max()}; ids must be in 0-255")
        return ids.astype(np.uint8)
    raise ValueError(f"the label has mode {label.mode}; expected one channel of ids (mode L, P or I), not colours")


def read_label(data: bytes, class_in_red_channel: bool = False) -> np.ndarray:
    """
    The ids in an encoded label file.

    SYNTHIA's labels have 16 bits per sample, with the class in red and the instance in green. Pillow has no such mode
    and keeps only the high byte, which is zero. Unpacking the samples as little-endian keeps the low byte.

    Args:
        data (`bytes`):
            The content of the file.
        class_in_red_channel (`bool`, *optional*, defaults to `False`):
            Whether the file is an RGB PNG of 8 or 16 bits with the ids in the red channel.

    Returns:
        `np.ndarray` of shape `(height, width)`, uint8: Ids.

    Raises:
        ValueError: If the file is not such a label, or holds an id above 255.
    """
    with Image.open(BytesIO(data)) as label:
        if not class_in_red_channel:
            return label_ids(label)
        if label.mode != "RGB" or label.format != "PNG":
            raise ValueError(f"the label is a {label.format} of mode {label.mode}; expected an RGB PNG, ids in red")
        codec, extents, offset, raw_mode = label.tile[0]
        red = np.asarray(label.getchannel("R"))
    if raw_mode != "RGB;16B":
        return red
    if red.any():
        raise ValueError(f"label values reach at least {int(red.max()) << 8}; ids must be in 0-255")
    with Image.open(BytesIO(data)) as label:
        # Some releases of Pillow declare a class of their own for plain tuples.
        label.tile = [(codec, extents, offset, "RGB;16L")]  # type: ignore[list-item, unused-ignore]
        return np.asarray(label.getchannel("R"))
