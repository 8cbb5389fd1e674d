"""Scores equal independent definitions and need constant memory. test_training.py covers several processes."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from mfuser.evaluation.metrics import MeanIoU

ROOT = Path(__file__).resolve().parent.parent


def random_maps(seed, num_classes, shape, present=None, ignored=0.2, wrong=0.3):
    """A label map with ignored pixels that holds only the classes `present`, and a prediction of it."""
    rng = np.random.default_rng(seed)
    label = rng.choice(num_classes if present is None else list(present), size=shape).astype(np.uint8)
    mistakes = rng.random(shape) < wrong
    prediction = np.where(mistakes, rng.integers(0, num_classes, shape), label).astype(np.uint8)
    return prediction, np.where(rng.random(shape) < ignored, 255, label).astype(np.uint8)


def published_mean_iou(predictions, labels, num_labels, ignore_index):
    """The definition of evaluate's mean_iou (after MMSegmentation): three histograms per map, then nanmean."""
    areas = np.zeros((3, num_labels))
    for prediction, label in zip(predictions, labels, strict=True):
        valid = label != ignore_index
        prediction, label = prediction[valid], label[valid]
        for row, values in enumerate((prediction[prediction == label], prediction, label)):
            areas[row] += np.histogram(values, bins=num_labels, range=(0, num_labels - 1))[0]
    correct, predicted, labelled = areas
    with np.errstate(invalid="ignore"):
        iou, accuracy = correct / (predicted + labelled - correct), correct / labelled
    return {
        "mean_iou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "overall_accuracy": correct.sum() / labelled.sum(),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("num_classes", [2, 19, 150])
def test_equals_scikit_learn_with_ignored_pixels_and_absent_classes(num_classes, dtype):
    present = range(0, num_classes - 1, 2)
    prediction, label = random_maps(0, num_classes, (3, 61, 97), present)
    prediction[prediction == num_classes - 1] = 0  # in neither the predictions nor the labels
    metric = MeanIoU(num_classes)
    metric.update(prediction.astype(dtype), label.astype(dtype))
    scores = metric.compute()

    valid = label != 255
    expected = confusion_matrix(label[valid], prediction[valid], labels=range(num_classes))
    np.testing.assert_array_equal(metric.matrix[:, :num_classes].numpy(), expected)
    union = expected.sum(0) + expected.sum(1) - expected.diagonal()
    iou = np.array([expected[c, c] / union[c] if union[c] else np.nan for c in range(num_classes)])
    np.testing.assert_allclose(scores["per_category_iou"], iou, rtol=1e-14)
    assert np.isnan(scores["per_category_iou"][-1]) and num_classes - 1 not in scores["classes_averaged"]
    assert scores["mean_iou"] == pytest.approx(np.mean([iou[c] for c in scores["classes_averaged"]]), rel=1e-14)
    assert scores["overall_accuracy"] == pytest.approx((prediction == label)[valid].mean(), rel=1e-14)


@pytest.mark.parametrize("ignore_index", [255, 254, -100])
def test_equals_the_published_definition_of_evaluates_mean_iou(ignore_index):
    maps = [random_maps(seed, 19, (40 + seed, 64), present=range(15)) for seed in range(4)]
    predictions = [prediction.astype(np.int64) for prediction, _ in maps]
    labels = [np.where(label == 255, ignore_index, label.astype(np.int64)) for _, label in maps]
    metric = MeanIoU(19, ignore_index)
    for prediction, label in zip(predictions, labels, strict=True):
        metric.update(prediction, label)
    scores = metric.compute()
    for name, value in published_mean_iou(predictions, labels, 19, ignore_index).items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-14, err_msg=name)


@pytest.mark.parametrize("stray", [19, 254, 255, 300, -1])
def test_a_prediction_outside_the_classes_is_an_error(stray):
    prediction, label = (values.astype(np.int64) for values in random_maps(0, 19, (32, 32)))
    prediction[:8] = stray
    metric = MeanIoU(19)
    metric.update(prediction, label)
    expected = published_mean_iou([prediction], [label], 19, 255)
    np.testing.assert_allclose(metric.compute()["per_category_iou"], expected["per_category_iou"], rtol=1e-14)


def test_maps_of_any_sizes_and_batches_add_up_to_the_same_matrix():
    prediction, label = random_maps(0, 19, (6, 300, 301))
    whole, pieces, other = MeanIoU(19), MeanIoU(19), MeanIoU(19)
    whole.update(prediction, label)
    for row in range(0, 300, 7):
        (pieces if row % 2 else other).update(
            torch.from_numpy(prediction[:, row : row + 7]).long(), torch.from_numpy(label[:, row : row + 7])
        )
    pieces.merge(other)
    assert torch.equal(whole.matrix, pieces.matrix)


def test_a_map_larger_than_a_chunk_is_counted_whole():
    prediction, label = random_maps(0, 19, (1024, 1031))
    metric = MeanIoU(19)
    metric.update(prediction, label)
    codes = label[label != 255].astype(np.int64) * 20 + prediction[label != 255]
    np.testing.assert_array_equal(metric.matrix.flatten().numpy(), np.bincount(codes, minlength=380))


def test_the_mean_can_be_restricted_to_classes():
    synthia = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18]
    prediction, label = random_maps(0, 19, (64, 64))
    metric = MeanIoU(19)
    metric.update(prediction, label)
    every, subset = metric.compute(), metric.compute(classes=synthia)
    np.testing.assert_array_equal(every["per_category_iou"], subset["per_category_iou"])
    assert subset["mean_iou"] == pytest.approx(every["per_category_iou"][synthia].mean(), rel=1e-14)
    counted = np.isin(label, synthia)
    assert subset["overall_accuracy"] == pytest.approx((prediction == label)[counted].mean(), rel=1e-14)
    assert subset["classes_averaged"] == synthia


def test_memory_does_not_grow_with_the_maps():
    metric = MeanIoU(19)
    size = metric.matrix.nbytes
    references = []
    for seed in range(8):
        prediction, label = (torch.from_numpy(values) for values in random_maps(seed, 19, (64, 64)))
        references += [weakref.ref(prediction), weakref.ref(label)]
        metric.update(prediction, label)
    del prediction, label
    assert metric.matrix.nbytes == size
    assert all(reference() is None for reference in references)


def test_bad_input_is_named():
    metric = MeanIoU(19)
    zeros = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="argmax"):
        metric.update(torch.zeros(1, 19, 4, 4), zeros[None])
    with pytest.raises(ValueError, match="resize the scores"):
        metric.update(zeros, zeros[:2])
    for dtype in (np.uint8, np.int64):
        with pytest.raises(ValueError, match=r"\[19, 34\]"):
            metric.update(zeros, np.array([[19, 34, 0, 255]] * 4, dtype))
    with pytest.raises(ValueError, match=r"\[-1\]"):
        metric.update(zeros, zeros.astype(np.int64) - 1)
    assert not metric.matrix.any()  # refused maps are not counted
    with pytest.raises(ValueError, match="no labelled pixel"):
        metric.compute()
    metric.update(zeros, zeros)
    with pytest.raises(ValueError, match="distinct ids"):
        metric.compute(classes=[0, 19])
    with pytest.raises(ValueError, match="the other metric has 16 classes"):
        metric.merge(MeanIoU(16))
    with pytest.raises(ValueError, match="one of the 19 class ids"):
        MeanIoU(19, ignore_index=0)


def test_loads_through_evaluate_offline_and_streams(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    from evaluate import loading

    module_cache = loading.init_dynamic_modules(hf_modules_cache=str(tmp_path / "modules"))
    monkeypatch.setattr(loading, "init_dynamic_modules", lambda *_: module_cache)
    script = str(ROOT / "evaluation" / "domain_mean_iou.py")
    ours = evaluate.load(script, num_labels=19, cache_dir=str(tmp_path))

    smooth = np.kron(np.random.default_rng(0).integers(0, 19, (2, 16, 32)), np.ones((64, 64), int))
    noise, _ = random_maps(1, 19, smooth.shape)
    predictions = np.where(noise > 15, noise, smooth).astype(np.uint8)
    references = smooth.astype(np.uint8)
    references[:, :50] = 255

    expected = published_mean_iou(predictions, references, num_labels=19, ignore_index=255)
    scores = ours.compute(predictions=predictions, references=references)
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-14, err_msg=name)

    ours.add(prediction=predictions[0], reference=references[0])
    ours.add_batch(predictions=torch.from_numpy(predictions[1:]), references=[references[1]])
    assert ours.compute()["mean_iou"] == scores["mean_iou"]
    with pytest.raises(ValueError, match="no labelled pixel"):
        ours.compute()  # computing resets the counts
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        ours.add_batch(predictions=predictions, references=references[:1])
    with pytest.raises(ValueError, match="num_process is 2; DomainMeanIou runs in one process"):
        evaluate.load(script, num_process=2, cache_dir=str(tmp_path))
