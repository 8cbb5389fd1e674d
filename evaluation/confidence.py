"""
Metrics of confidences: calibration error, detection of wrong pixels, and scores of the most confident pixels.

Every metric is computed from three histograms of integers, so that memory does not depend on the number of images and
counts of several processes add up exactly.
"""

from typing import Any

import numpy as np
import torch

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.confidence_mfuser import confidence_map, resize_maps
from mfuser.evaluation.domains import EvaluationDomain
from mfuser.evaluation.protocols import Sample

CALIBRATION_BINS = 15
# Confidences are counted in steps of 1 / 6000, a whole number of which make one bin of the calibration error.
STEPS = CALIBRATION_BINS * 400
COVERAGES = (1.0, 0.9, 0.8)


class ConfidenceHistogram:
    """
    Streaming counts of labels, predictions and correct predictions by confidence.

    The state is an int64 tensor of shape `(3, 6000, num_classes)`: for each step of confidence and each class, the
    pixels with that label, the pixels with that prediction, and the pixels with both. A confusion matrix for each step
    would give the same metrics with `num_classes` times the memory.

    Args:
        num_classes (`int`):
            Number of classes. Labels are 0 to num_classes - 1 or `ignore_index`.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of ignored pixels.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Device on which pixels are counted.
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(3, STEPS, num_classes, dtype=torch.int64, device=device)

    def update(self, confidence: torch.Tensor, prediction: torch.Tensor, label: torch.Tensor) -> None:
        """
        Counts the pixels of one map or of a batch of maps.

        Args:
            confidence (`torch.Tensor`):
                Confidences in [0, 1], in any shape.
            prediction (`torch.Tensor`):
                Predicted class ids as integers, in the same shape.
            label (`torch.Tensor`):
                Labels as integers, in the same shape; class ids or `ignore_index`.

        Raises:
            ValueError: If shapes differ, or a confidence is not in [0, 1]. Nothing is counted then.
        """
        device = self.counts.device
        confidence, prediction, label = confidence.to(device), prediction.to(device), label.to(device)
        if not confidence.shape == prediction.shape == label.shape:
            raise ValueError(
                f"confidence has shape {tuple(confidence.shape)}, prediction {tuple(prediction.shape)} and label "
                f"{tuple(label.shape)}; they must be equal"
            )
        known = label != self.ignore_index
        confidence, prediction, label = confidence[known], prediction[known].long(), label[known].long()
        if not ((confidence >= 0) & (confidence <= 1)).all():  # false for NaN too
            raise ValueError("confidence holds values outside [0, 1] or NaN; all must be in [0, 1]")
        row = (confidence * STEPS).long().clamp_(max=STEPS - 1) * self.num_classes
        correct = prediction == label
        for counts, codes in zip(self.counts, (row + label, row + prediction, (row + label)[correct]), strict=True):
            counts += torch.bincount(codes, minlength=counts.numel()).view_as(counts)

    def empty_copy(self) -> "ConfidenceHistogram":
        """A histogram with the same classes that has counted nothing."""
        return ConfidenceHistogram(self.num_classes, self.ignore_index, self.counts.device)

    def merge(self, other: "ConfidenceHistogram") -> None:
        """Adds the counts of `other`, which must have the same number of classes."""
        self.counts += other.counts.to(self.counts.device)

    def reduce(self, accelerator) -> "ConfidenceHistogram":
        """A histogram with the exact sum over all processes, see [`MeanIoU.reduce`]."""
        reduced = self.empty_copy()
        reduced.counts = accelerator.reduce(self.counts, reduction="sum")
        return reduced

    def compute(self, classes: list[int] | None = None) -> dict[str, Any]:
        """
        Computes the metrics of all pixels counted so far.

        Args:
            classes (`list[int]`, *optional*):
                Class ids to average the IoU over; by default all. The other metrics are those of all pixels.

        Returns:
            `dict`: The metrics, as JSON-serialisable values:

            - `ece`: Expected calibration error, over 15 bins of equal width: the mean over pixels of the distance
              between the accuracy and the mean confidence of their bin.
            - `auroc`: Area under the ROC curve of wrong pixels, found by low confidence; `None` if no pixel is wrong
              or none is right.
            - `aupr`: Average precision of the same detection; its value for a random order is `1 - accuracy`.
            - `accuracy`, `mean_confidence`: Over all pixels.
            - `coverage`: For 100, 90 and 80 % of the pixels, those of highest confidence: `mean_iou` and `accuracy`
              of these pixels, the `threshold` that keeps them, the share that it keeps (`coverage`, at least the
              requested share) and the number of `classes` that occur among them.
            - `reliability`: `confidence`, `accuracy` and `pixels` of each of the 15 bins that is not empty.

        Raises:
            ValueError: If no labelled pixel was counted.
        """
        counts = self.counts.cpu().numpy()
        labels, _, correct = counts
        pixels, right = labels.sum(axis=1), correct.sum(axis=1)
        total = int(pixels.sum())
        if total == 0:
            raise ValueError("no labelled pixel was counted; the metrics need at least one")
        bins = _reliability(pixels, right)
        return {
            "ece": sum(each["pixels"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / total,
            "auroc": _auroc(pixels - right, right),
            "aupr": _average_precision(pixels - right, pixels),
            "accuracy": int(right.sum()) / total,
            "mean_confidence": sum(each["pixels"] * each["confidence"] for each in bins) / total,
            "coverage": [_scores_at_coverage(share, counts, classes) for share in COVERAGES],
            "reliability": bins,
        }


class DomainConfidence:
    """
    The confidences of a model on a domain, by condition: without calibration, and with it if the model is calibrated.

    Args:
        domain (`EvaluationDomain`):
            The domain.
        model ([`MFuserForSemanticSegmentation`]):
            The model, on its device.
    """

    def __init__(self, domain: EvaluationDomain, model):
        self.row_conditions = domain.rows.conditions
        self.temperatures = {"uncalibrated": 1.0}
        if model.config.confidence_temperature is not None:
            self.temperatures["calibrated"] = model.config.confidence_temperature
        self.histograms = {
            name: {
                condition: ConfidenceHistogram(len(domain.id2label), device=model.device)
                for condition in domain.conditions
            }
            for name in self.temperatures
        }

    def update(self, sample: Sample, scores: torch.Tensor, prediction: torch.Tensor) -> None:
        """
        Counts the pixels of an image, if its sample has a label.

        Args:
            sample (`Sample`):
                The image.
            scores (`torch.Tensor` of shape `(num_labels, height, width)`):
                Its scores at the size at which it is segmented.
            prediction (`torch.Tensor` of shape `sample.size`):
                Its label map.
        """
        if sample.label is None:
            return
        condition = self.row_conditions[sample.row]
        for name, temperature in self.temperatures.items():
            confidence = resize_maps(confidence_map(scores[None], temperature), sample.size)[0]
            self.histograms[name][condition].update(confidence, prediction, sample.label)

    def reduce(self, accelerator) -> None:
        """Sums the counts over all processes. To be called once, by each of them."""
        for by_condition in self.histograms.values():
            for condition, histogram in by_condition.items():
                by_condition[condition] = histogram.reduce(accelerator)

    def result(self, classes: list[int]) -> dict[str, Any]:
        """
        The metrics of [`ConfidenceHistogram.compute`], as JSON-serialisable values.

        Args:
            classes (`list[int]`):
                Class ids to average the IoU over.

        Returns:
            `dict`: For "uncalibrated" and, if the model is calibrated, "calibrated": the metrics of all pixels,
            `pooled`, and those of each condition, `conditions`.
        """
        result = {}
        for name, by_condition in self.histograms.items():
            pooled = next(iter(by_condition.values())).empty_copy()
            for histogram in by_condition.values():
                pooled.merge(histogram)
            result[name] = {
                "pooled": pooled.compute(classes),
                "conditions": {
                    condition: histogram.compute(classes)
                    for condition, histogram in by_condition.items()
                    if condition is not None and histogram.counts.any()
                },
            }
        return result


def _reliability(pixels: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Mean confidence, accuracy and pixels of the bins of the calibration error that are not empty."""
    confidences = (np.arange(STEPS) + 0.5) / STEPS
    by_bin = (values.reshape(CALIBRATION_BINS, -1).sum(axis=1) for values in (pixels, right, pixels * confidences))
    return [
        {"confidence": float(weighted / count), "accuracy": float(hits / count), "pixels": int(count)}
        for count, hits, weighted in zip(*by_bin, strict=True)
        if count
    ]


def _auroc(wrong: np.ndarray, right: np.ndarray) -> float | None:
    """The probability that a wrong pixel has a lower confidence than a right one; equal ones count half."""
    if not (wrong.any() and right.any()):
        return None
    below = wrong.cumsum() - wrong / 2
    return float((right / right.sum()) @ (below / wrong.sum()))


def _average_precision(wrong: np.ndarray, pixels: np.ndarray) -> float | None:
    """The mean over wrong pixels of the share of wrong pixels among those of at most their confidence."""
    if not wrong.any():
        return None
    precision = wrong.cumsum() / np.maximum(pixels.cumsum(), 1)
    return float(wrong / wrong.sum() @ precision)


def _scores_at_coverage(share: float, counts: np.ndarray, classes: list[int] | None) -> dict[str, Any]:
    """The scores of the pixels of highest confidence that make up at least `share` of all."""
    pixels = counts[0].sum(axis=1)
    kept = pixels[::-1].cumsum()[::-1]  # the pixels of at least each confidence
    first = int((kept >= share * kept[0]).nonzero()[0][-1])
    labels, predictions, correct = counts[:, first:].sum(axis=1)
    union = labels + predictions - correct
    averaged = [index for index in (range(len(union)) if classes is None else classes) if union[index]]
    return {
        "requested": share,
        "coverage": float(kept[first] / kept[0]),
        "threshold": first / STEPS,
        "mean_iou": float((correct[averaged] / union[averaged]).mean()) if averaged else None,
        "accuracy": float(correct.sum() / labels.sum()),
        "classes": len(averaged),
    }
