"""The confidences of a calibrated model are calibrated probabilities, and their metrics are correct."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import torch
from colour_scorer import pixels_and_labels, run_evaluate, write_dataset
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score
from tiny_models import tiny_batch, tiny_config, tiny_model

from mfuser import MFuserConfig, MFuserImageProcessor
from mfuser.class_names_mfuser import replace_classes
from mfuser.confidence_mfuser import confidence_map
from mfuser.evaluation import reliability_diagram
from mfuser.evaluation.confidence import STEPS, ConfidenceHistogram, DomainConfidence
from mfuser.evaluation.domains import open_domain
from mfuser.evaluation.protocols import EvaluationOptions, Sample
from mfuser.evaluation.scoring import evaluate_domain
from mfuser.scripts import evaluate, segment

TEMPERATURE = 1.6


pytestmark = pytest.mark.usefixtures("datasets_cache")


# The confidence of the model


def test_without_calibration_the_confidence_is_the_share_of_the_best_class():
    scores = torch.tensor([0.6, 0.3, 0.0, 0.3]).view(1, 4, 1, 1).expand(2, 4, 3, 5)
    assert torch.allclose(confidence_map(scores), torch.full((2, 3, 5), 0.5))
    assert torch.equal(confidence_map(scores), confidence_map(scores, 1.0))


@pytest.mark.parametrize("temperature", [0.02, 0.5, 1.6, 50.0])
def test_the_confidence_is_the_softmax_of_the_log_scores_at_the_temperature(temperature):
    scores = torch.rand(2, 4, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = scipy.special.softmax(np.log(scores.numpy()) / temperature, axis=1).max(axis=1)
    np.testing.assert_allclose(confidence_map(scores, temperature), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_that_are_all_equal_or_zero_have_the_confidence_of_chance(dtype):
    for scores in (torch.zeros(1, 4, 2, 2, dtype=dtype), torch.full((1, 4, 2, 2), 0.5, dtype=dtype)):
        assert confidence_map(scores, 1.6).eq(0.25).all()
    assert confidence_map(torch.full((1, 1, 2, 2), 0.5, dtype=dtype), 1.6).eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("best", [0, 149])
def test_small_scores_of_many_classes_count_in_half_precision(dtype, best):
    scores = torch.full((1, 150, 2, 2), 0.003)
    scores[:, best] = 1
    assert torch.allclose(confidence_map(scores.to(dtype)), confidence_map(scores), atol=2e-3)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        confidence_map(torch.rand(1, 4, 2, 2), temperature)


@pytest.mark.parametrize("size", [(64, 64), (70, 100)])
@pytest.mark.parametrize("temperature", [None, TEMPERATURE])
def test_the_model_returns_the_confidence_of_its_scores_by_crop_and_by_windows(size, temperature):
    model = tiny_model(confidence_temperature=temperature)
    pixel_values = tiny_batch(size)["pixel_values"]
    with torch.no_grad():
        outputs = model(pixel_values, output_confidence=True)
        plain = model(pixel_values)
        as_tuple = model(pixel_values, output_confidence=True, return_dict=False)
    assert outputs.confidence.shape == (2, *size)
    assert torch.equal(outputs["confidence"], confidence_map(outputs.logits, temperature))
    assert torch.equal(as_tuple[-1], outputs.confidence)
    assert plain.confidence is None and torch.equal(plain.logits, outputs.logits)


def test_the_configuration_keeps_the_calibration(tmp_path):
    tiny_config(confidence_temperature=TEMPERATURE).save_pretrained(tmp_path)
    assert MFuserConfig.from_pretrained(tmp_path).confidence_temperature == TEMPERATURE
    assert tiny_config().confidence_temperature is None


@pytest.mark.parametrize("temperature", [0, -1.5, float("nan"), float("inf")])
def test_an_invalid_calibration_is_refused(temperature):
    with pytest.raises(ValueError, match=f"confidence_temperature is {temperature}; it must be"):
        tiny_config(confidence_temperature=temperature)


@pytest.mark.parametrize("temperature", ["hot", {"temperature": 1.6}])
def test_a_calibration_of_another_type_is_refused(temperature):
    with pytest.raises(StrictDataclassFieldValidationError, match="confidence_temperature"):
        tiny_config(confidence_temperature=temperature)


def test_a_calibration_of_another_version_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"confidence_calibration": {"bias": 1.0}}))
    with pytest.raises(ValueError, match="confidence_calibration"):
        MFuserConfig.from_pretrained(tmp_path)


def test_other_classes_have_no_calibration():
    model = tiny_model("dinov2+siglip", confidence_temperature=TEMPERATURE)
    model.mfuser.store_class_embeddings()
    replace_classes(model, ["road", "sky"])
    assert model.config.confidence_temperature is None


# The metrics


def random_pixels(pixels=5000, classes=5, seed=0):
    """Confidences in whole steps, so that ties of the histogram are ties of the reference, and labels they predict."""
    rng = np.random.default_rng(seed)
    confidence = (rng.beta(3, 1.5, pixels) * STEPS).astype(int).clip(max=STEPS - 1)
    confidence = (confidence + 0.5) / STEPS
    prediction = rng.integers(0, classes, pixels)
    right = rng.random(pixels) < confidence**1.5
    label = np.where(right, prediction, (prediction + rng.integers(1, classes, pixels)) % classes)
    label[rng.random(pixels) < 0.1] = 255
    return confidence, prediction, label


def histogram_of(confidence, prediction, label, classes=5):
    histogram = ConfidenceHistogram(classes)
    histogram.update(*(torch.from_numpy(np.asarray(values)) for values in (confidence, prediction, label)))
    return histogram


def test_the_figures_equal_an_independent_computation():
    confidence, prediction, label = random_pixels()
    figures = histogram_of(confidence, prediction, label).compute()
    known = label != 255
    confidence, prediction, label = confidence[known], prediction[known], label[known]
    wrong = prediction != label
    assert figures["auroc"] == pytest.approx(roc_auc_score(wrong, -confidence))
    assert figures["aupr"] == pytest.approx(average_precision_score(wrong, -confidence))
    assert figures["accuracy"] == pytest.approx(1 - wrong.mean())
    assert figures["mean_confidence"] == pytest.approx(confidence.mean())

    ece, bins = 0, np.floor(confidence * 15).astype(int)
    for index in range(15):
        inside = bins == index
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - 1 + wrong[inside].mean())
    assert figures["ece"] == pytest.approx(ece)
    assert 0.03 < ece < 0.3
    assert sum(each["pixels"] for each in figures["reliability"]) == len(label)

    for at, share in zip(figures["coverage"], (1.0, 0.9, 0.8), strict=True):
        kept = confidence >= at["threshold"]
        assert share <= kept.mean() < share + 0.01 and at["coverage"] == pytest.approx(kept.mean())
        matrix = confusion_matrix(label[kept], prediction[kept], labels=range(5))
        iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
        assert at["mean_iou"] == pytest.approx(iou.mean()) and at["classes"] == 5
        assert at["accuracy"] == pytest.approx(1 - wrong[kept].mean())


def test_the_mean_iou_at_a_coverage_is_over_the_requested_classes_that_occur():
    confidence, prediction, label = random_pixels(classes=4)
    figures = histogram_of(confidence, prediction, label).compute([0, 2, 4])
    known = label != 255
    matrix = confusion_matrix(label[known], prediction[known], labels=range(4))
    iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    at = figures["coverage"][0]
    assert at["coverage"] == 1 and at["classes"] == 2 and at["mean_iou"] == pytest.approx((iou[0] + iou[2]) / 2)


def test_areas_are_undefined_where_nothing_is_wrong_or_right():
    label = np.zeros(10, dtype=int)
    figures = histogram_of(np.linspace(0, 1, 10), label, label).compute()
    assert figures["auroc"] is None and figures["aupr"] is None
    assert histogram_of(np.linspace(0, 1, 10), label + 1, label).compute()["auroc"] is None
    with pytest.raises(ValueError, match="no labelled pixel"):
        histogram_of(np.ones(3), np.zeros(3, dtype=int), np.full(3, 255)).compute()


def test_counts_of_parts_add_up():
    pixels = random_pixels()
    whole, parts = histogram_of(*pixels), histogram_of(*(values[:1000] for values in pixels))
    parts.merge(histogram_of(*(values[1000:] for values in pixels)))
    assert torch.equal(parts.counts, whole.counts)
    halves = SimpleNamespace(reduce=lambda counts, reduction: counts * 2)
    assert torch.equal(whole.reduce(halves).counts, 2 * whole.counts)


@pytest.mark.parametrize("confidence", [[0.5, float("nan")], [0.5, 1.5], [-0.1, 0.5]])
def test_confidences_outside_0_to_1_are_refused(confidence):
    with pytest.raises(ValueError, match=r"outside \[0, 1\] or NaN"):
        histogram_of(confidence, np.zeros(2, dtype=int), np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="they must be equal"):
        histogram_of([0.5], np.zeros(2, dtype=int), np.zeros(2, dtype=int))


# The image processor and mfuser segment


def segmented(processor, sizes=((40, 52), (48, 64)), **call):
    """A model's outputs for images of two sizes, padded, and what the processor returned for them."""
    model = tiny_model(confidence_temperature=TEMPERATURE)
    rng = np.random.default_rng(0)
    inputs = processor([rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes], return_tensors="pt")
    with torch.no_grad():
        return model(inputs["pixel_values"], **call), inputs


def test_the_processor_returns_confidences_without_padding_at_the_target_size():
    processor = MFuserImageProcessor()
    outputs, inputs = segmented(processor, output_confidence=True)
    plain = processor.post_process_semantic_segmentation(outputs, inputs=inputs)
    results = processor.post_process_semantic_segmentation(outputs, inputs=inputs, return_confidence=True)
    for index, ((height, width), label_map, result) in enumerate(
        zip(((40, 52), (48, 64)), plain, results, strict=True)
    ):
        assert torch.equal(result["segmentation"], label_map) and label_map.dtype == torch.int64
        assert torch.equal(result["confidence"], outputs.confidence[index, :height, :width])
    sizes = [(80, 104), (48, 64)]
    results = processor.post_process_semantic_segmentation(
        outputs, sizes, input_sizes=inputs.input_sizes, return_confidence=True, return_segmentation_scores=True
    )
    assert [result["confidence"].shape for result in results] == sizes
    assert [result["segmentation_scores"].shape for result in results] == [(4, *size) for size in sizes]


def test_pixels_below_the_threshold_are_unknown():
    processor = MFuserImageProcessor()
    outputs, inputs = segmented(processor, output_confidence=True)
    plain = processor.post_process_semantic_segmentation(outputs, inputs=inputs)
    for index, expected in enumerate(plain):
        confidence = outputs.confidence[index, : expected.shape[0], : expected.shape[1]]
        threshold = confidence.median().item()
        marked = processor.post_process_semantic_segmentation(outputs, inputs=inputs, unknown_threshold=threshold)
        label_map, unknown = marked[index], confidence < threshold
        assert 0 < unknown.float().mean() < 1
        assert label_map[unknown].eq(255).all() and torch.equal(label_map[~unknown], expected[~unknown])
    nothing = processor.post_process_semantic_segmentation(outputs, inputs=inputs, unknown_threshold=0)
    assert all(torch.equal(*maps) for maps in zip(nothing, plain, strict=True))


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_an_invalid_threshold_is_refused(threshold, capsys):
    outputs, inputs = segmented(MFuserImageProcessor(), output_confidence=True)
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        MFuserImageProcessor().post_process_semantic_segmentation(outputs, inputs=inputs, unknown_threshold=threshold)
    with pytest.raises(SystemExit):
        segment.main(["street.png", f"--unknown-threshold={threshold}"])
    assert "must be a number between 0 and 1" in capsys.readouterr().err


def test_confidences_must_be_requested_from_the_model():
    outputs, inputs = segmented(MFuserImageProcessor())
    for arguments in ({"return_confidence": True}, {"unknown_threshold": 0.5}):
        with pytest.raises(ValueError, match="output_confidence=True"):
            MFuserImageProcessor().post_process_semantic_segmentation(outputs, inputs=inputs, **arguments)


def test_label_255_must_not_be_a_class():
    outputs = SimpleNamespace(logits=torch.rand(1, 256, 2, 2), confidence=torch.rand(1, 2, 2))
    with pytest.raises(ValueError, match="it can have at most 255"):
        MFuserImageProcessor().post_process_semantic_segmentation(outputs, unknown_threshold=0.5)


def test_segment_writes_confidences_and_unknown_pixels(tmp_path, saved_model, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    processor = MFuserImageProcessor()
    inputs = processor(pixels, return_tensors="pt")
    with torch.no_grad():
        outputs = tiny_model()(inputs["pixel_values"], output_confidence=True)
    confidence = outputs.confidence[0].numpy()
    threshold = float(np.median(confidence))
    arguments = [str(tmp_path / "street.png"), "--model", str(saved_model), "--device", "cpu", "--output"]
    assert segment.main([*arguments, str(tmp_path / "a"), "--confidence"]) == 0
    assert segment.main([*arguments, str(tmp_path / "b"), f"--unknown-threshold={threshold}", "--alpha=1"]) == 0
    assert segment.main([*arguments, str(tmp_path / "c")]) == 0
    written = np.asarray(Image.open(tmp_path / "a/street_confidence.png"))
    assert written.dtype == np.uint8 and abs(written / 255 - confidence).max() < 0.5 / 255 + 1e-4
    assert not (tmp_path / "b/street_confidence.png").exists()
    plain, kept, marked = (np.asarray(Image.open(tmp_path / f"{each}/street_labels.png")) for each in "cab")
    np.testing.assert_array_equal(kept, plain)
    unknown = marked == 255
    assert abs(unknown.mean() - (confidence < threshold).mean()) < 1e-3
    np.testing.assert_array_equal(marked[~unknown], plain[~unknown])
    assert np.asarray(Image.open(tmp_path / "b/street_labels.png").convert("RGB"))[unknown].max() == 0
    assert json.loads((tmp_path / "b/legend.json").read_text())["255"] == {"name": "unknown", "colour": [0, 0, 0]}
    assert re.search(rf"^unknown +{100 * unknown.mean():.2f} %$", capsys.readouterr().out, flags=re.MULTILINE)


# mfuser evaluate


def test_evaluation_measures_the_confidences_of_the_model(tmp_path):
    rows = list(pixels_and_labels(3, sizes=((64, 80),)))
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", rows, ["fog", "fog", "rain"]))
    model, processor = tiny_model(confidence_temperature=TEMPERATURE), MFuserImageProcessor()
    plain = evaluate_domain(model, processor, domain, progress=False)
    result = evaluate_domain(
        model, processor, domain, EvaluationOptions(batch_size=2), progress=False, confidence=True
    )
    figures = result.pop("confidence")
    assert result == plain
    expected = {"uncalibrated": ConfidenceHistogram(4), "calibrated": ConfidenceHistogram(4)}
    for image, label in rows:
        scores = model(**processor(image, return_tensors="pt")).logits
        for name, temperature in (("uncalibrated", None), ("calibrated", TEMPERATURE)):
            confidence = confidence_map(scores, temperature)
            expected[name].update(confidence, scores.argmax(1), torch.from_numpy(label)[None])
    for name, histogram in expected.items():
        assert figures[name]["pooled"]["ece"] == pytest.approx(histogram.compute()["ece"], abs=1e-3)
        assert figures[name]["pooled"]["coverage"][0]["mean_iou"] == plain["pooled"]["mean_iou"]
        assert list(figures[name]["conditions"]) == ["fog", "rain"]
        pixels = [
            sum(each["pixels"] for each in scores["reliability"]) for scores in figures[name]["conditions"].values()
        ]
        assert pixels == [
            (np.stack([label for _, label in rows[part]]) != 255).sum() for part in (slice(2), slice(2, 3))
        ]
    assert figures["calibrated"]["pooled"]["ece"] != figures["uncalibrated"]["pooled"]["ece"]


def test_confidences_are_resized_to_the_size_of_the_label():
    domain = SimpleNamespace(
        rows=SimpleNamespace(conditions=[None]), conditions=[None], id2label=dict.fromkeys(range(4))
    )
    confidences = DomainConfidence(domain, tiny_model())
    scores = torch.rand(4, 6, 8, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(12, 24, dtype=torch.uint8)
    confidences.update(Sample(0, torch.empty(0), label, (12, 24), None), scores, label)
    expected = torch.nn.functional.interpolate(confidence_map(scores[None])[None], (12, 24), mode="bilinear")
    figures = confidences.result([0])["uncalibrated"]["pooled"]
    assert figures["mean_confidence"] == pytest.approx(expected.mean().item(), abs=1e-3)


def test_confidences_are_not_measured_with_test_time_augmentation(tmp_path):
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", pixels_and_labels(1)))
    with pytest.raises(ValueError, match="without test-time augmentation"):
        evaluate_domain(tiny_model(), MFuserImageProcessor(), domain, EvaluationOptions(flip=True), confidence=True)


def test_the_command_reports_confidences_and_draws_them(tmp_path, saved_model, capsys):
    source = write_dataset(tmp_path / "data/validation.parquet", pixels_and_labels(2))
    output, diagrams = tmp_path / "report.json", tmp_path / "diagrams"
    arguments = ["--model", saved_model, "--domains", f"mine:validation={source.parent}", "--output", output]
    arguments += ["--workers", 0, "--device", "cpu"]
    assert evaluate.main([str(each) for each in (*arguments, "--reliability-diagrams", diagrams)]) == 0
    report = json.loads(output.read_text())
    assert report["model"]["confidence_temperature"] is None
    figures = report["domains"]["mine:validation"]["confidence"]
    assert list(figures) == ["uncalibrated"]
    printed = next(line for line in capsys.readouterr().out.splitlines() if "uncalibrated" in line)
    expected = [figures["uncalibrated"]["pooled"][name] for name in ("ece", "auroc", "aupr")]
    expected += [at["mean_iou"] for at in figures["uncalibrated"]["pooled"]["coverage"]]
    assert printed.split()[2:] == [f"{100 * value:.2f}" for value in expected]
    with Image.open(diagrams / "mine-validation.png") as image:
        assert image.format == "PNG" and min(image.size) > 200
    assert evaluate.main([str(each) for each in (*arguments, "--confidence", "--flip")]) == 2
    assert "without test-time augmentation" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_exactly_the_figures_of_one(tmp_path, saved_model):
    rows = list(pixels_and_labels(5))
    source = write_dataset(tmp_path / "data/validation.parquet", rows, ["fog", "fog", "snow", "snow", "rain"])
    for number in (1, 2):
        arguments = "--model", saved_model, "--domains", f"mine={source}", "--output", tmp_path / f"{number}.json"
        finished = run_evaluate(number, tmp_path / "cache", *arguments, "--workers=0", "--confidence")
        assert finished.returncode == 0, finished.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2))
    assert (one["run"]["processes"], two["run"]["processes"]) == (1, 2)
    assert one["domains"]["mine"]["confidence"] == two["domains"]["mine"]["confidence"]


def test_missing_matplotlib_is_reported_before_the_evaluation(tmp_path, saved_model, capsys, monkeypatch):
    monkeypatch.setattr(reliability_diagram, "matplotlib_figure", None)
    monkeypatch.setattr(evaluate, "evaluate_domain", lambda *_, **__: pytest.fail("segmented"))
    source = write_dataset(tmp_path / "validation.parquet", pixels_and_labels(1))
    arguments = ["--model", saved_model, "--domains", f"mine={source}", "--reliability-diagrams", tmp_path]
    assert evaluate.main(list(map(str, arguments))) == 2
    assert 'pip install "mfuser[report]"' in capsys.readouterr().err
