"""Time and memory of the full-size model with random weights: one crop and its parts, images, a training step."""

import statistics
import time
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from transformers.initialization import no_init_weights

from mfuser.configuration_mfuser import MFuserConfig
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.scripts.benchmark_measuring import (
    count_flops,
    forget_peak,
    gemm,
    in_own_process,
    in_turns,
    peak_gibibytes,
    synchronise,
)
from mfuser.windows_mfuser import sliding_windows, windows_per_batch


def random_model(device: str, dtype: str, crop: int = 512) -> MFuserForSemanticSegmentation:
    """The full-size CLIP variant with random weights, in eval mode; larger images than `crop` are cut into windows."""
    torch.manual_seed(0)
    with no_init_weights():
        config = MFuserConfig(crop_size=crop, crop_stride=crop * 2 // 3)
        model = MFuserForSemanticSegmentation(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02)
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "lambda1", "mvfuser.scale")):
                parameter.add_(1)  # so that the scores depend on all layers, as trained ones do
    return model.to(device).eval()


def inference_model(device: str, dtype: str, crop: int = 512) -> Any:
    """A full-size model in the memory format of `mfuser segment` and `mfuser evaluate`."""
    return random_model(device, dtype, crop).to(memory_format=torch.channels_last)


def part_modules(model: MFuserForSemanticSegmentation) -> dict[str, list[torch.nn.Module]]:
    base = model.mfuser
    return {
        "VFM": [base.vfm.vision.embeddings, *base.vfm.vision.encoder.layer],
        "VLM": [base.vlm.vision.embeddings, *base.vlm.vision.encoder.layers],
        "fusion": [part for layer in base.fusion_layers for part in layer.children()],
        "MTEnhancer": [base.enhancer],
        "pixel decoder": [model.pixel_decoder],
        "decoder": [model.decoder],
    }


class PartTimer:
    """Seconds in each part of a model, measured by hooks, which synchronise with a GPU."""

    def __init__(self, model, device: str):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        for part, modules in part_modules(model).items():
            for module in modules:
                module.register_forward_pre_hook(lambda *_, part=part: self.add(part, -1, device))
                module.register_forward_hook(lambda *_, part=part: self.add(part, 1, device))

    def add(self, part: str, sign: int, device: str):
        synchronise(device)
        self.seconds[part] += sign * time.perf_counter()


def benchmark_forward(options) -> list[dict]:
    """One crop, in total and by part, compared with its matrix products at the rate of a large matrix product."""
    dtype = getattr(torch, options.dtype)
    model = inference_model(options.device, options.dtype, options.crop)
    pixels = torch.randn(1, 3, options.crop, options.crop, device=options.device, dtype=dtype)
    product, product_flops = gemm(options.device, dtype)
    parts = defaultdict(list)
    with torch.no_grad():
        model(pixels)  # class embeddings are computed once and kept
        flops = count_flops(partial(model, pixels))
        timer = PartTimer(model, options.device)

        def forward():
            timer.seconds.clear()
            model(pixels)
            for part, seconds in timer.seconds.items():
                parts[part].append(seconds)

        seconds = in_turns({"whole": forward, "product": product}, options.rounds, options.device)
    rate = product_flops / seconds["product"]
    rows: list[dict[str, Any]] = [
        {"part": part, "ms": 1e3 * statistics.median(values[1:])} for part, values in parts.items()
    ]
    rest = 1e3 * seconds["whole"] - sum(row["ms"] for row in rows)
    rows.append({"part": "pyramid and the rest", "ms": rest})
    whole = {"part": "one crop", "ms": 1e3 * seconds["whole"], "TFLOP": flops / 1e12}
    whole["GEMM TFLOP/s"] = rate / 1e12
    whole["time / time of its matrix products"] = seconds["whole"] * rate / flops
    return [*rows, whole]


def forward_peak_gibibytes(crop: int, device: str, dtype: str) -> float:
    """Memory of a process that holds a full-size model and segments one crop."""
    model = inference_model(device, dtype, crop)
    with torch.no_grad():
        model(torch.randn(1, 3, crop, crop, device=device, dtype=getattr(torch, dtype)))
    return peak_gibibytes(device)


def benchmark_memory(options) -> list[dict]:
    peak = in_own_process(forward_peak_gibibytes, options.crop, options.device, options.dtype)
    return [{"memory": f"one crop of {options.crop}, {options.dtype}", "peak GiB": peak}]


@torch.no_grad()
def benchmark_image(options) -> list[dict]:
    """Images of 1, 4 and 18 windows: the time per window should not grow with their number."""
    dtype, device = getattr(torch, options.dtype), options.device
    model = inference_model(device, options.dtype)
    run = torch.compile(model) if options.compile else model
    images = {
        size: torch.randn(1, 3, *size, device=device, dtype=dtype) for size in ((512, 512), (853, 853), (1024, 2048))
    }
    run(images[512, 512])
    rows = []
    for size, pixels in images.items():
        windows = len(sliding_windows(*size, model.config.crop_size, model.config.crop_stride))
        forget_peak(device)
        seconds = in_turns({size: partial(run, pixels)}, options.rounds, device, warm_up=device.startswith("cuda"))
        row = {"image": "x".join(map(str, size)), "windows": windows, "compiled": str(options.compile)}
        row |= {"s": seconds[size], "s per window": seconds[size] / windows}
        rows.append(row | ({"peak GiB": peak_gibibytes(device)} if device.startswith("cuda") else {}))
    return rows


@torch.no_grad()
def benchmark_windows(options) -> list[dict]:
    """An image of 18 windows, by the number of windows per forward pass; marks the number chosen by free memory."""
    dtype, device = getattr(torch, options.dtype), options.device
    model = inference_model(device, options.dtype)
    pixels = torch.randn(1, 3, 1024, 2048, device=device, dtype=dtype)
    config = model.config
    chosen = windows_per_batch(pixels, config, dtype)
    rows = []
    for together in sorted({1, 2, 4, 9, 18, min(chosen, 18)}):
        config.windows_per_batch = together
        forget_peak(device)
        seconds = in_turns({together: partial(model, pixels)}, options.rounds, device, device.startswith("cuda"))
        row: dict[str, Any] = {"windows per forward": together, "s per window": seconds[together] / 18}
        row["chosen by free memory"] = "yes" if together == min(chosen, 18) else ""
        rows.append(row | ({"peak GiB": peak_gibibytes(device)} if device.startswith("cuda") else {}))
    return rows


def train_step(crop: int, batch: int, device: str, dtype: str, rounds: int) -> dict:
    """A training step of the full-size model with gradient checkpointing, its optimizer included."""
    model = random_model(device, "float32", crop)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # renamed
    enable({"use_reentrant": False})
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    pixels = torch.randn(batch, 3, crop, crop, device=device)
    labels = torch.randint(0, 19, (batch, crop, crop), device=device)

    def step():
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = in_turns({"step": step}, rounds, device)["step"]
    return {
        "training step": f"crop {crop}, batch {batch}, {dtype}, checkpointing",
        "s": seconds,
        "images/s": batch / seconds,
        "peak GiB": peak_gibibytes(device),
    }


def benchmark_train(options) -> list[dict]:
    on_gpu = options.device.startswith("cuda")
    crop, batch = (512, 2) if on_gpu else (256, 1)
    return [in_own_process(train_step, crop, batch, options.device, options.dtype, options.rounds)]
