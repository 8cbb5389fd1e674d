"""Published EVA02-CLIP checkpoints become models: every tensor is converted, dropped for a reason or refused."""

import json
import re

import pytest
import torch
from test_eva02_clip import published_weights
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mfuser.configuration_eva02_clip import Eva02ClipConfig
from mfuser.modeling_eva02_clip import Eva02ClipModel
from mfuser.scripts import cli
from mfuser.scripts import convert_eva02_clip as convert


@pytest.fixture(scope="module")
def published():
    return published_weights()


def published_shapes(width, layers, patch, grid, text_width, text_layers, projection):
    """Every tensor of a published checkpoint: names as in baaivision/EVA, EVA-CLIP, with the text tower unprefixed."""
    hidden, head_width = int(width * 2.6667), 64
    shapes = {
        "logit_scale": (),
        "visual.cls_token": (1, 1, width),
        "visual.pos_embed": (1, grid**2 + 1, width),
        "visual.patch_embed.proj.weight": (width, 3, patch, patch),
        "visual.patch_embed.proj.bias": (width,),
        "visual.norm.weight": (width,),
        "visual.norm.bias": (width,),
        "visual.head.weight": (projection, width),
        "visual.head.bias": (projection,),
        "token_embedding.weight": (49408, text_width),
        "positional_embedding": (77, text_width),
        "ln_final.weight": (text_width,),
        "ln_final.bias": (text_width,),
        "text_projection": (text_width, projection),
    }
    for rope in ["visual.rope", *(f"visual.blocks.{i}.attn.rope" for i in range(layers))]:
        shapes[f"{rope}.freqs_cos"] = shapes[f"{rope}.freqs_sin"] = (grid**2, head_width)
    for i in range(layers):
        block = f"visual.blocks.{i}."
        shapes.update({f"{block}attn.{name}_proj.weight": (width, width) for name in "qkv"})
        shapes.update({f"{block}attn.{name}_bias": (width,) for name in "qv"})
        shapes.update({f"{block}attn.proj.weight": (width, width), f"{block}attn.proj.bias": (width,)})
        for name in ("norm1", "norm2", "attn.inner_attn_ln"):
            shapes.update({f"{block}{name}.weight": (width,), f"{block}{name}.bias": (width,)})
        for name in ("w1", "w2"):
            shapes.update({f"{block}mlp.{name}.weight": (hidden, width), f"{block}mlp.{name}.bias": (hidden,)})
        shapes.update({f"{block}mlp.ffn_ln.weight": (hidden,), f"{block}mlp.ffn_ln.bias": (hidden,)})
        shapes.update({f"{block}mlp.w3.weight": (width, hidden), f"{block}mlp.w3.bias": (width,)})
    for i in range(text_layers):
        block = f"transformer.resblocks.{i}."
        for name in ("ln_1", "ln_2"):
            shapes.update({f"{block}{name}.weight": (text_width,), f"{block}{name}.bias": (text_width,)})
        for name, rows, columns in (
            ("attn.in_proj_", 3 * text_width, text_width),
            ("attn.out_proj.", text_width, text_width),
            ("mlp.c_fc.", 4 * text_width, text_width),
            ("mlp.c_proj.", text_width, 4 * text_width),
        ):
            shapes.update({f"{block}{name}weight": (rows, columns), f"{block}{name}bias": (rows,)})
    return shapes


@pytest.mark.parametrize(
    ("sizes", "image_size"),
    [
        ((768, 12, 16, 14, 512, 12, 512), 224),
        ((1024, 24, 14, 16, 768, 12, 768), 224),
        ((1024, 24, 14, 24, 768, 12, 768), 336),
    ],
    ids=["B/16", "L/14", "L/14-336"],
)
def test_published_models_are_recognised_by_their_shapes(sizes, image_size):
    width, layers, patch, _, text_width, text_layers, projection = sizes
    shapes = published_shapes(*sizes)
    converted = convert.convert_eva02_clip_state_dict(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    )
    config = convert.eva02_clip_config_from_state_dict(converted)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (width, layers, width // 64)
    assert (vision.image_size, vision.patch_size, vision.rope_pretrained_grid) == (image_size, patch, 16)
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (text_width, text_layers, 49408)
    assert (text.num_attention_heads, config.projection_dim) == (text_width // 64, projection)
    if image_size == 336:
        assert config.to_dict() == Eva02ClipConfig().to_dict()
    dropped = [name for name in shapes if convert.dropped_reason(name)]
    assert len(dropped) == 2 + 2 * layers and all(".freqs_" in name for name in dropped)
    # The packed input projections of the text tower become three each, weight and bias; all else is one for one.
    assert len(converted) == len(shapes) - len(dropped) + 2 * 2 * text_layers


@pytest.mark.parametrize("prefix", ["text.", ""])
def test_conversion_keeps_every_number(published, prefix):
    original = {re.sub(r"^text\.", prefix, name): tensor for name, tensor in published.items()}
    converted = convert.convert_eva02_clip_state_dict(original)
    kept = {name: tensor for name, tensor in original.items() if convert.dropped_reason(name) is None}
    assert sum(tensor.numel() for tensor in converted.values()) == sum(tensor.numel() for tensor in kept.values())
    layer = "text_model.encoder.layers.1.self_attn."
    packed = [converted[f"{layer}{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(packed), published["text.transformer.resblocks.1.attn.in_proj_weight"])
    assert torch.equal(converted["text_projection.weight"], published["text.text_projection"].T)
    assert all(tensor.is_contiguous() for tensor in converted.values())


def test_tensors_that_do_not_belong_or_are_missing_are_all_listed(published):
    foreign = {"visual.blocks.0.ls1": torch.ones(1), "text.bias": torch.ones(1)}
    with pytest.raises(ValueError, match="visual.blocks.0.ls1, text.bias") as error:
        convert.convert_eva02_clip_state_dict({**published, **foreign})
    assert "E/14" not in str(error.value)
    with pytest.raises(ValueError, match="EVA02-CLIP-E/14"):
        convert.convert_eva02_clip_state_dict({**published, "visual.blocks.0.attn.qkv.weight": torch.ones(1)})
    without = {k: v for k, v in published.items() if k not in ("visual.norm.bias", "text.ln_final.weight")}
    with pytest.raises(ValueError, match="text_model.final_layer_norm.weight, vision_model.post_layernorm.bias"):
        convert.convert_eva02_clip_state_dict(without)
    with pytest.raises(ValueError, match="position_embedding"):
        convert.convert_eva02_clip_state_dict({k: v for k, v in published.items() if k != "visual.pos_embed"})
    with pytest.raises(ValueError, match=r"post_layernorm.bias has shape \(31,\) and must have \(32,\)"):
        convert.convert_eva02_clip_state_dict({**published, "visual.norm.bias": torch.zeros(31)})


@torch.no_grad()
def test_command_writes_a_folder_that_loads(tmp_path, capsys):
    shapes = published_shapes(64, 2, 16, 2, 64, 2, 32)
    torch.manual_seed(0)
    original = {name: torch.randn(shape, dtype=torch.float16) for name, shape in shapes.items()}
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in original.items()}}, tmp_path / "EVA02.pt")
    assert cli.main(["convert", str(tmp_path / "EVA02.pt"), "--output", str(tmp_path / "out")]) == 0
    assert f"6 dropped, {convert.dropped_reason('visual.rope.freqs_cos')}" in capsys.readouterr().out

    model = Eva02ClipModel.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    assert torch.equal(model.visual_projection.weight, original["visual.head.weight"])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixel_values = processor(torch.zeros(3, 40, 50, dtype=torch.uint8).numpy(), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 32, 32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "eva02_clip"
