"""Accelerate can keep any part of a model in memory or on disk: weights are read in the `forward` of their module."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from tiny_models import PAIRS, tiny_batch, tiny_model

from mfuser import MFuserForSemanticSegmentation

VARIANTS = [*PAIRS, "stored class embeddings"]


def variant(pair: str) -> MFuserForSemanticSegmentation:
    if pair in PAIRS:
        return tiny_model(pair)
    model = tiny_model()
    model.mfuser.store_class_embeddings()
    return model


@torch.no_grad()
def scores(model, size=(64, 64)):
    return model(tiny_batch(size, batch=1)["pixel_values"]).logits


def assert_same_scores(offloaded, expected, size=(64, 64)):
    for _ in range(2):  # caches do not keep offloaded weights
        torch.testing.assert_close(scores(offloaded, size), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("pair", "size"), [*((pair, (64, 64)) for pair in VARIANTS), ("dinov3+siglip2", (80, 100))])
def test_no_weight_is_read_outside_the_forward_of_its_module(pair, size):
    model = variant(pair)
    expected = scores(model, size)
    cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same_scores(model, expected, size)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(**tiny_batch()).loss.isfinite()


@pytest.mark.parametrize("pair", VARIANTS)
def test_every_output_of_the_base_model_is_available(pair):
    model = variant(pair).mfuser
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


def device_maps(model, number: int) -> list[dict[str, str]]:
    """Maps that keep a part of the model in memory and leave the rest on disk, by cuts between its blocks."""

    def parts(prefix, module):
        for name, _ in module.named_parameters(recurse=False):
            yield prefix + name
        for name, child in module.named_children():
            if type(child).__name__ in model._no_split_modules or not any(True for _ in child.children()):
                yield from [prefix + name] * bool(child.state_dict())
            else:
                yield from parts(f"{prefix}{name}.", child)

    names = list(parts("", model))
    cuts = [round(len(names) * index / number) for index in range(1, number)]
    in_memory = [names[:cut] for cut in cuts] + [names[1:cut:2] for cut in cuts] if number else []
    modules = dict(model.named_modules())
    return [{name: "cpu" if name in kept or name not in modules else "disk" for name in names} for kept in in_memory]


def assert_any_split_works(pair: str, number: int, folder):
    model = variant(pair)
    expected = scores(model)
    for index, device_map in enumerate(device_maps(model, number)):
        split = dispatch_model(variant(pair), device_map, main_device="cpu", offload_dir=folder / str(index))
        torch.testing.assert_close(scores(split), expected, rtol=1e-4, atol=1e-6, msg=str(device_map))


@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov3+siglip2", "stored class embeddings"])
def test_a_part_in_memory_and_the_rest_on_disk(pair, tmp_path):
    assert_any_split_works(pair, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pair", VARIANTS)
def test_any_part_in_memory_and_the_rest_on_disk(pair, tmp_path):
    assert_any_split_works(pair, 12, tmp_path)


@pytest.mark.parametrize("share", [0.5, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.8, 0.95))])
@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov3+siglip2", "dinov2_with_registers+eva02_clip"])
def test_an_automatic_split_of_a_small_memory(pair, share, tmp_path):
    model = variant(pair)
    expected = scores(model)
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in model.parameters())
    loaded = MFuserForSemanticSegmentation.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(share * size)},
        offload_folder=tmp_path / "offload",
    )
    assert "disk" in loaded.hf_device_map.values()
    assert_same_scores(loaded, expected)
