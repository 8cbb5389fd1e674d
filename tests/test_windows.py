"""Images larger than a crop: positions of the windows, averaging of scores and losses, and augmentation."""

from itertools import product

import pytest
import torch
from by_hand import bilinear, segmentation_scores
from tiny_models import CLASSES, PAIRS, tiny_batch, tiny_model

# Where the windows of an 88 x 130 image begin at crop 64 and stride 42: the last ones are shifted back inside.
TOPS, LEFTS = (0, 24), (0, 42, 66)


def window(top: int, left: int, height: int = 64, width: int = 64) -> tuple:
    return ..., slice(top, top + height), slice(left, left + width)


class Crops:
    """Records the position of each crop that the model computes, read from an image of coordinates."""

    def __init__(self, model):
        self.places = []
        model.mfuser.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs):
        for crop in args[0]:
            top, left = crop[:2, 0, 0].tolist()
            assert torch.equal(crop[0, :, 0], torch.arange(top, top + crop.shape[1]))
            assert torch.equal(crop[1, 0], torch.arange(left, left + crop.shape[2]))
            self.places.append((top, left, *crop.shape[1:]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "stride", "tops", "lefts"),
    [
        ((64, 64), 42, [0], [0]),
        ((16, 65), 42, [0], [0, 1]),
        ((64, 106), 42, [0], [0, 42]),
        ((107, 40), 42, [0, 42, 43], [0]),
        ((88, 130), 42, [0, 24], [0, 42, 66]),
        ((128, 64), 64, [0, 64], [0]),
        ((64, 129), 64, [0], [0, 64, 65]),
        # the published 512 and 341 on 1024 pixels, eight times smaller
        ((64, 128), 43, [0], [0, 43, 64]),
        ((70, 66), 1, [0, 1, 2, 3, 4, 5, 6], [0, 1, 2]),
    ],
)
def test_windows_begin_every_stride_and_the_last_is_shifted_back_inside(size, stride, tops, lefts):
    model = tiny_model(crop_stride=stride, decoder_pixel_layers=1, decoder_num_layers=1)
    coordinates = torch.zeros(1, 3, *size)
    coordinates[:, 0] = torch.arange(size[0])[:, None]
    coordinates[:, 1] = torch.arange(size[1])
    crops = Crops(model)
    assert model(coordinates).logits.shape == (1, len(CLASSES), *size)
    crop = min(size[0], 64), min(size[1], 64)
    assert crops.places == [(top, left, *crop) for top, left in product(tops, lefts)]


@torch.no_grad()
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not pair.startswith("patch 14")])
def test_large_images_are_the_average_of_their_windows(pair):
    model = tiny_model(pair)
    pixel_values = tiny_batch((88, 130))["pixel_values"]
    total, counts = torch.zeros(2, len(CLASSES), 88, 130), torch.zeros(88, 130)
    for top, left in product(TOPS, LEFTS):
        total[window(top, left)] += model(pixel_values[window(top, left)]).logits
        counts[window(top, left)] += 1
    torch.testing.assert_close(model(pixel_values).logits, total / counts, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 130), (130, 48)])
def test_an_image_with_one_long_side_is_cut_along_it_alone(size):
    model, pixel_values = tiny_model(), tiny_batch(size)["pixel_values"]
    total, counts = torch.zeros(2, len(CLASSES), *size), torch.zeros(size)
    for start in LEFTS:
        place = window(0, start, 48, 64) if size[0] < size[1] else window(start, 0, 64, 48)
        total[place] += model(pixel_values[place]).logits
        counts[place] += 1
    torch.testing.assert_close(model(pixel_values).logits, total / counts, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_in_training_an_image_is_one_crop_whatever_its_size():
    model, crops = tiny_model().train(), []
    model.mfuser.register_forward_pre_hook(lambda module, args: crops.append(tuple(args[0].shape)))
    model(tiny_batch((88, 130))["pixel_values"])
    assert crops == [(2, 3, 88, 130)]


@torch.no_grad()
def test_the_loss_of_a_large_image_is_the_mean_over_its_windows():
    model, batch = tiny_model(), tiny_batch((88, 130))
    torch.manual_seed(3)  # of the points that the mask losses are sampled at
    outputs = model(**batch)
    torch.manual_seed(3)
    losses = [
        model(batch["pixel_values"][place], labels=batch["labels"][place]).loss_components
        for place in (window(top, left) for top, left in product(TOPS, LEFTS))
    ]
    assert outputs.loss_components.keys() == losses[0].keys()
    for name, loss in outputs.loss_components.items():
        torch.testing.assert_close(loss, sum(crop[name] for crop in losses) / 6, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, sum(outputs.loss_components.values()))


@torch.no_grad()
def test_the_number_of_windows_computed_together_changes_nothing():
    model, scores = tiny_model(), []
    for together in (1, 2, 100):
        model.config.windows_per_batch = together
        crops = []
        hook = model.mfuser.register_forward_pre_hook(lambda module, args, crops=crops: crops.append(len(args[0])))
        scores.append(model(tiny_batch((88, 130))["pixel_values"]).logits)
        hook.remove()
        assert crops == {1: [2] * 6, 2: [4] * 3, 100: [12]}[together]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_on_a_cpu_windows_of_1024_patches_are_computed_together():
    model, sizes = tiny_model(crop_stride=1), []
    model.mfuser.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    model(tiny_batch((64, 163), batch=1)["pixel_values"])
    assert sizes == [64, 36]  # 100 windows of 16 patches


def test_hidden_states_of_windows_are_refused():
    with pytest.raises(ValueError, match="crop by crop"):
        tiny_model()(tiny_batch((64, 128))["pixel_values"], output_hidden_states=True)
    with pytest.raises(ValueError, match="crop by crop"):
        tiny_model(output_hidden_states=True)(tiny_batch((64, 128))["pixel_values"])


# Scores


@torch.no_grad()
@pytest.mark.parametrize("own_class", [False, True])
@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov2+eva02_clip", "dinov3+siglip2", "patch 14 siglip"])
def test_each_query_votes_for_its_classes_where_its_mask_is(pair, own_class):
    model = tiny_model(pair, queries_vote_for_own_class=own_class)
    outputs = model(tiny_batch((50, 60))["pixel_values"])
    scores = segmentation_scores(outputs.class_queries_logits, outputs.masks_queries_logits, own_class)
    torch.testing.assert_close(outputs.logits, bilinear(scores, (50, 60)), rtol=1e-4, atol=1e-5)
    assert outputs.logits.dtype == torch.float32


# Test-time augmentation


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov2+eva02_clip", "dinov3+siglip2", "patch 14 clip"])
def test_augmented_scores_are_the_mean_over_scales_and_mirror_images_of_softmaxed_scores(pair, flip):
    model, pixel_values = tiny_model(pair), tiny_batch((46, 62))["pixel_values"]
    views = []
    with torch.no_grad():
        # 0.75 * 46 = 34.5 and 0.75 * 62 = 46.5 are rounded to the even number
        for size in ((34, 46), (46, 62), (69, 93)):
            scaled = bilinear(pixel_values, size)
            views.append(bilinear(model(scaled).logits, (46, 62)).softmax(dim=1))
            if flip:
                scores = model(scaled.flip(-1)).logits
                views.append(bilinear(scores, (46, 62)).softmax(dim=1).flip(-1))
    found = model.augmented_scores(pixel_values, scales=(0.75, 1.0, 1.5), flip=flip)
    torch.testing.assert_close(found, sum(views) / len(views), rtol=1e-3, atol=1e-4)
    assert not found.requires_grad


@torch.no_grad()
def test_without_settings_augmentation_is_the_image_and_its_mirror_image():
    model, pixel_values = tiny_model(), tiny_batch((48, 64))["pixel_values"]
    plain = model(pixel_values).logits.softmax(1)
    mirrored = model(pixel_values.flip(-1)).logits.softmax(1).flip(-1)
    torch.testing.assert_close(model.augmented_scores(pixel_values), (plain + mirrored) / 2)
