"""The rows of a download and the rows of the dataset prepared from it are the same rows."""

import datasets
import fake_downloads as fake
import numpy as np
import pytest
import torch
from PIL import Image

from mfuser.data.augmentation import TrainingAugmentation
from mfuser.data.draws import AUGMENTATION_STREAM, random_generator
from mfuser.data.layouts import Pair, find_pairs
from mfuser.data.loading import load_domain, open_columns
from mfuser.data.preparation import prepare
from mfuser.data.rows import DatasetRows, DownloadRows
from mfuser.data.tables import DOMAINS
from mfuser.images_mfuser import rgb_image

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(params=["acdc", "synthia", "cityscapes test"])
def both(request, tmp_path):
    name, _, split = request.param.partition(" ")
    domain, split = DOMAINS[name], split or "train"
    getattr(fake, name)(tmp_path / "raw")
    prepare(name, tmp_path / "raw", tmp_path / "prepared", splits=[split])
    pairs = find_pairs(domain, tmp_path / "raw", split).pairs
    prepared = DatasetRows(load_domain(tmp_path / "prepared").dataset)
    return domain, DownloadRows(pairs, domain.class_in_red_channel), prepared


def test_names_conditions_and_images_are_those_of_the_download(both):
    domain, download, prepared = both
    assert len(prepared) == len(download) > 0
    assert prepared.names == download.names
    assert prepared.conditions == download.conditions
    assert prepared.has_conditions == download.has_conditions == bool(domain.conditions)
    assert prepared.labelled == download.labelled
    assert [row.image for row in prepared.encoded()] == [row.image for row in download.encoded()]


def test_rows_are_labelled_if_any_of_them_has_a_label_and_no_file_is_read(tmp_path, datasets_cache):
    def rows(*labels):
        missing = {"path": str(tmp_path / "missing.png")}
        columns = {"image": [missing] * len(labels), "label": [missing if label else None for label in labels]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
        return DatasetRows(datasets.Dataset.from_dict(columns, features=features))

    assert rows(False, True).labelled and rows(True, False).labelled
    assert not rows(False, False).labelled
    missing, label = (tmp_path / name for name in ("missing.png", "label.png"))
    assert DownloadRows([Pair("a", missing, None, None), Pair("b", missing, label, None)]).labelled


def test_rows_are_read_as_upright_images_and_ids(both):
    domain, download, prepared = both
    for index in range(len(download)):
        image, ids = download.read(index)
        prepared_image, train_ids = prepared.read(index)
        assert image.mode == "RGB" and image.tobytes() == prepared_image.tobytes()
        assert (ids is None) == (train_ids is None) == (not download.labelled)
        if ids is not None:
            np.testing.assert_array_equal(domain.label_map()(ids), train_ids)


def test_a_slice_keeps_names_conditions_and_content(both):
    _, *rows = both
    for each in rows:
        part = each.slice(1, len(each))
        assert len(part) == len(each) - 1
        assert part.names == each.names[1:] and part.conditions == each.conditions[1:]
        assert list(part.encoded()) == list(each.encoded())[1:]


def test_rows_without_names_are_named_by_their_position_in_the_split():
    dataset = datasets.Dataset.from_dict({"image": [b"0", b"1", b"2"], "label": [b"0", b"1", b"2"]})
    rows = DatasetRows(dataset).slice(1, 3)
    assert rows.names == ["00000001", "00000002"]
    assert rows.slice(1, 2).names == ["00000002"]


def test_the_identity_of_a_row_changes_with_its_files(tmp_path):
    fake.gta5(tmp_path)
    pairs = find_pairs(DOMAINS["gta5"], tmp_path, "train").pairs
    before = DownloadRows(pairs).identities
    fake.write(tmp_path / "labels/00002.png", b"another")
    after = DownloadRows(pairs).identities
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]


def test_the_identity_of_a_row_changes_with_the_files_its_cells_refer_to(tmp_path):
    paths, content = [], []
    for name in "abc":
        paths.append(str(fake.write(tmp_path / f"{name}.png", fake.encoded_label(fake.all_ids([0, 1])))))
        content.append(fake.encoded_image())
    datasets.Dataset.from_dict({"image": content, "label": paths}).to_parquet(tmp_path / "train.parquet")
    dataset, _ = open_columns(tmp_path, None, "image", "label")
    before = DatasetRows(dataset).identities
    assert DatasetRows(dataset).identities == before
    fake.write(tmp_path / "b.png", fake.encoded_label(fake.all_ids([0, 1, 2])))
    after = DatasetRows(dataset).identities
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    (tmp_path / "c.png").unlink()
    assert DatasetRows(dataset).identities[2] != after[2]


def test_16_bit_images_are_scaled_to_8_bits(tmp_path):
    deep = np.linspace(0, 65535, 48, dtype=np.uint16).reshape(6, 8)
    fake.gta5(tmp_path / "raw")
    Image.fromarray(deep).save(tmp_path / "raw/images/00001.png")
    pairs = find_pairs(DOMAINS["gta5"], tmp_path / "raw", "train").pairs
    prepare("gta5", tmp_path / "raw", tmp_path / "prepared", splits=["train"])
    dataset = load_domain(tmp_path / "prepared").dataset
    images = [DownloadRows(pairs).read(0).image, DatasetRows(dataset).read(0).image, rgb_image(dataset[0]["image"])]
    for image in images:
        assert np.array_equal(np.asarray(image), np.repeat(np.round(deep[..., None] / 257), 3, axis=-1))
    augmentation = TrainingAugmentation(crop_size=8, scale_range=(1, 1), max_class_ratio=1.0)
    label = np.zeros((6, 8), np.uint8)
    samples = [
        augmentation(image, label, random_generator(0, 0, 0, AUGMENTATION_STREAM))["pixel_values"]
        for image in (dataset[0]["image"], images[0])
    ]
    assert torch.equal(*samples)


def test_an_image_and_a_label_of_different_sizes_are_refused(tmp_path):
    fake.gta5(tmp_path)
    fake.write(tmp_path / "labels/00001.png", fake.encoded_label(np.zeros((3, 8))))
    rows = DownloadRows(find_pairs(DOMAINS["gta5"], tmp_path, "train").pairs)
    with pytest.raises(ValueError, match="the image has 6x8 pixels, its label 3x8"):
        rows.read(0)
