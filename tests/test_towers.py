"""Each encoder computes what Transformers computes with its weights, and both are merged token by token."""

from itertools import pairwise

import pytest
import torch
from tiny_models import DINOV2, PAIRS, tiny_batch, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    Siglip2VisionModel,
    SiglipVisionModel,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from mfuser.modeling_eva02_clip import Eva02ClipVisionModel

# The class of each kind of encoder, and the statistics that its published models normalise pixels with.
IMAGENET = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
CLIP = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
HALF = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
ENCODERS = {
    "dinov2": (Dinov2Model, IMAGENET),
    "dinov2_with_registers": (Dinov2WithRegistersModel, IMAGENET),
    "dinov3_vit": (DINOv3ViTModel, IMAGENET),
    "clip_vision_model": (CLIPVisionModel, CLIP),
    "eva02_clip_vision_model": (Eva02ClipVisionModel, CLIP),
    "siglip_vision_model": (SiglipVisionModel, HALF),
    "siglip2_vision_model": (Siglip2VisionModel, HALF),
}


def normalised(pixels: torch.Tensor, statistics) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (pixels - mean) / std


def without_fusion(pair: str, **fields):
    """Returns a model in which the encoders do not influence each other."""
    model = tiny_model(pair, **fields)
    with torch.no_grad():
        for layer in model.mfuser.fusion_layers:
            layer.mvfuser.scale.zero_()
            if isinstance(layer.vfm_out_proj, nn.Linear):
                layer.vfm_out_proj.bias.zero_()
    return model


def last_hidden_state(vision: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the output of Transformers' class with the weights of `vision`, for pixels in [0, 1]."""
    config = vision.config
    model_class, statistics = ENCODERS[config.model_type]
    encoder = model_class(config).eval()
    encoder.load_state_dict(vision.state_dict())
    pixel_values = normalised(pixels, statistics)
    if config.model_type != "siglip2_vision_model":
        return encoder(pixel_values).last_hidden_state
    side, rows, columns = config.patch_size, *(length // config.patch_size for length in pixels.shape[-2:])
    patches = [
        pixel_values[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(rows)
        for column in range(columns)
    ]
    patches = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in patches], dim=1)
    return encoder(
        patches,
        pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
        spatial_shapes=torch.tensor([[rows, columns]] * len(patches)),
    ).last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not pair.startswith("patch 14")])
def test_without_fusion_each_encoder_computes_what_it_was_pretrained_to(pair):
    model = without_fusion(pair)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outputs = model.mfuser(normalised(pixels, CLIP), output_hidden_states=True)
    vfm, vlm = model.mfuser.vfm.vision, model.mfuser.vlm.vision
    found = model.mfuser.vfm.final_norm(outputs.vfm_hidden_states[-1])
    torch.testing.assert_close(found, last_hidden_state(vfm, pixels), rtol=1e-4, atol=1e-4)
    found = outputs.hidden_states[-1]
    if "siglip" in vlm.config.model_type:  # whose own class returns normalised tokens
        found = vlm.post_layernorm(found)
    torch.testing.assert_close(found, last_hidden_state(vlm, pixels), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rotary_positions_of_dinov3_fit_any_grid():
    model = without_fusion("dinov3+clip")
    pixels = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    outputs = model.mfuser(normalised(pixels, CLIP), output_hidden_states=True)
    found = model.mfuser.vfm.final_norm(outputs.vfm_hidden_states[-1])
    torch.testing.assert_close(found, last_hidden_state(model.mfuser.vfm.vision, pixels), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("encoders", "tower", "class_tokens", "how"),
    [
        # DINOv2's own code resamples by a scale factor with 0.1 added to the side
        ("dinov2+clip", "vfm", 1, dict(mode="bicubic", scale_factor=(3.1 / 4, 2.1 / 4))),
        ("dinov2_with_registers+clip", "vfm", 1, dict(mode="bicubic", scale_factor=(3.1 / 4, 2.1 / 4))),
        ("dinov2+clip", "vlm", 1, dict(mode="bilinear", size=(3, 2))),
        ("dinov2+eva02_clip", "vlm", 1, dict(mode="bicubic", size=(3, 2))),
        ("dinov2+siglip", "vlm", 0, dict(mode="bilinear", size=(3, 2))),
        ("dinov2+siglip2", "vlm", 0, dict(mode="bilinear", size=(3, 2))),
    ],
)
def test_positions_are_resampled_to_the_grid_as_the_paper_does(encoders, tower, class_tokens, how):
    model = tiny_model(encoders)
    vision = getattr(model.mfuser, tower).vision
    ((_, table),) = [item for item in vision.named_parameters() if "position_embedding" in item[0]]
    table.normal_()
    original = table.detach().clone().flatten(0, -2)
    embedded = []
    vision.embeddings.register_forward_hook(lambda module, inputs, tokens: embedded.append(tokens))
    pixel_values = tiny_batch((48, 32))["pixel_values"]
    model.mfuser(pixel_values)
    table.zero_()
    model.mfuser(pixel_values)
    found = (embedded[0] - embedded[1])[0]
    maps = F.interpolate(original[class_tokens:].T.reshape(1, -1, 4, 4), align_corners=False, **how)
    torch.testing.assert_close(found[-6:], maps.flatten(2)[0].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:class_tokens], original[:class_tokens], rtol=1e-4, atol=1e-5)
    assert not found[class_tokens:-6].any()  # registers have no position


@torch.no_grad()
@pytest.mark.parametrize("pair", PAIRS)
def test_class_tokens_and_patches_are_merged_and_register_tokens_are_not(pair):
    model = tiny_model(pair)
    mfuser, config = model.mfuser, model.config
    outputs = mfuser(tiny_batch()["pixel_values"], output_hidden_states=True)
    vfm, vlm = outputs.vfm_hidden_states[-1], outputs.hidden_states[-1]
    first_patch = 1 + getattr(config.vfm_config, "num_register_tokens", 0)
    kind, vision = config.vlm_config.model_type, mfuser.vlm.vision
    if kind != "clip_vision_model":
        vfm = mfuser.vfm.final_norm(vfm)
    class_token, patches = vfm[:, :1], vfm[:, first_patch:]
    if kind.startswith("siglip"):
        merged = vision.post_layernorm(vlm) + mfuser.merge_proj(patches)
        pooled = vision.head(merged)[:, None]
        dense = torch.zeros_like(merged)
        for image, patch in [(image, patch) for image in range(2) for patch in range(merged.shape[1])]:
            vision.head.probe.copy_(merged[image, patch])  # SigLIP's own pooling, with the patch as its query
            dense[image, patch] = vision.head(merged[image : image + 1])[0]
    else:
        added = mfuser.merge_proj(torch.cat([class_token, patches], dim=1))
        if kind == "clip_vision_model":
            merged = vision.post_layernorm(vlm + added)
        else:
            merged = vision.post_layernorm(vlm) + added
        pooled, dense = mfuser.vlm.visual_projection(merged).split([1, patches.shape[1]], dim=1)
    torch.testing.assert_close(outputs.global_embedding, pooled, rtol=1e-4, atol=1e-5)
    found = outputs.dense_embedding.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("pair", "taps"), [*((pair, (1, 2, 3, 4)) for pair in PAIRS), ("six layers", (1, 3, 4, 6))])
def test_fused_maps_are_the_patches_of_both_encoders_after_each_tap(pair, taps):
    if pair == "six layers":
        six = dict(num_hidden_layers=6)
        towers = dict(vfm_config=DINOV2 | six, vlm_config=PAIRS["dinov2+clip"]["vlm_config"] | six)
        model = tiny_model(**towers, fusion_out_layers=list(taps))
    else:
        model = tiny_model(pair)
    outputs = model.mfuser(tiny_batch()["pixel_values"], output_hidden_states=True)
    first_vfm = 1 + getattr(model.config.vfm_config, "num_register_tokens", 0)
    first_vlm = 0 if "siglip" in pair else 1
    assert len(outputs.fused_maps) == 4
    for tap, fused in zip(taps, outputs.fused_maps, strict=True):
        vfm, vlm = outputs.vfm_hidden_states[tap][:, first_vfm:], outputs.hidden_states[tap][:, first_vlm:]
        for row in range(4):
            for column in range(4):
                token = row * 4 + column
                expected = torch.cat([vfm[:, token], vlm[:, token]], dim=-1)
                assert torch.equal(fused[:, :, row, column], expected)


@torch.no_grad()
@pytest.mark.parametrize("branch", ["self_attn", "mlp"])
@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov2+eva02_clip", "dinov2+siglip2", "deeper dinov2+clip"])
def test_stochastic_depth_rises_linearly_over_the_layers_of_the_vision_language_model(pair, branch):
    model = without_fusion(pair, vlm_drop_path_rate=0.3)
    for layer in model.mfuser.vlm.vision.encoder.layers:
        # one branch adds ones and the other nothing, so that what is added is 0 or 1 / (1 - rate)
        layer.self_attn.register_forward_hook(lambda module, inputs, output: (torch.zeros_like(output[0]), None))
        layer.mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        kept = getattr(layer, branch)
        kept.register_forward_hook(
            lambda module, inputs, output: (
                (torch.ones_like(output[0]), None) if isinstance(output, tuple) else torch.ones_like(output)
            )
        )
    torch.manual_seed(0)
    pixel_values = tiny_batch(batch=16)["pixel_values"]
    states = model.mfuser.train()(pixel_values, output_hidden_states=True).hidden_states
    rates = [1 - 1 / (after - before).max().item() for before, after in pairwise(states)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3], abs=1e-4)
    states = model.mfuser.eval()(pixel_values, output_hidden_states=True).hidden_states
    for before, after in pairwise(states):
        torch.testing.assert_close(after - before, torch.ones_like(before))


@torch.no_grad()
def test_the_vision_foundation_model_drops_nothing():
    model, pixel_values = without_fusion("dinov2+clip", vlm_drop_path_rate=0.9), tiny_batch()["pixel_values"]
    expected = model.mfuser(pixel_values, output_hidden_states=True).vfm_hidden_states[-1]
    found = model.mfuser.train()(pixel_values, output_hidden_states=True).vfm_hidden_states[-1]
    torch.testing.assert_close(found, expected)


def test_every_norm_has_the_published_epsilon():
    """Checked directly, since a wrong epsilon would hardly change the outputs."""
    model = tiny_model("dinov2+clip")
    encoders = {id(module) for tower in (model.mfuser.vfm, model.mfuser.vlm) for module in tower.modules()}
    norms = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.RMSNorm)
    added = [module for module in model.modules() if isinstance(module, norms) and id(module) not in encoders]
    assert {type(module) for module in added} == set(norms)
    assert {module.eps for module in added} == {1e-5}
    for tower, eps in ((model.mfuser.vfm, 1e-6), (model.mfuser.vlm, 1e-5)):
        assert {module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)} == {eps}


def test_siglip2s_embeddings_are_exported_for_any_height_and_width():
    embeddings = tiny_model("dinov2+siglip2").mfuser.vlm.vision.embeddings
    sides = {2: torch.export.Dim("height", min=32), 3: torch.export.Dim("width", min=32)}
    program = torch.export.export(embeddings, (torch.randn(1, 3, 72, 104),), dynamic_shapes=(sides,)).module()
    for size in ((64, 64), (65, 90), (128, 48)):
        pixels = torch.randn(1, 3, *size)
        torch.testing.assert_close(program(pixels), embeddings(pixels), rtol=1e-4, atol=1e-5)
