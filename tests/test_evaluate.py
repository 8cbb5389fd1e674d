"""`mfuser evaluate` gives the published protocols' score, whatever the number of processes, and says what it is of."""

import dataclasses
import gc
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import fake_downloads as fake
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from tiny_models import tiny_model

from mfuser import MFuserImageProcessor
from mfuser.class_names_mfuser import CITYSCAPES_CLASSES
from mfuser.data.domain import EvaluationSize
from mfuser.data.preparation import prepare
from mfuser.data.tables import CITYSCAPES, DOMAINS
from mfuser.evaluation.domains import open_domain
from mfuser.evaluation.predictions import prediction_files
from mfuser.evaluation.protocols import EvaluationOptions, ProtocolSamples
from mfuser.evaluation.report import score_table, shortfalls
from mfuser.evaluation.scoring import evaluate_domain, label_map_of_scores
from mfuser.scripts import evaluate as command

NAMES = {0: "road", 1: "sky", 2: "car", 3: "person"}
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Colours(torch.nn.Module):
    """Scores each pixel by its colour; keeps the shapes of what it was shown."""

    def __init__(self, classes=NAMES):
        super().__init__()
        self.config = SimpleNamespace(id2label=dict(classes))
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


def write_dataset(file, rows, conditions=None, names=None, labelled=True):
    """A parquet file, and the class names beside it."""
    images, labels = zip(*rows, strict=True)
    columns = {"image": [Image.fromarray(image) for image in images]}
    columns["label"] = [Image.fromarray(label) if labelled else None for label in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    for name, values in (("condition", conditions), ("name", names)):
        if values is not None:
            columns[name], features[name] = values, datasets.Value("string")
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
    (file.parent / "id2label.json").write_text(json.dumps(NAMES))
    return file


def expected_prediction(model, image):
    mean, std = np.array(MFuserImageProcessor.image_mean), np.array(MFuserImageProcessor.image_std)
    normalised = (image / 255 - mean) / std
    return (normalised @ model.weights.detach().double().numpy().T).argmax(-1)


def expected_iou(pairs, classes):
    """Per class, by scikit-learn's confusion matrix."""
    prediction, label = (np.concatenate([pair[part].ravel() for pair in pairs]) for part in (0, 1))
    matrix = confusion_matrix(label[label != 255], prediction[label != 255], labels=range(classes))
    with np.errstate(invalid="ignore"):
        return matrix, matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    MFuserImageProcessor().save_pretrained(folder)
    return folder


def run(*arguments) -> int:
    return command.main([str(argument) for argument in (*arguments, "--workers", 0)])


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


def test_scores_resized_class_by_class_have_the_arg_max_of_scores_resized_together():
    scores = torch.randn(19, 30, 41, generator=torch.Generator().manual_seed(0))
    for size in ((30, 41), (75, 90), (13, 17)):
        outputs = SimpleNamespace(logits=scores[None])
        (expected,) = MFuserImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=[size])
        found = label_map_of_scores(scores, size)
        assert found.dtype == torch.uint8
        assert torch.equal(found.long(), expected)
    assert not label_map_of_scores(torch.ones(3, 4, 4), (4, 4)).any()  # of equal scores the first wins
    assert not label_map_of_scores(torch.ones(3, 4, 4), (8, 8)).any()


def test_a_protocol_sets_the_size_that_is_segmented_and_scores_at_the_labels_size(tmp_path, monkeypatch):
    sizes = {"P1": EvaluationSize((16, 24), halve_first=True), "P2": EvaluationSize((40, 48))}
    domain = dataclasses.replace(DOMAINS["cityscapes"], name="small", evaluation_sizes=sizes)
    monkeypatch.setitem(DOMAINS, "small", domain)
    names = {index: name for index, name in enumerate(CITYSCAPES_CLASSES)}
    rows = list(pixels_and_labels(2, classes=19, sizes=((30, 60), (60, 30)), ignored=0))
    source = write_dataset(tmp_path / "validation.parquet", rows)
    for protocol, shown, scored in (("P1", [(12, 24), (24, 12)], 15 * 30), ("P2", [(24, 48), (48, 24)], 30 * 60)):
        model = Colours(names)
        opened = open_domain("small", source)
        result = evaluate_domain(model, MFuserImageProcessor(), opened, EvaluationOptions(protocol), progress=False)
        assert [shape[2:] for shape in model.shown] == shown
        matrix = np.array(result["pooled"]["confusion_matrix"])
        assert matrix.sum() == 2 * scored
        labels = [label[1::2, 1::2] if protocol == "P1" else label for _, label in rows]  # nearest: no value mixed
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


def test_conditions_are_scored_one_by_one_averaged_and_pooled(tmp_path):
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
    [("cityscapes", fake.cityscapes, 2), ("bdd100k", fake.bdd100k, 1), ("mapillary", fake.mapillary, 1)]
    + [("acdc", fake.acdc, 4), ("synthia", fake.synthia, 2), ("gta5", fake.gta5, 3)],
)
def test_a_download_scores_as_what_prepare_makes_of_it(tmp_path, monkeypatch, name, build, images):
    monkeypatch.setitem(DOMAINS, name, dataclasses.replace(DOMAINS[name], evaluation_sizes={"P2": EvaluationSize()}))
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


def test_mapillarys_two_maps_and_a_prepared_folder_keeps_its_own(tmp_path):
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


def test_cityscapes_predictions_are_as_its_test_server_takes_them(tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(CITYSCAPES, evaluation_sizes={"P2": EvaluationSize()})
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


def test_bad_pairs_are_skipped_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setitem(
        DOMAINS, "bdd100k", dataclasses.replace(DOMAINS["bdd100k"], evaluation_sizes={"P2": EvaluationSize()})
    )
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


def test_classes_that_differ_are_named(tmp_path):
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", pixels_and_labels(1)))
    with pytest.raises(ValueError, match="only the model has truck; only mine has car"):
        evaluate_domain(Colours({0: "road", 1: "sky", 2: "truck", 3: "person"}), None, domain)
    with pytest.raises(ValueError, match="another order: 0 is sky in the model and road in mine"):
        evaluate_domain(Colours({0: "sky", 1: "road", 2: "car", 3: "person"}), None, domain)
    with pytest.raises(ValueError, match="19 classes are not the 4 of mine"):
        evaluate_domain(Colours(dict(enumerate(CITYSCAPES_CLASSES))), None, domain)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    alive = {}
    for count in (3, 30):
        rows = list(pixels_and_labels(count, sizes=((40, 40),)))
        domain = open_domain("mine", write_dataset(tmp_path / f"{count}/validation.parquet", rows))
        model, seen = Colours(), []

        def look(module, *_, seen=seen, last=count):
            if len(module.shown) in (2, last):
                seen.append(_bytes_of_tensors())

        model.register_forward_hook(look)
        evaluate_domain(model, MFuserImageProcessor(), domain, progress=False)
        alive[count] = max(seen)
    assert alive[30] == alive[3]


def _bytes_of_tensors() -> int:
    return sum(each.nbytes for each in gc.get_objects() if type(each) in (torch.Tensor, np.ndarray))


def test_the_report_holds_the_scores_and_all_they_depend_on(tmp_path, saved_model, capsys):
    day = write_dataset(tmp_path / "data/validation.parquet", pixels_and_labels(3))
    write_dataset(tmp_path / "data/dusk.parquet", pixels_and_labels(2, seed=1))
    output = tmp_path / "new/report.json"
    arguments = ("--model", saved_model, "--domains", f"mine={day.parent}", f"mine:dusk={day.parent}")
    assert run(*arguments, "--output", output, "--flip", "--protocol", "P1") == 0
    report = json.loads(output.read_text())
    assert report["complete"] and list(report["domains"]) == ["mine", "mine:dusk"]
    assert [result["split"] for result in report["domains"].values()] == ["validation", "dusk"]
    scores = [result["mean_iou"] for result in report["domains"].values()]
    assert report["mean_iou"] == pytest.approx(np.mean(scores))
    weights = (saved_model / "model.safetensors").read_bytes()
    assert report["model"]["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert report["protocol"] == {
        "name": "P1", "crop_size": 64, "crop_stride": 42, "resizing": command.RESIZING, "flip": True, "scales": [1.0]
    }  # fmt: skip
    assert report["run"]["dtype"] == "float32" and report["run"]["processes"] == 1
    assert report["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert f"mine:dusk: {100 * scores[1]:.2f} % mean IoU, P1, segmented at the images' size, flip" in printed
    assert f"mean over domains: {100 * report['mean_iou']:.2f} %" in printed
    road = report["domains"]["mine"]["pooled"]["per_class_iou"]["road"]
    assert next(line for line in printed.splitlines() if line.startswith("road")).split()[1] == f"{100 * road:.2f}"


def test_the_table_shows_conditions_beside_the_pool_and_a_dash_where_a_class_does_not_count():
    def scores(iou, averaged):
        return {"per_class_iou": iou, "classes_averaged": averaged, "mean_iou": 0.5, "images": 7}

    pooled = scores({"road": 0.5, "sky": 0.25}, ["road", "sky"])
    result = {"pooled": pooled, "conditions": {"fog": scores({"road": 0.5, "sky": None}, ["road"])}}
    table = [line.split("  ") for line in score_table({"acdc": result}).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in table]
    assert cells == [
        ["class", "acdc fog", "acdc pooled"],
        ["road", "50.00", "50.00"],
        ["sky", "-", "25.00"],
        ["mean IoU", "50.00", "50.00"],
        ["images", "7", "7"],
    ]


def test_two_processes_give_exactly_the_score_of_one(tmp_path, saved_model, capsys):
    rows = list(pixels_and_labels(7))  # odd: nothing may be counted twice to even out the shares
    rows[2] = (rows[2][0], rows[2][1][:-1])  # a bad pair, in the second process
    source = write_dataset(tmp_path / "data/validation.parquet", rows, ["fog", "fog", "snow"] * 2 + ["rain"])

    def arguments(number):
        files = "--output", tmp_path / f"{number}.json", "--save-predictions", tmp_path / f"predictions {number}"
        return "--model", saved_model, "--domains", f"mine={source}", "--batch-size", 2, "--workers", 0, *files

    assert command.main([str(argument) for argument in arguments(1)]) == 1  # one was skipped
    assert "mine: skipped 1, the first: 00000002:" in capsys.readouterr().err
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mfuser.scripts.evaluate"]
    finished = subprocess.run(
        [sys.executable, *launch, *map(str, arguments(2)), "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    one, two = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2))
    assert (one["run"]["processes"], two["run"]["processes"]) == (1, 2), finished.stderr[-3000:]
    for report in (one, two):
        report["domains"]["mine"].pop("seconds")
    assert one["domains"] == two["domains"]
    assert one["domains"]["mine"]["images"] == 6
    saved = [{file.name: file.read_bytes() for file in (tmp_path / f"predictions {n}/mine").iterdir()} for n in (1, 2)]
    assert len(saved[0]) == 6 and saved[0] == saved[1]


@pytest.mark.parametrize(
    ("domains", "extra", "message"),
    [
        (["cityscapes"], [], "not of the form NAME=SOURCE"),
        (["mine=a", "mine=b"], [], "names mine more than once"),
        (["bdd100k=a"], ["--mapillary-map", "B"], "not among the --domains"),
        (["bdd100k=a"], ["--id2label", "classes.json"], "have their own class names"),
    ],
)
def test_impossible_arguments_are_refused(saved_model, capsys, domains, extra, message):
    with pytest.raises(SystemExit):
        run("--model", saved_model, "--domains", *domains, *extra)
    assert message in capsys.readouterr().err


def test_what_is_wrong_is_said_before_anything_is_segmented(tmp_path, saved_model, capsys, monkeypatch):
    monkeypatch.setattr(command, "evaluate_domain", lambda *_, **__: pytest.fail("segmented"))
    good = write_dataset(tmp_path / "validation.parquet", pixels_and_labels(1))
    fake.acdc(tmp_path / "acdc")
    unlabelled = write_dataset(tmp_path / "test/test.parquet", pixels_and_labels(1), labelled=False)
    for second, message in (
        (f"acdc={tmp_path / 'acdc'}", "the model's 4 classes are not the 19 of acdc"),
        ("cityscapes=/nowhere/at/all", "/nowhere/at/all does not exist"),
        (f"theirs={unlabelled}", "has no labels; give --save-predictions"),
        (f"camvid:train={good}", "has no split 'train'"),
    ):
        output = tmp_path / "report.json"
        assert run("--model", saved_model, "--domains", f"mine={good}", second, "--output", output) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()
    assert run("--model", tmp_path / "no/model/here", "--domains", f"mine={good}") == 2
    assert "there is no model" in capsys.readouterr().err


def test_images_are_resized_as_opencv_does_not_smoothed(tmp_path, monkeypatch):
    sizes = {"P2": EvaluationSize((12, 12))}
    monkeypatch.setitem(DOMAINS, "small", dataclasses.replace(CITYSCAPES, name="small", evaluation_sizes=sizes))
    image = np.zeros((24, 24, 3), dtype=np.uint8)
    image[1::4] = image[2::4] = 200  # halving takes the mean of two rows; a smoothing filter would mix in more
    label = np.zeros((24, 24), dtype=np.uint8)
    domain = open_domain("small", write_dataset(tmp_path / "validation.parquet", [(image, label)]))
    sample = ProtocolSamples(domain, MFuserImageProcessor(do_normalize=False), sizes["P2"])[0]
    assert sample.pixel_values.shape == (3, 12, 12) and sample.size == (24, 24)
    torch.testing.assert_close(sample.pixel_values, torch.full((3, 12, 12), 100 / 255))
