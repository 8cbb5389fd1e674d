"""Resampling of pretrained position embeddings and patch kernels to another grid or patch size."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Resampled:
    """
    A weight of a pretrained encoder that is resampled to the grid or patch size of the model.

    Args:
        name (`str`):
            Its name in `vision`.
        mode (`str`):
            `"bicubic"` or `"bilinear"`.
        num_class_tokens (`int`, *optional*, defaults to 0):
            Leading rows that are not part of the grid.
    """

    name: str
    mode: str
    num_class_tokens: int = 0


def resample_grid(positions: torch.Tensor, grid: tuple[int, int], mode: str, offset: float = 0.0) -> torch.Tensor:
    """
    Resamples the position embeddings of a square grid to another grid.

    Args:
        positions (`torch.Tensor` of shape `(g * g, C)`):
            Position embeddings, row by row.
        grid (`tuple[int, int]`):
            Rows and columns of the new grid.
        mode (`str`):
            `"bicubic"` or `"bilinear"`, with `align_corners=False`.
        offset (`float`, *optional*, defaults to 0.0):
            Added to the new size when the scale factor is computed; DINOv2 uses 0.1 against rounding errors.

    Returns:
        `torch.Tensor` of shape `(grid[0] * grid[1], C)`: `positions` itself if the grid is the same.

    Raises:
        ValueError: If `positions` do not form a square grid.
    """
    side = round(positions.shape[0] ** 0.5)
    if side * side != positions.shape[0]:
        raise ValueError(f"there are {positions.shape[0]} position embeddings; they must form a square grid")
    if torch.compiler.is_exporting():
        if mode == "bicubic":
            # As tensors, because an exported graph would be specialised to either case.
            rows, columns = (torch.full((), length, device=positions.device) for length in grid)
            added = torch.where((rows == side) & (columns == side), 0.0, offset)
            rows, columns = (_bicubic_matrix(length, side, added) for length in grid)
            maps = positions.float().view(side, side, -1)
            return torch.einsum("hg,gkc,wk->hwc", rows, maps, columns).flatten(0, 1).to(positions.dtype)
    elif tuple(grid) == (side, side):
        return positions
    maps = positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, g, g)
    if offset:
        scale = tuple((length + offset) / side for length in grid)
        maps = F.interpolate(maps, scale_factor=scale, mode=mode, align_corners=False)
    else:
        maps = F.interpolate(maps, size=tuple(grid), mode=mode, align_corners=False)
    return maps.flatten(2)[0].T.to(positions.dtype)


def _bicubic_matrix(length: int, side: int, offset: torch.Tensor) -> torch.Tensor:
    """Bicubic resampling of one axis as a matrix (length, side), as an exported graph takes no scale factor."""
    position = (torch.arange(length, device=offset.device) + 0.5) * (side / (length + offset)) - 0.5
    cell = position.floor()
    columns = torch.arange(side, device=offset.device)
    matrix = position.new_zeros(())
    for tap in range(-1, 3):
        distance = (position - cell - tap).abs()
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        weight = torch.where(distance <= 1, near, far)[:, None]
        matrix = matrix + weight * ((cell + tap).clamp(0, side - 1)[:, None] == columns)
    return matrix
