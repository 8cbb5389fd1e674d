"""Images and label maps as arrays: conversion of all accepted kinds, checks of values, resizing, and batches."""

import base64
import binascii
import os
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from huggingface_hub.utils import get_session, hf_raise_for_status
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, PILImageResampling, SizeDict
from transformers.utils import logging

from .class_names_mfuser import IGNORE_INDEX

logger = logging.get_logger(__name__)

# A floating-point image whose largest value is between these may hold 0 to 1, exceeded by a sharpening resampling, or
# be a nearly black image of 0 to 255.
AMBIGUOUS_RANGE = (0, 10)
UNIT_RANGE_TOLERANCE = 0.5  # overshoot of bicubic resampling; normalised photographs exceed it
NORMALISED_LIMIT = 10  # in standard deviations
LARGEST_LABEL = np.iinfo(np.int32).max
# The fields that `size` of an image processor may have.
SUPPORTED_SIZES = (
    {"shortest_edge", "longest_edge"},
    {"shortest_edge"},
    {"longest_edge"},
    {"max_height", "max_width"},
    {"height", "width"},
)


def to_numpy(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """An array or a tensor as an array; bfloat16, which NumPy lacks, becomes float32."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        return (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        return image
    raise ValueError(f"Got {type(image).__name__}; expected a PIL image, an array, a tensor or a flat list of these.")


def to_uint8_or_float32(image: np.ndarray) -> np.ndarray:
    """
    Converts integers and booleans to uint8, and floating-point values to float32.

    Raises:
        ValueError: If values are not finite, integers are out of range, or the dtype is neither.
    """
    if image.dtype == np.uint8:
        return image
    if image.dtype == bool:
        return image.astype(np.uint8) * 255
    if image.dtype.kind == "f":
        with np.errstate(over="ignore"):
            image = image.astype(np.float32)
        if not np.isfinite(image).all():
            raise ValueError("The image holds NaN or infinite values; all values must be finite.")
        return image
    if image.dtype.kind == "u" and image.dtype.itemsize == 2:
        if 0 < image.max() <= 255:
            logger.warning(
                "A 16-bit image holds no value above 255, so it is almost black once it is scaled to 8 bits. "
                "If it holds 8-bit values, convert it to uint8."
            )
        return ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if image.dtype.kind in "iu":
        if image.min() < 0 or image.max() > 255:
            raise ValueError(
                f"The image holds {image.dtype} values from {image.min()} to {image.max()}; integers must lie in "
                "0..255, or have dtype uint16 for a 16-bit image."
            )
        return image.astype(np.uint8)
    raise ValueError(f"The image has dtype {image.dtype}; it must hold integers, booleans or floating-point values.")


def rgb_image(image: Image.Image) -> Image.Image:
    """
    Converts an image to RGB. 16-bit values are scaled to 8 bits, which `Image.convert` would clip at 255.

    Raises:
        ValueError: If the range of its values is unknown (mode F), or if integers exceed 16 bits.
    """
    if image.mode == "F":
        raise ValueError("the image has mode F, floating-point values of an unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
            values = values.astype(np.uint16)  # older releases of Pillow open a 16-bit greyscale PNG in this mode
        image = Image.fromarray(to_uint8_or_float32(values))
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(source: str) -> Image.Image:
    """
    Opens an image, rotated as its EXIF tag says, in its own mode. Transformers' `load_image` clips 16-bit values.

    Args:
        source (`str`):
            A path, a URL, or the content of a file in base64, also as a `data:` URL.

    Raises:
        OSError, ValueError: If there is no image.
    """
    file: str | BytesIO = source
    try:
        if source.startswith(("http://", "https://")):
            response = get_session().get(source)
            hf_raise_for_status(response)
            file = BytesIO(response.content)
        elif not os.path.isfile(source):
            file = BytesIO(base64.decodebytes(source.rpartition(",")[2].encode()))
        with Image.open(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
    except (binascii.Error, UnidentifiedImageError):
        raise ValueError(f"{source[:200]} is neither an image file, nor the URL of one, nor one in base64") from None
    return image


def check_range(image: np.ndarray, do_rescale: bool | None, do_normalize: bool | None) -> None:
    """
    Checks that the values of an image are in the range that the processing assumes.

    Args:
        image (`np.ndarray`):
            An image of uint8 or float32, before rescaling.
        do_rescale, do_normalize (`bool`):
            The settings of the image processor.

    Raises:
        ValueError: If values are out of the range, or if their range is ambiguous.
    """
    if do_rescale and image.dtype == np.uint8:
        return
    low, high = float(image.min()), float(image.max())
    found = f"The {'integer' if image.dtype == np.uint8 else 'floating-point'} image holds values from {low:g} to "
    found += f"{high:g}; with `do_rescale={bool(do_rescale)}`"
    if do_rescale:
        if low < 0 or high > 255 or AMBIGUOUS_RANGE[0] < high <= AMBIGUOUS_RANGE[1]:
            raise ValueError(
                f"{found} they must lie in 0..255, with a maximum above {AMBIGUOUS_RANGE[1]}, below which they could "
                "be 0..1. Pass `do_rescale=False` for values in 0..1, also `do_normalize=False` for normalised "
                "values, or uint8 for a nearly black image."
            )
    elif do_normalize:
        if low < -UNIT_RANGE_TOLERANCE or high > 1 + UNIT_RANGE_TOLERANCE:
            raise ValueError(
                f"{found} they must lie in 0..1. Leave `do_rescale` out for values in 0..255, or also pass "
                "`do_normalize=False` for normalised values."
            )
    elif max(-low, high) > NORMALISED_LIMIT:
        raise ValueError(
            f"{found} and `do_normalize=False` they must be normalised, so at most {NORMALISED_LIMIT} in absolute "
            "value. Leave both out for values in 0..255."
        )


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Returns (height, width) times `scale`, rounded half up as in mmcv's `imrescale`, and at least 1 pixel each."""
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resized_size(height: int, width: int, size: SizeDict | dict[str, int]) -> tuple[int, int]:
    """
    Returns the (height, width) in pixels to which an image is resized.

    `{"height", "width"}` is exact. All other forms keep the aspect ratio and give the largest image within every limit
    that they name, rounded half up as in mmcv's `imrescale`, which the published test protocols use.
    """
    size = size if isinstance(size, SizeDict) else SizeDict(**size)
    if size.height is not None:
        return size.height, size.width
    limits = (
        (size.shortest_edge, min(height, width)),
        (size.longest_edge, max(height, width)),
        (size.max_height, height),
        (size.max_width, width),
    )
    scale = min(limit / length for limit, length in limits if limit is not None)
    return scaled_size(height, width, scale)


def resize(array: np.ndarray, size: tuple[int, int], resample: PILImageResampling | int) -> np.ndarray:
    """Resizes an array of shape (H, W) of uint8, int32 or float32 by PIL, which keeps these dtypes."""
    height, width = size
    return np.asarray(Image.fromarray(array).resize((width, height), resample))


def check_is_lossless(label: Image.Image) -> None:
    """Raises `ValueError` if a label map was read from a JPEG file."""
    if label.format == "JPEG":
        raise ValueError("the label is a JPEG; lossy compression changes ids, so labels must be PNG")


def label_array(segmentation_map: ImageInput, do_reduce_labels: bool | None) -> np.ndarray:
    """
    Converts a label map to int32 of shape (H, W).

    Raises:
        ValueError: If it has several channels or values that are not class ids, or is a JPEG.
    """
    if isinstance(segmentation_map, Image.Image):
        check_is_lossless(segmentation_map)
        labels = np.asarray(segmentation_map)
    else:
        labels = to_numpy(segmentation_map)
        if labels.ndim == 3 and labels.shape[0] == 1:
            labels = labels[0]
    if labels.ndim != 2 or labels.size == 0:
        raise ValueError(
            f"A segmentation map has the shape {labels.shape}; it must have one channel. "
            "Convert a colour-coded map to class ids first, and open a palette PNG with `PIL.Image.open`."
        )
    if labels.dtype.kind not in "iub":
        raise ValueError(f"A segmentation map has dtype {labels.dtype}; it must hold integers.")
    for label in (labels.min(), labels.max()):
        if not 0 <= label <= LARGEST_LABEL:
            raise ValueError(
                f"A segmentation map holds the label {label}; labels must be class ids from 0 to {LARGEST_LABEL}, or "
                f"{IGNORE_INDEX} for ignored pixels."
            )
    labels = labels.astype(np.int32)
    if do_reduce_labels:
        labels = np.where((labels == 0) | (labels == IGNORE_INDEX), IGNORE_INDEX, labels - 1)
    return labels


class MFuserBatchFeature(BatchFeature):
    """
    A batch of images, and what was done to each of them.

    Both attributes survive `to`, copying and pickling, and are not passed on by `model(**inputs)`.

    Args:
        image_sizes (`list[tuple[int, int]]`):
            (height, width) of each image as it was given.
        input_sizes (`list[tuple[int, int]]`):
            (height, width) of each image after resizing and before padding.
        kwargs:
            See [`BatchFeature`].
    """

    def __init__(
        self,
        *args,
        image_sizes: Sequence[tuple[int, int]] = (),
        input_sizes: Sequence[tuple[int, int]] = (),
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.image_sizes, self.input_sizes = list(image_sizes), list(input_sizes)

    def __getstate__(self):
        return super().__getstate__() | {"sizes": (self.image_sizes, self.input_sizes)}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.image_sizes, self.input_sizes = state["sizes"]
