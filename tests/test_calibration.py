"""`mfuser calibrate` fits confidences to original and distorted source images, and stores the calibration."""

import json
import shutil

import numpy as np
import pytest
import torch
from colour_scorer import Colours, pixels_and_labels, write_dataset
from tiny_models import tiny_config, tiny_model

from mfuser import MFuserImageProcessor
from mfuser.confidence_mfuser import confidence_map
from mfuser.evaluation import calibration
from mfuser.evaluation.calibration import (
    DISTORTIONS,
    PixelSample,
    distort,
    fit_temperature,
    halves,
    sample_pixels,
)
from mfuser.evaluation.confidence import ConfidenceHistogram
from mfuser.evaluation.domains import open_domain
from mfuser.evaluation.protocols import EvaluationOptions
from mfuser.loading import load_for_inference
from mfuser.scripts import calibrate
from mfuser.training.run_record import differences, run_record
from mfuser.training.trainer import MFuserTrainer, MFuserTrainingArguments

TEMPERATURE = 1.6


pytestmark = pytest.mark.usefixtures("datasets_cache")


def pixel_sample(row, pixels=400, temperature=TEMPERATURE):
    """Pixels whose labels are drawn from the softmax of their log scores at a known temperature."""
    generator = torch.Generator().manual_seed(row)
    scores = torch.rand(pixels, 4, generator=generator, dtype=torch.float64) ** 3
    probabilities = (scores.log() / temperature).softmax(dim=1)
    return PixelSample(row, (), scores, torch.multinomial(probabilities, 1, generator=generator)[:, 0])


def mostly_right(count, sizes=((20, 28), (24, 20))):
    """Images with labels that are predicted by the saved model on half of the pixels, and random elsewhere."""
    model, processor = tiny_model(), MFuserImageProcessor()
    for image, random_label in pixels_and_labels(count, sizes=sizes):
        with torch.no_grad():
            predicted = model(**processor(image, return_tensors="pt")).logits[0].argmax(0).numpy()
        yield (
            image,
            np.where(random_label > 1, random_label, predicted).astype(np.uint8),
        )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_calibration_recovers_a_known_temperature(temperature):
    found = fit_temperature([pixel_sample(row, pixels=4000, temperature=temperature) for row in range(20)])
    assert found == pytest.approx(temperature, rel=0.03)
    assert tiny_config(confidence_temperature=found).confidence_temperature == found


def test_calibration_makes_confidences_those_of_the_accuracy():
    samples = [pixel_sample(row, pixels=2000, temperature=2.5) for row in range(20)]
    errors = []
    for temperature in (1.0, fit_temperature(samples[:10])):
        histogram = ConfidenceHistogram(4)
        for sample in samples[10:]:
            histogram.update(confidence_map(sample.scores, temperature), sample.scores.argmax(1), sample.labels)
        errors.append(histogram.compute()["ece"])
    assert errors[0] > 0.1 and errors[1] < 0.02


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 0], "all of 3 pixels are classified correctly"),
        ([2, 2, 2], "labelled classes of 3 pixels have no higher scores than the other classes"),
    ],
)
def test_scores_without_a_best_temperature_are_refused(labels, words):
    scores = torch.tensor([[0.9, 0.2, 0.1], [0.3, 0.5, 0.2], [0.9, 0.9, 0.0]])
    with pytest.raises(ValueError, match=words):
        fit_temperature([PixelSample(0, (), scores, torch.tensor(labels))])
    assert 0.1 < fit_temperature([PixelSample(0, (), scores, torch.tensor([0, 0, 1]))]) < 10


def test_calibrated_figures_are_measured_on_images_that_are_not_fitted_to():
    samples = [pixel_sample(row) for row in range(7)]
    pairs = halves(samples)
    for fitted, measured in pairs:
        assert not {sample.row for sample in fitted} & {sample.row for sample in measured}
    assert sorted(sample.row for _, measured in pairs for sample in measured) == list(range(7))


@pytest.mark.parametrize("name", DISTORTIONS)
def test_distortions_grow_with_their_strength(name):
    pixels = np.random.default_rng(0).random((3, 120, 160))
    weak, strong = (DISTORTIONS[name](pixels, strength, np.random.default_rng(1)) for strength in (0.0, 1.0))
    np.testing.assert_allclose(weak, pixels, atol=1e-3)
    assert strong.shape == pixels.shape and abs(strong - pixels).mean() > 0.05


@pytest.mark.parametrize("max_kinds", [1, 3])
def test_copies_are_distorted_by_one_to_max_kinds_different_kinds(max_kinds):
    pixels = np.random.default_rng(0).random((3, 24, 32))
    seen = []
    for seed in range(60):
        distorted, kinds = distort(pixels, max_kinds, np.random.default_rng(seed))
        assert len(set(kinds)) == len(kinds) and distorted.min() >= 0 and distorted.max() <= 1
        rng = np.random.default_rng(seed)
        rng.choice(list(DISTORTIONS), rng.integers(1, max_kinds + 1), replace=False)
        expected = pixels
        for kind in kinds:  # each changes the result of the one before
            expected = DISTORTIONS[kind](expected, rng.uniform(), rng).clip(0, 1)
        np.testing.assert_array_equal(distorted, expected)
        seen.append(kinds)
    assert {len(kinds) for kinds in seen} == set(range(1, max_kinds + 1))
    assert {kind for kinds in seen for kind in kinds} == set(DISTORTIONS)


def test_samples_are_those_of_the_model_and_repeat(tmp_path):
    rows = list(pixels_and_labels(5, sizes=((40, 56),)))
    rows[1] = (rows[1][0], rows[1][1][:-1])  # a bad pair is skipped
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", rows))
    model, processor = tiny_model(), MFuserImageProcessor()
    skipped = []
    runs = [
        sample_pixels(model, processor, domain, EvaluationOptions(), pixels=500, progress=False, skipped=skipped)
        for _ in range(2)
    ]
    reason = "the image has 40x56 pixels, its label 39x56 (height x width)"
    assert skipped == 2 * [{"name": "00000001", "reason": reason}]
    with pytest.raises(ValueError, match="^00000001: the image has 40x56 pixels"):
        sample_pixels(model, processor, domain, EvaluationOptions(), pixels=1, progress=False)
    for first, second in zip(*runs, strict=True):
        assert first.distortions == second.distortions and torch.equal(first.scores, second.scores)
    assert [sample.row for sample in runs[0]] == [0, 0, 0, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [not sample.distortions for sample in runs[0]] == [True, False, False] * 4
    sample = runs[0][0]
    with torch.no_grad():
        outputs = model(**processor(rows[0][0], return_tensors="pt"), output_confidence=True)
    whole = ConfidenceHistogram(4)
    label = torch.from_numpy(rows[0][1])[None]
    whole.update(outputs.confidence, outputs.logits.argmax(1), label)
    drawn = (sample.scores.argmax(1) == sample.labels).float().mean().item()
    assert drawn == pytest.approx(whole.compute()["accuracy"], abs=0.07)
    known = {tuple(scores) for scores in outputs.logits[0].flatten(1).T.tolist()}
    assert all(tuple(scores) in known for scores in sample.scores.tolist())


def test_the_number_of_scores_does_not_grow_with_images_and_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "MAX_SCORES", 300)
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", pixels_and_labels(5)))
    samples = sample_pixels(tiny_model(), MFuserImageProcessor(), domain, EvaluationOptions(), progress=False)
    assert {sample.scores.shape for sample in samples} == {(300 // (5 * 3 * 4), 4)}


def test_the_command_reports_fewer_pixels_than_were_asked_for(tmp_path, saved_model, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "MAX_SCORES", 4 * 3 * 4 * 50)
    source = write_dataset(tmp_path / "data/validation.parquet", mostly_right(4))
    arguments = ["--model", saved_model, "--domain", f"mine:validation={source.parent}", "--workers", 0]
    for pixels, reported in ((60, True), (50, False)):
        options = (*arguments, "--pixels", pixels, "--output", tmp_path / str(pixels))
        assert calibrate.main([str(each) for each in options]) == 0
        assert ("mine:validation: 50 pixels of each view instead of 60" in capsys.readouterr().err) is reported


def test_every_copy_is_made_from_the_image_and_every_image_has_draws_of_its_own(tmp_path, monkeypatch):
    rows = [next(iter(pixels_and_labels(1)))] * 2  # one image twice
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", rows))
    given = []

    def distort(pixels, max_kinds, rng):
        given.append(pixels)
        return 1 - pixels, ("inverted",)

    monkeypatch.setattr("mfuser.evaluation.calibration.distort", distort)
    model, processor = tiny_model(), MFuserImageProcessor()
    samples = sample_pixels(model, processor, domain, EvaluationOptions(), pixels=50, progress=False)
    assert [sample.distortions for sample in samples] == [(), ("inverted",), ("inverted",)] * 2
    assert len(given) == 4
    for pixels in given:
        np.testing.assert_allclose(255 * pixels, rows[0][0].transpose(2, 0, 1), atol=1e-3)
    assert not torch.equal(samples[0].labels, samples[3].labels)


@pytest.mark.parametrize(
    "settings", [{"do_normalize": False}, {"image_mean": 0.4, "image_std": 0.2}, {"rescale_factor": 1 / 127.5}]
)
def test_views_are_the_same_images_whatever_the_processor_does(tmp_path, settings):
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", pixels_and_labels(2)))
    seen = []
    for processor in (MFuserImageProcessor(), MFuserImageProcessor(pad_size={"height": 64, "width": 64}, **settings)):
        model, views = Colours(), []
        model.register_forward_pre_hook(
            lambda _, args, kwargs, views=views: views.append(kwargs["pixel_values"][0].numpy()), with_kwargs=True
        )
        sample_pixels(model, processor, domain, EvaluationOptions(), pixels=1, copies=6, progress=False)
        mean, std = (
            np.resize(values, (3, 1, 1))
            for values in ((processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1))
        )
        seen.append([(view * std + mean) / processor.rescale_factor / 255 for view in views])
    for first, second in zip(*seen, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_the_command_names_and_counts_what_it_skips(tmp_path, saved_model, capsys):
    rows = list(mostly_right(5, sizes=((40, 56),)))
    rows[1] = (rows[1][0], rows[1][1][:-1])
    rows[3] = tuple(part[:4, :4] for part in rows[3])
    names = ["one", "two", "three", "four", "five"]
    source = write_dataset(tmp_path / "validation.parquet", rows, names=names)
    arguments = ["--model", saved_model, "--domain", f"mine={source}", "--workers", 0, "--pixels", 50]
    model = tmp_path / "model"
    shutil.copytree(saved_model, model)
    (model / "checkpoint-10").mkdir()
    (model / "checkpoint-10/optimizer.bin").touch()
    arguments[1] = model
    assert calibrate.main([str(each) for each in (*arguments, "--output", model / "calibrated")]) == 2
    assert f"--output {model / 'calibrated'} is inside --model {model}" in capsys.readouterr().err
    assert calibrate.main([str(each) for each in (*arguments, "--output", tmp_path / "calibrated")]) == 1
    printed = capsys.readouterr()
    assert "mine: skipped two: the image has 40x56 pixels, its label 39x56" in printed.err
    assert "mine: skipped four: segmented at 4 x 4 pixels, a side has 4; a patch has" in printed.err
    assert "fitted to 3 images of mine, 2 skipped: " in printed.out
    assert not (tmp_path / "calibrated/checkpoint-10").exists()


def test_the_command_stores_the_calibration_and_changes_nothing_else(tmp_path, saved_model, capsys):
    source = write_dataset(tmp_path / "data/validation.parquet", mostly_right(4))
    arguments = ["--model", saved_model, "--domain", f"mine:validation={source.parent}", "--workers", 0]
    before = {file.name: file.read_bytes() for file in saved_model.iterdir()}
    output = tmp_path / "calibrated"
    assert calibrate.main([str(each) for each in (*arguments, "--pixels", 50, "--output", output)]) == 0
    assert {file.name: file.read_bytes() for file in saved_model.iterdir()} == before
    printed = capsys.readouterr().out
    assert "undistorted, uncalibrated" in printed and "distorted, calibrated" in printed
    after = {file.name: file.read_bytes() for file in output.iterdir()}
    old, new = (json.loads(files.pop("config.json")) for files in (before, after))
    assert after == before
    temperature = new.pop("confidence_temperature")
    assert new == {name: value for name, value in old.items() if name != "confidence_temperature"}
    model, processor = load_for_inference(output, torch.device("cpu"))
    assert model.config.confidence_temperature == temperature
    domain = open_domain("mine", source.parent, "validation")
    assert temperature == fit_temperature(sample_pixels(model, processor, domain, EvaluationOptions(), pixels=50))

    assert calibrate.main([str(each) for each in (*arguments, "--output", output)]) == 2
    assert "is not empty; choose a new folder" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(saved_model, copy)
    arguments[1] = copy
    assert calibrate.main([str(each) for each in (*arguments, "--pixels", 50)]) == 0
    assert json.loads((copy / "config.json").read_text())["confidence_temperature"] == temperature


@pytest.mark.slow
def test_the_command_refuses_what_it_cannot_calibrate(tmp_path, saved_model, capsys):
    unlabelled = write_dataset(tmp_path / "test/test.parquet", pixels_and_labels(1), labelled=False)
    one = write_dataset(tmp_path / "one/validation.parquet", pixels_and_labels(1))
    for source, message in ((unlabelled, "has no labels"), (one, "at least 2 are needed"), ("nowhere", "nowhere")):
        arguments = [
            "--model",
            saved_model,
            "--domain",
            f"mine={source}",
            "--workers",
            "0",
            "--output",
            tmp_path / "new",
        ]
        assert calibrate.main(list(map(str, arguments))) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    for option, value, message in (
        ("--pixels", "0", "--pixels is 0; it must be at least 1"),
        ("--device", "abacus", "'abacus' must be an available device"),
    ):
        with pytest.raises(SystemExit):
            calibrate.main(["--model", str(saved_model), "--domain", f"mine={one}", option, value])
        assert message in capsys.readouterr().err


def test_a_model_that_is_trained_loses_its_calibration(tmp_path):
    model, dataset = tiny_model(confidence_temperature=TEMPERATURE), [{"pixel_values": None, "labels": None}]
    arguments = MFuserTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    MFuserTrainer(model, arguments, eval_dataset=dataset)
    assert model.config.confidence_temperature == TEMPERATURE
    MFuserTrainer(model, arguments, dataset)
    assert model.config.confidence_temperature is None


def test_a_training_resumes_whether_or_not_its_model_was_calibrated_meanwhile(tmp_path):
    arguments = MFuserTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    models = [tiny_model(confidence_temperature=temperature) for temperature in (None, TEMPERATURE)]
    assert differences(*(run_record(model, arguments, {}, {}) for model in models)) == []


def test_an_output_that_cannot_be_written_is_refused_before_images_are_segmented(
    tmp_path, saved_model, capsys, monkeypatch
):
    monkeypatch.setattr(calibrate, "sample_pixels", lambda *_, **__: pytest.fail("segmented"))
    source = write_dataset(tmp_path / "data/validation.parquet", pixels_and_labels(2))
    (tmp_path / "file").touch()
    arguments = ["--model", saved_model, "--domain", f"mine={source}", "--output", tmp_path / "file/new"]
    assert calibrate.main([str(each) for each in arguments]) == 2
    assert "is a file; choose another folder" in capsys.readouterr().err


def test_the_table_shows_each_half_of_the_images_with_the_fit_to_the_other_half():
    samples = [pixel_sample(row, temperature=0.5 if row < 4 else 2.5) for row in range(8)]
    samples += [pixel_sample(row, temperature=1.0)._replace(distortions=("haze",)) for row in range(8)]
    first, second = (
        fit_temperature([sample for sample in samples if (sample.row < 4) is part]) for part in (True, False)
    )
    rows = {
        line[:25].strip(): [float(cell) for cell in line[25:].split()]
        for line in calibrate.before_and_after(samples).splitlines()[1:-1]
    }
    for kind, part in (("undistorted", samples[:8]), ("distorted", samples[8:])):
        before, after = ConfidenceHistogram(4), ConfidenceHistogram(4)
        for sample in part:
            for histogram, temperature in ((before, None), (after, second if sample.row < 4 else first)):
                confidence = confidence_map(sample.scores, temperature)
                histogram.update(confidence, sample.scores.argmax(1), sample.labels)
        for title, histogram in (("uncalibrated", before), ("calibrated", after)):
            metrics = histogram.compute()
            expected = [100 * metrics["ece"], metrics["auroc"], metrics["aupr"], 100 * metrics["accuracy"]]
            assert rows[f"{kind}, {title}"] == pytest.approx(expected, abs=0.006)


def test_a_half_that_cannot_be_fitted_does_not_prevent_the_calibration(tmp_path, saved_model, capsys, monkeypatch):
    def unfit(samples):
        raise ValueError("all of 5 pixels are classified correctly")

    monkeypatch.setattr(calibrate, "before_and_after", unfit)
    source = write_dataset(tmp_path / "data/validation.parquet", mostly_right(3))
    arguments = ["--model", saved_model, "--domain", f"mine={source}", "--workers", 0, "--output", tmp_path / "new"]
    assert calibrate.main([str(each) for each in arguments]) == 0
    assert "not measured, since one half of the images cannot be fitted: all of 5" in capsys.readouterr().err
    assert json.loads((tmp_path / "new/config.json").read_text())["confidence_temperature"]


def test_a_copy_of_a_model_on_the_hub_is_complete(tmp_path, saved_model, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        return str(saved_model)

    monkeypatch.setattr("mfuser.scripts.evaluate.snapshot_download", download)
    source = write_dataset(tmp_path / "data/validation.parquet", mostly_right(3))
    arguments = ["--model", "me/mine", "--domain", f"mine={source}", "--workers", 0, "--output", tmp_path / "new"]
    assert calibrate.main([str(each) for each in arguments]) == 0
    assert asked == [None]  # all files, with code and tokenizer
