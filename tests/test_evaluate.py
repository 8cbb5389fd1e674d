"""Scores are those of the published protocols and of an independent computation; everything left out is reported."""

import dataclasses
import gc
import threading
from pathlib import Path

import fake_downloads as fake
import numpy as np
import pytest
import torch
from colour_scorer import Colours, expected_iou, expected_prediction, pixels_and_labels, write_dataset
from PIL import Image
from tiny_models import tiny_model
from torch.nn import functional as F

from mfuser import MFuserImageProcessor, overlap
from mfuser.class_names_mfuser import CITYSCAPES_CLASSES
from mfuser.data.domain import EvaluationSize
from mfuser.data.preparation import prepare
from mfuser.data.tables import CITYSCAPES, DOMAINS
from mfuser.evaluation import scoring
from mfuser.evaluation.domains import open_domain
from mfuser.evaluation.predictions import prediction_files
from mfuser.evaluation.protocols import EvaluationOptions, ProtocolSamples
from mfuser.evaluation.report import describe, shortfalls
from mfuser.evaluation.results import DomainMetric
from mfuser.evaluation.scoring import BATCHES_AHEAD, evaluate_domain
from mfuser.postprocessing_mfuser import label_map_of_scores

OWN_SIZE = {"P2": EvaluationSize()}  # the size of the images


pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_equal_an_independent_computation(tmp_path, batch_size):
    rows = list(pixels_and_labels())
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", rows))
    model = Colours()
    result = evaluate_domain(
        model, MFuserImageProcessor(), domain, EvaluationOptions(batch_size=batch_size), progress=False
    )
    matrix, iou = expected_iou([(expected_prediction(model, image), label) for image, label in rows], 4)
    scores = result["pooled"]
    np.testing.assert_array_equal(np.array(scores["confusion_matrix"])[:, :4], matrix)
    np.testing.assert_allclose(list(scores["per_class_iou"].values()), iou)
    assert result["mean_iou"] == pytest.approx(iou.mean())
    assert scores["overall_accuracy"] == pytest.approx(matrix.trace() / matrix.sum())
    assert (result["mean_iou_over"], result["images"], result["skipped"]) == ("pixels", 6, [])
    assert sum(shape[0] for shape in model.shown) == 6  # every image once, none of them resized
    assert {shape[2:] for shape in model.shown} == {(20, 28), (24, 20)}


@pytest.fixture
def two_cores():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_images_segmented_in_parallel_have_the_labels_of_sequential_ones(tmp_path, monkeypatch, two_cores):
    rows = list(pixels_and_labels(7, sizes=((64, 80), (40, 96))))
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", rows))
    model, seen = tiny_model(), {}
    segment = model.forward

    def forward(**kwargs):
        seen[threading.get_ident()] = torch.get_num_threads()
        return segment(**kwargs)

    model.forward = forward
    results, predictions = {}, {}
    for limit in (0, overlap.SMALL_MODEL):
        seen.clear()
        monkeypatch.setattr(overlap, "SMALL_MODEL", limit)
        folder, options = tmp_path / f"predictions_{limit}", EvaluationOptions(batch_size=2)
        results[limit] = evaluate_domain(model, MFuserImageProcessor(), domain, options, folder, confidence=True)
        predictions[limit] = {file.name: file.read_bytes() for file in folder.rglob("*.png")}
        # A large model runs in one thread on both cores, a small one in two threads on one core each.
        assert list(seen.values()) == [2] if limit == 0 else set(seen.values()) == {1}
        assert torch.get_num_threads() == 2
        with overlap.model_threads(model) as threads:
            assert threads == (1 if limit == 0 else 2)
    one, two = ({name: value for name, value in each.items() if name != "confidence"} for each in results.values())
    assert one == two
    one, two = (each["confidence"]["uncalibrated"]["pooled"]["ece"] for each in results.values())
    assert one == pytest.approx(two, abs=1e-5)  # scores differ by rounding with the number of threads
    one, two = predictions.values()
    assert len(one) == 7 and one == two


def test_images_are_read_while_others_are_segmented(tmp_path):
    """No batch waits for the one before: the second is read while the first is segmented."""
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", list(pixels_and_labels(4))))
    read, model = threading.Semaphore(0), Colours()

    def read_row(index):
        read.release()
        return type(domain).read(domain, index)

    object.__setattr__(domain, "read", read_row)
    segment = model.forward

    def wait_for_the_next_image(*args, **kwargs):
        if not model.shown:
            assert read.acquire(timeout=60) and read.acquire(timeout=60)
        return segment(*args, **kwargs)

    model.forward = wait_for_the_next_image
    assert evaluate_domain(model, MFuserImageProcessor(), domain, progress=False)["images"] == 4


def test_scores_resized_class_by_class_have_the_arg_max_of_scores_resized_together():
    scores = torch.randn(19, 30, 41, generator=torch.Generator().manual_seed(0))
    for size in ((30, 41), (75, 90), (13, 17)):
        expected = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)
        found = label_map_of_scores(scores, size)
        assert found.dtype == torch.uint8
        assert torch.equal(found.long(), expected)
    assert not label_map_of_scores(torch.ones(3, 4, 4), (4, 4)).any()  # ties are resolved to the first class
    assert not label_map_of_scores(torch.ones(3, 4, 4), (8, 8)).any()


def test_images_are_segmented_at_the_protocols_size_and_scored_at_the_labels_size(tmp_path, monkeypatch):
    sizes = {"P1": EvaluationSize((16, 24), halve_first=True), "P2": EvaluationSize((40, 48))}
    domain = dataclasses.replace(DOMAINS["cityscapes"], name="small", evaluation_sizes=sizes)
    monkeypatch.setitem(DOMAINS, "small", domain)
    names = dict(enumerate(CITYSCAPES_CLASSES))
    rows = list(pixels_and_labels(2, classes=19, sizes=((30, 60), (60, 30)), ignored=0))
    source = write_dataset(tmp_path / "validation.parquet", rows, classes=names)
    for protocol, shown, scored in (("P1", [(12, 24), (24, 12)], 15 * 30), ("P2", [(24, 48), (48, 24)], 30 * 60)):
        model = Colours(names)
        opened = open_domain("small", source)
        result = evaluate_domain(model, MFuserImageProcessor(), opened, EvaluationOptions(protocol), progress=False)
        assert [shape[2:] for shape in model.shown] == shown
        matrix = np.array(result["pooled"]["confusion_matrix"])
        assert matrix.sum() == 2 * scored
        labels = [
            label[1::2, 1::2] if protocol == "P1" else label for _, label in rows
        ]  # nearest: no values are mixed
        counts = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=19)
        np.testing.assert_array_equal(matrix.sum(axis=1), counts)
        fit = list(sizes[protocol].fit)
        assert result["segmented_at"] == {"fit": fit, "halve_first": protocol == "P1"}


def test_published_test_sizes():
    at = {
        (name, protocol): domain.evaluation_sizes[protocol].resized(height, width)
        for name, (height, width) in {
            "cityscapes": (1024, 2048), "bdd100k": (720, 1280), "mapillary": (2448, 3264), "acdc": (1080, 1920)
        }.items()
        for domain in [DOMAINS[name]]
        for protocol in ("P1", "P2")
    }  # fmt: skip
    assert at["cityscapes", "P1"] == (512, 1024) and at["cityscapes", "P2"] == (1024, 2048)
    assert at["bdd100k", "P1"] == at["bdd100k", "P2"] == (720, 1280)
    assert at["mapillary", "P1"] == (512, 683) and at["mapillary", "P2"] == (1024, 1365)
    assert at["acdc", "P1"] == (540, 960) and at["acdc", "P2"] == (1080, 1920)


def test_flip_and_scales_are_the_models_own_augmentation(tmp_path):
    rows = list(pixels_and_labels(2, sizes=((64, 80),)))
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", rows))
    model, processor = tiny_model(), MFuserImageProcessor()
    for flip, scales in ((True, (1.0,)), (False, (0.75, 1.0))):
        result = evaluate_domain(model, processor, domain, EvaluationOptions(flip=flip, scales=scales), progress=False)
        pairs = []
        for image, label in rows:
            pixel_values = processor(image, return_tensors="pt")["pixel_values"]
            scores = model.augmented_scores(pixel_values, scales=scales, flip=flip)
            pairs.append((scores[0].argmax(0).numpy(), label))
        matrix, _ = expected_iou(pairs, 4)
        np.testing.assert_array_equal(np.array(result["pooled"]["confusion_matrix"])[:, :4], matrix)


def test_conditions_are_scored_separately_averaged_and_pooled(tmp_path):
    rows = list(pixels_and_labels(5))
    rows[0][1][:] = 0  # the first condition differs from the rest
    conditions = ["snow", "fog", "snow", "fog", "fog"]
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", rows, conditions))
    model = Colours()
    result = evaluate_domain(model, MFuserImageProcessor(), domain, progress=False)
    pairs = [(expected_prediction(model, image), label) for image, label in rows]
    means = {
        name: expected_iou([pair for pair, of in zip(pairs, conditions, strict=True) if of == name], 4)[1].mean()
        for name in ("fog", "snow")
    }
    found = {name: scores["mean_iou"] for name, scores in result["conditions"].items()}
    assert found == pytest.approx(means)
    assert {name: scores["images"] for name, scores in result["conditions"].items()} == {"fog": 3, "snow": 2}
    assert (result["mean_iou"], result["mean_iou_over"]) == (
        pytest.approx(np.mean(list(means.values()))),
        "conditions",
    )
    assert result["pooled"]["mean_iou"] == pytest.approx(expected_iou(pairs, 4)[1].mean())
    assert result["pooled"]["mean_iou"] != pytest.approx(result["mean_iou"], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "build", "images"),
    [
        ("cityscapes", fake.cityscapes, 2),
        ("bdd100k", fake.bdd100k, 1),
        ("mapillary", fake.mapillary, 1),
        ("acdc", fake.acdc, 4),
        ("synthia", fake.synthia, 2),
        ("gta5", fake.gta5, 3),
    ],
)
def test_a_download_and_its_preparation_have_the_same_score(tmp_path, monkeypatch, name, build, images):
    monkeypatch.setitem(DOMAINS, name, dataclasses.replace(DOMAINS[name], evaluation_sizes=OWN_SIZE))
    build(tmp_path / "raw")
    prepare(name, tmp_path / "raw", tmp_path / "prepared")
    model = Colours(dict(enumerate(CITYSCAPES_CLASSES)))
    results = [
        evaluate_domain(model, MFuserImageProcessor(), open_domain(name, tmp_path / folder), progress=False)
        for folder in ("raw", "prepared")
    ]
    for result in results:
        assert result.pop("source")
    assert results[0] == results[1]
    assert (results[0]["images"], results[0]["skipped"]) == (images, [])
    assert results[0]["label_map"] == next(iter(DOMAINS[name].label_maps))
    averaged = results[0]["pooled"]["classes_averaged"]
    if name == "synthia":
        assert len(averaged) == 16 and not {"terrain", "truck", "train"} & set(averaged)
    else:
        assert len(averaged) == 19
    if name == "acdc":
        assert list(results[0]["conditions"]) == ["fog", "night", "rain", "snow"]


@pytest.mark.parametrize(("classes", "count"), [("domain", 19), ("all", 19), ("synthia16", 16), ("synthia13", 13)])
def test_any_domain_is_scored_over_the_classes_of_synthia(tmp_path, monkeypatch, classes, count):
    monkeypatch.setitem(DOMAINS, "bdd100k", dataclasses.replace(DOMAINS["bdd100k"], evaluation_sizes=OWN_SIZE))
    fake.bdd100k(tmp_path / "raw")
    model = Colours(dict(enumerate(CITYSCAPES_CLASSES)))
    domain = open_domain("bdd100k", tmp_path / "raw")
    options = EvaluationOptions(classes=classes)
    scores = evaluate_domain(model, MFuserImageProcessor(), domain, options, progress=False)["pooled"]
    without = {19: (), 16: (9, 14, 16), 13: (3, 4, 5, 9, 14, 16)}[count]  # terrain, truck, train; wall, fence, pole
    counted = [name for index, name in enumerate(CITYSCAPES_CLASSES) if index not in without]
    assert scores["classes_averaged"] == counted
    assert scores["mean_iou"] == pytest.approx(np.mean([scores["per_class_iou"][name] for name in counted]))
    assert np.array(scores["confusion_matrix"]).sum() == (domain.read(0).label != 255).sum()  # of all 19 classes


def test_classes_that_a_domain_lacks_are_named(tmp_path):
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", pixels_and_labels(1)))
    with pytest.raises(ValueError, match="mine has no class sidewalk, .*, which synthia13 contains"):
        evaluate_domain(Colours(), MFuserImageProcessor(), domain, EvaluationOptions(classes="synthia13"))


def test_mapillary_is_scored_at_full_or_half_size_in_either_protocol(tmp_path):
    fake.half_mapillary(fake.mapillary(tmp_path / "raw"))
    full, half = (open_domain("mapillary", tmp_path / "raw", split) for split in ("validation", "validation_half"))
    for protocol, fit in (("P1", (512, 1024)), ("P2", (1024, 2048))):
        for labels, halves in ((None, protocol == "P1"), ("half", True), ("full", False)):
            size = EvaluationOptions(protocol, mapillary_labels=labels).evaluation_size(full)
            assert (size.fit, size.halve_first) == (fit, halves)
        for labels in (None, "half"):  # halved once, not twice
            size = EvaluationOptions(protocol, mapillary_labels=labels).evaluation_size(half)
            assert (size.fit, size.halve_first) == (fit, False)
    with pytest.raises(ValueError, match="validation_half holds halved labels; mapillary_labels is 'full'"):
        EvaluationOptions(mapillary_labels="full").evaluation_size(half)
    other = open_domain("bdd100k", fake.bdd100k(tmp_path / "bdd"))
    assert not EvaluationOptions(mapillary_labels="half").evaluation_size(other).halve_first


@pytest.mark.parametrize("labels", ["full", "half"])
def test_the_size_of_mapillarys_labels_is_recorded_and_printed(tmp_path, monkeypatch, labels):
    own = dataclasses.replace(DOMAINS["mapillary"], evaluation_sizes=OWN_SIZE)
    monkeypatch.setitem(DOMAINS, "mapillary", own)
    domain = open_domain("mapillary", fake.mapillary(tmp_path / "raw"))
    options = EvaluationOptions(mapillary_labels=labels)
    model = Colours(dict(enumerate(CITYSCAPES_CLASSES)))
    result = evaluate_domain(model, MFuserImageProcessor(), domain, options, progress=False)
    assert result["label_size"] == labels
    pixels = np.array(result["pooled"]["confusion_matrix"]).sum()
    assert pixels <= {"full": 72, "half": 16}[labels] and (labels == "half" or pixels > 16)
    protocol = {"name": "P2", "flip": False, "scales": [1.0], "classes": "synthia16"}
    assert f"label map A, {labels}-size labels, classes synthia16" in describe(protocol, result)


def test_a_prepared_folder_keeps_its_mapillary_map(tmp_path):
    fake.mapillary(tmp_path / "raw")
    prepare("mapillary", tmp_path / "raw", tmp_path / "b", label_map="B")
    assert open_domain("mapillary", tmp_path / "raw").label_map_name == "A"
    from_raw, prepared = (
        open_domain("mapillary", tmp_path / "raw", label_map="B"),
        open_domain("mapillary", tmp_path / "b"),
    )
    assert from_raw.label_map_name == prepared.label_map_name == "B"
    np.testing.assert_array_equal(from_raw.read(0).label, prepared.read(0).label)
    with pytest.raises(ValueError, match="made with label map B; label map A requires the download"):
        open_domain("mapillary", tmp_path / "b", label_map="A")
    with pytest.raises(ValueError, match="was prepared as mapillary, not acdc"):
        open_domain("acdc", tmp_path / "b")
    with pytest.raises(ValueError, match="has no label map 'C'; it has A, B"):
        open_domain("mapillary", tmp_path / "raw", label_map="C")


def test_cityscapes_predictions_have_the_format_of_its_test_server(tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(CITYSCAPES, evaluation_sizes=OWN_SIZE)
    monkeypatch.setitem(DOMAINS, "cityscapes", small)
    fake.cityscapes(tmp_path / "raw")
    model = Colours(dict(enumerate(CITYSCAPES_CLASSES)))
    domain = open_domain("cityscapes", tmp_path / "raw", "test")
    with pytest.raises(ValueError, match="no labels: its predictions can be saved, not scored"):
        evaluate_domain(model, MFuserImageProcessor(), domain)
    result = evaluate_domain(model, MFuserImageProcessor(), domain, save_predictions=tmp_path / "out", progress=False)
    assert (result["mean_iou"], result["images"], result["unlabelled_images"]) == (None, 0, 2)
    files = sorted((tmp_path / "out").rglob("*.*"))
    assert [file.name for file in files] == ["berlin_000000_000019.png", "berlin_000001_000019.png"]
    to_label_id = {of: raw for raw, of in CITYSCAPES.label_maps["labelIds"].items()}
    for file, pair in zip(files, domain.rows.pairs, strict=True):
        saved, image = Image.open(file), np.array(Image.open(pair.image))
        assert saved.mode == "L"
        classes = expected_prediction(model, image)
        expected = np.vectorize(lambda index: to_label_id[CITYSCAPES_CLASSES[index]])(classes)
        np.testing.assert_array_equal(np.array(saved), expected)
    with pytest.raises(FileExistsError, match="not empty"):
        evaluate_domain(model, MFuserImageProcessor(), domain, save_predictions=tmp_path / "out")


def test_other_domains_predictions_are_train_ids_under_the_images_names(tmp_path):
    rows = list(pixels_and_labels(2))
    names = ["a/first.frame.jpg", "b/second.png"]
    source = write_dataset(tmp_path / "data/validation.parquet", rows, names=names)
    domain, model = open_domain("mine", source), Colours()
    evaluate_domain(model, MFuserImageProcessor(), domain, save_predictions=tmp_path / "out", progress=False)
    for file, (image, _) in zip(("a/first.frame.png", "b/second.png"), rows, strict=True):
        saved = np.array(Image.open(tmp_path / "out/mine" / file))
        np.testing.assert_array_equal(saved, expected_prediction(model, image))
    for bad, message in (["../a.png", "b.png"], "outside the folder"), (["a.png", "a.jpg"], "several images"):
        source = write_dataset(tmp_path / f"{message}/validation.parquet", rows, names=bad)
        with pytest.raises(ValueError, match=message):
            prediction_files(open_domain("mine", source), tmp_path / "other")
    with pytest.raises(ValueError, match="not of the form <city>_<sequence>_<frame>"):
        prediction_files(dataclasses.replace(domain, domain=CITYSCAPES), tmp_path / "other")


def test_bad_pairs_are_skipped_and_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(DOMAINS, "bdd100k", dataclasses.replace(DOMAINS["bdd100k"], evaluation_sizes=OWN_SIZE))
    fake.bdd100k(tmp_path / "raw")
    images, labels = tmp_path / "raw/images/10k/val", tmp_path / "raw/labels/sem_seg/masks/val"
    ids = fake.all_ids([*range(19), 255])
    for name in ("broken", "smaller", "alone", "colours"):
        fake.write(images / f"{name}.jpg", fake.encoded_image(0, ids.shape, "JPEG"))
    fake.write(labels / "broken.png", b"no PNG")
    fake.write(labels / "smaller.png", fake.encoded_label(ids[:-1]))
    fake.write(labels / "colours.png", fake.encoded_label(ids + 40))
    model = Colours(dict(enumerate(CITYSCAPES_CLASSES)))
    result = evaluate_domain(model, MFuserImageProcessor(), open_domain("bdd100k", tmp_path / "raw"), progress=False)
    reasons = {Path(item["name"]).stem: item["reason"] for item in result["skipped"]}
    assert set(reasons) == {"broken", "smaller", "alone", "colours"}
    assert "pixels" in reasons["smaller"] and "no label" in reasons["alone"] and "40" in reasons["colours"]
    assert (result["images"], result["expected_images"]) == (1, 1000)
    assert shortfalls("bdd100k", result)[1] == "bdd100k: 1 images; the official validation split has 1000"


def test_pairs_without_a_counterpart_and_missing_conditions_are_reported(tmp_path):
    raw = fake.acdc(tmp_path / "raw")
    (raw / "gt/night").rename(tmp_path / "elsewhere")
    (raw / "gt/fog/val/GOPR0475/other_gt_labelTrainIds.png").write_bytes(b"")
    skipped = {item["name"]: item["reason"] for item in open_domain("acdc", raw).skipped}
    assert skipped == {
        "gt/fog/val/GOPR0475/other_gt_labelTrainIds.png": "no image belongs to this label",
        "gt/night/val": "the folder is missing",
    }


def test_pairs_that_were_skipped_in_the_preparation_are_reported(tmp_path):
    raw = fake.mapillary(tmp_path / "raw")
    for number in (1, 2):
        fake.write(raw / f"validation/images/bad{number}.jpg", fake.encoded_image())
        fake.write(raw / f"validation/labels/bad{number}.png", b"damaged")
    prepare("mapillary", raw, tmp_path / "prepared", splits=["validation"])
    domain = open_domain("mapillary", tmp_path / "prepared")
    domain = dataclasses.replace(domain, domain=dataclasses.replace(domain.domain, evaluation_sizes=OWN_SIZE))
    model = Colours(dict(enumerate(CITYSCAPES_CLASSES)))
    result = evaluate_domain(model, MFuserImageProcessor(), domain, progress=False)
    names = [f"validation/images/bad{number}.jpg" for number in (1, 2)]
    assert result["skipped"] == [{"name": name, "reason": "label: not an image file"} for name in names]
    assert shortfalls("mapillary", result)[0] == (
        f"mapillary: skipped 2, the first: {names[0]}: label: not an image file"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "P3"}, "protocol is 'P3'; it must be one of P1, P2"),
        ({"scales": ()}, r"scales is \(\); it must hold at least one number"),
        ({"scales": (1.0, 0.0)}, r"scales is \(1.0, 0.0\); .* all of them positive"),
        ({"scales": (1.0, float("inf"))}, r"scales is \(1.0, inf\); .* finite"),
        ({"scales": (float("nan"),)}, r"scales is \(nan,\); .* finite"),
        ({"batch_size": 0}, "batch_size is 0 and workers is 0"),
        ({"workers": -1}, "batch_size is 1 and workers is -1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationOptions(**options)


def test_classes_that_differ_are_named(tmp_path):
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", pixels_and_labels(1)))
    with pytest.raises(ValueError, match="only the model has truck; only mine has car"):
        evaluate_domain(Colours({0: "road", 1: "sky", 2: "truck", 3: "person"}), None, domain)
    with pytest.raises(ValueError, match="another order: 0 is sky in the model and road in mine"):
        evaluate_domain(Colours({0: "sky", 1: "road", 2: "car", 3: "person"}), None, domain)
    with pytest.raises(ValueError, match="19 classes are not the 4 of mine"):
        evaluate_domain(Colours(dict(enumerate(CITYSCAPES_CLASSES))), None, domain)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    alive = {}
    for count in (3, 300):
        rows = list(pixels_and_labels(count, sizes=((40, 40),)))
        domain = open_domain("mine", write_dataset(tmp_path / f"{count}/validation.parquet", rows))
        model, seen = Colours(), []

        def look(module, *_, seen=seen, last=count):
            if len(module.shown) in (2, last):
                seen.append(_bytes_of_tensors())

        model.register_forward_hook(look)
        evaluate_domain(model, MFuserImageProcessor(), domain, progress=False)
        alive[count] = max(seen)
    # Threads read ahead a varying number of images; label maps of all images, one byte per pixel, would take more.
    image, ahead = 40 * 40 * 32, BATCHES_AHEAD + 2
    assert alive[300] - alive[3] <= ahead * image < 297 * 40 * 40


def _bytes_of_tensors() -> int:
    return sum(each.nbytes for each in gc.get_objects() if type(each) in (torch.Tensor, np.ndarray))


def test_images_are_resized_as_opencv_does_without_smoothing(tmp_path, monkeypatch):
    sizes = {"P2": EvaluationSize((12, 12))}
    monkeypatch.setitem(DOMAINS, "small", dataclasses.replace(CITYSCAPES, name="small", evaluation_sizes=sizes))
    image = np.zeros((24, 24, 3), dtype=np.uint8)
    image[1::4] = image[2::4] = 200  # halving averages two rows; a smoothing filter would mix more
    label = np.zeros((24, 24), dtype=np.uint8)
    source = write_dataset(tmp_path / "validation.parquet", [(image, label)], classes=CITYSCAPES.id2label)
    domain = open_domain("small", source)
    processor = MFuserImageProcessor(do_normalize=False, pad_size={"height": 32, "width": 32})  # padding is not used
    sample = ProtocolSamples(domain, processor, sizes["P2"])[0]
    assert sample.pixel_values.shape == (3, 12, 12) and sample.size == (24, 24)
    torch.testing.assert_close(sample.pixel_values, torch.full((3, 12, 12), 100 / 255))


def test_an_image_that_is_too_small_to_be_halved_is_skipped(tmp_path, monkeypatch):
    sizes = {"P1": EvaluationSize((16, 24), halve_first=True)}
    monkeypatch.setitem(
        DOMAINS, "small", dataclasses.replace(DOMAINS["cityscapes"], name="small", evaluation_sizes=sizes)
    )
    names = dict(enumerate(CITYSCAPES_CLASSES))
    rows = pixels_and_labels(2, classes=19, sizes=((30, 60), (1, 60)), ignored=0)
    domain = open_domain("small", write_dataset(tmp_path / "validation.parquet", rows, classes=names))
    result = evaluate_domain(Colours(names), MFuserImageProcessor(), domain, EvaluationOptions("P1"), progress=False)
    assert [each["name"] for each in result["skipped"]] == ["00000001"] and result["images"] == 1


def test_a_condition_without_a_scored_class_is_left_out_and_a_domain_without_one_is_an_error(tmp_path):
    rows = list(pixels_and_labels(2, ignored=0))
    rows[1][1][:] = 3
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", rows, ["fog", "night"]))
    metric, samples = (
        DomainMetric(domain, torch.device("cpu")),
        ProtocolSamples(domain, MFuserImageProcessor(), EvaluationOptions().evaluation_size(domain)),
    )
    for index in range(2):
        metric.update(samples[index], samples[index].label)
    assert list(metric.result(samples.evaluation_size, [0, 1])["conditions"]) == ["fog"]
    metric = DomainMetric(domain, torch.device("cpu"))
    metric.update(samples[1], samples[1].label)
    with pytest.raises(ValueError, match="mine: no pixel with a label that is scored in 1 images"):
        metric.result(samples.evaluation_size, [0, 1])


def test_an_image_whose_label_map_exhausts_the_memory_is_skipped(tmp_path, monkeypatch):
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", pixels_and_labels(2)))

    made = []

    def label_map(scores, size):
        made.append(size)
        if len(made) == 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory")
        return label_map_of_scores(scores, size)

    monkeypatch.setattr(scoring, "label_map_of_scores", label_map)
    result = evaluate_domain(Colours(), MFuserImageProcessor(), domain, progress=False)
    assert len(result["skipped"]) == 1 and result["images"] == 1
