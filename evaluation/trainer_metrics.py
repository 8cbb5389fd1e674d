"""
Mean IoU for a plain `transformers.Trainer`, without collecting scores.

By default [`Trainer`] keeps the scores of all images until the end of an evaluation: classes x pixels x 4 bytes for
each image. With the two parts below it holds the label maps of one batch and a confusion matrix.
"""

from typing import Any

import torch
from transformers import EvalPrediction, PreTrainedConfig

from mfuser.evaluation.metrics import MeanIoU
from mfuser.postprocessing_mfuser import label_map_of_scores


def preprocess_logits_for_metrics(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor
) -> torch.Tensor:
    """
    Computes the predicted label maps: the `preprocess_logits_for_metrics` of [`Trainer`].

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels, height, width)` or a tuple):
            The scores; of a tuple, the first element is used.
        labels (`torch.Tensor` of shape `(batch_size, label_height, label_width)`):
            The labels, to whose size the scores are resized bilinearly before the argmax.

    Returns:
        `torch.Tensor` of shape `(batch_size, label_height, label_width)`, uint8: Class ids.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    height, width = labels.shape[-2:]
    return torch.stack([label_map_of_scores(image_scores, (height, width)) for image_scores in scores])


def named_scores(scores: dict[str, Any], id2label: dict[int, str]) -> dict[str, float]:
    """The scores of [`MeanIoU.compute`] as metrics of a trainer: `mean_iou`, `overall_accuracy`, `iou_<class>`."""
    metrics = {"mean_iou": scores["mean_iou"], "overall_accuracy": scores["overall_accuracy"]}
    return metrics | {f"iou_{id2label[index]}": iou for index, iou in enumerate(scores["per_category_iou"].tolist())}


class ComputeMeanIoU:
    """
    Streaming mean IoU: the `compute_metrics` of a [`Trainer`] with `batch_eval_metrics=True`.

    The counts of each batch are added to one confusion matrix, which is reset when the scores are computed. They equal
    those of [`~mfuser.training.trainer.MFuserTrainer`]. After an evaluation that was interrupted, call
    `metric.reset()`.

    Args:
        config ([`PreTrainedConfig`]):
            The configuration of the model, with its `id2label` and `semantic_loss_ignore_index`.
    """

    def __init__(self, config: PreTrainedConfig):
        self.id2label = config.id2label
        self.metric = MeanIoU(len(config.id2label), config.semantic_loss_ignore_index)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """
        Counts a batch.

        Args:
            prediction ([`EvalPrediction`]):
                The label maps of [`preprocess_logits_for_metrics`] and the labels.
            compute_result (`bool`, *optional*, defaults to `True`):
                Whether this is the last batch.

        Returns:
            `dict`: The scores of all batches after the last one, otherwise nothing.
        """
        self.metric.update(prediction.predictions, prediction.label_ids)
        if not compute_result:
            return {}
        try:
            return named_scores(self.metric.compute(), self.id2label)
        finally:
            self.metric.reset()


__all__ = ["ComputeMeanIoU", "named_scores", "preprocess_logits_for_metrics"]
