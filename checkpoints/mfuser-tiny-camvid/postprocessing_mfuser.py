"""Class scores to label maps, in memory that does not grow with the number of classes."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.nn import functional as F

# Rows of all classes that stay in a CPU's cache while the best class is found.
BAND_ROWS = 64


def label_map_of_scores(scores: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """
    The best class of each pixel, after the scores are resized bilinearly.

    The classes are resized and compared one by one, so that besides the scores there are never more than two maps of
    floating-point values of the size of the result. Ties are resolved to the first class, as in `argmax`. The labels
    are those of an `argmax` over scores that are resized together, except where two scores differ by no more than the
    last bit, which PyTorch rounds differently for one class and for several.

    Args:
        scores (`torch.Tensor` of shape `(num_labels, height, width)`):
            The scores of an image, which must be finite.
        size (`tuple[int, int]`, *optional*):
            (height, width) of the result. Defaults to that of the scores.

    Returns:
        `torch.Tensor` of shape `size`: Class ids, as uint8, or int32 for more than 256 classes.

    Raises:
        ValueError: If a score is not finite.
    """
    size = (scores.shape[1], scores.shape[2]) if size is None else (size[0], size[1])
    labels = torch.empty(size, dtype=torch.uint8 if len(scores) <= 256 else torch.int32, device=scores.device)
    if tuple(scores.shape[1:]) != size:
        _best_class((_resized(plane, size) for plane in scores), labels)
        return labels
    rows = BAND_ROWS if scores.device.type == "cpu" else size[0]
    for top in range(0, size[0], rows):
        _best_class(iter(scores[:, top : top + rows]), labels[top : top + rows])
    return labels


def _best_class(planes: Iterator[torch.Tensor], labels: torch.Tensor) -> None:
    best = next(planes).clone()
    labels.zero_()
    for index, plane in enumerate(planes, start=1):
        labels.masked_fill_(plane > best, index)
        torch.maximum(best, plane, out=best)
    if not torch.isfinite(best).all():  # `maximum` propagates a NaN of any class
        raise ValueError(
            "The scores of an image hold NaN or infinite values: its pixels or the model's weights are not finite, or "
            "float16 overflows, in which case bfloat16 or float32 must be used."
        )


def _resized(plane: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    resized = F.interpolate(plane[None, None].float(), size=size, mode="bilinear", align_corners=False)
    return resized[0, 0]


def check_sizes(name: str, sizes: Iterable[Sequence] | torch.Tensor, batch_size: int) -> list[tuple[int, int]]:
    """Converts `sizes` to a list of `batch_size` tuples (height, width); `name` is for the error."""
    checked = [tuple(int(length) for length in size) for size in sizes]
    if len(checked) != batch_size:
        raise ValueError(f"`{name}` holds {len(checked)} for {batch_size} images; it must hold one size per image.")
    for size in checked:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"`{name}` holds {size}; it must hold pairs (height, width) of at least 1 pixel.")
    return [(height, width) for height, width in checked]
