"""The domain tables agree, id by id, with the datasets' published definitions; downloads and labels are read exactly,
and everything that does not fit is reported."""

import io
import json

import datasets
import fake_downloads as fake
import numpy as np
import pytest
from PIL import Image

from mfuser.data import loading
from mfuser.data.label_maps import LabelMap, image_size, label_ids, read_label
from mfuser.data.layouts import find_pairs
from mfuser.data.loading import load_domain, parse_id2label
from mfuser.data.tables import (
    ACDC,
    BDD100K,
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_LABELS,
    DOMAINS,
    GTA5,
    GTA5_LABELS,
    MAPILLARY,
    MAPILLARY_LABELS,
    SYNTHIA,
    SYNTHIA_LABELS,
    URBANSYN,
)
from mfuser.evaluation.domains import open_domain

# raw id:train id, transcribed from the sources independently of `mfuser.data.tables`; all other ids are 255.
CITYSCAPES_IDS = (
    "7:0 8:1 11:2 12:3 13:4 17:5 19:6 20:7 21:8 22:9 23:10 24:11 25:12 26:13 27:14 28:15 31:16 32:17 33:18"
)
SYNTHIA_IDS = "3:0 4:1 2:2 21:3 5:4 7:5 15:6 9:7 6:8 16:9 1:10 10:11 17:12 8:13 18:14 19:15 20:16 12:17 11:18"
MAPILLARY_BOTH = (
    "2:1 3:4 6:3 13:0 15:1 17:2 19:11 20:12 21:12 22:12 24:0 27:10 29:9 30:8 45:5 47:5 48:6 50:7 52:18 54:15 55:13 "
    "57:17 58:16 61:14"
)
MAPILLARY_A = MAPILLARY_BOTH + " 41:0"
MAPILLARY_B = MAPILLARY_BOTH + " 7:0 8:0 10:0 14:0 23:0 9:1 11:1 44:5 46:7 49:7"
TRAIN_IDS = " ".join(f"{index}:{index}" for index in range(19))
NAMES = (
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,"
    "bus,train,motorcycle,bicycle"
).split(",")


def table(text: str) -> np.ndarray:
    lookup = np.full(256, 255)
    for item in text.split():
        raw, train = map(int, item.split(":"))
        lookup[raw] = train
    return lookup


@pytest.mark.parametrize(
    ("domain", "name", "expected", "valid"),
    [
        (CITYSCAPES, None, CITYSCAPES_IDS, range(34)),
        (GTA5, None, CITYSCAPES_IDS, range(35)),
        (SYNTHIA, None, SYNTHIA_IDS, range(23)),
        (URBANSYN, None, TRAIN_IDS, [*range(20), 255]),
        (BDD100K, None, TRAIN_IDS, [*range(19), 255]),
        (ACDC, None, TRAIN_IDS, [*range(19), 255]),
        (MAPILLARY, None, MAPILLARY_A, range(66)),
        (MAPILLARY, "A", MAPILLARY_A, range(66)),
        (MAPILLARY, "B", MAPILLARY_B, range(66)),
        (CAMVID, None, " ".join(f"{index}:{index}" for index in range(11)), [*range(11), 255]),
    ],
)
def test_every_raw_id_maps_to_its_published_train_id(domain, name, expected, valid):
    label_map = domain.label_map(name)
    np.testing.assert_array_equal(label_map.lookup, table(expected))
    assert np.flatnonzero(label_map.valid).tolist() == list(valid)
    assert label_map.lookup.dtype == np.uint8


@pytest.mark.parametrize(
    ("labels", "count"), [(CITYSCAPES_LABELS, 34), (GTA5_LABELS, 35), (SYNTHIA_LABELS, 23), (MAPILLARY_LABELS, 66)]
)
def test_label_tables_have_one_row_per_id_with_a_unique_name(labels, count):
    assert [row[0] for row in labels] == list(range(count))
    assert len({row[1] for row in labels}) == count


def test_the_names_of_cityscapes_ids_are_those_of_their_classes():
    assert all(train_class in (None, name) for _, name, train_class in CITYSCAPES_LABELS)


def test_the_two_mapillary_maps_differ_in_eleven_ids():
    differing = np.flatnonzero(MAPILLARY.label_map("A").lookup != MAPILLARY.label_map("B").lookup)
    assert differing.tolist() == [7, 8, 9, 10, 11, 14, 23, 41, 44, 46, 49]


def test_unknown_label_map_is_refused():
    with pytest.raises(ValueError, match="no label map 'C'; it has A, B"):
        MAPILLARY.label_map("C")


def test_driving_domains_share_the_nineteen_classes_in_order():
    for domain in DOMAINS.values():
        if domain is not CAMVID:
            assert domain.id2label == dict(enumerate(NAMES)), domain.name


def test_synthia_is_scored_on_sixteen_classes_and_the_others_on_all():
    assert SYNTHIA.evaluation_classes == tuple(name for name in NAMES if name not in ("terrain", "truck", "train"))
    assert len(SYNTHIA.evaluation_classes) == 16
    assert all(
        len(domain.evaluation_classes) == 19 for domain in (GTA5, URBANSYN, CITYSCAPES, BDD100K, MAPILLARY, ACDC)
    )


def test_camvid_has_its_eleven_classes():
    expected = "sky building pole road sidewalk tree sign fence car pedestrian bicyclist".split()
    assert CAMVID.id2label == dict(enumerate(expected))
    assert CAMVID.label_map().lookup[[0, 10, 255]].tolist() == [0, 10, 255]


@pytest.mark.parametrize(
    ("domain", "protocol", "size", "expected"),
    [
        (CITYSCAPES, "P1", (1024, 2048), (512, 1024)),
        (CITYSCAPES, "P2", (1024, 2048), (1024, 2048)),
        (BDD100K, "P1", (720, 1280), (720, 1280)),
        (BDD100K, "P2", (720, 1280), (720, 1280)),
        (ACDC, "P1", (1080, 1920), (540, 960)),
        (ACDC, "P2", (1080, 1920), (1080, 1920)),
        (MAPILLARY, "P1", (2448, 3264), (512, 683)),
        (MAPILLARY, "P2", (2448, 3264), (1024, 1365)),
        (MAPILLARY, "P2", (600, 800), (1024, 1365)),  # small images grow
        (MAPILLARY, "P2", (3264, 2448), (1365, 1024)),  # portrait: the long edge is bounded by the longer bound
        (MAPILLARY, "P1", (601, 803), (512, 684)),  # halved to 300 x 401 first
        (MAPILLARY, "P1", (101, 301), (341, 1024)),  # halved to 50 x 150 first; 344 x 1024 otherwise
        (SYNTHIA, "P2", (760, 1280), (760, 1280)),
        (CAMVID, "P1", (360, 480), (360, 480)),
    ],
)
def test_protocols_fit_images_to_their_sizes(domain, protocol, size, expected):
    assert domain.evaluation_sizes[protocol].resized(*size) == expected


def test_only_mapillary_under_p1_is_halved_first():
    halved = [
        (domain.name, protocol)
        for domain in DOMAINS.values()
        for protocol, size in domain.evaluation_sizes.items()
        if size.halve_first
    ]
    assert halved == [("mapillary", "P1")]


def test_invalid_ids_are_named():
    ids = fake.all_ids([0, 18, 19, 77, 255])
    with pytest.raises(ValueError, match=r"label values \[19, 77\] are not among the valid ids 0-18, 255"):
        LabelMap.identity(19)(ids)


def test_palette_labels_are_read_by_index_not_by_colour():
    ids = fake.all_ids([*range(19), 255])
    np.testing.assert_array_equal(read_label(fake.encoded_label(ids, palette=True)), ids)
    np.testing.assert_array_equal(read_label(fake.encoded_label(ids)), ids)


def test_sixteen_bit_single_channel_labels_are_read_if_ids_fit():
    assert label_ids(Image.fromarray(np.full((2, 2), 200, dtype=np.uint16))).tolist() == [[200, 200], [200, 200]]
    with pytest.raises(ValueError, match="range from 300 to 300"):
        label_ids(Image.fromarray(np.full((2, 2), 300, dtype=np.uint16)))


@pytest.mark.parametrize(("orientation", "size"), [(1, (6, 8)), (3, (6, 8)), (6, (8, 6))])
def test_image_sizes_are_those_after_exif_rotation(orientation, size):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 6)).save(stream, "JPEG", exif=exif)
    assert image_size(Image.open(stream)) == size
    decoded = datasets.Image().decode_example({"bytes": stream.getvalue(), "path": None})
    assert image_size(decoded) == size == decoded.size[::-1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (fake.encoded_image(), "mode RGB; expected one channel"),
        (fake.encoded_image(file_format="JPEG"), "JPEG; lossy"),
    ],
)
def test_colour_and_lossy_labels_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        read_label(data)


@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)])
def test_the_class_in_the_red_channel_of_sixteen_bit_labels_is_read_exactly(filters):
    generator = np.random.default_rng(0)
    samples = generator.integers(0, 65536, (11, 7, 3))
    samples[..., 0] = generator.integers(0, 256, (11, 7))
    ids = read_label(fake.encoded_16_bit_rgb(samples, filters), class_in_red_channel=True)
    np.testing.assert_array_equal(ids, samples[..., 0])
    assert ids.dtype == np.uint8


def test_eight_bit_red_channel_labels_are_read_too():
    pixels = np.random.default_rng(0).integers(0, 23, (4, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_label(fake.encoded_label(pixels), class_in_red_channel=True), pixels[..., 0])


def test_red_channel_labels_with_large_values_or_other_channels_are_refused():
    with pytest.raises(ValueError, match="reach at least 256"):
        read_label(fake.encoded_16_bit_rgb(np.full((2, 2, 3), 300)), class_in_red_channel=True)
    with pytest.raises(ValueError, match="PNG of mode RGBA; expected an RGB PNG"):
        read_label(fake.encoded_16_bit_rgb(np.ones((2, 2, 4), dtype=int)), class_in_red_channel=True)


DOWNLOADS = [
    ("cityscapes", fake.cityscapes, "", {"train": 5, "validation": 2, "test": 2}, "gtFine labelIds"),
    ("gta5", fake.gta5, "", {"train": 3}, "images and labels"),
    ("synthia", fake.synthia, "", {"train": 2}, "RGB and GT/LABELS"),
    ("synthia", fake.synthia, "RAND_CITYSCAPES", {"train": 2}, "RGB and GT/LABELS"),
    ("bdd100k", fake.bdd100k, "", {"train": 2, "validation": 1}, "sem_seg masks"),
    ("bdd100k", fake.bdd100k, "bdd100k", {"train": 2, "validation": 1}, "sem_seg masks"),
    ("bdd100k", lambda root: fake.bdd100k(root, "colormaps"), "", {"train": 2}, "sem_seg colormaps"),
    ("bdd100k", lambda root: fake.bdd100k(root, "seg"), "bdd100k", {"validation": 1}, "seg (older package)"),
    ("mapillary", fake.mapillary, "", {"train": 2, "validation": 1}, "v1.2 package"),
    ("mapillary", lambda root: fake.mapillary(root, v2=True), "", {"validation": 1}, "v2.0 package, v1.2 labels"),
    ("acdc", fake.acdc, "", {"train": 4, "validation": 4}, "gt labelTrainIds"),
    ("synthia", lambda root: fake.synthia(root, 3, "train"), "", {"source_train": 3}, "RGB and GT/LABELS"),
    ("synthia", lambda root: fake.synthia(root, 2, "val"), "", {"source_validation": 2}, "RGB and GT/LABELS"),
    ("urbansyn", fake.urbansyn, "", {"train": 2}, "rgb and ss"),
    ("urbansyn", lambda root: fake.urbansyn(root, prefixes=("", "")), "", {"train": 2}, "rgb and ss of equal names"),
    ("mapillary", fake.half_mapillary, "", {"validation_half": 1}, "half"),
    ("gta5", lambda root: fake.train_ids(fake.gta5(root)), "", {"train": 3}, "labelTrainIds"),
    ("synthia", lambda root: fake.train_ids(fake.synthia(root)), "", {"train": 2}, "labelTrainIds"),
    ("synthia", lambda root: fake.train_ids(fake.synthia(root, 2, "train")), "", {"source_train": 2}, "labelTrainIds"),
    ("cityscapes", lambda root: fake.train_ids(fake.cityscapes(root)), "", {"train": 5}, "gtFine labelTrainIds"),
    ("mapillary", lambda root: fake.train_ids(fake.mapillary(root)), "", {"validation": 1}, "labelTrainIds"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "build", "top", "counts", "layout"), DOWNLOADS)
def test_pairs_are_found_in_every_official_layout(tmp_path, name, build, top, counts, layout):
    build(tmp_path / top)
    for split, count in counts.items():
        found = find_pairs(DOMAINS[name], tmp_path, split)
        assert len(found.pairs) == count
        assert found.layout.name == layout
        assert not found.images_without_label and not found.labels_without_image and not found.missing_folders
        assert len({pair.name for pair in found.pairs}) == count
        for pair in found.pairs:
            assert (tmp_path / top / pair.name) == pair.image
            assert (pair.label is None) == (split == "test")


def test_keys_are_paths_in_the_download(tmp_path):
    fake.cityscapes(tmp_path)
    names = [pair.name for pair in find_pairs(CITYSCAPES, tmp_path, "validation").pairs]
    assert names == [f"leftImg8bit/val/munster/munster_{n:06}_000019_leftImg8bit.png" for n in (0, 1)]


def test_acdc_leaves_out_reference_folders_and_names_conditions(tmp_path):
    pairs = find_pairs(ACDC, fake.acdc(tmp_path), "validation").pairs
    assert [pair.condition for pair in pairs] == ["fog", "night", "rain", "snow"]
    assert not any("_ref" in pair.name for pair in pairs)


def test_a_missing_condition_is_reported(tmp_path):
    fake.acdc(tmp_path)
    (tmp_path / "gt/night").rename(tmp_path / "elsewhere")
    found = find_pairs(ACDC, tmp_path, "validation")
    assert [pair.condition for pair in found.pairs] == ["fog", "rain", "snow"]
    assert found.missing_folders == ["gt/night/val"]


def test_bdd_masks_are_preferred_to_colormaps(tmp_path):
    fake.bdd100k(tmp_path, "colormaps")
    fake.bdd100k(tmp_path, "masks")
    assert find_pairs(BDD100K, tmp_path, "train").layout.name == "sem_seg masks"


def test_original_labels_are_preferred_to_converted_ones(tmp_path):
    assert find_pairs(GTA5, fake.gta5(tmp_path), "train").layout.name == "images and labels"
    assert find_pairs(CITYSCAPES, fake.cityscapes(tmp_path), "train").layout.name == "gtFine labelIds"


def test_converted_labels_are_train_ids_of_the_map_that_converted_them():
    original, _, converted, half = MAPILLARY.layouts
    assert MAPILLARY.label_reading(original, "B").name == "B"
    assert (MAPILLARY.label_reading(converted).name, MAPILLARY.label_reading(half).name) == ("A", "B")
    for domain, layout in ((MAPILLARY, half), (SYNTHIA, SYNTHIA.layouts[1])):
        reading = domain.label_reading(layout)
        assert not reading.class_in_red_channel
        np.testing.assert_array_equal(reading.label_map.lookup, table(TRAIN_IDS))
        assert np.flatnonzero(reading.label_map.valid).tolist() == [*range(19), 255]
    with pytest.raises(ValueError, match=r"labels \(labelTrainIds\) were converted by label map A, not B"):
        MAPILLARY.label_reading(converted, "B")


def test_synthias_source_split_and_all_its_images_are_selected_by_name(tmp_path):
    fake.synthia(fake.synthia(tmp_path, 5), 3, "train")
    assert [len(find_pairs(SYNTHIA, tmp_path, split).pairs) for split in ("train", "source_train")] == [5, 3]
    assert [SYNTHIA.splits[split].pairs for split in ("train", "source_train", "source_validation")] == [
        9400,
        6580,
        2820,
    ]
    with pytest.raises(FileNotFoundError, match=r"RGB/val/\*.png, GT/LABELS/val/\*_labelTrainIds.png"):
        find_pairs(SYNTHIA, tmp_path, "source_validation")


def test_unmatched_files_are_listed_from_both_sides(tmp_path):
    fake.bdd100k(tmp_path)
    fake.write(tmp_path / "images/10k/train/80a9e37d.jpg", fake.encoded_image(file_format="JPEG"))
    fake.write(tmp_path / "labels/sem_seg/masks/train/9342e334.png", fake.encoded_label(fake.all_ids([0])))
    fake.write(tmp_path / "images/10k/train/._0a0-train.jpg", b"written by an operating system")
    found = find_pairs(BDD100K, tmp_path, "train")
    assert len(found.pairs) == 2
    assert found.images_without_label == ["images/10k/train/80a9e37d.jpg"]
    assert found.labels_without_image == ["labels/sem_seg/masks/train/9342e334.png"]


def test_a_missing_download_is_an_error_that_lists_the_known_folders(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        find_pairs(BDD100K, tmp_path, "validation")
    for words in (
        "images/10k/val/*.jpg, labels/sem_seg/masks/val/*.png",
        "seg/images/val/*.jpg, seg/labels/val/*_train_id.png",
        "its folder bdd100k",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, validation, test"):
        find_pairs(BDD100K, tmp_path, "dev")


def test_a_download_without_any_pair_is_an_error(tmp_path):
    fake.write(tmp_path / "images/00001.png", fake.encoded_image())
    fake.write(tmp_path / "labels/00002.png", fake.encoded_label(fake.all_ids([0])))
    with pytest.raises(FileNotFoundError, match="1 images and 1 labels are unmatched"):
        find_pairs(GTA5, tmp_path, "train")


# load_domain


pytestmark = pytest.mark.usefixtures("datasets_cache")


def rows(count: int = 4, ids=(0, 1, 2, 255), image="image", label="label") -> datasets.Dataset:
    features = {image: datasets.Image(), label: datasets.Image(), "name": datasets.Value("string")}
    data = {
        image: [{"bytes": fake.encoded_image(n), "path": None} for n in range(count)],
        label: [{"bytes": fake.encoded_label(fake.all_ids(ids)), "path": None} for n in range(count)],
        "name": [f"scene/{n}.png" for n in range(count)],
    }
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


THREE = {0: "road", 1: "sky", 2: "car"}


def check(loaded, count: int):
    items = list(loaded.dataset)
    assert [item["name"] for item in items] == [f"scene/{n}.png" for n in range(count)]
    np.testing.assert_array_equal(np.array(items[-1]["label"]), fake.all_ids((0, 1, 2, 255)))
    assert np.array(items[0]["image"]).shape == (fake.HEIGHT, fake.WIDTH, 3)
    assert loaded.id2label == THREE


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_and_folders_load(tmp_path, streaming):
    rows(4).to_parquet(tmp_path / "train.parquet")
    rows(2).to_parquet(tmp_path / "validation-00000-of-00002.parquet")
    rows(2).to_parquet(tmp_path / "validation-00001-of-00002.parquet")
    check(load_domain(tmp_path / "train.parquet", id2label=THREE, streaming=streaming), 4)
    check(load_domain(tmp_path, "train", id2label=THREE, streaming=streaming), 4)
    assert len(list(load_domain(tmp_path, "val", id2label=THREE, streaming=streaming).dataset)) == 4
    with pytest.raises(ValueError, match="several splits; name one of them: train, validation"):
        load_domain(tmp_path, id2label=THREE)
    with pytest.raises(ValueError, match="no split 'dusk'; it has: train, validation"):
        load_domain(tmp_path, "dusk", id2label=THREE)


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets_load(tmp_path, streaming):
    datasets.DatasetDict(train=rows(3), validation=rows(1)).save_to_disk(tmp_path / "saved")
    check(load_domain(tmp_path / "saved", "train", id2label=THREE, streaming=streaming), 3)
    check(load_domain(tmp_path / "saved/validation", id2label=THREE, streaming=streaming), 1)


def test_columns_of_any_name_are_renamed_and_the_rest_dropped(tmp_path):
    dataset = rows(2, image="rgb", label="image").add_column("depth", [1, 2])
    dataset.to_parquet(tmp_path / "train.parquet")
    loaded = load_domain(tmp_path, image_column="rgb", label_column="image", id2label=THREE)
    assert set(loaded.dataset.column_names) == {"image", "label", "name"}
    check(loaded, 2)


def test_bytes_and_path_columns_become_images(tmp_path):
    image, label = fake.encoded_image(), fake.encoded_label(fake.all_ids((0, 1, 2, 255)))
    path = str(fake.write(tmp_path / "image.png", image))
    datasets.Dataset.from_dict({"image": [path], "label": [label], "name": ["scene/0.png"]}).to_parquet(
        tmp_path / "train.parquet"
    )
    check(load_domain(tmp_path, id2label=THREE), 1)


def test_class_names_come_from_a_domain_a_file_or_the_folder(tmp_path):
    rows(1, ids=[0, 18, 255]).to_parquet(tmp_path / "train.parquet")
    assert load_domain(tmp_path, id2label="cityscapes").id2label == dict(enumerate(NAMES))
    (tmp_path / "id2label.json").write_text(json.dumps({str(n): f"class {n}" for n in reversed(range(19))}))
    assert load_domain(tmp_path).id2label == {n: f"class {n}" for n in range(19)}
    assert load_domain(tmp_path, id2label=tmp_path / "id2label.json").id2label[18] == "class 18"
    message = (
        "has an id2label.json with other classes than {}: 0 is 'class 0', not 'road', 1 is 'class 1', not 'sidewalk', "
        "2 is 'class 2', not 'building', and 16 more"
    )
    with pytest.raises(ValueError, match=message.format("cityscapes")):
        load_domain(tmp_path, id2label="cityscapes")
    with pytest.raises(ValueError, match=message.format("cityscapes")):
        open_domain("cityscapes", tmp_path)
    with pytest.raises(ValueError, match=message.format("id2label")):
        load_domain(tmp_path, id2label=dict(enumerate(NAMES)))
    (tmp_path / "id2label.json").write_text('{"1": "road"}')
    with pytest.raises(ValueError, match=r"id2label.json: class ids are \[1\]"):
        load_domain(tmp_path)


def test_unknown_class_names_are_an_error(tmp_path):
    rows(1).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="does not name its classes"):
        load_domain(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({0: "a", 2: "b"}, "0 to n - 1"),
        ({}, "0 to n - 1"),
        (["a", "b"], "dictionary"),
        ({"a": 0}, "dictionary"),
        ({0: "road", 1: "sky", 2: "Road "}, "contains 'road' more than once"),
        ({0: "road", 1: " "}, "different, non-empty names"),
        ({0: "road", 1: None}, "different, non-empty names"),
        ("nowhere.json", "neither a JSON file nor a domain"),
    ],
)
def test_class_names_that_repeat_or_are_not_numbered_consecutively_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        parse_id2label(names)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "pixels"}, "no image column 'pixels'; its columns are image, label, name"),
        ({"label_column": "mask"}, "no label column 'mask'"),
        ({"label_column": "index"}, r"column 'index' of .* holds Value\(.*int64.*\), not label images"),
        ({"label_column": "image"}, "cannot both be column 'image'"),
        ({"label_column": "colours"}, "mode RGB; expected one channel"),
        ({"label_column": "small"}, "the image has 6x8 pixels, its label 3x8"),
        ({"id2label": {0: "road"}}, r"label values \[1, 2\] are not among the valid ids 0, 255"),
    ],
)
def test_unusable_columns_are_named(tmp_path, columns, message):
    small = [{"bytes": fake.encoded_label(fake.all_ids([0])[:3]), "path": None}] * 2
    dataset = rows(2).add_column("index", [0, 1]).add_column("small", small)
    dataset = dataset.add_column("colours", [{"bytes": fake.encoded_image(), "path": None}] * 2)
    dataset.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        load_domain(tmp_path, **{"id2label": THREE, **columns})


def test_an_empty_dataset_is_an_error(tmp_path):
    rows(2).select([]).save_to_disk(tmp_path / "empty", num_shards=1)
    with pytest.raises(ValueError, match="is empty"):
        load_domain(tmp_path / "empty", id2label=THREE)


def test_missing_paths_and_unprepared_downloads_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_domain(tmp_path / "nowhere")
    fake.cityscapes(tmp_path / "raw")
    with pytest.raises(ValueError, match="run `mfuser prepare cityscapes .* OUTPUT`"):
        load_domain(tmp_path / "raw", "val")


def test_hub_datasets_load_with_the_names_in_their_repository(tmp_path, monkeypatch):
    side_file = tmp_path / "id2label.json"
    side_file.write_text(json.dumps(THREE))

    def download(repo, file_name, repo_type):
        assert (repo, repo_type) == ("someone/scenes", "dataset")
        if file_name != "id2label.json":
            raise loading.EntryNotFoundError(file_name)
        return str(side_file)

    monkeypatch.setattr(loading, "hf_hub_download", download)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split, streaming: rows(2))
    check(load_domain("someone/scenes", "val"), 2)
