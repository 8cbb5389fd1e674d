"""A small training run from a recipe: its data and its settings, shared by the tests."""

import json
from pathlib import Path

import datasets
import numpy as np
import yaml
from PIL import Image
from tiny_models import CLASSES, DINOV2, VISION


def write_data(folder: Path, seed: int = 0) -> Path:
    """Writes parquet files of eight images in horizontal strips of four classes, and the class names."""
    generator = np.random.default_rng(seed)
    for split, number in (("train", 6), ("validation", 2)):
        rows = {"image": [], "label": []}
        for _ in range(number):
            label = np.sort(generator.integers(0, len(CLASSES), size=(72, 96)), axis=0).astype(np.uint8)
            label[0] = 255
            pixels = np.stack([label * 60] * 3, axis=-1) + generator.integers(0, 20, (72, 96, 3), dtype=np.uint8)
            rows["image"].append(Image.fromarray(pixels))
            rows["label"].append(Image.fromarray(label))
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    (folder / "id2label.json").write_text(json.dumps(dict(enumerate(CLASSES))))
    return folder


def write_recipe(folder, data):
    settings = {
        "model_config": {
            "vfm_config": DINOV2, "vlm_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 24},
            "use_text_encoder": False, "freeze_encoders": False, "fusion_out_layers": [1, 2, 3, 4],
            "enhancer_hidden_size": 32, "decoder_hidden_size": 64, "decoder_num_heads": 4, "decoder_pixel_layers": 1,
            "decoder_pixel_feedforward_size": 64, "decoder_num_layers": 2, "decoder_feedforward_size": 64,
            "loss_num_points": 64, "crop_size": 64, "crop_stride": 42,
        },
        "train_data": str(data), "validation_data": str(data), "rare_class_min_pixels": 100,
        "max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "learning_rate": 1e-3, "output_dir": str(folder / "run"),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
