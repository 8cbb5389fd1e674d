"""EVA02-CLIP as a Transformers model, which Transformers itself does not include.

References:
    EVA-CLIP: Improved Training Techniques for CLIP at Scale, arXiv 2303.15389
    EVA-02: A Visual Representation for Neon Genesis, arXiv 2303.11331 (the vision block)
    Foundation Transformers (Magneto), arXiv 2210.06423 (sub-LN)
    Weights: github.com/baaivision/EVA, EVA-CLIP; the B/16, L/14 and L/14-336 models. (The E/14 models have a different
    block with fused projections, post-norm, a plain MLP and no rotary embedding.)

The text tower differs from CLIP's only in its activation function, so it is a [`CLIPTextModel`].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_eva02_clip import Eva02ClipConfig, Eva02ClipTextConfig, Eva02ClipVisionConfig


@dataclass
class Eva02ClipOutput(ModelOutput):
    r"""
    Output of [`Eva02ClipModel`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `return_loss=True` is passed):
            Contrastive loss over the batch, in which image i matches text i.
        logits_per_image (`torch.Tensor` of shape `(images, texts)`):
            Cosine similarities times `exp(logit_scale)`.
        logits_per_text (`torch.Tensor` of shape `(texts, images)`):
            The transpose of `logits_per_image`.
        text_embeds (`torch.Tensor` of shape `(texts, projection_dim)`):
            Projected end-of-text tokens, L2-normalised.
        image_embeds (`torch.Tensor` of shape `(images, projection_dim)`):
            Projected class tokens, L2-normalised.
        text_model_output ([`BaseModelOutputWithPooling`]):
            Output of the text tower; `pooler_output` is projected, but not normalised.
        vision_model_output ([`BaseModelOutputWithPooling`]):
            Output of the vision tower; `pooler_output` is projected, but not normalised.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


def rotary_table(grid_height: int, grid_width: int, config: Eva02ClipVisionConfig, device=None) -> torch.Tensor:
    """
    Computes the rotary position embedding of a grid of patches, as complex numbers of modulus 1.

    Queries and keys are multiplied by it, pair of channels by pair of channels. The first half of a head is rotated by
    the row of a patch, the second half by its column; the class token is not rotated. The positions of each axis are
    scaled to the range of the pretraining grid, so that they do not exceed the positions seen in pretraining.

    Args:
        grid_height (`int`):
            Number of rows.
        grid_width (`int`):
            Number of columns.
        config ([`Eva02ClipVisionConfig`]):
            Configuration of the vision tower.
        device (`torch.device`, *optional*):
            Device of the result.

    Returns:
        `torch.Tensor` of shape `(1 + grid_height * grid_width, head_dim / 2)`: complex64, with the class token first.
    """
    axis_width = config.hidden_size // config.num_attention_heads // 2
    exponents = torch.arange(0, axis_width, 2, device=device, dtype=torch.float32) / axis_width
    frequencies = 1.0 / config.rope_theta**exponents

    def axis_angles(length):
        positions = torch.arange(length, device=device, dtype=torch.float32) / length * config.rope_pretrained_grid
        return positions[:, None] * frequencies

    rows = axis_angles(grid_height)[:, None, :].expand(-1, grid_width, -1)
    columns = axis_angles(grid_width)[None, :, :].expand(grid_height, -1, -1)
    angles = nn.functional.pad(torch.cat([rows, columns], dim=-1).flatten(0, 1), (0, 0, 1, 0))
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary(states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """
    Rotates `states` of shape (batch, heads, tokens, head_dim); adjacent channels (a, b) are the complex number a + bi.

    A complex product needs one pass over memory instead of five with real numbers. It is computed at least in float32,
    because bfloat16 can't distinguish adjacent positions.
    """
    pairs = states.to(torch.promote_types(states.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * rotary).flatten(-2).to(states.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,  # attention is bidirectional
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class Eva02ClipVisionEmbeddings(nn.Module):
    """Embeds pixels (B, channels, height, width) as tokens (B, 1 + patches, hidden_size), the class token first."""

    def __init__(self, config: Eva02ClipVisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.grid_size = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.grid_size**2 + 1, config.hidden_size)

    def interpolate_position_embedding(self, grid_height: int, grid_width: int) -> torch.Tensor:
        """Returns position embeddings (1 + grid_height * grid_width, hidden_size), resampled to the grid if needed."""
        rows = torch.arange(self.grid_size**2 + 1, device=self.class_embedding.device)
        table = self.position_embedding(rows)  # called as a module, for Accelerate's hooks
        # An exported graph would be specialised to either case; resampling to the same grid changes nothing.
        if not torch.compiler.is_exporting() and (grid_height, grid_width) == (self.grid_size, self.grid_size):
            return table
        grid = table[1:].unflatten(0, (self.grid_size, self.grid_size)).permute(2, 0, 1)[None]
        # Bicubic interpolation is too inaccurate in half precision.
        grid = nn.functional.interpolate(
            grid.float(), size=(grid_height, grid_width), mode="bicubic", align_corners=False
        ).to(table.dtype)
        return torch.cat([table[:1], grid[0].flatten(1).T])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.patch_embedding.in_channels:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; it must be "
                f"(batch, {self.patch_embedding.in_channels}, height, width)"
            )
        if min(pixel_values.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"images have {tuple(pixel_values.shape[-2:])} pixels; both sides must be at least the patch size, "
                f"{self.patch_size}"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        grid_height, grid_width = patches.shape[-2:]
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        tokens = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self.interpolate_position_embedding(grid_height, grid_width)


class Eva02ClipVisionAttention(nn.Module):
    """Self-attention with rotary position embeddings, and a norm before the output projection (sub-LN)."""

    def __init__(self, config: Eva02ClipVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False

        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.inner_attn_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, rotary: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, heads, tokens, head width)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            apply_rotary(query, rotary),
            apply_rotary(key, rotary),
            value,
            None,
            scaling=self.scaling,
            **kwargs,
        )
        output = self.inner_attn_ln(output.reshape(hidden_states.shape))
        return self.out_proj(output), weights


class Eva02ClipVisionMLP(nn.Module):
    """SwiGLU with a norm before the output projection (sub-LN)."""

    def __init__(self, config: Eva02ClipVisionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.ffn_ln(gated))


class Eva02ClipVisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: Eva02ClipVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Eva02ClipVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Eva02ClipVisionMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, rotary: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(self.layer_norm1(hidden_states), rotary, **kwargs)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class Eva02ClipVisionEncoder(nn.Module):
    def __init__(self, config: Eva02ClipVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList([Eva02ClipVisionLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self, hidden_states: torch.Tensor, rotary: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class Eva02ClipPreTrainedModel(PreTrainedModel):
    config: Eva02ClipConfig
    base_model_prefix = "eva02_clip"
    input_modalities: tuple[str, ...] = ("image", "text")
    _no_split_modules = ["Eva02ClipVisionEmbeddings", "Eva02ClipVisionLayer"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Eva02ClipVisionLayer, "attentions": Eva02ClipVisionAttention}

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # see `MFuserPreTrainedModel.is_custom_code`

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Eva02ClipVisionEmbeddings):
            init.trunc_normal_(module.class_embedding, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embedding.weight, std=self.config.initializer_range)
        elif isinstance(module, Eva02ClipModel):
            for projection in (module.visual_projection, module.text_projection):
                init.normal_(projection.weight, std=projection.in_features**-0.5)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)


class Eva02ClipVisionModel(Eva02ClipPreTrainedModel):
    """
    Vision tower of EVA02-CLIP, without the projection to the shared embedding space.

    To run the layers one by one:

    ```python
    hidden_states = model.embeddings(pixel_values)  # (B, 1 + patches, hidden_size)
    rotary = model.rotary_embedding(grid_height, grid_width)  # pixels // patch_size
    for layer in model.encoder.layers:
        hidden_states = layer(hidden_states, rotary)
    hidden_states = model.post_layernorm(hidden_states)
    ```
    """

    config: Eva02ClipVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: Eva02ClipVisionConfig):
        super().__init__(config)
        self.embeddings = Eva02ClipVisionEmbeddings(config)
        self.encoder = Eva02ClipVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def rotary_embedding(self, grid_height: int, grid_width: int, device=None) -> torch.Tensor:
        """Returns the `rotary` argument of the layers for a grid of patches, see [`rotary_table`]."""
        return rotary_table(grid_height, grid_width, self.config, self.device if device is None else device)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`):
                Images of any size of at least one patch, normalised with CLIP's mean and standard deviation. Pixels at
                the right and at the bottom that do not fill a patch are ignored.

        Returns:
            [`BaseModelOutputWithPooling`]: `last_hidden_state` of shape `(batch, 1 + patches, hidden_size)`, before
            the last norm as in [`CLIPVisionModel`], and `pooler_output` of shape `(batch, hidden_size)`, the class
            token after the last norm.
        """
        hidden_states = self.embeddings(pixel_values)
        height, width = pixel_values.shape[-2:]
        rotary = rotary_table(
            height // self.config.patch_size, width // self.config.patch_size, self.config, hidden_states.device
        )
        hidden_states = self.encoder(hidden_states, rotary, **kwargs).last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.post_layernorm(hidden_states[:, 0])
        )


class Eva02ClipTextModel(CLIPTextModel):
    """Text tower of EVA02-CLIP, without the projection to the shared embedding space: CLIP's with the exact GELU."""

    config: Eva02ClipTextConfig
    base_model_prefix = "text_model"

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # see `MFuserPreTrainedModel.is_custom_code`


class Eva02ClipModel(Eva02ClipPreTrainedModel):
    """
    EVA02-CLIP: both towers and their projections to the shared embedding space.

    Texts are tokenized by [`CLIPTokenizer`] ("openai/clip-vit-large-patch14"). Pixels are normalised with CLIP's mean
    and standard deviation.
    """

    config: Eva02ClipConfig

    def __init__(self, config: Eva02ClipConfig):
        super().__init__(config)
        self.vision_model = Eva02ClipVisionModel._from_config(config.vision_config)
        self.text_model = Eva02ClipTextModel._from_config(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Returns the output of the vision tower with a projected `pooler_output`."""
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Returns the output of the text tower with a projected `pooler_output`."""
        outputs = self.text_model(input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Eva02ClipOutput:
        r"""
        Args:
            input_ids (`torch.Tensor` of shape `(texts, length)`):
                Token ids.
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`):
                Normalised images, see [`Eva02ClipVisionModel`].
            attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*):
                1 for tokens and 0 for padding.
            return_loss (`bool`, *optional*, defaults to `False`):
                Whether to return the contrastive loss, in which image i matches text i.
        """
        vision_outputs = self.get_image_features(pixel_values, **kwargs)
        text_outputs = self.get_text_features(input_ids, attention_mask=attention_mask, **kwargs)
        image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        text_embeds = nn.functional.normalize(text_outputs.pooler_output, dim=-1)
        logits_per_image = image_embeds @ text_embeds.T * self.logit_scale.exp()

        loss = None
        if return_loss:
            if logits_per_image.shape[0] != logits_per_image.shape[1]:
                raise ValueError(
                    f"there are {logits_per_image.shape[0]} images and {logits_per_image.shape[1]} texts; return_loss "
                    "requires one text per image"
                )
            pairs = torch.arange(logits_per_image.shape[0], device=logits_per_image.device)
            loss = 0.5 * (
                nn.functional.cross_entropy(logits_per_image, pairs)
                + nn.functional.cross_entropy(logits_per_image.T, pairs)
            )

        return Eva02ClipOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )


__all__ = ["Eva02ClipModel", "Eva02ClipPreTrainedModel", "Eva02ClipTextModel", "Eva02ClipVisionModel"]

Eva02ClipVisionModel.register_for_auto_class("AutoModel")
Eva02ClipTextModel.register_for_auto_class("AutoModel")
Eva02ClipModel.register_for_auto_class("AutoModel")
