"""Int8 weights, and int8 matrix products on a CPU, for the linear layers of the encoders and of their fusion."""

import math
import warnings
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mfuser.modeling_mfuser import MFuserForSemanticSegmentation

QUANTIZATIONS = ("int8-weight-only", "int8-dynamic")
# Not quantised: embeddings and SigLIP's pooling head, whose weights the code reads directly, and the two small
# projections that compute the parameters of the scan.
QUANTIZED = ("vfm.vision.", "vlm.vision.", "fusion_layers.", "merge_proj")
NOT_QUANTIZED = {"embeddings", "head", "x_proj", "dt_proj"}


class Int8WeightLinear(nn.Module):
    """A linear layer with int8 weights, one scale per output channel, on any device."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = int8_weight(linear)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        product = F.linear(hidden_states, self.weight.to(hidden_states.dtype)) * self.scale.to(hidden_states.dtype)
        return product if self.bias is None else product + self.bias.to(hidden_states.dtype)


class Int8DynamicLinear(nn.Module):
    """
    A linear layer with int8 weights whose input is rounded to 8 bits for an integer product; on a CPU.

    The input has one scale and one zero point per call. The product is oneDNN's, which uses AMX or VNNI.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, self.scale = int8_weight(linear)
        self.zero_point = torch.zeros(len(weight), dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.float()
        low, high = (bound.item() for bound in torch.aminmax(states))
        low, high = min(low, 0.0), max(high, 0.0)  # zero is exact
        if not math.isfinite(high - low):  # the scores become NaN, which is reported
            return hidden_states.new_full((*hidden_states.shape[:-1], len(self.scale)), math.nan)
        scale = max((high - low) / 255, torch.finfo(torch.float32).tiny)
        zero_point = round(-low / scale)
        rounded = torch.quantize_per_tensor(states, scale, zero_point, torch.quint8).int_repr()
        weight = (self.packed, self.scale, self.zero_point)
        output = (1.0, 0, torch.float32)  # scale, zero point and dtype: not rounded
        product = torch.ops.onednn.qlinear_pointwise(
            rounded,
            scale,
            zero_point,
            *weight,
            self.bias,
            *output,
            "none",
            [],
            "",  # no other operation
        )
        return product.to(hidden_states.dtype)


@cache
def int8_products_are_exact() -> bool:
    """
    Whether this machine has oneDNN, and its sums of 8-bit products are exact.

    A CPU without VNNI adds pairs of products in 16 bits, which overflow.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    ones = nn.Linear(64, 64, bias=False)
    nn.init.ones_(ones.weight)
    with warnings.catch_warnings():
        # PyTorch deprecates `quantize_per_tensor`, once per process; it has no other operation that takes one pass.
        warnings.simplefilter("ignore", UserWarning)
        product = Int8DynamicLinear(ones)(torch.ones(64, 64))  # of the largest values, 255 and 127
    return torch.allclose(product, torch.full_like(product, 64.0))


# The attention of the encoders in bfloat16, for CPUs with instructions for it. Used with `int8-dynamic`.
BFLOAT16_ATTENTION = "sdpa_bfloat16"


def bfloat16_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Transformers' `sdpa`, computed in bfloat16; the result has the dtype of `query`."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.bfloat16()
    query_key_value = (states.bfloat16() for states in (query, key, value))
    attended, _ = sdpa_attention_forward(module, *query_key_value, attention_mask, **kwargs)
    return attended.to(query.dtype), None


AttentionInterface.register(BFLOAT16_ATTENTION, bfloat16_attention)
AttentionMaskInterface.register(BFLOAT16_ATTENTION, sdpa_mask)


def has_bfloat16_instructions() -> bool:
    """Whether the CPU multiplies matrices in bfloat16; `False` if PyTorch cannot tell (before 2.10)."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def int8_weight(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as int8 (out, in), and the scale of each output channel (out,) in float32."""
    weight = linear.weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def quantized_layers(model: MFuserForSemanticSegmentation) -> list[str]:
    """Names of the layers that [`quantize`] replaces; with TorchAoConfig, quantise these too."""
    return [
        f"mfuser.{name}"
        for name, module in model.mfuser.named_modules()
        if type(module) is nn.Linear and name.startswith(QUANTIZED) and not NOT_QUANTIZED & set(name.split("."))
    ]


@torch.no_grad()
def quantize(model: MFuserForSemanticSegmentation, kind: str | None) -> MFuserForSemanticSegmentation:
    """
    Quantises the linear layers of both vision encoders and of their fusion, in place, for inference.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model, on the device on which it runs.
        kind (`str`, *optional*):
            `"int8-weight-only"` stores weights in 8 bits, and computes in the dtype of the model. `"int8-dynamic"`
            also computes the matrix products in 8 bits, on a CPU, and the attention of the encoders in bfloat16 where
            the CPU has instructions for it. `None` leaves the model as it is.

    Returns:
        [`MFuserForSemanticSegmentation`]: `model`, in evaluation mode.

    Raises:
        ValueError: If there is no such kind, or the model is on a device or a CPU that it does not support.
    """
    if kind is None:
        return model
    if kind not in QUANTIZATIONS:
        raise ValueError(f"the quantisation is {kind!r}; it must be one of {', '.join(QUANTIZATIONS)}")
    if kind == "int8-dynamic":
        if model.device.type != "cpu":
            raise ValueError(f"int8-dynamic runs on a CPU and the model is on {model.device}; use int8-weight-only")
        if not int8_products_are_exact():
            raise ValueError(
                "int8-dynamic needs PyTorch with oneDNN and a CPU whose 8-bit products are exact (x86 with VNNI or "
                "AMX); use int8-weight-only"
            )
    layer = Int8WeightLinear if kind == "int8-weight-only" else Int8DynamicLinear
    for name in quantized_layers(model):
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, attribute, layer(getattr(owner, attribute)))
    if kind == "int8-dynamic" and has_bfloat16_instructions():
        encoders = {"vfm_config": model.config.vfm_config, "vlm_config": model.config.vlm_config}
        names = [name for name, config in encoders.items() if config._attn_implementation == "sdpa"]
        model.set_attn_implementation(dict.fromkeys(names, BFLOAT16_ATTENTION))
    model.save_pretrained = partial(refuse_to_save, kind)  # type: ignore[method-assign]
    return model.eval()


def refuse_to_save(kind: str, *args, **kwargs):
    """Replaces `save_pretrained`, whose files would be loaded as a model that is not quantised."""
    raise RuntimeError(f"a model quantised to {kind} cannot be saved; save the original and quantise it after loading")
