"""Basic layers of MVFuser, MTEnhancer and decoders: attention, MLP, depth-wise convolution."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_mfuser import MFuserConfig
from .initialization_mfuser import fill_with_stacked_xavier, initialised


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention by the implementation that `module.config` names, see Transformers' attention interface.

    Args:
        module (`nn.Module`):
            The attention layer, with attributes `config` and `is_causal`.
        query (`torch.Tensor` of shape `(B, heads, Lq, C / heads)`):
            Queries.
        key, value (`torch.Tensor` of shape `(B, heads, Lk, C / heads)`):
            Keys and values.
        mask (`torch.Tensor` of shape `(B, 1, Lq, Lk)`, *optional*):
            `True` where a key takes part.

    Returns:
        `tuple`: Attended values `(B, Lq, C)`, and the attention weights or `None`.
    """
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    attended, weights = implementation(module, query, key, value, mask, scaling=query.shape[-1] ** -0.5)
    return attended.flatten(2), weights


class MFuserAttention(nn.Module):
    """Multi-head attention. Masks are `True` where a key takes part."""

    is_causal = False

    def __init__(self, config: MFuserConfig, hidden_size: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (
            initialised(
                nn.Linear(hidden_size, hidden_size, bias=qkv_bias),
                weight=fill_with_stacked_xavier,
                bias=init.zeros_,
            )
            for _ in range(3)
        )
        self.o_proj = initialised(nn.Linear(hidden_size, hidden_size), bias=init.zeros_)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """query (B, Lq, C), key and value (B, Lk, C), mask (B, 1, Lq, Lk) -> (B, Lq, C)."""
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, C / heads)
            for projection, states in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        attended, _ = attend(self, query, key, value, mask)
        return self.o_proj(attended)


class MFuserMLP(nn.Module):
    """Linear layers of the given sizes with an activation between them."""

    def __init__(self, sizes: list[int], activation: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden_states = self.activation(layer(hidden_states))
        return self.layers[-1](hidden_states)


class MFuserDepthwiseConv(nn.Module):
    """Depth-wise 'same' convolution along tokens without bias, as shifted products, which are faster than conv1d."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        bound = kernel_size**-0.5
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))
        initialised(self, weight=partial(init.uniform_, a=-bound, b=bound))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        length, taps = hidden_states.shape[1], self.weight.shape[1]
        padded = F.pad(hidden_states, (0, 0, taps // 2, taps // 2))  # (B, taps - 1 + L, C)
        convolved = padded[:, :length] * self.weight[:, 0]
        for tap in range(1, taps):
            convolved = convolved + padded[:, tap : tap + length] * self.weight[:, tap]
        return convolved
