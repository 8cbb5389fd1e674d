"""Accelerate can hold any part of a model in memory or on disk: every weight is read in the forward of its module."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from tiny_models import CLASSES, PAIRS, tiny_batch, tiny_model

from mfuser import MFuserForSemanticSegmentation

VARIANTS = [*PAIRS, "stored class embeddings"]


def variant(name: str) -> MFuserForSemanticSegmentation:
    if name in PAIRS:
        return tiny_model(name)
    model = tiny_model()
    model.mfuser.store_class_embeddings()
    return model


@torch.no_grad()
def scores(model, size=(64, 64)):
    return model(tiny_batch(size, batch=1)["pixel_values"]).logits


def assert_same_scores(offloaded, expected, size=(64, 64)):
    for _ in range(2):  # caches hold nothing that is gone
        torch.testing.assert_close(scores(offloaded, size), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [(64, 64), (80, 100)])
def test_no_weight_is_read_outside_the_forward_of_its_module(name, size):
    model = variant(name)
    expected = scores(model, size)
    cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same_scores(model, expected, size)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(**tiny_batch()).loss.isfinite()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_output_of_the_base_model_is_available(name):
    model = variant(name).mfuser
    pixel_values = tiny_batch()["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values, output_hidden_states=True)
        cpu_offload(model, execution_device="cpu")
        found = model(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), rtol=1e-4, atol=1e-5)


def test_the_whole_model_from_disk(tmp_path):
    model = variant("dinov2+clip")
    expected = scores(model)
    disk_offload(model, tmp_path, execution_device="cpu")
    assert_same_scores(model, expected)


def splits(model) -> list[dict[str, str]]:
    """Device maps that put each part of a model on disk, alone and together with all parts after it."""
    blocks = set(model._no_split_modules)

    def parts(prefix, module):
        for name, _ in module.named_parameters(recurse=False):
            yield f"{prefix}{name}"
        for name, child in module.named_children():
            whole = type(child).__name__ in blocks or not any(True for _ in child.children())
            if whole and child.state_dict():
                yield f"{prefix}{name}"
            elif not whole:
                yield from parts(f"{prefix}{name}.", child)

    names = list(parts("", model))
    modules = dict(model.named_modules())
    chosen = [index for index, name in enumerate(names) if name in modules]
    alone = [{name: "disk" if name == names[index] else "cpu" for name in names} for index in chosen]
    after = [{name: "disk" if name in names[index:] else "cpu" for name in names} for index in chosen]
    return alone + after


@pytest.mark.parametrize("name", VARIANTS)
def test_any_block_on_disk(name, tmp_path):
    model = variant(name)
    expected = scores(model)
    maps = splits(model)
    for index, device_map in enumerate(maps):
        split = dispatch_model(variant(name), device_map, main_device="cpu", offload_dir=tmp_path / str(index))
        torch.testing.assert_close(scores(split), expected, rtol=1e-4, atol=1e-6, msg=str(device_map))
