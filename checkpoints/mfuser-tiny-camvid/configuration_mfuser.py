"""The configuration of MFuser, and the checks that its values are consistent."""

import math

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, CLIPVisionConfig, Dinov2Config, PreTrainedConfig

from .class_names_mfuser import CITYSCAPES_CLASSES, CITYSCAPES_CLIP_TOKENS, IGNORE_INDEX, clip_token_row
from .configuration_eva02_clip import SubConfig
from .encoder_configs_mfuser import (
    CLIP_TOKENIZED,
    DEFAULT_ENCODERS,
    TEXT_TOWER_OF,
    VFM_TYPES,
    check_common_fields,
    check_field_names,
    encoder_config,
)

# Fields with these prefixes are MFuser's: unknown ones are refused in saved configurations as well.
OWN_PREFIXES = (
    *("fusion_", "vlm_", "vfm_", "text_", "enhancer_"),
    *("decoder_", "loss_", "crop_", "class_token", "confidence_"),
)

# Fields of every configuration that `check_common_fields` reads.
COMMON_FIELDS = ("dtype", "id2label", "label2id", "return_dict", "output_hidden_states")

NUM_TAPS = 4  # levels of the feature pyramid
GROUP_NORM_GROUPS = 32


@strict
class MFuserConfig(PreTrainedConfig):
    r"""
    Configuration of [`MFuserModel`] and [`MFuserForSemanticSegmentation`]. The defaults are the full-size CLIP variant
    of "Mamba as a Bridge" (CVPR 2025, arXiv 2504.03193) on the 19 Cityscapes classes.

    Args:
        vfm_config, vlm_config, text_config (`dict` or [`PreTrainedConfig`], *optional*):
            Vision foundation model, and vision and text encoder of the vision-language model. `model_type` selects
            the class. Default to DINOv2-L and CLIP ViT-L at patch size 16 on crops of 512 pixels.
        use_text_encoder (`bool`, *optional*, defaults to `True`):
            `False` for a model that stores its class embeddings and has no text encoder, see
            [`MFuserModel.store_class_embeddings`].
        use_fusion, use_enhancer, use_vfm (`bool`, *optional*, default to `True`):
            For ablations, as in tables 4 and 6 of the paper: `False` for a model without MVFusers between its
            encoders, which then exchange nothing; without the MTEnhancer, so that class embeddings do not depend on
            the image; or without a vision foundation model, which requires `use_fusion=False` and ignores
            `vfm_config`.
        class_token_ids (`list[list[int]]`, *optional*):
            One row of token ids per class (start, name, end, padding), in the order of `id2label`, so that a
            checkpoint needs no tokenizer.
        text_prompt_length (`int`, *optional*, defaults to 5):
            Number of learned context vectors, inserted after the first token of every class name (section 3.3).
        fusion_layer_pairs (`list[list[int]]`, *optional*):
            `[[a, b], ...]`: an MVFuser follows layer a of the vision foundation model and layer b of the
            vision-language model (1-based, ascending). Defaults to all layers; required for encoders of different
            depth.
        fusion_out_layers (`list[int]`, *optional*, defaults to `[8, 12, 16, 24]`):
            The four MVFusers (1-based) whose outputs form the feature pyramid, fine to coarse.
        fusion_project_vfm (`bool`, *optional*):
            Whether linear layers project the tokens of the vision foundation model to the width of the
            vision-language model and back, around every MVFuser and before the embeddings. Defaults to `True` with
            CLIP, as in the paper, or if the widths differ.
        fusion_state_size (`int`, *optional*, defaults to 16):
            State channels of an MVFuser.
        fusion_conv_kernel (`int`, *optional*, defaults to 3):
            Kernel size of its depth-wise convolutions, odd.
        fusion_dropout (`float`, *optional*, defaults to 0.1):
            Dropout on its output.
        fusion_initial_scale (`float`, *optional*, defaults to 0.001):
            Initial value of its output scale.
        vlm_drop_path_rate (`float`, *optional*):
            Stochastic depth of the vision-language model in training; the rate rises linearly from 0 at the first
            layer. Defaults to 0.1 with CLIP, as in the paper, else to 0.
        vlm_drop_path_axis (`str`, *optional*, defaults to `"token"`):
            What stochastic depth drops: `"token"` for token positions, the same for the whole batch, as the published
            code does (probably by accident), or `"sample"` for samples, as in the literature.
        enhancer_hidden_size, enhancer_num_heads, enhancer_num_layers, enhancer_mlp_ratio (`int`, *optional*):
            The MTEnhancer: width, attention heads, layers, and width of its MLP relative to `enhancer_hidden_size`.
            Default to 256, 4, 1, 4.
        enhancer_dropout (`float`, *optional*, defaults to 0.1):
            Dropout on the output of its self-attention, and after the activation and on the output of its MLP.
        decoder_hidden_size, decoder_num_heads, decoder_num_points (`int`, *optional*):
            Width and attention heads of both decoders, and sampling points per head and level of the deformable
            attention. Default to 256, 8, 4.
        decoder_pixel_layers, decoder_pixel_feedforward_size (`int`, *optional*):
            Layers of the pixel decoder and width of their MLPs. Default to 6, 2048.
        decoder_num_layers, decoder_feedforward_size (`int`, *optional*):
            Layers of the transformer decoder and width of their MLPs. Default to 9, 2048.
        loss_class_weight, loss_mask_weight, loss_dice_weight, loss_score_map_weight (`float`, *optional*):
            Weights of the losses. Default to 2, 5, 5, 1.
        loss_no_object_weight (`float`, *optional*, defaults to 0.1):
            Weight of the class "no object" in the class loss.
        loss_num_points (`int`, *optional*, defaults to 12544):
            Points at which the mask losses are sampled, per mask.
        loss_oversample_ratio (`float`, *optional*, defaults to 3.0):
            Candidate points drawn per sampled point.
        loss_importance_ratio (`float`, *optional*, defaults to 0.75):
            Share of the points that are chosen among the candidates by uncertainty; the others are uniform.
        loss_temperature (`float`, *optional*, defaults to 0.07):
            Divides the score map in its loss.
        loss_logit_scale, loss_logit_bias (`float`, *optional*):
            Replace the temperature: the loss takes score map * exp(scale) + bias, the values of the pretrained SigLIP.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that enter no loss.
        crop_size (`int`, *optional*, defaults to 512):
            Side of the training crops, in pixels. In evaluation mode, larger images are segmented by sliding windows
            of this size.
        crop_stride (`int`, *optional*, defaults to 341):
            Distance between windows, in pixels.
        windows_per_batch (`int`, *optional*):
            Windows of every image that are computed together. By default as many as fit into half of the free memory
            of a GPU; 1024 tokens, but at least one window, on a CPU.
        queries_vote_for_own_class (`bool`, *optional*, defaults to `False`):
            Whether each query contributes only to the score of its own class, see
            [`MFuserForSemanticSegmentation.set_class_names`].
        confidence_temperature (`float`, *optional*):
            By which the logarithms of class scores are divided for confidences, see [`confidence_map`]. `mfuser
            calibrate` fits it; `None` for a model that is not calibrated.
        freeze_encoders (`bool`, *optional*, defaults to `True`):
            Whether the encoders, including the text encoder, are frozen and stay in evaluation mode.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial values of layers that declare none of their own.

    Raises:
        ValueError: If values are inconsistent.
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
        *("attentions", "vfm_attentions"),
        "loss_components",
        "confidence",
    ]

    vfm_config: SubConfig = None
    vlm_config: SubConfig = None
    text_config: SubConfig = None
    use_text_encoder: bool = True
    use_fusion: bool = True
    use_enhancer: bool = True
    use_vfm: bool = True
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
    vlm_drop_path_axis: str = "token"

    enhancer_hidden_size: int = 256
    enhancer_num_heads: int = 4
    enhancer_num_layers: int = 1
    enhancer_mlp_ratio: int = 4
    enhancer_dropout: float | int = 0.1

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
    confidence_temperature: float | int | None = None
    freeze_encoders: bool = True
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        saved = self.transformers_version is not None  # other versions and libraries may have added fields
        names = [name for name in kwargs if not saved or name.startswith(OWN_PREFIXES)]
        check_field_names(type(self), names, "MFuserConfig")
        own = {name: getattr(self, name) for name in COMMON_FIELDS}
        check_common_fields(kwargs | own, "MFuserConfig")
        for name, default in DEFAULT_ENCODERS.items():
            setattr(self, name, encoder_config(getattr(self, name), default, name, check_names=not saved))
        is_clip = self.vlm_config.model_type == "clip_vision_model"
        if self.fusion_project_vfm is None:
            self.fusion_project_vfm = is_clip or self.vfm_config.hidden_size != self.vlm_config.hidden_size
        if self.vlm_drop_path_rate is None:
            self.vlm_drop_path_rate = 0.1 if is_clip else 0.0
        self.fusion_out_layers = list(self.fusion_out_layers)
        if self.id2label is None and kwargs.get("num_labels") is None:
            self.id2label: dict[int, str] = dict(enumerate(CITYSCAPES_CLASSES))
            self.label2id: dict[str, int] = {name: index for index, name in self.id2label.items()}
            if self.class_token_ids is None and self.vlm_config.model_type in CLIP_TOKENIZED:
                self.class_token_ids = [clip_token_row(tokens) for tokens in CITYSCAPES_CLIP_TOKENS]
        if self.id2label is not None and kwargs.get("num_labels") not in (None, len(self.id2label)):
            raise ValueError(f"num_labels is {kwargs['num_labels']}, but id2label has {len(self.id2label)} labels")
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """See [`PreTrainedConfig.from_dict`]. With `id2label`, `num_labels` is only checked for consistency."""
        id2label, num_labels = kwargs.get("id2label"), kwargs.get("num_labels")
        if id2label is not None and num_labels is not None:
            if len(id2label) != num_labels:
                raise ValueError(f"num_labels is {num_labels}, but id2label has {len(id2label)} labels")
            del kwargs["num_labels"]  # alone, it would be compared with the saved token ids
        return super().from_dict(config_dict, **kwargs)

    @property
    def vfm_size(self) -> int:
        """Width of the tokens of the vision foundation model; 0 without one."""
        return self.vfm_config.hidden_size if self.use_vfm else 0

    @property
    def pyramid_channels(self) -> int:
        """Channels of the feature pyramid: the tokens of both encoders, concatenated."""
        return self.vfm_size + self.vlm_config.hidden_size

    @property
    def num_levels(self) -> int:
        """Levels of the feature pyramid that the transformer decoder attends to: all but the finest."""
        return len(self.fusion_out_layers) - 1

    @property
    def layer_pairs(self) -> list[tuple[int, int]]:
        """For each MVFuser, the layers of the VFM and of the VLM that precede it (1-based, the last of each)."""
        if not self.use_vfm:
            return [(0, layer) for layer in range(1, self.vlm_config.num_hidden_layers + 1)]
        if self.fusion_layer_pairs is not None:
            return [tuple(pair) for pair in self.fusion_layer_pairs]
        return [(layer, layer) for layer in range(1, self.vfm_config.num_hidden_layers + 1)]

    def vlm_drop_path_rates(self, training: bool) -> list[float]:
        """Rate of stochastic depth for each layer of the vision-language model: from 0 to `vlm_drop_path_rate`."""
        layers = self.vlm_config.num_hidden_layers
        rate = self.vlm_drop_path_rate if training and self.vlm_drop_path_rate else 0.0
        return [rate * layer / max(layers - 1, 1) for layer in range(layers)]

    def check(self):
        """Raises `ValueError` if values are inconsistent. Models call it too, since fields may be set later."""
        self._check_ranges()
        self._check_encoders()
        self._check_fusion()
        self._check_text()
        self._check_decoder_and_losses()
        self.check_windows()

    def check_windows(self):
        """Raises `ValueError` unless the sliding windows cover every image. The model calls it for every image."""
        if self.windows_per_batch is not None and self.windows_per_batch < 1:
            raise ValueError(f"windows_per_batch is {self.windows_per_batch}; it must be at least 1")
        if self.crop_size < self.patch_size:
            raise ValueError(f"crop_size is {self.crop_size}; it must be at least patch_size ({self.patch_size})")
        if not 1 <= self.crop_stride <= self.crop_size:
            raise ValueError(
                f"crop_stride is {self.crop_stride}; it must be between 1 and crop_size ({self.crop_size}), so that "
                "windows cover the whole image"
            )

    @property
    def patch_size(self) -> int:
        return self.vlm_config.patch_size

    def _check_ranges(self):
        for name in (
            *("fusion_state_size", "fusion_conv_kernel", "enhancer_hidden_size", "enhancer_num_heads"),
            *("enhancer_num_layers", "enhancer_mlp_ratio", "decoder_hidden_size", "decoder_num_heads"),
            *("decoder_num_points", "decoder_pixel_layers", "decoder_pixel_feedforward_size", "decoder_num_layers"),
            *("decoder_feedforward_size", "loss_num_points"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in type(self).__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be a finite number")
        weights = ("loss_class_weight", "loss_mask_weight", "loss_dice_weight", "loss_score_map_weight")
        for name in (*weights, "initializer_range"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("fusion_dropout", "vlm_drop_path_rate", "enhancer_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name in ("loss_temperature", "loss_no_object_weight", "confidence_temperature"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.vlm_drop_path_axis not in ("token", "sample"):
            raise ValueError(f"vlm_drop_path_axis is {self.vlm_drop_path_axis!r}; it must be 'token' or 'sample'")
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
        for name, encoder in (("vfm_config", vfm), ("vlm_config", vlm), ("text_config", text)):
            for field in ("hidden_size", "num_hidden_layers", "intermediate_size", "projection_dim", "patch_size"):
                value = getattr(encoder, field, 1)
                if type(value) is not int or value < 1:
                    raise ValueError(f"{name}.{field} is {value}; it must be an integer of at least 1")
        if vfm.model_type not in VFM_TYPES:
            raise ValueError(f"vfm_config.model_type is {vfm.model_type!r}; it must be one of {', '.join(VFM_TYPES)}")
        if vlm.model_type not in TEXT_TOWER_OF:
            raise ValueError(
                f"vlm_config.model_type is {vlm.model_type!r}; it must be one of {', '.join(TEXT_TOWER_OF)}"
            )
        if self.use_text_encoder and text.model_type != TEXT_TOWER_OF[vlm.model_type]:
            raise ValueError(
                f"text_config.model_type is {text.model_type!r}; the text encoder of a {vlm.model_type!r} is a "
                f"{TEXT_TOWER_OF[vlm.model_type]!r}"
            )
        if self.use_vfm and vfm.patch_size != vlm.patch_size:
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
            raise ValueError(
                "vlm_config.vision_use_head is False; SigLIP must have its pooling head, which maps images to the "
                "space of the text embeddings"
            )
        if self.use_text_encoder and getattr(text, "projection_size", vlm.hidden_size) != vlm.hidden_size:
            raise ValueError(
                f"text_config.projection_size is {text.projection_size}; it must be vlm_config.hidden_size "
                f"({vlm.hidden_size}), the width of the image embeddings"
            )

    def _check_fusion(self):
        vfm, vlm = self.vfm_config, self.vlm_config
        if not self.use_vfm and (self.use_fusion or self.fusion_layer_pairs is not None):
            raise ValueError(
                f"use_vfm is False, use_fusion is {self.use_fusion} and fusion_layer_pairs {self.fusion_layer_pairs}; "
                "a single encoder has nothing to fuse: it needs use_fusion=False and no fusion_layer_pairs"
            )
        if self.use_vfm and self.fusion_layer_pairs is None and vfm.num_hidden_layers != vlm.num_hidden_layers:
            raise ValueError(
                f"the encoders have {vfm.num_hidden_layers} and {vlm.num_hidden_layers} layers; give the layers that "
                "an MVFuser follows, for example "
                f"fusion_layer_pairs={evenly_paired(vfm.num_hidden_layers, vlm.num_hidden_layers)}"
            )
        depths = (vfm.num_hidden_layers, vlm.num_hidden_layers)
        previous = (0, 0)
        for pair in self.fusion_layer_pairs or ():
            if not (whole_numbers(pair) and len(pair) == 2 and previous[0] < pair[0] and previous[1] < pair[1]):
                raise ValueError(f"fusion_layer_pairs contains {pair}; it must hold ascending pairs of 1-based layers")
            previous = pair
        if previous[0] > depths[0] or previous[1] > depths[1]:
            raise ValueError(
                f"fusion_layer_pairs ends with {previous}; the encoders have {depths[0]} and {depths[1]} layers"
            )
        pairs, taps = self.layer_pairs, self.fusion_out_layers
        if (
            not whole_numbers(taps)
            or len(taps) != NUM_TAPS
            or sorted({0, *taps, len(pairs) + 1}) != [0, *taps, len(pairs) + 1]
        ):
            raise ValueError(
                f"fusion_out_layers is {taps}; it must be four ascending numbers from 1 to {len(pairs)}, the number "
                "of fused layers"
            )
        if self.use_vfm and not self.fusion_project_vfm and vfm.hidden_size != vlm.hidden_size:
            raise ValueError(
                f"fusion_project_vfm is False; it must be True for encoders of different width, {vfm.hidden_size} and "
                f"{vlm.hidden_size}"
            )
        if vlm.hidden_size % 2 or self.enhancer_hidden_size % 2:
            raise ValueError(
                f"vlm_config.hidden_size is {vlm.hidden_size} and enhancer_hidden_size {self.enhancer_hidden_size}; "
                "both must be even, since an MVFuser splits them in half"
            )
        if self.fusion_conv_kernel % 2 == 0:
            raise ValueError(f"fusion_conv_kernel is {self.fusion_conv_kernel}; it must be odd")

    def _check_text(self):
        if not self.use_text_encoder:
            return
        rows = self.class_token_ids
        if rows is None:
            raise ValueError(
                f"class_token_ids is missing; give one row of token ids for each of the {self.num_labels} classes "
                "(from_vfm_vlm_pretrained(..., class_names=[...]) computes them), or set use_text_encoder=False"
            )
        if len(rows) != self.num_labels:
            raise ValueError(
                f"class_token_ids has {len(rows)} rows, but the model has {self.num_labels} labels "
                f"({self._labels()}): give one row for each label, in the order of id2label"
            )
        for row in rows:
            if not (whole_numbers(row) and len(row)):
                raise ValueError(f"class_token_ids contains {row!r}; it must hold a list of token ids for each label")
            if min(row) < 0 or max(row) >= self.text_config.vocab_size:
                raise ValueError(
                    f"class_token_ids contains {row}; ids must lie between 0 and {self.text_config.vocab_size - 1}"
                )
        lengths = {len(row) for row in rows}
        if len(lengths) != 1:
            raise ValueError(f"class_token_ids has rows of {sorted(lengths)} ids; all rows must have the same length")
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
        if self.decoder_hidden_size % GROUP_NORM_GROUPS or self.decoder_hidden_size < 2 * GROUP_NORM_GROUPS:
            raise ValueError(
                f"decoder_hidden_size is {self.decoder_hidden_size}; it must be a multiple of "
                f"{GROUP_NORM_GROUPS}, at least {2 * GROUP_NORM_GROUPS}: GroupNorm has {GROUP_NORM_GROUPS} groups"
            )
        if (self.loss_logit_scale is None) != (self.loss_logit_bias is None):
            raise ValueError(
                f"loss_logit_scale is {self.loss_logit_scale} and loss_logit_bias {self.loss_logit_bias}; give both "
                "or neither"
            )
        if 0 <= self.semantic_loss_ignore_index < self.num_labels:
            raise ValueError(
                f"semantic_loss_ignore_index is {self.semantic_loss_ignore_index}, the label of "
                f"{self.id2label[self.semantic_loss_ignore_index]!r}; it must not be a class"
            )

    def _labels(self) -> str:
        names = list(self.id2label.values())
        return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def whole_numbers(values) -> bool:
    """Whether `values` is a list or tuple of ints."""
    return isinstance(values, (list, tuple)) and all(type(value) is int for value in values)


def evenly_paired(vfm_layers: int, vlm_layers: int) -> list[list[int]]:
    """Pairs for encoders of different depth: one MVFuser per layer of the shallower, both ending together."""
    steps = min(vfm_layers, vlm_layers)
    return [[math.ceil(vfm_layers * i / steps), math.ceil(vlm_layers * i / steps)] for i in range(1, steps + 1)]


__all__ = ["MFuserConfig"]

MFuserConfig.register_for_auto_class()
