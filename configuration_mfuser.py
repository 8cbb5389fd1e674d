"""Every number of an MFuser model, and the checks that they fit together."""

import difflib
import math

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPTextConfig, CLIPVisionConfig, Dinov2Config, PreTrainedConfig

from .class_names_mfuser import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_CLIP_TOKENS,
    CLIP_END_TOKEN,
    CLIP_START_TOKEN,
    IGNORE_INDEX,
    clip_token_row,
)
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

# The text tower that belongs to each vision-language model's vision tower.
TEXT_TOWER_OF = {
    "clip_vision_model": "clip_text_model",
    "eva02_clip_vision_model": "eva02_clip_text_model",
    "siglip_vision_model": "siglip_text_model",
    "siglip2_vision_model": "siglip2_text_model",
}
CLIP_TOKENIZED = ("clip_vision_model", "eva02_clip_vision_model")
VFM_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
OWN_CONFIGS = {config.model_type: config for config in (Eva02ClipVisionConfig, Eva02ClipTextConfig)}
OWN_FIELDS = ("fusion_", "vlm_", "vfm_", "text_", "enhancer_", "decoder_", "loss_", "crop_", "class_token")  # prefixes


def encoder_config(value: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    """The configuration of an encoder, of the class that its `model_type` names."""
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(default if value is None else value)
    model_type = value.pop("model_type", default["model_type"])
    known = (*VFM_TYPES, *TEXT_TOWER_OF, *TEXT_TOWER_OF.values())
    if model_type not in known:
        raise ValueError(f"{model_type!r} is no model_type of an encoder; it must be one of {', '.join(known)}")
    if value.get("num_attention_heads", 1) < 1:
        raise ValueError(f"the {model_type} has {value['num_attention_heads']} attention heads; it must have some")
    if model_type in OWN_CONFIGS:
        return OWN_CONFIGS[model_type](**value)
    return AutoConfig.for_model(model_type, **value)


@strict
class MFuserConfig(PreTrainedConfig):
    r"""
    Configuration of [`MFuserModel`] and [`MFuserForSemanticSegmentation`]. The defaults are the full-size CLIP variant
    of "Mamba as a Bridge" (CVPR 2025, arXiv 2504.03193) on the 19 Cityscapes classes.

    Args:
        vfm_config, vlm_config, text_config (`dict` or [`PreTrainedConfig`]):
            The vision foundation model, the vision-language model's vision tower, and its text tower. `model_type`
            chooses the class.
        use_text_encoder (`bool`, defaults to `True`):
            `False` for a model that holds its class embeddings as a tensor and needs no text encoder
            ([`MFuserModel.store_class_embeddings`]).
        class_token_ids (`list[list[int]]`):
            One row of token ids a class (start, name, end, padding), so that a checkpoint segments without a
            tokenizer. Rows are in the order of `id2label`.
        text_prompt_length (`int`, defaults to 5):
            Learned context vectors, put in after the first token of every class name (paper, section 3.3).
        fusion_layer_pairs (`list[list[int]]`, *optional*):
            `[[a, b], ...]`: an MVFuser stands after layer a of the vision foundation model and layer b of the
            vision-language model (1-based, ascending). Needed only for encoders of different depth; by default
            every layer is paired with its like.
        fusion_out_layers (`list[int]`, defaults to `[8, 12, 16, 24]`):
            The pairs (1-based) after which the four levels of the feature pyramid are taken, fine to coarse.
        fusion_project_vfm (`bool`, *optional*):
            Linear maps between the two widths around every MVFuser, and before both streams are merged. Without
            them the widths must agree. By default as in the paper: with CLIP, or where the widths differ.
        fusion_state_size, fusion_conv_kernel, fusion_dropout, fusion_initial_scale:
            The MVFuser: state channels, width of its convolutions (odd), dropout, and the start of its output scale.
        vlm_drop_path_rate (`float`, *optional*):
            Stochastic depth of the vision-language model in training, rising from 0 over its layers. By default as
            in the paper: 0.1 with CLIP, else none.
        enhancer_hidden_size, enhancer_num_heads, enhancer_num_layers, enhancer_mlp_ratio: The MTEnhancer.
        decoder_hidden_size, decoder_num_heads, decoder_num_points:
            Width and heads of both decoders, sampling points per head and level of the deformable attention.
        decoder_pixel_layers, decoder_pixel_feedforward_size: The pixel decoder.
        decoder_num_layers, decoder_feedforward_size: The transformer decoder.
        loss_class_weight, loss_mask_weight, loss_dice_weight, loss_score_map_weight, loss_no_object_weight:
            Weights of the losses, and the class weight of "no object".
        loss_num_points, loss_oversample_ratio, loss_importance_ratio: Points of the mask losses.
        loss_temperature (`float`, defaults to 0.07):
            Divides the score map in its loss.
        loss_logit_scale, loss_logit_bias (`float`, *optional*):
            In place of the temperature: score map * exp(scale) + bias, the pretrained SigLIP's own numbers.
        semantic_loss_ignore_index (`int`, defaults to 255): Label that no loss sees.
        crop_size, crop_stride (`int`, defaults to 512, 341):
            Larger images are segmented by square windows of this size and stride in eval mode.
        windows_per_batch (`int`, *optional*):
            Windows of an image that are computed together; by default as many as memory takes.
        queries_vote_for_own_class (`bool`, defaults to `False`):
            Scores from each query's own class alone ([`MFuserForSemanticSegmentation.set_class_names`]).
        freeze_encoders (`bool`, defaults to `True`):
            The encoders (text included) don't train and stay in eval mode.

    Raises:
        ValueError: values that can't work together, with what would.
    """

    model_type = "mfuser"
    sub_configs = sub_configs_defaults = {
        "vfm_config": Dinov2Config,
        "vlm_config": CLIPVisionConfig,
        "text_config": CLIPTextConfig,
    }
    attribute_map = {"hidden_size": "decoder_hidden_size"}
    keys_to_ignore_at_inference = [
        "class_queries_logits",
        "masks_queries_logits",
        "score_map",
        "hidden_states",
        "vfm_hidden_states",
        "loss_components",
    ]

    vfm_config: dict | PreTrainedConfig | None = None
    vlm_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    use_text_encoder: bool = True
    class_token_ids: list | None = None
    text_prompt_length: int = 5

    fusion_layer_pairs: list | None = None
    fusion_out_layers: list | tuple = (8, 12, 16, 24)
    fusion_project_vfm: bool | None = None
    fusion_state_size: int = 16
    fusion_conv_kernel: int = 3
    fusion_dropout: float | int = 0.1
    fusion_initial_scale: float | int = 1e-3
    vlm_drop_path_rate: float | int | None = None

    enhancer_hidden_size: int = 256
    enhancer_num_heads: int = 4
    enhancer_num_layers: int = 1
    enhancer_mlp_ratio: int = 4

    decoder_hidden_size: int = 256
    decoder_num_heads: int = 8
    decoder_num_points: int = 4
    decoder_pixel_layers: int = 6
    decoder_pixel_feedforward_size: int = 2048
    decoder_num_layers: int = 9
    decoder_feedforward_size: int = 2048

    loss_class_weight: float | int = 2.0
    loss_mask_weight: float | int = 5.0
    loss_dice_weight: float | int = 5.0
    loss_score_map_weight: float | int = 1.0
    loss_no_object_weight: float | int = 0.1
    loss_num_points: int = 12544
    loss_oversample_ratio: float | int = 3.0
    loss_importance_ratio: float | int = 0.75
    loss_temperature: float | int = 0.07
    loss_logit_scale: float | int | None = None
    loss_logit_bias: float | int | None = None
    semantic_loss_ignore_index: int = IGNORE_INDEX

    crop_size: int = 512
    crop_stride: int = 341
    windows_per_batch: int | None = None
    queries_vote_for_own_class: bool = False
    freeze_encoders: bool = True
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        for name in kwargs:
            if name.startswith(OWN_FIELDS):  # all others are Transformers' own, which keeps what it doesn't know
                nearest = difflib.get_close_matches(name, type(self).__dataclass_fields__, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"MFuserConfig has no field {name!r}{hint}")
        for name, default in DEFAULT_ENCODERS.items():
            setattr(self, name, encoder_config(getattr(self, name), default))
        is_clip = self.vlm_config.model_type == "clip_vision_model"
        if self.fusion_project_vfm is None:
            self.fusion_project_vfm = is_clip or self.vfm_config.hidden_size != self.vlm_config.hidden_size
        if self.vlm_drop_path_rate is None:
            self.vlm_drop_path_rate = 0.1 if is_clip else 0.0
        self.fusion_out_layers = list(self.fusion_out_layers)
        if self.id2label is None and kwargs.get("num_labels") is None:
            self.id2label = dict(enumerate(CITYSCAPES_CLASSES))
            self.label2id = {name: index for index, name in self.id2label.items()}
            if self.class_token_ids is None and self.vlm_config.model_type in CLIP_TOKENIZED:
                self.class_token_ids = [clip_token_row(tokens) for tokens in CITYSCAPES_CLIP_TOKENS]
        super().__post_init__(**kwargs)
        self.check()

    @property
    def num_levels(self) -> int:
        """Levels of the feature pyramid that the transformer decoder attends to (strides 32, 16 and 8)."""
        return len(self.fusion_out_layers) - 1

    @property
    def layer_pairs(self) -> list[tuple[int, int]]:
        """(layers of the VFM, layers of the VLM) run before each MVFuser, 1-based."""
        if self.fusion_layer_pairs is not None:
            return [tuple(pair) for pair in self.fusion_layer_pairs]
        return [(layer, layer) for layer in range(1, self.vfm_config.num_hidden_layers + 1)]

    def vlm_drop_path_rates(self, training: bool) -> list[float]:
        """Rate of stochastic depth for each layer of the vision-language model: from 0 to `vlm_drop_path_rate`."""
        layers = self.vlm_config.num_hidden_layers
        rate = self.vlm_drop_path_rate if training else 0.0
        return [rate * layer / max(layers - 1, 1) for layer in range(layers)]

    def check(self):
        """Raises `ValueError` for values that can't work together. Models call it too: fields may be set later."""
        self._check_ranges()
        self._check_encoders()
        self._check_fusion()
        self._check_text()
        self._check_decoder_and_losses()
        if self.crop_size < self.patch_size:
            raise ValueError(f"crop_size is {self.crop_size}; it must hold a patch, {self.patch_size} pixels")
        if not 1 <= self.crop_stride <= self.crop_size:
            raise ValueError(
                f"crop_stride is {self.crop_stride}; it must be between 1 and crop_size ({self.crop_size}), "
                "or pixels between two crops would be left out"
            )

    @property
    def patch_size(self) -> int:
        return self.vlm_config.patch_size

    def _check_ranges(self):
        for name in (
            *("fusion_state_size", "fusion_conv_kernel", "enhancer_hidden_size", "enhancer_num_heads"),
            *("enhancer_num_layers", "enhancer_mlp_ratio", "decoder_hidden_size", "decoder_num_heads"),
            *("decoder_num_points", "decoder_pixel_layers", "decoder_pixel_feedforward_size", "decoder_num_layers"),
            *("decoder_feedforward_size", "loss_num_points", "windows_per_batch"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("loss_class_weight", "loss_mask_weight", "loss_dice_weight", "loss_score_map_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("fusion_dropout", "vlm_drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name in ("loss_temperature", "loss_no_object_weight"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.loss_importance_ratio <= 1:
            raise ValueError(f"loss_importance_ratio is {self.loss_importance_ratio}; it must be in [0, 1]")
        if self.loss_oversample_ratio < 1:
            raise ValueError(f"loss_oversample_ratio is {self.loss_oversample_ratio}; it must be at least 1")
        if self.text_prompt_length < 0:
            raise ValueError(f"text_prompt_length is {self.text_prompt_length}; it must not be negative")
        if sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(f"id2label has the keys {sorted(self.id2label)}; they must be 0 to {self.num_labels - 1}")

    def _check_encoders(self):
        vfm, vlm, text = self.vfm_config, self.vlm_config, self.text_config
        if vfm.model_type not in VFM_TYPES:
            raise ValueError(f"vfm_config.model_type is {vfm.model_type!r}; it must be one of {', '.join(VFM_TYPES)}")
        if vlm.model_type not in TEXT_TOWER_OF:
            raise ValueError(
                f"vlm_config.model_type is {vlm.model_type!r}; it must be one of {', '.join(TEXT_TOWER_OF)}"
            )
        if self.use_text_encoder and text.model_type != TEXT_TOWER_OF[vlm.model_type]:
            raise ValueError(
                f"text_config.model_type is {text.model_type!r}; the text tower of {vlm.model_type!r} is "
                f"{TEXT_TOWER_OF[vlm.model_type]!r}"
            )
        if vfm.patch_size != vlm.patch_size:
            raise ValueError(
                f"vfm_config.patch_size is {vfm.patch_size} and vlm_config.patch_size {vlm.patch_size}; they must be "
                "equal, so that both token grids coincide (from_vfm_vlm_pretrained resamples the patch kernels)"
            )
        for name, encoder in (("vfm_config", vfm), ("vlm_config", vlm), ("text_config", text)):
            if encoder.num_attention_heads < 1 or encoder.hidden_size % encoder.num_attention_heads:
                raise ValueError(
                    f"{name}.hidden_size ({encoder.hidden_size}) must be divisible by its num_attention_heads "
                    f"({encoder.num_attention_heads})"
                )
        if not getattr(vlm, "vision_use_head", True):
            raise ValueError("this SigLIP has no pooling head (vision_use_head=False), so no space to share with text")
        if self.use_text_encoder and getattr(text, "projection_size", vlm.hidden_size) != vlm.hidden_size:
            raise ValueError(
                f"text_config.projection_size is {text.projection_size}; it must be vlm_config.hidden_size "
                f"({vlm.hidden_size}), so that text and image share a space"
            )

    def _check_fusion(self):
        vfm, vlm = self.vfm_config, self.vlm_config
        if self.fusion_layer_pairs is None and vfm.num_hidden_layers != vlm.num_hidden_layers:
            raise ValueError(
                f"the encoders have {vfm.num_hidden_layers} and {vlm.num_hidden_layers} layers; name the layers to "
                "fuse after, for example "
                f"fusion_layer_pairs={evenly_paired(vfm.num_hidden_layers, vlm.num_hidden_layers)}"
            )
        depths = (vfm.num_hidden_layers, vlm.num_hidden_layers)
        previous = (0, 0)
        for pair in self.fusion_layer_pairs or ():
            if not (whole_numbers(pair) and len(pair) == 2 and previous[0] < pair[0] and previous[1] < pair[1]):
                raise ValueError(f"fusion_layer_pairs must be ascending pairs of 1-based layers; {pair} is not")
            previous = pair
        if previous[0] > depths[0] or previous[1] > depths[1]:
            raise ValueError(f"fusion_layer_pairs must stay within the encoders' {depths[0]} and {depths[1]} layers")
        pairs, taps = self.layer_pairs, self.fusion_out_layers
        if (
            not whole_numbers(taps)
            or len(taps) != 4
            or sorted({0, *taps, len(pairs) + 1}) != [0, *taps, len(pairs) + 1]
        ):
            raise ValueError(
                f"fusion_out_layers is {taps}; it must be four ascending numbers from 1 to {len(pairs)}, the number "
                "of fused layers"
            )
        if not self.fusion_project_vfm and vfm.hidden_size != vlm.hidden_size:
            raise ValueError(
                f"fusion_project_vfm=False needs encoders of one width; they have {vfm.hidden_size} and "
                f"{vlm.hidden_size}: set it to True"
            )
        if vlm.hidden_size % 2 or self.enhancer_hidden_size % 2:
            raise ValueError("vlm_config.hidden_size and enhancer_hidden_size must be even: an MVFuser halves them")
        if self.fusion_conv_kernel % 2 == 0:
            raise ValueError(f"fusion_conv_kernel is {self.fusion_conv_kernel}; it must be odd to keep the length")

    def _check_text(self):
        if not self.use_text_encoder:
            return
        rows = self.class_token_ids
        if rows is None:
            raise ValueError(
                f"class_token_ids is missing: give one row of token ids for each of the {self.num_labels} classes "
                "(from_vfm_vlm_pretrained(..., class_names=[...]) makes them), or use_text_encoder=False"
            )
        if len(rows) != self.num_labels:
            raise ValueError(
                f"class_token_ids has {len(rows)} rows, but the model has {self.num_labels} labels "
                f"({self._labels()}): give one row for each label, in the order of id2label"
            )
        for row in rows:
            if not (whole_numbers(row) and len(row)):
                raise ValueError(f"class_token_ids must hold a list of token ids for each label; {row!r} is none")
            if min(row) < 0 or max(row) >= self.text_config.vocab_size:
                raise ValueError(
                    f"class_token_ids holds {row}; the vocabulary goes from 0 to {self.text_config.vocab_size - 1}"
                )
        lengths = {len(row) for row in rows}
        if len(lengths) != 1:
            raise ValueError(f"class_token_ids has rows of {sorted(lengths)} ids; pad them to one length")
        needed = lengths.pop() + self.text_prompt_length
        if needed > self.text_config.max_position_embeddings:
            raise ValueError(
                f"text_prompt_length ({self.text_prompt_length}) and the class tokens need {needed} positions; "
                f"text_config.max_position_embeddings is {self.text_config.max_position_embeddings}"
            )

    def _check_decoder_and_losses(self):
        for name, width, heads in (
            ("decoder", self.decoder_hidden_size, self.decoder_num_heads),
            ("enhancer", self.enhancer_hidden_size, self.enhancer_num_heads),
        ):
            if width % heads:
                raise ValueError(f"{name}_hidden_size ({width}) must be divisible by {name}_num_heads ({heads})")
        if self.decoder_hidden_size % 32 or self.decoder_hidden_size < 64:
            raise ValueError(
                f"decoder_hidden_size is {self.decoder_hidden_size}; it must be a multiple of 32 from 64 up, so that "
                "each of GroupNorm's 32 groups has several channels"
            )
        if (self.loss_logit_scale is None) != (self.loss_logit_bias is None):
            raise ValueError("loss_logit_scale and loss_logit_bias go together: give both or neither")
        if 0 <= self.semantic_loss_ignore_index < self.num_labels:
            raise ValueError(
                f"semantic_loss_ignore_index {self.semantic_loss_ignore_index} is also the label "
                f"{self.id2label[self.semantic_loss_ignore_index]!r}"
            )

    def _labels(self) -> str:
        names = list(self.id2label.values())
        return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def whole_numbers(values) -> bool:
    """Whether this is a list of ints, as JSON keeps them."""
    return isinstance(values, (list, tuple)) and all(type(value) is int for value in values)


def evenly_paired(vfm_layers: int, vlm_layers: int) -> list[list[int]]:
    """Pairs for encoders of different depth: one MVFuser per layer of the shallower, both ending together."""
    steps = min(vfm_layers, vlm_layers)
    return [[math.ceil(vfm_layers * i / steps), math.ceil(vlm_layers * i / steps)] for i in range(1, steps + 1)]


__all__ = ["MFuserConfig"]

MFuserConfig.register_for_auto_class()
