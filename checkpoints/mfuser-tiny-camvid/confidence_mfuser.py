"""
Confidence: the estimated probability that the predicted class of a pixel is right.

The scores of mask classification are not probabilities. Their sum is between 0 and the number of classes: if no mask
covers a pixel, all are small. Without calibration, the confidence is the share of the best class in their sum. With
calibration, it is a logistic regression on three numbers: the logarithm of the best score (small if no class is
detected), the logarithm of its ratio to the second best (small if classes are ambiguous), and the entropy of the
classes in the image (small if the model detects only a few classes, as in unusual images).
"""

import math
from typing import Any

import torch
from torch.nn import functional as F

from .class_names_mfuser import IGNORE_INDEX

UNKNOWN = IGNORE_INDEX  # the label of pixels whose confidence is too low
FEATURES = ("log_score", "log_margin", "class_entropy")
CALIBRATION_KEYS = (*FEATURES, "bias")
SMALLEST_SCORE = 1e-6  # smaller scores count as this one, so that logarithms are finite


def check_calibration(calibration: dict[str, Any]) -> None:
    """Raises `ValueError` unless `calibration` holds one finite number for each of `CALIBRATION_KEYS`."""
    finite = all(type(value) in (int, float) and math.isfinite(value) for value in calibration.values())
    if set(calibration) != set(CALIBRATION_KEYS) or not finite:
        raise ValueError(
            f"confidence_calibration is {calibration}; it must hold one finite number for each of "
            f"{', '.join(CALIBRATION_KEYS)} (`mfuser calibrate` computes them)"
        )


def pixel_features(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes the features of a pixel: the logarithm of its best score, and that of its ratio to the second best.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_labels, *)`):
            Class scores of the model, not negative.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Two tensors of shape `(batch_size, *)`.
    """
    best = scores[:, 0].clamp(min=SMALLEST_SCORE)
    second = torch.full_like(best, SMALLEST_SCORE)
    for plane in scores.unbind(dim=1)[1:]:  # no copy of all planes, unlike topk
        second = torch.maximum(second, torch.minimum(best, plane))
        best = torch.maximum(best, plane)
    return best.log(), best.log() - second.log()


def class_entropy(scores: torch.Tensor) -> torch.Tensor:
    """
    Computes the feature of an image: the entropy of its classes, each weighted by its share of the scores.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_labels, *)`):
            Class scores of the model, not negative.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: From 0 for one class to log(num_labels) for all classes equally.
    """
    total = scores.sum(dim=1).clamp(min=SMALLEST_SCORE)
    shares = torch.stack([(plane / total).flatten(1).mean(dim=1) for plane in scores.unbind(dim=1)], dim=1)
    return -torch.xlogy(shares, shares).sum(dim=1)


def confidence_map(scores: torch.Tensor, calibration: dict[str, Any] | None = None) -> torch.Tensor:
    """
    Computes the confidence of every pixel.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_labels, height, width)`):
            Class scores of whole images, not negative.
        calibration (`dict[str, float]`, *optional*):
            `confidence_calibration` of the configuration: the weight of each feature, and the bias. By default the
            confidence is the largest score divided by the sum of the scores.

    Returns:
        `torch.Tensor` of shape `(batch_size, height, width)`: Values in [0, 1].
    """
    if calibration is None:
        return scores.amax(dim=1) / scores.sum(dim=1).clamp(min=SMALLEST_SCORE)
    log_score, log_margin = pixel_features(scores)
    logit = calibration["log_score"] * log_score + calibration["log_margin"] * log_margin
    logit = logit + (calibration["class_entropy"] * class_entropy(scores) + calibration["bias"])[:, None, None]
    return logit.sigmoid()


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
