"""Int8 weights, and int8 matrix products on a CPU, for the linear layers of the encoders and of their fusion."""

import argparse
import warnings
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from mfuser.modeling_mfuser import MFuserForSemanticSegmentation

QUANTIZATIONS = ("int8-weight-only", "int8-dynamic")
# Not quantised: embeddings, of which the code reads the weights, as it does of SigLIP's pooling head; and the two
# small projections that give the scan its parameters.
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
    """A linear layer with int8 weights whose input is rounded to 8 bits for an integer product; on a CPU."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        _, scale = int8_weight(linear)
        with warnings.catch_warnings():
            # PyTorch deprecates these tensors. None of its other int8 kernels is as fast without a compiler.
            warnings.simplefilter("ignore", UserWarning)
            zero = torch.zeros(len(scale), dtype=torch.long)
            quantized = torch.quantize_per_channel(
                linear.weight.detach().float(), scale.double(), zero, 0, torch.qint8
            )
            bias = None if linear.bias is None else linear.bias.detach().float()
            self.packed = torch.ops.quantized.linear_prepack(quantized, bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # All 8 bits of the input are used; `True` would leave out one.
        return torch.ops.quantized.linear_dynamic(hidden_states.float(), self.packed, False).to(hidden_states.dtype)


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
            also computes the matrix products in 8 bits, on a CPU. `None` leaves the model as it is.

    Returns:
        [`MFuserForSemanticSegmentation`]: `model`, in evaluation mode.

    Raises:
        ValueError: If there is no such kind, or the model is on a device that it does not support.
    """
    if kind is None:
        return model
    if kind not in QUANTIZATIONS:
        raise ValueError(f"the quantisation is {kind!r}; it must be one of {', '.join(QUANTIZATIONS)}")
    if kind == "int8-dynamic" and model.device.type != "cpu":
        raise ValueError(f"int8-dynamic runs on a CPU and the model is on {model.device}; use int8-weight-only")
    layer = Int8WeightLinear if kind == "int8-weight-only" else Int8DynamicLinear
    for name in quantized_layers(model):
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, attribute, layer(getattr(owner, attribute)))
    model.save_pretrained = partial(refuse_to_save, kind)  # type: ignore[method-assign]
    return model.eval()


def refuse_to_save(kind: str, *args, **kwargs):
    """Takes the place of `save_pretrained`, whose files would be loaded as a model that is not quantised."""
    raise RuntimeError(f"a model quantised to {kind} cannot be saved; save it before, and quantise it after loading")


def add_quantize_argument(parser: argparse.ArgumentParser):
    """Adds the argument `--quantize` of the commands."""
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="quantise the encoders; int8-weight-only: a quarter of their memory, on any device; int8-dynamic: also "
        "faster, on a CPU (default: no quantisation)",
    )
