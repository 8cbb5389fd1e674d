"""Int8 quantisation: which layers it replaces, how far results move, and what it refuses."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import PAIRS, tiny_batch, tiny_model
from torch import nn

from mfuser import MFuserForSemanticSegmentation
from mfuser.quantization import (
    QUANTIZATIONS,
    Int8DynamicLinear,
    Int8WeightLinear,
    quantize,
    quantized_layers,
)
from mfuser.scripts import cli


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("layer", "tolerance"), [(Int8WeightLinear, 0.006), (Int8DynamicLinear, 0.016)], ids=["weight-only", "dynamic"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_an_int8_layer_is_as_exact_as_its_rounding(layer, tolerance, bias):
    torch.manual_seed(0)
    linear = nn.Linear(256, 96, bias=bias).requires_grad_(False)
    with torch.no_grad():
        linear.weight[3] *= 100  # a large channel has its own scale, and leaves the others as they are
        linear.weight[4] = 0
    tokens = torch.randn(2, 50, 256)
    expected, found = linear(tokens), layer(linear)(tokens)
    for channels in (slice(0, 3), slice(3, 4), slice(5, 96)):
        assert 1e-4 < relative_error(found[..., channels], expected[..., channels]) < tolerance
    torch.testing.assert_close(found[..., 4], expected[..., 4])
    assert layer(linear)(tokens.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("pair", PAIRS)
def test_the_layers_of_both_encoders_and_of_their_fusion_are_quantised(pair):
    names = quantized_layers(tiny_model(pair))
    parts = ["mfuser.vfm.vision.", "mfuser.vlm.vision.", "mfuser.fusion_layers."]
    assert all(any(name.startswith(part) for name in names) for part in parts)
    assert all(name.startswith((*parts, "mfuser.merge_proj")) for name in names)
    assert not any(name.endswith(("x_proj", "dt_proj")) or "embeddings" in name for name in names)
    # All of them: per layer at least four projections of attention and two of the MLP.
    assert len([name for name in names if name.startswith("mfuser.vfm.")]) >= 6 * 4
    assert len([name for name in names if name.startswith("mfuser.vlm.")]) >= 6 * 4


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("pair", PAIRS)
def test_scores_stay_close(pair, kind):
    model = tiny_model(pair)
    pixel_values = tiny_batch((96, 80))["pixel_values"]
    quantized = quantize(copy.deepcopy(model), kind)
    replaced = {type(quantized.get_submodule(name)) for name in quantized_layers(model)}
    assert replaced == {Int8WeightLinear if kind == "int8-weight-only" else Int8DynamicLinear}
    assert quantized_layers(quantized) == []
    with torch.no_grad():
        expected, found = model(pixel_values).logits, quantized(pixel_values).logits
    assert 0 < relative_error(found, expected) < 0.03


def test_weights_take_a_quarter_of_their_memory():
    model = tiny_model()
    layers = quantized_layers(model)
    before = sum(model.get_submodule(name).weight.nbytes for name in layers)
    quantize(model, "int8-weight-only")
    after = sum(model.get_submodule(name).weight.nbytes for name in layers)
    assert 4 * after == before


def test_weight_only_keeps_the_dtype_of_the_model():
    model = tiny_model().bfloat16()
    quantize(model, "int8-weight-only")
    with torch.no_grad():
        assert model.mfuser(tiny_batch()["pixel_values"].bfloat16()).score_map.dtype == torch.bfloat16


def test_without_a_kind_nothing_changes():
    model = tiny_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    assert quantize(model, None) is model
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="'int4'; it must be one of int8-weight-only, int8-dynamic"):
        quantize(tiny_model(), "int4")
    with pytest.raises(ValueError, match="int8-dynamic runs on a CPU and the model is on meta"):
        quantize(tiny_model().to("meta"), "int8-dynamic")


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantised_model_is_not_saved_as_a_whole_one(kind, tmp_path):
    """Its weights have other dtypes, or are missing: loading would silently give another model."""
    model = quantize(tiny_model(), kind)
    with pytest.raises(RuntimeError, match=f"quantised to {kind} cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_torchao_quantises_the_same_layers_on_loading(tmp_path):
    """The snippet of docs/quantization.md."""
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model = tiny_model()
    model.save_pretrained(tmp_path)
    pixel_values = tiny_batch()["pixel_values"]

    layers = set(quantized_layers(model))
    kept = [name for name, module in model.named_modules() if type(module) is nn.Linear and name not in layers]
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    quantized = MFuserForSemanticSegmentation.from_pretrained(tmp_path, quantization_config=config)

    replaced = [
        name
        for name, module in quantized.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor
    ]
    assert set(replaced) == layers
    with torch.no_grad():
        assert 0 < relative_error(quantized(pixel_values).logits, model(pixel_values).logits) < 0.03


@pytest.mark.parametrize(
    ("command", "arguments"), [("segment", ["no.png", "--model"]), ("evaluate", ["--domains", "camvid=no", "--model"])]
)
def test_commands_quantise_what_they_load(command, arguments, tmp_path, monkeypatch):
    seen = []
    module = importlib.import_module(f"mfuser.scripts.{command}")
    monkeypatch.setattr(module, "load_for_inference", lambda *args: ("a model", "a processor"))
    monkeypatch.setattr(module, "quantize", lambda *args: seen.append(args) or sys.exit())
    monkeypatch.chdir(tmp_path)
    Path("no.png").touch()
    with pytest.raises(SystemExit):
        cli.main([command, *arguments, str(tmp_path), "--quantize", "int8-dynamic"])
    assert seen == [("a model", "int8-dynamic")]
