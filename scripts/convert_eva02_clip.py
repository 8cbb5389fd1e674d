"""Converts published EVA02-CLIP weights to a folder that `Eva02ClipModel.from_pretrained` loads (`mfuser convert`).

The files are EVA02_CLIP_B_psz16_s8B.pt, EVA02_CLIP_L_psz14_s4B.pt and EVA02_CLIP_L_336_psz14_s6B.pt of
github.com/baaivision/EVA.
"""

import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mfuser.configuration_eva02_clip import Eva02ClipConfig, Eva02ClipTextConfig, Eva02ClipVisionConfig
from mfuser.errors import one_line
from mfuser.files import atomic_folder
from mfuser.modeling_eva02_clip import Eva02ClipModel

StateDict = dict[str, torch.Tensor]

# Patterns of the original names, without the prefix of the tower, and the names in Eva02ClipModel.
_BLOCK, _VISION_LAYER = r"blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."
VISION_NAMES = {
    r"cls_token": "vision_model.embeddings.class_embedding",
    r"pos_embed": "vision_model.embeddings.position_embedding.weight",
    r"patch_embed\.proj\.(weight|bias)": r"vision_model.embeddings.patch_embedding.\1",
    _BLOCK + r"norm([12])\.(weight|bias)": _VISION_LAYER + r"layer_norm\2.\3",
    _BLOCK + r"attn\.([qkv])_proj\.weight": _VISION_LAYER + r"self_attn.\2_proj.weight",
    _BLOCK + r"attn\.([qv])_bias": _VISION_LAYER + r"self_attn.\2_proj.bias",
    _BLOCK + r"attn\.inner_attn_ln\.(weight|bias)": _VISION_LAYER + r"self_attn.inner_attn_ln.\2",
    _BLOCK + r"attn\.proj\.(weight|bias)": _VISION_LAYER + r"self_attn.out_proj.\2",
    _BLOCK + r"mlp\.w1\.(weight|bias)": _VISION_LAYER + r"mlp.gate_proj.\2",
    _BLOCK + r"mlp\.w2\.(weight|bias)": _VISION_LAYER + r"mlp.up_proj.\2",
    _BLOCK + r"mlp\.ffn_ln\.(weight|bias)": _VISION_LAYER + r"mlp.ffn_ln.\2",
    _BLOCK + r"mlp\.w3\.(weight|bias)": _VISION_LAYER + r"mlp.down_proj.\2",
    r"norm\.(weight|bias)": r"vision_model.post_layernorm.\1",
    r"head\.(weight|bias)": r"visual_projection.\1",
}
_RESBLOCK, _TEXT_LAYER = r"transformer\.resblocks\.(\d+)\.", r"text_model.encoder.layers.\1."
TEXT_NAMES = {
    r"token_embedding\.weight": "text_model.embeddings.token_embedding.weight",
    r"positional_embedding": "text_model.embeddings.position_embedding.weight",
    _RESBLOCK + r"ln_([12])\.(weight|bias)": _TEXT_LAYER + r"layer_norm\2.\3",
    _RESBLOCK + r"attn\.in_proj_(weight|bias)": _TEXT_LAYER + r"self_attn.{}_proj.\2",  # packed q, k and v
    _RESBLOCK + r"attn\.out_proj\.(weight|bias)": _TEXT_LAYER + r"self_attn.out_proj.\2",
    _RESBLOCK + r"mlp\.c_fc\.(weight|bias)": _TEXT_LAYER + r"mlp.fc1.\2",
    _RESBLOCK + r"mlp\.c_proj\.(weight|bias)": _TEXT_LAYER + r"mlp.fc2.\2",
    r"ln_final\.(weight|bias)": r"text_model.final_layer_norm.\1",
    r"text_projection": "text_projection.weight",
}
SIGNATURE = "visual.blocks.0.attn.inner_attn_ln.weight"  # no other CLIP has this norm
ROTARY_TABLE = re.compile(r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)")


def _rename(key: str, names: Mapping[str, str], tower: str) -> str:
    for pattern, name in names.items():
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    raise KeyError(f"{key!r} is not a tensor of the {tower} tower of EVA02-CLIP")


def rename_vision_key(key: str) -> str:
    """
    Returns the name in [`Eva02ClipModel`] of a tensor of the original vision tower.

    Args:
        key (`str`):
            The original name without prefix, e.g. `blocks.0.norm1.bias`.

    Returns:
        `str`: The name in [`Eva02ClipModel`].

    Raises:
        KeyError: If the tower has no such parameter.
    """
    return _rename(key, VISION_NAMES, "vision")


def rename_text_key(key: str) -> list[str]:
    """
    Returns the names in [`Eva02ClipModel`] of a tensor of the original text tower, which has OpenAI's CLIP's names.

    Args:
        key (`str`):
            The original name without prefix.

    Returns:
        `list[str]`: One name, or the names of query, key and value for the packed input projection.

    Raises:
        KeyError: If the tower has no such parameter.
    """
    name = _rename(key, TEXT_NAMES, "text")
    return [name.format(part) for part in "qkv"] if "{}" in name else [name]


def dropped_vision_reason(key: str) -> str | None:
    """Returns the reason for which a tensor of the original vision tower is dropped, or `None` if it is converted."""
    return "rotary table: computed at run time for each grid" if ROTARY_TABLE.fullmatch(key) else None


def convert_vision_tensor(key: str, tensor: torch.Tensor) -> StateDict:
    """
    Converts a tensor of the original vision tower to its name and shape in [`Eva02ClipModel`].

    Args:
        key (`str`):
            The original name without prefix.
        tensor (`torch.Tensor`):
            The tensor.

    Returns:
        `dict[str, torch.Tensor]`: The converted tensor by its name.

    Raises:
        KeyError: If the tower has no such parameter.
    """
    if key == "cls_token":  # (1, 1, width)
        tensor = tensor.flatten()
    elif key == "pos_embed":  # (1, 1 + patches, width)
        tensor = tensor.squeeze(0)
    return {rename_vision_key(key): tensor}


def convert_text_tensor(key: str, tensor: torch.Tensor) -> StateDict:
    """
    Converts a tensor of the original text tower to its name or names in [`Eva02ClipModel`].

    Args:
        key (`str`):
            The original name without prefix.
        tensor (`torch.Tensor`):
            The tensor.

    Returns:
        `dict[str, torch.Tensor]`: The converted tensors by their names.

    Raises:
        KeyError: If the tower has no such parameter.
    """
    names = rename_text_key(key)
    if key == "text_projection":  # (text width, projection width): the original code multiplies from the left
        tensor = tensor.T
    # safetensors can save neither transposed nor shared memory.
    parts = [part.clone(memory_format=torch.contiguous_format) for part in tensor.chunk(len(names))]
    return dict(zip(names, parts, strict=True))


def is_eva02_clip_state_dict(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether these are the tensors of a published EVA02-CLIP-B/16 or L/14."""
    return SIGNATURE in state_dict


def add_tensors(converted: StateDict, parts: StateDict, key: str) -> None:
    """
    Adds the converted parts of the tensor `key`.

    Raises:
        ValueError: If another tensor of the checkpoint has the same name in the model and other values.
    """
    for name, tensor in parts.items():
        known = converted.get(name)
        if known is not None and (known.dtype != tensor.dtype or not torch.equal(known, tensor)):
            raise ValueError(
                f"{key} is in the checkpoint twice, with and without a prefix, and with different values; remove one"
            )
    converted.update(parts)


def dropped_reason(key: str) -> str | None:
    """Returns the reason for which a tensor of a published checkpoint is dropped, or `None` if it is converted."""
    return dropped_vision_reason(key.removeprefix("visual.")) if key.startswith("visual.") else None


def convert_eva02_clip_state_dict(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """
    Converts all tensors of a published EVA02-CLIP checkpoint to the names of [`Eva02ClipModel`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors under the original names. Those with a [`dropped_reason`] are dropped.

    Returns:
        `dict[str, torch.Tensor]`: The converted tensors.

    Raises:
        ValueError: If tensors are unexpected, missing or of a wrong shape; the error lists all of them.
    """
    converted: StateDict = {}
    unknown = []
    for key, tensor in state_dict.items():
        if dropped_reason(key):
            continue
        try:
            if key in ("logit_scale", "text.logit_scale"):
                parts = {"logit_scale": tensor}
            elif key.startswith("visual."):
                parts = convert_vision_tensor(key.removeprefix("visual."), tensor)
            else:
                parts = convert_text_tensor(key.removeprefix("text."), tensor)
        except KeyError:
            unknown.append(key)
            continue
        add_tensors(converted, parts, key)
    if unknown:
        hint = ""
        if any(key.endswith("attn.qkv.weight") for key in unknown):
            hint = (
                "; attn.qkv is a tensor of EVA01-CLIP and EVA02-CLIP-E/14, which have a different block: only "
                "EVA02-CLIP-B/16, L/14 and L/14-336 can be converted"
            )
        raise ValueError(f"unexpected tensors in an EVA02-CLIP checkpoint{hint}: {', '.join(unknown)}")

    # Names and shapes don't depend on the number of heads; these widths are valid for every tower.
    config = eva02_clip_config_from_state_dict(converted, vision_head_width=4, text_head_width=1)
    with torch.device("meta"):
        expected = Eva02ClipModel(config).state_dict()
    if missing := sorted(set(expected) - set(converted)):
        raise ValueError(f"tensors are missing from the checkpoint: {', '.join(missing)}")
    wrong = [
        f"{name} has shape {tuple(tensor.shape)} and must have {tuple(expected[name].shape)}"
        for name, tensor in converted.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"tensors have wrong shapes: {'; '.join(wrong)}")
    return converted


def _shape(state_dict: Mapping[str, torch.Tensor], name: str) -> torch.Size:
    if name not in state_dict:
        raise ValueError(f"{name} is missing, so the sizes of the model can't be inferred")
    return state_dict[name].shape


def _num_layers(state_dict: Mapping[str, torch.Tensor], tower: str) -> int:
    layers = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.")
    return 1 + max(int(match[1]) for match in map(layers.match, state_dict) if match)


def eva02_clip_vision_config_from_state_dict(
    state_dict: Mapping[str, torch.Tensor], head_width: int = 64
) -> Eva02ClipVisionConfig:
    """
    Infers the configuration of the vision tower from the shapes of its tensors.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors under the names of [`Eva02ClipModel`]; tensors on the meta device suffice.
        head_width (`int`, *optional*, defaults to 64):
            Channels per head, 64 for all published models.

    Returns:
        [`Eva02ClipVisionConfig`]: The configuration.

    Raises:
        ValueError: If a tensor is missing, or the position embeddings do not form a square grid.
    """
    hidden_size, num_channels, patch_size, _ = _shape(state_dict, "vision_model.embeddings.patch_embedding.weight")
    positions = _shape(state_dict, "vision_model.embeddings.position_embedding.weight")[0]
    grid_size = round((positions - 1) ** 0.5)
    if grid_size**2 + 1 != positions:
        raise ValueError(f"there are {positions} position embeddings; they must be a class token and a square grid")
    return Eva02ClipVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=_shape(state_dict, "vision_model.encoder.layers.0.mlp.gate_proj.weight")[0],
        projection_dim=_shape(state_dict, "visual_projection.weight")[0],
        num_hidden_layers=_num_layers(state_dict, "vision_model"),
        num_attention_heads=hidden_size // head_width,
        num_channels=num_channels,
        image_size=grid_size * patch_size,
        patch_size=patch_size,
    )


def eva02_clip_text_config_from_state_dict(
    state_dict: Mapping[str, torch.Tensor], head_width: int = 64
) -> Eva02ClipTextConfig:
    """
    Infers the configuration of the text tower from the shapes of its tensors.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors under the names of [`Eva02ClipModel`]; tensors on the meta device suffice.
        head_width (`int`, *optional*, defaults to 64):
            Channels per head, 64 for all published models.

    Returns:
        [`Eva02ClipTextConfig`]: The configuration.

    Raises:
        ValueError: If a tensor is missing.
    """
    vocab_size, hidden_size = _shape(state_dict, "text_model.embeddings.token_embedding.weight")
    return Eva02ClipTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_shape(state_dict, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
        projection_dim=_shape(state_dict, "text_projection.weight")[0],
        num_hidden_layers=_num_layers(state_dict, "text_model"),
        num_attention_heads=hidden_size // head_width,
        max_position_embeddings=_shape(state_dict, "text_model.embeddings.position_embedding.weight")[0],
    )


def eva02_clip_config_from_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    vision_head_width: int = 64,
    text_head_width: int = 64,
) -> Eva02ClipConfig:
    """Infers the configuration of both towers, see [`eva02_clip_vision_config_from_state_dict`]."""
    vision_config = eva02_clip_vision_config_from_state_dict(state_dict, vision_head_width)
    text_config = eva02_clip_text_config_from_state_dict(state_dict, text_head_width)
    return Eva02ClipConfig(
        vision_config=vision_config, text_config=text_config, projection_dim=vision_config.projection_dim
    )


def read_state_dict(path: Path) -> StateDict:
    """
    Reads the tensors of a `.safetensors` file or of a pickle, which is loaded with `weights_only=True`.

    Args:
        path (`Path`):
            The file. The tensors may be nested in "model", "module" or "state_dict".

    Returns:
        `dict[str, torch.Tensor]`: The tensors by their names.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If the file is corrupt, holds other Python objects or does not hold a state dict; if a tensor is
            there twice, is not floating-point or holds NaN or infinite values.
    """
    damaged = None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # PyTorch does not compare the checksums
                damaged = archive.testzip()
        state_dict = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is corrupt or does not hold only tensors. A pickle of other objects can run code, so it is not "
            "read; if you trust its source, load it with torch.load(..., weights_only=False) and save its state_dict. "
            f"({str(error).splitlines()[0]})"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # the readers raise exceptions of almost any type for damaged files
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path} is corrupt or not a checkpoint: {one_line(error)}") from error
    if damaged is not None:
        raise ValueError(f"{path} is corrupt: the checksum of {damaged} is wrong; download it again")
    for wrapper in ("model", "module", "state_dict"):
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state_dict.items()
    ):
        raise ValueError(f"{path} holds no state_dict, that is a mapping from names to tensors")
    tensors: StateDict = {}
    for key, tensor in state_dict.items():
        name = key.removeprefix("module.")
        _check_tensor(path, name, tensor)
        add_tensors(tensors, {name: tensor}, name)
    return tensors


def _check_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raises `ValueError` unless a tensor can be a weight, or is a count of batches."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{path}: {name} is sparse or quantised; save it as a plain floating-point tensor")
    if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{path}: {name} has dtype {dtype}; weights must be floating-point")
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{path}: {name} holds NaN or infinite values; the file is damaged or the training diverged, use another "
            "checkpoint"
        )


def eva02_clip_from_state_dict(
    state_dict: Mapping[str, torch.Tensor], vision_head_width: int = 64, text_head_width: int = 64
) -> Eva02ClipModel:
    """
    Builds a model from the tensors of a published checkpoint.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors under their original names.
        vision_head_width (`int`, *optional*, defaults to 64):
            Channels per head of the vision tower.
        text_head_width (`int`, *optional*, defaults to 64):
            Channels per head of the text tower.

    Returns:
        [`Eva02ClipModel`]: The model in eval mode, in the dtype of the tensors.

    Raises:
        ValueError: If tensors are unexpected, missing or of a wrong shape; the error lists all of them.
    """
    converted = convert_eva02_clip_state_dict(state_dict)
    config = eva02_clip_config_from_state_dict(converted, vision_head_width, text_head_width)
    return Eva02ClipModel.from_pretrained(None, config=config, state_dict=converted, dtype="auto")


def image_processor_config(image_size: int) -> dict:
    """Returns the `preprocessor_config.json` of the published models: resize, centre crop, CLIP's normalisation."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
    }


def convert(state_dict: Mapping[str, torch.Tensor], output: Path) -> None:
    """
    Writes a model and its image processor to a new folder, atomically, and prints what was converted.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            The tensors of a published checkpoint.
        output (`Path`):
            The folder, which must be new or empty.

    Raises:
        ValueError: If tensors are unexpected, missing or of a wrong shape; the error lists all of them.
    """
    model = eva02_clip_from_state_dict(state_dict)
    processor = image_processor_config(model.config.vision_config.image_size)
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        text = json.dumps(processor, indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")

    dropped = Counter(filter(None, map(dropped_reason, state_dict)))
    print(f"{len(state_dict) - dropped.total()} of {len(state_dict)} tensors converted to {output}")
    for reason, count in dropped.items():
        print(f"{count} dropped, {reason}")
