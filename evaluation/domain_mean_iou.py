"""`MeanIoU` as a metric of the `evaluate` library: `evaluate.load("evaluation/domain_mean_iou.py")`, offline."""

import datasets
import evaluate

# Relative, so that `evaluate.load` takes metrics.py along and needs no installed package.
from .metrics import MeanIoU

_DESCRIPTION = """
Mean intersection over union of semantic segmentation maps, with pixel and mean class accuracy, accumulated in one
confusion matrix: memory does not grow with the number of maps.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: class ids, one (height, width) map of integers per image; sizes may differ from image to image.
    references: label maps of the same sizes; `ignore_index` marks the pixels that do not count.
    classes (`list[int]`, *optional*, for `compute`): average over these classes alone.
Returns:
    `mean_iou`, `mean_accuracy`, `overall_accuracy`, `per_category_iou`, `per_category_accuracy`, `classes_averaged`.
"""

_CITATION = """\
@article{everingham2015pascal,
  title   = {The Pascal Visual Object Classes Challenge: A Retrospective},
  author  = {Everingham, Mark and Eslami, S. M. Ali and Van Gool, Luc and Williams, Christopher K. I. and Winn, John
             and Zisserman, Andrew},
  journal = {International Journal of Computer Vision},
  year    = {2015}
}"""


class DomainMeanIou(evaluate.Metric):
    """`MeanIoU` as a metric of the `evaluate` library.

    `add`, `add_batch` and `compute` count at once and store no map. One process only: over several, count with
    `MeanIoU` in each and call `MeanIoU.reduce`.

    Args:
        num_labels: number of classes.
        ignore_index: label of the pixels that do not count.
    """

    def __init__(self, *args, num_labels: int = 19, ignore_index: int = 255, **kwargs):
        super().__init__(*args, **kwargs)
        if self.num_process != 1:
            raise ValueError("DomainMeanIou counts in one process; over several, use MeanIoU and its reduce().")
        self.mean_iou = MeanIoU(num_labels, ignore_index)

    def _info(self):
        integer_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": integer_map, "references": integer_map}),
        )

    def add(self, *, prediction, reference):
        """Count one predicted map (height, width) against its reference."""
        self.mean_iou.update(prediction, reference)

    def add_batch(self, *, predictions, references):
        """Count predicted maps, each (height, width), against their references."""
        if len(predictions) != len(references):
            raise ValueError(f"Got {len(predictions)} predictions for {len(references)} references.")
        for prediction, reference in zip(predictions, references, strict=True):
            self.mean_iou.update(prediction, reference)

    def compute(self, *, predictions=None, references=None, classes=None):
        """Scores of everything added, and of the given maps if any; the count then starts anew."""
        if (predictions is None) != (references is None):
            raise ValueError("compute needs predictions and references, or neither.")
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        scores = self.mean_iou.compute(classes)
        self.mean_iou.reset()
        return scores
