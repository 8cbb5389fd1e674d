"""Rare-class sampling: images of rare classes are drawn more often, and cropped where the class is.

A class is drawn with probability softmax((1 - frequency) / T), then an image that holds enough of it, then crops until
one does: Hoyer et al., "DAFormer", CVPR 2022 (arXiv 2111.14887), with the settings of tqdm and MFuser, T = 100.
"""

import contextlib
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute
from torch.utils.data import Sampler

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.data.augmentation import RARE_CLASS_STREAM, Draw, label_array, random_generator

logger = logging.getLogger(__name__)

# Part of the cache's key: raise it when what is counted changes.
_INDEX_VERSION = 1


def count_class_pixels(
    dataset: datasets.Dataset,
    num_classes: int,
    cache_file: str | Path | None = None,
    num_proc: int | None = None,
) -> np.ndarray:
    """How many pixels of each class each row's label holds.

    Labels are read a few at a time, in parallel, with a progress bar. The counts are kept in a file beside the
    dataset's own files and used again as long as the dataset, the label files it refers to and `num_classes` are the
    same. Over several processes, let the first one count: call this under `accelerator.main_process_first()`.

    Args:
        dataset: rows with a column `label`; `mfuser.data.loading.load_domain` opens any dataset so.
        num_classes: number of classes; every label value must be a class or 255.
        cache_file: where to keep the counts instead. A dataset in memory is counted anew each time without it.
        num_proc: number of counting processes; one per CPU by default.

    Returns:
        int64 array (rows, num_classes), in the order of the dataset.

    Raises:
        ValueError: the dataset is empty or streamed, or a label is missing or holds other values; the row is named.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            "Rare-class sampling draws rows by number and needs a datasets.Dataset, got "
            f"{type(dataset).__name__}; load the dataset with streaming=False."
        )
    if "label" not in dataset.column_names:
        raise ValueError(f"The dataset has no column 'label'; its columns are {', '.join(dataset.column_names)}.")
    if not 1 <= num_classes <= IGNORE_INDEX:
        raise ValueError(f"num_classes must lie in 1..{IGNORE_INDEX}, got {num_classes}.")
    if not len(dataset):
        raise ValueError("The dataset is empty: there is nothing to sample from.")

    fingerprint = _fingerprint(dataset, num_classes)
    if cache_file is None and dataset.cache_files:
        folder = Path(dataset.cache_files[0]["filename"]).parent
        cache_file = folder / f"rare-class-index-{fingerprint[:16]}.npz"
    if cache_file is not None:
        counts = _load(Path(cache_file), fingerprint)
        if counts is not None:
            return counts

    num_proc = min(num_proc or os.cpu_count() or 1, len(dataset))
    counted = dataset.select_columns("label").map(
        _count_labels,
        input_columns="label",
        with_indices=True,
        batched=True,
        batch_size=16,
        remove_columns="label",
        fn_kwargs={"num_classes": num_classes},
        num_proc=num_proc if num_proc > 1 else None,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc="Counting the pixels of each class",
    )
    counts = np.array(counted.with_format("numpy")[:]["pixels"])
    if cache_file is not None:
        _save(Path(cache_file), fingerprint, counts)
    return counts


def _count_labels(labels: list, rows: list[int], num_classes: int) -> dict[str, np.ndarray]:
    counts = np.empty((len(labels), num_classes), dtype=np.int64)
    for row, label, target in zip(rows, labels, counts, strict=True):
        try:
            histogram = np.bincount(label_array(label).ravel(), minlength=IGNORE_INDEX + 1)
            unknown = num_classes + np.flatnonzero(histogram[num_classes:IGNORE_INDEX])
            if len(unknown):
                raise ValueError(
                    f"the label holds {unknown[:10].tolist()}, which are neither classes (0..{num_classes - 1}) nor "
                    f"{IGNORE_INDEX}; map label ids to train ids first"
                )
        except ValueError as error:
            raise ValueError(f"Row {row} of the dataset: {error}") from error
        target[:] = histogram[:num_classes]
    return {"pixels": counts}


def _fingerprint(dataset: datasets.Dataset, num_classes: int) -> str:
    """Identifies what would be counted: the dataset as `datasets` identifies it, and the files it only refers to."""
    key = [_INDEX_VERSION, dataset._fingerprint, len(dataset), num_classes]
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
        logger.info("%s belongs to other data; counting anew.", cache_file)
    except FileNotFoundError:
        pass
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s cannot be read (%s); counting anew.", cache_file, error)
    return None


def _save(cache_file: Path, fingerprint: str, counts: np.ndarray) -> None:
    # Written aside and renamed: whoever reads it meanwhile, or after a crash, finds a whole file or none.
    partial = cache_file.with_name(f"{cache_file.name}.{os.getpid()}.partial")
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez_compressed(file, fingerprint=np.array(fingerprint), pixels=counts)
        os.replace(partial, cache_file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        logger.warning("The class pixels cannot be kept in %s and will be counted anew: %s", cache_file, error)


def class_probabilities(pixels_per_class: np.ndarray, temperature: float = 100.0) -> np.ndarray:
    """Probability of drawing each class: softmax((1 - frequency) / temperature) over the classes that occur.

    Args:
        pixels_per_class: pixels of each class in the whole dataset, (num_classes,).
        temperature: the higher, the more uniform.

    Returns:
        float64 array (num_classes,), 0 for classes that don't occur.
    """
    pixels_per_class = np.asarray(pixels_per_class, dtype=np.float64)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if not pixels_per_class.any():
        raise ValueError("No label holds a pixel of any class; are all of them 255?")
    logits = (1 - pixels_per_class / pixels_per_class.sum()) / temperature
    weights = np.where(pixels_per_class > 0, np.exp(logits - logits.max()), 0)
    return weights / weights.sum()


class RareClassSampler(Sampler[Draw]):
    """An endless supply of draws for an `AugmentedDataset`, rare classes preferred, cut into epochs of `num_samples`.

    The draw at position k is a function of (seed, epoch, k) alone. So a run that skips what it has already seen goes
    on as if never interrupted, and processes that share out the batches, as Accelerate makes them, work on disjoint
    parts of one sequence.

    Args:
        pixel_counts: pixels of each class in each row, (rows, num_classes), as `count_class_pixels` counts them.
        seed: non-negative seed.
        num_samples: draws in an epoch; as many as there are rows by default.
        temperature: of the class probabilities.
        min_pixels: an image is drawn for a class if it holds more than this many of its pixels. A class that occurs,
            but nowhere so often, is left out with a warning.
        min_crop_ratio: a crop should hold more than `min_crop_ratio * min_pixels` pixels of the drawn class.

    Attributes:
        classes: ids of the classes that can be drawn, (n,).
        probabilities: their probabilities, (n,).
        rows: for each of them, the rows it is drawn from.
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
        probabilities = class_probabilities(pixel_counts.sum(axis=0), temperature)
        enough = pixel_counts > min_pixels
        self.classes = np.flatnonzero(enough.any(axis=0))
        if not len(self.classes):
            raise ValueError(
                f"No image holds more than min_pixels = {min_pixels} pixels of any class (the largest count is "
                f"{pixel_counts.max()}); choose a smaller min_pixels."
            )
        scarce = np.setdiff1d(np.flatnonzero(probabilities), self.classes)
        if len(scarce):
            largest = {int(class_id): int(pixel_counts[:, class_id].max()) for class_id in scarce}
            logger.warning(
                "Classes without an image that holds more than min_pixels = %d of their pixels are never drawn for "
                "themselves; largest count in an image, by class: %s. A smaller min_pixels includes them.",
                min_pixels,
                largest,
            )
        self.probabilities = probabilities[self.classes] / probabilities[self.classes].sum()
        # Without the last edge, which rounding may leave below 1.
        self._cumulative = self.probabilities.cumsum()[:-1]
        self.rows = [np.flatnonzero(enough[:, class_id]) for class_id in self.classes]
        self.min_class_pixels = min_crop_ratio * min_pixels
        self.num_samples = len(pixel_counts) if num_samples is None else num_samples
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch
        return (self.draw(epoch, position) for position in range(self.num_samples))

    def draw(self, epoch: int, position: int) -> Draw:
        rng = random_generator(self.seed, epoch, position, RARE_CLASS_STREAM)
        drawn = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
        rows = self.rows[drawn]
        index = int(rows[rng.integers(len(rows))])
        return Draw(index, epoch, position, int(self.classes[drawn]), self.min_class_pixels)
