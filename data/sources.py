"""
Training on several sources together: one list of classes, one dataset, and samplers that weight the sources.

Sources may have different classes. Their labels are mapped to the ids of all classes by name. A sample of a source
that does not label all of them has a `class_mask`, which excludes the others from the loss
([`~mfuser.loss_mfuser.MFuserLoss`]).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mfuser.class_names_mfuser import IGNORE_INDEX, checked_class_names
from mfuser.data.augmentation import TrainingAugmentation, checked_label, image_and_label
from mfuser.data.draws import (
    AUGMENTATION_STREAM,
    RARE_CLASS_STREAM,
    SOURCE_STREAM,
    Draw,
    DrawSampler,
    ShuffledSampler,
    random_generator,
)
from mfuser.data.label_maps import LabelMap
from mfuser.data.loading import LoadedDomain
from mfuser.data.rare_class_sampling import RareClassSampler, count_class_pixels
from mfuser.data.unreadable import SkippedRows, read_row

RARE_CLASS_SCOPES = ("source", "joint")


@dataclass(frozen=True)
class TrainingSource:
    """
    One of the datasets that a model is trained on together.

    Args:
        name (`str`):
            The name in messages.
        dataset (`datasets.Dataset`):
            Rows with the columns `image` and `label`.
        id2label (`dict[int, str]`):
            The name of each id in the labels.
        unlabelled_classes (`tuple[str, ...]`, *optional*):
            Classes of `id2label` that are not labelled. Pixels with their ids are ignored.

    Raises:
        ValueError: If class names repeat or are empty.
    """

    name: str
    dataset: Any
    id2label: dict[int, str]
    unlabelled_classes: tuple[str, ...] = ()

    def __post_init__(self):
        checked_class_names(list(self.id2label.values()))

    @classmethod
    def from_domain(cls, name: str, loaded: LoadedDomain) -> "TrainingSource":
        """A loaded dataset as a source. Classes that never occur in its domain (three of SYNTHIA) are unlabelled."""
        occurring = loaded.preparation.get("evaluation_classes", loaded.id2label.values())
        absent = tuple(label for label in loaded.id2label.values() if label not in occurring)
        return cls(name, loaded.dataset, loaded.id2label, absent)

    @property
    def class_mask(self) -> list[str]:
        return [label for label in self.id2label.values() if label not in self.unlabelled_classes]


def joint_classes(sources: Sequence[TrainingSource]) -> dict[int, str]:
    """
    The classes of all sources by id, in the order of their first appearance.

    Raises:
        ValueError: If two names differ only in case or surrounding spaces.
    """
    names = dict.fromkeys(label for source in sources for label in source.id2label.values())
    return dict(enumerate(checked_class_names(list(names))))


def source_probabilities(sources: Sequence[TrainingSource], weights: Sequence[float] | None = None) -> np.ndarray:
    """
    The probability of each source.

    Args:
        sources (`Sequence[TrainingSource]`):
            The sources.
        weights (`Sequence[float]`, *optional*):
            Positive weights, which need not sum to 1. By default the numbers of rows.

    Raises:
        ValueError: If there is not one positive, finite weight for each source.
    """
    names = ", ".join(source.name for source in sources)
    if weights is None:
        weights = [len(source.dataset) for source in sources]
    given = np.array(weights, dtype=np.float64)
    if given.shape != (len(sources),) or not np.isfinite(given).all() or given.min() <= 0:
        raise ValueError(f"the weights are {list(weights)}; each of the sources ({names}) needs one positive number")
    return given / given.sum()


class MultiSourceDataset(Dataset):
    """
    Applies [`~mfuser.data.augmentation.TrainingAugmentation`] to the rows of several sources, one after another.

    A sample depends only on the draw and the seed. Unless `mask_unlabelled` is `False`, it has a `class_mask`,
    a boolean tensor of shape `(num_labels,)`, in addition to `pixel_values` and `labels`.

    Args:
        sources (`Sequence[TrainingSource]`):
            The sources.
        augmentation ([`~mfuser.data.augmentation.TrainingAugmentation`]):
            The transforms.
        seed (`int`, *optional*, defaults to 0):
            Non-negative seed of all random numbers.
        mask_unlabelled (`bool`, *optional*, defaults to `True`):
            Whether samples have a `class_mask`. Without it, classes that a source does not label are treated as absent
            from its images.
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            Whether a row that cannot be read is replaced by the next row of the source.

    Raises:
        ValueError: If a source lacks a column, or (on access) if a row cannot be transformed. The message names the
            source.
    """

    def __init__(
        self,
        sources: Sequence[TrainingSource],
        augmentation: TrainingAugmentation,
        seed: int = 0,
        mask_unlabelled: bool = True,
        skip_unreadable: bool = False,
    ):
        self.sources = list(sources)
        self.id2label = joint_classes(sources)
        self.augmentation = augmentation
        self.seed = seed
        self._datasets = [image_and_label(source.dataset, source.name) for source in sources]
        self._ends = list(accumulate(map(len, self._datasets)))
        self.skipped = SkippedRows(self._ends[-1], skip_unreadable)
        self._label_maps = [_label_map(source, self.id2label) for source in sources]
        self._labelled_classes = [
            torch.tensor([label in source.class_mask for label in self.id2label.values()]) if mask_unlabelled else None
            for source in sources
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, row: int) -> tuple[int, int]:
        """The source of a row, and the row's index in it."""
        index = bisect_right(self._ends, row)
        return index, row - (self._ends[index] - len(self._datasets[index]))

    def __getitem__(self, draw: Draw) -> dict[str, torch.Tensor]:
        index, _ = self.locate(draw.row)

        def make(item: dict[str, Any]) -> dict[str, torch.Tensor]:
            rng = random_generator(self.seed, draw.epoch, draw.position, AUGMENTATION_STREAM)
            label = self._label_maps[index](checked_label(item["label"]))
            return self.augmentation(item["image"], label, rng, draw.class_id, draw.min_class_pixels)

        def read(row: int) -> dict[str, torch.Tensor]:
            own = self.locate(row)[1]
            return read_row(self._datasets[index], own, f"{self.sources[index].name}, row {own}", make)

        rows_of_source = range(self._ends[index] - len(self._datasets[index]), self._ends[index])
        sample = self.skipped.first_readable(read, draw.row, rows_of_source)
        class_mask = self._labelled_classes[index]
        return sample if class_mask is None else sample | {"class_mask": class_mask}


def _joint_ids(source: TrainingSource, id2label: dict[int, str]) -> dict[int, int]:
    """The id among all classes of each id that the source labels."""
    ids = {label: index for index, label in id2label.items()}
    return {index: ids[label] for index, label in source.id2label.items() if label in source.class_mask}


def _label_map(source: TrainingSource, id2label: dict[int, str]) -> LabelMap:
    return LabelMap(_joint_ids(source, id2label), [*source.id2label, IGNORE_INDEX])


class MultiSourceSampler(DrawSampler):
    """
    Yields the draws of a [`MultiSourceDataset`]: first a source by its probability, then a row of it.

    Args:
        num_rows (`Sequence[int]`):
            Number of rows of each source.
        probabilities (`np.ndarray` of shape `(num_sources,)`):
            Probability of each source, see [`source_probabilities`].
        seed (`int`, *optional*, defaults to 0):
            Non-negative seed.
        samplers (`Sequence[RareClassSampler]`, *optional*):
            For each source, the sampler that draws its rows. By default they are drawn uniformly.
    """

    def __init__(
        self,
        num_rows: Sequence[int],
        probabilities: np.ndarray,
        seed: int = 0,
        samplers: Sequence[RareClassSampler] | None = None,
    ):
        super().__init__(sum(num_rows), seed)
        self.num_rows = list(num_rows)
        self.probabilities = probabilities
        self.samplers = samplers
        # The last boundary is omitted, since rounding can leave it below 1.
        self._cumulative = probabilities.cumsum()[:-1]
        self._starts = [0, *accumulate(self.num_rows)]

    def draw(self, epoch: int, position: int) -> Draw:
        rng = random_generator(self.seed, epoch, position, SOURCE_STREAM)
        source = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
        start = self._starts[source]
        if self.samplers is None:
            return Draw(start + int(rng.integers(self.num_rows[source])), epoch, position)
        draw = self.samplers[source].draw(epoch, position)
        return draw._replace(row=start + draw.row)


class WeightedRareClassSampler(RareClassSampler):
    """
    [`RareClassSampler`] over the rows of all sources: first a class, then an image of it by the weights of the rows.

    Args:
        pixel_counts (`np.ndarray` of shape `(rows, num_classes)`):
            Pixels of each class in each row.
        row_weights (`np.ndarray` of shape `(rows,)`):
            Positive weight of each row.
        kwargs:
            Further arguments of [`RareClassSampler`].
    """

    def __init__(self, pixel_counts: np.ndarray, row_weights: np.ndarray, **kwargs):
        super().__init__(pixel_counts, **kwargs)
        cumulative = [row_weights[rows].cumsum() for rows in self.rows]
        self._cumulative_rows = [weights[:-1] / weights[-1] for weights in cumulative]

    def draw(self, epoch: int, position: int) -> Draw:
        rng = random_generator(self.seed, epoch, position, RARE_CLASS_STREAM)
        drawn = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
        row = int(np.searchsorted(self._cumulative_rows[drawn], rng.random(), side="right"))
        return Draw(int(self.rows[drawn][row]), epoch, position, int(self.classes[drawn]), self.min_class_pixels)


def joint_pixel_counts(source: TrainingSource, id2label: dict[int, str], skip_unreadable: bool = False) -> np.ndarray:
    """
    The pixels of each class in each row of a source, with the ids of all classes.

    Args:
        source ([`TrainingSource`]):
            The source.
        id2label (`dict[int, str]`):
            All classes, see [`joint_classes`].
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            See [`~mfuser.data.rare_class_sampling.count_class_pixels`].

    Returns:
        `np.ndarray` of shape `(rows, len(id2label))`: The counts; 0 for classes that the source does not label.
    """
    own = count_class_pixels(source.dataset, len(source.id2label), skip_unreadable=skip_unreadable)
    counts = np.zeros((len(own), len(id2label)), dtype=own.dtype)
    for own_id, joint_id in _joint_ids(source, id2label).items():
        counts[:, joint_id] = own[:, own_id]
    return counts


def multi_source_sampler(
    sources: Sequence[TrainingSource],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    rare_class_scope: str | None = "source",
    skip_unreadable: bool = False,
    **rare_class_arguments,
) -> DrawSampler:
    """
    The sampler of a [`MultiSourceDataset`]. An epoch has as many draws as the sources have rows.

    Args:
        sources (`Sequence[TrainingSource]`):
            The sources.
        weights (`Sequence[float]`, *optional*):
            Weight of each source. By default the numbers of rows, as if the sources were concatenated.
        seed (`int`, *optional*, defaults to 0):
            Non-negative seed.
        rare_class_scope (`str`, *optional*, defaults to `"source"`):
            "source" draws a source by its weight, then a class by its frequency in that source, then an image of it.
            "joint" draws a class by its frequency in all sources, then an image of it, where each image has its share
            of the source's weight; a source without rare classes is then drawn less often than its weight implies.
            `None` draws images uniformly within a source; without weights, each image once per epoch.
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            See [`~mfuser.data.rare_class_sampling.count_class_pixels`].
        rare_class_arguments:
            `temperature`, `min_pixels` and `min_crop_ratio` of [`RareClassSampler`].

    Raises:
        ValueError: If an argument is out of range, or no image of a source holds enough pixels of a class. The message
            names the source.
    """
    if rare_class_scope not in (None, *RARE_CLASS_SCOPES):
        raise ValueError(
            f"rare_class_scope is {rare_class_scope!r}; it must be one of {', '.join(RARE_CLASS_SCOPES)}, or None"
        )
    probabilities = source_probabilities(sources, weights)
    num_rows = [len(source.dataset) for source in sources]
    if rare_class_scope is None:
        return (
            ShuffledSampler(sum(num_rows), seed)
            if weights is None
            else MultiSourceSampler(num_rows, probabilities, seed)
        )
    id2label = joint_classes(sources)
    counts, samplers = [], []
    for source in sources:
        try:
            counts.append(joint_pixel_counts(source, id2label, skip_unreadable))
            if rare_class_scope == "source":
                samplers.append(RareClassSampler(counts[-1], seed=seed, **rare_class_arguments))
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from error
    if rare_class_scope == "source":
        return MultiSourceSampler(num_rows, probabilities, seed, samplers)
    row_weights = np.repeat(probabilities / num_rows, num_rows)
    return WeightedRareClassSampler(np.concatenate(counts), row_weights, seed=seed, **rare_class_arguments)
