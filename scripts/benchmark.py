"""Times of the scan, the model and its parts on this machine, measured in turns: `mfuser benchmark [PART ...]`."""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import evaluate
import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.initialization import no_init_weights

from mfuser.configuration_mfuser import MFuserConfig
from mfuser.data.augmentation import TrainingAugmentation
from mfuser.evaluation.metrics import MeanIoU
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.scripts.benchmark_video import benchmark_video
from mfuser.selective_scan import mamba_ssm_scan, selective_scan
from mfuser.windows_mfuser import window_starts

GEMM_SIZE = 4096
Name = TypeVar("Name")

SCAN_SHAPE = {"batch": 1, "dim": 512, "length": 2050, "state": 16}  # an MVFuser of the full-size CLIP variant


def machine(device: str) -> dict:
    """What the figures were measured on."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    found = {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def synchronise(device: str):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def in_turns(
    candidates: Mapping[Name, Callable[[], object]], rounds: int, device: str, warm_up: bool = True
) -> dict[Name, float]:
    """Median seconds of each candidate, all run once in every round; with `warm_up` the first doesn't count."""
    seconds = defaultdict(list)
    for counted in [False] * warm_up + [True] * rounds:
        for name, run in candidates.items():
            gc.collect()
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def gemm(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A large matrix product, and how many floating-point operations it is."""
    a = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device, dtype=dtype)
    return lambda: a @ a, 2.0 * GEMM_SIZE**3


# --- the scan --------------------------------------------------------------------------------------------------------


def step_loop(u, delta, A, B, C, D, delta_bias):
    """mamba_ssm's reference formulation: all coefficients first, then one small step a token."""
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state, outputs = torch.zeros_like(decay[:, :, 0]), []
    # taken apart by unbind: indexing [:, :, t], as the original does, makes backward quadratic in the length
    for factor, step, row in zip(decay.unbind(2), drive.unbind(2), C.unbind(2), strict=True):
        state = factor * state + step
        outputs.append(torch.einsum("bdn,bn->bd", state, row))
    return torch.stack(outputs, dim=-1) + u * D[:, None]


def ours(u, delta, A, B, C, D, delta_bias):
    return selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)


def mamba_ssm(u, delta, A, B, C, D, delta_bias):
    return mamba_ssm_scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)


SCANS = {"step loop": step_loop, "ours": ours}
if mamba_ssm_scan is not None:
    SCANS["mamba_ssm"] = mamba_ssm


def scan_inputs(device: str, batch: int, dim: int, length: int, state: int) -> list[torch.Tensor]:
    """u, delta, A, B, C, D and delta_bias as a trained block has them."""
    torch.manual_seed(0)
    bias = torch.exp(torch.rand(dim) * 4.6 - 6.9)
    tensors = [
        F.silu(torch.randn(batch, dim, length)),
        0.7 * torch.randn(batch, dim, length),
        -torch.arange(1.0, state + 1).repeat(dim, 1),
        torch.randn(batch, state, length),
        torch.randn(batch, state, length),
        torch.ones(dim),
        bias + torch.log(-torch.expm1(-bias)),
    ]
    return [tensor.to(device) for tensor in tensors]


def run_scan(name: str, inputs: list[torch.Tensor], backward: bool):
    with torch.set_grad_enabled(backward):
        y = SCANS[name](*(tensor.detach().requires_grad_(backward) for tensor in inputs))
        if backward:
            y.sum().backward()


def scan_peak_mebibytes(name: str, backward: bool, device: str) -> float:
    """Memory that one call takes beyond its inputs, measured in a process of its own."""
    inputs = scan_inputs(device, **SCAN_SHAPE)
    run_scan(name, scan_inputs(device, **(SCAN_SHAPE | {"length": 40})), backward)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_scan(name, inputs, backward)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_kibibytes("VmRSS")
    run_scan(name, inputs, backward)
    return (status_kibibytes("VmHWM") - before) / 1024


def status_kibibytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def benchmark_scan(options) -> list[dict]:
    rows: list[dict[str, Any]] = []
    for length in (514, SCAN_SHAPE["length"], 8194):  # the tokens of crops of 256, 512 and 1024
        inputs = scan_inputs(options.device, **(SCAN_SHAPE | {"length": length}))
        names = list(SCANS) if length == SCAN_SHAPE["length"] else [name for name in SCANS if name != "step loop"]
        for backward in (False, True):
            candidates = {name: partial(run_scan, name, inputs, backward) for name in names}
            for name, seconds in in_turns(candidates, options.rounds, options.device).items():
                row = {"scan": name, "tokens": length, "pass": "forward + backward" if backward else "forward"}
                row["ms"] = seconds * 1e3
                if length == SCAN_SHAPE["length"]:
                    arguments = (name, backward, options.device)
                    row["peak MiB"] = in_own_process("scan_peak_mebibytes", *arguments, keep_freed=False)
                rows.append(row)
    loops = {row["pass"]: row["ms"] for row in rows if row["scan"] == "step loop"}
    for row in rows:
        if row["tokens"] == SCAN_SHAPE["length"]:
            row["times the step loop's speed"] = loops[row["pass"]] / row["ms"]
    return rows


def in_own_process(function: str, *arguments, keep_freed: bool = True):
    """
    Result of a function of this module in a fresh process, where nothing else has touched memory.

    Without `keep_freed` memory goes back to the system at once: peaks are exact then, but allocation is slow.
    """
    code = (
        "import json, torch, mfuser.scripts.benchmark as b;"
        f"torch.set_num_threads({torch.get_num_threads()});"
        f"print(json.dumps(b.{function}(*json.loads({json.dumps(json.dumps(arguments))}))))"
    )
    environment = dict(os.environ)
    if not keep_freed:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- the model -------------------------------------------------------------------------------------------------------


def random_model(device: str, dtype: str, crop: int = 512) -> MFuserForSemanticSegmentation:
    """The full-size CLIP variant with random weights, in eval mode; larger images than `crop` are cut into windows."""
    torch.manual_seed(0)
    with no_init_weights():
        config = MFuserConfig(crop_size=crop, crop_stride=crop * 2 // 3)
        model = MFuserForSemanticSegmentation(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.to(device).eval()


def inference_model(device: str, dtype: str, crop: int = 512) -> Any:
    """As `mfuser segment` and `mfuser evaluate` lay it out in memory."""
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


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention; the scan's are left out."""
    # torch counts attention on a GPU alone
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run()
    return counter.get_total_flops()


def attention_flops(query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


class PartTimer:
    """Seconds inside each part of a model, by hooks; on a GPU every part waits for the one before."""

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
    """One crop, whole and by part, beside the time that its matrix products would take at the rate of a large one."""
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
    whole["times its matrix products"] = seconds["whole"] * rate / flops
    return [*rows, whole]


def forward_peak_gibibytes(crop: int, device: str, dtype: str) -> float:
    """Memory of a process that holds a full-size model and segments one crop."""
    model = inference_model(device, dtype, crop)
    with torch.no_grad():
        model(torch.randn(1, 3, crop, crop, device=device, dtype=getattr(torch, dtype)))
    return peak_gibibytes(device)


def peak_gibibytes(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def benchmark_memory(options) -> list[dict]:
    peak = in_own_process("forward_peak_gibibytes", options.crop, options.device, options.dtype)
    return [{"memory": f"one crop of {options.crop}, {options.dtype}", "peak GiB": peak}]


def benchmark_image(options) -> list[dict]:
    """Images of 1, 4 and 18 windows: the time a window should not grow with their number."""
    dtype = getattr(torch, options.dtype)
    model = inference_model(options.device, options.dtype)
    images = {
        size: torch.randn(1, 3, *size, device=options.device, dtype=dtype)
        for size in ((512, 512), (853, 853), (1024, 2048))
    }
    with torch.no_grad():
        model(images[512, 512])
        candidates = {size: partial(model, pixels) for size, pixels in images.items()}
        seconds = in_turns(candidates, options.rounds, options.device, warm_up=options.device.startswith("cuda"))
    return [
        {
            "image": "x".join(map(str, size)),
            "windows": count_windows(size, model.config),
            "s": value,
            "s a window": value / count_windows(size, model.config),
        }
        for size, value in seconds.items()
    ]


def count_windows(size: tuple[int, int], config: MFuserConfig) -> int:
    rows, columns = (len(window_starts(side, config.crop_size, config.crop_stride)) for side in size)
    return rows * columns


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
    return [in_own_process("train_step", crop, batch, options.device, options.dtype, options.rounds)]


# --- data ------------------------------------------------------------------------------------------------------------


class HistogramMeanIou(evaluate.Metric):
    """evaluate's mean_iou by its published definition (the script is on the Hub): three histograms a map."""

    def _info(self):
        image = datasets.Image()
        features = datasets.Features({"predictions": image, "references": image})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        areas = np.zeros((3, 19))
        for prediction, label in zip(map(np.array, predictions), map(np.array, references), strict=True):
            known = label != 255
            prediction, label = prediction[known], label[known]
            for row, values in enumerate((prediction[prediction == label], prediction, label)):
                areas[row] += np.histogram(values, bins=19, range=(0, 18))[0]
        intersection, predicted, labelled = areas
        return {"mean_iou": np.nanmean(intersection / (predicted + labelled - intersection))}


def benchmark_metric(options) -> list[dict]:
    """Mean IoU of 100 maps of 1024 x 2048, ours beside evaluate's mean_iou."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 19, (100, 32, 64), dtype=np.uint8)
    labels = np.kron(coarse, np.ones((32, 32), np.uint8))
    predictions = np.where(generator.random(labels.shape[1:]) < 0.8, labels, 3).astype(np.uint8)
    labels[:, :50] = 255
    scores = {}

    def run_ours():
        metric = MeanIoU(19)
        for prediction, label in zip(predictions, labels, strict=True):
            metric.update(torch.from_numpy(prediction), torch.from_numpy(label))
        scores["ours"] = metric.compute()["mean_iou"]

    def run_evaluate():
        metric = HistogramMeanIou()
        for prediction, label in zip(predictions, labels, strict=True):
            metric.add(predictions=prediction, references=label)
        scores["evaluate"] = metric.compute()["mean_iou"]

    seconds = in_turns({"ours": run_ours, "evaluate": run_evaluate}, 1, "cpu")
    return [
        {
            "metric": name,
            "ms a map": 1e3 * value / len(labels),
            "mIoU": float(scores[name]),
            "times evaluate's speed": seconds["evaluate"] / value,
        }
        for name, value in seconds.items()
    ]


def benchmark_augmentation(options) -> list[dict]:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (1052, 1914, 3), dtype=np.uint8))
    label = Image.fromarray(generator.integers(0, 19, (1052, 1914), dtype=np.uint8))
    augmentation = TrainingAugmentation(crop_size=512)
    seconds = in_turns({"augmentation": lambda: augmentation(image, label, generator)}, 5 * options.rounds, "cpu")
    return [{"augmentation": "1914 x 1052 to 512", "images/s": 1 / seconds["augmentation"]}]


PARTS: dict[str, Callable[[Any], list[dict]]] = {
    "scan": benchmark_scan,
    "forward": benchmark_forward,
    "memory": benchmark_memory,
    "image": benchmark_image,
    "train": benchmark_train,
    "metric": benchmark_metric,
    "augmentation": benchmark_augmentation,
    "video": partial(benchmark_video, in_turns),
}


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [f"{row[c]:.3g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns] for row in rows
    ]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mfuser benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--crop", type=int, default=512, help="side of the crop in forward and memory")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    if options.threads:
        torch.set_num_threads(options.threads)

    figures: dict[str, Any] = {
        "machine": machine(options.device),
        "command": ["mfuser", "benchmark", *(arguments or sys.argv[1:])],
    }
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    for part in options.parts or PARTS:
        figures[part] = PARTS[part](options)
        print(f"\n{part}\n\n{table(figures[part])}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
