"""Several sources: draws follow the weights, labels get the ids of all classes, unlabelled classes have no loss."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from tiny_models import CLASSES, tiny_model
from torch.utils.data import DataLoader
from transformers import default_data_collator

from mfuser.data.augmentation import AugmentedDataset, TrainingAugmentation
from mfuser.data.draws import Draw, ShuffledSampler
from mfuser.data.loading import LoadedDomain
from mfuser.data.rare_class_sampling import RareClassSampler
from mfuser.data.sources import (
    MultiSourceDataset,
    MultiSourceSampler,
    TrainingSource,
    joint_classes,
    joint_pixel_counts,
    multi_source_sampler,
)

SIZE = 72
DRAWS = 4000


def rows(labels: list[np.ndarray]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    pixels = [np.stack([label % 16 * 15] * 3, axis=-1) for label in labels]
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": [Image.fromarray(x) for x in labels]}
    return datasets.Dataset.from_dict(columns, features=features)


def stripes(*ids: int) -> np.ndarray:
    """A label of horizontal stripes of equal height."""
    return np.repeat(np.array(ids, dtype=np.uint8), SIZE // len(ids))[:, None].repeat(SIZE, axis=1)


@pytest.fixture(scope="module")
def sources() -> list[TrainingSource]:
    """Six rows that label all four classes, and three whose classes are numbered otherwise and lack "car"."""
    first = TrainingSource("first", rows([stripes(0, 1, 2, 3)] * 6), dict(enumerate(CLASSES)))
    second = TrainingSource("second", rows([stripes(0, 1, 255)] * 3), {0: "person", 1: "road"})
    return [first, second]


def within(count: int, probability: float) -> bool:
    """Whether a count of `DRAWS` draws is within the bounds of an error rate of 1e-6."""
    low, high = binom.ppf([5e-7, 1 - 5e-7], DRAWS, probability)
    return low <= count <= high


def drawn_sources(sampler, first: int) -> int:
    """How many of `DRAWS` draws are of the first source, which has `first` rows."""
    return sum(sampler.draw(position % 7, position).row < first for position in range(DRAWS))


@pytest.mark.parametrize("scope", [None, "source"])
@pytest.mark.parametrize(("weights", "share"), [([1, 3], 0.25), ([0.9, 0.1], 0.9)])
def test_sources_are_drawn_by_their_weights(sources, scope, weights, share):
    sampler = multi_source_sampler(sources, weights, seed=3, rare_class_scope=scope, min_pixels=10)
    count = drawn_sources(sampler, 6)
    assert within(count, share), (count, share * DRAWS)
    assert not within(count, share + 0.05)  # the bounds are tight enough to see a wrong weight


@pytest.mark.slow
def test_without_weights_images_are_drawn_as_if_the_sources_were_one(sources):
    assert within(drawn_sources(multi_source_sampler(sources, min_pixels=10), 6), 6 / 9)
    shuffled = multi_source_sampler(sources, rare_class_scope=None)
    assert isinstance(shuffled, ShuffledSampler) and sorted(draw.row for draw in shuffled) == list(range(9))
    joint = multi_source_sampler(sources, rare_class_scope="joint", min_pixels=10)
    plain = RareClassSampler(
        np.concatenate([joint_pixel_counts(source, joint_classes(sources)) for source in sources]), min_pixels=10
    )
    np.testing.assert_array_equal(joint.probabilities, plain.probabilities)
    draws = [joint.draw(0, position) for position in range(DRAWS)]
    roads = sum(draw.class_id == 0 for draw in draws)
    assert within(roads, joint.probabilities[0])
    low, high = binom.ppf([5e-7, 1 - 5e-7], roads, 6 / 9)  # every image holds the road
    assert low <= sum(draw.row < 6 for draw in draws if draw.class_id == 0) <= high


@pytest.mark.slow
def test_joint_sampling_draws_the_images_of_a_class_by_the_weights_and_per_source_sampling_the_sources(sources):
    joint = multi_source_sampler(sources, [1, 3], rare_class_scope="joint", min_pixels=10)
    draws = [joint.draw(0, position) for position in range(DRAWS)]
    for class_id, share in ((0, 0.25), (1, 1.0), (2, 1.0), (3, 0.25)):  # only the first source has sky and cars
        chosen = [draw.row < 6 for draw in draws if draw.class_id == class_id]
        low, high = binom.ppf([5e-7, 1 - 5e-7], len(chosen), share)
        assert low <= sum(chosen) <= high
    single = multi_source_sampler(sources, [1, 3], rare_class_scope="source", min_pixels=10)
    classes = [draw.class_id for draw in (single.draw(0, position) for position in range(DRAWS)) if draw.row >= 6]
    assert set(classes) == {0, 3}  # with the ids of all classes


@pytest.mark.slow
@pytest.mark.parametrize("scope", [None, "source", "joint"])
def test_a_draw_depends_only_on_seed_epoch_and_position(sources, scope):
    def sampler(seed):
        return multi_source_sampler(sources, [1, 3], seed=seed, rare_class_scope=scope, min_pixels=10)

    one, again = sampler(1), sampler(1)
    first = list(one)
    assert [draw.position for draw in first] == list(range(len(one))) == list(range(9))
    assert again.draw(0, 5) == first[5] and list(again) == first
    again.set_epoch(1)
    assert {draw.epoch for draw in again} == {1}
    many = [[(draw.row, draw.class_id) for draw in map(other.draw, [epoch] * 60, range(60))]
            for other, epoch in ((one, 0), (again, 1), (sampler(2), 0))]  # fmt: skip
    assert many[0] != many[1] and many[0] != many[2]


def test_labels_get_the_ids_of_all_classes_by_name(sources):
    assert joint_classes(sources) == dict(enumerate(CLASSES))
    assert joint_classes(sources[::-1]) == {0: "person", 1: "road", 2: "sky", 3: "car"}
    dataset = MultiSourceDataset(sources, TrainingAugmentation(crop_size=64), seed=1)
    assert len(dataset) == 9 and [dataset.locate(row) for row in (0, 5, 6, 8)] == [(0, 0), (0, 5), (1, 0), (1, 2)]
    sample = dataset[Draw(7, 0, 0)]
    assert set(sample["labels"].unique().tolist()) <= {0, 3, 255} and (sample["labels"] != 255).any()
    assert sample["class_mask"].tolist() == [True, False, False, True]
    assert dataset[Draw(0, 0, 0)]["class_mask"].tolist() == [True] * 4
    np.testing.assert_array_equal(joint_pixel_counts(sources[1], joint_classes(sources))[0], [1728, 0, 0, 1728])


def test_a_sample_of_a_source_is_that_of_training_on_it_alone(sources):
    augmentation = TrainingAugmentation(crop_size=64)
    together, alone = (
        MultiSourceDataset(sources, augmentation, seed=5),
        AugmentedDataset(sources[0].dataset, augmentation, 5),
    )
    for draw in (Draw(2, 1, 3), Draw(4, 0, 7, class_id=2, min_class_pixels=100)):
        sample, expected = together[draw], alone[draw]
        assert all(torch.equal(sample[name], expected[name]) for name in expected)


def test_pixels_of_classes_that_a_source_declares_unlabelled_are_ignored(sources):
    source = TrainingSource("some", sources[0].dataset, sources[0].id2label, unlabelled_classes=("car",))
    dataset = MultiSourceDataset([source, sources[1]], TrainingAugmentation(crop_size=64))
    sample = dataset[Draw(0, 0, 0)]
    assert 2 not in sample["labels"] and 255 in sample["labels"]
    assert sample["class_mask"].tolist() == [True, True, False, True]
    assert joint_pixel_counts(source, dataset.id2label)[:, 2].sum() == 0
    unmasked = MultiSourceDataset([source, sources[1]], TrainingAugmentation(crop_size=64), mask_unlabelled=False)
    assert "class_mask" not in unmasked[Draw(0, 0, 0)]


def test_classes_that_never_occur_in_a_prepared_domain_are_unlabelled():
    loaded = LoadedDomain(None, {0: "road", 1: "truck"}, {"evaluation_classes": ["road"]})
    assert TrainingSource.from_domain("synthia", loaded).class_mask == ["road"]
    assert TrainingSource.from_domain("other", loaded._replace(preparation={})).class_mask == ["road", "truck"]


def test_the_loss_of_a_batch_of_two_sources_has_no_gradient_for_unlabelled_classes(sources):
    dataset = MultiSourceDataset(sources, TrainingAugmentation(crop_size=64, max_class_ratio=1))
    draws = [Draw(0, 0, 0), Draw(6, 0, 1), Draw(7, 0, 2), Draw(1, 0, 3)]
    loader = DataLoader(dataset, batch_size=4, sampler=draws, collate_fn=default_data_collator)
    batch = next(iter(loader))
    assert batch["class_mask"].shape == (4, 4) and batch["class_mask"].dtype == torch.bool
    model = tiny_model().train()
    kept = {}
    criterion = model.criterion.forward

    def keeping(class_logits, mask_logits, score_map, *arguments):
        kept.update(classes=class_logits, masks=mask_logits, scores=score_map)
        for logits in kept.values():
            logits.retain_grad()
        return criterion(class_logits, mask_logits, score_map, *arguments)

    model.criterion.forward = keeping
    model(**batch).loss.backward()
    for image, labelled in enumerate([[0, 1, 2, 3], [0, 3], [0, 3], [0, 1, 2, 3]]):
        for class_id in range(4):
            gradients = [
                kept["classes"].grad[:, image, class_id], kept["classes"].grad[:, image, :, class_id],
                kept["masks"].grad[:, image, class_id], kept["scores"].grad[image, class_id],
            ]  # fmt: skip
            assert [bool(gradient.any()) for gradient in gradients] == [class_id in labelled] * 4 or (
                class_id in labelled and not (batch["labels"][image] == class_id).any()
            )


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, 2, 3]])
def test_wrong_weights_are_refused_with_the_names_of_the_sources(sources, weights):
    with pytest.raises(ValueError, match=r"the sources \(first, second\) needs one positive number"):
        multi_source_sampler(sources, weights, min_pixels=10)


def test_errors_name_the_source(sources):
    with pytest.raises(ValueError, match="second: min_pixels is 2000, and no image"):
        multi_source_sampler([TrainingSource("second", sources[1].dataset, sources[1].id2label)] * 2, min_pixels=2000)
    bad = TrainingSource("bad", rows([stripes(0, 9)]), {0: "road"})
    with pytest.raises(ValueError, match=r"bad: .*Row 0 of the dataset: the label holds \[9\]"):
        multi_source_sampler([sources[0], bad], min_pixels=10)
    dataset = MultiSourceDataset([sources[0], bad], TrainingAugmentation(crop_size=64))
    with pytest.raises(ValueError, match=r"bad, row 0: label values \[9\] are not among the valid ids 0, 255"):
        dataset[Draw(6, 0, 0)]
    other = TrainingSource("other", sources[0].dataset.remove_columns("label"), sources[0].id2label)
    with pytest.raises(ValueError, match="other has no column label; its columns are image"):
        MultiSourceDataset([sources[0], other], TrainingAugmentation())
    with pytest.raises(ValueError, match="contains 'road' more than once"):
        TrainingSource("twice", sources[0].dataset, {0: "road", 1: "road"})
    with pytest.raises(ValueError, match="contains 'road' more than once"):
        joint_classes([sources[0], TrainingSource("other case", sources[0].dataset, {0: "Road"})])
    with pytest.raises(ValueError, match="rare_class_scope is 'both'; it must be one of source, joint"):
        multi_source_sampler(sources, rare_class_scope="both")


@pytest.mark.parametrize(
    "sampler",
    [
        ShuffledSampler(20, seed=3),
        RareClassSampler(np.full((20, 2), 5000), seed=3),
        MultiSourceSampler([12, 8], np.array([0.5, 0.5]), seed=3),
    ],
    ids=["shuffled", "rare classes", "several sources"],
)
def test_an_epoch_that_was_started_keeps_its_draws_when_the_next_is_set(sampler):
    """Data loaders draw ahead: the epoch changes while draws of the one before are still taken."""
    first, started = list(sampler), iter(sampler)
    sampler.set_epoch(1)
    assert list(started) == first != list(sampler)
    sampler.set_epoch(0)
