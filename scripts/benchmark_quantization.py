"""Quantised layers and a quantised full-size model compared with float32: time, memory and error of the scores."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mfuser.quantization import QUANTIZATIONS, Int8DynamicLinear, Int8WeightLinear, quantize
from mfuser.scripts.benchmark_measuring import (
    count_flops,
    forget_peak,
    gemm,
    in_own_process,
    in_turns,
    peak_gibibytes,
)
from mfuser.scripts.benchmark_model import inference_model

# Tokens, input and output channels: an MVFuser's projections and both layers of an encoder's MLP, at a crop of 512.
LINEAR_SHAPES = ((2050, 1024, 1024), (1025, 1024, 4096), (1025, 4096, 1024))
MODELS = ("float32", "bfloat16", *QUANTIZATIONS)


def bfloat16_linear(linear: nn.Linear, cast: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = linear.weight.bfloat16(), linear.bias.bfloat16()
    if not cast:  # between layers that are in bfloat16 too
        return lambda states: F.linear(states, weight, bias)
    return lambda states: F.linear(states.bfloat16(), weight, bias).float()


def float16_linear(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = linear.weight.half(), linear.bias.half()
    return lambda states: F.linear(states.half(), weight, bias).float()


def dynamic_linear(linear: nn.Linear, engine: str) -> nn.Module:
    """PyTorch's own dynamically quantised layer, which is deprecated."""
    torch.backends.quantized.engine = engine
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(linear)), {nn.Linear}, torch.qint8)


def torchao_linear(linear: nn.Linear, configuration: str) -> nn.Module:
    from torchao import quantization

    layer = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(layer, getattr(quantization, configuration)())
    return layer


LINEAR_LAYERS: dict[str, Callable[[nn.Linear], Callable[[torch.Tensor], torch.Tensor]]] = {
    "float32": lambda linear: linear,
    "bfloat16, input and output float32": partial(bfloat16_linear, cast=True),
    "bfloat16 throughout": partial(bfloat16_linear, cast=False),
    "float16, input and output float32": float16_linear,
    "torchao Int8WeightOnlyConfig": partial(torchao_linear, configuration="Int8WeightOnlyConfig"),
    "torchao Int8DynamicActivationInt8WeightConfig": partial(
        torchao_linear, configuration="Int8DynamicActivationInt8WeightConfig"
    ),
    "quantize_dynamic, engine fbgemm": partial(dynamic_linear, engine="fbgemm"),
    "quantize_dynamic, engine onednn": partial(dynamic_linear, engine="onednn"),
    "int8-weight-only": Int8WeightLinear,
    "int8-dynamic": Int8DynamicLinear,
}


@torch.inference_mode()
def benchmark_linear(options) -> list[dict]:
    """One linear layer on a CPU: time relative to float32, and the error of the output."""
    rows: dict[str, dict[str, Any]] = {name: {"linear layer": name} for name in LINEAR_LAYERS}
    engine = torch.backends.quantized.engine
    for tokens, size_in, size_out in LINEAR_SHAPES:
        torch.manual_seed(0)
        linear = nn.Linear(size_in, size_out).requires_grad_(False)
        states = torch.randn(tokens, size_in)
        expected = linear(states)
        layers = {}
        for name, build in LINEAR_LAYERS.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some candidates are deprecated
                try:
                    layer = build(linear)
                    given = states.bfloat16() if name == "bfloat16 throughout" else states
                    output = layer(given)
                except (ImportError, RuntimeError) as error:
                    rows[name]["relative error, %"] = f"{type(error).__name__}"
                    continue
            layers[name] = partial(layer, given)
            rows[name]["relative error, %"] = 100 * relative_error(output, expected)
        seconds = in_turns(layers, 2 * options.rounds, "cpu")
        for name, value in seconds.items():
            rows[name][f"{size_in} -> {size_out}, {tokens} tokens"] = value / seconds["float32"]
    torch.backends.quantized.engine = engine
    return list(rows.values())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def quantized(model: Any, kind: str) -> Any:
    """The float32 model, changed in place."""
    return quantize(model, kind) if kind in QUANTIZATIONS else model.to(getattr(torch, kind))


@torch.no_grad()  # FLOPs are not counted in inference mode
def benchmark_quantized(options) -> list[dict]:
    """One crop on a CPU by quantisation, compared with the float32 matrix products; the error of the scores."""
    model = inference_model("cpu", "float32", options.crop)
    models = {kind: quantized(copy.deepcopy(model), kind) for kind in MODELS if kind != "float32"}
    models = {"float32": model, **models}
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, options.crop, options.crop)
    scores = {kind: model(pixels.to(model.dtype)).logits.float() for kind, model in models.items()}
    flops = count_flops(partial(model, pixels))
    product, product_flops = gemm("cpu", torch.float32)
    candidates: dict[str, Callable[[], object]] = {
        kind: partial(model, pixels.to(model.dtype)) for kind, model in models.items()
    }
    seconds = in_turns(candidates | {"product": product}, options.rounds, "cpu", warm_up=False)
    floor = flops * seconds["product"] / product_flops
    labels = {kind: value.argmax(1) for kind, value in scores.items()}
    return [
        {
            "model": kind,
            "s": seconds[kind],
            "time / time of float32": seconds[kind] / seconds["float32"],
            "time / time of float32 matrix products": seconds[kind] / floor,
            "error of the scores, %": 100 * relative_error(scores[kind], scores["float32"]),
            "same labels, %": 100 * (labels[kind] == labels["float32"]).float().mean().item(),
        }
        for kind in MODELS
    ]


@torch.inference_mode()
def quantized_peak_gibibytes(kind: str, crop: int) -> float:
    """Memory of a process that holds a quantised full-size model and segments one crop; loading does not count."""
    model = quantized(inference_model("cpu", "float32", crop), kind)
    forget_peak("cpu")
    model(torch.randn(1, 3, crop, crop, dtype=model.dtype))
    return peak_gibibytes("cpu")


def benchmark_quantized_memory(options) -> list[dict]:
    return [
        {"model": kind, "peak GiB": in_own_process(quantized_peak_gibibytes, kind, options.crop, keep_freed=False)}
        for kind in MODELS
    ]
