"""The published test protocols: the size at which an image is segmented, and the samples for the model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mfuser.data.augmentation import ResizedWindow
from mfuser.data.domain import EvaluationSize
from mfuser.data.tables import CLASS_SETS, MAPILLARY
from mfuser.errors import one_line
from mfuser.evaluation.domains import EvaluationDomain, LabelledImage

PROTOCOLS = ("P1", "P2")
CLASSES = ("domain", "all", *CLASS_SETS)
LABEL_SIZES = ("full", "half")


@dataclass(frozen=True)
class EvaluationOptions:
    """
    How images are segmented.

    Args:
        protocol (`str`, *optional*, defaults to `"P2"`):
            "P1" or "P2", which sets the size at which images are segmented. Images of unknown datasets keep their
            size.
        flip (`bool`, *optional*, defaults to `False`):
            Whether to add the mirrored image, see [`~MFuserForSemanticSegmentation.augmented_scores`].
        scales (`tuple[float]`, *optional*, defaults to `(1.0,)`):
            The scales of test-time augmentation.
        batch_size (`int`, *optional*, defaults to 1):
            The number of consecutive images in a batch. Images of different sizes are segmented separately.
        workers (`int`, *optional*, defaults to 0):
            The number of processes that read images, for each process that segments.
        classes (`str`, *optional*, defaults to `"domain"`):
            The classes that count in the mean IoU: "domain" for those that occur in the domain, "all", or "synthia16"
            or "synthia13" for the classes of SYNTHIA, whatever the domain. Predictions of other classes are errors.
        mapillary_labels (`str`, *optional*):
            The size at which Mapillary is scored: "full", or "half" to halve images (bicubic) and labels (nearest)
            first. By default that of the protocol: "half" in P1, "full" in P2.
    """

    protocol: str = "P2"
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    batch_size: int = 1
    workers: int = 0
    classes: str = "domain"
    mapillary_labels: str | None = None

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r}; it must be one of {', '.join(PROTOCOLS)}")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(
                f"scales is {self.scales}; it must hold at least one number, all of them positive and finite"
            )
        if self.classes not in CLASSES:
            raise ValueError(f"classes is {self.classes!r}; it must be one of {', '.join(CLASSES)}")
        if self.mapillary_labels not in (None, *LABEL_SIZES):
            raise ValueError(
                f"mapillary_labels is {self.mapillary_labels!r}; it must be one of {', '.join(LABEL_SIZES)}"
            )
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                f"batch_size is {self.batch_size} and workers is {self.workers}; they must be at least 1 and 0"
            )

    @property
    def augmented(self) -> bool:
        """Whether there is any test-time augmentation."""
        return self.flip or self.scales != (1.0,)

    def evaluation_size(self, domain: EvaluationDomain) -> EvaluationSize:
        """
        The size at which the images of a domain are segmented.

        Raises:
            ValueError: If `mapillary_labels` is "full" and the files of the domain are halved.
        """
        if domain.domain is None:
            return EvaluationSize()
        size = domain.domain.evaluation_sizes[self.protocol]
        if domain.halved:
            if self.mapillary_labels == "full":
                raise ValueError(
                    f"{domain.name}: its split {domain.split} holds halved labels; mapillary_labels is 'full', which "
                    "requires the split validation"
                )
            return replace(size, halve_first=False)
        if domain.domain.name == MAPILLARY.name and self.mapillary_labels is not None:
            return replace(size, halve_first=self.mapillary_labels == "half")
        return size


class Sample(NamedTuple):
    """
    One row as a model takes it, or the reason why it cannot be used.

    Args:
        row (`int`):
            The position of the row.
        pixel_values (`torch.Tensor` of shape `(3, height, width)`):
            Normalised pixels at the size of the protocol; empty if the row is skipped.
        label (`torch.Tensor` of shape `size`, uint8, *optional*):
            Train ids; `None` without a label.
        size (`tuple[int, int]`):
            (height, width) at which the prediction is scored.
        problem (`str`, *optional*):
            The reason why the row is skipped.
    """

    row: int
    pixel_values: torch.Tensor
    label: torch.Tensor | None
    size: tuple[int, int]
    problem: str | None


class ProtocolSamples(Dataset):
    """
    The samples of a domain under a protocol.

    Images are resized bilinearly as OpenCV does, without smoothing, as mmcv did for the published numbers.

    Args:
        domain (`EvaluationDomain`):
            The domain.
        processor ([`MFuserImageProcessor`]):
            Normalises the images. Its own size and padding are not used.
        evaluation_size (`EvaluationSize`):
            The size of the protocol.
    """

    def __init__(self, domain: EvaluationDomain, processor, evaluation_size: EvaluationSize):
        self.domain = domain
        self.processor = processor
        self.evaluation_size = evaluation_size

    def __len__(self) -> int:
        return len(self.domain.rows)

    def __getitem__(self, index: int) -> Sample:
        try:
            return self._prepared(index)
        except (MemoryError, ValueError) as error:
            return Sample(index, torch.empty(0), None, (0, 0), one_line(error))

    def _prepared(self, index: int) -> Sample:
        row = self.domain.read(index)
        image, label = _halved(row) if self.evaluation_size.halve_first else row
        target = self.evaluation_size.resized(row.image.height, row.image.width)
        pixels = np.asarray(image)
        size = pixels.shape[:2]
        if size == target:
            planes = pixels.transpose(2, 0, 1)
        else:
            planes = ResizedWindow(target, 0, 0, *target).crop_bilinear(pixels)
        inputs = self.processor(
            planes, do_resize=False, do_pad=False, input_data_format="channels_first", return_tensors="pt"
        )
        labels = None if label is None else torch.from_numpy(np.array(label))
        return Sample(index, inputs["pixel_values"][0], labels, size, None)


def _halved(row: LabelledImage) -> LabelledImage:
    """Half the size, as Rein's script does it: the image bicubic, the label nearest."""
    half = (row.image.width // 2, row.image.height // 2)
    image = row.image.resize(half, Image.Resampling.BICUBIC)
    if row.label is None:
        return LabelledImage(image, None)
    return LabelledImage(image, np.asarray(Image.fromarray(row.label).resize(half, Image.Resampling.NEAREST)))


def share_of_batches(rows: int, batch_size: int, rank: int, processes: int) -> list[list[int]]:
    """
    The batches that one process segments, as row positions.

    Batches are formed before they are distributed, so that they are the same for any number of processes.
    """
    batches = [list(range(start, min(start + batch_size, rows))) for start in range(0, rows, batch_size)]
    return batches[rank::processes]


def sample_loader(samples: ProtocolSamples, batches: list[list[int]], workers: int) -> DataLoader:
    """A loader that yields each of the batches as a list of samples."""
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=list)


def groups_of_one_size(samples: list[Sample]) -> Iterator[list[Sample]]:
    """The usable samples of a batch, grouped by the shape of their pixels."""
    by_shape: dict[torch.Size, list[Sample]] = {}
    for sample in samples:
        if sample.problem is None:
            by_shape.setdefault(sample.pixel_values.shape, []).append(sample)
    yield from by_shape.values()
