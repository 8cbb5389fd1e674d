"""Transformers' example scripts for semantic segmentation fine-tune the demonstration as they are."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mfuser import MFuserForSemanticSegmentation, MFuserImageProcessor

DEMONSTRATION = Path(__file__).parents[1] / "checkpoints" / "mfuser-tiny-camvid"
SCRIPTS_VARIABLE = "TRANSFORMERS_SEMANTIC_SEGMENTATION_EXAMPLES"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Where albumentations is not installed: the transforms that the scripts use.
ALBUMENTATIONS = """
import random
import numpy
import torch
from PIL import Image


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image, mask):
        for transform in self.transforms:
            image, mask = transform(image, mask)
        return {"image": image, "mask": mask}


class Lambda:
    def __init__(self, name, mask, p):
        self.mask = mask

    def __call__(self, image, mask):
        return image, mask if self.mask is None else self.mask(mask)


class PadIfNeeded:
    def __init__(self, min_height, min_width, border_mode, value, p):
        self.size, self.value = (min_height, min_width), value

    def __call__(self, image, mask):
        pad = [(0, max(0, wanted - given)) for wanted, given in zip(self.size, mask.shape)]
        image = numpy.pad(image, [*pad, (0, 0)], constant_values=self.value)
        return image, numpy.pad(mask, pad, constant_values=self.value)


class RandomCrop:
    def __init__(self, height, width, p):
        self.size = height, width

    def __call__(self, image, mask):
        top, left = (random.randint(0, given - wanted) for wanted, given in zip(self.size, mask.shape))
        window = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        return image[window], mask[window]


class HorizontalFlip:
    def __init__(self, p):
        pass

    def __call__(self, image, mask):
        return image[:, ::-1].copy(), mask[:, ::-1].copy()


class Resize:
    def __init__(self, height, width, p):
        self.size = width, height

    def __call__(self, image, mask):
        mask = Image.fromarray(mask).resize(self.size, Image.Resampling.NEAREST)
        return numpy.array(Image.fromarray(image).resize(self.size)), numpy.array(mask)


class Normalize:
    def __init__(self, mean, std, max_pixel_value, p):
        self.mean, self.std, self.largest = numpy.array(mean), numpy.array(std), max_pixel_value

    def __call__(self, image, mask):
        return (image / self.largest - self.mean) / self.std, mask


class ToTensorV2:
    def __call__(self, image, mask):
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(mask)
"""
# The metric that the scripts load, which is on the Hub.
MEAN_IOU = """
import datasets
import evaluate
import numpy


class MeanIoU(evaluate.Metric):
    def _info(self):
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        features = datasets.Features({"predictions": maps, "references": maps})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, num_labels, ignore_index, reduce_labels=False):
        predicted, labels = (numpy.array(maps).ravel() for maps in (predictions, references))
        kept = (labels != ignore_index) & (labels < num_labels)
        counts = numpy.bincount(labels[kept] * num_labels + predicted[kept], minlength=num_labels**2)
        counts = counts.reshape(num_labels, num_labels)
        hits = counts.diagonal()
        with numpy.errstate(invalid="ignore"):
            iou, accuracy = hits / (counts.sum(0) + counts.sum(1) - hits), hits / counts.sum(1)
        result = {"mean_iou": numpy.nanmean(iou), "mean_accuracy": numpy.nanmean(accuracy)}
        result["overall_accuracy"] = hits.sum() / counts.sum()
        return {**result, "per_category_iou": iou, "per_category_accuracy": accuracy}
"""


def class_names() -> dict[int, str]:
    return MFuserForSemanticSegmentation.config_class.from_pretrained(DEMONSTRATION).id2label


def small_streets(count: int, size=(360, 480)) -> datasets.Dataset:
    """Images in which the class of a pixel is the brightness of its block."""
    draws, rows = np.random.default_rng(0), {"image": [], "label": []}
    for _ in range(count):
        labels = np.kron(draws.integers(0, len(class_names()), (6, 8), dtype=np.uint8), np.ones((60, 60), np.uint8))
        rows["label"].append(Image.fromarray(labels[: size[0], : size[1]]))
        rows["image"].append(Image.fromarray(np.repeat(labels[: size[0], : size[1], None] * 20, 3, axis=2)))
    return datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), label=datasets.Image()))


def scripts_folder() -> Path | None:
    """The folder of the scripts: that of the environment variable, or that of an installation from source."""
    if SCRIPTS_VARIABLE in os.environ:
        return Path(os.environ[SCRIPTS_VARIABLE])
    source = Path(find_spec("transformers").origin).parents[2] / "examples" / "pytorch" / "semantic-segmentation"
    return source if source.is_dir() else None


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a dataset, what the scripts download for it, and stand-ins for what may not be installed."""
    folder = tmp_path_factory.mktemp("scripts")
    data = folder / "me" / "streets"
    data.mkdir(parents=True)
    for split, count in (("train", 4), ("validation", 2)):
        small_streets(count).to_parquet(data / f"{split}.parquet")
    repository = folder / "hub" / "datasets--me--streets"
    for place in ("refs", f"snapshots/{COMMIT}"):
        (repository / place).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT / "id2label.json").write_text(json.dumps(class_names()))
    (folder / "mean_iou").mkdir()
    (folder / "mean_iou" / "mean_iou.py").write_text(MEAN_IOU)
    if find_spec("albumentations") is None:
        (folder / "albumentations").mkdir()
        (folder / "albumentations" / "__init__.py").write_text(ALBUMENTATIONS)
        (folder / "albumentations" / "pytorch.py").write_text("from . import ToTensorV2\n")
    return folder


def crop_of(processor) -> tuple[int, int]:
    """Height and width of the crops, as the scripts read them."""
    if "shortest_edge" in processor.size:
        return processor.size["shortest_edge"], processor.size["shortest_edge"]
    return processor.size["height"], processor.size["width"]


@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ({"longest_edge": 320}, (320, 320)),
        ({"shortest_edge": 300}, (300, 300)),
        ({"shortest_edge": 300, "longest_edge": 320}, (300, 300)),
        ({"height": 300, "width": 320}, (300, 320)),
    ],
)
def test_the_official_scripts_find_their_crop_in_the_size(size, crop, tmp_path):
    MFuserImageProcessor(size=size).save_pretrained(tmp_path)
    assert crop_of(AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)) == crop


@pytest.mark.slow
def test_what_the_official_scripts_call_works_on_the_demonstration(tmp_path):
    common = dict(cache_dir=None, revision="main", token=None, trust_remote_code=True)
    label2id = {name: str(index) for index, name in class_names().items()}
    config = AutoConfig.from_pretrained(DEMONSTRATION, label2id=label2id, id2label=class_names(), **common)
    model = AutoModelForSemanticSegmentation.from_pretrained(DEMONSTRATION, from_tf=False, config=config, **common)
    processor = AutoImageProcessor.from_pretrained(DEMONSTRATION, do_reduce_labels=False, **common)

    # The crop, of pixels that are normalised outside the image processor.
    height, width = crop_of(processor)
    rows = []
    for row in small_streets(2):
        pixels = np.array(row["image"].convert("RGB"))[:height, :width] / 255
        pixels = (pixels - processor.image_mean) / processor.image_std
        labels = torch.from_numpy(np.array(row["label"])[:height, :width]).long()
        rows.append({"pixel_values": torch.from_numpy(pixels.transpose(2, 0, 1)).float(), "labels": labels})

    def compute_metrics(prediction):
        logits, labels = prediction
        scores = torch.nn.functional.interpolate(torch.from_numpy(logits), size=labels.shape[-2:], mode="bilinear")
        return {"accuracy": (scores.argmax(dim=1).numpy() == labels).mean(), "scores": scores.shape[1]}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", max_steps=1, remove_unused_columns=False
        ),
        train_dataset=rows,
        eval_dataset=rows[:1],
        compute_metrics=compute_metrics,
        processing_class=processor,
        data_collator=default_data_collator,
    )
    trainer.train()
    scores = trainer.evaluate()
    assert 0 <= scores["eval_accuracy"] <= 1 and scores["eval_scores"] == len(class_names())
    trainer.save_model()
    saved = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert not saved.do_reduce_labels and saved.size == processor.size


ARGUMENTS = {
    "run_semantic_segmentation": "--do_train --do_eval --max_steps 2 --remove_unused_columns False --use_cpu "
    "--report_to none --lr_scheduler_type polynomial --save_strategy no",
    "run_semantic_segmentation_no_trainer": "--max_train_steps 2 --seed 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", ARGUMENTS)
def test_the_official_scripts_fine_tune_the_demonstration(script, workplace):
    scripts = scripts_folder()
    if scripts is None:
        pytest.skip(
            f"{script}.py is in Transformers' repository and not in its package: set {SCRIPTS_VARIABLE} to its folder"
        )
    output = workplace / script
    arguments = f"--model_name_or_path {DEMONSTRATION} --dataset_name me/streets --trust_remote_code "
    arguments += f"--output_dir {output} --per_device_train_batch_size 2 --per_device_eval_batch_size 1 "
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(workplace / "hub"),
        "ACCELERATE_USE_CPU": "1",
    }
    environment |= {"PYTHONPATH": str(workplace), "HF_DATASETS_CACHE": str(workplace / "datasets")}
    result = subprocess.run(
        [sys.executable, str(scripts / f"{script}.py"), *(arguments + ARGUMENTS[script]).split()],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    before = MFuserForSemanticSegmentation.from_pretrained(DEMONSTRATION)
    model = MFuserForSemanticSegmentation.from_pretrained(output)
    assert model.config.id2label == class_names()
    assert any(not torch.equal(old, new) for old, new in zip(before.parameters(), model.parameters(), strict=True))
    scores = json.loads((output / "all_results.json").read_text())
    assert any(name.endswith("mean_iou") and 0 <= value <= 1 for name, value in scores.items())
    assert (
        MFuserImageProcessor.from_pretrained(output).size == MFuserImageProcessor.from_pretrained(DEMONSTRATION).size
    )
