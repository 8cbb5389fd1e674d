"""`mfuser evaluate` records the scores and all settings, and gives the same score for any number of processes."""

import hashlib
import json
from fnmatch import fnmatch
from importlib.metadata import version

import fake_downloads as fake
import numpy as np
import pytest
from colour_scorer import pixels_and_labels, run_evaluate, write_dataset

from mfuser.evaluation.comparison import read_result
from mfuser.evaluation.report import score_table
from mfuser.scripts import evaluate as command

pytestmark = pytest.mark.usefixtures("datasets_cache")


def run(*arguments) -> int:
    return command.main([str(argument) for argument in (*arguments, "--workers", 0)])


def test_the_report_holds_the_scores_and_all_settings(tmp_path, saved_model, capsys):
    day = write_dataset(tmp_path / "data/validation.parquet", pixels_and_labels(3))
    write_dataset(tmp_path / "data/dusk.parquet", pixels_and_labels(2, seed=1))
    output = tmp_path / "new/report.json"
    arguments = ("--model", saved_model, "--domains", f"mine={day.parent}", f"mine:dusk={day.parent}")
    assert run(*arguments, "--output", output, "--flip", "--protocol", "P1") == 0
    report = json.loads(output.read_text())
    assert report["complete"] and list(report["domains"]) == ["mine", "mine:dusk"]
    assert list(output.parent.iterdir()) == [output]  # no partial report remains
    assert [result["split"] for result in report["domains"].values()] == ["validation", "dusk"]
    scores = [result["mean_iou"] for result in report["domains"].values()]
    assert report["mean_iou"] == pytest.approx(np.mean(scores))
    weights = (saved_model / "model.safetensors").read_bytes()
    assert report["model"]["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert report["protocol"] == {
        "name": "P1", "crop_size": 64, "crop_stride": 42, "resizing": command.RESIZING, "flip": True, "scales": [1.0],
        "classes": "domain",
    }  # fmt: skip
    assert report["run"]["dtype"] == "float32" and report["run"]["processes"] == 1
    assert report["versions"]["torch"] == version("torch")
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


@pytest.mark.slow
def test_two_processes_give_exactly_the_score_of_one(tmp_path, saved_model, capsys):
    rows = list(pixels_and_labels(9))  # odd, so that images repeated to fill up the shares would be noticed
    rows[2] = (rows[2][0], rows[2][1][:-1])  # a bad pair, in the second process
    rows[7] = (rows[7][0], None)  # an image without a label, in the second process
    source = write_dataset(tmp_path / "data/validation.parquet", rows, ["fog", "fog", "snow"] * 2 + ["rain"] * 3)

    def arguments(number):
        files = "--output", tmp_path / f"{number}.json", "--save-predictions", tmp_path / f"predictions {number}"
        return "--model", saved_model, "--domains", f"mine={source}", "--batch-size", 2, "--workers", 0, *files

    assert command.main([str(argument) for argument in arguments(1)]) == 1  # one was skipped
    assert "mine: skipped 1, the first: 00000002:" in capsys.readouterr().err
    finished = run_evaluate(2, tmp_path / "cache", *arguments(2))
    one, two = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2))
    assert (one["run"]["processes"], two["run"]["processes"]) == (1, 2), finished.stderr[-3000:]
    for report in (one, two):
        report["domains"]["mine"].pop("seconds")
    assert one["domains"] == two["domains"]
    assert (one["domains"]["mine"]["images"], one["domains"]["mine"]["unlabelled_images"]) == (7, 1)
    saved = [{file.name: file.read_bytes() for file in (tmp_path / f"predictions {n}/mine").iterdir()} for n in (1, 2)]
    assert len(saved[0]) == 8 and saved[0] == saved[1]


@pytest.mark.parametrize(
    ("domains", "extra", "message"),
    [
        (["cityscapes"], [], "not of the form NAME=SOURCE"),
        (["mine=a", "mine=b"], [], "names mine more than once"),
        (["bdd100k=a"], ["--mapillary-map", "B"], "not among the --domains"),
        (["bdd100k=a"], ["--mapillary-labels", "half"], "--mapillary-labels applies to mapillary"),
        (["bdd100k=a"], ["--id2label", "classes.json"], "have their own class names"),
    ],
)
def test_impossible_arguments_are_refused(saved_model, capsys, domains, extra, message):
    with pytest.raises(SystemExit):
        run("--model", saved_model, "--domains", *domains, *extra)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_errors_are_found_before_the_first_image_is_segmented(tmp_path, saved_model, capsys, monkeypatch):
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
    assert run("--model", saved_model, "--domains", f"mine={good}", "--classes", "synthia16") == 2
    assert "mine has no class sidewalk" in capsys.readouterr().err
    download = f"acdc={tmp_path / 'acdc'}"
    assert run("--model", saved_model, "--domains", download, "--label-column", "annotation") == 2
    assert "--label-column is annotation; official downloads" in capsys.readouterr().err
    assert run("--model", tmp_path / "no/model/here", "--domains", f"mine={good}") == 2
    assert "there is no model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "folder"), "folder is a folder; choose a file"),
        (("--output", "file/report.json"), "file is a file; choose another folder"),
        (("--reliability-diagrams", "file"), "file is a file; choose another folder"),
        (("--save-predictions", "file"), "file is a file; choose another folder"),
        (("--output", "new/report.json", "--examples", 1), "report_examples is a file; choose another folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_before_the_model_is_loaded(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "new"):
        (tmp_path / folder).mkdir()
    for file in ("file", "new/report_examples"):
        (tmp_path / file).touch()
    assert run("--model", "no/model", "--domains", "mine=data", *arguments) == 2
    assert message in capsys.readouterr().err


def test_checking_the_places_creates_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--examples", 1, "--reliability-diagrams", "diagrams", "--save-predictions", "predictions")
    assert run("--model", "no/model", "--domains", "mine=data", *options) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_scores_are_written_before_diagrams_and_examples_are_drawn(tmp_path, saved_model, monkeypatch):
    source = write_dataset(tmp_path / "validation.parquet", pixels_and_labels(1))
    monkeypatch.setattr(command, "write_examples", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    arguments = ("--model", saved_model, "--domains", f"mine={source}", "--output", tmp_path / "report.json")
    assert run(*arguments, "--examples", 1) == 2
    assert read_result(tmp_path / "report.partial.json")["domains"]["mine"]["images"] == 1


def test_pictures_are_those_of_the_report_beside_them(tmp_path, saved_model, monkeypatch):
    """An evaluation that is interrupted changes no picture of an earlier one; a complete one replaces them."""
    output, diagrams, folder = tmp_path / "report.json", tmp_path / "diagrams", tmp_path / "report_examples"
    options = ("--output", output, "--examples", 1, "--reliability-diagrams", diagrams)

    def arguments(seed, *titles):
        source = write_dataset(tmp_path / f"{seed}/validation.parquet", pixels_and_labels(4, seed=seed))
        return "--model", saved_model, "--domains", *(f"{title}={source}" for title in titles), *options

    def pictures():
        return {file: file.read_bytes() for file in (*folder.glob("*/*"), *diagrams.iterdir())}

    assert run(*arguments(0, "mine", "yours")) == 0
    (folder / "mine" / "worst-1.png").write_bytes(b"a picture of other origin")
    first = pictures()
    with monkeypatch.context() as patch:
        once = iter([command.evaluate_domain])
        patch.setattr(command, "evaluate_domain", lambda *args, **kwargs: next(once)(*args, **kwargs))
        with pytest.raises(StopIteration):  # at the second domain
            run(*arguments(1, "mine", "yours"))
    assert first.items() < pictures().items()
    assert run(*arguments(1, "mine")) == 0
    named = {tmp_path / example["file"] for example in read_result(output)["domains"]["mine"]["examples"]}
    assert set(folder.glob("*/*")) == named | {folder / "mine" / "worst-1.png"} and named.isdisjoint(first)
    assert pictures()[diagrams / "mine.png"] != first[diagrams / "mine.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu", "--domains", "mine=data"], "'gpu' must be an available device"),
        (["--domains", "mine:dusk=data", "mine-dusk=data"], "files of two domains would have the same names"),
    ],
)
def test_a_wrong_device_and_titles_of_equal_files_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        run("--model", "model", "--output", "report.json", *arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_of_a_model_on_the_hub_weights_and_settings_are_downloaded_and_no_code(saved_model, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.extend(allow_patterns)
        return str(saved_model)

    monkeypatch.setattr(command, "snapshot_download", download)
    assert command.model_folder("me/mine") == (saved_model, saved_model.name)
    names = ("config.json", "model-00001-of-00002.safetensors", "modeling_mfuser.py", "pytorch_model.bin")
    assert [name for name in names if any(fnmatch(name, pattern) for pattern in asked)] == list(names[:2])
