"""Unreadable rows are named, or skipped and counted; those of a monitored domain never stop the training."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import CLASSES
from tiny_recipe import write_data, write_recipe

from mfuser.data.augmentation import AugmentedDataset, TrainingAugmentation
from mfuser.data.draws import Draw
from mfuser.data.rare_class_sampling import count_class_pixels
from mfuser.data.unreadable import UnreadableRowError
from mfuser.scripts import train
from mfuser.training import trainer as trainer_module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def png(pixels) -> bytes:
    return encoded(pixels, "PNG")


def encoded(pixels, form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


IMAGE = png(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
LABEL = np.zeros((72, 96), dtype=np.uint8)
# (column, its content, the message)
DAMAGES = {
    "a truncated image": ("image", IMAGE[:200], "image file is truncated"),
    "text instead of an image": ("image", b"not an image", "cannot identify image file"),
    "an empty image": ("image", b"", ""),
    "an image of floating-point values": (
        "image",
        encoded(np.zeros((72, 96), dtype=np.float32), "TIFF"),
        "the image has mode F, floating-point values of an unknown range; save it with 8 or 16 bits",
    ),
    "a truncated label": ("label", png(LABEL)[:60], ""),
    "a label that is not a class": (
        "label",
        png(LABEL + 7),
        "the label holds [7], which are neither classes (0..3) nor 255",
    ),
    "a colour label": ("label", png(np.zeros((72, 96, 3), dtype=np.uint8)), "the label has mode RGB"),
    "a 32-bit label": ("label", None, "label values range from 0 to 70000; ids must be in 0-255"),
    "a label of another size": ("label", png(LABEL[:40]), "the image has 72x96 pixels, its label 40x96"),
}


def damaged(whole, folder, damages: dict[int, tuple[str, bytes]], split="train"):
    """A copy of the data in which cells of some rows have another content."""
    undecoded = datasets.Image(decode=False)
    folder.mkdir(exist_ok=True)
    for name in ("train", "validation"):
        table = datasets.Dataset.from_parquet(str(whole / f"{name}.parquet"), cache_dir=str(folder / "cache"))
        rows = table.cast_column("image", undecoded).cast_column("label", undecoded)[:]
        for row, (column, content) in damages.items() if name == split else ():
            if content is None:
                ids = np.zeros((72, 96), dtype=np.int32)
                ids[0, 0] = 70000
                stream = io.BytesIO()
                Image.fromarray(ids).save(stream, "TIFF")
                content = stream.getvalue()
            rows[column][row] = {"bytes": content, "path": None}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    (folder / "id2label.json").write_text(json.dumps(dict(enumerate(CLASSES))))
    return folder


def rows_of(folder):
    return datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(folder / "cache2"))


@pytest.mark.parametrize("kind", DAMAGES)
def test_an_unreadable_row_is_named_or_the_next_one_takes_its_place(kind, whole, tmp_path):
    column, content, message = DAMAGES[kind]
    rows = rows_of(damaged(whole, tmp_path / "data", {1: (column, content)}))
    augmentation = TrainingAugmentation(crop_size=64, max_class_ratio=1.0)
    with pytest.raises(UnreadableRowError, match="^Row 1 of the dataset: ") as error:
        AugmentedDataset(rows, augmentation, num_labels=4)[Draw(1, 0, 0)]
    assert message in str(error.value)
    skipping = AugmentedDataset(rows, augmentation, num_labels=4, skip_unreadable=True)
    sample, expected = skipping[Draw(1, 0, 0)], skipping[Draw(2, 0, 0)]
    assert all(torch.equal(sample[name], expected[name]) for name in expected)
    assert skipping.skipped.flags.tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("kind", [kind for kind, (column, *_) in DAMAGES.items() if column == "label"])
def test_counting_the_classes_names_an_unreadable_label_or_leaves_it_out(kind, whole, tmp_path):
    column, content, _ = DAMAGES[kind]
    rows = rows_of(damaged(whole, tmp_path / "data", {4: (column, content)}))
    if kind == "a label of another size":
        return  # a label that can be counted
    with pytest.raises(ValueError, match="Row 4 of the dataset: "):
        count_class_pixels(rows, 4, num_proc=1)
    for _ in range(2):  # the second time from the cache
        counts = count_class_pixels(rows, 4, num_proc=1, skip_unreadable=True)
        assert counts[4].tolist() == [0, 0, 0, 0] and counts.sum(axis=1).astype(bool).tolist() == [
            *[True] * 4,
            False,
            True,
        ]


def test_a_dataset_without_a_readable_row_is_an_error(whole, tmp_path):
    rows = rows_of(damaged(whole, tmp_path / "data", dict.fromkeys(range(6), ("image", b"x"))))
    with pytest.raises(UnreadableRowError, match="none of the rows 0 to 5 can be read"):
        AugmentedDataset(rows, TrainingAugmentation(crop_size=64), skip_unreadable=True)[Draw(1, 0, 0)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_an_image_gives_a_sample_or_an_error_that_names_the_row(data):
    content = bytearray(IMAGE)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])

    class Rows:
        column_names = ("image", "label")

        def select_columns(self, names):
            return self

        def __len__(self):
            return 1

        def __getitem__(self, row):
            image = datasets.Image().decode_example({"bytes": content, "path": None})
            return {"image": image, "label": Image.new("L", (32, 24))}

    dataset = AugmentedDataset(Rows(), TrainingAugmentation(crop_size=16, max_class_ratio=1.0), num_labels=4)
    try:
        assert dataset[Draw(0, 0, 0)]["pixel_values"].shape == (3, 16, 16)
    except UnreadableRowError as error:
        assert str(error).startswith("Row 0 of the dataset: ")  # noqa: PT017 - either is right


# --- the command -----------------------------------------------------------------------------------------------------

COMMON = [
    "eval_strategy=no",
    "save_strategy=no",
    "rare_class_sampling=no",
    "per_device_train_batch_size=6",
    "max_steps=1",
]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_ends_with_one_line_that_names_the_row(workers, whole, tmp_path, capsys):
    folder = damaged(whole, tmp_path / "data", {1: ("image", IMAGE[:200])})
    recipe = write_recipe(tmp_path, folder)
    assert train.main([str(recipe), *COMMON, f"dataloader_num_workers={workers}"]) == 2
    shown = capsys.readouterr().err
    assert shown.endswith("mfuser train: Row 1 of the dataset: image file is truncated\n") and "Traceback" not in shown
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_training_skips_unreadable_rows_on_request_and_the_card_counts_them(workers, whole, tmp_path):
    folder = damaged(whole, tmp_path / "data", {1: ("image", IMAGE[:200]), 3: ("label", b"x")})
    recipe = write_recipe(tmp_path, folder)
    assert train.main([str(recipe), *COMMON, f"dataloader_num_workers={workers}", "skip_unreadable=yes"]) == 0
    assert "2 images could not be read and were skipped." in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_an_unreadable_validation_image_is_named_or_left_out_and_counted(whole, tmp_path, capsys):
    folder = damaged(whole, tmp_path / "data", {1: ("image", IMAGE[:200])}, split="validation")
    recipe = write_recipe(tmp_path, folder)
    assert train.main([str(recipe), *COMMON]) == 2
    assert "validation: row 1: " in capsys.readouterr().err  # when the data is opened
    trainer = train.build_trainer(*train.parse_arguments([str(recipe), *COMMON, "skip_unreadable=yes"]))
    metrics = trainer.evaluate()
    assert metrics["eval_unreadable"] == 1 and 0 <= metrics["eval_mean_iou"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 1])
def test_a_broken_monitored_image_is_reported_and_counted_and_training_continues(row, whole, tmp_path, caplog):
    folder = damaged(whole, tmp_path / "data", {row: ("image", IMAGE[:200])}, split="validation")
    recipe = write_recipe(tmp_path, whole)
    settings = [f"monitor_data.night={folder}:validation", "monitor_steps=1"]
    trainer = train.build_trainer(*train.parse_arguments([str(recipe), *COMMON, *settings]))
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "monitor_night_unreadable" in entry]
    assert log["monitor_night_unreadable"] == 1 and 0 <= log["monitor_night_mean_iou"] <= 1


def test_images_that_are_too_small_are_named_and_never_end_monitoring(whole, tmp_path, monkeypatch):
    small = [str(write_recipe(tmp_path, whole)), *COMMON, "validation_size={height: 8, width: 8}"]
    warnings = []
    monkeypatch.setattr(trainer_module.logger, "warning", warnings.append)
    monitoring = [*small, "validation_data=null", f"monitor_data.night={whole}:validation"]
    trainer = train.build_trainer(*train.parse_arguments(monitoring))
    assert trainer.monitor() == {"monitor_night_unreadable": 2}
    assert [warning.startswith(f"{whole}, row ") for warning in warnings] == [True, True, False]
    with pytest.raises(ValueError, match="^Row 0 of the evaluated images: pixel_values hold images of 8 x 8 pixels"):
        train.build_trainer(*train.parse_arguments(small)).evaluate()
    with pytest.raises(ValueError, match="none of the validation images can be read"):
        train.build_trainer(*train.parse_arguments([*small, "skip_unreadable=yes"])).evaluate()
