"""
Rare-class sampling: images of rare classes are drawn more often and cropped where the class occurs.

A class is drawn with probability softmax((1 - frequency) / T), then an image with enough pixels of the class, then
crops until one has enough of them: Hoyer et al., "DAFormer", CVPR 2022 (arXiv 2111.14887). As in tqdm and MFuser,
T = 100.
"""

import hashlib
import json
import logging
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.data.augmentation import checked_label
from mfuser.data.draws import RARE_CLASS_STREAM, Draw, DrawSampler, random_generator
from mfuser.files import atomic_writer

logger = logging.getLogger(__name__)

# Part of the cache key: increase it when the definition of the counts changes.
_INDEX_VERSION = 1


def count_class_pixels(
    dataset: datasets.Dataset,
    num_classes: int,
    cache_file: str | Path | None = None,
    num_proc: int | None = None,
    skip_unreadable: bool = False,
) -> np.ndarray:
    """
    Counts the pixels of each class in each label map of a dataset.

    Label maps are read in parallel, a few at a time, with a progress bar. The counts are cached in a file next to the
    dataset's files. The cache is valid until the dataset, the label files it refers to or `num_classes` change. In a
    run of several processes, call this function under `accelerator.main_process_first()`, so that only one counts.

    Args:
        dataset (`datasets.Dataset`):
            Rows with a column `label`.
        num_classes (`int`):
            Number of classes. Every label value must be a class id or 255.
        cache_file (`str` or `Path`, *optional*):
            Cache file to use instead. Without it, the counts of a dataset in memory are not cached.
        num_proc (`int`, *optional*):
            Number of processes that count; by default one per CPU.
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            Whether label maps that cannot be read count as empty, with a warning.

    Returns:
        `np.ndarray` of shape `(rows, num_classes)`: The counts as int64, in the order of the dataset.

    Raises:
        ValueError: If the dataset is empty or streamed, or if a label map is missing or holds other values.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"the dataset is of type {type(dataset).__name__}; rare-class sampling accesses rows by index and needs a "
            "datasets.Dataset, loaded with streaming=False"
        )
    if "label" not in dataset.column_names:
        raise ValueError(f"the dataset has no column 'label'; its columns are {', '.join(dataset.column_names)}")
    if not 1 <= num_classes <= IGNORE_INDEX:
        raise ValueError(f"num_classes is {num_classes}; it must be between 1 and {IGNORE_INDEX}")
    if not len(dataset):
        raise ValueError("the dataset is empty; it must have at least one row")

    fingerprint = _fingerprint(dataset, num_classes, skip_unreadable)
    if cache_file is None and dataset.cache_files:
        folder = Path(dataset.cache_files[0]["filename"]).parent
        cache_file = folder / f"rare-class-index-{fingerprint[:16]}.npz"
    if cache_file is not None:
        counts = _load(Path(cache_file), fingerprint)
        if counts is not None:
            return _without_unreadable(counts)

    num_proc = min(num_proc or os.cpu_count() or 1, len(dataset))
    labels = dataset.select_columns("label")
    if isinstance(labels.features["label"], datasets.Image):  # decoded row by row, so that errors name the row
        labels = labels.cast_column("label", datasets.Image(decode=False))
    counted = labels.map(
        _count_labels,
        input_columns="label",
        with_indices=True,
        batched=True,
        batch_size=16,
        remove_columns="label",
        fn_kwargs={"num_classes": num_classes, "skip_unreadable": skip_unreadable},
        num_proc=num_proc if num_proc > 1 else None,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc="Counting the pixels of each class",
    )
    counts = np.array(counted.with_format("numpy")[:]["pixels"])
    if cache_file is not None:
        _save(Path(cache_file), fingerprint, counts)
    return _without_unreadable(counts)


def _without_unreadable(counts: np.ndarray) -> np.ndarray:
    """The counts, in which -1 marks label maps that could not be read, with 0 for these and a warning."""
    unreadable = np.flatnonzero((counts < 0).any(axis=1))
    if len(unreadable):
        logger.warning(
            "%d label maps cannot be read and are not drawn for any class: rows %s",
            len(unreadable),
            ", ".join(map(str, unreadable[:10])) + (", ..." if len(unreadable) > 10 else ""),
        )
    return counts.clip(0)


def _count_labels(labels: list, rows: list[int], num_classes: int, skip_unreadable: bool) -> dict[str, np.ndarray]:
    counts = np.empty((len(labels), num_classes), dtype=np.int64)
    for row, label, target in zip(rows, labels, counts, strict=True):
        try:
            if isinstance(label, dict):
                label = datasets.Image().decode_example(label)
            histogram = np.bincount(checked_label(label).ravel(), minlength=IGNORE_INDEX + 1)
            unknown = num_classes + np.flatnonzero(histogram[num_classes:IGNORE_INDEX])
            if len(unknown):
                raise ValueError(
                    f"the label holds {unknown[:10].tolist()}, which are neither classes (0..{num_classes - 1}) nor "
                    f"{IGNORE_INDEX}; map label ids to train ids first"
                )
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises errors of almost any type for damaged files
            if not skip_unreadable:
                raise ValueError(f"Row {row} of the dataset: {error}") from error
            target[:] = -1
            continue
        target[:] = histogram[:num_classes]
    return {"pixels": counts}


def _fingerprint(dataset: datasets.Dataset, num_classes: int, skip_unreadable: bool) -> str:
    """Cache key of the counts: the dataset's fingerprint, and size and time of the files that it refers to."""
    key = [_INDEX_VERSION, dataset._fingerprint, len(dataset), num_classes]
    if skip_unreadable:
        key.append("skip_unreadable")
    if isinstance(dataset.features["label"], datasets.Image):
        stored = dataset.data.column("label")
        by_path = pyarrow.compute.is_null(pyarrow.compute.struct_field(stored, "bytes"))
        for path in pyarrow.compute.struct_field(stored, "path").filter(by_path).to_pylist():
            if path is not None and os.path.exists(path):
                status = os.stat(path)
                key.append([path, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _load(cache_file: Path, fingerprint: str) -> np.ndarray | None:
    try:
        with np.load(cache_file) as cached:
            if str(cached["fingerprint"]) == fingerprint:
                return cached["pixels"]
        logger.info("%s was written for other data; the class pixels are counted again.", cache_file)
    except FileNotFoundError:
        pass
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s cannot be read (%s); the class pixels are counted again.", cache_file, error)
    return None


def _save(cache_file: Path, fingerprint: str, counts: np.ndarray) -> None:
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(cache_file) as file:
            np.savez_compressed(file, fingerprint=np.array(fingerprint), pixels=counts)
    except OSError as error:
        logger.warning("The class pixels cannot be cached in %s: %s", cache_file, error)


def class_probabilities(pixels_per_class: np.ndarray, temperature: float = 100.0) -> np.ndarray:
    """
    Probability of each class, softmax((1 - frequency) / temperature) over the classes that occur.

    Args:
        pixels_per_class (`np.ndarray` of shape `(num_classes,)`):
            Pixels of each class in the whole dataset.
        temperature (`float`, *optional*, defaults to 100):
            The higher the temperature, the closer the probabilities are to uniform.

    Returns:
        `np.ndarray` of shape `(num_classes,)`: Probabilities as float64, 0 for classes that do not occur.

    Raises:
        ValueError: If `temperature` is not positive, or no class occurs.
    """
    pixels_per_class = np.asarray(pixels_per_class, dtype=np.float64)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if not pixels_per_class.any():
        raise ValueError("the label maps hold no pixel of any class; at least one pixel must not be 255")
    logits = (1 - pixels_per_class / pixels_per_class.sum()) / temperature
    weights = np.where(pixels_per_class > 0, np.exp(logits - logits.max()), 0)
    return weights / weights.sum()


class RareClassSampler(DrawSampler):
    """
    Yields the draws of an [`AugmentedDataset`], with a preference for rare classes.

    Args:
        pixel_counts (`np.ndarray` of shape `(rows, num_classes)`):
            Pixels of each class in each row, see [`count_class_pixels`].
        seed (`int`, *optional*, defaults to 0):
            Non-negative seed.
        num_samples (`int`, *optional*):
            Number of draws per epoch; by default the number of rows.
        temperature (`float`, *optional*, defaults to 100):
            Temperature of the class probabilities, see [`class_probabilities`].
        min_pixels (`int`, *optional*, defaults to 3000):
            An image is drawn for a class if it holds more than this number of its pixels. Classes that occur, but in
            no image this often, are excluded with a warning.
        min_crop_ratio (`float`, *optional*, defaults to 0.5):
            A crop should hold more than `min_crop_ratio * min_pixels` pixels of the drawn class.

    Attributes:
        classes (`np.ndarray` of shape `(n,)`):
            Ids of the classes that can be drawn.
        probabilities (`np.ndarray` of shape `(n,)`):
            Their probabilities.
        rows (`list[np.ndarray]`):
            For each of them, the rows with enough of its pixels.

    Raises:
        ValueError: If no image holds enough pixels of a class, or an argument is out of range.
    """

    def __init__(
        self,
        pixel_counts: np.ndarray,
        seed: int = 0,
        num_samples: int | None = None,
        temperature: float = 100.0,
        min_pixels: int = 3000,
        min_crop_ratio: float = 0.5,
    ):
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        super().__init__(num_samples or len(pixel_counts), seed)
        probabilities = class_probabilities(pixel_counts.sum(axis=0), temperature)
        enough = pixel_counts > min_pixels
        self.classes = np.flatnonzero(enough.any(axis=0))
        if not len(self.classes):
            raise ValueError(
                f"min_pixels is {min_pixels}, and no image holds more than {pixel_counts.max()} pixels of a class; "
                "min_pixels (of `mfuser train`: rare_class_min_pixels) must be smaller than that"
            )
        scarce = np.setdiff1d(np.flatnonzero(probabilities), self.classes)
        if len(scarce):
            largest = {int(class_id): int(pixel_counts[:, class_id].max()) for class_id in scarce}
            logger.warning(
                "Classes are excluded from rare-class sampling: no image holds more than min_pixels = %d of their "
                "pixels. Largest count in an image, by class: %s. A smaller min_pixels includes them.",
                min_pixels,
                largest,
            )
        self.probabilities = probabilities[self.classes] / probabilities[self.classes].sum()
        # The last boundary is omitted, since rounding can leave it below 1.
        self._cumulative = self.probabilities.cumsum()[:-1]
        self.rows = [np.flatnonzero(enough[:, class_id]) for class_id in self.classes]
        self.min_class_pixels = min_crop_ratio * min_pixels

    def draw(self, epoch: int, position: int) -> Draw:
        rng = random_generator(self.seed, epoch, position, RARE_CLASS_STREAM)
        drawn = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
        rows = self.rows[drawn]
        index = int(rows[rng.integers(len(rows))])
        return Draw(index, epoch, position, int(self.classes[drawn]), self.min_class_pixels)
