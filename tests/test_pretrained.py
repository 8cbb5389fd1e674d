"""Models of two pretrained encoders: resampled weights, tokenized class names, and refused combinations."""

import logging
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, FUSION, tiny_batch, tiny_tokenizer
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from mfuser import MFuserForSemanticSegmentation, MFuserModel
from mfuser.configuration_eva02_clip import Eva02ClipConfig
from mfuser.modeling_eva02_clip import Eva02ClipModel

TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
DINOV2 = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=42, patch_size=14)
CLIP_TEXT = dict(TOWER, num_hidden_layers=2, max_position_embeddings=16, bos_token_id=49406, eos_token_id=49407)
SIGLIP_TEXT = dict(TOWER, num_hidden_layers=2, max_position_embeddings=16, vocab_size=32, projection_size=32)
# grids of 3 x 3 at patch 14, so that positions and kernels are resampled for a crop of 64 at patch 16
VFMS = {
    "dinov2": lambda **values: Dinov2Model(Dinov2Config(**DINOV2 | values)),
    "registers": lambda **values: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINOV2 | values)),
    "dinov3": lambda **values: DINOv3ViTModel(
        DINOv3ViTConfig(**TOWER | dict(image_size=42, patch_size=14, num_register_tokens=4) | values)
    ),
}


def clip_like(config_class, model_class, text, vision, **values):
    return model_class(config_class(text_config=text, vision_config=vision | values, projection_dim=24))


VLMS = {
    "clip": lambda **values: clip_like(
        CLIPConfig, CLIPModel, CLIP_TEXT, dict(TOWER, image_size=42, patch_size=14), **values
    ),
    "eva02_clip": lambda **values: clip_like(
        Eva02ClipConfig,
        Eva02ClipModel,
        CLIP_TEXT,
        dict(TOWER, image_size=42, patch_size=14, rope_pretrained_grid=3),
        **values,
    ),
    "siglip": lambda **values: SiglipModel(
        SiglipConfig(text_config=SIGLIP_TEXT, vision_config=TOWER | dict(image_size=42, patch_size=14) | values)
    ),
    "siglip2": lambda **values: Siglip2Model(
        Siglip2Config(text_config=SIGLIP_TEXT, vision_config=TOWER | dict(num_patches=9, patch_size=14) | values)
    ),
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Returns a function from kind and sizes to a cached (folder of a tiny encoder with its tokenizer, encoder)."""
    made = {}

    def get(kind, **values):
        key = (kind, *sorted(values.items()))
        if key not in made:
            torch.manual_seed(len(made))
            model = (VFMS | VLMS)[kind](**values).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "position" in name or "logit" in name or "class_embedding" in name:
                        parameter.normal_()
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            if kind in VLMS:
                tiny_tokenizer(clip="siglip" not in kind).save_pretrained(folder)
            made[key] = folder, model
        return made[key]

    return get


def build(vfm, vlm, class_names=CLASSES, crop_size=64, **fields):
    return MFuserForSemanticSegmentation.from_vfm_vlm_pretrained(
        str(vfm), str(vlm), class_names, crop_size=crop_size, **FUSION | fields
    )


def resampled(positions, num_class_tokens, grid, mode):
    """Resamples positions (c + g * g, C) to (c + grid * grid, C); class positions are kept."""
    kept, patches = positions[:num_class_tokens], positions[num_class_tokens:]
    side = math.isqrt(len(patches))
    maps = patches.T.reshape(1, -1, side, side)
    maps = F.interpolate(maps, size=(grid, grid), mode=mode, align_corners=False)
    return torch.cat([kept, maps.flatten(2)[0].T])


@pytest.mark.parametrize("vlm", VLMS)
@pytest.mark.parametrize("vfm", VFMS)
def test_every_pair_keeps_its_weights_and_trains(vfm, vlm, pretrained):
    (vfm_folder, vfm_model), (vlm_folder, vlm_model) = pretrained(vfm), pretrained(vlm)
    patch = 14 if vlm == "eva02_clip" else 16
    model = build(vfm_folder, vlm_folder)
    assert model.config.patch_size == patch and not model.training
    towers = [(model.mfuser.vfm.vision, vfm_model), (model.mfuser.vlm.vision, vlm_model.vision_model)]
    towers.append((model.mfuser.vlm.text, vlm_model.text_model))
    for ours, theirs in towers:
        given = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            if tensor.shape == given[name].shape and not name.endswith("position_embedding.weight"):
                assert torch.equal(tensor, given[name]), name
            else:
                assert "position" in name or "patch_embed" in name, name
    for name in ("visual_projection", "text_projection"):
        if hasattr(vlm_model, name):
            for ours, theirs in zip(
                getattr(model.mfuser.vlm, name).parameters(), getattr(vlm_model, name).parameters(), strict=True
            ):
                assert torch.equal(ours, theirs)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trainable if name.startswith(("mfuser.vfm.", "mfuser.vlm."))]
    outputs = model.train()(**tiny_batch())
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable


@pytest.mark.parametrize("vfm", ["dinov2", "registers"])
def test_dinov2_is_resampled_bicubically(vfm, pretrained):
    folder, original = pretrained(vfm)
    embeddings = build(folder, pretrained("clip")[0]).mfuser.vfm.vision.embeddings
    expected = resampled(original.embeddings.position_embeddings[0], 1, 4, "bicubic")
    torch.testing.assert_close(embeddings.position_embeddings[0], expected)
    kernel = original.embeddings.patch_embeddings.projection.weight
    expected = F.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(embeddings.patch_embeddings.projection.weight, expected)


def test_dinov3s_kernel_is_resampled_bicubically(pretrained):
    folder, original = pretrained("dinov3")
    embeddings = build(folder, pretrained("clip")[0]).mfuser.vfm.vision.embeddings
    kernel = original.embeddings.patch_embeddings.weight
    expected = F.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(embeddings.patch_embeddings.weight, expected)


def test_clip_is_resampled_bilinearly_and_its_class_embedding_counts_twice(pretrained):
    folder, original = pretrained("clip")
    ours, theirs = (
        build(pretrained("dinov2")[0], folder).mfuser.vlm.vision.embeddings,
        original.vision_model.embeddings,
    )
    expected = resampled(theirs.position_embedding.weight, 1, 4, "bilinear")
    expected = torch.cat([expected[:1] + theirs.class_embedding, expected[1:]])
    torch.testing.assert_close(ours.position_embedding.weight, expected)
    expected = F.interpolate(theirs.patch_embedding.weight, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours.patch_embedding.weight, expected)


def test_siglip_is_resampled_bilinearly(pretrained):
    folder, original = pretrained("siglip")
    ours, theirs = (
        build(pretrained("dinov2")[0], folder).mfuser.vlm.vision.embeddings,
        original.vision_model.embeddings,
    )
    torch.testing.assert_close(
        ours.position_embedding.weight, resampled(theirs.position_embedding.weight, 0, 4, "bilinear")
    )
    expected = F.interpolate(theirs.patch_embedding.weight, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours.patch_embedding.weight, expected)


def test_siglip2s_linear_kernel_is_resampled_as_an_image(pretrained):
    folder, original = pretrained("siglip2")
    ours, theirs = (
        build(pretrained("dinov2")[0], folder).mfuser.vlm.vision.embeddings,
        original.vision_model.embeddings,
    )
    for row in (0, 31):  # rows, columns and channels of one output
        kernel = theirs.patch_embedding.weight[row].reshape(14, 14, 3).permute(2, 0, 1)[None]
        expected = F.interpolate(kernel, size=(16, 16), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        torch.testing.assert_close(ours.patch_embedding.weight[row], expected.flatten())


def test_eva02_clip_keeps_its_patch_and_is_resampled_bicubically(pretrained):
    folder, original = pretrained("eva02_clip")
    model = build(pretrained("dinov2")[0], folder, crop_size=60)  # four patches of 14, four pixels over
    ours, theirs = model.mfuser.vlm.vision.embeddings, original.vision_model.embeddings
    torch.testing.assert_close(
        ours.position_embedding.weight, resampled(theirs.position_embedding.weight, 1, 4, "bicubic")
    )
    assert torch.equal(ours.patch_embedding.weight, theirs.patch_embedding.weight)
    assert model.config.text_prompt_length == 8
    assert model(**tiny_batch((60, 60))).loss.isfinite()


@pytest.mark.parametrize(
    ("num_layers", "taps"),
    [
        (4, [1, 2, 3, 4]),
        (6, [2, 3, 4, 6]),
        pytest.param(12, [4, 6, 8, 12], marks=pytest.mark.slow),
        pytest.param(24, [8, 12, 16, 24], marks=pytest.mark.slow),
    ],
)
def test_taps_and_stride_are_the_papers_at_any_depth_and_crop(num_layers, taps, pretrained):
    folders = [str(pretrained(kind, num_hidden_layers=num_layers)[0]) for kind in ("dinov2", "clip")]
    fields = {name: value for name, value in FUSION.items() if name != "fusion_out_layers"}
    for crop_size, stride in ((512, 341), (64, 43)):
        config = MFuserForSemanticSegmentation.from_vfm_vlm_pretrained(
            *folders, CLASSES, crop_size=crop_size, **fields
        ).config
        assert config.fusion_out_layers == taps
        assert (config.crop_size, config.crop_stride) == (crop_size, stride)
        assert config.vfm_config.image_size == config.vlm_config.image_size == crop_size


def test_encoders_saved_in_half_precision_are_loaded_in_float32(pretrained, tmp_path):
    VLMS["clip"]().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = build(pretrained("dinov2")[0], tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("vlm", ["clip", "siglip"])
def test_patch_14_on_crops_that_are_no_multiple_of_it(vlm, pretrained):
    model = build(pretrained("dinov2")[0], pretrained(vlm)[0], crop_size=60, patch_size=14)
    outputs = model(**tiny_batch((60, 60)))
    assert outputs.logits.shape == (2, 4, 60, 60) and outputs.loss.isfinite()
    assert outputs.score_map.shape[-2:] == (4, 4)


@pytest.mark.parametrize(("vlm", "length"), [("clip", 10), ("eva02_clip", 13), ("siglip", 10)])
def test_text_positions_are_the_first_of_the_table(vlm, length, pretrained):
    folder, original = pretrained(vlm)
    table = build(pretrained("dinov2")[0], folder).mfuser.vlm.text.embeddings.position_embedding.weight
    assert torch.equal(table, original.text_model.embeddings.position_embedding.weight[:length])


@pytest.mark.parametrize("vlm", ["siglip", "siglip2"])
def test_siglips_own_logit_scale_and_bias_scale_its_score_map(vlm, pretrained):
    folder, original = pretrained(vlm)
    config = build(pretrained("dinov2")[0], folder).config
    assert config.loss_logit_scale == pytest.approx(original.logit_scale.item())
    assert config.loss_logit_bias == pytest.approx(original.logit_bias.item())


def test_class_names_become_tokens(pretrained):
    vfm = pretrained("dinov2")[0]
    words = tiny_tokenizer().get_vocab()
    names = ["road", "traffic light", "way of life"]
    clip = build(vfm, pretrained("clip")[0], names).config
    assert clip.class_token_ids == [
        [49406, words["road"], 49407, 0, 0],
        [49406, words["traffic"], words["light"], 49407, 0],
        [49406, words["way"], words["of"], words["life"], 49407],
    ]
    assert list(clip.id2label.values()) == names and clip.label2id["way of life"] == 2
    siglip = build(vfm, pretrained("siglip")[0], names).config
    end, pad = 2, 1
    assert siglip.class_token_ids == [
        [words["road"], end, pad, pad, pad],
        [words["traffic"], words["light"], end, pad, pad],
        [words["way"], words["of"], words["life"], end, pad],
    ]


def test_names_that_need_more_tokens_say_how_many(pretrained):
    vfm, vlm = pretrained("dinov2")[0], pretrained("clip")[0]
    names = ["road", "way of life light"]
    with pytest.raises(ValueError, match="longer than 5 tokens: 'way of life light' needs 6; .*class_token_length=6"):
        build(vfm, vlm, names)
    config = build(vfm, vlm, names, class_token_length=6).config
    assert len(config.class_token_ids[0]) == 6 and config.text_config.max_position_embeddings == 11


@pytest.mark.parametrize("names", [["road", "Road"], ["road", ""], "road", []])
def test_class_names_that_repeat_or_are_empty_are_refused(names):
    with pytest.raises(ValueError, match="it must be a list of different, non-empty names"):
        MFuserModel.from_vfm_vlm_pretrained("vfm", "vlm", names)


def test_encoders_of_different_depth_are_paired(pretrained):
    vfm, _ = pretrained("dinov2", num_hidden_layers=6)
    model = build(vfm, pretrained("clip")[0])
    assert model.config.fusion_layer_pairs == [[2, 1], [3, 2], [5, 3], [6, 4]]
    assert len(model.mfuser.fusion_layers) == 4 and model(**tiny_batch()).loss.isfinite()


def test_encoders_of_different_width_are_projected(pretrained):
    vfm, _ = pretrained("dinov2", hidden_size=48)
    model = build(vfm, pretrained("siglip")[0])
    assert model.config.fusion_project_vfm and model.mfuser.merge_proj.weight.shape == (32, 48)
    assert model(**tiny_batch()).loss.isfinite()


def test_what_was_resampled_is_reported(pretrained, caplog):
    vfm, vlm = pretrained("dinov2")[0], pretrained("clip")[0]
    logger = logging.getLogger("mfuser.pretrained_mfuser")
    logger.addHandler(caplog.handler)
    try:
        build(vfm, vlm)
    finally:
        logger.removeHandler(caplog.handler)
    for line in (
        "- vision foundation model: positions 1x10x32 to 1x17x32, bicubic",
        "- vision foundation model: patch kernel 32x3x14x14 to 32x3x16x16, bicubic",
        "- vision-language model: positions 10x32 to 17x32, bilinear",
        "- vision-language model: patch kernel 32x3x14x14 to 32x3x16x16, bilinear",
        "- text encoder: the first 10 of 16 positions",
        "- CLIP's class embedding was added to its position once more, as in the published code",
        "its fusion and decoder are newly initialised and need training",
    ):
        assert line in caplog.text


def test_saved_and_loaded_it_is_the_same_model(pretrained, tmp_path):
    model, pixel_values = build(pretrained("registers")[0], pretrained("siglip2")[0]), tiny_batch()["pixel_values"]
    model.save_pretrained(tmp_path)
    loaded = MFuserForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits)


# --- invalid combinations ------------------------------------------------------------------------------------------


def test_other_encoders_are_refused(pretrained):
    vfm, vlm = pretrained("dinov2")[0], pretrained("clip")[0]
    with pytest.raises(ValueError, match="has model type 'clip'; the vision foundation model must be one of dinov2,"):
        build(vlm, vlm)
    with pytest.raises(ValueError, match="has model type 'dinov2'; the vision-language model must be one of clip,"):
        build(vfm, vfm, tokenizer=tiny_tokenizer())


def test_a_siglip_without_pooling_head_is_refused(pretrained):
    vlm, _ = pretrained("siglip", vision_use_head=False)
    with pytest.raises(ValueError, match="vision_use_head is False; SigLIP must have its pooling head"):
        build(pretrained("dinov2")[0], vlm)


def test_too_few_text_positions_are_refused(pretrained):
    vfm, vlm = pretrained("dinov2")[0], pretrained("clip")[0]
    with pytest.raises(ValueError, match="12 context vectors and 5 class tokens are 17 positions; .* has 16"):
        build(vfm, vlm, text_prompt_length=12)


def test_misspelt_settings_are_refused(pretrained):
    with pytest.raises(ValueError, match="no field 'decoder_num_layer'; did you mean 'decoder_num_layers'?"):
        build(pretrained("dinov2")[0], pretrained("clip")[0], decoder_num_layer=3)


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("dinov2", "layernorm.weight"),
        ("clip", "visual_projection.weight"),
        ("siglip", "logit_scale"),
        ("eva02_clip", "text_model.final_layer_norm.bias"),
    ],
)
def test_weights_missing_from_the_files_are_refused(kind, lost, pretrained, tmp_path):
    (VFMS | VLMS)[kind]().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    vfm, vlm = (tmp_path, pretrained("clip")[0]) if kind in VFMS else (pretrained("dinov2")[0], tmp_path)
    with pytest.raises(ValueError, match=f"lacks weights of a {kind}: .*{lost}"):
        build(vfm, vlm, tokenizer=tiny_tokenizer())
