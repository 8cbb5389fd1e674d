"""
The two pretrained encoders, run layer by layer.

Each type of vision foundation model and of vision-language model has one class here, selected by `model_type`, which
implements its differences from the others.

The encoders are Transformers' own classes, not subclasses: `from_pretrained` converts weight names for those alone.
Only their embeddings are replaced, where the published code resamples positions differently.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPTextModel,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2TextModel,
    Siglip2VisionModel,
    SiglipTextModel,
    SiglipVisionModel,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from .configuration_mfuser import MFuserConfig
from .layers_mfuser import attend
from .modeling_eva02_clip import Eva02ClipTextModel, Eva02ClipVisionModel
from .resampling_mfuser import Resampled, resample_grid


def renormalise(pixel_values: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Pixels (B, 3, H, W) normalised with CLIP's mean and standard deviation, normalised with `mean` and `std`."""
    channels = []
    for channel, clip_mean, clip_std, new_mean, new_std in zip(
        pixel_values.unbind(1), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, mean, std, strict=True
    ):
        channels.append(channel * (clip_std / new_std) + (clip_mean - new_mean) / new_std)
    return torch.stack(channels, dim=1)


def new_vision(
    config: PreTrainedConfig, vision_class: type[PreTrainedModel], embeddings_class: type[nn.Module] | None
) -> Any:
    """A vision encoder with initial values and, unless `embeddings_class` is `None`, with embeddings of that class."""
    vision = vision_class._from_config(config)
    if embeddings_class is not None:
        vision.embeddings = embeddings_class(config)
    return vision


def drop_path(residual: torch.Tensor, rate: float, axis: str) -> torch.Tensor:
    """
    Stochastic depth: zeroes a residual branch (B, L, C) with probability `rate`.

    The published code drops token positions, the same for the whole batch (`axis="token"`): its CLIP runs on tensors
    (L, B, C), and it treats the first axis as the batch. The standard form drops samples (`axis="sample"`).
    """
    shape = (1, residual.shape[1], 1) if axis == "token" else (residual.shape[0], 1, 1)
    keep = torch.rand(shape, device=residual.device) >= rate
    return residual * keep / (1 - rate)


# --- vision foundation models ---------------------------------------------------------------------------------------


def dinov2_positions(
    embeddings: Dinov2Embeddings | Dinov2WithRegistersEmbeddings, height: int, width: int
) -> torch.Tensor:
    """DINOv2's position embeddings (1, 1 + h * w, Dv), resampled as in its own code: by scale factor, not by size."""
    patch = embeddings.config.patch_size
    class_position, positions = embeddings.position_embeddings[0].tensor_split([1])
    positions = resample_grid(positions, (height // patch, width // patch), "bicubic", offset=0.1)
    return torch.cat([class_position, positions])[None]


class MFuserDinov2Embeddings(Dinov2Embeddings):
    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return dinov2_positions(self, height, width)


class MFuserDinov2WithRegistersEmbeddings(Dinov2WithRegistersEmbeddings):
    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return dinov2_positions(self, height, width)


class Dinov2Tower(nn.Module):
    """
    DINOv2 of any size: one class token, pixels normalised with ImageNet's mean and standard deviation.

    Attributes:
        vision_class, embeddings_class (`type`):
            See [`new_vision`].
        positions, kernel ([`Resampled`]):
            Position embeddings and patch kernel, and how they are resampled.
    """

    vision_class: type[PreTrainedModel] = Dinov2Model
    embeddings_class: type[nn.Module] | None = MFuserDinov2Embeddings
    positions: Resampled | None = Resampled("embeddings.position_embeddings", "bicubic", num_class_tokens=1)
    kernel = Resampled("embeddings.patch_embeddings.projection.weight", "bicubic")

    def __init__(self, config: MFuserConfig):
        super().__init__()
        self.vision = new_vision(config.vfm_config, self.vision_class, self.embeddings_class)

    @property
    def layers(self) -> nn.ModuleList:
        return self.vision.encoder.layer

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """CLIP-normalised pixels (B, 3, H, W) -> tokens (B, 1 + h * w, Dv) and further inputs of the layers."""
        return self.vision.embeddings(renormalise(pixel_values, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)), {}

    def run_layers(self, layers: range, layer_inputs: dict, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs some of the layers on tokens (B, L, Dv)."""
        for index in layers:
            hidden_states = self.layers[index](hidden_states, **layer_inputs)
        return hidden_states

    @property
    def final_norm(self) -> nn.Module:
        return self.vision.layernorm


class Dinov2WithRegistersTower(Dinov2Tower):
    """DINOv2 with register tokens between class token and patches; the MVFusers process them like other tokens."""

    vision_class = Dinov2WithRegistersModel
    embeddings_class = MFuserDinov2WithRegistersEmbeddings


class DINOv3ViTTower(Dinov2Tower):
    """DINOv3: register tokens, and rotary position embeddings instead of learned ones."""

    vision_class, embeddings_class = DINOv3ViTModel, None
    positions = None
    kernel = Resampled("embeddings.patch_embeddings.weight", "bicubic")

    @property
    def layers(self) -> nn.ModuleList:
        return self.vision.model.layer

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict]:
        pixel_values = renormalise(pixel_values, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        pixel_values = pixel_values.to(self.vision.embeddings.patch_embeddings.weight.dtype)
        return self.vision.embeddings(pixel_values), {"position_embeddings": self.vision.rope_embeddings(pixel_values)}

    @property
    def final_norm(self) -> nn.Module:
        return self.vision.norm


class NoTower(nn.Module):
    """Replaces the vision foundation model if there is none: it has no layers, and its tokens have no channels."""

    layers = ()

    def __init__(self, config: MFuserConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.final_norm = nn.Identity()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """Pixels (B, 3, H, W) -> tokens (B, h * w, 0) and no further inputs of layers."""
        height, width = (side // self.patch_size for side in pixel_values.shape[-2:])
        return pixel_values.new_empty(pixel_values.shape[0], height * width, 0), {}

    def run_layers(self, layers: range, layer_inputs: dict, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


# --- vision-language models -----------------------------------------------------------------------------------------


class VisionLanguageTower(nn.Module):
    """
    What all vision-language models have in common. Subclasses implement `forward`, `merge` and `encode_text`.

    Attributes:
        num_class_tokens (`int`):
            Tokens before the patches.
        vision_class, embeddings_class, positions, kernel:
            See [`Dinov2Tower`].
        text_class (`type`):
            Class of the text encoder.
        text ([`PreTrainedModel`]):
            The text encoder, which subclasses create if `config.use_text_encoder` is set.
        merges_normalised_vfm (`bool`):
            Whether `merge` takes the tokens of the vision foundation model after its last norm.
    """

    vision_class: type[PreTrainedModel]
    embeddings_class: type[nn.Module] | None
    text_class: type[PreTrainedModel]
    text: PreTrainedModel
    num_class_tokens = 1
    merges_normalised_vfm = True
    kernel = Resampled("embeddings.patch_embedding.weight", "bilinear")

    def __init__(self, config: MFuserConfig):
        super().__init__()
        self.drop_path_axis = config.vlm_drop_path_axis
        self.vision = new_vision(config.vlm_config, self.vision_class, self.embeddings_class)

    @property
    def layers(self) -> nn.ModuleList:
        return self.vision.encoder.layers

    def run_layers(
        self, layers: range, layer_inputs: tuple, drop_path_rates: list[float], hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Runs some of the layers on tokens (B, L, D), with stochastic depth on both branches of each layer."""
        for index in layers:
            layer: Any = self.layers[index]
            rate = drop_path_rates[index]
            if rate == 0.0:
                hidden_states = layer(hidden_states, *layer_inputs)
            elif layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
                run_layer = partial(self._run_layer_with_drop_path, layer, layer_inputs, rate)
                hidden_states = layer._gradient_checkpointing_func(run_layer, hidden_states)
            else:
                hidden_states = self._run_layer_with_drop_path(layer, layer_inputs, rate, hidden_states)
        return hidden_states

    def _run_layer_with_drop_path(self, layer, layer_inputs, rate, hidden_states):
        attended, _ = layer.self_attn(layer.layer_norm1(hidden_states), *layer_inputs)
        hidden_states = hidden_states + drop_path(attended, rate, self.drop_path_axis)
        residual = layer.mlp(layer.layer_norm2(hidden_states))
        return hidden_states + drop_path(residual, rate, self.drop_path_axis)

    def text_modules(self) -> dict[str, nn.Module]:
        """The modules that only `encode_text` needs, by name."""
        return {name: module for name, module in self.named_children() if name in ("text", "text_projection")}

    def drop_text_encoder(self):
        for name in self.text_modules():
            delattr(self, name)

    def prompted_text(self, token_ids: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Token ids of class names (K, T) and context vectors (1, P, C), after the first token -> (K, P + T, C)."""
        names = self.text.embeddings.token_embedding(token_ids)
        names = torch.cat([names[:, :1], prompts.expand(names.shape[0], -1, -1), names[:, 1:]], dim=1)
        return self.text.embeddings(inputs_embeds=names)


class MFuserCLIPVisionEmbeddings(CLIPVisionEmbeddings):
    """CLIP's embeddings, resampled bilinearly as in the published code (Transformers: bicubic)."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        positions = self.position_embedding(self.position_ids)[0]  # called as a module, for Accelerate's hooks
        grid = (height // self.patch_size, width // self.patch_size)
        return torch.cat([positions[:1], resample_grid(positions[1:], grid, "bilinear")])[None]


class ClipTower(VisionLanguageTower):
    """CLIP: one class token; the shared space is reached by LayerNorm and a linear map without bias."""

    merges_normalised_vfm = False
    positions = Resampled("embeddings.position_embedding.weight", "bilinear", num_class_tokens=1)
    vision_class, text_class = CLIPVisionModel, CLIPTextModel
    embeddings_class: type[nn.Module] | None = MFuserCLIPVisionEmbeddings
    projection_bias = False

    def __init__(self, config: MFuserConfig):
        super().__init__(config)
        vision, text = config.vlm_config, config.text_config
        self.visual_projection = nn.Linear(vision.hidden_size, vision.projection_dim, bias=self.projection_bias)
        if config.use_text_encoder:
            self.text = self.text_class._from_config(text)
            self.text_projection = nn.Linear(text.hidden_size, vision.projection_dim, bias=False)

    @staticmethod
    def embedding_size(config: MFuserConfig) -> int:
        return config.vlm_config.projection_dim

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """CLIP-normalised pixels (B, 3, H, W) -> tokens (B, 1 + h * w, D) and further inputs of the layers."""
        hidden_states = self.vision.embeddings(pixel_values, interpolate_pos_encoding=True)
        return self.vision.pre_layrnorm(hidden_states), (None,)  # no attention mask

    def merge(self, hidden_states: torch.Tensor, vfm_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both encoders' tokens (B, 1 + N, D) -> global (B, 1, E) and dense (B, N, E) embeddings."""
        merged = hidden_states + vfm_states.to(hidden_states.device)
        embeddings = self.visual_projection(self.vision.post_layernorm(merged))
        return embeddings[:, :1], embeddings[:, 1:]

    def encode_text(self, token_ids: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Class names (K, T) and context vectors (1, P, C) -> class embeddings (K, E)."""
        hidden_states = self.prompted_text(token_ids, prompts)
        # Without attention mask and cache, by position: Transformers 5.23 renamed the last argument.
        mask = create_causal_mask(self.text.config, hidden_states, None, None)
        # With sdpa the mask is None, and `is_causal` makes the attention causal.
        hidden_states = self.text.encoder(inputs_embeds=hidden_states, attention_mask=mask, is_causal=True)
        hidden_states = self.text.final_layer_norm(hidden_states.last_hidden_state)
        # The end token has the largest id; the context vectors shift it.
        end = token_ids.argmax(dim=-1) + prompts.shape[1]
        rows = torch.arange(token_ids.shape[0], device=token_ids.device)
        return self.text_projection(hidden_states[rows, end])


class Eva02ClipTower(ClipTower):
    """EVA02-CLIP: rotary positions; both encoders are normalised before their sum; a linear map with bias."""

    merges_normalised_vfm = True
    positions = Resampled("embeddings.position_embedding.weight", "bicubic", num_class_tokens=1)
    kernel = Resampled("embeddings.patch_embedding.weight", "bicubic")
    vision_class, embeddings_class, text_class = Eva02ClipVisionModel, None, Eva02ClipTextModel
    projection_bias = True

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        grid = [side // self.vision.config.patch_size for side in pixel_values.shape[-2:]]
        hidden_states = self.vision.embeddings(pixel_values)
        return hidden_states, (self.vision.rotary_embedding(*grid, device=hidden_states.device),)

    def merge(self, hidden_states: torch.Tensor, vfm_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        merged = self.vision.post_layernorm(hidden_states)
        embeddings = self.visual_projection(merged + vfm_states.to(merged.device))
        return embeddings[:, :1], embeddings[:, 1:]


class MFuserPoolingAttention(nn.MultiheadAttention):
    """
    The attention of SigLIP's pooling head, by Transformers' attention interface.

    It calls its output projection, whose weights `nn.MultiheadAttention` reads, so that offloaded weights are loaded
    and adapters take part.
    """

    is_causal = False

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.config = config

    def forward(  # type: ignore[override]  # a pooling head uses no other argument
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query (B, Lq, D), key and value (B, L, D) -> (B, Lq, D), and the attention weights if they are computed."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        projected = [
            F.linear(states, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        attended, attention_weights = attend(self, *projected)
        return self.out_proj(attended), attention_weights


class MFuserSiglipVisionEmbeddings(SiglipVisionEmbeddings):
    """SigLIP's embeddings, resampled bilinearly as in the published code (Transformers: bicubic)."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        grid = (height // self.patch_size, width // self.patch_size)
        return resample_grid(self.position_embedding(self.position_ids)[0], grid, "bilinear")[None]


class SiglipTower(VisionLanguageTower):
    """SigLIP: no class token; attention pooling with the probe as query, and with every patch as query."""

    num_class_tokens = 0
    positions = Resampled("embeddings.position_embedding.weight", "bilinear")
    vision_class, embeddings_class, text_class = SiglipVisionModel, MFuserSiglipVisionEmbeddings, SiglipTextModel

    def __init__(self, config: MFuserConfig):
        super().__init__(config)
        self.vision.head.attention = MFuserPoolingAttention(config.vlm_config)
        if config.use_text_encoder:
            self.text = self.text_class._from_config(config.text_config)

    @staticmethod
    def embedding_size(config: MFuserConfig) -> int:
        return config.vlm_config.hidden_size

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """CLIP-normalised pixels (B, 3, H, W) -> tokens (B, h * w, D) and further inputs of the layers."""
        pixel_values = renormalise(pixel_values, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
        return self.vision.embeddings(pixel_values, interpolate_pos_encoding=True), (None,)

    def merge(self, hidden_states: torch.Tensor, vfm_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both encoders' tokens (B, N, D) -> global (B, 1, D) and dense (B, N, D) embeddings."""
        merged = self.vision.post_layernorm(hidden_states)
        merged = merged + vfm_states.to(merged.device)
        head = self.vision.head
        attended, _ = head.attention(merged, merged, merged)
        return head(merged)[:, None], attended + head.mlp(head.layernorm(attended))

    def encode_text(self, token_ids: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Class names (K, T) and context vectors (1, P, C) -> class embeddings (K, D), read at the last position."""
        hidden_states = self.prompted_text(token_ids, prompts)
        hidden_states = self.text.encoder(inputs_embeds=hidden_states, attention_mask=None).last_hidden_state
        return self.text.head(self.text.final_layer_norm(hidden_states)[:, -1])


class MFuserSiglip2VisionEmbeddings(Siglip2VisionEmbeddings):
    """SigLIP 2's embeddings, computed from images instead of lists of patches."""

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = True) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> tokens (B, h * w, D)."""
        patch = self.patch_size
        height, width = (side // patch for side in pixel_values.shape[-2:])
        patches = pixel_values.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, patch, patch)
        patches = patches.permute(0, 2, 3, 4, 5, 1).clone(memory_format=torch.contiguous_format)
        patches = patches.view(-1, height * width, 3 * patch**2)
        tokens = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        positions = self.position_embedding(torch.arange(self.num_patches, device=tokens.device))
        return tokens + resample_grid(positions, (height, width), "bilinear")


class Siglip2Tower(SiglipTower):
    """SigLIP 2 (NaFlex): SigLIP with a linear patch embedding. Fixed-size SigLIP 2 models have the type of SigLIP."""

    vision_class, embeddings_class, text_class = Siglip2VisionModel, MFuserSiglip2VisionEmbeddings, Siglip2TextModel


VFM_TOWERS = {
    "dinov2": Dinov2Tower,
    "dinov2_with_registers": Dinov2WithRegistersTower,
    "dinov3_vit": DINOv3ViTTower,
}
VLM_TOWERS: dict[str, type[ClipTower] | type[SiglipTower]] = {
    "clip_vision_model": ClipTower,
    "eva02_clip_vision_model": Eva02ClipTower,
    "siglip_vision_model": SiglipTower,
    "siglip2_vision_model": Siglip2Tower,
}
