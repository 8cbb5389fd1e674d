"""Time of what surrounds the model: metric, augmentation, post-processing."""

import datasets
import evaluate
import numpy as np
import torch
from PIL import Image

from mfuser.data.augmentation import TrainingAugmentation
from mfuser.evaluation.metrics import MeanIoU
from mfuser.scripts.benchmark_measuring import in_turns


class HistogramMeanIou(evaluate.Metric):
    """evaluate's mean_iou by its published definition (the script is on the Hub): three histograms a map."""

    def _info(self):
        image = datasets.Image()
        features = datasets.Features({"predictions": image, "references": image})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        areas = np.zeros((3, 19))
        for prediction, label in zip(map(np.array, predictions), map(np.array, references), strict=True):
            known = label != 255
            prediction, label = prediction[known], label[known]
            for row, values in enumerate((prediction[prediction == label], prediction, label)):
                areas[row] += np.histogram(values, bins=19, range=(0, 18))[0]
        intersection, predicted, labelled = areas
        return {"mean_iou": np.nanmean(intersection / (predicted + labelled - intersection))}


def benchmark_metric(options) -> list[dict]:
    """Mean IoU of 100 maps of 1024 x 2048, ours beside evaluate's mean_iou."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 19, (100, 32, 64), dtype=np.uint8)
    labels = np.kron(coarse, np.ones((32, 32), np.uint8))
    predictions = np.where(generator.random(labels.shape[1:]) < 0.8, labels, 3).astype(np.uint8)
    labels[:, :50] = 255
    scores = {}

    def run_ours():
        metric = MeanIoU(19)
        for prediction, label in zip(predictions, labels, strict=True):
            metric.update(torch.from_numpy(prediction), torch.from_numpy(label))
        scores["ours"] = metric.compute()["mean_iou"]

    def run_evaluate():
        metric = HistogramMeanIou()
        for prediction, label in zip(predictions, labels, strict=True):
            metric.add(predictions=prediction, references=label)
        scores["evaluate"] = metric.compute()["mean_iou"]

    seconds = in_turns({"ours": run_ours, "evaluate": run_evaluate}, 1, "cpu")
    return [
        {
            "metric": name,
            "ms a map": 1e3 * value / len(labels),
            "mIoU": float(scores[name]),
            "times evaluate's speed": seconds["evaluate"] / value,
        }
        for name, value in seconds.items()
    ]


def benchmark_augmentation(options) -> list[dict]:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (1052, 1914, 3), dtype=np.uint8))
    label = Image.fromarray(generator.integers(0, 19, (1052, 1914), dtype=np.uint8))
    augmentation = TrainingAugmentation(crop_size=512)
    seconds = in_turns({"augmentation": lambda: augmentation(image, label, generator)}, 5 * options.rounds, "cpu")
    return [{"augmentation": "1914 x 1052 to 512", "images/s": 1 / seconds["augmentation"]}]
