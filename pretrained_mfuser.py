"""Two pretrained encoders as parts of an MFuser: their resampled weights, and the configuration of the pair."""

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2Model,
    SiglipModel,
)

from .class_names_mfuser import CLASS_TOKEN_LENGTH, class_token_ids, load_tokenizer, pretrained_tokenizer
from .configuration_mfuser import MFuserConfig, evenly_paired
from .modeling_eva02_clip import Eva02ClipModel
from .resampling_mfuser import Resampled, resample_grid

VFM_CLASSES = {
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3_vit": DINOv3ViTModel,
}
VLM_CLASSES = {"clip": CLIPModel, "siglip": SiglipModel, "siglip2": Siglip2Model, "eva02_clip": Eva02ClipModel}
# Values of the published models.
PROMPT_LENGTHS = {"eva02_clip": 8}  # context vectors; 5 for all others
DEFAULT_PROMPT_LENGTH = 5
PATCH_SIZE = 16  # of the CLIP and SigLIP variants; EVA02-CLIP keeps its own
TAP_DEPTHS = (1 / 3, 1 / 2, 2 / 3, 1)  # of the four pyramid levels, as shares of the fused layers
STRIDE_SHARE = 2 / 3  # of the crop


def load_encoder(
    name_or_path: str, classes: dict[str, type[PreTrainedModel]], role: str, **hub_kwargs
) -> PreTrainedModel:
    """
    Loads a pretrained encoder in float32, as the class that its configuration names.

    Args:
        name_or_path (`str`):
            Folder or Hub id.
        classes (`dict[str, type[PreTrainedModel]]`):
            Accepted model types and their classes.
        role (`str`):
            What the encoder is used for, for error messages.
        hub_kwargs:
            Arguments for the download, such as `revision`.

    Raises:
        ValueError: If the encoder has another type, or weights are missing or not finite.
    """
    model_type = PreTrainedConfig.get_config_dict(name_or_path, **hub_kwargs)[0].get("model_type")
    if model_type not in classes:
        raise ValueError(
            f"{name_or_path} has model type {model_type!r}; the {role} must be one of {', '.join(classes)}"
        )
    model, report = classes[model_type].from_pretrained(
        name_or_path, dtype=torch.float32, output_loading_info=True, **hub_kwargs
    )
    if report["missing_keys"]:
        raise ValueError(
            f"{name_or_path} lacks weights of a {model_type}: {', '.join(sorted(report['missing_keys']))}"
        )
    check_finite(model.state_dict(), name_or_path)
    return model.eval()


def check_finite(weights: Mapping[str, torch.Tensor], source: str) -> None:
    """
    Checks that no weight is NaN or infinite.

    Args:
        weights (`dict`):
            The state dict; tensors on the meta device and quantised ones are not checked.
        source (`str`):
            What the weights were loaded from, for the error.

    Raises:
        ValueError: If a weight is not finite, with the names of the first ones.
    """
    if bad := nonfinite_tensors(weights):
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"{source}: {len(bad)} tensors hold NaN or infinite values: {', '.join(bad[:3])}{more}; the file is "
            "damaged or the training diverged, use another checkpoint"
        )


def nonfinite_tensors(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinite values, without those on the meta device and quantised ones."""
    return [
        name
        for name, tensor in state_dict.items()
        if type(tensor) is torch.Tensor and not tensor.is_meta and tensor.numel() and not _is_finite(tensor)
    ]


def _is_finite(tensor: torch.Tensor) -> bool:
    values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()  # for float8
    # `aminmax` propagates NaN to both bounds.
    return not tensor.is_floating_point() or all(math.isfinite(bound) for bound in torch.aminmax(values))


@dataclass(frozen=True)
class PretrainedEncoders:
    """
    A pretrained vision foundation model and a pretrained vision-language model.

    Args:
        vfm, vlm ([`PreTrainedModel`]):
            The models.
        vlm_source (`str`):
            Folder or Hub id that `vlm` was loaded from.
        vlm_revision (`str`, *optional*):
            Its revision on the Hub.
    """

    vfm: PreTrainedModel
    vlm: PreTrainedModel
    vlm_source: str
    vlm_revision: str | None = None

    def model_config(
        self,
        class_names: list[str],
        tokenizer=None,
        crop_size: int = 512,
        patch_size: int | None = None,
        class_token_length: int = CLASS_TOKEN_LENGTH,
        **fields,
    ) -> MFuserConfig:
        """
        The configuration of an MFuser built from these encoders.

        For the arguments see [`MFuserPreTrainedModel.from_vfm_vlm_pretrained`]; `fields` override derived values.
        """
        if not fields.get("use_vfm", True):
            raise ValueError("use_vfm is False; a model of two pretrained encoders needs use_vfm=True")
        if tokenizer is None:
            tokenizer = pretrained_tokenizer(self.vlm_source, revision=self.vlm_revision)
        else:
            tokenizer = load_tokenizer(tokenizer)
        variant = self.vlm.config.model_type
        if patch_size is None:
            patch_size = self.vlm.config.vision_config.patch_size if variant == "eva02_clip" else PATCH_SIZE
        vfm_config, vlm_config = (
            _at_resolution(config, crop_size, patch_size)
            for config in (self.vfm.config, self.vlm.config.vision_config)
        )
        text_config = copy.deepcopy(self.vlm.config.text_config)
        prompt_length = fields.setdefault("text_prompt_length", PROMPT_LENGTHS.get(variant, DEFAULT_PROMPT_LENGTH))
        text_length = prompt_length + class_token_length
        if text_length > text_config.max_position_embeddings:
            raise ValueError(
                f"{prompt_length} context vectors and {class_token_length} class tokens are {text_length} positions; "
                f"the text encoder has {text_config.max_position_embeddings}"
            )
        text_config.max_position_embeddings = text_length
        if variant in ("clip", "eva02_clip"):
            vlm_config.projection_dim = text_config.projection_dim = self.vlm.config.projection_dim
        else:
            fields.setdefault("loss_logit_scale", self.vlm.logit_scale.item())
            fields.setdefault("loss_logit_bias", self.vlm.logit_bias.item())
        depths = vfm_config.num_hidden_layers, vlm_config.num_hidden_layers
        if depths[0] != depths[1]:
            fields.setdefault("fusion_layer_pairs", evenly_paired(*depths))
        steps = len(fields.get("fusion_layer_pairs") or range(depths[0]))
        fields.setdefault("fusion_out_layers", [round(steps * depth) for depth in TAP_DEPTHS])
        fields.setdefault("crop_stride", round(crop_size * STRIDE_SHARE))
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


def load_pretrained_encoders(
    vfm: str, vlm: str, revisions: Mapping[str, str | None] | None = None, **hub_kwargs
) -> PretrainedEncoders:
    """
    Loads both encoders.

    Args:
        vfm, vlm (`str`):
            Folders or Hub ids.
        revisions (`dict[str, str]`, *optional*):
            The revisions of `vfm` and `vlm` on the Hub.
        hub_kwargs:
            Further arguments for the download, such as `cache_dir`.

    Raises:
        ValueError: If an encoder has a type that cannot be used, weights are missing, or a folder has a revision.
    """
    revisions = revisions or {}
    for key, name in (("vfm", vfm), ("vlm", vlm)):
        if revisions.get(key) is not None and os.path.isdir(name):
            raise ValueError(
                f"{key}_revision is {revisions[key]!r}, but {key} is the folder {name}; only Hub ids have revisions"
            )
    return PretrainedEncoders(
        load_encoder(vfm, VFM_CLASSES, "vision foundation model", revision=revisions.get("vfm"), **hub_kwargs),
        load_encoder(vlm, VLM_CLASSES, "vision-language model", revision=revisions.get("vlm"), **hub_kwargs),
        vlm_source=vlm,
        vlm_revision=revisions.get("vlm"),
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
def load_towers(model: PreTrainedModel, encoders: PretrainedEncoders) -> list[str]:
    """
    Copies pretrained weights into the towers of an [`MFuserModel`]; see [`tower_weights`].

    Returns:
        `list[str]`: A note for each weight that was resampled, truncated or changed.
    """
    weights, notes = tower_weights(model, encoders)
    for tower in ("vfm", "vlm"):
        start = len(tower) + 1
        getattr(model, tower).load_state_dict(
            {name[start:]: weight for name, weight in weights.items() if name.startswith(f"{tower}.")}
        )
    return notes


@torch.no_grad()
def tower_weights(model: Any, encoders: PretrainedEncoders) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Pretrained weights as the towers of an [`MFuserModel`] have them.

    Args:
        model ([`MFuserModel`]):
            The model, with the configuration that [`PretrainedEncoders.model_config`] gives. Only its towers `vfm` and
            `vlm` are used, for the names and shapes of their weights.
        encoders ([`PretrainedEncoders`]):
            The pretrained encoders.

    Returns:
        `tuple`: The weights by their names in `model`, and a note for each that was resampled, truncated or changed.

    Raises:
        ValueError: If weights do not fit; all of them are listed.
    """
    vfm, vlm, towers = encoders.vfm, encoders.vlm, model.vlm
    parts: list[tuple[str, nn.Module, nn.Module, str, Resampled | None, Resampled | None]] = [
        ("vfm.vision", model.vfm.vision, vfm, "vision foundation model", model.vfm.positions, model.vfm.kernel),
        ("vlm.vision", towers.vision, vlm.vision_model, "vision-language model", towers.positions, towers.kernel),
    ]
    if hasattr(towers, "text"):
        parts.append(("vlm.text", towers.text, vlm.text_model, "text encoder", None, None))
    projections = [name for name in ("visual_projection", "text_projection") if hasattr(towers, name)]
    parts += [(f"vlm.{name}", getattr(towers, name), getattr(vlm, name), name, None, None) for name in projections]
    weights: dict[str, torch.Tensor] = {}
    notes: list[str] = []
    for prefix, target, source, role, positions, kernel in parts:
        fitted, changes = _fitted(target, source, role, positions, kernel)
        weights |= {f"{prefix}.{name}": weight for name, weight in fitted.items()}
        notes += changes
    if vlm.config.model_type == "clip":
        name = "vlm.vision.embeddings.position_embedding.weight"
        weights[name] = weights[name].clone()
        weights[name][0] += vlm.vision_model.embeddings.class_embedding
        notes.append("CLIP's class embedding was added to its position once more, as in the published code")
    return weights, notes


def _fitted(
    target: nn.Module, source: nn.Module, role: str, positions: Resampled | None, kernel: Resampled | None
) -> tuple[dict[str, torch.Tensor], list[str]]:
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
            found = "is missing" if new is None else f"has shape {_shape(new)}"
            problems.append(f"{name} {found}, needs {_shape(old)}")
        else:
            fitted[name] = new
    problems += [f"{name} is unexpected" for name in given if name not in wanted and not name.endswith("mask_token")]
    if problems:
        raise ValueError(f"weights of the {role} do not fit the model: {'; '.join(problems)}")
    return fitted, notes


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def resample_positions(positions: torch.Tensor, shape: torch.Size, how: Resampled) -> torch.Tensor:
    """Resamples position embeddings (..., c + g * g, C) of a square grid to `shape`; class positions are kept."""
    table = positions.reshape(positions.shape[-2:])
    grid = math.isqrt(shape[-2] - how.num_class_tokens)
    patches = resample_grid(table[how.num_class_tokens :], (grid, grid), how.mode)
    return torch.cat([table[: how.num_class_tokens], patches]).reshape(shape)


def resample_kernel(kernel: torch.Tensor, shape: torch.Size, mode: str) -> torch.Tensor:
    """Resamples a patch kernel (C, 3, p, p), or SigLIP 2's linear one (C, p * p * 3), to the patch size of `shape`."""
    if kernel.dim() == 2:
        old, new = (math.isqrt(size // 3) for size in (kernel.shape[1], shape[1]))
        maps = kernel.unflatten(1, (old, old, 3)).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size=(new, new), mode=mode, align_corners=False)
        return maps.permute(0, 2, 3, 1).flatten(1)
    return F.interpolate(kernel, size=tuple(shape[-2:]), mode=mode, align_corners=False)
