"""Initial values of the layers that MFuser adds to its encoders: each layer declares its own."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from transformers import initialization as init

Layer = TypeVar("Layer", bound=nn.Module)
Initializer = Callable[[torch.Tensor], object]


def initialised(layer: Layer, **initial_values: Initializer) -> Layer:
    """
    Declares the initial values of a layer's parameters where they differ from those of its class.

    `MFuserPreTrainedModel._init_weights` applies them. They are attached to the layer itself, since Transformers skips
    modules without parameters of their own, such as the attention that the layer belongs to, when it initialises
    models of remote code.

    Args:
        layer (`nn.Module`):
            The layer.
        initial_values:
            For each parameter, a function of `transformers.initialization` that fills it in place.
    """
    # nn.Module's annotations allow only tensors and modules as attributes.
    layer.initial_values = {**getattr(layer, "initial_values", {}), **initial_values}  # type: ignore[assignment]
    return layer


def fill_with_stacked_xavier(weight: torch.Tensor) -> torch.Tensor:
    """Xavier-uniform over the (3 C, C) matrix that stacks query, key and value; `weight` (C, C) is one of them."""
    bound = math.sqrt(6 / (4 * weight.shape[1]))
    return init.uniform_(weight, -bound, bound)


def fill_with_decays(A_log: torch.Tensor) -> torch.Tensor:
    """Initial decay rates 1 to N of every channel, as in Mamba; `A_log` has shape (channels, N)."""
    rates = torch.arange(1, A_log.shape[1] + 1, dtype=torch.float32, device=A_log.device)
    return init.copy_(A_log, rates.log().expand_as(A_log))


def fill_with_time_steps(dt_bias: torch.Tensor) -> torch.Tensor:
    """Initial steps, log-uniform between 1e-3 and 1e-1, as in Mamba; `dt_bias` is their inverse softplus."""
    low, high = math.log(1e-3), math.log(1e-1)
    step = torch.exp(torch.rand_like(dt_bias, dtype=torch.float32) * (high - low) + low).clamp(min=1e-4)
    return init.copy_(dt_bias, step + torch.log(-torch.expm1(-step)))


def fill_with_directions(bias: torch.Tensor, num_heads: int, num_levels: int, num_points: int) -> torch.Tensor:
    """
    Initial sampling offsets of deformable attention, in cells: one direction per head, evenly spaced on the circle, at
    a distance of 1 to `num_points` cells. `bias` has shape (heads * levels * points * 2,).
    """
    angles = torch.arange(num_heads, device=bias.device) * (2 * math.pi / num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)  # (heads, 2)
    distances = torch.arange(1, num_points + 1, device=bias.device)[:, None]
    offsets = (directions[:, None, None] * distances).expand(num_heads, num_levels, num_points, 2)
    return init.copy_(bias, offsets.flatten().to(bias.dtype))
