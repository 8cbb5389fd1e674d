"""Times of the scan, the model, its parts and the commands on this machine: `mfuser benchmark [PART ...]`."""

import argparse
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mfuser.errors import CommandError
from mfuser.scripts import cli
from mfuser.scripts.arguments import add_device_argument
from mfuser.scripts.benchmark_measuring import machine
from mfuser.scripts.results import check_result_file, write_result

DESCRIPTION = """Measures the variants that it compares in turns, in one run, on random models, and prints tables.
  scan           the selective scan, its reference formulation and, if it is installed, mamba_ssm
  forward        one crop of the full-size model, and its parts
  memory         memory of a process that segments one crop
  image          images of 1, 4 and 18 windows
  windows        an image of 18 windows, by the number of windows per forward pass
  train          one training step
  loading        reading and augmenting a sample, compared with a training step
  linear         quantised linear layers (CPU)
  quantized      one crop of the quantised full-size model (CPU)
  quantized-memory   memory of a process that segments that crop
  metric         mean IoU, compared with evaluate
  augmentation   training augmentation
  postprocessing scores of 1024 x 2048 to labels
  start          `mfuser segment` of one image, from a fresh process
  video          `mfuser segment` of images one by one, overlapped, and as a video
  evaluation     `mfuser evaluate` with the demonstration model: images per second, and the time of each step
  evaluation-full   the same with the full-size model"""


def run_part(module: str, function: str, options) -> list[dict]:
    """Runs the function that measures a part; its module and the packages that it needs are imported only here."""
    try:
        return getattr(importlib.import_module(f"mfuser.scripts.benchmark_{module}"), function)(options)
    except ModuleNotFoundError as error:
        if error.name not in cli.EXTRAS:
            raise
        install = f'pip install "mfuser[{cli.EXTRAS[error.name]}]"'
        raise CommandError(f"the benchmark needs the package {error.name}: {install}") from error


PARTS: dict[str, Callable[[Any], list[dict]]] = {
    "scan": partial(run_part, "scan", "benchmark_scan"),
    "forward": partial(run_part, "model", "benchmark_forward"),
    "memory": partial(run_part, "model", "benchmark_memory"),
    "image": partial(run_part, "model", "benchmark_image"),
    "windows": partial(run_part, "model", "benchmark_windows"),
    "train": partial(run_part, "model", "benchmark_train"),
    "loading": partial(run_part, "data", "benchmark_loading"),
    "linear": partial(run_part, "quantization", "benchmark_linear"),
    "quantized": partial(run_part, "quantization", "benchmark_quantized"),
    "quantized-memory": partial(run_part, "quantization", "benchmark_quantized_memory"),
    "metric": partial(run_part, "data", "benchmark_metric"),
    "augmentation": partial(run_part, "data", "benchmark_augmentation"),
    "postprocessing": partial(run_part, "data", "benchmark_postprocessing"),
    "start": partial(run_part, "commands", "benchmark_start"),
    "video": partial(run_part, "video", "benchmark_video"),
    "evaluation": partial(run_part, "commands", "benchmark_evaluation"),
    "evaluation-full": partial(run_part, "commands", "benchmark_evaluation_full"),
}


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [f"{row[c]:.3g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns] for row in rows
    ]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return value


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mfuser benchmark", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="see above; all of them by default")
    parser.add_argument(
        "--json", type=Path, help="also write the results to this file; until all are there, to NAME.partial.json"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="rounds to measure (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    add_device_argument(parser)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="compile the model in image, with torch.compile")
    parser.add_argument("--crop", type=positive, default=512, help="side of the crop in forward and memory")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"unknown part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    options.device = str(options.device)
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    return options


@cli.reports_errors("benchmark")
def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments or [])
    if options.threads:
        torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {
        "machine": machine(options.device),
        "command": ["mfuser", "benchmark", *(arguments or [])],
    }
    if options.json:  # before anything is measured
        check_result_file(options.json)
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    for part in options.parts or PARTS:
        figures[part] = PARTS[part](options)
        print(f"\n{part}\n\n{table(figures[part])}", flush=True)
        if options.json:
            write_result(options.json, figures, complete=False)
    if options.json:
        write_result(options.json, figures, complete=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
