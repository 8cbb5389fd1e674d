"""
The text-queried mask decoder: pixel decoder with deformable attention, transformer decoder.

The decoder follows Mask2Former (Cheng et al., CVPR 2022, arXiv 2112.01527), with one query per class computed from the
class name as in tqdm (Pak et al., ECCV 2024, arXiv 2407.09033).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .class_names_mfuser import selected_rows
from .configuration_mfuser import GROUP_NORM_GROUPS, MFuserConfig
from .initialization_mfuser import fill_with_directions, initialised
from .layers_mfuser import MFuserAttention, MFuserMLP
from .pyramid_mfuser import PyramidLevel

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


def grid_shape(maps: torch.Tensor) -> tuple[int, int]:
    """Height and width of maps (B, C, h, w)."""
    return maps.shape[-2], maps.shape[-1]


def cell_centres(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Centres of the cells of a grid in [0, 1], x first -> (h * w, 2)."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).reshape(-1, 2)


class MFuserDeformableAttention(nn.Module):
    """
    Multi-scale deformable attention (Zhu et al., ICLR 2021, arXiv 2010.04159, equation 3) in plain torch.

    Transformers' `MultiScaleDeformableAttention` samples as [`_sample_maps`] does, three times as slowly on a CPU.
    """

    def __init__(self, config: MFuserConfig):
        super().__init__()
        size = config.decoder_hidden_size
        self.num_heads, self.num_levels = config.decoder_num_heads, config.num_levels
        self.num_points = config.decoder_num_points
        samples = (self.num_heads, self.num_levels, self.num_points)
        self.sampling_offsets = initialised(
            nn.Linear(size, math.prod(samples) * 2),
            weight=init.zeros_,
            bias=partial(fill_with_directions, num_heads=samples[0], num_levels=samples[1], num_points=samples[2]),
        )
        self.attention_weights = initialised(nn.Linear(size, math.prod(samples)), weight=init.zeros_, bias=init.zeros_)
        self.value_proj, self.output_proj = (
            initialised(nn.Linear(size, size), weight=init.xavier_uniform_, bias=init.zeros_) for _ in range(2)
        )

    def forward(
        self, query: torch.Tensor, value: torch.Tensor, centres: torch.Tensor, shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """
        Args:
            query (`torch.Tensor` of shape `(B, L, C)`):
                Queries of all levels, one level after the other.
            value (`torch.Tensor` of shape `(B, L, C)`):
                Values in the same order.
            centres (`torch.Tensor` of shape `(L, 2)`):
                Reference point of each query, x first, in [0, 1].
            shapes (`list[tuple[int, int]]`):
                Height and width of each level.

        Returns:
            `torch.Tensor` of shape `(B, L, C)`
        """
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(value).unflatten(-1, (heads, -1))  # (B, L, heads, C / heads)
        weights = self.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(dim=-1)
        weights = weights.unflatten(-1, (levels, points))
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
        by_rows = value.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_exporting()
        sample = self._sample_rows if by_rows else self._sample_maps
        return self.output_proj(sample(value, weights, offsets, centres, shapes))

    @staticmethod
    def _sample_maps(value, weights, offsets, centres, shapes) -> torch.Tensor:
        """Bilinear sampling by `grid_sample`, once per level, with heads as part of the batch."""
        batch, length, heads, _ = value.shape
        weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)  # (levels, B * heads, L, P)
        offsets = offsets.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (levels, B * heads, L, P, 2)
        attended = value.new_zeros(())
        for level, (height, width) in enumerate(shapes):
            start = sum(h * w for h, w in shapes[:level])
            level_map = value[:, start : start + height * width].permute(0, 2, 3, 1)  # (B, heads, C / heads, h * w)
            level_map = level_map.reshape(batch * heads, -1, height, width)
            # grid_sample takes positions in [-1, 1], x first; an offset of 1 is one cell of the level
            x = 2 * centres[:, None, 0] - 1 + offsets[level, ..., 0] * (2 / width)
            y = 2 * centres[:, None, 1] - 1 + offsets[level, ..., 1] * (2 / height)
            sampled = F.grid_sample(level_map, torch.stack([x, y], dim=-1).to(level_map.dtype), align_corners=False)
            attended = attended + (sampled * weights[level][:, None]).sum(dim=-1)  # (B * heads, C / heads, L)
        return attended.view(batch, -1, length).transpose(1, 2)

    @staticmethod
    def _sample_rows(value, weights, offsets, centres, shapes) -> torch.Tensor:
        """
        The same values as weighted sums of table rows, four per sample. Three times as fast on a CPU, except in
        backward.
        """
        batch, length, heads, _ = value.shape
        points = offsets.shape[-2]
        starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
        levels = torch.tensor(
            [[w, h, start] for (h, w), start in zip(shapes, starts, strict=True)], dtype=torch.float32
        )
        # One entry for each of the S = heads * levels * points samples of a query.
        width, height, start = levels.repeat_interleave(points, dim=0).repeat(heads, 1).unbind(1)
        offsets, weights = offsets.float().flatten(2, 4), weights.float().flatten(2)  # (B, L, S, 2), (B, L, S)
        columns = _neighbours(centres[:, :1] * width - 0.5 + offsets[..., 0], width)
        lines = _neighbours(centres[:, 1:] * height - 0.5 + offsets[..., 1], height)
        table = value.reshape(batch * length * heads, -1)
        head = torch.arange(heads).repeat_interleave(weights.shape[-1] // heads)
        first = torch.arange(batch)[:, None, None] * length * heads + head  # (B, 1, S): row of the first cell
        bag = (batch * length * heads, -1)
        attended = value.new_zeros(())
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
    """The two cells next to a position on an axis of `size` cells, each with its weight; 0 outside the axis."""
    below = position.floor()
    share_above = position - below
    cells = ((below, 1 - share_above), (below + 1, share_above))
    return [(cell.clamp(min=0).minimum(size - 1), share * ((cell >= 0) & (cell < size))) for cell, share in cells]


class MFuserPixelDecoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention over all levels, cross-attention to the class embeddings, MLP; post-norm."""

    def __init__(self, config: MFuserConfig):
        super().__init__()
        size = config.decoder_hidden_size
        self.self_attention = MFuserDeformableAttention(config)
        self.self_attention_norm = nn.LayerNorm(size)
        self.text_attention = MFuserAttention(config, size, config.decoder_num_heads)
        self.text_attention_norm = nn.LayerNorm(size)
        self.mlp = MFuserMLP([size, config.decoder_pixel_feedforward_size, size], nn.ReLU(inplace=True))
        self.mlp_norm = nn.LayerNorm(size)

    def forward(self, pixels, positions, text, text_positions, centres, shapes):
        """Refines the positions of all levels (B, N, C), at `centres` (N, 2), with the class names (B, K, C)."""
        attended = self.self_attention(pixels + positions, pixels, centres, shapes)
        pixels = self.self_attention_norm(pixels + attended)
        attended = self.text_attention(pixels + positions, text + text_positions, text)
        pixels = self.text_attention_norm(pixels + attended)
        return self.mlp_norm(pixels + self.mlp(pixels))


def kaiming_conv(in_channels: int, out_channels: int, kernel_size: int, bias: bool) -> nn.Conv2d:
    """A 'same' convolution with Kaiming-normal initial weights."""
    return initialised(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias),
        weight=partial(init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
        bias=init.zeros_,
    )


class MFuserLevelProjection(nn.Module):
    """1x1 convolution of a pyramid level to the width of the decoder, and GroupNorm."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool):
        super().__init__()
        self.conv = kaiming_conv(in_channels, out_channels, kernel_size=1, bias=bias)
        self.norm = nn.GroupNorm(GROUP_NORM_GROUPS, out_channels)

    def forward(self, level: PyramidLevel) -> torch.Tensor:
        return self.norm(level.project(self.conv))


class MFuserConvNorm(nn.Module):
    """3x3 convolution without bias, and GroupNorm."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = kaiming_conv(channels, channels, kernel_size=3, bias=False)
        self.norm = nn.GroupNorm(GROUP_NORM_GROUPS, channels)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(maps))


class MFuserPixelDecoder(nn.Module):
    """Refines the pyramid, conditioned on the class embeddings, to mask features and the decoder's memory."""

    initial_values: dict[str, Callable]  # set by `initialised`

    def __init__(self, config: MFuserConfig, in_channels: int, embedding_size: int):
        super().__init__()
        size = config.decoder_hidden_size
        self.input_convs = nn.ModuleList(
            MFuserLevelProjection(in_channels, size, bias=True) for _ in range(config.num_levels)
        )
        self.level_embedding = nn.Parameter(torch.empty(config.num_levels, size))
        self.text_proj = nn.Linear(embedding_size, size)
        self.text_position_embedding = nn.Parameter(torch.empty(config.num_labels, size))
        self.layers = nn.ModuleList(MFuserPixelDecoderLayer(config) for _ in range(config.decoder_pixel_layers))
        self.final_norm = nn.LayerNorm(size)
        self.lateral_conv = MFuserLevelProjection(in_channels, size, bias=False)
        self.output_conv = MFuserConvNorm(size)
        self.mask_proj = nn.Conv2d(size, size, 1)
        initialised(self, level_embedding=init.normal_, text_position_embedding=init.normal_)

    def forward(self, levels: list[PyramidLevel], text: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Args:
            levels (`list` of 4 [`PyramidLevel`]):
                The feature pyramid, finest first.
            text (`torch.Tensor` of shape `(B, K, E)`):
                Class embeddings.

        Returns:
            `tuple`: Mask features `(B, C, h, w)` of the finest level (H / 4 by W / 4 with patches of 16 pixels), and
            the other levels `(B, C, h, w)`, refined, coarse first.
        """
        finest, *coarser = levels
        maps = [conv(level) for conv, level in zip(self.input_convs, reversed(coarser), strict=True)]
        shapes = [grid_shape(level_map) for level_map in maps]
        pixels = torch.cat([level_map.flatten(2).transpose(1, 2) for level_map in maps], dim=1)  # (B, L, C)
        positions = torch.cat(
            [
                sine_positions(height, width, pixels.shape[-1], like=pixels) + embedding
                for (height, width), embedding in zip(shapes, self.level_embedding.unbind(0), strict=True)
            ],
            dim=1,
        )
        centres = torch.cat([cell_centres(height, width, pixels.device) for height, width in shapes])
        text, text_positions = self.text_proj(text), self.text_position_embedding
        for layer in self.layers:
            pixels = layer(pixels, positions, text, text_positions, centres, shapes)
        pixels = self.final_norm(pixels)
        refined = [
            level_pixels.transpose(1, 2).unflatten(-1, shape)
            for level_pixels, shape in zip(pixels.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
        ]
        fine = self.lateral_conv(finest)
        fine = fine + F.interpolate(refined[-1], size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_proj(F.relu(self.output_conv(fine))), refined

    def select_classes(self, rows: torch.Tensor):
        """Initialises class i with the parameters of class `rows[i]`, or with initial values if that is -1."""
        initialise = self.initial_values["text_position_embedding"]
        self.text_position_embedding = selected_rows(self.text_position_embedding, rows, initialise)


# --- transformer decoder ---------------------------------------------------------------------------------------------


class MFuserDecoderLayer(GradientCheckpointingLayer):
    """Masked cross-attention to one level, self-attention over the queries, MLP; post-norm."""

    def __init__(self, config: MFuserConfig):
        super().__init__()
        size = config.decoder_hidden_size
        self.cross_attention = MFuserAttention(config, size, config.decoder_num_heads)
        self.cross_attention_norm = nn.LayerNorm(size)
        self.self_attention = MFuserAttention(config, size, config.decoder_num_heads)
        self.self_attention_norm = nn.LayerNorm(size)
        self.mlp = MFuserMLP([size, config.decoder_feedforward_size, size], nn.ReLU(inplace=True))
        self.mlp_norm = nn.LayerNorm(size)

    def forward(self, queries, query_positions, memory, memory_positions, mask):
        """Updates the queries (B, K, C) with one level (B, N, C), where the mask (B, 1, K, N) is `True`."""
        attended = self.cross_attention(queries + query_positions, memory + memory_positions, memory, mask)
        queries = self.cross_attention_norm(queries + attended)
        positioned = queries + query_positions
        queries = self.self_attention_norm(queries + self.self_attention(positioned, positioned, queries))
        return self.mlp_norm(queries + self.mlp(queries))


class MFuserMaskPredictor(nn.Module):
    """Class logits and mask logits of each query."""

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
    """
    Transformer decoder with one query per class, computed from the class embedding. Its layers attend to the refined
    levels in turn, coarse to fine.
    """

    initial_values: dict[str, Callable]  # set by `initialised`

    def __init__(self, config: MFuserConfig, embedding_size: int):
        super().__init__()
        size = config.decoder_hidden_size
        self.query_mlp = MFuserMLP([embedding_size, size, size], nn.ReLU(inplace=True))
        self.query_position_embedding = nn.Parameter(torch.empty(config.num_labels, size))
        self.level_embedding = nn.Parameter(torch.empty(config.num_levels, size))
        self.layers = nn.ModuleList(MFuserDecoderLayer(config) for _ in range(config.decoder_num_layers))
        self.predictor = MFuserMaskPredictor(config)
        initialised(self, query_position_embedding=init.normal_, level_embedding=init.normal_)

    def forward(
        self, text: torch.Tensor, mask_features: torch.Tensor, levels: list[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Args:
            text (`torch.Tensor` of shape `(B, K, E)`):
                Class embeddings.
            mask_features (`torch.Tensor` of shape `(B, C, h, w)`):
                Mask features of the pixel decoder.
            levels (`list` of 3 `torch.Tensor` of shape `(B, C, h, w)`):
                Its refined levels, coarse first.

        Returns:
            `list[tuple]`: Class logits `(B, K, K + 1)` and mask logits `(B, K, h, w)` at the size of the mask
            features, once before the first layer and once after each.
        """
        shapes = [grid_shape(level) for level in levels]
        level_positions = [
            sine_positions(height, width, mask_features.shape[1], like=text) for height, width in shapes
        ]
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
        """`True` inside the mask of each query, or everywhere if the mask is empty -> (B, 1, K, h * w)."""
        mask = F.interpolate(mask_logits, size=shape, mode="bilinear", align_corners=False).flatten(2)
        inside = mask.sigmoid() >= 0.5
        return (inside | ~inside.any(dim=-1, keepdim=True))[:, None]

    def select_classes(self, rows: torch.Tensor, share_probability: bool):
        """
        Initialises class i with the parameters of class `rows[i]`, or with initial values if that is -1.

        Args:
            rows (`torch.Tensor` of shape `(N,)`):
                Index of a current class, or -1, for each of N new classes.
            share_probability (`bool`):
                Whether classes that take the same row of the class head share its probability.
        """
        initialise = self.initial_values["query_position_embedding"]
        self.query_position_embedding = selected_rows(self.query_position_embedding, rows, initialise)
        head = self.predictor.class_head
        no_object = rows.new_tensor([head.out_features - 1])
        rows = torch.cat([rows, no_object])
        bound = head.in_features**-0.5  # initial values of nn.Linear
        initialise = partial(init.uniform_, a=-bound, b=bound)
        head.weight = selected_rows(head.weight, rows, initialise)
        head.bias = selected_rows(head.bias, rows, initialise)
        if share_probability:
            # -1 indexes the last count, the 1 of "no object": new rows are not shared.
            head.bias.sub_(torch.bincount(rows[rows >= 0])[rows].log())
        head.out_features = len(rows)
