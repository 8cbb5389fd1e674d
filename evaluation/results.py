"""The result of scoring a domain: one confusion matrix per condition, and the scores computed from it."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.data.domain import EvaluationSize
from mfuser.evaluation.domains import EvaluationDomain
from mfuser.evaluation.image_scores import ImageScore, score_of_image
from mfuser.evaluation.metrics import MeanIoU
from mfuser.evaluation.protocols import Sample


class DomainMetric:
    """
    The counts that are accumulated while a domain is scored. Their size does not depend on the number of images.

    Args:
        domain (`EvaluationDomain`):
            The domain.
        device (`torch.device`):
            The device of the confusion matrices.
        image_classes (`list[int]`, *optional*):
            Class ids over which the score of each single image is averaged. By default images are not scored singly.
    """

    def __init__(self, domain: EvaluationDomain, device: torch.device, image_classes: list[int] | None = None):
        self.domain = domain
        self.device = device
        self.row_conditions = domain.rows.conditions
        self.by_condition = {name: self._new_metric() for name in domain.conditions}
        self.labelled = dict.fromkeys(self.by_condition, 0)
        self.unlabelled = 0
        self.problems: list[tuple[int, str]] = []
        self.image_classes = image_classes
        self.images: list[ImageScore] = []

    def _new_metric(self) -> MeanIoU:
        return MeanIoU(len(self.domain.id2label), IGNORE_INDEX, self.device)

    def update(self, sample: Sample, prediction: torch.Tensor) -> None:
        """Counts the pixels of a prediction (height, width), if its sample has a label."""
        if sample.label is None:
            self.unlabelled += 1
            return
        condition = self.row_conditions[sample.row]
        self.labelled[condition] += 1
        if self.image_classes is None:
            self.by_condition[condition].update(prediction, sample.label)
            return
        image = self._new_metric()
        image.update(prediction, sample.label)
        self.by_condition[condition].merge(image)
        score = score_of_image(sample.row, image, self.image_classes)
        if score is not None:
            self.images.append(score)

    def skip(self, row: int, problem: str) -> None:
        """Records that the row at that position cannot be used, and why."""
        self.problems.append((row, problem))

    def reduce(self, accelerator) -> None:
        """Sums the counts over all processes. To be called once, by each of them."""
        self.by_condition = {name: metric.reduce(accelerator) for name, metric in self.by_condition.items()}
        parts = gather_object([(self.labelled, self.unlabelled, self.problems, self.images)])
        self.labelled = {name: sum(labelled[name] for labelled, *_ in parts) for name in self.labelled}
        self.unlabelled = sum(unlabelled for _, unlabelled, *_ in parts)
        self.problems = sorted(problem for _, _, problems, _ in parts for problem in problems)
        self.images = sorted(score for *_, images in parts for score in images)

    @property
    def skipped(self) -> list[dict[str, str]]:
        """`name` and `reason` of the rows that were skipped."""
        names = self.domain.rows.names
        return [{"name": names[row], "reason": problem} for row, problem in self.problems]

    def pooled(self, classes: list[int]) -> MeanIoU:
        """
        The metric over all conditions.

        Raises:
            ValueError: If the domain has labels, but no pixel has a label of `classes`.
        """
        pooled = self._new_metric()
        for metric in self.by_condition.values():
            pooled.merge(metric)
        if self.domain.rows.labelled and not pooled.matrix[classes].any():
            skipped = self.skipped
            first = f"; the first of {len(skipped)} skipped: {_reason(skipped[0])}" if skipped else ""
            images = sum(self.labelled.values())
            raise ValueError(f"{self.domain.name}: no pixel with a label that is scored in {images} images{first}")
        return pooled

    def result(self, evaluation_size: EvaluationSize, classes: list[int]) -> dict[str, Any]:
        """The result of `evaluate_domain`, with means over `classes`."""
        domain, pooled = self.domain, self.pooled(classes)
        images = sum(self.labelled.values())
        result: dict[str, Any] = {
            "mean_iou": None,
            "mean_iou_over": None,
            "domain": domain.domain.title if domain.domain else None,
            "source": domain.source,
            "split": domain.split,
            "label_map": domain.label_map_name,
            "label_size": "half" if domain.halved or evaluation_size.halve_first else "full",
            "segmented_at": {
                "fit": None if evaluation_size.fit is None else list(evaluation_size.fit),
                "halve_first": evaluation_size.halve_first,
            },
            "images": images,
            "expected_images": domain.expected_images,
            "unlabelled_images": self.unlabelled,
            "skipped": [*domain.skipped, *self.skipped],
            "pooled": None,
            "conditions": {},
        }
        if pooled.matrix[classes].any():
            result["pooled"] = _scores(pooled, domain, classes, images)
            result["conditions"] = {
                name: _scores(metric, domain, classes, self.labelled[name])
                for name, metric in self.by_condition.items()
                if name is not None and metric.matrix[classes].any()
            }
            result["mean_iou_over"] = "conditions" if result["conditions"] else "pixels"
            averaged = list(result["conditions"].values()) or [result["pooled"]]
            result["mean_iou"] = sum(scores["mean_iou"] for scores in averaged) / len(averaged)
        return result


def _reason(skipped: dict[str, str]) -> str:
    return f"{skipped['name']}: {skipped['reason']}"


def _scores(metric: MeanIoU, domain: EvaluationDomain, classes: list[int], images: int) -> dict[str, Any]:
    """The scores of a confusion matrix, ready for JSON."""
    scores = metric.compute(classes)
    iou = scores["per_category_iou"].tolist()
    return {
        "images": images,
        "mean_iou": scores["mean_iou"],
        "mean_accuracy": scores["mean_accuracy"],
        "overall_accuracy": scores["overall_accuracy"],
        "per_class_iou": {
            name: None if np.isnan(iou[index]) else iou[index] for index, name in domain.id2label.items()
        },
        "classes_averaged": [domain.id2label[index] for index in scores["classes_averaged"]],
        "confusion_matrix": metric.matrix.tolist(),
    }
