"""Training transforms: published ranges, OpenCV's pixels, and the same sample in every worker."""

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mfuser.data import augmentation as module
from mfuser.data.augmentation import (
    AugmentedDataset,
    ResizedWindow,
    TrainingAugmentation,
    hsv_to_rgb,
    resized_shape,
    rgb_to_hsv,
)
from mfuser.data.draws import Draw, ShuffledSampler

# Computed with OpenCV 4.12: cv2.resize with INTER_LINEAR and INTER_NEAREST, cv2.cvtColor in both directions.
OPENCV = np.load(Path(__file__).parent / "fixtures" / "opencv_4_12.npz")
NO_DISTORTION = {"brightness_delta": 0, "contrast_range": (1, 1), "saturation_range": (1, 1), "hue_delta": 0}


def generator(seed):
    return np.random.default_rng(seed)


def assert_uniform(values, low, high):
    """Kolmogorov-Smirnov test of the uniform distribution on [low, high], at a significance level of about 1e-4."""
    values = np.sort(np.asarray(values, dtype=float))
    assert low <= values[0] and values[-1] <= high
    expected = (values - low) / (high - low)
    steps = np.arange(len(values) + 1) / len(values)
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert distance < 2.2 / np.sqrt(len(values))


def checkerboard(height, width, cell=16, num_classes=19):
    ids = generator(0).integers(0, num_classes, (height // cell + 1, width // cell + 1))
    return np.kron(ids, np.ones((cell, cell), int))[:height, :width].astype(np.uint8)


@pytest.mark.parametrize("shape", [(19, 27), (26, 37), (37, 53), (48, 69), (74, 106)])
def test_resizing_is_opencvs(shape):
    window = ResizedWindow(shape, 0, 0, *shape)
    name = f"{shape[0]}x{shape[1]}"
    np.testing.assert_array_equal(window.crop_nearest(OPENCV["label"]), OPENCV[f"nearest_{name}"])
    # OpenCV interpolates in fixed point and occasionally differs from the exact value by one grey level.
    difference = window.crop_bilinear(OPENCV["image"]).transpose(1, 2, 0).astype(int) - OPENCV[f"linear_{name}"]
    assert np.abs(difference).max() <= 1
    assert np.abs(difference).mean() < 0.2


def test_a_window_is_the_crop_of_the_resized_image():
    image, label = OPENCV["image"], OPENCV["label"]
    for full in [(19, 27), (48, 69), (74, 106), (37, 53)]:
        whole = ResizedWindow(full, 0, 0, *full)
        window = ResizedWindow(full, 7, 11, 12, 16)
        np.testing.assert_array_equal(window.crop_nearest(label), whole.crop_nearest(label)[7:19, 11:27])
        np.testing.assert_array_equal(window.crop_bilinear(image), whole.crop_bilinear(image)[:, 7:19, 11:27])


def test_hsv_is_opencvs():
    hsv = rgb_to_hsv(OPENCV["rgb"].T[:, None])
    np.testing.assert_array_equal(np.stack(hsv)[:, 0].T, OPENCV["hsv_of_rgb"])
    rgb = hsv_to_rgb(*OPENCV["hsv"].T[:, None])[:, 0].T.astype(int)
    assert np.abs(rgb - OPENCV["rgb_of_hsv"]).max() <= 1
    assert (rgb != OPENCV["rgb_of_hsv"]).mean() < 0.02


def test_a_resized_image_keeps_its_ratio_and_is_never_empty():
    assert resized_shape(1052, 1914, 0.5) == (526, 957)
    assert resized_shape(1024, 2048, 1.3333) == (1365, 2730)
    assert resized_shape(1, 3, 0.5) == (1, 1)


def test_scales_and_crop_offsets_are_uniform():
    augmentation = TrainingAugmentation(crop_size=64)
    label = checkerboard(300, 600)
    windows = [augmentation._draw_crop(label, generator(seed))[0] for seed in range(1500)]
    assert_uniform([window.full[1] / 600 for window in windows], 0.5 - 1 / 300, 2.0)
    for axis, start in ((0, "top"), (1, "left")):
        # Offsets are integers: spread each over its step for the comparison with a continuous distribution.
        room = [window.full[axis] - 64 + 1 for window in windows]
        spread = generator(1).random(len(windows))
        starts = np.array([getattr(window, start) for window in windows])
        assert_uniform((starts + spread) / room, 0, 1)

    unscaled = TrainingAugmentation(crop_size=64, scale_range=(1, 1))
    windows = [unscaled._draw_crop(label[:66, :65], generator(seed))[0] for seed in range(50)]
    assert {window.top for window in windows} == {0, 1, 2} and {window.left for window in windows} == {0, 1}


def test_at_most_three_quarters_of_a_crop_are_one_class():
    label = np.zeros((200, 400), np.uint8)
    label[:, 250:] = 1
    label[:40] = 255  # ignored pixels have no class
    augmentation = TrainingAugmentation(crop_size=64, scale_range=(1, 1))
    shares = []
    for seed in range(200):
        _, crop = augmentation._draw_crop(label, generator(seed))
        counts = np.bincount(crop[crop != 255], minlength=2)
        shares.append(counts.max() / max(counts.sum(), 1))
    # One crop in about eight holds enough of both: eleven draws fail in about a quarter of the cases.
    assert 0.6 < np.mean(np.array(shares) < 0.75) < 0.95
    free = TrainingAugmentation(crop_size=64, scale_range=(1, 1), max_class_ratio=1)
    assert np.mean([len(np.unique(free._draw_crop(label, generator(seed))[1])) == 1 for seed in range(200)]) > 0.4


@pytest.mark.parametrize("case", ["one class", "all ignored"])
def test_a_crop_is_redrawn_at_most_ten_times(case, monkeypatch):
    label = np.full((200, 400), 7 if case == "one class" else 255, np.uint8)
    drawn = Counter()
    crop_nearest = ResizedWindow.crop_nearest
    monkeypatch.setattr(
        ResizedWindow, "crop_nearest", lambda self, label: (drawn.update(["crop"]), crop_nearest(self, label))[1]
    )
    image = np.zeros((200, 400, 3), np.uint8)
    TrainingAugmentation(crop_size=64)(image, label, generator(0))
    assert drawn["crop"] == 11
    TrainingAugmentation(crop_size=64)(image, label, generator(0), class_id=3, min_class_pixels=0)
    assert drawn["crop"] == 11 + 11 * 11


def test_crops_are_redrawn_until_one_holds_the_wanted_class():
    label = np.zeros((400, 800), np.uint8)
    label[::2] = 1  # keeps every crop balanced
    label[::40, ::40] = 5  # in every crop, but not enough of it
    label[250:, 550:] = 5
    image = np.zeros((400, 800, 3), np.uint8)
    augmentation = TrainingAugmentation(crop_size=128)
    held = [
        np.mean([(augmentation(image, label, generator(s), *wanted)["labels"] == 5).sum() > 1500 for s in range(150)])
        for wanted in ((), (5, 1500))
    ]
    assert held[0] < 0.3
    assert held[1] == pytest.approx(1 - (1 - held[0]) ** 11, abs=0.1)


def gray(value, size=8):
    return np.full((3, size, size), value, np.uint8)


def test_brightness_is_shifted_by_up_to_32_half_of_the_time():
    augmentation = TrainingAugmentation(**{**NO_DISTORTION, "brightness_delta": 32})
    values = np.array([augmentation.distort(gray(128), generator(seed))[0, 0, 0] for seed in range(3000)], int)
    changed = values[values != 128]
    # A shift in (0, 1) is cut off to none.
    assert len(changed) / len(values) == pytest.approx(0.5 * 63 / 64, abs=0.03)
    assert changed.min() == 96 and changed.max() == 159


@pytest.mark.parametrize("which", ["contrast_range", "saturation_range"])
def test_contrast_and_saturation_are_scaled_by_half_to_one_and_a_half(which):
    augmentation = TrainingAugmentation(**{**NO_DISTORTION, which: (0.5, 1.5)})
    pixels = gray(160)
    if which == "saturation_range":
        pixels = np.stack([gray(200)[0], gray(120)[0], gray(120)[0]])  # a red of saturation 102
    factors = []
    for seed in range(3000):
        distorted = augmentation.distort(pixels, generator(seed))
        if which == "contrast_range":
            factors.append(distorted[0, 0, 0] / 160)
        else:
            factors.append(rgb_to_hsv(distorted)[1][0, 0] / 102)
    factors = np.array(factors)
    changed = factors[np.abs(factors - 1) > 0.011]
    assert len(changed) / len(factors) == pytest.approx(0.5 * 0.978, abs=0.03)
    assert_uniform(changed + generator(0).uniform(0, 1 / 160, len(changed)), 0.49, 1.515)


def test_hue_is_shifted_by_minus_18_to_17_half_of_the_time():
    augmentation = TrainingAugmentation(**{**NO_DISTORTION, "hue_delta": 18})
    red = np.stack([gray(255)[0], gray(0)[0], gray(0)[0]])
    hues = [int(rgb_to_hsv(augmentation.distort(red, generator(seed)))[0][0, 0]) for seed in range(4000)]
    shifts = Counter((hue + 90) % 180 - 90 for hue in hues)
    assert set(shifts) == set(range(-18, 18))
    assert shifts[0] / 4000 == pytest.approx(0.5 + 0.5 / 36, abs=0.03)
    others = [count for shift, count in shifts.items() if shift]
    assert min(others) > 25 and max(others) < 95  # 55.6 expected each


def test_contrast_comes_second_or_last_and_each_step_half_of_the_time(monkeypatch):
    steps = []
    rgb_to_hsv_, scale_and_shift = module.rgb_to_hsv, module._scale_and_shift
    monkeypatch.setattr(module, "rgb_to_hsv", lambda pixels: (steps.append("hsv"), rgb_to_hsv_(pixels))[1])

    def named_scale_and_shift(scale=1.0, shift=0.0):
        steps.append("brightness" if shift else "saturation" if steps[-1:] == ["hsv"] else "contrast")
        return scale_and_shift(scale, shift)

    monkeypatch.setattr(module, "_scale_and_shift", named_scale_and_shift)
    # Without hue steps, a contrast step cannot be mistaken for a saturation step.
    augmentation = TrainingAugmentation(hue_delta=0)
    sequences = Counter()
    for seed in range(2000):
        steps.clear()
        augmentation.distort(gray(128), generator(seed))
        sequences[tuple(step for step in steps if step != "hsv")] += 1
    expected = {
        (*brightness, *order): share
        for brightness in ((), ("brightness",))
        for order, share in {
            (): 1 / 8,
            ("saturation",): 1 / 8,
            ("contrast",): 1 / 8,
            ("contrast", "saturation"): 1 / 16,
            ("saturation", "contrast"): 1 / 16,
        }.items()
    }
    assert set(sequences) == set(expected)
    for sequence, share in expected.items():
        assert sequences[sequence] / 2000 == pytest.approx(share, abs=0.035), sequence


def test_image_and_label_stay_aligned_and_half_of_the_samples_are_flipped():
    label = checkerboard(150, 260, cell=40)
    image = np.repeat((label * 12)[..., None], 3, axis=2)
    augmentation = TrainingAugmentation(crop_size=96, **NO_DISTORTION)
    mean, std = (np.array(values)[:, None, None] for values in (augmentation.image_mean, augmentation.image_std))
    for seed in range(20):
        sample = augmentation(image, label, generator(seed))
        pixels = (sample["pixel_values"].numpy() * std + mean) * 255
        inside = sample["labels"].numpy() != 255
        agree = np.abs(pixels - sample["labels"].numpy() * 12).max(axis=0) < 0.5
        assert agree[inside].mean() > 0.85  # all but the interpolated borders of the cells

    ramp = np.repeat(np.arange(96, dtype=np.uint8)[None].repeat(96, 0)[..., None], 3, axis=2)
    augmentation = TrainingAugmentation(crop_size=96, scale_range=(1, 1), **NO_DISTORTION)
    rising = [
        bool(augmentation(ramp, label[:96, :96], generator(seed))["pixel_values"][0, 0].diff().gt(0).all())
        for seed in range(400)
    ]
    assert np.mean(rising) == pytest.approx(0.5, abs=0.08)


def test_pixels_are_normalised_and_small_images_are_padded():
    image = np.full((40, 60, 3), 200, np.uint8)
    label = checkerboard(40, 60)
    augmentation = TrainingAugmentation(crop_size=100, scale_range=(1, 1), **NO_DISTORTION)
    sample = augmentation(image, label, generator(0))
    assert sample["pixel_values"].shape == (3, 100, 100) and sample["pixel_values"].dtype == torch.float32
    assert sample["labels"].shape == (100, 100) and sample["labels"].dtype == torch.int64
    padding = torch.ones(100, 100, dtype=torch.bool)
    padding[:40, :60] = False
    assert (sample["labels"][padding] == 255).all() and (sample["labels"][~padding] < 19).all()
    assert (sample["pixel_values"][:, padding] == 0).all()
    expected = (200 / 255 - torch.tensor(augmentation.image_mean)) / torch.tensor(augmentation.image_std)
    torch.testing.assert_close(sample["pixel_values"][:, 0, 0], expected)


def test_labels_are_never_interpolated():
    label = generator(0).choice([3, 200], size=(120, 200)).astype(np.uint8)
    image = generator(1).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    augmentation = TrainingAugmentation(crop_size=128)
    values = {value for seed in range(20) for value in augmentation(image, label, generator(seed))["labels"].unique()}
    assert {int(value) for value in values} <= {3, 200, 255}


def make_rows(labels):
    images = [Image.fromarray(generator(i).integers(0, 256, (60 + i, 90, 3), dtype=np.uint8)) for i in range(6)]
    image = datasets.Image()
    features = datasets.Features({"image": image, "label": image, "name": datasets.Value("int8")})
    rows = {"image": images, "label": labels or images, "name": list(range(6))}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def rows():
    return make_rows([Image.fromarray(checkerboard(60 + i, 90)) for i in range(6)])


def samples(dataset, num_workers, sampler=None, **arguments):
    loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=num_workers, **arguments)
    return torch.cat([batch["pixel_values"] for batch in loader])


def test_a_sample_depends_on_seed_epoch_and_position_whatever_the_number_of_workers(rows):
    augmentation = TrainingAugmentation(crop_size=48)
    dataset = AugmentedDataset(rows, augmentation, seed=1)
    sampler = ShuffledSampler(len(rows), seed=1)
    for indices in (None, sampler):
        alone = samples(dataset, 0, indices)
        for workers in (1, 2):
            assert torch.equal(alone, samples(dataset, workers, indices))
        assert not torch.equal(alone, samples(AugmentedDataset(rows, augmentation, seed=2), 0, indices))

    sampler.set_epoch(1)
    assert not torch.equal(alone, samples(dataset, 0, sampler))
    sampler.set_epoch(0)
    assert torch.equal(alone, samples(dataset, 0, sampler))
    again = [dataset[Draw(row=2, epoch=0, position=position)]["pixel_values"] for position in (2, 5)]
    assert not torch.equal(*again)  # the same row twice in an epoch is augmented twice


def test_persistent_workers_see_a_new_epoch(rows):
    dataset = AugmentedDataset(rows, TrainingAugmentation(crop_size=48))
    loader = DataLoader(dataset, batch_size=2, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        seen = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(seen, samples(dataset, 0))
    dataset.set_epoch(0)
    assert not torch.equal(seen, samples(dataset, 0))


def test_the_shuffled_sampler_visits_every_row_once_in_a_new_order_each_epoch():
    sampler = ShuffledSampler(50, seed=3)
    first = list(sampler)
    assert sorted(draw.row for draw in first) == list(range(50)) and len(sampler) == 50
    assert [draw.position for draw in first] == list(range(50))
    assert first == list(ShuffledSampler(50, seed=3)) != list(ShuffledSampler(50, seed=4))
    sampler.set_epoch(1)
    assert [draw.row for draw in sampler] != [draw.row for draw in first]
    assert {draw.epoch for draw in sampler} == {1}


def test_bad_input_is_named(rows):
    augmentation = TrainingAugmentation(crop_size=48)
    image, label = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), np.uint8)
    with pytest.raises(ValueError, match="40x60.*39x60"):
        augmentation(image, label[:39], generator(0))
    with pytest.raises(ValueError, match="uint8"):
        augmentation(image.astype(np.float32), label, generator(0))
    with pytest.raises(ValueError, match="uint8"):
        augmentation(image, image, generator(0))
    for std in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="image_std .* both must be finite, and image_std positive"):
            TrainingAugmentation(image_std=(1, 1, std))
    with pytest.raises(ValueError, match="scale_range"):
        TrainingAugmentation(scale_range=(2, 0.5))
    with pytest.raises(ValueError, match="max_class_ratio"):
        TrainingAugmentation(max_class_ratio=75)
    with pytest.raises(ValueError, match="no column label; its columns are image, name"):
        AugmentedDataset(rows.remove_columns("label"), augmentation)
    with pytest.raises(ValueError, match="Row 3 of the dataset: .*mode RGB"):
        AugmentedDataset(make_rows(labels=None), augmentation)[3]
