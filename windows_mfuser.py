"""Inference on whole images: sliding windows, and test-time augmentation over scales and flips."""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .configuration_mfuser import MFuserConfig

Window = tuple[slice, slice]

# Enough tokens for matrix products to run at their full rate on a CPU.
CPU_TOKENS_PER_BATCH = 1024
# The largest activations are the pyramid's at a quarter of the patch size: 4 x 4 positions per patch, and about eight
# maps of that size are alive at once.
LARGEST_MAP_POSITIONS_PER_PATCH = 4 * 4
LARGEST_MAPS_ALIVE = 8


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """First pixels of the windows along a side of `length` pixels; the last window is shifted back inside."""
    count = max(math.ceil((length - crop) / stride), 0) + 1
    return [max(min(index * stride, length - crop), 0) for index in range(count)]


def sliding_windows(height: int, width: int, crop: int, stride: int) -> list[Window]:
    """Windows of `crop` x `crop` pixels, `stride` apart, that cover an image; a shorter side is covered whole."""
    return [
        (slice(top, min(top + crop, height)), slice(left, min(left + crop, width)))
        for top in window_starts(height, crop, stride)
        for left in window_starts(width, crop, stride)
    ]


def windows_per_batch(pixel_values: torch.Tensor, config: MFuserConfig, dtype: torch.dtype) -> int:
    """
    Number of windows of every image to segment together: `config.windows_per_batch`, or as many as fit into half of
    the free memory of a GPU, or as keep a CPU busy.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
            The images.
        config ([`MFuserConfig`]):
            Configuration of the model.
        dtype (`torch.dtype`):
            Of the activations.
    """
    if config.windows_per_batch:
        return config.windows_per_batch
    crop = config.crop_size
    batch, _, height, width = pixel_values.shape
    patches = min(height, crop) * min(width, crop) // config.patch_size**2 * batch
    if pixel_values.device.type != "cuda" or torch.compiler.is_compiling():
        return max(1, CPU_TOKENS_PER_BATCH // patches)
    needed = LARGEST_MAPS_ALIVE * LARGEST_MAP_POSITIONS_PER_PATCH * patches * config.pyramid_channels * dtype.itemsize
    free, _ = torch.cuda.mem_get_info(pixel_values.device)
    reusable = torch.cuda.memory_reserved(pixel_values.device) - torch.cuda.memory_allocated(pixel_values.device)
    return max(1, (free + reusable) // 2 // needed)


def average_over_windows(
    segment: Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, dict[str, torch.Tensor] | None]],
    pixel_values: torch.Tensor,
    labels: torch.Tensor | None,
    windows: list[Window],
    num_labels: int,
    together: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
    """
    Segments images window by window and averages the scores where windows overlap.

    Args:
        segment (`Callable`):
            Maps crops and their labels (or `None`) to scores `(N, K, h, w)` and loss components.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
            The images.
        labels (`torch.Tensor` of shape `(B, H, W)`, *optional*):
            Their labels.
        windows (`list`):
            Rows and columns of each window; all of one size.
        num_labels (`int`):
            Number of classes K.
        together (`int`):
            Windows of every image per call of `segment`; 1 where there are labels, as a loss is that of
            one crop of every image.

    Returns:
        `tuple`: The scores `(B, K, H, W)` in float32, and the mean over windows of each loss component or `None`.
    """
    if labels is not None:
        together = 1
    batch, _, height, width = pixel_values.shape
    scores = pixel_values.new_zeros(batch, num_labels, height, width, dtype=torch.float32)
    counts = scores.new_zeros(height, width)
    losses: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(windows), together):
        chosen = windows[start : start + together]
        crops = torch.cat([pixel_values[..., rows, columns] for rows, columns in chosen])
        crop_labels = None if labels is None else labels[..., chosen[0][0], chosen[0][1]]
        crop_scores, components = segment(crops, crop_labels)
        for (rows, columns), window_scores in zip(chosen, crop_scores.split(batch), strict=True):
            scores[..., rows, columns] += window_scores
            counts[rows, columns] += 1
        if components is not None:
            losses.append(components)
    if not losses:
        return scores / counts, None
    return scores / counts, {name: torch.stack([crop[name] for crop in losses]).mean() for name in losses[0]}


def average_over_augmentations(
    segment: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor, scales: tuple[float, ...], flip: bool
) -> torch.Tensor:
    """
    Test-time augmentation: the mean over scales and flips of the softmax over classes of the resized scores.

    Args:
        segment (`Callable`):
            Maps images to scores `(B, K, h, w)`.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
            The images.
        scales (`tuple[float, ...]`):
            Factors on the size of the images.
        flip (`bool`):
            Whether to add the horizontally flipped images.

    Returns:
        `torch.Tensor` of shape `(B, K, H, W)`: Mean probabilities.
    """
    size = pixel_values.shape[-2:]
    flips = (False, True) if flip else (False,)
    total = pixel_values.new_zeros(())
    for scale in scales:
        scaled_size = [round(side * scale) for side in size]
        scaled = F.interpolate(pixel_values, size=scaled_size, mode="bilinear", align_corners=False)
        for flipped in flips:
            scores = segment(scaled.flip(-1) if flipped else scaled)
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
            total = total + (scores.flip(-1) if flipped else scores)
    return total / (len(scales) * len(flips))
