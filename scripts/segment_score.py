"""The score of one image that `mfuser segment` segmented, by its true labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from mfuser.data.label_maps import check_sizes, image_size, label_ids
from mfuser.data.unreadable import check_label
from mfuser.errors import CommandError, one_line
from mfuser.evaluation.metrics import MeanIoU


def read_labels(file: Path, image: Path, num_labels: int) -> np.ndarray:
    """
    Reads the true labels of an image.

    Args:
        file (`Path`):
            The label image.
        image (`Path`):
            The image.
        num_labels (`int`):
            Number of classes of the model.

    Returns:
        `np.ndarray` of shape `(height, width)`, uint8: Class ids, and 255 for pixels that do not count.

    Raises:
        CommandError: If a file cannot be read, or the labels have another size, other values or no class.
    """
    with _errors_name(str(image)), Image.open(image) as opened:
        size = image_size(opened)
    with _errors_name(f"--labels {file}"):
        with Image.open(file) as label:
            labels = label_ids(label)
        check_sizes(size, labels.shape)
        check_label(labels, num_labels)
        if not (labels < num_labels).any():
            raise ValueError("no pixel has a class")
    return labels


@contextmanager
def _errors_name(what: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise exceptions of almost any type
        raise CommandError(f"{what}: {one_line(error)}") from error


def score(predicted: Path, labels: np.ndarray, num_labels: int) -> str:
    """
    The score of an image, in one line.

    Args:
        predicted (`Path`):
            The label image that was written.
        labels (`np.ndarray` of shape `(height, width)`):
            The true labels.
        num_labels (`int`):
            Number of classes of the model.
    """
    metric = MeanIoU(num_labels)
    with Image.open(predicted) as written:
        metric.update(label_ids(written), labels)
    classes = np.unique(labels[labels < num_labels]).tolist()
    result = metric.compute(classes)
    return (
        f"mean IoU {100 * result['mean_iou']:.1f} % over the {len(classes)} classes in the labels, "
        f"{100 * result['overall_accuracy']:.1f} % of the pixels right"
    )
