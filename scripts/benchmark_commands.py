"""Time of whole commands: the start of `mfuser segment`, and the parts of `mfuser evaluate`."""

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from mfuser.errors import CommandError
from mfuser.evaluation.domains import open_domain
from mfuser.evaluation.protocols import EvaluationOptions, ProtocolSamples
from mfuser.evaluation.results import DomainMetric
from mfuser.evaluation.scoring import evaluate_domain
from mfuser.files import write_text
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.loading import load_for_inference
from mfuser.postprocessing_mfuser import label_map_of_scores
from mfuser.scripts.arguments import DEFAULT_MODEL
from mfuser.scripts.benchmark_measuring import in_turns, synchronise
from mfuser.scripts.benchmark_model import inference_model

IMAGE = Path(__file__).resolve().parent.parent / "examples" / "street.jpg"
COMMAND = "import sys; from mfuser.scripts.cli import main; sys.exit(main())"


def run_process(code: str, *arguments: str):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CommandError(f"{' '.join(arguments)} ended with exit code {done.returncode}: {done.stderr.strip()}")


def benchmark_start(options) -> list[dict]:
    """Fresh processes: what `mfuser segment` of one image imports, and the whole command."""
    for needed in (DEFAULT_MODEL, IMAGE):
        if not needed.exists():
            raise CommandError(f"the benchmark start needs {needed}, which is part of the repository")
    with tempfile.TemporaryDirectory() as folder:
        segment = ("segment", str(IMAGE), "--output", folder)
        processes = {
            "python": partial(run_process, ""),
            "import torch": partial(run_process, "import torch"),
            "import transformers.modeling_utils": partial(run_process, "import transformers.modeling_utils"),
            "mfuser --help": partial(run_process, COMMAND, "--help"),
            "mfuser segment --help": partial(run_process, COMMAND, "segment", "--help"),
            "import mfuser.scripts.segment": partial(run_process, "import mfuser.scripts.segment"),
            "mfuser segment, one image of 960 x 720": partial(run_process, COMMAND, *segment),
        }
        seconds = in_turns(processes, options.rounds, "cpu")
    return [{"process": name, "s": value} for name, value in seconds.items()]


def benchmark_evaluation(options) -> list[dict]:
    """`mfuser evaluate` of the demonstration model on 24 images of 480 x 360."""
    model, processor = load_for_inference(DEFAULT_MODEL, torch.device(options.device))
    return evaluation_rows(model, processor, images=24, size=(480, 360), options=options)


def benchmark_evaluation_full(options) -> list[dict]:
    """`mfuser evaluate` of a random full-size model on 2 images of 1024 x 512, of three windows each."""
    model = inference_model(options.device, options.dtype)
    return evaluation_rows(model, MFuserImageProcessor(), images=2, size=(1024, 512), options=options)


@torch.inference_mode()
def evaluation_rows(model, processor, images: int, size: tuple[int, int], options) -> list[dict]:
    """`mfuser evaluate` on `images` images of `size` (width, height), compared with sequential steps."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_domain(Path(folder), model.config.id2label, images, size)
        domain, evaluation = open_domain("street", file), EvaluationOptions()
        samples = ProtocolSamples(domain, processor, evaluation.evaluation_size(domain))
        seconds: defaultdict[str, float] = defaultdict(float)

        def one_after_the_other():
            metric = DomainMetric(domain, model.device)
            seconds.clear()
            for row in range(len(samples)):
                start = time.perf_counter()
                sample = samples[row]
                read = time.perf_counter()
                pixel_values = sample.pixel_values[None].to(model.device, model.dtype)
                scores = model(pixel_values=pixel_values).logits[0]
                synchronise(options.device)
                segmented = time.perf_counter()
                metric.update(sample, label_map_of_scores(scores, sample.size))
                seconds["read"] += read - start
                seconds["model"] += segmented - read
                seconds["label map and counting"] += time.perf_counter() - segmented

        overlapped = partial(evaluate_domain, model, processor, domain, evaluation, progress=False)
        times = in_turns({"one": one_after_the_other, "overlapped": overlapped}, options.rounds, options.device)
    whole = sum(seconds.values())
    parts = {f"{part}, %": 100 * value / whole for part, value in seconds.items()}
    return [
        {"evaluation": "one step after the other", "images/s": len(samples) / times["one"]} | parts,
        {
            "evaluation": "mfuser evaluate",
            "images/s": len(samples) / times["overlapped"],
            "speedup": times["one"] / times["overlapped"],
        },
    ]


def write_domain(folder: Path, names: dict[int, str], images: int, size: tuple[int, int]) -> Path:
    """A parquet file of images of a street with random labels, and the class names next to it."""
    image = Image.open(IMAGE).convert("RGB").resize(size)
    generator = np.random.default_rng(0)
    labels = [Image.fromarray(generator.integers(0, len(names), size[::-1], dtype=np.uint8)) for _ in range(images)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [image] * images, "label": labels}, features=features)
    rows.to_parquet(folder / "validation.parquet")
    write_text(folder / "id2label.json", json.dumps(names))
    return folder / "validation.parquet"
