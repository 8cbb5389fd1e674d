"""The authors' MFuser checkpoints (`.pth`, mmsegmentation's format) to folders that Transformers loads.

    mfuser convert mfuser-clip-gta.pth --output mfuser-clip-gta

The folder holds weights, configuration, image processor, code and model card. Every tensor of the checkpoint is
accounted for: converted, or dropped by name for a reason that is printed.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, SiglipModel

from mfuser.class_names_mfuser import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_CLIP_TOKENS,
    CLIP_END_TOKEN,
    CLIP_START_TOKEN,
    class_token_ids,
    clip_token_row,
)
from mfuser.configuration_mfuser import MFuserConfig
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.pretrained_mfuser import load_encoder
from mfuser.scripts import convert_eva02_clip
from mfuser.scripts.convert_eva02_clip import (
    convert_text_tensor,
    convert_vision_tensor,
    dropped_vision_reason,
    eva02_clip_text_config_from_state_dict,
    eva02_clip_vision_config_from_state_dict,
    is_eva02_clip_state_dict,
    read_state_dict,
)
from mfuser.scripts.model_card import write_model_card

StateDict = dict[str, torch.Tensor]

# Patterns of the authors' names, and ours. `{}` stands for q, k and v of a packed projection. DINOv2's names are those
# of Transformers' files, which every version reads, whatever it calls the tensors in memory.
WEIGHT = r"(weight|bias)"
SHARED_NAMES = {
    r"contexts": "mfuser.prompts",
    r"gamma": "mfuser.enhancer.gamma",
    # DINOv2
    r"backbone\.dinov2\.cls_token": "mfuser.vfm.vision.embeddings.cls_token",
    r"backbone\.dinov2\.pos_embed": "mfuser.vfm.vision.embeddings.position_embeddings",
    rf"backbone\.dinov2\.patch_embed\.proj\.{WEIGHT}": r"mfuser.vfm.vision.embeddings.patch_embeddings.projection.\1",
    rf"backbone\.dinov2\.blocks\.(\d+)\.(norm[12])\.{WEIGHT}": r"mfuser.vfm.vision.encoder.layer.\1.\2.\3",
    rf"backbone\.dinov2\.blocks\.(\d+)\.attn\.qkv\.{WEIGHT}": (
        r"mfuser.vfm.vision.encoder.layer.\1.attention.attention.{}.\2"
    ),
    rf"backbone\.dinov2\.blocks\.(\d+)\.attn\.proj\.{WEIGHT}": (
        r"mfuser.vfm.vision.encoder.layer.\1.attention.output.dense.\2"
    ),
    rf"backbone\.dinov2\.blocks\.(\d+)\.mlp\.(fc[12])\.{WEIGHT}": r"mfuser.vfm.vision.encoder.layer.\1.mlp.\2.\3",
    r"backbone\.dinov2\.blocks\.(\d+)\.ls([12])\.gamma": r"mfuser.vfm.vision.encoder.layer.\1.layer_scale\2.lambda1",
    rf"backbone\.dinov2\.norm\.{WEIGHT}": r"mfuser.vfm.vision.layernorm.\1",
    # fusion and pyramid
    r"backbone\.adapter\.(\d+)\.conv1d_([xz])\.weight": r"mfuser.fusion_layers.\1.mvfuser.conv_\2.weight",
    r"backbone\.adapter\.(\d+)\.dt_proj\.bias": r"mfuser.fusion_layers.\1.mvfuser.dt_bias",
    r"backbone\.adapter\.(\d+)\.(A_log|D|scale|[a-z_]+\.weight)": r"mfuser.fusion_layers.\1.mvfuser.\2",
    rf"backbone\.adapter_proj1\.(\d+)\.{WEIGHT}": r"mfuser.fusion_layers.\1.vfm_in_proj.\2",
    rf"backbone\.adapter_proj2\.(\d+)\.{WEIGHT}": r"mfuser.fusion_layers.\1.vfm_out_proj.\2",
    rf"backbone\.adapter_proj3\.{WEIGHT}": r"mfuser.merge_proj.\1",
    r"backbone\.fpn1\.([013]\.[a-z_]+)": r"mfuser.pyramid.stride4.\1",
    rf"backbone\.fpn2\.0\.{WEIGHT}": r"mfuser.pyramid.stride8.\1",
    # MTEnhancer
    rf"context_decoder\.memory_proj\.0\.{WEIGHT}": r"mfuser.enhancer.visual_in_norm.\1",
    rf"context_decoder\.memory_proj\.1\.{WEIGHT}": r"mfuser.enhancer.visual_proj.\1",
    rf"context_decoder\.memory_proj\.2\.{WEIGHT}": r"mfuser.enhancer.visual_out_norm.\1",
    rf"context_decoder\.text_proj\.0\.{WEIGHT}": r"mfuser.enhancer.text_norm.\1",
    rf"context_decoder\.text_proj\.1\.{WEIGHT}": r"mfuser.enhancer.text_proj.\1",
    rf"context_decoder\.out_proj\.0\.{WEIGHT}": r"mfuser.enhancer.out_norm.\1",
    rf"context_decoder\.out_proj\.1\.{WEIGHT}": r"mfuser.enhancer.out_proj.\1",
    r"context_decoder\.decoder\.(\d+)\.self_attn\.([qkv]_proj)\.weight": (
        r"mfuser.enhancer.layers.\1.self_attention.\2.weight"
    ),
    rf"context_decoder\.decoder\.(\d+)\.self_attn\.proj\.{WEIGHT}": (
        r"mfuser.enhancer.layers.\1.self_attention.o_proj.\2"
    ),
    r"context_decoder\.decoder\.(\d+)\.cross_attn\.conv1d_([xz])\.weight": (
        r"mfuser.enhancer.layers.\1.mvfuser.conv_\2.weight"
    ),
    r"context_decoder\.decoder\.(\d+)\.cross_attn\.dt_proj\.bias": r"mfuser.enhancer.layers.\1.mvfuser.dt_bias",
    r"context_decoder\.decoder\.(\d+)\.cross_attn\.(A_log|D|scale|[a-z_]+\.weight)": (
        r"mfuser.enhancer.layers.\1.mvfuser.\2"
    ),
    rf"context_decoder\.decoder\.(\d+)\.norm1\.{WEIGHT}": r"mfuser.enhancer.layers.\1.self_attention_norm.\2",
    rf"context_decoder\.decoder\.(\d+)\.norm2\.{WEIGHT}": r"mfuser.enhancer.layers.\1.mvfuser_norm.\2",
    rf"context_decoder\.decoder\.(\d+)\.norm3\.{WEIGHT}": r"mfuser.enhancer.layers.\1.mlp_norm.\2",
    rf"context_decoder\.decoder\.(\d+)\.mlp\.0\.{WEIGHT}": r"mfuser.enhancer.layers.\1.mlp.layers.0.\2",
    rf"context_decoder\.decoder\.(\d+)\.mlp\.3\.{WEIGHT}": r"mfuser.enhancer.layers.\1.mlp.layers.1.\2",
    # pixel decoder
    rf"decode_head\.pixel_decoder\.input_convs\.(\d+)\.conv\.{WEIGHT}": r"pixel_decoder.input_convs.\1.conv.\2",
    rf"decode_head\.pixel_decoder\.input_convs\.(\d+)\.gn\.{WEIGHT}": r"pixel_decoder.input_convs.\1.norm.\2",
    rf"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0\.([a-z_]+)\.{WEIGHT}": (
        r"pixel_decoder.layers.\1.self_attention.\2.\3"
    ),
    rf"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.1\.attn\.in_proj_{WEIGHT}": (
        r"pixel_decoder.layers.\1.text_attention.{}_proj.\2"
    ),
    rf"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.1\.attn\.out_proj\.{WEIGHT}": (
        r"pixel_decoder.layers.\1.text_attention.o_proj.\2"
    ),
    rf"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0\.{WEIGHT}": (
        r"pixel_decoder.layers.\1.self_attention_norm.\2"
    ),
    rf"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1\.{WEIGHT}": (
        r"pixel_decoder.layers.\1.text_attention_norm.\2"
    ),
    rf"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.2\.{WEIGHT}": r"pixel_decoder.layers.\1.mlp_norm.\2",
    rf"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.{WEIGHT}": (
        r"pixel_decoder.layers.\1.mlp.layers.0.\2"
    ),
    rf"decode_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.{WEIGHT}": (
        r"pixel_decoder.layers.\1.mlp.layers.1.\2"
    ),
    rf"decode_head\.pixel_decoder\.encoder\.post_norm\.{WEIGHT}": r"pixel_decoder.final_norm.\1",
    r"decode_head\.pixel_decoder\.level_encoding\.weight": "pixel_decoder.level_embedding",
    rf"decode_head\.pixel_decoder\.(lateral|output)_convs\.0\.conv\.{WEIGHT}": r"pixel_decoder.\1_conv.conv.\2",
    rf"decode_head\.pixel_decoder\.(lateral|output)_convs\.0\.gn\.{WEIGHT}": r"pixel_decoder.\1_conv.norm.\2",
    rf"decode_head\.pixel_decoder\.mask_feature\.{WEIGHT}": r"pixel_decoder.mask_proj.\1",
    rf"decode_head\.pixel_decoder\.text_proj\.{WEIGHT}": r"pixel_decoder.text_proj.\1",
    r"decode_head\.pixel_decoder\.text_pos_embed\.weight": "pixel_decoder.text_position_embedding",
    # transformer decoder
    rf"decode_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn\.in_proj_{WEIGHT}": (
        r"decoder.layers.\1.cross_attention.{}_proj.\2"
    ),
    rf"decode_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn\.out_proj\.{WEIGHT}": (
        r"decoder.layers.\1.cross_attention.o_proj.\2"
    ),
    rf"decode_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.in_proj_{WEIGHT}": (
        r"decoder.layers.\1.self_attention.{}_proj.\2"
    ),
    rf"decode_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn\.out_proj\.{WEIGHT}": (
        r"decoder.layers.\1.self_attention.o_proj.\2"
    ),
    rf"decode_head\.transformer_decoder\.layers\.(\d+)\.norms\.0\.{WEIGHT}": (
        r"decoder.layers.\1.cross_attention_norm.\2"
    ),
    rf"decode_head\.transformer_decoder\.layers\.(\d+)\.norms\.1\.{WEIGHT}": (
        r"decoder.layers.\1.self_attention_norm.\2"
    ),
    rf"decode_head\.transformer_decoder\.layers\.(\d+)\.norms\.2\.{WEIGHT}": r"decoder.layers.\1.mlp_norm.\2",
    rf"decode_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.{WEIGHT}": (
        r"decoder.layers.\1.mlp.layers.0.\2"
    ),
    rf"decode_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.1\.{WEIGHT}": (
        r"decoder.layers.\1.mlp.layers.1.\2"
    ),
    rf"decode_head\.transformer_decoder\.post_norm\.{WEIGHT}": r"decoder.predictor.norm.\1",
    r"decode_head\.query_embed\.weight": "decoder.query_position_embedding",
    rf"decode_head\.text_proj\.0\.{WEIGHT}": r"decoder.query_mlp.layers.0.\1",
    rf"decode_head\.text_proj\.2\.{WEIGHT}": r"decoder.query_mlp.layers.1.\1",
    r"decode_head\.level_embed\.weight": "decoder.level_embedding",
    rf"decode_head\.cls_embed\.{WEIGHT}": r"decoder.predictor.class_head.\1",
    rf"decode_head\.mask_embed\.0\.{WEIGHT}": r"decoder.predictor.mask_mlp.layers.0.\1",
    rf"decode_head\.mask_embed\.2\.{WEIGHT}": r"decoder.predictor.mask_mlp.layers.1.\1",
    rf"decode_head\.mask_embed\.4\.{WEIGHT}": r"decoder.predictor.mask_mlp.layers.2.\1",
}
CLIP_VISION_NAMES = {
    r"backbone\.class_embedding": "mfuser.vlm.vision.embeddings.class_embedding",
    r"backbone\.positional_embedding": "mfuser.vlm.vision.embeddings.position_embedding.weight",
    r"backbone\.conv1\.weight": "mfuser.vlm.vision.embeddings.patch_embedding.weight",
    rf"backbone\.ln_pre\.{WEIGHT}": r"mfuser.vlm.vision.pre_layrnorm.\1",
    rf"backbone\.ln_post\.{WEIGHT}": r"mfuser.vlm.vision.post_layernorm.\1",
    r"backbone\.proj": "mfuser.vlm.visual_projection.weight",
    rf"backbone\.transformer\.resblocks\.(\d+)\.ln_([12])\.{WEIGHT}": (
        r"mfuser.vlm.vision.encoder.layers.\1.layer_norm\2.\3"
    ),
    rf"backbone\.transformer\.resblocks\.(\d+)\.attn\.in_proj_{WEIGHT}": (
        r"mfuser.vlm.vision.encoder.layers.\1.self_attn.{}_proj.\2"
    ),
    rf"backbone\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.{WEIGHT}": (
        r"mfuser.vlm.vision.encoder.layers.\1.self_attn.out_proj.\2"
    ),
    rf"backbone\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.{WEIGHT}": (
        r"mfuser.vlm.vision.encoder.layers.\1.mlp.fc1.\2"
    ),
    rf"backbone\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.{WEIGHT}": (
        r"mfuser.vlm.vision.encoder.layers.\1.mlp.fc2.\2"
    ),
}
SIGLIP_NAMES = {
    # the authors' SigLIP is Transformers' own
    r"backbone\.((embeddings|encoder|post_layernorm|head)\..+)": r"mfuser.vlm.vision.\1",
    r"text_encoder\.(.+)": r"mfuser.vlm.text.\1",
}
DROPPED = {
    r"backbone\.dinov2\.mask_token": "only DINOv2's masked pre-training uses it",
    r"random_text": "never used by the published model",
}
SIGLIP_DROPPED = {r"backbone\.adapter_proj[123]\..+": "never used by the published SigLIP model"}

ENCODER_PARTS = ("vfm_config", "vlm_config", "text_config")
HEAD_WIDTH = 64  # channels a head, in every published encoder
PUBLISHED_SIGLIP = "google/siglip-large-patch16-384"
SIGNATURES = {
    "clip": "backbone.conv1.weight",
    "eva02_clip": "backbone.blocks.0.attn.inner_attn_ln.weight",
    "siglip": "backbone.embeddings.patch_embedding.weight",
}


def detect_variant(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Which of the three published models these tensors belong to: "clip", "eva02_clip" or "siglip"."""
    for variant, key in SIGNATURES.items():
        if key in state_dict:
            return variant
    first = ", ".join(list(state_dict)[:5])
    raise ValueError(f"this is no MFuser checkpoint: it has none of {', '.join(SIGNATURES.values())}, but {first} ...")


def dropped_reason(key: str, variant: str) -> str | None:
    """Why a tensor of a checkpoint has no place in our model; `None` if it has one."""
    for pattern, reason in (DROPPED | (SIGLIP_DROPPED if variant == "siglip" else {})).items():
        if re.fullmatch(pattern, key):
            return reason
    if variant == "eva02_clip" and key.startswith("backbone."):
        return dropped_vision_reason(key.removeprefix("backbone."))
    return None


def convert_tensor(key: str, tensor: torch.Tensor, variant: str) -> StateDict:
    """
    One tensor of a checkpoint, or its gradient, under its name or names in [`MFuserForSemanticSegmentation`].

    Raises:
        KeyError: the variant has no such tensor.
    """
    names = SHARED_NAMES | {"clip": CLIP_VISION_NAMES, "siglip": SIGLIP_NAMES}.get(variant, {})
    for pattern, name in names.items():
        if match := re.fullmatch(pattern, key):
            return _placed(match.expand(name), tensor)
    if variant != "siglip" and key.startswith("text_encoder."):
        converted = convert_text_tensor(key.removeprefix("text_encoder."), tensor)
    elif variant == "eva02_clip" and key.startswith("backbone."):
        converted = convert_vision_tensor(key.removeprefix("backbone."), tensor)
    else:
        raise KeyError(f"{key!r} is no tensor of the {variant} variant")
    return {_tower_name(name): part for name, part in converted.items()}


def _placed(name: str, tensor: torch.Tensor) -> StateDict:
    """A tensor in the shape that our model keeps it in."""
    if "{}" in name:
        parts = ("query", "key", "value") if "vfm.vision" in name else "qkv"
        chunks = tensor.tensor_split(3)
        return {name.format(part): chunk.clone() for part, chunk in zip(parts, chunks, strict=True)}
    if re.search(r"conv_[xz]\.weight$", name):
        tensor = tensor.squeeze(1)  # (C, 1, taps)
    elif name.endswith("visual_projection.weight"):
        tensor = tensor.T.contiguous()  # the original multiplies from the left
    return {name: tensor}


def _tower_name(name: str) -> str:
    """Names in [`Eva02ClipModel`] to names in our tower."""
    name = re.sub(r"^(vision|text)_model\.", r"\1.", name)
    return f"mfuser.vlm.{name}"


def convert_state_dict(state_dict: Mapping[str, torch.Tensor], variant: str) -> StateDict:
    """
    The tensors of a checkpoint under the names of [`MFuserForSemanticSegmentation`].

    Raises:
        ValueError: tensors that the variant doesn't know, all of them listed.
    """
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        if dropped_reason(key, variant) is None:
            try:
                converted |= convert_tensor(key, tensor, variant)
            except KeyError:
                unknown.append(key)
    if unknown:
        raise ValueError(f"not tensors of an MFuser checkpoint ({variant}): {', '.join(unknown)}")
    if variant == "clip":
        # the published CLIP adds its class embedding twice: once as the token, once to the token's position
        embeddings = "mfuser.vlm.vision.embeddings."
        positions, token = (
            converted.get(f"{embeddings}{name}") for name in ("position_embedding.weight", "class_embedding")
        )
        # tensors that don't fit are listed with all others once the model is there
        if positions is not None and token is not None and positions.shape[1:] == token.shape:
            folded = positions.clone()
            folded[0] += token
            converted[f"{embeddings}position_embedding.weight"] = folded
    return converted


def config_from_state_dict(
    converted: Mapping[str, torch.Tensor], variant: str, known: dict | None = None
) -> MFuserConfig:
    """
    The configuration of converted tensors (meta tensors will do).

    Args:
        known (`dict`, *optional*):
            Fields of [`MFuserConfig`] that shapes don't tell, where they differ from the published models': heads (64
            channels each), taps, crop, stride, class names and their token ids.

    Raises:
        ValueError: a tensor that tells a size is missing, or sizes don't fit together.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in converted:
            raise ValueError(f"the sizes of the model can't be told without {name}")
        if converted[name].dim() != dimensions:
            raise ValueError(f"{name} has shape {tuple(converted[name].shape)}, not {dimensions} dimensions")
        return converted[name].shape

    def count(pattern: str) -> int:
        return len({match[1] for match in map(re.compile(pattern).match, converted) if match})

    vfm = "mfuser.vfm.vision"
    width, _, patch, _ = shape(f"{vfm}.embeddings.patch_embeddings.projection.weight", 4)
    grid = round((shape(f"{vfm}.embeddings.position_embeddings", 3)[1] - 1) ** 0.5)
    fields = {
        "vfm_config": {
            "model_type": "dinov2",
            "hidden_size": width,
            "num_hidden_layers": count(r"mfuser\.vfm\.vision\.encoder\.layer\.(\d+)\."),
            "num_attention_heads": width // HEAD_WIDTH,
            "mlp_ratio": shape(f"{vfm}.encoder.layer.0.mlp.fc1.weight", 2)[0] // width,
            "image_size": grid * patch,
            "patch_size": patch,
            "use_mask_token": False,
        },
        **_vlm_fields(converted, variant, known or {}, shape, count),
        "text_prompt_length": shape("mfuser.prompts", 3)[1],
        "fusion_state_size": shape("mfuser.fusion_layers.0.mvfuser.A_log", 2)[1],
        "fusion_conv_kernel": shape("mfuser.fusion_layers.0.mvfuser.conv_x.weight", 2)[1],
        "enhancer_hidden_size": shape("mfuser.enhancer.text_proj.weight", 2)[0],
        "enhancer_num_layers": count(r"mfuser\.enhancer\.layers\.(\d+)\."),
        "decoder_hidden_size": shape("decoder.query_position_embedding", 2)[1],
        "decoder_pixel_layers": count(r"pixel_decoder\.layers\.(\d+)\."),
        "decoder_pixel_feedforward_size": shape("pixel_decoder.layers.0.mlp.layers.0.weight", 2)[0],
        "decoder_num_layers": count(r"decoder\.layers\.(\d+)\."),
        "decoder_feedforward_size": shape("decoder.layers.0.mlp.layers.0.weight", 2)[0],
    }
    for name, value in (known or {}).items():
        fields[name] = fields[name] | value if isinstance(value, dict) and name.endswith("_config") else value
    num_classes = shape("decoder.query_position_embedding", 2)[0]
    names = fields.setdefault("id2label", dict(enumerate(CITYSCAPES_CLASSES)))
    if len(names) != num_classes:
        raise ValueError(
            f"the checkpoint segments {num_classes} classes, but {len(names)} are named: give id2label and "
            "class_token_ids with --config"
        )
    if variant != "siglip":
        fields.setdefault("class_token_ids", [clip_token_row(tokens) for tokens in CITYSCAPES_CLIP_TOKENS])
    fields["label2id"] = {label: int(index) for index, label in names.items()}
    return MFuserConfig(**fields)


def _vlm_fields(converted: Mapping[str, torch.Tensor], variant: str, known: dict, shape, count) -> dict:
    """Configurations of the vision-language model's two towers."""
    if variant == "eva02_clip":
        names = re.compile(r"^mfuser\.vlm\.(vision|text)\.")
        towers = {
            names.sub(r"\1_model.", key).removeprefix("mfuser.vlm."): tensor for key, tensor in converted.items()
        }
        vision_heads, text_heads = (known.get(part, {}).get("num_attention_heads") for part in ENCODER_PARTS[1:])
        width = shape("mfuser.vlm.vision.embeddings.class_embedding", 1)[0]
        text_width = shape("mfuser.vlm.text.final_layer_norm.weight", 1)[0]
        return {
            "vlm_config": eva02_clip_vision_config_from_state_dict(
                towers, width // vision_heads if vision_heads else HEAD_WIDTH
            ).to_dict(),
            "text_config": eva02_clip_text_config_from_state_dict(
                towers, text_width // text_heads if text_heads else HEAD_WIDTH
            ).to_dict(),
        }
    vision, text = "mfuser.vlm.vision", "mfuser.vlm.text"
    width, _, patch, _ = shape(f"{vision}.embeddings.patch_embedding.weight", 4)
    vocabulary, text_width = shape(f"{text}.embeddings.token_embedding.weight", 2)
    class_tokens = 1 if variant == "clip" else 0
    vlm_config = {
        "model_type": f"{variant}_vision_model",
        "hidden_size": width,
        "intermediate_size": shape(f"{vision}.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": count(r"mfuser\.vlm\.vision\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // HEAD_WIDTH,
        "image_size": round((shape(f"{vision}.embeddings.position_embedding.weight", 2)[0] - class_tokens) ** 0.5)
        * patch,
        "patch_size": patch,
    }
    text_config = {
        "model_type": f"{variant}_text_model",
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "intermediate_size": shape(f"{text}.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": count(r"mfuser\.vlm\.text\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": text_width // HEAD_WIDTH,
        "max_position_embeddings": shape(f"{text}.embeddings.position_embedding.weight", 2)[0],
    }
    if variant == "clip":
        projection = shape("mfuser.vlm.visual_projection.weight", 2)[0]
        vlm_config["projection_dim"] = text_config["projection_dim"] = projection
        text_config |= {"bos_token_id": CLIP_START_TOKEN, "eos_token_id": CLIP_END_TOKEN}
    else:
        text_config["projection_size"] = shape(f"{text}.head.weight", 2)[0]
    return {"vlm_config": vlm_config, "text_config": text_config}


def siglip_fields(model: str, class_names: list[str]) -> dict:
    """What the SigLIP variant takes from the pretrained SigLIP: token ids of class names, logit scale and bias."""
    siglip = load_encoder(model, {"siglip": SiglipModel}, "pretrained SigLIP")
    return {
        "class_token_ids": class_token_ids(class_names, AutoTokenizer.from_pretrained(model)),
        "loss_logit_scale": siglip.logit_scale.item(),
        "loss_logit_bias": siglip.logit_bias.item(),
    }


def convert_checkpoint(
    state_dict: Mapping[str, torch.Tensor], known: dict | None = None, siglip: str = PUBLISHED_SIGLIP
) -> MFuserForSemanticSegmentation:
    """
    A model in eval mode with the tensors of an MFuser checkpoint, in the authors' names.

    Args:
        known (`dict`, *optional*): see [`config_from_state_dict`].
        siglip (`str`): where the SigLIP variant's tokenizer, logit scale and bias are, if `known` doesn't hold them.

    Raises:
        ValueError: tensors that are unknown, missing or of another shape, all of them listed.
    """
    variant = detect_variant(state_dict)
    known = dict(known or {})
    if variant == "siglip" and not {"class_token_ids", "loss_logit_scale", "loss_logit_bias"} <= set(known):
        names = list(known.get("id2label", dict(enumerate(CITYSCAPES_CLASSES))).values())
        known = siglip_fields(siglip, names) | known
    converted = convert_state_dict(state_dict, variant)
    config = config_from_state_dict(converted, variant, known)
    model, report = MFuserForSemanticSegmentation.from_pretrained(
        None, config=config, state_dict=converted, output_loading_info=True, ignore_mismatched_sizes=True
    )
    problems = [f"missing: {name}" for name in sorted(report["missing_keys"])]
    problems += [f"unexpected: {name}" for name in sorted(report["unexpected_keys"])]
    problems += [
        f"{name} has shape {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in report["mismatched_keys"]
    ]
    if problems:
        raise ValueError(f"the checkpoint ({variant}) doesn't fit the model: {'; '.join(problems)}")
    return model.eval()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mfuser convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="the authors' file (.pth), or a published EVA02-CLIP (.pt)")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--config",
        type=Path,
        help="JSON of MFuserConfig fields that differ from the published models' (heads, taps, ...)",
    )
    parser.add_argument(
        "--siglip",
        default=PUBLISHED_SIGLIP,
        help="SigLIP variant: the pretrained SigLIP, for tokenizer, logit scale and bias (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not options.checkpoint.is_file():
        parser.error(f"{options.checkpoint} is no file")
    try:
        state_dict = read_state_dict(options.checkpoint)
        if is_eva02_clip_state_dict(state_dict):
            return convert_eva02_clip.main([str(options.checkpoint), str(options.output)])
        known = json.loads(options.config.read_text(encoding="utf-8")) if options.config else None
        variant = detect_variant(state_dict)
        model = convert_checkpoint(state_dict, known, options.siglip)
    except (OSError, ValueError, StrictDataclassError) as error:
        print(f"mfuser convert: {error}", file=sys.stderr)
        return 1
    save_converted(model, options.output, options.checkpoint.name)
    dropped = Counter(filter(None, (dropped_reason(key, variant) for key in state_dict)))
    print(f"{variant}: {len(state_dict) - dropped.total()} of {len(state_dict)} tensors converted to {options.output}")
    for reason, number in dropped.items():
        print(f"{number} dropped: {reason}")
    return 0


def save_converted(model: MFuserForSemanticSegmentation, folder: Path, source: str):
    """Writes weights, configuration, image processor, code and model card."""
    # save_pretrained names only the saved class; the base model loads from the same folder
    model.config.auto_map = {"AutoModel": "modeling_mfuser.MFuserModel"}
    model.save_pretrained(folder)
    MFuserImageProcessor().save_pretrained(folder)
    write_model_card(folder, model.config, folder.name, f"Converted from the authors' `{source}`.")


if __name__ == "__main__":
    sys.exit(main())
