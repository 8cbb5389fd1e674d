"""The feature pyramid, that of ViTDet and ViT-Adapter: maps at four strides from fused maps at one."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .weights_cache_mfuser import WeightsCache


@dataclass(frozen=True)
class Projection:
    """A 1x1 convolution as an argument of a module: Accelerate's hooks would move a bare module to another device."""

    conv: nn.Conv2d

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        return self.conv(maps)


class MFuserUpsampling(nn.ConvTranspose2d):
    """
    A transposed convolution that doubles height and width, and optionally a 1x1 convolution of its result.

    Both are linear, so the pair is computed as one transposed convolution to the channels of the projection. The wide
    maps in between are never allocated: at full size that saves 8 % of the operations of a crop and 128 MiB.
    """

    bias: nn.Parameter  # always present here

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=2, stride=2)
        self._projected_kernel = WeightsCache()

    # An argument of `forward` rather than a second method, because Accelerate's hooks act on `forward` alone.
    def forward(  # type: ignore[override]  # `projection` replaces the unused `output_size`
        self, maps: torch.Tensor, projection: Projection | None = None
    ) -> torch.Tensor:
        """
        Args:
            maps (`torch.Tensor` of shape `(B, C, h, w)`):
                The maps to upsample.
            projection ([`Projection`], *optional*):
                A 1x1 convolution to `out` channels.

        Returns:
            `torch.Tensor` of shape `(B, C or out, 2 * h, 2 * w)`
        """
        if projection is None:
            return super().forward(maps)
        kernel, bias = self._projected_kernel.get((self, projection.conv), partial(self._project_kernel, projection))
        return F.conv_transpose2d(maps, kernel.to(maps.device), bias.to(maps.device), stride=self.stride)

    def _project_kernel(self, projection: Projection) -> tuple[torch.Tensor, torch.Tensor]:
        # The kernel (C, C, 2, 2) holds maps of 2 x 2 pixels, one for each input channel, which are projected likewise.
        constant = projection(torch.zeros_like(self.weight[:1, :, :1, :1]))  # the bias of the projection
        kernel = projection(self.weight) - constant  # (C, out, 2, 2)
        return kernel, projection(self.bias[None, :, None, None]).flatten()


@dataclass(frozen=True)
class PyramidLevel:
    """
    One level of the feature pyramid, before its last upsampling.

    Args:
        maps (`torch.Tensor` of shape `(B, C, h, w)`):
            Maps.
        upsampling ([`MFuserUpsampling`], *optional*):
            The upsampling that gives the feature map.
    """

    maps: torch.Tensor
    upsampling: nn.Module | None = None

    def feature_map(self) -> torch.Tensor:
        return self.maps if self.upsampling is None else self.upsampling(self.maps)

    def project(self, projection: nn.Conv2d) -> torch.Tensor:
        """A 1x1 convolution of the feature map."""
        return projection(self.maps) if self.upsampling is None else self.upsampling(self.maps, Projection(projection))


class MFuserPyramid(nn.Module):
    """Resamples four maps at the stride of the patches to strides of 1/4, 1/2, 1 and 2 patches, fine to coarse."""

    def __init__(self, channels: int):
        super().__init__()
        self.stride4 = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            MFuserUpsampling(channels),
        )
        self.stride8 = MFuserUpsampling(channels)

    def forward(self, maps: tuple[torch.Tensor, ...]) -> list[PyramidLevel]:
        """Fused maps (B, Dv + D, h, w) of the four taps -> four levels, finest first, before the last upsampling."""
        if self.training and not any(parameter.requires_grad for parameter in self.parameters()):
            self.eval()  # a frozen pyramid keeps its BatchNorm statistics, which are not part of an adapter
        *layers, upsampling = self.stride4
        finest = maps[0]
        for layer in layers:
            finest = layer(finest)
        pool = [min(2, side) for side in maps[3].shape[-2:]]  # a side of one patch cannot be halved
        return [
            PyramidLevel(finest, upsampling),
            PyramidLevel(maps[1], self.stride8),
            PyramidLevel(maps[2]),
            PyramidLevel(F.max_pool2d(maps[3], pool)),
        ]
