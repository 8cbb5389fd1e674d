"""Int8 quantisation: the layers that it replaces, the error of the results, and unsupported models."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import PAIRS, tiny_batch, tiny_model
from torch import nn

from mfuser import MFuserForSemanticSegmentation, quantization
from mfuser.quantization import (
    QUANTIZATIONS,
    Int8DynamicLinear,
    Int8WeightLinear,
    int8_products_are_exact,
    quantize,
    quantized_layers,
)
from mfuser.scripts import cli

exact_products = pytest.mark.skipif(
    not int8_products_are_exact(), reason="int8-dynamic is refused on a CPU without exact 8-bit products"
)
KINDS = [pytest.param(kind, marks=exact_products if kind == "int8-dynamic" else ()) for kind in QUANTIZATIONS]


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("layer", "tolerance"),
    [
        pytest.param(Int8WeightLinear, 0.006, id="weight-only"),
        pytest.param(Int8DynamicLinear, 0.016, id="dynamic", marks=exact_products),
    ],
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


@pytest.mark.parametrize("kind", KINDS)
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


@exact_products
@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_in_bfloat16_where_the_cpu_has_instructions(attention, available, monkeypatch):
    monkeypatch.setattr(quantization, "has_bfloat16_instructions", lambda: available)
    model = tiny_model()
    model.set_attn_implementation(attention)
    quantize(model, "int8-dynamic")
    dtypes, attend = set(), nn.functional.scaled_dot_product_attention

    def record(query, *args, **kwargs):
        dtypes.add(query.dtype)
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    with torch.no_grad():
        assert model.mfuser.encode(tiny_batch()["pixel_values"]).vfm_last_hidden_state.dtype == torch.float32
    expected = {torch.bfloat16 if available else torch.float32} if attention == "sdpa" else set()
    assert dtypes == expected


def test_nonfinite_values_are_not_rounded_away():
    layer = Int8DynamicLinear(nn.Linear(8, 4))
    for value in (torch.nan, torch.inf):
        tokens = torch.zeros(1, 3, 8)
        tokens[0, 1, 2] = value
        assert layer(tokens).isnan().all() and layer(tokens).shape == (1, 3, 4)


@pytest.mark.slow
def test_a_cpu_that_overflows_sums_of_8_bit_products_is_refused():
    """Without VNNI, oneDNN adds pairs of products in 16 bits; its setting leaves out the instructions."""
    code = "from mfuser.quantization import int8_products_are_exact as exact; print(exact())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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


def test_what_cannot_be_quantised_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="'int4'; it must be one of int8-weight-only, int8-dynamic"):
        quantize(tiny_model(), "int4")
    with pytest.raises(ValueError, match="int8-dynamic runs on a CPU and the model is on meta"):
        quantize(tiny_model().to("meta"), "int8-dynamic")
    monkeypatch.setattr(quantization, "int8_products_are_exact", lambda: False)
    with pytest.raises(ValueError, match="needs PyTorch with oneDNN and a CPU whose 8-bit products are exact"):
        quantize(tiny_model(), "int8-dynamic")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_not_saved_as_a_whole_one(kind, tmp_path):
    """The weights would have other dtypes or be missing, and loading would silently give another model."""
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
    monkeypatch.setattr(module, "settings_of", lambda *args: {"is_calibrated": False}, raising=False)
    monkeypatch.setattr(module, "quantize", lambda *args: seen.append(args) or sys.exit())
    monkeypatch.chdir(tmp_path)
    Path("no.png").touch()
    with pytest.raises(SystemExit):
        cli.main([command, *arguments, str(tmp_path), "--quantize", "int8-dynamic"])
    assert seen == [("a model", "int8-dynamic")]
