"""MFuserConfig survives saving and loading, refuses invalid values, and defaults to the paper's full-size model."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import CLIP, CLIP_TOKENS, DINOV2, EVA02, PAIRS, SIGLIP, TEXT, VISION, tiny_config, tiny_model

from mfuser import MFuserConfig, MFuserForSemanticSegmentation
from mfuser.class_names_mfuser import CITYSCAPES_CLASSES
from mfuser.configuration_mfuser import evenly_paired
from mfuser.evaluation.large_images import label_map_by_bands

FIXTURES = Path(__file__).parent / "fixtures"
ENCODERS = ("vfm_config", "vlm_config", "text_config")


def fields(config: MFuserConfig) -> dict:
    """Returns the fields as JSON, without those that are added by saving."""
    return {
        name: value
        for name, value in json.loads(config.to_json_string(use_diff=False)).items()
        if name not in ("transformers_version", "architectures", "_name_or_path")
    }


@pytest.mark.parametrize("pair", PAIRS)
def test_a_configuration_survives_every_way_of_saving_and_loading(pair, tmp_path):
    config = tiny_config(pair, vlm_drop_path_rate=0.25, loss_mask_weight=3, windows_per_batch=2)
    config.save_pretrained(tmp_path)
    ways = {
        "save_pretrained": MFuserConfig.from_pretrained(tmp_path),
        "from_json_file": MFuserConfig.from_json_file(tmp_path / "config.json"),
        "from_dict": MFuserConfig.from_dict(config.to_dict()),
        "to_dict": MFuserConfig(**config.to_dict()),
        "to_diff_dict": MFuserConfig(**config.to_diff_dict()),
        "JSON": MFuserConfig(**json.loads(config.to_json_string())),
        "deepcopy": copy.deepcopy(config),
    }
    for way, again in ways.items():
        assert fields(again) == fields(config), way
        for name in ENCODERS:
            assert type(getattr(again, name)) is type(getattr(config, name)), (way, name)
        assert again.id2label == config.id2label and again.layer_pairs == config.layer_pairs, way


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # fusion
        (
            dict(fusion_out_layers=[1, 2, 3, 5]),
            r"fusion_out_layers is [1, 2, 3, 5]; it must be four ascending numbers",
        ),
        (dict(fusion_out_layers=[0, 1, 2, 3]), "from 1 to 4"),
        (dict(fusion_out_layers=[2, 1, 3, 4]), "four ascending numbers"),
        (dict(fusion_out_layers=[1, 2, 2, 4]), "four ascending numbers"),
        (dict(fusion_out_layers=[1, 2, 4]), "four ascending numbers"),
        (dict(fusion_out_layers=["1", "2", "3", "4"]), "four ascending numbers"),
        (
            dict(vfm_config=DINOV2 | dict(num_hidden_layers=6)),
            "give the layers that an MVFuser follows, for example fusion_layer_pairs=[[2, 1], [3, 2], [5, 3], [6, 4]]",
        ),
        (dict(fusion_layer_pairs=[[1, 1], [2, 2], [3, 3], [5, 4]]), "ends with [5, 4]; the encoders have 4 and 4"),
        (dict(fusion_layer_pairs=[[1, 1], [2, 2], [3, 3], [4, 5]]), "ends with [4, 5]; the encoders have 4 and 4"),
        (
            dict(fusion_layer_pairs=[[2, 1], [1, 2], [3, 3], [4, 4]]),
            "fusion_layer_pairs contains [1, 2]; it must hold ascending pairs",
        ),
        (
            dict(fusion_layer_pairs=[[0, 1], [2, 2], [3, 3], [4, 4]]),
            "fusion_layer_pairs contains [0, 1]; it must hold ascending pairs",
        ),
        (dict(fusion_layer_pairs=[1, 2, 3, 4]), "fusion_layer_pairs contains 1; it must hold ascending pairs"),
        (dict(fusion_layer_pairs=[[1, 1], [2, 2], [4, 4]]), "from 1 to 3, the number of fused layers"),
        (
            dict(vfm_config=DINOV2 | dict(hidden_size=48), fusion_project_vfm=False),
            "fusion_project_vfm is False; it must be True for encoders of different width, 48 and 32",
        ),
        (dict(fusion_conv_kernel=4), "fusion_conv_kernel is 4; it must be odd"),
        (dict(fusion_conv_kernel=-1), "fusion_conv_kernel is -1; it must be at least 1"),
        (dict(fusion_dropout=1.0), "fusion_dropout is 1.0; it must be in [0, 1)"),
        (dict(vlm_drop_path_rate=-0.1), "vlm_drop_path_rate is -0.1; it must be in [0, 1)"),
        (dict(enhancer_hidden_size=33, enhancer_num_heads=3), "must be even"),
        # encoders
        (dict(vfm_config=DINOV2 | dict(patch_size=8)), "vfm_config.patch_size is 8 and vlm_config.patch_size 16"),
        (dict(vfm_config=DINOV2 | dict(num_attention_heads=3)), "vfm_config.hidden_size (32) must be divisible"),
        (dict(vfm_config=dict(model_type="vit")), "model_type of an encoder is 'vit'; it must be one of dinov2,"),
        (
            dict(vfm_config=CLIP["vlm_config"]),
            "vfm_config.model_type is 'clip_vision_model'; it must be one of dinov2,",
        ),
        (dict(vlm_config=DINOV2), "vlm_config.model_type is 'dinov2'; it must be one of clip_vision_model,"),
        (
            dict(text_config=TEXT | dict(model_type="siglip_text_model")),
            "the text encoder of a 'clip_vision_model' is a 'clip_text_model'",
        ),
        (
            PAIRS["dinov2+siglip"]
            | dict(vlm_config=VISION | dict(model_type="siglip_vision_model", vision_use_head=False)),
            "vision_use_head is False; SigLIP must have its pooling head",
        ),
        (
            PAIRS["dinov2+siglip"] | dict(text_config=SIGLIP["text_config"] | dict(projection_size=24)),
            "text_config.projection_size is 24; it must be vlm_config.hidden_size (32)",
        ),
        # class names
        (
            dict(class_token_ids=None),
            "class_token_ids is missing; give one row of token ids for each of the 4 classes",
        ),
        (dict(class_token_ids=CLIP_TOKENS[:3]), "3 rows, but the model has 4 labels (road, sky, car, ...)"),
        (
            dict(class_token_ids=[*CLIP_TOKENS[:3], [49406, 49407]]),
            "[2, 5] ids; all rows must have the same length",
        ),
        (dict(class_token_ids=[*CLIP_TOKENS[:3], [49408] * 5]), "ids must lie between 0 and 49407"),
        (dict(class_token_ids=[*CLIP_TOKENS[:3], [-1] * 5]), "ids must lie between 0 and 49407"),
        (
            dict(class_token_ids=[*CLIP_TOKENS[:3], []]),
            "contains []; it must hold a list of token ids",
        ),
        (
            dict(class_token_ids=[*CLIP_TOKENS[:3], "person"]),
            "contains 'person'; it must hold a list of token ids",
        ),
        (dict(class_token_ids=[[7] * 6] * 4), "need 11 positions; text_config.max_position_embeddings is 10"),
        (dict(text_prompt_length=6), "text_prompt_length (6) and the class tokens need 11 positions"),
        (dict(text_prompt_length=-1), "text_prompt_length is -1"),
        (dict(id2label={0: "road", 1: "sky"}), "class_token_ids has 4 rows, but the model has 2 labels (road, sky)"),
        (dict(id2label=dict(enumerate("abcd", start=1))), "id2label has the keys [1, 2, 3, 4]; they must be 0 to 3"),
        # decoder
        (dict(decoder_hidden_size=80), "decoder_hidden_size is 80; it must be a multiple of 32, at least 64"),
        (dict(decoder_hidden_size=32), "decoder_hidden_size is 32; it must be a multiple of 32, at least 64"),
        (dict(decoder_num_heads=3), "decoder_hidden_size (64) must be divisible by decoder_num_heads (3)"),
        (dict(enhancer_num_heads=3), "enhancer_hidden_size (32) must be divisible by enhancer_num_heads (3)"),
        *(
            ({name: value}, f"{name} is {value}; it must be at least 1")
            for name, value in [
                ("decoder_num_heads", 0),
                ("enhancer_num_heads", -2),
                ("decoder_num_layers", 0),
                ("decoder_pixel_layers", 0),
                ("decoder_num_points", 0),
                ("enhancer_num_layers", 0),
                ("fusion_state_size", 0),
                ("loss_num_points", 0),
                ("windows_per_batch", 0),
            ]
        ),
        # losses
        (dict(loss_logit_scale=1.0), "loss_logit_scale is 1.0 and loss_logit_bias None; give both or neither"),
        (dict(loss_logit_bias=1.0), "loss_logit_scale is None and loss_logit_bias 1.0; give both or neither"),
        (dict(semantic_loss_ignore_index=2), "semantic_loss_ignore_index is 2, the label of 'car'"),
        (dict(loss_temperature=0.0), "loss_temperature is 0.0; it must be positive"),
        (dict(loss_dice_weight=-1.0), "loss_dice_weight is -1.0; it must not be negative"),
        (dict(loss_importance_ratio=1.5), "loss_importance_ratio is 1.5; it must be in [0, 1]"),
        (dict(loss_oversample_ratio=0.5), "loss_oversample_ratio is 0.5; it must be at least 1"),
        # crops
        (dict(crop_stride=65), "crop_stride is 65; it must be between 1 and crop_size (64)"),
        (dict(crop_stride=0), "crop_stride is 0; it must be between 1 and crop_size (64)"),
        (dict(crop_size=15, crop_stride=15), "crop_size is 15; it must be at least patch_size (16)"),
        # names
        (
            dict(decoder_num_layer=3),
            "MFuserConfig has no field 'decoder_num_layer'; did you mean 'decoder_num_layers'?",
        ),
        (dict(text_zzz=3), "MFuserConfig has no field 'text_zzz'"),
        (dict(crop_sise=64), "MFuserConfig has no field 'crop_sise'; did you mean 'crop_size'?"),
        (dict(freeze_encoder=True), "MFuserConfig has no field 'freeze_encoder'; did you mean 'freeze_encoders'?"),
        (
            dict(vfm_config=DINOV2 | dict(hiden_size=32)),
            "vfm_config (dinov2) has no field 'hiden_size'; did you mean 'hidden_size'?",
        ),
        (
            dict(text_config=TEXT | dict(model_type="clip_text_model", num_layers=2)),
            "text_config (clip_text_model) has no field 'num_layers'",
        ),
        # numbers
        (dict(num_labels=7), "num_labels is 7, but id2label has 4 labels"),
        (dict(loss_temperature=math.nan), "loss_temperature is nan; it must be a finite number"),
        (dict(loss_mask_weight=math.inf), "loss_mask_weight is inf; it must be a finite number"),
        (dict(initializer_range=-1.0), "initializer_range is -1.0; it must not be negative"),
        (
            dict(vfm_config=DINOV2 | dict(patch_size=0)),
            "vfm_config.patch_size is 0; it must be an integer of at least",
        ),
        (dict(vfm_config=DINOV2 | dict(patch_size=[16, 16])), "vfm_config.patch_size is [16, 16]; it must be an"),
        (dict(vfm_config=DINOV2 | dict(hidden_size=0)), "vfm_config.hidden_size is 0; it must be an integer of at"),
    ],
)
def test_invalid_values_are_refused_with_the_accepted_ones(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(decoder_num_layers="9"),
        dict(crop_size=64.0),
        dict(freeze_encoders="no"),
        dict(loss_mask_weight="heavy"),
        dict(fusion_out_layers=4),
        dict(class_token_ids="road"),
        dict(vfm_config="facebook/dinov2-large"),
    ],
)
def test_values_of_another_type_are_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
        tiny_config(**changes)


def test_values_set_after_construction_are_checked_by_the_model():
    config = tiny_config()
    config.fusion_out_layers = [4, 3, 2, 1]
    with pytest.raises(ValueError, match="four ascending numbers"):
        MFuserForSemanticSegmentation(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("crop_stride", 0, "crop_stride is 0; it must be between 1 and crop_size (64)"),
        ("crop_stride", 65, "crop_stride is 65; it must be between 1 and crop_size (64)"),
        ("crop_size", 15, "crop_size is 15; it must be at least patch_size (16)"),
        ("windows_per_batch", -1, "windows_per_batch is -1; it must be at least 1"),
    ],
)
def test_windows_set_after_loading_are_checked_when_an_image_is_segmented(name, value, message):
    model = tiny_model()
    setattr(model.config, name, value)
    image = torch.zeros(1, 3, 96, 80)
    with pytest.raises(ValueError, match=re.escape(message)), torch.no_grad():
        model(image)
    with pytest.raises(ValueError, match=re.escape(message)):
        label_map_by_bands(model, lambda rows: image[:, :, rows], (96, 80))


def test_fields_of_other_versions_in_a_saved_configuration_are_accepted():
    saved = tiny_config().to_dict()
    saved["vfm_config"]["a_field_of_another_version"] = 1
    config = MFuserConfig.from_dict(saved | {"a_field_of_another_library": 1})
    assert config.vfm_config.hidden_size == 32
    with pytest.raises(ValueError, match="no field 'decoder_num_layer'"):
        MFuserConfig.from_dict(saved | {"decoder_num_layer": 1})


def test_encoders_of_different_depth_can_be_paired_evenly():
    for depths in ((24, 12), (12, 24), (6, 4), (40, 24), (5, 5)):
        pairs = evenly_paired(*depths)
        assert len(pairs) == min(depths) and tuple(pairs[-1]) == depths
        for depth, layers in zip(depths, zip(*pairs, strict=True), strict=True):
            steps = [after - before for before, after in zip((0, *layers), layers, strict=False)]
            assert min(steps) >= 1 and max(steps) <= math.ceil(depth / min(depths))


def test_a_model_of_stored_class_embeddings_needs_no_token_ids():
    assert tiny_config(use_text_encoder=False, class_token_ids=None).class_token_ids is None


def test_settings_that_differ_between_the_papers_variants_follow_the_encoder():
    clip, eva02, wider = (tiny_config(pair) for pair in ("dinov2+clip", "dinov2+eva02_clip", "wider dinov2+siglip"))
    assert (clip.fusion_project_vfm, eva02.fusion_project_vfm, wider.fusion_project_vfm) == (True, False, True)
    assert (clip.vlm_drop_path_rate, eva02.vlm_drop_path_rate) == (0.1, 0.0)


def test_cityscapes_names_come_with_their_tokens():
    for config in (
        MFuserConfig(),
        MFuserConfig(vfm_config=DINOV2, fusion_out_layers=[1, 2, 3, 4], **without_tokens(EVA02)),
    ):
        assert tuple(config.id2label.values()) == CITYSCAPES_CLASSES and config.num_labels == 19
        assert config.class_token_ids[0] == [49406, 1759, 49407, 0, 0]
        assert config.class_token_ids[6] == [49406, 3399, 1395, 49407, 0]
        assert config.label2id["bicycle"] == 18


def without_tokens(encoders: dict) -> dict:
    return {name: value for name, value in encoders.items() if name != "class_token_ids"}


def test_the_default_is_the_papers_full_size_clip_variant():
    with torch.device("meta"):
        model = MFuserForSemanticSegmentation(MFuserConfig())
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert round(total / 1e6, 1) == 902.8
    assert trainable == 170_059_629
    # the published file without the tensors of the pretraining and the statistics of BatchNorm
    published = json.loads((FIXTURES / "full_size_keys_clip.json").read_text())
    sizes = {key: math.prod(shape) for key, (shape, _, _) in published.items()}
    unlearned = [
        key for key in sizes if key.endswith(("mask_token", "running_mean", "running_var", "batches_tracked"))
    ]
    assert total == sum(sizes.values()) - sum(sizes[key] for key in unlearned)
    assert trainable == sum(sizes[key] for key, (_, _, trains) in published.items() if trains)


def test_the_configuration_has_what_other_libraries_read():
    config = tiny_config()
    assert config.hidden_size == config.decoder_hidden_size == 64
    assert config.get_text_config().model_type == "clip_text_model"
    assert set(config.sub_configs) == set(ENCODERS)
    outputs = set(MFuserForSemanticSegmentation(config)(torch.zeros(1, 3, 64, 64), output_hidden_states=True))
    assert outputs - set(config.keys_to_ignore_at_inference) == {"logits"}
