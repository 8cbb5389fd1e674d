"""A plain Trainer computes the same metrics as MFuserTrainer and does not collect scores."""

import re
from pathlib import Path

import pytest
import torch
from distributed_worker import Samples
from tiny_models import CLASSES, tiny_model
from transformers import EvalPrediction

from mfuser import MFuserImageProcessor
from mfuser.evaluation.metrics import MeanIoU
from mfuser.evaluation.trainer_metrics import ComputeMeanIoU, preprocess_logits_for_metrics
from mfuser.training.trainer import MFuserTrainer, MFuserTrainingArguments

GUIDE = Path(__file__).parents[1] / "docs" / "fine_tuning.md"


def test_label_maps_have_no_class_axis_and_the_size_of_the_labels():
    scores = torch.randn(2, 11, 45, 60, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, 90, 121, dtype=torch.int64)
    maps = preprocess_logits_for_metrics((scores, scores), labels)
    assert maps.shape == labels.shape and maps.dtype == torch.uint8
    for predicted, size in ((maps, (90, 121)), (preprocess_logits_for_metrics(scores, labels[:, :45, :60]), (45, 60))):
        expected = MFuserImageProcessor().post_process_semantic_segmentation(
            type("Output", (), {"logits": scores}), target_sizes=[size] * 2
        )
        assert torch.equal(predicted.long(), torch.stack(expected).long())


def test_an_image_of_camvid_takes_44_times_less_memory_while_it_is_counted():
    scores, labels = torch.zeros(1, 11, 360, 480), torch.zeros(1, 360, 480, dtype=torch.uint8)
    assert 60 * scores.nbytes == pytest.approx(435 * 2**20, rel=1e-3)
    assert preprocess_logits_for_metrics(scores, labels).nbytes == 172_800 == scores.nbytes / 44


def test_the_trainer_of_the_guide_equals_mfusers_and_gathers_no_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, samples = tiny_model(), Samples()
    snippet = re.search(r"<!-- example: plain_trainer -->\n```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    before = "metrics = trainer.evaluate()"
    assert before in snippet
    gathered, kept = [], []
    names = {"model": model, "validation_dataset": samples, "gathered": gathered, "kept": kept}
    record = (
        "gather = trainer.accelerator.gather_for_metrics\n"
        "trainer.gather_function = lambda values: gathered.append(values) or gather(values)\n"
        "loop = trainer.evaluation_loop\n"
        "trainer.evaluation_loop = lambda *args, **kwargs: kept.append(loop(*args, **kwargs)) or kept[-1]\n"
    )
    exec(snippet.replace(before, record + before), names)
    assert len(gathered) == 3 * len(samples)  # loss, label map and label of each image
    assert max(values.numel() for values in gathered) == 64 * 64  # without an axis of the four classes
    assert kept[0].predictions is None and kept[0].label_ids is None

    arguments = MFuserTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    expected = MFuserTrainer(model, arguments, eval_dataset=samples).evaluate()
    scores = [name for name in expected if "iou" in name or "accuracy" in name]
    assert len(scores) == 2 + len(CLASSES)
    assert {name: names["metrics"][name] for name in scores} == {name: expected[name] for name in scores}
    metric = MeanIoU(len(CLASSES))
    with torch.no_grad():
        for image, label in zip(samples.batch["pixel_values"], samples.batch["labels"], strict=True):
            metric.update(model(image[None]).logits.argmax(dim=1), label[None])
    assert names["metrics"]["eval_mean_iou"] == pytest.approx(metric.compute()["mean_iou"], rel=1e-6)


def test_batches_add_up_and_the_next_evaluation_starts_from_nothing():
    compute = ComputeMeanIoU(tiny_model().config)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        predicted, labels = torch.randint(0, len(CLASSES), (2, 6, 8, 9), generator=generator)
        whole = MeanIoU(len(CLASSES))
        whole.update(predicted, labels)
        assert compute(EvalPrediction(predicted[:4], labels[:4]), compute_result=False) == {}
        scores = compute(EvalPrediction(predicted[4:].numpy(), labels[4:].numpy()), compute_result=True)
        assert scores["mean_iou"] == whole.compute()["mean_iou"]
        assert scores["iou_sky"] == whole.compute()["per_category_iou"][1]
