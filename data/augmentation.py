"""
Training transforms of the published recipe: resize, crop, flip, photometric distortion, normalise, pad.

Ranges, order and rounding follow MMSegmentation's `Resize`, `RandomCrop`, `RandomFlip`, `PhotoMetricDistortion`,
`Normalize` and `Pad` as configured for MFuser. Resizing and HSV follow OpenCV's definitions, implemented in numpy.

All random numbers of a sample come from a generator seeded by (seed, epoch, position in the epoch). The sample is
therefore the same in every worker, and after the training is resumed.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.data.draws import AUGMENTATION_STREAM, Draw, random_generator
from mfuser.data.label_maps import check_sizes, label_ids
from mfuser.data.unreadable import SkippedRows, check_label, read_row
from mfuser.images_mfuser import rgb_image, scaled_size

# A rejected crop is redrawn at most this number of times; the last one is kept unchecked, as in the reference.
REDRAWS = 10


class TrainingAugmentation:
    """
    The training transforms in the reference's order. The defaults are the published settings.

    Args:
        crop_size (`int`, *optional*, defaults to 512):
            Side of the square crop in pixels.
        scale_range (`tuple[float, float]`, *optional*, defaults to `(0.5, 2.0)`):
            Range of the factor, drawn uniformly, by which the image is resized. The aspect ratio is kept.
        max_class_ratio (`float`, *optional*, defaults to 0.75):
            Upper limit of the share of a crop's labelled pixels that belong to one class. Crops above it are redrawn,
            up to 10 times.
        flip_probability (`float`, *optional*, defaults to 0.5):
            Probability of a horizontal flip.
        brightness_delta (`float`, *optional*, defaults to 32):
            Maximum brightness offset, for pixels in [0, 255].
        contrast_range (`tuple[float, float]`, *optional*, defaults to `(0.5, 1.5)`):
            Range of the contrast factor.
        saturation_range (`tuple[float, float]`, *optional*, defaults to `(0.5, 1.5)`):
            Range of the saturation factor.
        hue_delta (`int`, *optional*, defaults to 18):
            Hue offsets are integers in [-hue_delta, hue_delta), in OpenCV's unit of 2 degrees.
        image_mean (`tuple[float, float, float]`, *optional*, defaults to CLIP's):
            Mean of the normalisation, for pixels in [0, 1].
        image_std (`tuple[float, float, float]`, *optional*, defaults to CLIP's):
            Standard deviation of the normalisation, for pixels in [0, 1].
    """

    def __init__(
        self,
        crop_size: int = 512,
        scale_range: tuple[float, float] = (0.5, 2.0),
        max_class_ratio: float = 0.75,
        flip_probability: float = 0.5,
        brightness_delta: float = 32,
        contrast_range: tuple[float, float] = (0.5, 1.5),
        saturation_range: tuple[float, float] = (0.5, 1.5),
        hue_delta: int = 18,
        image_mean: tuple[float, float, float] = tuple(OPENAI_CLIP_MEAN),
        image_std: tuple[float, float, float] = tuple(OPENAI_CLIP_STD),
    ):
        if crop_size < 1:
            raise ValueError(f"crop_size is {crop_size}; it must be at least 1")
        ranges = {"scale_range": scale_range, "contrast_range": contrast_range, "saturation_range": saturation_range}
        for name, (low, high) in ranges.items():
            if not 0 <= low <= high or (name == "scale_range" and low == 0):
                raise ValueError(f"{name} is {(low, high)}; it must be an increasing pair of positive factors")
        for name, share in {"max_class_ratio": max_class_ratio, "flip_probability": flip_probability}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; it must be between 0 and 1")
        if brightness_delta < 0 or hue_delta < 0:
            raise ValueError(
                f"brightness_delta is {brightness_delta} and hue_delta {hue_delta}; both must be at least 0"
            )
        if not np.isfinite([*image_mean, *image_std]).all() or min(image_std) <= 0:
            raise ValueError(
                f"image_mean is {tuple(image_mean)} and image_std {tuple(image_std)}; both must be finite, and "
                "image_std positive"
            )
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.max_class_ratio = max_class_ratio
        self.flip_probability = flip_probability
        self.brightness_delta = brightness_delta
        self.contrast_range = contrast_range
        self.saturation_range = saturation_range
        self.hue_delta = hue_delta
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)

    def __call__(
        self,
        image: Image.Image | np.ndarray,
        label: Image.Image | np.ndarray,
        rng: np.random.Generator,
        class_id: int | None = None,
        min_class_pixels: float = 0,
    ) -> dict[str, torch.Tensor]:
        """
        Makes a training sample from an image and its label map.

        Args:
            image (`PIL.Image.Image` or `np.ndarray` of shape `(height, width, 3)`):
                RGB image; an array must be uint8.
            label (`PIL.Image.Image` or `np.ndarray` of shape `(height, width)`):
                Class ids as uint8, and 255 for ignored pixels. They are never interpolated.
            rng (`np.random.Generator`):
                Source of all random numbers.
            class_id (`int`, *optional*):
                Scale and crop are redrawn, up to 10 times, until the crop holds more than `min_class_pixels` pixels
                of this class.
            min_class_pixels (`float`, *optional*, defaults to 0):
                See `class_id`.

        Returns:
            `dict`: `pixel_values`, a float32 tensor of shape `(3, crop_size, crop_size)`, and `labels`, an int64
            tensor of shape `(crop_size, crop_size)`. An image smaller than the crop is padded on the right and at the
            bottom, with 0 in `pixel_values` and 255 in `labels`.
        """
        pixels, label = _to_pixels(image), checked_label(label)
        check_sizes(pixels.shape[:2], label.shape)
        for _ in range(1 + REDRAWS):
            window, cropped_label = self._draw_crop(label, rng)
            if class_id is None or np.count_nonzero(cropped_label == class_id) > min_class_pixels:
                break
        pixels = window.crop_bilinear(pixels)
        if rng.random() < self.flip_probability:
            pixels, cropped_label = pixels[..., ::-1], cropped_label[:, ::-1]
        pixels = self.distort(pixels, rng)

        height, width = cropped_label.shape
        pixel_values = np.zeros((3, self.crop_size, self.crop_size), dtype=np.float32)
        pixel_values[:, :height, :width] = self._normalise(pixels)
        labels = np.full((self.crop_size, self.crop_size), IGNORE_INDEX, dtype=np.int64)
        labels[:height, :width] = cropped_label
        return {"pixel_values": torch.from_numpy(pixel_values), "labels": torch.from_numpy(labels)}

    def distort(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """
        Distorts brightness, contrast, saturation and hue, each with probability 1/2.

        Contrast is the second or the last of the four, with equal probability.

        Args:
            pixels (`np.ndarray` of shape `(3, height, width)`):
                Planar RGB as uint8.
            rng (`np.random.Generator`):
                Source of all random numbers.

        Returns:
            `np.ndarray` of shape `(3, height, width)`: The distorted pixels.
        """
        if rng.integers(2):
            pixels = _scale_and_shift(shift=rng.uniform(-self.brightness_delta, self.brightness_delta)).take(pixels)
        contrast_last = rng.integers(2)
        if not contrast_last:
            pixels = self._distort_contrast(pixels, rng)
        # Saturation and hue each convert to HSV and back: 8-bit HSV is coarse, and the recipe rounds twice.
        if rng.integers(2):
            hue, saturation, value = rgb_to_hsv(pixels)
            saturation = _scale_and_shift(scale=rng.uniform(*self.saturation_range)).take(saturation)
            pixels = hsv_to_rgb(hue, saturation, value)
        if rng.integers(2) and self.hue_delta:
            hue, saturation, value = rgb_to_hsv(pixels)
            hue = (hue + int(rng.integers(-self.hue_delta, self.hue_delta))) % 180
            pixels = hsv_to_rgb(hue, saturation, value)
        return self._distort_contrast(pixels, rng) if contrast_last else pixels

    def _distort_contrast(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _scale_and_shift(scale=rng.uniform(*self.contrast_range)).take(pixels) if rng.integers(2) else pixels

    def _draw_crop(self, label: np.ndarray, rng: np.random.Generator) -> tuple["ResizedWindow", np.ndarray]:
        """Draws a scale and a crop that no class dominates; returns the window and the cropped label map."""
        height, width = label.shape
        full = resized_shape(height, width, rng.uniform(*self.scale_range))
        size = tuple(min(length, self.crop_size) for length in full)
        for _ in range(1 + REDRAWS):
            top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(full, size, strict=True))
            window = ResizedWindow(full, top, left, *size)
            crop = window.crop_nearest(label)
            if self.max_class_ratio == 1:
                break
            pixels_per_class = np.bincount(crop.ravel(), minlength=IGNORE_INDEX + 1)
            pixels_per_class[IGNORE_INDEX] = 0
            if pixels_per_class.max() < self.max_class_ratio * pixels_per_class.sum():
                break
        return window, crop

    def _normalise(self, pixels: np.ndarray) -> np.ndarray:
        std = np.array(self.image_std, dtype=np.float64)[:, None, None]
        offset = np.array(self.image_mean, dtype=np.float64)[:, None, None] / std
        normalised = np.multiply(pixels, (1 / (255 * std)).astype(np.float32), dtype=np.float32)
        normalised -= offset.astype(np.float32)
        return normalised


def resized_shape(height: int, width: int, factor: float) -> tuple[int, int]:
    """(height, width) of an image resized by `factor`, rounded as MMSegmentation rounds it."""
    factor = min(int(height * factor) / height, int(width * factor) / width)
    return scaled_size(height, width, factor)


class ResizedWindow(NamedTuple):
    """
    A window of an image resized to `full` = (height, width), computed without resizing the rest of the image.

    Sampling positions are those of OpenCV's `INTER_NEAREST` and `INTER_LINEAR`, without antialiasing.
    """

    full: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    def crop_nearest(self, label: np.ndarray) -> np.ndarray:
        """The window of a label map (H, W), sampled by nearest neighbour."""
        rows = _nearest(label.shape[0], self.full[0], self.top, self.height)
        columns = _nearest(label.shape[1], self.full[1], self.left, self.width)
        return label.take(rows, axis=0).take(columns, axis=1)

    def crop_bilinear(self, pixels: np.ndarray) -> np.ndarray:
        """The window of a uint8 image (H, W, 3), sampled bilinearly, as planar uint8 (3, height, width)."""
        above, below, down = _linear(pixels.shape[0], self.full[0], self.top, self.height)
        before, after, right = _linear(pixels.shape[1], self.full[1], self.left, self.width)
        pixels = pixels[above[0] : below[-1] + 1, before[0] : after[-1] + 1]
        above, below, before, after = above - above[0], below - above[0], before - before[0], after - before[0]
        window = np.empty((3, self.height, self.width), dtype=np.uint8)
        for channel, target in enumerate(window):
            source = np.ascontiguousarray(pixels[..., channel])
            rows = _mix(source.take(above, axis=0), source.take(below, axis=0), down[:, None])
            target[...] = _mix(rows.take(before, axis=1), rows.take(after, axis=1), right) + np.float32(0.5)
        return window


def _nearest(source: int, full: int, start: int, count: int) -> np.ndarray:
    positions = np.arange(start, start + count) * (1 / (full / source))
    return np.minimum(positions.astype(np.intp), source - 1)


def _linear(source: int, full: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two source indices and the weight of the second, for each of `count` positions."""
    positions = (np.arange(start, start + count) + 0.5) * (source / full) - 0.5
    first = np.floor(positions).astype(np.intp)
    weight = (positions - first).astype(np.float32)
    return first.clip(0, source - 1), (first + 1).clip(0, source - 1), weight


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    first, second = first.astype(np.float32), second.astype(np.float32)
    second -= first
    second *= weight
    second += first
    return second


def _scale_and_shift(scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Lookup table of scale * value + shift for uint8 values, clipped and truncated."""
    return (np.arange(256, dtype=np.float32) * scale + shift).clip(0, 255).astype(np.uint8)


def _divisions(numerator: int) -> np.ndarray:
    """Lookup table of numerator / i in fixed point with 12 fractional bits, for i in 0..255; 0 for i = 0."""
    divisors = np.arange(256)
    return np.rint((numerator << 12) / np.maximum(divisors, 1)).astype(np.int32) * (divisors > 0)


_HUE_DIVISIONS, _SATURATION_DIVISIONS = _divisions(30), _divisions(255)
# For red, green and blue: distance in [0, 1] of each hue (0 to 179) from the channel's third of the colour circle.
_HUE_DISTANCES = [
    (np.abs((np.arange(180) / 30 - own + 3) % 6 - 3) - 1).clip(0, 1).astype(np.float32) for own in (0, 2, 4)
]


def rgb_to_hsv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Converts planar RGB to HSV, with the same integers as OpenCV.

    Args:
        pixels (`np.ndarray` of shape `(3, height, width)`):
            RGB as uint8.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: Hue (0 to 179), saturation and value (0 to 255) as integers.
    """
    red, green, blue = pixels.astype(np.int16)
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    sextants = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    hue = (sextants * _HUE_DIVISIONS.take(chroma) + 2048) >> 12
    hue[hue < 0] += 180
    saturation = (chroma * _SATURATION_DIVISIONS.take(value) + 2048) >> 12
    return hue, saturation, value


def hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Converts the integer HSV of `rgb_to_hsv` to planar RGB, uint8 (3, H, W), truncated as in OpenCV."""
    value = value.astype(np.float32)
    chroma = saturation.astype(np.float32) * (value / np.float32(255))
    # The offset prevents the truncation of values just below an integer, which float32 rounding can produce.
    return np.stack([value - chroma * distance.take(hue) + np.float32(1e-4) for distance in _HUE_DISTANCES]).astype(
        np.uint8
    )


def _to_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(rgb_image(image))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"the image is an array of {image.dtype} and shape {image.shape}; it must be uint8 of shape "
            "(height, width, 3)"
        )
    return image


def image_and_label(dataset, name: str):
    """The columns `image` and `label` of a dataset. Raises `ValueError` with its `name` if one is missing."""
    missing = {"image", "label"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name} has no column {' and no column '.join(sorted(missing))}; its columns are "
            f"{', '.join(dataset.column_names)}, and they must include image and label"
        )
    return dataset.select_columns(["image", "label"])


def checked_label(label: Image.Image | np.ndarray) -> np.ndarray:
    """The class ids, uint8 (height, width), of a label map in a row of a dataset."""
    if label is None:
        raise ValueError("the label is missing, as in the test split of a benchmark; use a split with labels")
    if isinstance(label, Image.Image):
        return label_ids(label)
    if label.dtype != np.uint8 or label.ndim != 2:
        raise ValueError(
            f"the label is an array of {label.dtype} and shape {label.shape}; it must be uint8 of shape "
            "(height, width)"
        )
    return label


class AugmentedDataset(Dataset):
    """
    Applies [`TrainingAugmentation`] to the rows of a dataset.

    If it is indexed by a [`Draw`], the sample depends only on the draw and the seed. If it is indexed by an integer,
    the sample depends on the seed, the index and the epoch that was last set by `set_epoch`.

    Args:
        dataset (`datasets.Dataset`):
            Rows with the columns `image` and `label`, decoded to PIL images.
        augmentation ([`TrainingAugmentation`]):
            The transforms.
        seed (`int`, *optional*, defaults to 0):
            Non-negative seed of all random numbers.
        num_labels (`int`, *optional*):
            Number of classes. A sample with another label than these and 255 is an error.
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            Whether a row that cannot be read is replaced by the next one.

    Attributes:
        skipped ([`~mfuser.data.unreadable.SkippedRows`]):
            The rows that were skipped.

    Raises:
        ValueError: If a column is missing, or (on access) if a row can't be read or transformed.
    """

    def __init__(
        self,
        dataset,
        augmentation: TrainingAugmentation,
        seed: int = 0,
        num_labels: int = IGNORE_INDEX,
        skip_unreadable: bool = False,
    ):
        self.dataset = image_and_label(dataset, "the dataset")
        self.augmentation = augmentation
        self.seed = seed
        self.num_labels = num_labels
        self.skipped = SkippedRows(len(dataset), skip_unreadable)
        # In shared memory, so that persistent workers see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw | int) -> dict[str, torch.Tensor]:
        if not isinstance(draw, Draw):
            draw = Draw(row=draw, epoch=self._epoch.item(), position=draw)

        def read(row: int) -> dict[str, torch.Tensor]:
            return read_row(self.dataset, row, f"Row {row} of the dataset", lambda item: self._sample(item, draw))

        return self.skipped.first_readable(read, draw.row, range(len(self)))

    def _sample(self, item: dict, draw: Draw) -> dict[str, torch.Tensor]:
        rng = random_generator(self.seed, draw.epoch, draw.position, AUGMENTATION_STREAM)
        sample = self.augmentation(item["image"], item["label"], rng, draw.class_id, draw.min_class_pixels)
        check_label(sample["labels"].numpy(), self.num_labels)
        return sample
