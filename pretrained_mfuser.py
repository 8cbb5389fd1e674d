"""From two pretrained encoders to an MFuser: configurations, class names as tokens, weights resampled to our grid."""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2Model,
    SiglipModel,
)
from transformers.utils import logging

from .class_names_mfuser import CLASS_TOKEN_LENGTH, class_token_ids
from .configuration_mfuser import MFuserConfig, evenly_paired
from .modeling_eva02_clip import Eva02ClipModel
from .towers_mfuser import Resampled, resample_grid

logger = logging.get_logger(__name__)

VFM_CLASSES = {
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3_vit": DINOv3ViTModel,
}
VLM_CLASSES = {"clip": CLIPModel, "siglip": SiglipModel, "siglip2": Siglip2Model, "eva02_clip": Eva02ClipModel}
PROMPT_LENGTH = {"eva02_clip": 8}  # context vectors in the paper's models; 5 for all others
PATCH_SIZE = 16  # of the paper's CLIP and SigLIP variants; its EVA02-CLIP keeps its own


def load_encoder(name_or_path: str, classes: dict[str, type[PreTrainedModel]], role: str) -> PreTrainedModel:
    """
    A pretrained encoder in float32, by the class that its configuration asks for.

    Raises:
        ValueError: an encoder of another kind, or one whose weights are not all in its files.
    """
    model_type = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    if model_type not in classes:
        raise ValueError(
            f"{name_or_path} is of type {model_type!r}, which can't be the {role}: that must be one of "
            f"{', '.join(classes)}"
        )
    model, report = classes[model_type].from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"{name_or_path} lacks weights of a {model_type}: {', '.join(sorted(report['missing_keys']))}"
        )
    return model.eval()


def pretrained_config(
    vfm: PreTrainedModel,
    vlm: PreTrainedModel,
    class_names: list[str],
    tokenizer,
    crop_size: int,
    patch_size: int | None,
    class_token_length: int,
    **fields,
) -> MFuserConfig:
    """The configuration of an MFuser of two pretrained encoders; `fields` are [`MFuserConfig`]'s and come first."""
    variant = vlm.config.model_type
    if patch_size is None:
        patch_size = vlm.config.vision_config.patch_size if variant == "eva02_clip" else PATCH_SIZE
    prompt_length = fields.setdefault("text_prompt_length", PROMPT_LENGTH.get(variant, 5))
    vfm_config, vlm_config = (
        _at_resolution(config, crop_size, patch_size) for config in (vfm.config, vlm.config.vision_config)
    )
    if not getattr(vlm_config, "vision_use_head", True):
        raise ValueError("this SigLIP has no pooling head (vision_use_head=False), so no space to share with text")
    text_config = copy.deepcopy(vlm.config.text_config)
    text_length = prompt_length + class_token_length
    if text_length > text_config.max_position_embeddings:
        raise ValueError(
            f"{prompt_length} context vectors and {class_token_length} class tokens are {text_length} positions; the "
            f"text encoder has {text_config.max_position_embeddings}"
        )
    text_config.max_position_embeddings = text_length
    if variant in ("clip", "eva02_clip"):
        vlm_config.projection_dim = text_config.projection_dim = vlm.config.projection_dim
    elif variant in ("siglip", "siglip2"):
        fields.setdefault("loss_logit_scale", vlm.logit_scale.item())
        fields.setdefault("loss_logit_bias", vlm.logit_bias.item())
    depths = vfm_config.num_hidden_layers, vlm_config.num_hidden_layers
    if depths[0] != depths[1]:
        fields.setdefault("fusion_layer_pairs", evenly_paired(*depths))
    steps = len(fields.get("fusion_layer_pairs") or range(depths[0]))
    fields.setdefault("fusion_out_layers", [round(steps * part) for part in (1 / 3, 1 / 2, 2 / 3, 1)])
    fields.setdefault("crop_stride", round(crop_size * 2 / 3))
    return MFuserConfig(
        vfm_config=vfm_config,
        vlm_config=vlm_config,
        text_config=text_config,
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
        class_token_ids=class_token_ids(class_names, tokenizer, class_token_length),
        crop_size=crop_size,
        **fields,
    )


def _at_resolution(config: PreTrainedConfig, crop_size: int, patch_size: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.patch_size = patch_size
    if hasattr(config, "num_patches"):
        config.num_patches = (crop_size // patch_size) ** 2
    else:
        config.image_size = crop_size
    if hasattr(config, "use_mask_token"):
        config.use_mask_token = False
    return config


@torch.no_grad()
def load_towers(model: nn.Module, vfm: PreTrainedModel, vlm: PreTrainedModel) -> list[str]:
    """
    Fills the towers of an [`MFuserModel`] with pretrained weights.

    Returns:
        `list[str]`: what was resampled, cut or folded.

    Raises:
        ValueError: weights that don't fit, all of them listed.
    """
    notes = _load(model.vfm.vision, vfm, "vision foundation model", model.vfm.positions, model.vfm.kernel)
    notes += _load(model.vlm.vision, vlm.vision_model, "vision-language model", model.vlm.positions, model.vlm.kernel)
    notes += _load(model.vlm.text, vlm.text_model, "text encoder")
    for projection in ("visual_projection", "text_projection"):
        if hasattr(model.vlm, projection):
            getattr(model.vlm, projection).load_state_dict(getattr(vlm, projection).state_dict())
    if vlm.config.model_type == "clip":
        embeddings = model.vlm.vision.embeddings
        embeddings.position_embedding.weight[0] += embeddings.class_embedding
        notes.append("CLIP's class embedding added to its position once more, as in the paper's code")
    return notes


def _load(
    target: nn.Module,
    source: nn.Module,
    role: str,
    positions: Resampled | None = None,
    kernel: Resampled | None = None,
) -> list[str]:
    given, wanted = source.state_dict(), target.state_dict()
    notes, problems, fitted = [], [], {}
    for name, old in wanted.items():
        new = given.get(name)
        if new is not None and new.shape != old.shape:
            if positions is not None and name == positions.name:
                new = resample_positions(new, old.shape, positions)
                notes.append(f"{role}: positions {_shape(given[name])} to {_shape(new)}, {positions.mode}")
            elif kernel is not None and name == kernel.name:
                new = resample_kernel(new, old.shape, kernel.mode)
                notes.append(f"{role}: patch kernel {_shape(given[name])} to {_shape(new)}, {kernel.mode}")
            elif name == "embeddings.position_embedding.weight" and len(new) > len(old):
                new = new[: len(old)]
                notes.append(f"{role}: the first {len(old)} of {len(given[name])} positions")
        if new is None or new.shape != old.shape:
            problems.append(f"{name} {_shape(old)} from {'nothing' if new is None else _shape(new)}")
        fitted[name] = new
    problems += [f"{name} is left over" for name in given if name not in wanted and not name.endswith("mask_token")]
    if problems:
        raise ValueError(f"the {role}'s weights don't fit: {'; '.join(problems)}")
    target.load_state_dict(fitted)
    return notes


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def resample_positions(positions: torch.Tensor, shape: torch.Size, how: Resampled) -> torch.Tensor:
    """Position embeddings (..., c + g * g, C) of a square grid, at the size of `shape`; class positions kept."""
    table = positions.reshape(positions.shape[-2:])
    grid = math.isqrt(shape[-2] - how.num_class_tokens)
    patches = resample_grid(table[how.num_class_tokens :], (grid, grid), how.mode)
    return torch.cat([table[: how.num_class_tokens], patches]).reshape(shape)


def resample_kernel(kernel: torch.Tensor, shape: torch.Size, mode: str) -> torch.Tensor:
    """
    A patch kernel (C, 3, p, p), or SigLIP 2's linear one (C, p * p * 3), at another patch size; align_corners=False.
    """
    if kernel.dim() == 2:
        old, new = (math.isqrt(size // 3) for size in (kernel.shape[1], shape[1]))
        maps = kernel.unflatten(1, (old, old, 3)).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size=(new, new), mode=mode, align_corners=False)
        return maps.permute(0, 2, 3, 1).flatten(1)
    return F.interpolate(kernel, size=tuple(shape[-2:]), mode=mode, align_corners=False)


def build_from_pretrained(
    model_class: type[PreTrainedModel],
    vfm: str,
    vlm: str,
    class_names: list[str],
    tokenizer=None,
    crop_size: int = 512,
    patch_size: int | None = None,
    class_token_length: int = CLASS_TOKEN_LENGTH,
    **fields,
) -> PreTrainedModel:
    """See [`MFuserForSemanticSegmentation.from_vfm_vlm_pretrained`]."""
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer or vlm)
    vfm_model = load_encoder(vfm, VFM_CLASSES, "vision foundation model")
    vlm_model = load_encoder(vlm, VLM_CLASSES, "vision-language model")
    config = pretrained_config(
        vfm_model, vlm_model, list(class_names), tokenizer, crop_size, patch_size, class_token_length, **fields
    )
    model = model_class(config)
    notes = load_towers(getattr(model, model.base_model_prefix, model), vfm_model, vlm_model)
    summary = "".join(f"\n- {note}" for note in notes)
    logger.warning(f"MFuser of {vfm} and {vlm}; the fusion and the decoder are new and want training.{summary}")
    return model.eval()
