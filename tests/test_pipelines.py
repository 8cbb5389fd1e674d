"""Transformers' pipelines: segmentation and feature extraction, image by image, in batches and with a device map."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CLASSES, tiny_model
from transformers import pipeline

from mfuser import MFuserImageProcessor, MFuserModel

FIXED = {"height": 48, "width": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    MFuserImageProcessor().save_pretrained(folder)
    return str(folder)


def images(*sizes) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@torch.no_grad()
def test_features_are_the_tokens_and_the_embedding_of_the_base_model(folder):
    extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)
    model, processor = MFuserModel.from_pretrained(folder), MFuserImageProcessor.from_pretrained(folder)
    for image in images((64, 64), (40, 100)):
        outputs = model(**processor(image, return_tensors="pt"))
        tokens, pooled = extract(image, return_tensors=True), extract(image, return_tensors=True, pool=True)
        torch.testing.assert_close(tokens, outputs.last_hidden_state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled, outputs.global_embedding[:, 0], rtol=1e-4, atol=1e-5)
        assert np.shape(extract(image)) == tuple(tokens.shape)
    together = extract(
        images((64, 64), (40, 100)), batch_size=2, return_tensors=True, image_processor_kwargs={"size": FIXED}
    )
    assert [tuple(tokens.shape) for tokens in together] == [(1, 13, 32)] * 2


def masks(segment, *args, **kwargs) -> list[dict[str, np.ndarray]]:
    return [{part["label"]: np.array(part["mask"]) for part in parts} for parts in segment(*args, **kwargs)]


@pytest.mark.slow
def test_images_of_unequal_size_are_segmented_one_by_one_or_at_one_size_in_batches(folder):
    sizes = (64, 64), (40, 100)
    segment = pipeline("image-segmentation", model=folder, trust_remote_code=True)
    for parts, size in zip(masks(segment, images(*sizes)), sizes, strict=True):
        assert parts and set(parts) <= set(CLASSES) and {mask.shape for mask in parts.values()} == {size}
    processor = MFuserImageProcessor.from_pretrained(folder, size=FIXED)
    segment = pipeline("image-segmentation", model=folder, trust_remote_code=True, image_processor=processor)
    alone, together = (masks(segment, images(*sizes), batch_size=number) for number in (1, 2))
    for first, second, size in zip(alone, together, sizes, strict=True):
        assert first.keys() == second.keys() and {mask.shape for mask in first.values()} == {size}
        for name in first:
            assert np.array_equal(first[name], second[name])


@pytest.mark.slow
def test_pipelines_with_a_device_map(folder, tmp_path):
    (expected,) = masks(pipeline("image-segmentation", model=folder, trust_remote_code=True), images((64, 100)))
    size = sum(weight.nbytes for weight in tiny_model().parameters())
    small = {"max_memory": {"cpu": int(0.8 * size)}, "offload_folder": tmp_path}
    for device_map, options in (("auto", {}), ("auto", small), ({"": "cpu"}, {})):
        segment = pipeline(
            "image-segmentation", model=folder, trust_remote_code=True, device_map=device_map, model_kwargs=options
        )
        if "max_memory" in options:
            assert set(segment.model.hf_device_map.values()) == {"cpu", "disk"}
        (found,) = masks(segment, images((64, 100)))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in found)
