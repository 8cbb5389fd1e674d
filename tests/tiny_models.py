"""Small random models of every kind, shared by the tests."""

import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast

from mfuser import MFuserConfig, MFuserForSemanticSegmentation

CLASSES = ("road", "sky", "car", "person")
CLIP_TOKENS = [[49406, 1759, 49407, 0, 0], [49406, 2390, 49407, 0, 0], [49406, 1615, 49407, 0, 0]]
CLIP_TOKENS.append([49406, 2533, 2533, 49407, 0])
SIGLIP_TOKENS = [[7, 9, 1, 1, 1], [3, 1, 1, 1, 1], [4, 5, 6, 1, 1], [8, 1, 1, 1, 1]]

DINOV2 = dict(model_type="dinov2", hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2)
DINOV2 |= dict(image_size=64, patch_size=16, use_mask_token=False)
REGISTERS = DINOV2 | dict(model_type="dinov2_with_registers")
REGISTERS.pop("use_mask_token")
DINOV3 = dict(model_type="dinov3_vit", hidden_size=32, intermediate_size=64, num_hidden_layers=4, image_size=64)
DINOV3 |= dict(num_attention_heads=2, patch_size=16, num_register_tokens=4)
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
VISION = TOWER | dict(image_size=64, patch_size=16)
TEXT = TOWER | dict(num_hidden_layers=2, max_position_embeddings=10)
CLIP = dict(
    vlm_config=VISION | dict(model_type="clip_vision_model", projection_dim=24),
    text_config=TEXT | dict(model_type="clip_text_model", projection_dim=24, bos_token_id=49406, eos_token_id=49407),
    class_token_ids=CLIP_TOKENS,
)
EVA02 = dict(
    vlm_config=VISION | dict(model_type="eva02_clip_vision_model", projection_dim=24, rope_pretrained_grid=4),
    text_config=TEXT | dict(model_type="eva02_clip_text_model", projection_dim=24),
    class_token_ids=CLIP_TOKENS,
)
SIGLIP = dict(
    vlm_config=VISION | dict(model_type="siglip_vision_model"),
    text_config=TEXT | dict(model_type="siglip_text_model", vocab_size=16, projection_size=32),
    class_token_ids=SIGLIP_TOKENS,
    loss_logit_scale=1.5,
    loss_logit_bias=-2.0,
)
SIGLIP2 = SIGLIP | dict(
    vlm_config=TOWER | dict(model_type="siglip2_vision_model", patch_size=16, num_patches=16),
    text_config=TEXT | dict(model_type="siglip2_text_model", vocab_size=16, projection_size=32),
)
PATCH14 = dict(image_size=60, patch_size=14)

# Pairs of encoders, and pairs that differ in width, depth or patch size.
PAIRS = {
    "dinov2+clip": dict(vfm_config=DINOV2, **CLIP),
    "dinov2+eva02_clip": dict(vfm_config=DINOV2, **EVA02),
    "dinov2+siglip": dict(vfm_config=DINOV2, **SIGLIP),
    "dinov2+siglip2": dict(vfm_config=DINOV2, **SIGLIP2),
    "dinov2_with_registers+clip": dict(vfm_config=REGISTERS, **CLIP),
    "dinov3+clip": dict(vfm_config=DINOV3, **CLIP),
    "dinov3+siglip2": dict(vfm_config=DINOV3, **SIGLIP2),
    "dinov2_with_registers+eva02_clip": dict(vfm_config=REGISTERS, **EVA02),
    "wider dinov2+siglip": dict(vfm_config=DINOV2 | dict(hidden_size=48), **SIGLIP),
    "deeper dinov2+clip": dict(
        vfm_config=DINOV2 | dict(num_hidden_layers=6), fusion_layer_pairs=[[2, 1], [3, 2], [5, 3], [6, 4]], **CLIP
    ),
    "patch 14 clip": dict(
        vfm_config=DINOV2 | PATCH14, crop_size=60, **(CLIP | dict(vlm_config=CLIP["vlm_config"] | PATCH14))
    ),
    "patch 14 siglip": dict(
        vfm_config=DINOV2 | PATCH14, crop_size=60, **(SIGLIP | dict(vlm_config=SIGLIP["vlm_config"] | PATCH14))
    ),
}


# The smallest fusion, decoder and losses that have all their parts.
FUSION = dict(
    fusion_out_layers=[1, 2, 3, 4],
    enhancer_hidden_size=32,
    enhancer_num_heads=2,
    decoder_hidden_size=64,
    decoder_num_heads=4,
    decoder_pixel_layers=1,
    decoder_pixel_feedforward_size=64,
    decoder_num_layers=2,
    decoder_feedforward_size=64,
    loss_num_points=64,
)


def tiny_config(pair: str = "dinov2+clip", **fields) -> MFuserConfig:
    common = dict(
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
        crop_size=64,
        crop_stride=42,
    )
    return MFuserConfig(**(FUSION | common | PAIRS[pair] | fields))


def tiny_model(pair: str = "dinov2+clip", seed: int = 0, **fields) -> MFuserForSemanticSegmentation:
    """Returns a model in eval mode, in which the scales that are initialised near zero have an effect."""
    torch.manual_seed(seed)
    model = MFuserForSemanticSegmentation(tiny_config(pair, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mvfuser.scale"):
                parameter.fill_(0.5)
    return model.eval()


def tiny_batch(size: tuple[int, int] = (64, 64), batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(CLASSES), (batch, *size), generator=generator)
    labels[:, :8] = 255
    return {"pixel_values": torch.randn(batch, 3, *size, generator=generator), "labels": labels}


def tiny_tokenizer(clip: bool = True) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of words, with start and end tokens as CLIP's, or with an end token only as SigLIP's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "<pad>", "<end>", *"road sky car person street tree traffic light way of life".split()]
    vocabulary = {word: index for index, word in enumerate(words)}
    if clip:
        vocabulary |= {"<start>": 49406, "<end>": 49407}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>" if clip else "$A <end>",
        special_tokens=[(name, vocabulary[name]) for name in ("<start>", "<end>") if name in vocabulary],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        bos_token="<start>" if clip else None,
    )


def save_tiny_encoders(folder) -> dict[str, str]:
    """Saves a DINOv2 and a CLIP, which need resampling, and returns their folders as `vfm` and `vlm`."""
    torch.manual_seed(0)
    fields = {name: value for name, value in DINOV2.items() if name != "model_type"}
    Dinov2Model(Dinov2Config(**fields | {"image_size": 96})).save_pretrained(folder / "vfm")
    text = TEXT | dict(max_position_embeddings=16, bos_token_id=49406, eos_token_id=49407)
    CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=24)).save_pretrained(folder / "vlm")
    tiny_tokenizer().save_pretrained(folder / "vlm")
    return {"vfm": str(folder / "vfm"), "vlm": str(folder / "vlm")}


def enable_checkpointing(model, **kwargs):
    """Activation checkpointing, under the name that it has in this version of Transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)
