"""Converts the authors' MFuser checkpoints (`.pth`, mmsegmentation's format) to the format of Transformers.

    mfuser convert mfuser-clip-gta.pth --output mfuser-clip-gta

The output folder holds weights, configuration, image processor, code and model card. Every tensor of the checkpoint is
converted, or dropped for a reason that is printed. The folder must be new or empty, and appears when it is complete.
Exit code: 0 if the checkpoint was converted, 2 if not.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import SiglipModel

from mfuser.class_names_mfuser import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_CLIP_TOKENS,
    CLIP_END_TOKEN,
    CLIP_START_TOKEN,
    class_token_ids,
    clip_token_row,
    pretrained_tokenizer,
)
from mfuser.configuration_mfuser import MFuserConfig
from mfuser.files import atomic_folder, check_new_folder, read_json, sha256
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.pretrained_mfuser import load_encoder
from mfuser.scripts import cli, convert_eva02_clip
from mfuser.scripts.checkpoint_names import convert_state_dict, detect_variant, dropped_reason
from mfuser.scripts.convert_eva02_clip import (
    eva02_clip_text_config_from_state_dict,
    eva02_clip_vision_config_from_state_dict,
    is_eva02_clip_state_dict,
    read_state_dict,
)
from mfuser.scripts.model_card import write_model_card

ENCODER_PARTS = ("vfm_config", "vlm_config", "text_config")
HEAD_WIDTH = 64  # channels per head in all published encoders
PUBLISHED_SIGLIP = "google/siglip-large-patch16-384"


def config_from_state_dict(
    converted: Mapping[str, torch.Tensor], variant: str, known: dict | None = None
) -> MFuserConfig:
    """
    Builds the configuration of a model from its tensors.

    Args:
        converted (`Mapping[str, torch.Tensor]`):
            Tensors under the names of [`MFuserForSemanticSegmentation`]; tensors on the meta device suffice.
        variant (`str`):
            One of "clip", "eva02_clip" and "siglip".
        known (`dict`, *optional*):
            Fields of [`MFuserConfig`] that can't be inferred from shapes and differ from the published models: heads
            (64 channels each), taps, crop, stride, class names and their token ids.

    Returns:
        [`MFuserConfig`]: The configuration.

    Raises:
        ValueError: If a tensor is missing or shapes are inconsistent.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in converted:
            raise ValueError(f"{name} is missing, so the sizes of the model can't be inferred")
        if converted[name].dim() != dimensions:
            raise ValueError(f"{name} has shape {tuple(converted[name].shape)}; it must have {dimensions} dimensions")
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
            f"the checkpoint has {num_classes} classes, but id2label has {len(names)}; pass id2label and "
            "class_token_ids with --config"
        )
    if variant != "siglip":
        fields.setdefault("class_token_ids", [clip_token_row(tokens) for tokens in CITYSCAPES_CLIP_TOKENS])
    fields["label2id"] = {label: int(index) for index, label in names.items()}
    return MFuserConfig(**fields)


def _vlm_fields(converted: Mapping[str, torch.Tensor], variant: str, known: dict, shape, count) -> dict:
    """Returns the configurations of the two towers of the vision-language model."""
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
    """Returns the fields that the SigLIP variant takes from the pretrained SigLIP."""
    siglip = load_encoder(model, {"siglip": SiglipModel}, "pretrained SigLIP")
    return {
        "class_token_ids": class_token_ids(class_names, pretrained_tokenizer(model)),
        "loss_logit_scale": siglip.logit_scale.item(),
        "loss_logit_bias": siglip.logit_bias.item(),
    }


def convert_checkpoint(
    state_dict: Mapping[str, torch.Tensor], known: dict | None = None, siglip: str = PUBLISHED_SIGLIP
) -> MFuserForSemanticSegmentation:
    """
    Builds a model from the tensors of an MFuser checkpoint.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors under the authors' names.
        known (`dict`, *optional*):
            See [`config_from_state_dict`].
        siglip (`str`, *optional*, defaults to `"google/siglip-large-patch16-384"`):
            Folder or Hub id of the pretrained SigLIP, whose tokenizer, logit scale and logit bias the SigLIP variant
            uses if `known` does not hold them.

    Returns:
        [`MFuserForSemanticSegmentation`]: The model in eval mode.

    Raises:
        ValueError: If tensors are unexpected, missing or of a wrong shape; the error lists all of them.
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
        f"{name} has shape {tuple(found)} and must have {tuple(wanted)}"
        for name, found, wanted in report["mismatched_keys"]
    ]
    if problems:
        raise ValueError(f"the tensors of the checkpoint ({variant}) don't match the model: {'; '.join(problems)}")
    return model.eval()


@cli.reports_errors("convert")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mfuser convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="an MFuser checkpoint (.pth) or a published EVA02-CLIP (.pt)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to; it must be new or empty")
    parser.add_argument(
        "--config",
        type=Path,
        help="JSON file of MFuserConfig fields that differ from the published models (heads, taps, ...)",
    )
    parser.add_argument(
        "--siglip",
        help="folder or Hub id of the pretrained SigLIP, for the SigLIP variant's tokenizer, logit scale and bias "
        f"(default: {PUBLISHED_SIGLIP})",
    )
    options = parser.parse_args(arguments)
    if not options.checkpoint.is_file():
        parser.error(f"{options.checkpoint} is not a file")
    check_new_folder(options.output)
    state_dict = read_state_dict(options.checkpoint)
    if is_eva02_clip_state_dict(state_dict):
        for option in ("config", "siglip"):
            if getattr(options, option):
                raise ValueError(f"--{option} is for MFuser checkpoints, but {options.checkpoint} is an EVA02-CLIP")
        convert_eva02_clip.convert(state_dict, options.output)
        return 0
    known = read_json(options.config) if options.config else None
    variant = detect_variant(state_dict)
    if options.siglip and variant != "siglip":
        raise ValueError(f"--siglip is for the SigLIP variant, but {options.checkpoint} is the {variant} variant")
    model = convert_checkpoint(state_dict, known, options.siglip or PUBLISHED_SIGLIP)
    save_converted(model, options.output, options.checkpoint)
    dropped = Counter(filter(None, (dropped_reason(key, variant) for key in state_dict)))
    print(f"{variant}: {len(state_dict) - dropped.total()} of {len(state_dict)} tensors converted to {options.output}")
    for reason, number in dropped.items():
        print(f"{number} dropped: {reason}")
    return 0


def save_converted(model: MFuserForSemanticSegmentation, output: Path, checkpoint: Path) -> None:
    """Writes weights, configuration, image processor, code and model card to a new folder, atomically."""
    about = f"Converted from the authors' `{checkpoint.name}` (SHA-256 `{sha256(checkpoint)}`)."
    with atomic_folder(output) as folder:
        # save_pretrained adds only the saved class; AutoModel loads the base model from the same folder
        model.save_pretrained(folder)
        MFuserImageProcessor().save_pretrained(folder)
        write_model_card(folder, model.config, folder.name, about)


if __name__ == "__main__":
    sys.exit(main())
