"""A model that scores pixels by their colour, and small datasets for it, for the tests of evaluation."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from mfuser import MFuserImageProcessor

NAMES = {0: "road", 1: "sky", 2: "car", 3: "person"}


class Colours(torch.nn.Module):
    """Scores each pixel by its colour, and records the shapes of its inputs."""

    def __init__(self, classes=NAMES):
        super().__init__()
        self.config = SimpleNamespace(id2label=dict(classes), patch_size=1, crop_size=512, windows_per_batch=None)
        self.config.num_labels = len(classes)
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.nn.Parameter(torch.randn(len(classes), 3, generator=generator))
        self.shown = []

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values):
        self.shown.append(tuple(pixel_values.shape))
        return SimpleNamespace(logits=torch.einsum("kc,bchw->bkhw", self.weights, pixel_values))


def pixels_and_labels(count=6, classes=4, sizes=((20, 28), (24, 20)), ignored=0.2, seed=0):
    rng = np.random.default_rng(seed)
    for index in range(count):
        size = sizes[index % len(sizes)]
        label = rng.integers(0, classes, size).astype(np.uint8)
        label[rng.random(size) < ignored] = 255
        yield rng.integers(0, 256, (*size, 3), dtype=np.uint8), label


def write_dataset(file, rows, conditions=None, names=None, labelled=True, classes=NAMES):
    """Writes a parquet file, and the class names next to it."""
    images, labels = zip(*rows, strict=True)
    columns = {"image": [Image.fromarray(image) for image in images]}
    columns["label"] = [Image.fromarray(label) if labelled and label is not None else None for label in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    for name, values in (("condition", conditions), ("name", names)):
        if values is not None:
            columns[name], features[name] = values, datasets.Value("string")
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
    (file.parent / "id2label.json").write_text(json.dumps(classes))
    return file


def expected_prediction(model, image):
    mean, std = np.array(MFuserImageProcessor.image_mean), np.array(MFuserImageProcessor.image_std)
    normalised = (image / 255 - mean) / std
    return (normalised @ model.weights.detach().double().numpy().T).argmax(-1)


def expected_iou(pairs, classes):
    """The confusion matrix by scikit-learn, and the IoU of each class."""
    prediction, label = (np.concatenate([pair[part].ravel() for pair in pairs]) for part in (0, 1))
    matrix = confusion_matrix(label[label != 255], prediction[label != 255], labels=range(classes))
    with np.errstate(invalid="ignore"):
        return matrix, matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())


def run_evaluate(processes, cache, *arguments):
    """Runs `mfuser evaluate` in one or several new processes on the CPU; `cache` is the folder of the datasets."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launch, "-m", "mfuser.scripts.evaluate", *map(str, arguments), "--device", "cpu"],
        env=os.environ | {"HF_DATASETS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )
