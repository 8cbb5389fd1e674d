"""Scores of single images, and the images that are shown as examples."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mfuser.evaluation.metrics import MeanIoU

KINDS = ("worst", "median", "best")


class ImageScore(NamedTuple):
    """
    The score of one image.

    Args:
        mean_iou (`float`):
            Mean over the classes that occur in its label. Pixels that are predicted as another class lower the IoU of
            their true class.
        accuracy (`float`):
            Share of the labelled pixels that are right.
        row (`int`):
            The position of the image.
    """

    mean_iou: float
    accuracy: float
    row: int


def score_of_image(row: int, metric: MeanIoU, classes: list[int]) -> ImageScore | None:
    """
    The score of an image, or `None` if its label has none of the classes.

    Args:
        row (`int`):
            The position of the image.
        metric ([`MeanIoU`]):
            The counts of its pixels.
        classes (`list[int]`):
            Class ids to average over.
    """
    labelled = metric.matrix.sum(dim=1)
    present = [index for index in classes if labelled[index]]
    if not present:
        return None
    scores = metric.compute(present)
    return ImageScore(scores["mean_iou"], scores["overall_accuracy"], row)


def chosen_examples(scores: list[ImageScore], names: Sequence[str], count: int) -> list[dict[str, Any]]:
    """
    Chooses the images with the worst, the median and the best scores. No image is chosen twice.

    Args:
        scores (`list[ImageScore]`):
            The scores of all images, in any order.
        names (`Sequence[str]`):
            The name of every row.
        count (`int`):
            The number of images of each kind. With too few images, those of the kind "median" are fewer, then those of
            "best".

    Returns:
        `list[dict]`: `kind`, `name`, `row`, `mean_iou` and `accuracy` of each, ready for JSON. Equal scores are in the
        order of their rows.
    """
    ordered = sorted(scores)
    worst, rest = ordered[:count], ordered[count:]
    best = rest[max(len(rest) - count, 0) :][::-1]
    between = rest[: len(rest) - len(best)]
    first = max((len(between) - count) // 2, 0)
    chosen = (worst, between[first : first + count], best)
    return [
        {
            "kind": kind,
            "name": names[score.row],
            "row": score.row,
            "mean_iou": score.mean_iou,
            "accuracy": score.accuracy,
        }
        for kind, group in zip(KINDS, chosen, strict=True)
        for score in group
    ]
