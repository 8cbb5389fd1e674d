"""
MFuser: two frozen encoders fused by Mamba, and a mask decoder whose queries are class names.

Read top to bottom: MVFuser, feature pyramid, MTEnhancer, pixel decoder, transformer decoder, the models.
The encoders themselves are in towers_mfuser.py, the losses in loss_mfuser.py, the scan in selective_scan.py.

Paper: Zhang et al., "Mamba as a Bridge: Where Vision Foundation Models Meet Vision Language Models for
Domain-Generalized Semantic Segmentation", CVPR 2025, arXiv 2504.03193. The decoder follows Mask2Former (Cheng et al.,
CVPR 2022), its text queries tqdm (Pak et al., ECCV 2024).
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .class_names_mfuser import CITYSCAPES_CLASSES, class_token_ids
from .configuration_mfuser import MFuserConfig
from .loss_mfuser import MFuserLoss
from .pretrained_mfuser import build_from_pretrained
from .selective_scan import selective_scan
from .towers_mfuser import VFM_TOWERS, VLM_TOWERS

PYRAMID_STRIDES = (4, 8, 16, 32)


@dataclass
class MFuserModelOutput(ModelOutput):
    """
    fused_maps (`tuple` of 4 `torch.Tensor` of shape `(B, Dv + D, h, w)`): both encoders' patches after each tap.
    feature_maps (`tuple` of 4 `torch.Tensor` of shape `(B, Dv + D, ., .)`): the pyramid of them, stride 4 first.
    global_embedding (`torch.Tensor` of shape `(B, 1, E)`): the image in the vision-language space.
    dense_embedding (`torch.Tensor` of shape `(B, E, h, w)`): its patches there.
    text_embeddings (`torch.Tensor` of shape `(B, K, E)`): class embeddings, sharpened by the MTEnhancer.
    score_map (`torch.Tensor` of shape `(B, K, h, w)`): cosine similarity of the last two.
    hidden_states, vfm_hidden_states (`tuple` of `torch.Tensor`): tokens of the vision-language and of the vision
        foundation model, as embedded and after each MVFuser.
    """

    fused_maps: tuple[torch.Tensor, ...] | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    global_embedding: torch.Tensor | None = None
    dense_embedding: torch.Tensor | None = None
    text_embeddings: torch.Tensor | None = None
    score_map: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    vfm_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MFuserForSemanticSegmentationOutput(ModelOutput):
    """
    loss (scalar `torch.Tensor`): the sum of `loss_components`; for an image cut into crops, their mean.
    logits (`torch.Tensor` of shape `(B, K, H, W)`): class scores in [0, K], at the input's size.
    class_queries_logits (`torch.Tensor` of shape `(B, K, K + 1)`), masks_queries_logits (`(B, K, h, w)`), score_map
        (`(B, K, h', w')`): of the last prediction; `None` for an image cut into crops.
    hidden_states, vfm_hidden_states: as in [`MFuserModelOutput`].
    loss_components (`dict[str, torch.Tensor]`): every weighted loss by name, for logging.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    class_queries_logits: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None
    score_map: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    vfm_hidden_states: tuple[torch.Tensor, ...] | None = None
    loss_components: dict[str, torch.Tensor] | None = None


class WeightsCache:
    """
    A value that is made of weights alone: made once, and again only after one of them changed.

    With gradients, or while compiling, it is made every time. Changes through `.data` alone are not seen.
    """

    def __init__(self):
        self.clear()

    def clear(self):
        self.entry = [], None, None

    def get(self, weights: list[torch.Tensor], make: Callable[[], object], *others):
        """`make()`, of `weights` and `others` as they are now."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        device = weights[0].device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = [autocast, *others]
        key += [(w.data_ptr(), w.dtype, None if w.is_inference() else w._version) for w in weights]
        held, held_key, value = self.entry  # at once: replicas of a model on several devices share the cache
        if len(weights) != len(held) or any(map(operator.is_not, weights, held)) or key != held_key:
            value = make()
            # the weights are held: of those that are let go, an address could come back with others
            self.entry = list(weights), key, value
        return value


# --- fusion ----------------------------------------------------------------------------------------------------------


class MFuserDepthwiseConv(nn.Module):
    """Depth-wise convolution along tokens, 'same' padding, no bias; as shifted products, which beat conv1d here."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        length, taps = hidden_states.shape[1], self.weight.shape[1]
        padded = F.pad(hidden_states, (0, 0, taps // 2, taps // 2))  # (B, taps - 1 + L, C)
        return sum(padded[:, tap : tap + length] * self.weight[:, tap] for tap in range(taps))


class MVFuser(nn.Module):
    """
    The paper's fusion block (section 3.2): one Mamba-1 scan over the joint sequence of both encoders, gated by a
    convolution branch. Cost is linear in tokens. Tokens in and out are (B, L, D).
    """

    def __init__(self, config: MFuserConfig, hidden_size: int):
        super().__init__()
        half = hidden_size // 2
        self.state_size = config.fusion_state_size
        self.time_step_rank = math.ceil(hidden_size / 16)
        self.in_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.conv_x = MFuserDepthwiseConv(half, config.fusion_conv_kernel)
        self.conv_z = MFuserDepthwiseConv(half, config.fusion_conv_kernel)
        self.x_proj = nn.Linear(half, self.time_step_rank + 2 * self.state_size, bias=False)
        self.dt_proj = nn.Linear(self.time_step_rank, half, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(half))
        self.A_log = nn.Parameter(torch.empty(half, self.state_size))
        self.D = nn.Parameter(torch.empty(half))
        self.norm = nn.RMSNorm(half, eps=1e-5)
        self.out_proj = nn.Linear(half, hidden_size, bias=False)
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, D / 2) each
        x, z = F.silu(self.conv_x(x)), F.silu(self.conv_z(z))
        dt, B, C = self.x_proj(x).split([self.time_step_rank, self.state_size, self.state_size], dim=-1)
        y = selective_scan(
            x.transpose(1, 2),
            self.dt_proj(dt).transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.float(),
            delta_bias=2 * self.dt_bias.float(),  # twice, as in the published code: in its dt_proj and in its scan
            delta_softplus=True,
        )
        y = self.norm(y.transpose(1, 2)) * F.silu(z)  # z has passed SiLU before: the published gate does it twice
        return self.dropout(self.out_proj(y)) * self.scale


class MFuserFusionLayer(nn.Module):
    """An MVFuser between the two encoders, added to both streams (paper, equations 2 to 4)."""

    def __init__(self, config: MFuserConfig):
        super().__init__()
        vfm_size, vlm_size = config.vfm_config.hidden_size, config.vlm_config.hidden_size
        self.mvfuser = MVFuser(config, vlm_size)
        self.vfm_in_proj = nn.Linear(vfm_size, vlm_size) if config.fusion_project_vfm else nn.Identity()
        self.vfm_out_proj = nn.Linear(vlm_size, vfm_size) if config.fusion_project_vfm else nn.Identity()

    def forward(self, vfm_states: torch.Tensor, vlm_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """VFM tokens (B, Lv, Dv) and VLM tokens (B, L, D), with what they learned of each other added."""
        fused = self.mvfuser(torch.cat([self.vfm_in_proj(vfm_states), vlm_states], dim=1))
        for_vfm, for_vlm = fused.split([vfm_states.shape[1], vlm_states.shape[1]], dim=1)
        return vfm_states + self.vfm_out_proj(for_vfm), vlm_states + for_vlm


class MFuserPyramid(nn.Module):
    """Four maps of one stride, fine layers first, to strides of 1/4, 1/2, 1 and 2 patches."""

    def __init__(self, channels: int):
        super().__init__()
        self.stride4 = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
        )
        self.stride8 = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self._projected_upsampling = [WeightsCache(), WeightsCache()]

    def train(self, mode: bool = True):
        for cache in self._projected_upsampling:
            cache.clear()
        return super().train(mode)

    def forward(self, maps: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Fused maps (B, Dv + D, h, w) of the four taps -> features, stride 4 first."""
        return self.stride4(maps[0]), self.stride8(maps[1]), maps[2], self.pooled(maps[3])

    def projected(self, maps: list[torch.Tensor], projections: list[nn.Conv2d]) -> list[torch.Tensor]:
        """
        A 1 x 1 convolution of each feature, without ever making the wide features of strides 4 and 8: they take a
        twelfth of a full-size forward, and more of its memory.
        """
        *first, last = self.stride4
        fine = maps[0]
        for layer in first:
            fine = layer(fine)
        return [
            project_upsampled(fine, last, projections[0], self._projected_upsampling[0]),
            project_upsampled(maps[1], self.stride8, projections[1], self._projected_upsampling[1]),
            projections[2](maps[2]),
            projections[3](self.pooled(maps[3])),
        ]

    @staticmethod
    def pooled(maps: torch.Tensor) -> torch.Tensor:
        # a side of a single patch can't be halved
        return F.max_pool2d(maps, [min(2, side) for side in maps.shape[-2:]])


def project_upsampled(
    maps: torch.Tensor, upsample: nn.ConvTranspose2d, projection: nn.Conv2d, cache: WeightsCache
) -> torch.Tensor:
    """projection(upsample(maps)) as one transposed convolution to the projection's channels: both are linear."""
    weights = [parameter for layer in (upsample, projection) for parameter in layer.parameters()]
    if any(weight.is_meta for weight in weights):
        return projection(upsample(maps))  # offloaded weights come with the call of their module alone

    def combine():
        matrix = projection.weight.flatten(1)  # (out, channels)
        bias = matrix @ upsample.bias
        if projection.bias is not None:
            bias = bias + projection.bias
        # channels last in memory, as tokens are
        return torch.einsum("oc,icyx->iyxo", matrix, upsample.weight).permute(0, 3, 1, 2), bias

    weight, bias = cache.get(weights, combine)
    return F.conv_transpose2d(maps, weight, bias, stride=upsample.stride)


# --- text ------------------------------------------------------------------------------------------------------------


class MFuserAttention(nn.Module):
    """Multi-head attention of the MTEnhancer and the decoders. Masks hold True where a key may be seen."""

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """query (B, Lq, C), key and value (B, Lk, C), mask (B, 1, Lq, Lk) -> (B, Lq, C)."""
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, C / heads)
            for projection, states in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MFuserMLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(self, sizes: list[int], activation: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden_states = self.activation(layer(hidden_states))
        return self.layers[-1](hidden_states)


class MTEnhancerLayer(nn.Module):
    """Class names look at each other, then at the image through an MVFuser, then pass an MLP; pre-norm."""

    def __init__(self, config: MFuserConfig):
        super().__init__()
        size = config.enhancer_hidden_size
        self.self_attention_norm = nn.LayerNorm(size)
        self.self_attention = MFuserAttention(size, config.enhancer_num_heads, qkv_bias=False)
        self.mvfuser_norm = nn.LayerNorm(size)
        self.mvfuser = MVFuser(config, size)
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp = MFuserMLP([size, size * config.enhancer_mlp_ratio, size], nn.GELU())

    def forward(self, text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        normed = self.self_attention_norm(text)
        text = text + self.self_attention(normed, normed, normed)
        normed = self.mvfuser_norm(text)
        # the scan runs one way: text stands before the image and after it, so that every token meets both
        mixed = self.mvfuser(torch.cat([normed, visual, normed], dim=1))
        num_classes = text.shape[1]
        text = text + mixed[:, :num_classes] + mixed[:, -num_classes:]
        return text + self.mlp(self.mlp_norm(text))


class MTEnhancer(nn.Module):
    """What the image says about its class names (paper, section 3.3): text (B, K, E) and visual (B, N, E) -> text."""

    def __init__(self, config: MFuserConfig, embedding_size: int):
        super().__init__()
        size = config.enhancer_hidden_size
        self.visual_in_norm = nn.LayerNorm(embedding_size)
        self.visual_proj = nn.Linear(embedding_size, size)
        self.visual_out_norm = nn.LayerNorm(size)
        self.text_norm = nn.LayerNorm(embedding_size)
        self.text_proj = nn.Linear(embedding_size, size)
        self.layers = nn.ModuleList(MTEnhancerLayer(config) for _ in range(config.enhancer_num_layers))
        self.out_norm = nn.LayerNorm(size)
        self.out_proj = nn.Linear(size, embedding_size)
        self.gamma = nn.Parameter(torch.empty(embedding_size))

    def forward(self, text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        visual = self.visual_out_norm(self.visual_proj(self.visual_in_norm(visual)))
        hidden_states = self.text_proj(self.text_norm(text))
        for layer in self.layers:
            hidden_states = layer(hidden_states, visual)
        return text + self.gamma * self.out_proj(self.out_norm(hidden_states))


# --- pixel decoder ---------------------------------------------------------------------------------------------------


def sine_positions(height: int, width: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Sine embeddings of a grid (1, h * w, C), y half before x half, in the dtype and on the device of `like`."""
    frequencies = torch.arange(channels // 4, device=like.device, dtype=torch.float32)
    frequencies = 10000 ** (-frequencies / (channels // 4))
    halves = []
    for length in (height, width):
        angle = torch.arange(1, length + 1, device=like.device, dtype=torch.float32)
        angle = (angle / (length + 1e-6) * 2 * math.pi)[:, None] * frequencies
        halves.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2))  # (length, C / 2)
    y, x = halves[0][:, None].expand(-1, width, -1), halves[1][None].expand(height, -1, -1)
    return torch.cat([y, x], dim=-1).reshape(1, height * width, channels).to(like.dtype)


def cell_centres(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Centres of a grid's cells in [0, 1], x first -> (h * w, 2)."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).reshape(-1, 2)


class MFuserSamplingOffsets(nn.Linear):
    """Where each head looks, in cells of each level: at first in directions around the circle, points ever further."""

    def __init__(self, size: int, num_heads: int, num_levels: int, num_points: int):
        self.samples = (num_heads, num_levels, num_points)
        super().__init__(size, num_heads * num_levels * num_points * 2)

    def starting_offsets(self) -> torch.Tensor:
        num_heads, _, num_points = self.samples
        angles = torch.arange(num_heads, device=self.bias.device) * (2 * math.pi / num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)  # (heads, 2)
        distances = torch.arange(1, num_points + 1, device=self.bias.device)[:, None]
        return (directions[:, None, None] * distances).expand(*self.samples, 2).flatten().to(self.bias.dtype)


class MFuserSamplingWeights(nn.Linear):
    """How much each sample counts: at first all alike."""


class MFuserDeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al., ICLR 2021, equation 3) in plain torch."""

    def __init__(self, config: MFuserConfig):
        super().__init__()
        size = config.decoder_hidden_size
        self.num_heads, self.num_levels = config.decoder_num_heads, config.num_levels
        self.num_points = config.decoder_num_points
        self.sampling_offsets = MFuserSamplingOffsets(size, self.num_heads, self.num_levels, self.num_points)
        self.attention_weights = MFuserSamplingWeights(size, self.num_heads * self.num_levels * self.num_points)
        self.value_proj = nn.Linear(size, size)
        self.output_proj = nn.Linear(size, size)

    def forward(
        self, query: torch.Tensor, value: torch.Tensor, centres: torch.Tensor, shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """query and value (B, L, C), level after level; centres (L, 2); (h, w) of each level -> (B, L, C)."""
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(value).unflatten(-1, (heads, -1))  # (B, L, heads, C / heads)
        weights = self.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(dim=-1)
        weights = weights.unflatten(-1, (levels, points))
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
        by_rows = value.device.type == "cpu" and not torch.is_grad_enabled()
        sample = self._sample_rows if by_rows else self._sample_maps
        return self.output_proj(sample(value, weights, offsets, centres, shapes))

    @staticmethod
    def _sample_maps(value, weights, offsets, centres, shapes) -> torch.Tensor:
        """One grid_sample a level, of maps of single heads."""
        batch, length, heads, _ = value.shape
        weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)  # (levels, B * heads, L, P)
        offsets = offsets.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (levels, B * heads, L, P, 2)
        attended = 0
        for level, (height, width) in enumerate(shapes):
            start = sum(h * w for h, w in shapes[:level])
            level_map = value[:, start : start + height * width].permute(0, 2, 3, 1)  # (B, heads, C / heads, h * w)
            level_map = level_map.reshape(batch * heads, -1, height, width)
            # grid_sample wants [-1, 1], x first; an offset of 1 is one cell of its level
            x = 2 * centres[:, None, 0] - 1 + offsets[level, ..., 0] * (2 / width)
            y = 2 * centres[:, None, 1] - 1 + offsets[level, ..., 1] * (2 / height)
            sampled = F.grid_sample(level_map, torch.stack([x, y], dim=-1).to(level_map.dtype), align_corners=False)
            attended = attended + (sampled * weights[level][:, None]).sum(dim=-1)  # (B * heads, C / heads, L)
        return attended.view(batch, -1, length).transpose(1, 2)

    @staticmethod
    def _sample_rows(value, weights, offsets, centres, shapes) -> torch.Tensor:
        """The same as weighted sums of rows, four a sample: three times as fast on a CPU, but not in backward."""
        batch, length, heads, _ = value.shape
        points = offsets.shape[-2]
        starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
        levels = torch.tensor(
            [[w, h, start] for (h, w), start in zip(shapes, starts, strict=True)], dtype=torch.float32
        )
        # one entry for each of an image's S = heads * levels * points samples at a query
        width, height, start = levels.repeat_interleave(points, dim=0).repeat(heads, 1).unbind(1)
        offsets, weights = offsets.float().flatten(2, 4), weights.float().flatten(2)  # (B, L, S, 2), (B, L, S)
        columns = _neighbours(centres[:, :1] * width - 0.5 + offsets[..., 0], width)
        lines = _neighbours(centres[:, 1:] * height - 0.5 + offsets[..., 1], height)
        table = value.reshape(batch * length * heads, -1)
        head = torch.arange(heads).repeat_interleave(weights.shape[-1] // heads)
        first = torch.arange(batch)[:, None, None] * length * heads + head  # (B, 1, S): row of the first cell
        bag = (batch * length * heads, -1)
        attended = 0
        for line, line_share in lines:
            line, line_share = line * width + start, line_share * weights
            for column, column_share in columns:
                rows = (line + column).long() * heads + first
                share = (line_share * column_share).to(table.dtype)
                attended = attended + F.embedding_bag(
                    rows.view(bag), table, mode="sum", per_sample_weights=share.view(bag)
                )
        return attended.view(batch, length, -1)


def _neighbours(position: torch.Tensor, size: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The cells below and above a position on an axis of `size` cells, and their shares, 0 outside."""
    below = position.floor()
    share_above = position - below
    cells = ((below, 1 - share_above), (below + 1, share_above))
    return [(cell.clamp(min=0).minimum(size - 1), share * ((cell >= 0) & (cell < size))) for cell, share in cells]


class MFuserPixelDecoderLayer(GradientCheckpointingLayer):
    """Pixels of all levels look at each other, then at the text, then pass an MLP; post-norm."""

    def __init__(self, config: MFuserConfig):
        super().__init__()
        size = config.decoder_hidden_size
        self.self_attention = MFuserDeformableAttention(config)
        self.self_attention_norm = nn.LayerNorm(size)
        self.text_attention = MFuserAttention(size, config.decoder_num_heads)
        self.text_attention_norm = nn.LayerNorm(size)
        self.mlp = MFuserMLP([size, config.decoder_pixel_feedforward_size, size], nn.ReLU(inplace=True))
        self.mlp_norm = nn.LayerNorm(size)

    def forward(self, pixels, positions, text, text_positions, centres, shapes):
        attended = self.self_attention(pixels + positions, pixels, centres, shapes)
        pixels = self.self_attention_norm(pixels + attended)
        attended = self.text_attention(pixels + positions, text + text_positions, text)
        pixels = self.text_attention_norm(pixels + attended)
        return self.mlp_norm(pixels + self.mlp(pixels))


class MFuserConvNorm(nn.Module):
    """Convolution and GroupNorm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.norm = nn.GroupNorm(32, out_channels)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(maps))


class MFuserPixelDecoder(nn.Module):
    """Pyramid and class embeddings to mask features and to the memory of the transformer decoder."""

    def __init__(self, config: MFuserConfig, in_channels: int, embedding_size: int):
        super().__init__()
        size = config.decoder_hidden_size
        self.input_convs = nn.ModuleList(
            MFuserConvNorm(in_channels, size, 1, bias=True) for _ in range(config.num_levels)
        )
        self.level_embedding = nn.Parameter(torch.empty(config.num_levels, size))
        self.text_proj = nn.Linear(embedding_size, size)
        self.text_position_embedding = nn.Parameter(torch.empty(config.num_labels, size))
        self.layers = nn.ModuleList(MFuserPixelDecoderLayer(config) for _ in range(config.decoder_pixel_layers))
        self.final_norm = nn.LayerNorm(size)
        self.lateral_conv = MFuserConvNorm(in_channels, size, 1, bias=False)
        self.output_conv = MFuserConvNorm(size, size, 3, bias=False)
        self.mask_proj = nn.Conv2d(size, size, 1)

    @property
    def projections(self) -> list[nn.Conv2d]:
        """The first convolution of each feature, stride 4 first."""
        return [self.lateral_conv.conv, *(level.conv for level in reversed(self.input_convs))]

    def forward(
        self, projected_maps: list[torch.Tensor], text: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Args:
            projected_maps (`list` of 4 `torch.Tensor` of shape `(B, C, ., .)`):
                Each feature after its projection, stride 4 first.
            text (`torch.Tensor` of shape `(B, K, E)`)

        Returns:
            mask features `(B, C, H / 4, W / 4)`, and the refined levels `(B, C, h, w)`, coarse first.
        """
        finest, *levels = projected_maps
        levels = [conv.norm(level) for conv, level in zip(self.input_convs, reversed(levels), strict=True)]
        shapes = [tuple(level.shape[-2:]) for level in levels]
        pixels = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (B, L, C)
        positions = torch.cat(
            [
                sine_positions(*shape, pixels.shape[-1], like=pixels) + embedding
                for shape, embedding in zip(shapes, self.level_embedding.unbind(0), strict=True)
            ],
            dim=1,
        )
        centres = torch.cat([cell_centres(*shape, pixels.device) for shape in shapes])
        text, text_positions = self.text_proj(text), self.text_position_embedding
        for layer in self.layers:
            pixels = layer(pixels, positions, text, text_positions, centres, shapes)
        pixels = self.final_norm(pixels)
        levels = [
            level.transpose(1, 2).unflatten(-1, shape)
            for level, shape in zip(pixels.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
        ]
        fine = self.lateral_conv.norm(finest)
        fine = fine + F.interpolate(levels[-1], size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_proj(F.relu(self.output_conv(fine))), levels


# --- transformer decoder ---------------------------------------------------------------------------------------------


class MFuserDecoderLayer(GradientCheckpointingLayer):
    """Queries look at one level inside their mask, then at each other, then pass an MLP; post-norm."""

    def __init__(self, config: MFuserConfig):
        super().__init__()
        size = config.decoder_hidden_size
        self.cross_attention = MFuserAttention(size, config.decoder_num_heads)
        self.cross_attention_norm = nn.LayerNorm(size)
        self.self_attention = MFuserAttention(size, config.decoder_num_heads)
        self.self_attention_norm = nn.LayerNorm(size)
        self.mlp = MFuserMLP([size, config.decoder_feedforward_size, size], nn.ReLU(inplace=True))
        self.mlp_norm = nn.LayerNorm(size)

    def forward(self, queries, query_positions, memory, memory_positions, mask):
        attended = self.cross_attention(queries + query_positions, memory + memory_positions, memory, mask)
        queries = self.cross_attention_norm(queries + attended)
        positioned = queries + query_positions
        queries = self.self_attention_norm(queries + self.self_attention(positioned, positioned, queries))
        return self.mlp_norm(queries + self.mlp(queries))


class MFuserMaskPredictor(nn.Module):
    """A class and a mask from each query."""

    def __init__(self, config: MFuserConfig):
        super().__init__()
        size = config.decoder_hidden_size
        self.norm = nn.LayerNorm(size)
        self.class_head = nn.Linear(size, config.num_labels + 1)
        self.mask_mlp = MFuserMLP([size, size, size, size], nn.ReLU(inplace=True))

    def forward(self, queries: torch.Tensor, mask_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """queries (B, K, C), mask features (B, C, h, w) -> class logits (B, K, K + 1), mask logits (B, K, h, w)."""
        queries = self.norm(queries)
        return self.class_head(queries), torch.einsum("bkc,bchw->bkhw", self.mask_mlp(queries), mask_features)


class MFuserDecoder(nn.Module):
    """One query a class, made of its name, refined against the pixel decoder's levels, coarse to fine, in turn."""

    def __init__(self, config: MFuserConfig, embedding_size: int):
        super().__init__()
        size = config.decoder_hidden_size
        self.query_mlp = MFuserMLP([embedding_size, size, size], nn.ReLU(inplace=True))
        self.query_position_embedding = nn.Parameter(torch.empty(config.num_labels, size))
        self.level_embedding = nn.Parameter(torch.empty(config.num_levels, size))
        self.layers = nn.ModuleList(MFuserDecoderLayer(config) for _ in range(config.decoder_num_layers))
        self.predictor = MFuserMaskPredictor(config)

    def forward(
        self, text: torch.Tensor, mask_features: torch.Tensor, levels: list[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Predictions (class logits, mask logits): one before the first layer, one after each."""
        shapes = [tuple(level.shape[-2:]) for level in levels]
        level_positions = [sine_positions(*shape, mask_features.shape[1], like=text) for shape in shapes]
        memories = [
            level.flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(levels, self.level_embedding.unbind(0), strict=True)
        ]
        queries, query_positions = self.query_mlp(text), self.query_position_embedding
        predictions = [self.predictor(queries, mask_features)]
        for index, layer in enumerate(self.layers):
            level = index % len(levels)
            mask = self.attention_mask(predictions[-1][1], shapes[level])
            queries = layer(queries, query_positions, memories[level], level_positions[level], mask)
            predictions.append(self.predictor(queries, mask_features))
        return predictions

    @staticmethod
    @torch.no_grad()
    def attention_mask(mask_logits: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Where a query may look: inside its mask, or everywhere if that is nowhere -> (B, 1, K, h * w)."""
        mask = F.interpolate(mask_logits, size=shape, mode="bilinear", align_corners=False).flatten(2)
        inside = mask.sigmoid() >= 0.5
        return (inside | ~inside.any(dim=-1, keepdim=True))[:, None]


# --- models ----------------------------------------------------------------------------------------------------------


class MFuserPreTrainedModel(PreTrainedModel):
    config: MFuserConfig
    base_model_prefix = "mfuser"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the Trainer would divide the loss by the number of pixels
    _no_split_modules = [
        "MFuserDinov2Embeddings",
        "MFuserDinov2WithRegistersEmbeddings",
        "MFuserCLIPVisionEmbeddings",
        "MFuserSiglipVisionEmbeddings",
        "MFuserSiglip2VisionEmbeddings",
        "MFuserFusionLayer",
        "MFuserPyramid",
        "MTEnhancer",
        "MFuserPixelDecoder",
        "MFuserDecoder",
    ]
    _keep_in_fp32_modules_strict = ["A_log"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As [`PreTrainedModel.from_pretrained`]; frozen encoders stay frozen, which loading alone would undo."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.freeze_encoders:
            model.freeze_encoders()
        return loaded

    @classmethod
    def from_vfm_vlm_pretrained(
        cls, vfm: str, vlm: str, class_names: list[str] = CITYSCAPES_CLASSES, **kwargs
    ) -> "MFuserPreTrainedModel":
        """
        A model of two pretrained encoders, with a fusion and a decoder to be trained.

        Position grids and patch kernels are resampled once, as the paper's code does; what was is logged.

        Args:
            vfm (`str`): folder or Hub id of a DINOv2 (with registers or without) or DINOv3 ViT, of any size.
            vlm (`str`): of a CLIP (or what is saved as one), SigLIP, SigLIP 2 or EVA02-CLIP.
            class_names (`list[str]`): in the order of the labels; by default Cityscapes' 19.
            tokenizer (*optional*): the vision-language model's tokenizer, or where to load it; by default from `vlm`.
            crop_size (`int`, defaults to 512): side of the training crops and of the sliding windows.
            patch_size (`int`, *optional*): by default 16, and with EVA02-CLIP that model's own.
            class_token_length (`int`, defaults to 5): token positions of a class name, start and end included.
            kwargs: any other field of [`MFuserConfig`].

        Raises:
            ValueError: encoders that can't be paired, weights that are missing, class names that are too long.
        """
        return build_from_pretrained(cls, vfm, vlm, class_names, **kwargs)

    def freeze_encoders(self):
        """Stops the gradients of both encoders and of the text encoder, and keeps them in eval mode."""
        model = getattr(self, self.base_model_prefix, self)
        model.config.freeze_encoders = True
        for tower in (model.vfm, model.vlm):
            tower.requires_grad_(False).eval()
        if model.stored_class_embeddings is not None:
            model.stored_class_embeddings.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self, self.base_model_prefix, self).vlm.vision.embeddings.patch_embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, MVFuser):
            _init_mvfuser(module, self.config)
        elif isinstance(module, MFuserDepthwiseConv):
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, MFuserSamplingOffsets):
            init.zeros_(module.weight)
            init.copy_(module.bias, module.starting_offsets())
        elif isinstance(module, MFuserSamplingWeights):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            _init_torch_default(module)
        elif isinstance(module, MFuserPixelDecoder):
            init.normal_(module.level_embedding)
            init.normal_(module.text_position_embedding)
        elif isinstance(module, MFuserDecoder):
            init.normal_(module.level_embedding)
            init.normal_(module.query_position_embedding)
        elif isinstance(module, MTEnhancer):
            init.trunc_normal_(module.gamma)
        elif isinstance(module, MFuserModel):
            for parameter in (module.prompts, module.stored_class_embeddings):
                if parameter is not None:
                    init.trunc_normal_(parameter)
        else:
            super()._init_weights(module)


def _init_torch_default(layer: nn.Module):
    init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    if layer.bias is not None:
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(layer.weight)
        init.uniform_(layer.bias, -(fan_in**-0.5), fan_in**-0.5)


def _init_mvfuser(module: MVFuser, config: MFuserConfig):
    """Mamba's start values: steps from 1e-3 to 1e-1, decays 1 to N; an output near zero."""
    states = torch.arange(1, module.state_size + 1, dtype=torch.float32, device=module.A_log.device)
    init.copy_(module.A_log, states.log().expand_as(module.A_log))
    init.ones_(module.D)
    init.ones_(module.norm.weight)
    init.constant_(module.scale, config.fusion_initial_scale)
    init.uniform_(module.dt_proj.weight, -(module.time_step_rank**-0.5), module.time_step_rank**-0.5)
    low, high = math.log(1e-3), math.log(1e-1)
    step = torch.exp(torch.rand_like(module.dt_bias, dtype=torch.float32) * (high - low) + low).clamp(min=1e-4)
    init.copy_(module.dt_bias, step + torch.log(-torch.expm1(-step)))  # softplus of this is the step


class MFuserModel(MFuserPreTrainedModel):
    """Both encoders in step with an MVFuser after each layer, the class embeddings, and what comes of the two."""

    def __init__(self, config: MFuserConfig):
        super().__init__(config)
        config.check()
        vlm_tower = VLM_TOWERS[config.vlm_config.model_type]
        embedding_size = vlm_tower.embedding_size(config)
        self.vfm = VFM_TOWERS[config.vfm_config.model_type](config)
        self.vlm = vlm_tower(config)
        self.fusion_layers = nn.ModuleList(MFuserFusionLayer(config) for _ in config.layer_pairs)
        vfm_size, vlm_size = config.vfm_config.hidden_size, config.vlm_config.hidden_size
        self.merge_proj = nn.Linear(vfm_size, vlm_size) if config.fusion_project_vfm else nn.Identity()
        self.pyramid = MFuserPyramid(vfm_size + vlm_size)
        self.enhancer = MTEnhancer(config, embedding_size)
        self.prompts = self.stored_class_embeddings = None
        if config.use_text_encoder:
            self.prompts = nn.Parameter(torch.empty(1, config.text_prompt_length, config.text_config.hidden_size))
        else:
            self.stored_class_embeddings = nn.Parameter(torch.empty(config.num_labels, embedding_size))
        self.gradient_checkpointing = False
        self._class_embeddings_cache = WeightsCache()
        self.post_init()
        if config.freeze_encoders:
            self.freeze_encoders()

    def train(self, mode: bool = True):
        super().train(mode)
        self._class_embeddings_cache.clear()
        if self.config.freeze_encoders:
            self.vfm.eval()
            self.vlm.eval()
        return self

    def class_embeddings(self) -> torch.Tensor:
        """
        Class names in the vision-language space, before any image -> (K, E).

        Where no gradient is asked for they are computed once, and again only after a weight changed (see
        [`WeightsCache`]) or after `train()` or `eval()`.
        """
        if self.prompts is None:
            return self.stored_class_embeddings
        weights = [self.prompts, *self.vlm.parameters()]
        return self._class_embeddings_cache.get(weights, self._encode_classes, self.config.class_token_ids)

    @torch.no_grad()
    def store_class_embeddings(self):
        """Keeps the class embeddings as a tensor and lets go of the text encoder, for models that are trained."""
        if self.prompts is None:
            return
        embeddings = self._encode_classes()
        self.stored_class_embeddings = nn.Parameter(embeddings, requires_grad=not self.config.freeze_encoders)
        self.prompts = None
        self.vlm.drop_text_encoder()
        self.config.use_text_encoder = False

    def _encode_classes(self) -> torch.Tensor:
        token_ids = torch.tensor(self.config.class_token_ids, device=self.prompts.device)
        return self.vlm.encode_text(token_ids, self.prompts)

    def _fusion_step(self, vfm_states, vlm_states, step, vfm_inputs, vlm_inputs):
        """The layers of both encoders up to one MVFuser, and that MVFuser."""
        pairs = [(0, 0), *self.config.layer_pairs]
        (vfm_start, vlm_start), (vfm_end, vlm_end) = pairs[step], pairs[step + 1]
        for layer in range(vfm_start, vfm_end):
            vfm_states = self.vfm.run_layer(layer, vfm_states, vfm_inputs)
        last = max(self.config.vlm_config.num_hidden_layers - 1, 1)
        for layer in range(vlm_start, vlm_end):
            rate = self.config.vlm_drop_path_rate * layer / last if self.training else 0.0
            vlm_states = self.vlm.run_layer(layer, vlm_states, vlm_inputs, rate)
        return self.fusion_layers[step](vfm_states, vlm_states)

    def _checkpointed_fusion_step(self, vfm_states, vlm_states, *inputs):
        if getattr(self._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
            # reentrant checkpoints need an input with a gradient, which embeddings of frozen encoders lack
            vlm_states.requires_grad_(True)
        return self._gradient_checkpointing_func(self._fusion_step, vfm_states, vlm_states, *inputs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        class_embeddings: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_feature_maps: bool = True,
        return_dict: bool | None = None,
    ) -> MFuserModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Normalised with CLIP's mean and standard deviation. Pixels beyond the last whole patch are not seen.
            class_embeddings (`torch.Tensor` of shape `(K, E)`, *optional*):
                In place of [`~MFuserModel.class_embeddings`].
            output_feature_maps (`bool`): whether to make the pyramid of the fused maps.
        """
        self.check_pixels(pixel_values)
        if class_embeddings is None:
            class_embeddings = self.class_embeddings()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        grid = [side // self.config.patch_size for side in pixel_values.shape[-2:]]
        (vfm_states, vfm_inputs), (vlm_states, vlm_inputs) = self.vfm.embed(pixel_values), self.vlm.embed(pixel_values)
        run_step = (
            self._checkpointed_fusion_step if self.gradient_checkpointing and self.training else self._fusion_step
        )
        taps, vfm_collected, vlm_collected = [], [vfm_states], [vlm_states]
        for step in range(len(self.fusion_layers)):
            vfm_states, vlm_states = run_step(vfm_states, vlm_states, step, vfm_inputs, vlm_inputs)
            if step + 1 in self.config.fusion_out_layers:
                patches = [states[:, -grid[0] * grid[1] :] for states in (vfm_states, vlm_states)]
                taps.append(torch.cat(patches, dim=-1).transpose(1, 2).unflatten(-1, grid))  # (B, Dv + D, h, w)
            if output_hidden_states:
                vfm_collected.append(vfm_states)
                vlm_collected.append(vlm_states)
        global_embedding, dense_embedding = self._merge(vfm_states, vlm_states)
        text = class_embeddings.expand(pixel_values.shape[0], -1, -1)
        text = self.enhancer(text, torch.cat([global_embedding, dense_embedding], dim=1))
        score_map = F.normalize(text, dim=-1) @ F.normalize(dense_embedding, dim=-1).transpose(1, 2)
        return MFuserModelOutput(
            fused_maps=tuple(taps),
            feature_maps=self.pyramid(taps) if output_feature_maps else None,
            global_embedding=global_embedding,
            dense_embedding=dense_embedding.transpose(1, 2).unflatten(-1, grid),
            text_embeddings=text,
            score_map=score_map.unflatten(-1, grid),
            hidden_states=tuple(vlm_collected) if output_hidden_states else None,
            vfm_hidden_states=tuple(vfm_collected) if output_hidden_states else None,
        )

    def _merge(self, vfm_states: torch.Tensor, vlm_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Last tokens of both encoders -> global (B, 1, E) and dense (B, h * w, E) embeddings."""
        if self.vlm.merges_normalised_vfm:
            vfm_states = self.vfm.final_norm(vfm_states)
        # the class token, where the other has one too, and the patches; registers have no counterpart
        num_patches = vlm_states.shape[1] - self.vlm.num_class_tokens
        vfm_states = torch.cat([vfm_states[:, : self.vlm.num_class_tokens], vfm_states[:, -num_patches:]], dim=1)
        return self.vlm.merge(vlm_states, self.merge_proj(vfm_states))

    def check_pixels(self, pixel_values: torch.Tensor):
        """Raises `ValueError` for what is no batch of images, or for images without a whole patch."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values must have shape (batch, 3, height, width), not {tuple(pixel_values.shape)}"
            )
        if min(pixel_values.shape[-2:]) < self.config.patch_size:
            raise ValueError(
                f"an image of {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels holds no patch of "
                f"{self.config.patch_size}: resize it to at least that"
            )


class MFuserForSemanticSegmentation(MFuserPreTrainedModel):
    """MFuser with its text-queried mask decoder: class scores for every pixel, and the training loss."""

    def __init__(self, config: MFuserConfig):
        super().__init__(config)
        self.mfuser = MFuserModel(config)
        channels = config.vfm_config.hidden_size + config.vlm_config.hidden_size
        embedding_size = self.mfuser.enhancer.gamma.shape[0]
        self.pixel_decoder = MFuserPixelDecoder(config, channels, embedding_size)
        self.decoder = MFuserDecoder(config, embedding_size)
        self.criterion = MFuserLoss(config)
        self.post_init()
        if config.freeze_encoders:
            self.freeze_encoders()

    @torch.no_grad()
    def set_class_names(self, class_names: list[str], tokenizer):
        """
        Segments other classes from now on, without training.

        The queries are made of the new names' embeddings. What a model learned for each of its classes (two position
        embeddings, a row of the class head) is taken from the trained name that the new one is most similar to, and
        each query votes for its own class alone, since the class head can't tell new classes apart. Names near to
        trained ones work best; what the training set held only as background can't be expected to be found.

        Args:
            class_names (`list[str]`): the new classes, in the order of their labels.
            tokenizer: the vision-language model's.

        Raises:
            ValueError: the model has no text encoder, or a name is too long.
        """
        config, model = self.config, self.mfuser
        if model.prompts is None:
            raise ValueError("this model holds its class embeddings as a tensor and has no text encoder for new names")
        token_ids = class_token_ids(class_names, tokenizer, len(config.class_token_ids[0]))
        trained = F.normalize(model.class_embeddings(), dim=-1)
        config.class_token_ids = token_ids
        nearest = (F.normalize(model.class_embeddings(), dim=-1) @ trained.T).argmax(dim=-1)  # (new K,)
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
        config.queries_vote_for_own_class = True
        for module, name in (
            (self.pixel_decoder, "text_position_embedding"),
            (self.decoder, "query_position_embedding"),
        ):
            table = getattr(module, name)
            setattr(module, name, nn.Parameter(table[nearest], requires_grad=table.requires_grad))
        head = self.decoder.predictor.class_head
        rows = torch.cat([nearest, nearest.new_tensor([head.out_features - 1])])  # "no object" stays last
        # classes that share a row share its probability
        shared = torch.cat([torch.bincount(nearest)[nearest].log(), head.bias.new_zeros(1)])
        head.weight = nn.Parameter(head.weight[rows], requires_grad=head.weight.requires_grad)
        head.bias = nn.Parameter(head.bias[rows] - shared, requires_grad=head.bias.requires_grad)
        head.out_features = len(rows)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MFuserForSemanticSegmentationOutput:
        """
        In eval mode an image larger than `config.crop_size` is segmented by sliding windows.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised with CLIP's mean and standard deviation.
            labels (`torch.Tensor` of shape `(B, H, W)`, *optional*):
                Class ids, `config.semantic_loss_ignore_index` where unknown.

        Example:

        ```python
        >>> outputs = model(**processor(image, return_tensors="pt"))
        >>> maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(height, width)])
        ```
        """
        self.mfuser.check_pixels(pixel_values)
        class_embeddings = self.mfuser.class_embeddings()
        if not self.training and max(pixel_values.shape[-2:]) > self.config.crop_size:
            return self._forward_by_windows(pixel_values, labels, class_embeddings, output_hidden_states)
        return self._forward_whole(pixel_values, labels, class_embeddings, output_hidden_states)

    def _forward_whole(self, pixel_values, labels, class_embeddings, output_hidden_states=None):
        features = self.mfuser(pixel_values, class_embeddings, output_hidden_states, output_feature_maps=False)
        maps = self.mfuser.pyramid.projected(features.fused_maps, self.pixel_decoder.projections)
        mask_features, levels = self.pixel_decoder(maps, features.text_embeddings)
        predictions = self.decoder(features.text_embeddings, mask_features, levels)
        loss = components = None
        if labels is not None:
            class_logits, mask_logits = (torch.stack(logits) for logits in zip(*predictions, strict=True))
            components = self.criterion(class_logits, mask_logits, features.score_map, labels)
            loss = torch.stack(list(components.values())).sum()
        class_logits, mask_logits = predictions[-1]
        return MFuserForSemanticSegmentationOutput(
            loss=loss,
            logits=self.segmentation_scores(class_logits, mask_logits, pixel_values.shape[-2:]),
            class_queries_logits=class_logits,
            masks_queries_logits=mask_logits,
            score_map=features.score_map,
            hidden_states=features.hidden_states,
            vfm_hidden_states=features.vfm_hidden_states,
            loss_components=components,
        )

    def segmentation_scores(self, class_logits: torch.Tensor, mask_logits: torch.Tensor, size) -> torch.Tensor:
        """Every query votes for its classes where its mask is -> (B, K, *size), in float32."""
        classes, masks = class_logits.float().softmax(dim=-1), mask_logits.float().sigmoid()
        if self.config.queries_vote_for_own_class:
            scores = (1 - classes[..., -1])[..., None, None] * masks
        else:
            scores = torch.einsum("bqk,bqhw->bkhw", classes[..., :-1], masks)
        return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)

    def _forward_by_windows(self, pixel_values, labels, class_embeddings, output_hidden_states):
        if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
            raise ValueError(
                f"an image of {pixel_values.shape[-2]} x {pixel_values.shape[-1]} is segmented by crops of "
                f"{self.config.crop_size}, which have hidden states of their own: ask for them crop by crop"
            )
        if labels is not None and labels.shape[-2:] != pixel_values.shape[-2:]:
            raise ValueError(
                f"labels of {tuple(labels.shape[-2:])} don't lie on an image of {tuple(pixel_values.shape[-2:])}, "
                "which is cut into crops: give both in one size"
            )
        batch, _, height, width = pixel_values.shape
        crop_height, crop_width = min(height, self.config.crop_size), min(width, self.config.crop_size)
        windows = [
            (..., slice(top, top + crop_height), slice(left, left + crop_width))
            for top in window_starts(height, self.config.crop_size, self.config.crop_stride)
            for left in window_starts(width, self.config.crop_size, self.config.crop_stride)
        ]
        # a loss is of one crop of every image; without one, as many crops as memory takes go together
        together = 1 if labels is not None else self._windows_per_batch(pixel_values, crop_height * crop_width)
        scores = pixel_values.new_zeros(batch, self.config.num_labels, height, width, dtype=torch.float32)
        counts = scores.new_zeros(height, width)
        losses = []
        for start in range(0, len(windows), together):
            chosen = windows[start : start + together]
            crops = torch.cat([pixel_values[window] for window in chosen])
            crop_labels = None if labels is None else labels[chosen[0]]
            outputs = self._forward_whole(crops, crop_labels, class_embeddings, False)
            for window, crop_scores in zip(chosen, outputs.logits.split(batch), strict=True):
                scores[window] += crop_scores
                counts[window] += 1
            losses.append(outputs.loss_components)
        components = loss = None
        if labels is not None:
            components = {name: torch.stack([crop[name] for crop in losses]).mean() for name in losses[0]}
            loss = torch.stack(list(components.values())).sum()
        return MFuserForSemanticSegmentationOutput(loss=loss, logits=scores / counts, loss_components=components)

    def _windows_per_batch(self, pixel_values: torch.Tensor, crop_pixels: int) -> int:
        """How many crops of every image fit into memory together."""
        if self.config.windows_per_batch is not None:
            return self.config.windows_per_batch
        patches = crop_pixels // self.config.patch_size**2 * pixel_values.shape[0]
        if pixel_values.device.type != "cuda" or torch.compiler.is_compiling():
            return max(1, 1024 // patches)  # enough tokens for matrix products to run at their rate
        # the largest maps at once are the pyramid's of stride 4, about eight of them
        weight = self.mfuser.pyramid.stride8.weight
        needed = 8 * 16 * patches * weight.shape[0] * weight.element_size()
        free, _ = torch.cuda.mem_get_info(pixel_values.device)
        reusable = torch.cuda.memory_reserved(pixel_values.device) - torch.cuda.memory_allocated(pixel_values.device)
        return max(1, (free + reusable) // 2 // needed)

    @torch.no_grad()
    def augmented_scores(
        self, pixel_values: torch.Tensor, scales: tuple[float, ...] = (1.0,), flip: bool = True
    ) -> torch.Tensor:
        """
        Test-time augmentation: the mean over scales, and over the mirrored image, of softmaxed scores.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`)
            scales (`tuple[float, ...]`): factors on the image's size; the paper's are 0.5, 0.75, 1, 1.25, 1.5, 1.75.
            flip (`bool`): whether to add the horizontally mirrored image.

        Returns:
            `torch.Tensor` of shape `(B, K, H, W)`
        """
        size = pixel_values.shape[-2:]
        total = 0
        for scale in scales:
            target = [round(side * scale) for side in size]
            scaled = F.interpolate(pixel_values, size=target, mode="bilinear", align_corners=False)
            for mirrored in (False, True) if flip else (False,):
                scores = self(scaled.flip(-1) if mirrored else scaled).logits
                scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
                total = total + (scores.flip(-1) if mirrored else scores)
        return total / (len(scales) * (2 if flip else 1))


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` begin along a side, the last one shifted back inside."""
    count = max(math.ceil((length - crop) / stride), 0) + 1
    return [max(min(index * stride, length - crop), 0) for index in range(count)]


__all__ = ["MFuserPreTrainedModel", "MFuserModel", "MFuserForSemanticSegmentation"]

MFuserModel.register_for_auto_class("AutoModel")
MFuserForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
