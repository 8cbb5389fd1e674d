"""`MeanIoU` as a metric of the `evaluate` library: `evaluate.load("evaluation/domain_mean_iou.py")`, offline."""

import datasets
import evaluate

# A relative import, so that `evaluate.load` copies metrics.py and the package need not be installed.
from .metrics import MeanIoU

_DESCRIPTION = """
Mean intersection over union of semantic segmentation maps, with pixel and mean class accuracy, accumulated in one
confusion matrix: memory does not grow with the number of maps.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of integer arrays of shape `(height, width)`):
        Predicted class ids of each image. Images may differ in size.
    references (`list` of integer arrays of shape `(height, width)`):
        Labels of each image; pixels with the label `ignore_index` are ignored.
    classes (`list[int]`, *optional*):
        Classes to average over; by default all.

Returns:
    `dict`: `mean_iou`, `mean_accuracy`, `overall_accuracy`, `per_category_iou`, `per_category_accuracy` and
    `classes_averaged`.
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
    """
    [`MeanIoU`] as a metric of the `evaluate` library.

    `add`, `add_batch` and `compute` count immediately and store no maps. The metric runs in one process only; in
    several, use [`MeanIoU`] and its `reduce` method.

    Args:
        num_labels (`int`, *optional*, defaults to 19):
            Number of classes.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of ignored pixels.
    """

    def __init__(self, *args, num_labels: int = 19, ignore_index: int = 255, **kwargs):
        super().__init__(*args, **kwargs)
        if self.num_process != 1:
            raise ValueError(
                f"num_process is {self.num_process}; DomainMeanIou runs in one process, and MeanIoU with reduce() in "
                "several"
            )
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
        """Counts one predicted map of shape `(height, width)` against its reference."""
        self.mean_iou.update(prediction, reference)

    def add_batch(self, *, predictions, references):
        """Counts predicted maps, each of shape `(height, width)`, against their references."""
        if len(predictions) != len(references):
            raise ValueError(
                f"there are {len(predictions)} predictions for {len(references)} references; give one for each"
            )
        for prediction, reference in zip(predictions, references, strict=True):
            self.mean_iou.update(prediction, reference)

    def compute(self, *, predictions=None, references=None, classes=None):
        """Computes the scores of all maps added and of the given maps, then resets the counts."""
        if (predictions is None) != (references is None):
            raise ValueError("only one of predictions and references is given; give both or neither")
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        scores = self.mean_iou.compute(classes)
        self.mean_iou.reset()
        return scores
