"""
Confidence: the estimated probability that the predicted class of a pixel is right.

The scores of mask classification are not probabilities: their sum is between 0 and the number of classes. The
confidence is the largest value of the softmax of their logarithms, divided by a temperature (Guo et al., "On
Calibration of Modern Neural Networks", ICML 2017). At temperature 1, it is the share of the best class in the sum of
the scores.
"""

from typing import Any

import torch
from torch.nn import functional as F

from .class_names_mfuser import IGNORE_INDEX

UNKNOWN = IGNORE_INDEX  # the label of pixels whose confidence is too low
SMALLEST_SCORE = 1e-6  # smaller scores count as this one, so that logarithms are finite


def confidence_map(scores: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
    """
    Computes the confidence of every pixel, softmax(log(scores) / temperature) of the best class.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_labels, *)`):
            Class scores, not negative.
        temperature (`float`, *optional*, defaults to 1):
            `confidence_temperature` of the configuration.

    Returns:
        `torch.Tensor` of shape `(batch_size, *)`: Values in [1 / num_labels, 1], in float32 or float64.

    Raises:
        ValueError: If the temperature is not positive.
    """
    temperature = 1.0 if temperature is None else temperature
    if not temperature > 0:
        raise ValueError(f"the temperature of confidences is {temperature}; it must be positive")
    dtype = torch.promote_types(scores.dtype, torch.float32)  # half precision would lose small terms of the sum
    best = scores.amax(dim=1).to(dtype).clamp(min=SMALLEST_SCORE)
    total = torch.zeros_like(best)
    for plane in scores.unbind(dim=1):  # one class at a time, since all classes are large at full resolution
        total += plane.to(dtype).clamp(min=SMALLEST_SCORE).div_(best).pow_(1 / temperature)
    return 1 / total


def resized_confidences(
    outputs: Any, input_sizes: list[tuple[int, int]], target_sizes: list[tuple[int, int]] | None
) -> list[torch.Tensor]:
    """
    The confidences of each image, without padding and at its target size.

    Args:
        outputs ([`MFuserForSemanticSegmentationOutput`]):
            Output of the model.
        input_sizes (`list[tuple[int, int]]`):
            (height, width) of each image before padding.
        target_sizes (`list[tuple[int, int]]`, *optional*):
            (height, width) of each result; by default `input_sizes`.

    Returns:
        `list[torch.Tensor]`: Confidences of shape (height, width).

    Raises:
        ValueError: If the model was not asked for confidences.
    """
    confidence = getattr(outputs, "confidence", None)
    if confidence is None:
        raise ValueError("`outputs` hold no confidence; call the model with `output_confidence=True`.")
    return [
        resize_maps(each[None, :height, :width], size)[0]
        for each, (height, width), size in zip(confidence, input_sizes, target_sizes or input_sizes, strict=True)
    ]


def resize_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes maps (channels, height, width) bilinearly to `size`."""
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def check_threshold(threshold: float | None, num_labels: int) -> None:
    """Raises `ValueError` unless pixels of a confidence below `threshold` can be labelled 255."""
    if threshold is None:
        return
    if not 0 <= threshold <= 1:
        raise ValueError(f"`unknown_threshold` is {threshold}; it must be between 0 and 1.")
    if num_labels > UNKNOWN:
        raise ValueError(
            f"The model has {num_labels} classes; with `unknown_threshold`, it can have at most {UNKNOWN}."
        )


def mark_unknown(label_map: torch.Tensor, confidence: torch.Tensor, threshold: float) -> torch.Tensor:
    """A copy of a label map in which pixels whose confidence is lower than `threshold` have the label 255."""
    return label_map.masked_fill(confidence < threshold, UNKNOWN)
