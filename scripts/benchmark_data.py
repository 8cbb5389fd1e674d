"""Time of the steps before and after the model: augmentation, post-processing, metric."""

import io
from functools import partial

import datasets
import evaluate
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from mfuser.data.augmentation import TrainingAugmentation
from mfuser.evaluation.metrics import MeanIoU
from mfuser.postprocessing_mfuser import label_map_of_scores
from mfuser.scripts.benchmark_measuring import forget_peak, in_own_process, in_turns, status_kibibytes
from mfuser.scripts.benchmark_model import train_step


class HistogramMeanIou(evaluate.Metric):
    """evaluate's mean_iou by its published definition (the script is on the Hub): three histograms per map."""

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
    """Mean IoU of 100 maps of 1024 x 2048, compared with evaluate's mean_iou."""
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
            "ms per map": 1e3 * value / len(labels),
            "mIoU": float(scores[name]),
            "speedup over evaluate": seconds["evaluate"] / value,
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


def argmax_of_resized(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)


def postprocessing_peak_mebibytes(name: str, device: str, resized: bool) -> float:
    """Memory beyond the scores, measured in a separate process."""
    scores = evaluation_scores(device, resized)
    POSTPROCESSING[name](scores[:, :64, :64], (64, 64))
    forget_peak(device)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        POSTPROCESSING[name](scores, FULL_SIZE)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = status_kibibytes("VmRSS")
    POSTPROCESSING[name](scores, FULL_SIZE)
    return (status_kibibytes("VmHWM") - before) / 1024


def evaluation_scores(device: str, resized: bool) -> torch.Tensor:
    size = (512, 1024) if resized else FULL_SIZE
    return torch.randn(19, *size, generator=torch.Generator().manual_seed(0)).to(device)


FULL_SIZE = (1024, 2048)
POSTPROCESSING = {"argmax of all classes": argmax_of_resized, "label_map_of_scores": label_map_of_scores}


@torch.inference_mode()
def benchmark_postprocessing(options) -> list[dict]:
    """Scores of 19 classes to labels of 1024 x 2048: of that size, and of half of it, resized first."""
    rows = []
    for resized in (False, True):
        scores = evaluation_scores(options.device, resized)
        candidates = {name: partial(function, scores, FULL_SIZE) for name, function in POSTPROCESSING.items()}
        for name, seconds in in_turns(candidates, 2 * options.rounds, options.device).items():
            arguments = (name, options.device, resized)
            peak = in_own_process(postprocessing_peak_mebibytes, *arguments, keep_freed=False)
            size = "x".join(map(str, scores.shape[1:]))
            rows.append({"labels of 1024 x 2048": name, "scores": size, "ms": 1e3 * seconds, "peak MiB": peak})
    return rows


def benchmark_loading(options) -> list[dict]:
    """A training sample, decoded and augmented on one core, compared with a training step of batch 2."""
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 255, (66, 120, 3), dtype=np.uint8)).resize((1914, 1052))
    files = {}
    for name, picture in (("image", noise), ("label", noise.convert("L").point(lambda value: value % 19))):
        files[name] = io.BytesIO()
        picture.save(files[name], "PNG")
    crop = 512 if options.device.startswith("cuda") else 256
    augmentation = TrainingAugmentation(crop_size=crop)

    def sample():
        augmentation(Image.open(files["image"]).convert("RGB"), Image.open(files["label"]), generator)

    seconds = in_turns({"sample": sample}, 5 * options.rounds, "cpu")["sample"]
    step = in_own_process(train_step, crop, 2, options.device, options.dtype, options.rounds)
    return [
        {"loading": f"a sample of 1914 x 1052 to {crop}, one core", "images/s": 1 / seconds},
        {
            "loading": f"the training step, batch 2, {options.device}",
            "images/s": step["images/s"],
            "cores that load for it": seconds * step["images/s"],
        },
    ]
