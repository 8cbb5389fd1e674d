"""Confidences are calibrated probabilities where a model was calibrated, and the figures about them are right."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score
from tiny_models import tiny_batch, tiny_config, tiny_model

from mfuser import MFuserConfig
from mfuser.class_names_mfuser import replace_classes
from mfuser.confidence_mfuser import SMALLEST_SCORE, confidence_map
from mfuser.evaluation.confidence import STEPS, ConfidenceHistogram

CALIBRATION = {"log_score": 0.5, "log_margin": 0.75, "bias": 1.25}
torch.set_num_threads(1)


# The confidence of the model


def test_without_calibration_the_confidence_is_the_share_of_the_best_class():
    scores = torch.tensor([0.6, 0.3, 0.0, 0.3]).view(1, 4, 1, 1).expand(2, 4, 3, 5)
    assert torch.allclose(confidence_map(scores), torch.full((2, 3, 5), 0.5))
    assert confidence_map(torch.zeros(1, 4, 2, 2)).eq(0).all()  # no score at all


def test_with_calibration_the_confidence_is_a_logistic_regression_on_best_score_and_margin():
    scores = torch.rand(2, 4, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top = np.sort(scores.numpy(), axis=1)[:, ::-1]
    logit = 0.5 * np.log(top[:, 0]) + 0.75 * np.log(top[:, 0] / top[:, 1]) + 1.25
    np.testing.assert_allclose(confidence_map(scores, CALIBRATION), 1 / (1 + np.exp(-logit)))
    one_class, nothing = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 4, 2, 2)
    margin = np.log(0.5 / SMALLEST_SCORE)
    expected = 1 / (1 + np.exp(-(0.5 * np.log(0.5) + 0.75 * margin + 1.25)))
    np.testing.assert_allclose(confidence_map(one_class, CALIBRATION), expected, rtol=1e-5)
    assert confidence_map(nothing, CALIBRATION).lt(0.01).all()


@pytest.mark.parametrize("size", [(64, 64), (70, 100)])
@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_the_model_returns_the_confidence_of_its_scores_by_crop_and_by_windows(size, calibration):
    model = tiny_model(confidence_calibration=calibration)
    pixel_values = tiny_batch(size)["pixel_values"]
    with torch.no_grad():
        outputs = model(pixel_values, output_confidence=True)
        plain = model(pixel_values)
        as_tuple = model(pixel_values, output_confidence=True, return_dict=False)
    assert outputs.confidence.shape == (2, *size)
    assert torch.equal(outputs["confidence"], confidence_map(outputs.logits, calibration))
    assert torch.equal(as_tuple[-1], outputs.confidence)
    assert plain.confidence is None and torch.equal(plain.logits, outputs.logits)


def test_the_configuration_keeps_the_calibration(tmp_path):
    tiny_config(confidence_calibration=CALIBRATION).save_pretrained(tmp_path)
    assert MFuserConfig.from_pretrained(tmp_path).confidence_calibration == CALIBRATION
    assert tiny_config().confidence_calibration is None


@pytest.mark.parametrize(
    "calibration",
    [{}, {"log_score": 1.0}, CALIBRATION | {"bias": float("nan")}, CALIBRATION | {"slope": 1.0}],
)
def test_an_invalid_calibration_is_refused(calibration):
    with pytest.raises(ValueError, match="one finite number for each of log_score, log_margin, bias"):
        tiny_config(confidence_calibration=calibration)


def test_other_classes_have_no_calibration():
    model = tiny_model("dinov2+siglip", confidence_calibration=CALIBRATION)
    model.mfuser.store_class_embeddings()
    replace_classes(model, ["road", "sky"])
    assert model.config.confidence_calibration is None


# The figures


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
