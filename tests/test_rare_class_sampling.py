"""Rare-class sampling: the formula, a cache that is never stale, one sequence for any number of processes."""

import logging

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader

from mfuser.data import rare_class_sampling
from mfuser.data.augmentation import AugmentedDataset, TrainingAugmentation
from mfuser.data.draws import Draw
from mfuser.data.rare_class_sampling import RareClassSampler, class_probabilities, count_class_pixels

# Five images of 10,000 pixels; class 3 never occurs, class 4 nowhere often enough.
PIXELS = np.array(
    [
        [9000, 0, 1000, 0, 0],
        [6000, 3001, 999, 0, 0],
        [7000, 3000, 0, 0, 0],
        [9900, 0, 0, 0, 100],
        [5000, 4000, 1000, 0, 0],
    ]
)


@pytest.mark.parametrize("temperature", [100, 1, 0.01])
def test_class_probabilities_equal_the_formula(temperature):
    totals = [36900, 10001, 2999, 0, 100]
    exponentials = [np.exp((1 - total / 50000) / temperature) if total else 0 for total in totals]
    expected = np.array(exponentials) / sum(exponentials)
    np.testing.assert_allclose(class_probabilities(PIXELS.sum(axis=0), temperature), expected, rtol=1e-12)
    if temperature == 100:  # nearly uniform, by hand: exp(0.0052 ...) and so on over their sum
        np.testing.assert_allclose(
            class_probabilities(np.array([3, 1]), 100), [1 / (1 + np.exp(0.005)), 1 / (1 + np.exp(-0.005))], rtol=1e-12
        )


def test_classes_and_images_are_drawn_as_often_as_their_probabilities_say(caplog):
    with caplog.at_level(logging.WARNING):
        sampler = RareClassSampler(PIXELS, num_samples=20000, temperature=0.3, min_pixels=999)
    assert sampler.classes.tolist() == [0, 1, 2]
    assert "{4: 100}" in caplog.text  # excluded classes are reported
    formula = class_probabilities(PIXELS.sum(axis=0), 0.3)[:3]
    np.testing.assert_allclose(sampler.probabilities, formula / formula.sum(), rtol=1e-12)

    draws = list(sampler)
    drawn = np.bincount([draw.class_id for draw in draws], minlength=5) / 20000
    np.testing.assert_allclose(drawn[:3], sampler.probabilities, atol=0.015)
    assert {draw.min_class_pixels for draw in draws} == {499.5}
    holders = {0: [0, 1, 2, 3, 4], 1: [1, 2, 4], 2: [0, 4]}  # 999 pixels are not enough
    for class_id, rows in holders.items():
        chosen = np.bincount([draw.row for draw in draws if draw.class_id == class_id], minlength=5)
        assert np.flatnonzero(chosen).tolist() == rows
        np.testing.assert_allclose(chosen[rows] / chosen.sum(), 1 / len(rows), atol=0.03)


def test_an_image_needs_more_than_3000_pixels_and_its_crop_more_than_1500():
    sampler = RareClassSampler(PIXELS)
    assert [rows.tolist() for rows in sampler.rows] == [[0, 1, 2, 3, 4], [1, 4]]
    assert sampler.min_class_pixels == 1500
    assert len(sampler) == 5


def test_a_draw_depends_only_on_seed_epoch_and_position():
    sampler = RareClassSampler(PIXELS, seed=1, num_samples=200)
    first = list(sampler)
    assert first == list(sampler) == list(RareClassSampler(PIXELS, seed=1, num_samples=200))
    assert [draw.position for draw in first] == list(range(200))
    assert sampler.draw(0, 123) == first[123]
    # A longer epoch begins like a shorter one.
    assert list(RareClassSampler(PIXELS, seed=1, num_samples=300))[:200] == first
    choices = {tuple((draw.row, draw.class_id) for draw in first)}
    for seed, epoch in ((1, 1), (2, 0)):
        other = RareClassSampler(PIXELS, seed=seed, num_samples=200)
        other.set_epoch(epoch)
        assert {draw.epoch for draw in other} == {epoch}
        choices.add(tuple((draw.row, draw.class_id) for draw in other))
    assert len(choices) == 3


class Echo(torch.utils.data.Dataset):
    """Returns the draw that it is indexed by."""

    def __len__(self):
        return 5

    def __getitem__(self, draw):
        return torch.tensor([draw.epoch, draw.position, draw.row, draw.class_id])


@pytest.mark.parametrize("split_batches", [False, True])
def test_two_processes_receive_disjoint_parts_of_one_sequence(split_batches):
    sampler = RareClassSampler(PIXELS, num_samples=48)
    loader = DataLoader(Echo(), batch_size=4, sampler=sampler)
    parts = [
        prepare_data_loader(
            loader, num_processes=2, process_index=rank, split_batches=split_batches, put_on_device=False
        )
        for rank in range(2)
    ]
    for epoch in range(2):
        seen = []
        for part in parts:
            part.set_epoch(epoch)
            seen.append(torch.cat(list(part)))
        assert len(seen[0]) == len(seen[1]) == 24
        positions = [set(rows[:, 1].tolist()) for rows in seen]
        assert positions[0].isdisjoint(positions[1]) and positions[0] | positions[1] == set(range(48))
        sampler.set_epoch(epoch)
        together = torch.cat(seen)
        expected = torch.tensor([[draw.epoch, draw.position, draw.row, draw.class_id] for draw in sampler])
        assert torch.equal(together[together[:, 1].argsort()], expected)


def test_a_resumed_epoch_continues_with_the_same_draws():
    sampler = RareClassSampler(PIXELS, num_samples=40)
    loader = DataLoader(Echo(), batch_size=4, sampler=sampler)
    whole = list(loader)
    resumed = list(skip_first_batches(loader, 6))
    assert torch.equal(torch.stack(resumed), torch.stack(whole[6:]))


def make_dataset(labels, images=None):
    labels = [Image.fromarray(label) for label in labels]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Image(), "name": datasets.Value("int8")}
    )
    images = images or [Image.new("RGB", label.size, (90, 120, 30)) for label in labels]
    rows = {"image": images, "label": labels, "name": list(range(len(labels)))}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    drawn = [rng.choice([0, 1, 2, 4, 255], size=(20 + i, 30)).astype(np.uint8) for i in range(7)]
    drawn[3][:] = 255
    return drawn


def counted_by_hand(labels, num_classes=5):
    return [[(label == class_id).sum() for class_id in range(num_classes)] for label in labels]


@pytest.mark.parametrize("num_proc", [1, 3])
def test_pixels_are_counted_per_row_in_the_datasets_order(labels, num_proc):
    counts = count_class_pixels(make_dataset(labels), 5, num_proc=num_proc)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, counted_by_hand(labels))
    order = [5, 0, 3]
    selected = count_class_pixels(make_dataset(labels).select(order), 5, num_proc=num_proc)
    np.testing.assert_array_equal(selected, counts[order])


def test_labels_mapped_on_the_fly_are_counted_as_training_sees_them(labels):
    def as_one_class(rows):
        return {"label": [np.full((10, 10), 2, np.uint8) for _ in rows["label"]]}

    counts = count_class_pixels(make_dataset(labels).with_transform(as_one_class), 5, num_proc=1)
    np.testing.assert_array_equal(counts, [[0, 0, 100, 0, 0]] * 7)


@pytest.fixture
def countings(monkeypatch):
    """The rows that are counted rather than read from the cache."""
    calls = []
    count = rare_class_sampling._count_labels

    def counting(labels, rows, num_classes, skip_unreadable):
        calls.extend(rows)
        return count(labels, rows, num_classes, skip_unreadable)

    monkeypatch.setattr(rare_class_sampling, "_count_labels", counting)
    return calls


def count(dataset, num_classes=5, **arguments):
    return count_class_pixels(dataset, num_classes, num_proc=1, **arguments)


def test_counts_are_cached_beside_the_dataset(labels, countings, tmp_path):
    make_dataset(labels).save_to_disk(tmp_path / "data")
    counts = count(datasets.load_from_disk(str(tmp_path / "data")))
    assert countings == list(range(7))
    assert len(list((tmp_path / "data").glob("rare-class-index-*.npz"))) == 1
    np.testing.assert_array_equal(count(datasets.load_from_disk(str(tmp_path / "data"))), counts)
    assert len(countings) == 7
    assert not list(tmp_path.rglob("*.tmp"))

    # Another selection or another number of classes is another index.
    dataset = datasets.load_from_disk(str(tmp_path / "data"))
    np.testing.assert_array_equal(count(dataset.select(range(2, 5))), counts[2:5])
    assert count(dataset, num_classes=6).shape == (7, 6)
    assert len(countings) == 7 + 3 + 7


def test_a_stale_or_broken_cache_is_never_used(labels, countings, tmp_path, caplog):
    cache_file = tmp_path / "cache" / "index.npz"
    np.testing.assert_array_equal(count(make_dataset(labels), cache_file=cache_file), counted_by_hand(labels))
    count(make_dataset(labels), cache_file=cache_file)
    assert len(countings) == 7

    labels[2][:] = 1  # the same number of rows, another label
    np.testing.assert_array_equal(count(make_dataset(labels), cache_file=cache_file), counted_by_hand(labels))
    assert len(countings) == 14

    cache_file.write_bytes(cache_file.read_bytes()[:100])
    np.testing.assert_array_equal(count(make_dataset(labels), cache_file=cache_file), counted_by_hand(labels))
    assert len(countings) == 21 and "cannot be read" in caplog.text


def test_a_changed_label_file_makes_the_cache_stale(labels, countings, tmp_path):
    # Two files of one name in different folders: rows, not base names, are the key.
    paths = [tmp_path / folder / "0001.png" for folder in ("a", "b")]
    for path, label in zip(paths, labels, strict=False):
        path.parent.mkdir()
        Image.fromarray(label).save(path)

    def dataset():
        columns = {"label": [str(path) for path in paths]}
        return datasets.Dataset.from_dict(columns).cast_column("label", datasets.Image())

    cache_file = tmp_path / "index.npz"
    np.testing.assert_array_equal(count(dataset(), cache_file=cache_file), counted_by_hand(labels[:2]))
    count(dataset(), cache_file=cache_file)
    assert len(countings) == 2
    Image.fromarray(labels[5]).save(paths[1])
    expected = counted_by_hand([labels[0], labels[5]])
    np.testing.assert_array_equal(count(dataset(), cache_file=cache_file), expected)
    assert len(countings) == 4


def test_counts_are_returned_when_the_cache_cannot_be_written(labels, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert count(make_dataset(labels), cache_file=tmp_path / "file" / "index.npz").shape == (7, 5)
    assert "cannot be cached" in caplog.text


def test_draws_become_crops_of_their_class_whatever_the_number_of_workers():
    label = np.zeros((128, 160), np.uint8)
    label[::2] = 1
    rare = label.copy()
    rare[64:, 100:] = 2
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (128, 160, 3), dtype=np.uint8)) for _ in range(3)]
    dataset = make_dataset([label, rare, label], images)
    sampler = RareClassSampler(count(dataset, 3), num_samples=24, min_pixels=600)
    augmented = AugmentedDataset(dataset, TrainingAugmentation(crop_size=64))

    batches = {
        workers: list(DataLoader(augmented, batch_size=4, sampler=sampler, num_workers=workers)) for workers in (0, 2)
    }
    for alone, shared in zip(*batches.values(), strict=True):
        assert torch.equal(alone["pixel_values"], shared["pixel_values"])
        assert torch.equal(alone["labels"], shared["labels"])
    crops = torch.cat([batch["labels"] for batch in batches[0]])
    draws = list(sampler)
    assert {draw.row for draw in draws if draw.class_id == 2} == {1}
    held = [(crop == draw.class_id).sum() > 300 for crop, draw in zip(crops, draws, strict=True)]
    assert np.mean(held) > 0.9
    free = [(augmented[Draw(1, 0, position)]["labels"] == 2).sum() > 300 for position in range(40)]
    assert np.mean(free) < 0.7


def test_bad_input_is_named(labels):
    with pytest.raises(ValueError, match="streaming=False"):
        count_class_pixels(make_dataset(labels).to_iterable_dataset(), 5)
    with pytest.raises(ValueError, match="no column 'label'; its columns are image, name"):
        count(make_dataset(labels).remove_columns("label"))
    with pytest.raises(ValueError, match="empty"):
        count(make_dataset(labels).select([]))
    with pytest.raises(ValueError, match=r"Row 0 of the dataset: the label holds \[4\]"):
        count(make_dataset(labels), num_classes=4)
    with pytest.raises(ValueError, match=r"\[4\]"):
        count_class_pixels(make_dataset(labels), 4, num_proc=2)
    unlabelled = datasets.Dataset.from_dict({"label": [None]}, features=datasets.Features({"label": datasets.Image()}))
    with pytest.raises(ValueError, match="Row 0 of the dataset: the label is missing"):
        count(unlabelled)
    with pytest.raises(ValueError, match="temperature is 0; it must be positive"):
        class_probabilities(PIXELS.sum(axis=0), 0)
    with pytest.raises(ValueError, match="at least one pixel must not be 255"):
        RareClassSampler(np.zeros((3, 5), np.int64))
    with pytest.raises(ValueError, match="min_pixels is 10000, and no image holds more than 9900 pixels"):
        RareClassSampler(PIXELS, min_pixels=10000)
    with pytest.raises(ValueError, match="num_samples"):
        RareClassSampler(PIXELS, num_samples=0)
