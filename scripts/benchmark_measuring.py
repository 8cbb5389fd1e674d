"""Measurements that the benchmarks share: time in turns, memory in a separate process, floating-point operations."""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mfuser.errors import CommandError

GEMM_SIZE, COPY_BYTES = 4096, 2**28
Name = TypeVar("Name")


def machine(device: str) -> dict:
    """The machine and the library versions that the measurements are from."""
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
    """Median seconds of each candidate; each round runs all of them once. With `warm_up`, the first is not counted."""
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


def copy(device: str) -> tuple[Callable[[], object], int]:
    """A copy of a large tensor, and how many bytes it reads and writes."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * COPY_BYTES


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention; the scan's are left out."""
    # torch counts attention only on a GPU
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run()
    return counter.get_total_flops()


def attention_flops(query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def peak_gibibytes(device: str) -> float:
    """The peak since [`forget_peak`], or since the start: of the GPU's memory, or of this process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return status_kibibytes("VmHWM") / 2**20  # `ru_maxrss` would start from the memory of the parent process


def forget_peak(device: str):
    """Resets the peak: memory that was freed before does not count."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def status_kibibytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def in_own_process(function: Callable, *arguments, keep_freed: bool = True):
    """
    Result of a function of a module in a new process, in which nothing else has allocated memory.

    Without `keep_freed`, freed memory is returned to the system at once: peaks are then exact, but allocation is slow.
    Arguments and result are passed as JSON.
    """
    code = (
        f"import json, torch, {function.__module__} as module;"
        f"torch.set_num_threads({torch.get_num_threads()});"
        f"print(json.dumps(module.{function.__name__}(*json.loads({json.dumps(json.dumps(arguments))}))))"
    )
    environment = dict(os.environ)
    if not keep_freed:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CommandError(f"{function.__name__} failed in its process with exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])
