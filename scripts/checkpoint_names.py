"""Names of the tensors in the authors' MFuser checkpoints, and their conversion to the names of this package."""

import re
from collections.abc import Mapping

import torch

from mfuser.scripts.convert_eva02_clip import (
    add_tensors,
    convert_text_tensor,
    convert_vision_tensor,
    dropped_vision_reason,
)

StateDict = dict[str, torch.Tensor]

# Patterns of the authors' names, and the names here. `{}` is replaced by q, k and v of a packed projection. DINOv2's
# names are those in files of Transformers, which all versions read, although they differ in the names in memory.
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
    # the authors use Transformers' SigLIP
    r"backbone\.((embeddings|encoder|post_layernorm|head)\..+)": r"mfuser.vlm.vision.\1",
    r"text_encoder\.(.+)": r"mfuser.vlm.text.\1",
}
DROPPED = {
    r"backbone\.dinov2\.mask_token": "used only by DINOv2's masked pretraining",
    r"random_text": "not used by the published model",
}
SIGLIP_DROPPED = {r"backbone\.adapter_proj[123]\..+": "not used by the published SigLIP model"}
# A tensor that only one variant has.
SIGNATURES = {
    "clip": "backbone.conv1.weight",
    "eva02_clip": "backbone.blocks.0.attn.inner_attn_ln.weight",
    "siglip": "backbone.embeddings.patch_embedding.weight",
}


def detect_variant(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Returns the variant of a checkpoint: "clip", "eva02_clip" or "siglip"."""
    for variant, key in SIGNATURES.items():
        if key in state_dict:
            return variant
    first = ", ".join(list(state_dict)[:5])
    raise ValueError(
        f"this is not an MFuser checkpoint: it holds {first} ..., but none of {', '.join(SIGNATURES.values())}"
    )


def dropped_reason(key: str, variant: str) -> str | None:
    """Returns the reason for which a tensor of a checkpoint is dropped, or `None` if it is converted."""
    for pattern, reason in (DROPPED | (SIGLIP_DROPPED if variant == "siglip" else {})).items():
        if re.fullmatch(pattern, key):
            return reason
    if variant == "eva02_clip" and key.startswith("backbone."):
        return dropped_vision_reason(key.removeprefix("backbone."))
    return None


def convert_tensor(key: str, tensor: torch.Tensor, variant: str) -> StateDict:
    """
    Converts one tensor of a checkpoint, or its gradient.

    Args:
        key (`str`):
            The authors' name.
        tensor (`torch.Tensor`):
            The tensor.
        variant (`str`):
            One of "clip", "eva02_clip" and "siglip".

    Returns:
        `dict[str, torch.Tensor]`: One or several tensors under the names of [`MFuserForSemanticSegmentation`].

    Raises:
        KeyError: If the variant has no such tensor.
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
        raise KeyError(f"{key!r} is not a tensor of the {variant} variant")
    return {_tower_name(name): part for name, part in converted.items()}


def _placed(name: str, tensor: torch.Tensor) -> StateDict:
    """Splits or reshapes a tensor as the model requires."""
    if "{}" in name:
        parts = ("query", "key", "value") if "vfm.vision" in name else "qkv"
        chunks = tensor.tensor_split(3)
        return {name.format(part): chunk.clone() for part, chunk in zip(parts, chunks, strict=True)}
    if re.search(r"conv_[xz]\.weight$", name):
        tensor = tensor.squeeze(1)  # (C, 1, taps)
    elif name.endswith("visual_projection.weight"):
        tensor = tensor.T.contiguous()  # the authors multiply from the left
    return {name: tensor}


def _tower_name(name: str) -> str:
    """Converts a name in [`Eva02ClipModel`] to the name in the tower."""
    name = re.sub(r"^(vision|text)_model\.", r"\1.", name)
    return f"mfuser.vlm.{name}"


def convert_state_dict(state_dict: Mapping[str, torch.Tensor], variant: str) -> StateDict:
    """
    Converts all tensors of a checkpoint to the names of [`MFuserForSemanticSegmentation`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors under the authors' names.
        variant (`str`):
            One of "clip", "eva02_clip" and "siglip".

    Returns:
        `dict[str, torch.Tensor]`: The converted tensors.

    Raises:
        ValueError: If tensors are unexpected; the error lists all of them.
    """
    converted: StateDict = {}
    unknown = []
    for key, tensor in state_dict.items():
        if dropped_reason(key, variant) is None:
            try:
                parts = convert_tensor(key, tensor, variant)
            except KeyError:
                unknown.append(key)
                continue
            add_tensors(converted, parts, key)
    if unknown:
        raise ValueError(f"unexpected tensors in an MFuser checkpoint ({variant}): {', '.join(unknown)}")
    if variant == "clip":
        # the published CLIP variant adds the class embedding twice: as the token and to the token's position
        embeddings = "mfuser.vlm.vision.embeddings."
        positions, token = (
            converted.get(f"{embeddings}{name}") for name in ("position_embedding.weight", "class_embedding")
        )
        # tensors of a wrong shape are reported when the model is built
        if positions is not None and token is not None and positions.shape[1:] == token.shape:
            folded = positions.clone()
            folded[0] += token
            converted[f"{embeddings}position_embedding.weight"] = folded
    return converted
