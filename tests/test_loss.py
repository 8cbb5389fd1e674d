"""The training objective, beyond the comparison with the reference."""

import pytest
import torch
from tiny_models import CLASSES, tiny_batch, tiny_config, tiny_model
from torch.nn import functional as F

from mfuser.loss_mfuser import MFuserLoss, check_class_mask, sample_points


def objective(**fields) -> MFuserLoss:
    return MFuserLoss(tiny_config(**fields))


def predictions(num: int = 2, batch: int = 2, size: int = 16) -> dict[str, torch.Tensor]:
    classes = len(CLASSES)
    generator = torch.Generator().manual_seed(0)
    return {
        "class_logits": torch.randn(num, batch, classes, classes + 1, generator=generator),
        "mask_logits": torch.randn(num, batch, classes, size, size, generator=generator),
        "score_map": torch.rand(batch, classes, 4, 4, generator=generator) * 2 - 1,
    }


PREDICTIONS = predictions()


@pytest.mark.parametrize("labels", [torch.full((2, 64, 64), 255), torch.full((2, 64, 64), 2)])
def test_images_without_labels_or_with_one_class_give_finite_numbers_and_gradients(labels):
    model = tiny_model().train()
    outputs = model(tiny_batch()["pixel_values"], labels=labels)
    assert all(loss.isfinite() for loss in outputs.loss_components.values())
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_an_entirely_ignored_image_has_no_mask_loss():
    losses = objective()(**predictions(), labels=torch.full((2, 64, 64), 255))
    assert losses["mask_0"] == losses["dice_1"] == losses["score_map"] == 0
    assert losses["class_0"] > 0  # every query should predict "no object"


def test_ignored_pixels_are_background_in_every_mask_and_zero_in_the_mean_of_the_score_map():
    inputs = predictions()
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 32:] = 255
    criterion = objective(loss_score_map_weight=1.0)
    full = F.interpolate(inputs["score_map"] / 0.07, size=(64, 64), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(full, labels, ignore_index=255, reduction="sum") / labels.numel()
    torch.testing.assert_close(criterion.score_map_loss(inputs["score_map"], labels), expected)
    losses = []
    for ignored in (-50.0, 50.0):
        masks = torch.where(labels == 0, 50.0, ignored)[None, :, None].expand(1, -1, len(CLASSES), -1, -1)
        losses.append(criterion(inputs["class_logits"][:1], masks, inputs["score_map"], labels)["mask_0"])
    assert losses[0] < 0.2 * losses[1]


def test_the_label_that_is_ignored_is_the_configurations():
    inputs, labels = predictions(), torch.randint(0, 4, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    labels[:, :40] = 7
    losses = []
    for ignored in (7, 255, 1000):
        torch.manual_seed(0)
        masked = torch.where(labels == 7, ignored, labels)
        losses.append(objective(semantic_loss_ignore_index=ignored)(**inputs, labels=masked))
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(ValueError, match=r"labels hold \[7\]; .* from 0 to 3, or 255 for ignored pixels"):
        objective()(**inputs, labels=labels)


@pytest.mark.parametrize("with_class_mask", [False, True])
def test_the_host_does_not_wait_for_a_gpu(with_class_mask):
    """The meta device replaces a GPU: its tensors have no values, so any synchronisation fails."""
    with torch.device("meta"):
        with pytest.raises(RuntimeError):
            bool(torch.ones(()) > 0)
        inputs = {name: torch.empty(value.shape, requires_grad=True) for name, value in PREDICTIONS.items()}
        labels = torch.zeros(2, 64, 64, dtype=torch.long)
        class_mask = torch.ones(2, len(CLASSES), dtype=torch.bool) if with_class_mask else None
        losses = objective()(**inputs, labels=labels, class_mask=class_mask)
        sum(losses.values()).backward()
        assert inputs["mask_logits"].grad.is_meta


def test_wrong_labels_on_a_gpu_fail_an_assertion_there(monkeypatch):
    checked = []
    monkeypatch.setattr(torch, "_assert_async", lambda valid, problem: checked.append(problem))
    with torch.device("meta"):
        objective().validated(torch.zeros(2, 64, 64, dtype=torch.long), 2, 4)
        check_class_mask(*(torch.ones(2, 4, dtype=torch.bool) for _ in range(2)))
    assert [problem.split()[0] for problem in checked] == ["labels", "class_mask", "labels"]


def test_each_query_is_matched_to_its_own_class_if_the_image_holds_it():
    labels = torch.full((1, 8, 8), 255)
    labels[0, 0, :2] = torch.tensor([1, 3])
    logits = torch.full((1, 1, 4, 5), -20.0)
    for query, target in enumerate([4, 1, 4, 3]):  # "no object" is number 4
        logits[0, 0, query, target] = 20.0
    inputs = predictions(1, 1)
    losses = objective()(logits, inputs["mask_logits"], inputs["score_map"], labels)
    assert losses["class_0"] < 1e-6


def test_points_are_drawn_where_the_prediction_is_uncertain():
    torch.manual_seed(0)
    logits = torch.linspace(-9, 9, 64).expand(1, 64, 64)  # uncertain in the middle, more certain towards both sides
    points = objective(loss_num_points=400).draw_points(logits)
    assert points.shape == (1, 400, 2) and points.min() >= 0 and points.max() <= 1
    unsure, fresh = sample_points(logits, points)[0].abs().split([300, 100])
    assert unsure.max() < 3  # of 1,200 candidates the least sure 300: the quarter around the middle
    assert fresh.max() > 7 and abs(points[0, 300:, 0].mean().item() - 0.5) < 0.1


def test_points_outside_a_map_read_zero_and_cells_are_read_at_their_centres():
    maps = torch.arange(1.0, 5.0).view(1, 2, 2)
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [2.0, 0.5]]])
    torch.testing.assert_close(sample_points(maps, points), torch.tensor([[1.0, 2.0, 3.0, 2.5, 0.0]]))


def test_the_weights_of_the_losses_scale_them():
    labels = tiny_batch()["labels"]
    torch.manual_seed(0)
    plain = objective(loss_class_weight=1.0, loss_mask_weight=1.0, loss_dice_weight=1.0)(
        **predictions(), labels=labels
    )
    torch.manual_seed(0)
    weighted = objective(loss_class_weight=2.0, loss_mask_weight=3.0, loss_dice_weight=4.0, loss_score_map_weight=5.0)(
        **predictions(), labels=labels
    )
    for name, factor in (("class_0", 2), ("mask_1", 3), ("dice_0", 4), ("score_map", 5)):
        torch.testing.assert_close(weighted[name], factor * plain[name])


def test_siglips_scale_and_bias_replace_the_temperature():
    inputs, labels = predictions(), tiny_batch()["labels"]
    logits = inputs["score_map"] * torch.tensor(1.5).exp() - 2.0
    expected = F.cross_entropy(
        F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False),
        labels,
        ignore_index=255,
        reduction="none",
    ).mean()
    torch.testing.assert_close(objective(pair="dinov2+siglip").score_map_loss(inputs["score_map"], labels), expected)


def two_sources() -> dict[str, torch.Tensor]:
    """Labels of two images of different sources: the second labels neither class 2 nor class 3."""
    labels = torch.randint(0, 4, (2, 64, 64), generator=torch.Generator().manual_seed(1))
    labels[1] = torch.where(labels[1] < 2, labels[1], 255)
    return {"labels": labels, "class_mask": torch.tensor([[True] * 4, [True, True, False, False]])}


@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov2+siglip"])
def test_classes_that_a_source_does_not_label_have_no_loss_and_exactly_no_gradient(pair):
    criterion, inputs = objective(pair=pair), {name: x.requires_grad_() for name, x in predictions().items()}
    torch.manual_seed(0)
    losses = criterion(**inputs, **two_sources())
    gradients = torch.autograd.grad(sum(losses.values()), list(inputs.values()))
    classes, masks, scores = gradients
    assert classes[:, 1, 2:].eq(0).all() and classes[:, 1, :2, 2:4].eq(0).all()  # as queries, and as logits of others
    assert masks[:, 1, 2:].eq(0).all() and scores[1, 2:].eq(0).all()
    assert classes[:, 1, :2, [0, 1, 4]].ne(0).all() and masks[:, 1, :2].any() and scores[1, :2].any()
    assert classes[:, 0].ne(0).all() and scores[0].any(dim=(1, 2)).all()  # the first image labels all

    class_logits, mask_logits, score_map = inputs.values()
    unlabelled = (class_logits[:, 1, 2:], class_logits[:, 1, :, 2:4], mask_logits[:, 1, 2:], score_map[1, 2:])
    for logits in unlabelled:
        logits.data.add_(torch.randn_like(logits) * 100)
    torch.manual_seed(0)
    changed = criterion(**inputs, **two_sources())
    assert {name: value.item() for name, value in changed.items()} == {
        name: value.item() for name, value in losses.items()
    }


def test_a_query_without_label_leaves_the_denominator_of_the_class_loss():
    inputs = predictions(1, 2)
    labels, labelled = two_sources().values()
    loss = objective(loss_class_weight=1.0)(**inputs, labels=labels, class_mask=labelled)["class_0"]
    total, weights = 0.0, 0.0
    for image, answers in ((0, [0, 1, 2, 3, 4]), (1, [0, 1, 4])):  # the fifth is "no object"
        for query in answers[:-1]:  # every labelled class is present
            logits = inputs["class_logits"][0, image, query, answers]
            total -= logits.log_softmax(0)[answers.index(query)].item()
            weights += 1
    assert weights == 6 and loss.item() == pytest.approx(total / weights, rel=1e-5)


def test_with_all_classes_labelled_the_losses_are_bit_identical_to_those_without_the_argument():
    batch, results = tiny_batch(), []
    for labelled in (None, torch.ones(2, 4, dtype=torch.bool)):
        inputs = {name: x.requires_grad_() for name, x in predictions().items()}
        torch.manual_seed(0)
        losses = objective()(**inputs, labels=batch["labels"], class_mask=labelled)
        gradients = torch.autograd.grad(sum(losses.values()), list(inputs.values()))
        results.append([*losses.values(), *gradients])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("size", [(64, 64), (64, 100)])  # the second is segmented by windows
def test_the_model_passes_labelled_classes_to_the_loss_of_crops_and_of_windows(size):
    model, batch = tiny_model(), tiny_batch(size)
    batch["labels"][1] = torch.where(batch["labels"][1] < 2, batch["labels"][1], 255)
    torch.manual_seed(0)
    everything = model(**batch).loss_components
    torch.manual_seed(0)
    masked = model(**batch, class_mask=two_sources()["class_mask"]).loss_components
    assert everything["class_0"] != masked["class_0"] and everything["score_map"] != masked["score_map"]
    assert everything["mask_0"] == masked["mask_0"]  # an absent class has no mask loss either


@pytest.mark.parametrize(
    ("labelled", "message"),
    [
        (torch.ones(2, 3, dtype=torch.bool), r"shape \(2, 3\) .*; it must be booleans of shape \(2, 4\)"),
        (torch.ones(2, 4), r"dtype torch.float32; it must be booleans"),
        (torch.tensor([[True] * 4, [False] * 4]), "leaves an image of the batch without classes"),
        (torch.tensor([[True, True, True, False], [True] * 4]), "labels of image 0 hold class 3, which .* exclude"),
    ],
)
def test_labelled_classes_that_do_not_fit_the_labels_are_refused(labelled, message):
    with pytest.raises(ValueError, match=message):
        objective()(**predictions(), labels=two_sources()["labels"], class_mask=labelled)
