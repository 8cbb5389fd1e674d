"""The configurations of the encoders: the supported types, the paper's defaults, and the checks of their fields."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .class_names_mfuser import CLIP_END_TOKEN, CLIP_START_TOKEN
from .configuration_eva02_clip import Eva02ClipTextConfig, Eva02ClipVisionConfig

# The full-size CLIP variant of the paper: DINOv2-L and CLIP ViT-L/14-336, both at patch 16 on crops of 512.
DEFAULT_ENCODERS = {
    "vfm_config": {
        "model_type": "dinov2",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 512,
        "patch_size": 16,
        "use_mask_token": False,
    },
    "vlm_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 512,
        "patch_size": 16,
        "projection_dim": 768,
    },
    "text_config": {
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 10,
        "projection_dim": 768,
        "bos_token_id": CLIP_START_TOKEN,
        "eos_token_id": CLIP_END_TOKEN,
    },
}

# The type of text encoder that belongs to each type of vision encoder of a vision-language model.
TEXT_TOWER_OF = {
    "clip_vision_model": "clip_text_model",
    "eva02_clip_vision_model": "eva02_clip_text_model",
    "siglip_vision_model": "siglip_text_model",
    "siglip2_vision_model": "siglip2_text_model",
}
CLIP_TOKENIZED = ("clip_vision_model", "eva02_clip_vision_model")
VFM_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
OWN_CONFIGS = {config.model_type: config for config in (Eva02ClipVisionConfig, Eva02ClipTextConfig)}

# Arguments of every configuration that are not among its declared fields.
COMMON_ARGUMENTS = {
    *("num_labels", "torch_dtype", "name_or_path", "auto_map", "quantization_config", "output_attentions"),
    *("attn_implementation", "experts_implementation", "out_features", "out_indices", "stage_names"),
}

# Fields of every configuration whose types Transformers does not check: their types, also in words.
COMMON_TYPES: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
    ("return_dict", bool, "true or false"),
    ("output_attentions", bool, "true or false"),
    ("output_hidden_states", (bool, int, list), "true, false, or indices of layers"),
    ("quantization_config", (dict, QuantizationConfigMixin), "a dictionary"),
)


def encoder_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of an encoder; raises `ValueError` if it cannot be used."""
    known = (*VFM_TYPES, *TEXT_TOWER_OF, *TEXT_TOWER_OF.values())
    if model_type not in known:
        raise ValueError(f"model_type of an encoder is {model_type!r}; it must be one of {', '.join(known)}")
    return OWN_CONFIGS[model_type] if model_type in OWN_CONFIGS else CONFIG_MAPPING[model_type]


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message on an unknown name: the most similar known one, if any is similar."""
    similar = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {similar[0]!r}?" if similar else ""


def check_field_names(config_class: type[PreTrainedConfig], names: Iterable[str], role: str) -> None:
    """Raises `ValueError` for the first name that is not a field of a configuration. Transformers would store it."""
    fields = set(config_class.__dataclass_fields__) | set(config_class.attribute_map)
    for name in names:
        # Names with an underscore are Transformers' own records, such as `_commit_hash`.
        if not (name in fields or name in COMMON_ARGUMENTS or name.startswith("_") or hasattr(config_class, name)):
            raise ValueError(f"{role} has no field {name!r}{nearest(name, sorted(fields))}")


def check_common_fields(fields: Mapping[str, Any], role: str) -> None:
    """Raises `ValueError` for values of common fields that Transformers would read before it checks their types."""
    for name in ("dtype", "torch_dtype"):
        dtype = fields.get(name)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        if fields.get(name) is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"{role}: {name} is {fields[name]!r}; it must be a data type such as 'float32'")
    for name, wanted, kind in (("id2label", "ids to names", int), ("label2id", "names to ids", str)):
        value = fields.get(name)
        if value is None:
            continue
        try:
            valid = isinstance(value, dict) and bool([kind(key) for key in value])
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ValueError(f"{role}: {name} is {value!r}; it must be a dictionary from {wanted}")
    for name, types, words in COMMON_TYPES:
        if fields.get(name) is not None and not isinstance(fields[name], types):
            raise ValueError(f"{role}: {name} is {fields[name]!r}; it must be {words}")


def encoder_config(
    value: dict | PreTrainedConfig | None, default: dict, role: str, check_names: bool = True
) -> PreTrainedConfig:
    """
    The configuration of an encoder.

    Args:
        value (`dict` or [`PreTrainedConfig`], *optional*):
            Its fields, among them `model_type`.
        default (`dict`):
            The fields in place of `None`, and the model type in place of a missing one.
        role (`str`):
            The name of the configuration in error messages.
        check_names (`bool`, *optional*, defaults to `True`):
            Whether unknown fields are refused. Saved configurations may contain those of other versions.

    Raises:
        ValueError: If the type cannot be used, or a field is unknown.
    """
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(default if value is None else value)
    model_type = value.pop("model_type", default["model_type"])
    config_class = encoder_class(model_type)
    if check_names:
        check_field_names(config_class, value, f"{role} ({model_type})")
    check_common_fields(value, f"{role} ({model_type})")
    heads = value.get("num_attention_heads", 1)
    if isinstance(heads, int) and heads < 1:
        raise ValueError(f"num_attention_heads of the {model_type} is {heads}; it must be positive")
    return config_class(**value)


__all__ = [
    "CLIP_TOKENIZED",
    "DEFAULT_ENCODERS",
    "TEXT_TOWER_OF",
    "VFM_TYPES",
    "check_common_fields",
    "check_field_names",
    "encoder_class",
    "encoder_config",
    "nearest",
]
