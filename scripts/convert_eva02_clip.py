"""Published EVA02-CLIP weights (EVA02_CLIP_B_psz16_s8B.pt, EVA02_CLIP_L_psz14_s4B.pt, EVA02_CLIP_L_336_psz14_s6B.pt of
github.com/baaivision/EVA) to a folder that `Eva02ClipModel.from_pretrained` loads."""

import argparse
import json
import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mfuser.configuration_eva02_clip import Eva02ClipConfig, Eva02ClipTextConfig, Eva02ClipVisionConfig
from mfuser.modeling_eva02_clip import Eva02ClipModel

StateDict = dict[str, torch.Tensor]

# Patterns of the original names, without the prefix of the tower, to the names in Eva02ClipModel.
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
    _RESBLOCK + r"attn\.in_proj_(weight|bias)": _TEXT_LAYER + r"self_attn.{}_proj.\2",  # q, k and v in one
    _RESBLOCK + r"attn\.out_proj\.(weight|bias)": _TEXT_LAYER + r"self_attn.out_proj.\2",
    _RESBLOCK + r"mlp\.c_fc\.(weight|bias)": _TEXT_LAYER + r"mlp.fc1.\2",
    _RESBLOCK + r"mlp\.c_proj\.(weight|bias)": _TEXT_LAYER + r"mlp.fc2.\2",
    r"ln_final\.(weight|bias)": r"text_model.final_layer_norm.\1",
    r"text_projection": "text_projection.weight",
}
SIGNATURE = "visual.blocks.0.attn.inner_attn_ln.weight"  # the norm inside attention: no other CLIP has it
ROTARY_TABLE = re.compile(r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)")


def _rename(key: str, names: Mapping[str, str], tower: str) -> str:
    for pattern, name in names.items():
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    raise KeyError(f"{key!r} is no tensor of EVA02-CLIP's {tower} tower")


def rename_vision_key(key: str) -> str:
    """
    Name in [`Eva02ClipModel`] of a tensor of the original vision tower, given without prefix (`blocks.0.norm1.bias`).

    Raises:
        KeyError: the tower has no such parameter.
    """
    return _rename(key, VISION_NAMES, "vision")


def rename_text_key(key: str) -> list[str]:
    """
    Names in [`Eva02ClipModel`] of a tensor of the original text tower, given without a prefix: one name, or query's,
    key's and value's for the packed input projection. OpenAI's CLIP names its text tower alike.

    Raises:
        KeyError: the tower has no such parameter.
    """
    name = _rename(key, TEXT_NAMES, "text")
    return [name.format(part) for part in "qkv"] if "{}" in name else [name]


def dropped_vision_reason(key: str) -> str | None:
    """Why a tensor of the original vision tower, given without a prefix, has no place in ours; None if it has one."""
    return "rotary table: computed at run time for the grid at hand" if ROTARY_TABLE.fullmatch(key) else None


def convert_vision_tensor(key: str, tensor: torch.Tensor) -> StateDict:
    """One tensor of the original vision tower (key without prefix) under its name, in its shape in [`Eva02ClipModel`].

    Raises:
        KeyError: the tower has no such parameter.
    """
    if key == "cls_token":  # (1, 1, width)
        tensor = tensor.flatten()
    elif key == "pos_embed":  # (1, 1 + patches, width)
        tensor = tensor.squeeze(0)
    return {rename_vision_key(key): tensor}


def convert_text_tensor(key: str, tensor: torch.Tensor) -> StateDict:
    """One tensor of the original text tower (key without prefix) under its name or names in [`Eva02ClipModel`].

    Raises:
        KeyError: the tower has no such parameter.
    """
    names = rename_text_key(key)
    if key == "text_projection":  # (text width, projection width): the original multiplies from the left
        tensor = tensor.T
    # Copies, because safetensors takes neither transposed nor shared memory.
    parts = [part.clone(memory_format=torch.contiguous_format) for part in tensor.chunk(len(names))]
    return dict(zip(names, parts, strict=True))


def is_eva02_clip_state_dict(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are the names of a published EVA02-CLIP with the block of B/16 and L/14."""
    return SIGNATURE in state_dict


def dropped_reason(key: str) -> str | None:
    """Why a tensor of a published checkpoint has no place in [`Eva02ClipModel`]; None if it has one."""
    return dropped_vision_reason(key.removeprefix("visual.")) if key.startswith("visual.") else None


def convert_eva02_clip_state_dict(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """
    The tensors of a published EVA02-CLIP checkpoint under the names of [`Eva02ClipModel`]. Every tensor is converted,
    or dropped for the reason that [`dropped_reason`] gives.

    Raises:
        ValueError: tensors that the model doesn't know or that it misses, all of them listed.
    """
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        if dropped_reason(key):
            continue
        try:
            if key in ("logit_scale", "text.logit_scale"):
                converted["logit_scale"] = tensor
            elif key.startswith("visual."):
                converted.update(convert_vision_tensor(key.removeprefix("visual."), tensor))
            else:
                converted.update(convert_text_tensor(key.removeprefix("text."), tensor))
        except KeyError:
            unknown.append(key)
    if unknown:
        hint = ""
        if any(key.endswith("attn.qkv.weight") for key in unknown):
            hint = (
                "; attn.qkv belongs to EVA01-CLIP and EVA02-CLIP-E/14, whose block is another: the models that can be "
                "converted are EVA02-CLIP-B/16, L/14 and L/14-336"
            )
        raise ValueError(f"not tensors of an EVA02-CLIP{hint}: {', '.join(unknown)}")

    # Names and shapes don't depend on the heads: here they are the narrowest that a configuration takes.
    config = eva02_clip_config_from_state_dict(converted, vision_head_width=4, text_head_width=1)
    with torch.device("meta"):
        expected = Eva02ClipModel(config).state_dict()
    if missing := sorted(set(expected) - set(converted)):
        raise ValueError(f"the checkpoint lacks what these tensors are made of: {', '.join(missing)}")
    wrong = [
        f"{name} {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
        for name, tensor in converted.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"shapes that don't fit together: {'; '.join(wrong)}")
    return converted


def _shape(state_dict: Mapping[str, torch.Tensor], name: str) -> torch.Size:
    if name not in state_dict:
        raise ValueError(f"the sizes of the model can't be told without {name}")
    return state_dict[name].shape


def _num_layers(state_dict: Mapping[str, torch.Tensor], tower: str) -> int:
    layers = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.")
    return 1 + max(int(match[1]) for match in map(layers.match, state_dict) if match)


def eva02_clip_vision_config_from_state_dict(
    state_dict: Mapping[str, torch.Tensor], head_width: int = 64, rope_pretrained_grid: int = 16
) -> Eva02ClipVisionConfig:
    """
    Sizes of the vision tower, from tensors under the names of [`Eva02ClipModel`] (meta tensors will do). Shapes tell
    neither the heads nor the pretrained grid: 64 channels a head and 16 patches a side for every published model.

    Raises:
        ValueError: a tensor is missing, or the position table belongs to no square grid.
    """
    hidden_size, num_channels, patch_size, _ = _shape(state_dict, "vision_model.embeddings.patch_embedding.weight")
    positions = _shape(state_dict, "vision_model.embeddings.position_embedding.weight")[0]
    grid_size = round((positions - 1) ** 0.5)
    if grid_size**2 + 1 != positions:
        raise ValueError(f"{positions} positions are not a class token and a square grid")
    return Eva02ClipVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=_shape(state_dict, "vision_model.encoder.layers.0.mlp.gate_proj.weight")[0],
        projection_dim=_shape(state_dict, "visual_projection.weight")[0],
        num_hidden_layers=_num_layers(state_dict, "vision_model"),
        num_attention_heads=hidden_size // head_width,
        num_channels=num_channels,
        image_size=grid_size * patch_size,
        patch_size=patch_size,
        rope_pretrained_grid=rope_pretrained_grid,
    )


def eva02_clip_text_config_from_state_dict(
    state_dict: Mapping[str, torch.Tensor], head_width: int = 64
) -> Eva02ClipTextConfig:
    """
    Sizes of the text tower, from tensors under the names of [`Eva02ClipModel`] (meta tensors will do).

    Raises:
        ValueError: a tensor is missing.
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
    rope_pretrained_grid: int = 16,
) -> Eva02ClipConfig:
    """Sizes of both towers, from tensors under the names of [`Eva02ClipModel`]; see the functions for one tower."""
    vision_config = eva02_clip_vision_config_from_state_dict(state_dict, vision_head_width, rope_pretrained_grid)
    text_config = eva02_clip_text_config_from_state_dict(state_dict, text_head_width)
    return Eva02ClipConfig(
        vision_config=vision_config, text_config=text_config, projection_dim=vision_config.projection_dim
    )


def read_state_dict(path: Path) -> StateDict:
    """
    The tensors of a `.safetensors` file or of a pickle (read as weights only), taken out of what wraps them.

    Raises:
        ValueError: the file is none of these, holds Python objects, or no tensors.
    """
    try:
        state_dict = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of tensors alone, or a damaged one. A pickle of other objects can run code and is not "
            "read; if you trust its source, load it with torch.load(..., weights_only=False) and save its state_dict "
            f"alone. ({str(error).splitlines()[0]})"
        ) from None
    except (EOFError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint: {error or 'it ends too soon'}") from None
    for wrapper in ("model", "module", "state_dict"):
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in state_dict.values()
    ):
        raise ValueError(f"{path} holds no state_dict: names with a tensor each")
    return {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}


def load_eva02_clip_state_dict(path: str | Path) -> StateDict:
    """
    The tensors of a published checkpoint file (`.pt` or `.safetensors`).

    Raises:
        ValueError: the file holds no EVA02-CLIP.
    """
    state_dict = read_state_dict(Path(path))
    if not is_eva02_clip_state_dict(state_dict):
        raise ValueError(
            f"{path} is no EVA02-CLIP-B/16 or L/14: it has no tensor {SIGNATURE}, but "
            f"{', '.join(list(state_dict)[:5])} ..."
        )
    return state_dict


def eva02_clip_from_state_dict(
    state_dict: Mapping[str, torch.Tensor], vision_head_width: int = 64, text_head_width: int = 64
) -> Eva02ClipModel:
    """
    A model in eval mode with the tensors of a published checkpoint, in their dtype.

    Raises:
        ValueError: tensors are unknown, missing or of another shape.
    """
    converted = convert_eva02_clip_state_dict(state_dict)
    config = eva02_clip_config_from_state_dict(converted, vision_head_width, text_head_width)
    return Eva02ClipModel.from_pretrained(None, config=config, state_dict=converted, dtype="auto")


def image_processor_config(image_size: int) -> dict:
    """`preprocessor_config.json` of the published models: the centre square, resized, normalised as for CLIP."""
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
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mfuser.scripts.convert_eva02_clip", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="the published file, .pt or .safetensors")
    parser.add_argument("output", type=Path, help="the folder to write")
    options = parser.parse_args(arguments)

    state_dict = load_eva02_clip_state_dict(options.checkpoint)
    model = eva02_clip_from_state_dict(state_dict)
    model.save_pretrained(options.output)
    processor = image_processor_config(model.config.vision_config.image_size)
    (options.output / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")

    dropped = Counter(filter(None, map(dropped_reason, state_dict)))
    print(f"{len(state_dict) - dropped.total()} of {len(state_dict)} tensors converted to {options.output}")
    for reason, count in dropped.items():
        print(f"{count} dropped, {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
