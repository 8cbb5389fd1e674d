"""Corruptions are deterministic and act on the decoded image; their scores are recorded with their protocol."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from colour_scorer import Colours, pixels_and_labels, run_evaluate, write_dataset
from PIL import Image
from torch.utils.data import DataLoader

from mfuser import MFuserImageProcessor
from mfuser.class_names_mfuser import CITYSCAPES_CLASSES
from mfuser.data.domain import EvaluationSize
from mfuser.data.tables import DOMAINS
from mfuser.evaluation import corruptions
from mfuser.evaluation.corruptions import CORRUPTIONS, Corruption, corrupted_domain
from mfuser.evaluation.domains import open_domain
from mfuser.evaluation.protocols import EvaluationOptions
from mfuser.evaluation.scoring import evaluate_domain
from mfuser.scripts import evaluate as command

SIZES = ((40, 56), (48, 36))


pytestmark = pytest.mark.usefixtures("datasets_cache")


def picture(seed=0, size=(40, 56)) -> Image.Image:
    """Smooth colours with an edge, on which every corruption is visible."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def run(*arguments) -> int:
    return command.main([str(argument) for argument in (*arguments, "--workers", 0)])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_changes_the_image_and_keeps_its_size(name):
    image = picture(size=(41, 57))
    before = np.array(image)
    results = [np.array(Corruption(name, severity)(image)) for severity in (1, 5)]
    assert np.array_equal(image, before)  # the input image is not modified
    for result in results:
        assert result.shape == before.shape and result.dtype == np.uint8
    changes = [np.abs(result.astype(float) - before).mean() for result in results]
    assert 0 < changes[0] < changes[1]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_pixels_follow_from_image_corruption_and_seed_alone(name):
    image = picture()
    first = np.array(Corruption(name, 3)(image))
    np.random.seed(1)  # noqa: NPY002 - the generator that the library draws from
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for other in (Corruption(name, 2), Corruption("fog", 3)):
        other(picture(1))
    assert np.array_equal(Corruption(name, 3)(image), first)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002 - draws of the caller are not disturbed
    random = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert np.array_equal(Corruption(name, 3, seed=1)(image), first) == (name in random)


def test_each_image_has_its_own_noise():
    first, second = np.full((32, 40, 3), 128, np.uint8), np.full((32, 40, 3), 128, np.uint8)
    second[0, 0] = 0
    results = [np.array(Corruption("gaussian_noise", 3)(Image.fromarray(pixels))) for pixels in (first, second)]
    assert (results[0] != results[1]).mean() > 0.9


class Corrupted(torch.utils.data.Dataset):
    def __init__(self, names, order):
        self.names, self.order = names, order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        image = self.order[index]
        return image, [np.array(Corruption(name, 2)(picture(image))) for name in self.names]


@pytest.mark.parametrize("names", [("gaussian_noise", "snow", "frost", "elastic_transform"), ("glass_blur",)])
def test_worker_processes_and_the_order_of_images_change_no_pixel(names):
    expected = dict(Corrupted(names, [0, 1, 2, 3])[index] for index in range(4))
    for order in ([3, 1, 0, 2], [2]):
        loader = DataLoader(Corrupted(names, order), batch_size=None, num_workers=2, multiprocessing_context="fork")
        for image, results in loader:
            for result, known in zip(results, expected[image], strict=True):
                np.testing.assert_array_equal(result, known)


def test_names_and_groups_select_corruptions_in_the_order_of_the_paper():
    assert corruptions.corruption_names([]) == CORRUPTIONS and len(CORRUPTIONS) == 15
    assert corruptions.corruption_names(["pixelate", "noise", "shot_noise"]) == (
        "gaussian_noise", "shot_noise", "impulse_noise", "pixelate",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="'rain' is not a corruption; they are gaussian_noise, .* in the groups noise"
    ):
        corruptions.corruption_names(["rain"])


def test_the_names_are_those_of_the_library():
    imagecorruptions = pytest.importorskip("imagecorruptions")
    assert list(CORRUPTIONS) == imagecorruptions.get_corruption_names()
    for group, names in corruptions.GROUPS.items():
        assert list(names) == imagecorruptions.get_corruption_names(group)


@pytest.mark.parametrize("protocol", ["P1", "P2"])
def test_the_decoded_image_is_corrupted_before_it_is_resized(tmp_path, monkeypatch, protocol):
    sizes = {"P1": EvaluationSize((32, 48), halve_first=True), "P2": EvaluationSize((64, 96))}
    monkeypatch.setitem(
        DOMAINS, "small", dataclasses.replace(DOMAINS["cityscapes"], name="small", evaluation_sizes=sizes)
    )
    rows = list(pixels_and_labels(3, classes=19, sizes=SIZES))
    corruption = Corruption("gaussian_noise", 4, seed=3)
    by_hand = [(np.array(corruption(Image.fromarray(image))), label) for image, label in rows]
    model, options = Colours(dict(enumerate(CITYSCAPES_CLASSES))), EvaluationOptions(protocol)
    domains = [
        open_domain(
            "small",
            write_dataset(tmp_path / name / "validation.parquet", content, classes=DOMAINS["cityscapes"].id2label),
        )
        for name, content in (("clean", rows), ("corrupted", by_hand))
    ]
    clean, expected = (
        evaluate_domain(model, MFuserImageProcessor(), domain, options, progress=False)["pooled"] for domain in domains
    )
    found = evaluate_domain(
        model, MFuserImageProcessor(), corrupted_domain(domains[0], corruption), options, progress=False
    )["pooled"]
    assert found == expected and found != clean


@pytest.mark.slow
def test_the_report_holds_every_score_the_means_and_the_protocol(tmp_path, saved_model, capsys):
    conditions = ["fog", "night", "fog", "night"]
    source = write_dataset(tmp_path / "validation.parquet", pixels_and_labels(4, sizes=SIZES), conditions)
    output = tmp_path / "report.json"
    arguments = ("--model", saved_model, "--domains", f"mine={source}", "--output", output, "--confidence")
    chosen = ("--corruptions", "pixelate", "noise", "--severities", 2, 4, "--corruption-seed", 7)
    assert run(*arguments, *chosen) == 0
    report = json.loads(output.read_text())
    names = ["gaussian_noise", "shot_noise", "impulse_noise", "pixelate"]
    protocol = report["protocol"]["corruptions"]
    assert (protocol["names"], protocol["severities"], protocol["seed"]) == (names, [2, 4], 7)
    assert protocol["library"] == "imagecorruptions-imaug" and protocol["library_version"] >= "1.1.5"
    result = report["domains"]["mine"]
    found = result["corruptions"]
    assert list(found["scores"]) == names
    domain = open_domain("mine", source)
    model, processor = command.load_for_inference(saved_model, torch.device("cpu"), None)
    each = evaluate_domain(model, processor, corrupted_domain(domain, Corruption("shot_noise", 4, 7)), progress=False)
    scores = found["scores"]["shot_noise"]["4"]
    assert scores["mean_iou"] == each["mean_iou"] and scores["per_class_iou"] == each["pooled"]["per_class_iou"]
    assert scores["conditions"] == {name: of["mean_iou"] for name, of in each["conditions"].items()}
    assert set(scores["confidence"]["uncalibrated"]) == {"ece", "auroc", "aupr"}
    means = [np.mean([at["mean_iou"] for at in found["scores"][name].values()]) for name in names]
    assert list(found["mean_iou_by_corruption"].values()) == pytest.approx(means)
    assert found["mean_iou"] == pytest.approx(np.mean(means)) == report["mean_corrupted_iou"]
    assert found["relative_mean_iou"] == pytest.approx(np.mean(means) / result["mean_iou"])
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "shot_noise" in line)
    assert line.split()[-2:] == [f"{100 * scores['mean_iou']:.2f}", f"{100 * means[1]:.2f}"]
    assert f"{100 * found['relative_mean_iou']:.1f} % of that without corruptions (4 corruptions" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(("mean IoU  ", "mine  "))]
    night = np.mean([at["conditions"]["night"] for at in found["scores"]["pixelate"].values()])
    assert ["mine", "pixelate", f"{100 * night:.2f}"] in [row[:2] + row[-1:] for row in rows]


def test_without_corruptions_a_report_has_none(tmp_path, saved_model):
    source = write_dataset(tmp_path / "validation.parquet", pixels_and_labels(1))
    assert run("--model", saved_model, "--domains", f"mine={source}", "--output", tmp_path / "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert "corruptions" not in report["protocol"] and "mean_corrupted_iou" not in report
    assert not {"corruptions", "examples"} & report["domains"]["mine"].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--severities", 1], "--severities requires --corruptions"),
        (["--corruption-seed", 1], "--corruption-seed requires --corruptions"),
        (["--examples", -1], "--examples is -1; it must be at least 0"),
    ],
)
def test_options_without_effect_are_refused(saved_model, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run("--model", saved_model, "--domains", "mine=a", *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corruptions", "rain"], "'rain' is not a corruption; they are"),
        (["--corruptions", "--severities", 6], r"severities is \(6,\); they must be from 1 to 5"),
        (["--corruptions", "--severities", 1, 1], "each of them once"),
        (["--corruptions", "--corruption-seed", -1], "seed of the corruptions is -1; it must be from 0 to 4294967295"),
    ],
)
def test_wrong_corruptions_are_one_line_before_the_first_image(
    tmp_path, saved_model, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(command, "evaluate_domain", lambda *_, **__: pytest.fail("segmented"))
    source = write_dataset(tmp_path / "validation.parquet", pixels_and_labels(1))
    capsys.readouterr()
    with pytest.raises(ValueError, match=message):
        command.corruption_protocol(
            command.parse_arguments(["--model", "m", "--domains", "mine=a", *map(str, arguments)])
        )
    assert run("--model", saved_model, "--domains", f"mine={source}", *arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("option", [("--corruptions",), ("--examples", 1)])
def test_a_domain_without_labels_is_refused(tmp_path, saved_model, capsys, option):
    source = write_dataset(tmp_path / "test.parquet", pixels_and_labels(1), labelled=False)
    arguments = ("--model", saved_model, "--domains", f"mine={source}", "--save-predictions", tmp_path / "saved")
    assert run(*arguments, *option) == 2
    assert f"has no labels, which {option[0]} needs" in capsys.readouterr().err


def test_a_missing_library_is_reported_before_the_evaluation(tmp_path, saved_model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert run("--model", saved_model, "--domains", f"mine={tmp_path}", "--corruptions") == 2
    message = capsys.readouterr().err
    assert "imagecorruptions-imaug" in message and 'pip install "mfuser[robustness]"' in message


def test_images_that_are_too_small_are_named_counted_and_fail_the_run(tmp_path, saved_model, capsys):
    sizes = ((40, 40), (20, 28))
    source = write_dataset(tmp_path / "validation.parquet", pixels_and_labels(2, sizes=sizes))
    output = tmp_path / "report.json"
    arguments = ("--model", saved_model, "--domains", f"mine={source}", "--output", output)
    assert run(*arguments, "--corruptions", "contrast", "--severities", 1, 2) == 1
    result = json.loads(output.read_text())["domains"]["mine"]
    assert (result["images"], result["skipped"]) == (2, [])
    (skipped,) = result["corruptions"]["scores"]["contrast"]["1"]["skipped"]
    assert skipped["name"] == "00000001" and "20 x 28 pixels" in skipped["reason"]
    assert "mine: skipped 1 under corruptions alone, the first: 00000001: 20 x 28 pixels" in capsys.readouterr().out


def test_an_interrupted_run_keeps_the_corruptions_that_it_has_scored(tmp_path, saved_model, monkeypatch):
    source = write_dataset(tmp_path / "validation.parquet", pixels_and_labels(1, sizes=SIZES))
    passes = []

    def interrupted(*arguments, **options):
        if len(passes) == 4:
            raise KeyboardInterrupt
        passes.append(arguments)
        return evaluate_domain(*arguments, **options)

    monkeypatch.setattr(command, "evaluate_domain", interrupted)
    output = tmp_path / "report.json"
    output.write_text("an earlier report")
    arguments = ("--model", saved_model, "--domains", f"mine={source}", "--output", output)
    assert run(*arguments, "--corruptions", "contrast", "pixelate", "--severities", 1, 2) == 130
    assert output.read_text() == "an earlier report"
    report = json.loads((tmp_path / "report.partial.json").read_text())
    assert not report["complete"] and report["mean_iou"] is None
    scores = report["domains"]["mine"]["corruptions"]["scores"]
    assert {name: list(by_severity) for name, by_severity in scores.items()} == {
        "contrast": ["1", "2"],
        "pixelate": ["1"],
    }


@pytest.mark.slow
def test_two_processes_give_the_scores_and_examples_of_one(tmp_path, saved_model):
    source = write_dataset(tmp_path / "validation.parquet", pixels_and_labels(7, sizes=SIZES))

    def arguments(number):
        return [
            *("--model", saved_model, "--domains", f"mine={source}", "--workers", 0, "--examples", 1, "--corruptions"),
            *("gaussian_noise", "frost", "--severities", 2, "--output", tmp_path / f"{number}.json"),
        ]

    assert command.main([str(argument) for argument in arguments(1)]) == 0
    finished = run_evaluate(2, tmp_path / "cache", *arguments(2))
    assert finished.returncode == 0, finished.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{number}.json").read_text())["domains"]["mine"] for number in (1, 2))
    assert one["corruptions"] == two["corruptions"]
    for first, second in zip(one["examples"], two["examples"], strict=True):
        files = [tmp_path / each.pop("file") for each in (first, second)]
        assert first == second and files[0].read_bytes() == files[1].read_bytes()
