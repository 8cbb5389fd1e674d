"""The two pretrained encoders, each run one layer at a time.

What differs between vision foundation models, or between vision-language models, is one class here, chosen by
`model_type`. Everything else in MFuser is the same for all of them.

The encoders are Transformers' own classes, not subclasses: only of those does `from_pretrained` translate the names
that tensors have in files. Where the paper's code resamples positions in another way, the embeddings are replaced.
"""

from dataclasses import dataclass

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
from transformers.masking_utils import create_causal_mask
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from .configuration_mfuser import MFuserConfig
from .modeling_eva02_clip import Eva02ClipTextModel, Eva02ClipVisionModel

# Mean and standard deviation that pixels are normalised with, on [0, 1]. `pixel_values` arrive in CLIP's.
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_PIXELS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def renormalise(pixel_values: torch.Tensor, target: tuple) -> torch.Tensor:
    """CLIP-normalised pixels (B, 3, H, W), normalised with `target`'s mean and standard deviation instead."""
    if target == CLIP_PIXELS:
        return pixel_values
    channels = []
    for channel, mean, std, new_mean, new_std in zip(pixel_values.unbind(1), *CLIP_PIXELS, *target, strict=True):
        channels.append(channel * (std / new_std) + (mean - new_mean) / new_std)
    return torch.stack(channels, dim=1)


def resample_grid(positions: torch.Tensor, grid: tuple[int, int], mode: str, offset: float = 0.0) -> torch.Tensor:
    """
    Position embeddings of a square grid, resampled to another grid.

    Args:
        positions (`torch.Tensor` of shape `(g * g, C)`): row-major.
        grid (`tuple[int, int]`): rows and columns wanted.
        mode (`str`): "bicubic" or "bilinear", with align_corners=False.
        offset (`float`): added to the wanted size when the scale is computed; DINOv2 uses 0.1 against rounding.

    Returns:
        `torch.Tensor` of shape `(grid[0] * grid[1], C)`; `positions` itself where nothing changes.
    """
    side = round(positions.shape[0] ** 0.5)
    if side * side != positions.shape[0]:
        raise ValueError(f"{positions.shape[0]} position embeddings are no square grid")
    if tuple(grid) == (side, side):
        return positions
    maps = positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, g, g)
    if offset:
        scale = tuple((length + offset) / side for length in grid)
        maps = F.interpolate(maps, scale_factor=scale, mode=mode, align_corners=False)
    else:
        maps = F.interpolate(maps, size=tuple(grid), mode=mode, align_corners=False)
    return maps.flatten(2)[0].T.to(positions.dtype)


@dataclass(frozen=True)
class Resampled:
    """A weight of a pretrained encoder that is resampled to our grid: its name, how, and its leading class tokens."""

    name: str
    mode: str
    num_class_tokens: int = 0


def drop_path(residual: torch.Tensor, rate: float) -> torch.Tensor:
    """Stochastic depth: drops the residual branch (B, L, C) of a sample with probability `rate`."""
    if rate == 0.0:
        return residual
    keep = torch.rand(residual.shape[0], 1, 1, device=residual.device) >= rate
    return residual * keep / (1 - rate)


# --- vision foundation models ---------------------------------------------------------------------------------------


def dinov2_positions(embeddings: nn.Module, height: int, width: int) -> torch.Tensor:
    """DINOv2's position embeddings (1, 1 + h * w, Dv) as its own code resamples them: by scale factor, not by size."""
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
    DINOv2 of any size: one class token, ImageNet pixels.

    positions, kernel: the position grid and the patch kernel among the weights of `vision`, how many class tokens the
    grid begins with, and how they are resampled.
    """

    positions = Resampled("embeddings.position_embeddings", "bicubic", num_class_tokens=1)
    kernel = Resampled("embeddings.patch_embeddings.projection.weight", "bicubic")

    def __init__(self, config: MFuserConfig):
        super().__init__()
        self.vision = self.new_vision(config.vfm_config)

    @staticmethod
    def new_vision(config: PreTrainedConfig) -> PreTrainedModel:
        vision = Dinov2Model._from_config(config)
        vision.embeddings = MFuserDinov2Embeddings(config)
        return vision

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """CLIP-normalised pixels (B, 3, H, W) -> tokens (B, 1 + h * w, Dv), and what else the layers take."""
        return self.vision.embeddings(renormalise(pixel_values, IMAGENET_PIXELS)), {}

    def run_layer(self, index: int, hidden_states: torch.Tensor, layer_inputs: dict) -> torch.Tensor:
        return self.vision.encoder.layer[index](hidden_states, **layer_inputs)

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.vision.layernorm(hidden_states)


class Dinov2WithRegistersTower(Dinov2Tower):
    """DINOv2 with register tokens between the class token and the patches; they are fused like all others."""

    @staticmethod
    def new_vision(config: PreTrainedConfig) -> PreTrainedModel:
        vision = Dinov2WithRegistersModel._from_config(config)
        vision.embeddings = MFuserDinov2WithRegistersEmbeddings(config)
        return vision


class DINOv3ViTTower(Dinov2Tower):
    """DINOv3: register tokens, and rotary positions in place of a grid."""

    positions = None
    kernel = Resampled("embeddings.patch_embeddings.weight", "bicubic")

    @staticmethod
    def new_vision(config: PreTrainedConfig) -> PreTrainedModel:
        return DINOv3ViTModel._from_config(config)

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict]:
        pixel_values = renormalise(pixel_values, IMAGENET_PIXELS).to(
            self.vision.embeddings.patch_embeddings.weight.dtype
        )
        return self.vision.embeddings(pixel_values), {"position_embeddings": self.vision.rope_embeddings(pixel_values)}

    def run_layer(self, index: int, hidden_states: torch.Tensor, layer_inputs: dict) -> torch.Tensor:
        return self.vision.model.layer[index](hidden_states, **layer_inputs)

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.vision.norm(hidden_states)


# --- vision-language models -----------------------------------------------------------------------------------------


class VisionLanguageTower(nn.Module):
    """
    What every vision-language model does alike. A subclass names its parts, embeds, merges and encodes text.

    num_class_tokens: tokens before the patches.
    positions, kernel: as in [`Dinov2Tower`].
    merges_normalised_vfm: whether `merge` wants the vision foundation model's tokens after its last norm.
    """

    num_class_tokens = 1
    merges_normalised_vfm = True
    kernel = Resampled("embeddings.patch_embedding.weight", "bilinear")

    def run_layer(self, index: int, hidden_states: torch.Tensor, layer_inputs: tuple, drop_path_rate: float):
        """One layer on tokens (B, L, D); with stochastic depth on both its branches where a rate is given."""
        layer = self.vision.encoder.layers[index]
        if drop_path_rate == 0.0:
            return layer(hidden_states, *layer_inputs)
        attended, _ = layer.self_attn(layer.layer_norm1(hidden_states), *layer_inputs)
        hidden_states = hidden_states + drop_path(attended, drop_path_rate)
        return hidden_states + drop_path(layer.mlp(layer.layer_norm2(hidden_states)), drop_path_rate)

    def drop_text_encoder(self):
        """Lets go of what only `encode_text` needs."""
        for name in ("text", "text_projection"):
            if hasattr(self, name):
                delattr(self, name)

    def prompted_text(self, token_ids: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Embeddings of class names (K, T), with context vectors (1, P, C) after the first token -> (K, P + T, C)."""
        names = self.text.embeddings.token_embedding(token_ids)
        names = torch.cat([names[:, :1], prompts.expand(names.shape[0], -1, -1), names[:, 1:]], dim=1)
        return self.text.embeddings(inputs_embeds=names)


class MFuserCLIPVisionEmbeddings(CLIPVisionEmbeddings):
    """CLIP's embeddings, resampled bilinearly as the paper's code does (Transformers: bicubic)."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        positions = self.position_embedding.weight
        grid = (height // self.patch_size, width // self.patch_size)
        return torch.cat([positions[:1], resample_grid(positions[1:], grid, "bilinear")])[None]


class ClipTower(VisionLanguageTower):
    """CLIP and whatever is saved as CLIP: one class token; joint space by LayerNorm and a linear map without bias."""

    merges_normalised_vfm = False
    positions = Resampled("embeddings.position_embedding.weight", "bilinear", num_class_tokens=1)
    text_class, projection_bias = CLIPTextModel, False

    def __init__(self, config: MFuserConfig):
        super().__init__()
        vision, text = config.vlm_config, config.text_config
        self.vision = self.new_vision(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, vision.projection_dim, bias=self.projection_bias)
        if config.use_text_encoder:
            self.text = self.text_class._from_config(text)
            self.text_projection = nn.Linear(text.hidden_size, vision.projection_dim, bias=False)

    @staticmethod
    def new_vision(config: PreTrainedConfig) -> PreTrainedModel:
        vision = CLIPVisionModel._from_config(config)
        vision.embeddings = MFuserCLIPVisionEmbeddings(config)
        return vision

    @staticmethod
    def embedding_size(config: MFuserConfig) -> int:
        return config.vlm_config.projection_dim

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """CLIP-normalised pixels (B, 3, H, W) -> tokens (B, 1 + h * w, D), and what else the layers take."""
        hidden_states = self.vision.embeddings(pixel_values, interpolate_pos_encoding=True)
        return self.vision.pre_layrnorm(hidden_states), (None,)  # the layers want a mask, if only to be told of none

    def merge(self, hidden_states: torch.Tensor, vfm_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both encoders' tokens (B, 1 + N, D) -> global (B, 1, E) and dense (B, N, E) embeddings."""
        embeddings = self.visual_projection(self.vision.post_layernorm(hidden_states + vfm_states))
        return embeddings[:, :1], embeddings[:, 1:]

    def encode_text(self, token_ids: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Class names (K, T) and context vectors (1, P, C) -> class embeddings (K, E)."""
        hidden_states = self.prompted_text(token_ids, prompts)
        mask = create_causal_mask(
            config=self.text.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None
        )
        # sdpa gets no mask: its causality is in `is_causal`
        hidden_states = self.text.encoder(inputs_embeds=hidden_states, attention_mask=mask, is_causal=True)
        hidden_states = self.text.final_layer_norm(hidden_states.last_hidden_state)
        # the end token has the largest id; the prompts moved it back
        end = token_ids.argmax(dim=-1) + prompts.shape[1]
        rows = torch.arange(token_ids.shape[0], device=token_ids.device)
        return self.text_projection(hidden_states[rows, end])


class Eva02ClipTower(ClipTower):
    """EVA02-CLIP: rotary positions, both encoders' last norms before the sum, a linear map with bias after it."""

    merges_normalised_vfm = True
    positions = Resampled("embeddings.position_embedding.weight", "bicubic", num_class_tokens=1)
    kernel = Resampled("embeddings.patch_embedding.weight", "bicubic")
    text_class, projection_bias = Eva02ClipTextModel, True

    @staticmethod
    def new_vision(config: PreTrainedConfig) -> PreTrainedModel:
        return Eva02ClipVisionModel._from_config(config)

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        grid = [side // self.vision.config.patch_size for side in pixel_values.shape[-2:]]
        return self.vision.embeddings(pixel_values), (self.vision.rotary_embedding(*grid),)

    def merge(self, hidden_states: torch.Tensor, vfm_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = self.visual_projection(self.vision.post_layernorm(hidden_states) + vfm_states)
        return embeddings[:, :1], embeddings[:, 1:]


class MFuserSiglipVisionEmbeddings(SiglipVisionEmbeddings):
    """SigLIP's embeddings, resampled bilinearly as the paper's code does (Transformers: bicubic)."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        grid = (height // self.patch_size, width // self.patch_size)
        return resample_grid(self.position_embedding.weight, grid, "bilinear")[None]


class SiglipTower(VisionLanguageTower):
    """SigLIP: no class token; joint space by attention pooling, asked once by its probe and once by every patch."""

    num_class_tokens = 0
    positions = Resampled("embeddings.position_embedding.weight", "bilinear")
    text_class = SiglipTextModel

    def __init__(self, config: MFuserConfig):
        super().__init__()
        self.vision = self.new_vision(config.vlm_config)
        if config.use_text_encoder:
            self.text = self.text_class._from_config(config.text_config)

    @staticmethod
    def new_vision(config: PreTrainedConfig) -> PreTrainedModel:
        vision = SiglipVisionModel._from_config(config)
        vision.embeddings = MFuserSiglipVisionEmbeddings(config)
        return vision

    @staticmethod
    def embedding_size(config: MFuserConfig) -> int:
        return config.vlm_config.hidden_size

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """CLIP-normalised pixels (B, 3, H, W) -> tokens (B, h * w, D), and what else the layers take."""
        pixel_values = renormalise(pixel_values, HALF_PIXELS)
        return self.vision.embeddings(pixel_values, interpolate_pos_encoding=True), (None,)

    def merge(self, hidden_states: torch.Tensor, vfm_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both encoders' tokens (B, N, D) -> global (B, 1, D) and dense (B, N, D) embeddings."""
        merged = self.vision.post_layernorm(hidden_states) + vfm_states
        probe = self.vision.head.probe.expand(merged.shape[0], -1, -1)
        return self._pool(probe, merged), self._pool(merged, merged)

    def _pool(self, query: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
        head = self.vision.head
        attended, _ = head.attention(query, merged, merged, need_weights=False)
        return attended + head.mlp(head.layernorm(attended))

    def encode_text(self, token_ids: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Class names (K, T) and context vectors (1, P, C) -> class embeddings (K, D): not causal, the last token."""
        hidden_states = self.prompted_text(token_ids, prompts)
        hidden_states = self.text.encoder(inputs_embeds=hidden_states, attention_mask=None).last_hidden_state
        return self.text.head(self.text.final_layer_norm(hidden_states)[:, -1])


class MFuserSiglip2VisionEmbeddings(Siglip2VisionEmbeddings):
    """SigLIP 2's embeddings, of images in place of lists of patches."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> tokens (B, h * w, D)."""
        patch = self.patch_size
        height, width = (side // patch for side in pixel_values.shape[-2:])
        patches = pixel_values[..., : height * patch, : width * patch].unfold(2, patch, patch).unfold(3, patch, patch)
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (B, h * w, patch * patch * 3)
        tokens = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        return tokens + resample_grid(self.position_embedding.weight, (height, width), "bilinear")


class Siglip2Tower(SiglipTower):
    """SigLIP 2 (NaFlex): SigLIP with a linear patch embedding. Its fixed-size models are saved as SigLIP."""

    text_class = Siglip2TextModel

    @staticmethod
    def new_vision(config: PreTrainedConfig) -> PreTrainedModel:
        vision = Siglip2VisionModel._from_config(config)
        vision.embeddings = MFuserSiglip2VisionEmbeddings(config)
        return vision

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        return self.vision.embeddings(renormalise(pixel_values, HALF_PIXELS)), (None,)


VFM_TOWERS = {
    "dinov2": Dinov2Tower,
    "dinov2_with_registers": Dinov2WithRegistersTower,
    "dinov3_vit": DINOv3ViTTower,
}
VLM_TOWERS = {
    "clip_vision_model": ClipTower,
    "eva02_clip_vision_model": Eva02ClipTower,
    "siglip_vision_model": SiglipTower,
    "siglip2_vision_model": Siglip2Tower,
}
