"""
`mfuser evaluate`: scores a model on any number of domains, and writes the scores with all settings as JSON.

    mfuser evaluate --model MODEL --domains cityscapes=DIR bdd100k=DIR mapillary=DIR acdc=DIR
    mfuser evaluate --model MODEL --domains camvid=DIR camvid:dusk=DIR --flip --output camvid.json
    mfuser evaluate --model MODEL --domains cityscapes:test=DIR --save-predictions submission
    mfuser evaluate --model MODEL --domains cityscapes=DIR --corruptions weather jpeg_compression --examples 3
    accelerate launch -m mfuser.scripts.evaluate --model MODEL --domains ...

docs/evaluation.md describes the protocols and the JSON, docs/robustness.md the corruptions. `mfuser report` turns the
JSON into a page.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from tqdm import tqdm

from mfuser import __version__
from mfuser.data.rows import DownloadRows
from mfuser.data.tables import DOMAINS, MAPILLARY
from mfuser.evaluation.corruptions import (
    CORRUPTIONS,
    GROUPS,
    SEVERITIES,
    CorruptionProtocol,
    corrupted_domain,
    corrupted_result,
    corruption_names,
    corruption_summary,
)
from mfuser.evaluation.domains import EvaluationDomain, check_classes, open_domain
from mfuser.evaluation.predictions import prediction_files
from mfuser.evaluation.protocols import CLASSES, LABEL_SIZES, PROTOCOLS, EvaluationOptions
from mfuser.evaluation.reliability_diagram import require_matplotlib, write_reliability_diagram
from mfuser.evaluation.report import shortfalls, skipped_when_corrupted, summary
from mfuser.evaluation.scoring import check_scores_are_those_of_the_model, evaluate_domain
from mfuser.files import sha256
from mfuser.loading import load_for_inference
from mfuser.quantization import quantize
from mfuser.scripts import cli
from mfuser.scripts.arguments import add_quantize_argument, available_device
from mfuser.scripts.example_panels import examples_folder, remove_replaced_examples, write_examples
from mfuser.scripts.results import check_result_file, check_writable, write_result

# How images are resized to the protocol's size, recorded in the report. mmcv does this for the published numbers.
RESIZING = "bilinear, sampled as OpenCV does, without smoothing"
VERSIONED = ("torch", "transformers", "accelerate", "datasets", "numpy", "pillow")

DESCRIPTION = """Scores a model on any number of domains, at the image sizes of a published protocol, and writes the
scores with all settings that influence them as JSON.

A domain is given as NAME=SOURCE or NAME:SPLIT=SOURCE. Without SPLIT, the validation split or the only split is used.
  NAME    {domains},
          or any other name for your own dataset
  SOURCE  a folder written by `mfuser prepare`, the official download (its labels are mapped on the fly), parquet
          files, or the Hub id of a dataset
An image that cannot be read, segmented or written is named, counted and left out of the score.
Exit code: 0 if every image was scored, 1 if one was skipped, 2 if the command could not run."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mfuser evaluate",
        description=DESCRIPTION.format(domains=", ".join(DOMAINS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of an MFuser model")
    parser.add_argument(
        "--domains", required=True, nargs="+", type=domain_argument, metavar="NAME[:SPLIT]=SOURCE", help="see above"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="P2",
        help="image sizes; P1: Rein and its successors, P2: tqdm, MFuser, SoMA (default: P2)",
    )
    parser.add_argument(
        "--mapillary-map",
        choices=tuple(MAPILLARY.label_maps),
        help="map of Mapillary's 66 classes to 19 (default: A, or that of the prepared folder)",
    )
    parser.add_argument(
        "--mapillary-labels",
        choices=LABEL_SIZES,
        help="size at which Mapillary is scored; half: images and labels are halved first (default: half in P1, full "
        "in P2)",
    )
    parser.add_argument(
        "--classes",
        choices=CLASSES,
        default="domain",
        help="classes that count in the mean IoU; domain: those that occur in each domain, synthia16 and synthia13: "
        "those of SYNTHIA on every domain (default: domain)",
    )
    parser.add_argument("--flip", action="store_true", help="test-time augmentation: add the mirrored image")
    parser.add_argument(
        "--scales",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="FACTOR",
        help="test-time augmentation: several scales; the paper's are 0.5 0.75 1 1.25 1.5 1.75 (default: 1)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("evaluation.json"),
        help="JSON file to write (default: evaluation.json); until it is complete, NAME.partial.json",
    )
    parser.add_argument(
        "--save-predictions",
        type=Path,
        metavar="DIR",
        help="write one PNG per image: labelIds for Cityscapes (as its test server expects), train ids for others",
    )
    parser.add_argument(
        "--confidence",
        action="store_true",
        help="add calibration error, detection of wrong pixels, and mean IoU of the most confident pixels",
    )
    parser.add_argument(
        "--reliability-diagrams",
        type=Path,
        metavar="DIR",
        help="write one reliability diagram per domain as PNG; implies --confidence, needs matplotlib",
    )
    parser.add_argument(
        "--corruptions",
        nargs="*",
        metavar="NAME",
        help="also score corrupted images: all 15 common corruptions, or those named, by name or group "
        f"({', '.join(GROUPS)}); needs mfuser[robustness]. Names: {', '.join(CORRUPTIONS)}",
    )
    parser.add_argument(
        "--severities",
        nargs="+",
        type=int,
        metavar="N",
        help=f"severities of the corruptions, from {SEVERITIES[0]} to {SEVERITIES[-1]} (default: all)",
    )
    parser.add_argument("--corruption-seed", type=int, metavar="N", help="seed of the corruptions (default: 0)")
    parser.add_argument(
        "--examples",
        type=int,
        default=0,
        metavar="N",
        help="write the images with the N worst, median and best scores of each domain as PNG, with prediction, label "
        "and errors, into a folder next to --output (default: 0)",
    )
    parser.add_argument("--image-column", help="image column of parquet and Hub datasets (default: image)")
    parser.add_argument("--label-column", help="label column of parquet and Hub datasets (default: label)")
    parser.add_argument("--id2label", help="class names of your own datasets: a JSON file, or the name of a domain")
    parser.add_argument(
        "--device",
        type=available_device,
        help="e.g. cpu, cuda:1 (default: chosen by Accelerate; in several processes only cpu is accepted)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the computation (default: that of the saved weights)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images per batch (default: 1)")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that read images, for each device (default: 2)"
    )
    add_quantize_argument(parser)
    parsed = parser.parse_args(arguments)
    titles = [title for title, *_ in parsed.domains]
    for title in titles:
        if titles.count(title) > 1:
            parser.error(
                f"--domains names {title} more than once; name the split, as in {title.split(':')[0]}:SPLIT=SOURCE"
            )
    folders = [title.replace(":", "-") for title in titles]
    if len(set(folders)) < len(folders):
        parser.error(f"--domains {', '.join(titles)}: files of two domains would have the same names")
    if parsed.id2label and all(name in DOMAINS for _, name, *_ in parsed.domains):
        parser.error("--id2label is for your own datasets; those of --domains have their own class names")
    for option, value in (("map", parsed.mapillary_map), ("labels", parsed.mapillary_labels)):
        if value and "mapillary" not in (name for _, name, *_ in parsed.domains):
            parser.error(f"--mapillary-{option} applies to mapillary, which is not among the --domains")
    for option, value in (("severities", parsed.severities), ("corruption-seed", parsed.corruption_seed)):
        if value is not None and parsed.corruptions is None:
            parser.error(f"--{option} requires --corruptions")
    if parsed.examples < 0:
        parser.error(f"--examples is {parsed.examples}; it must be at least 0")
    return parsed


def domain_argument(text: str) -> tuple[str, str, str | None, str]:
    """(title, domain, split, source) of NAME[:SPLIT]=SOURCE."""
    title, equals, source = text.partition("=")
    name, colon, split = title.partition(":")
    if not (name and equals and source and (split or not colon)) or "/" in title or not title.strip("."):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=SOURCE or NAME:SPLIT=SOURCE")
    return title, name, split or None, source


def model_folder(name: str, patterns: Sequence[str] | None = ("*.json", "*.safetensors")) -> tuple[Path, str | None]:
    """The folder of a model, and its revision if it comes from the Hub; files of `patterns` are downloaded."""
    if Path(name).is_dir():
        return Path(name), None
    try:
        folder = Path(snapshot_download(name, allow_patterns=None if patterns is None else list(patterns)))
    except HFValidationError:
        raise FileNotFoundError(f"there is no model {name}: it is neither a folder nor a Hub id") from None
    return folder, folder.name


def weight_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each safetensors file of a model, which identifies what was scored."""
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of the libraries that influence a score."""
    found = {"python": platform.python_version(), "mfuser": __version__}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def check_processes(parsed: argparse.Namespace, accelerator: Accelerator) -> None:
    """Raises an error if the processes were started separately, or would share one device."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise cli.CommandError(
            f"{started} processes were started, but {accelerator.num_processes} are connected; on CPUs, add "
            "--device cpu"
        )
    if parsed.device is not None and accelerator.num_processes > 1 and parsed.device.type != "cpu":
        raise ValueError(f"--device is {parsed.device}; in several processes it can only be cpu, or be left out")


def open_domains(parsed: argparse.Namespace, model, options: EvaluationOptions) -> dict[str, EvaluationDomain]:
    """Opens all domains by title, and checks everything that can be checked before the first image is segmented."""
    domains = {
        title: open_domain(
            name,
            source,
            split,
            label_map=parsed.mapillary_map if name == "mapillary" else None,
            image_column=parsed.image_column or "image",
            label_column=parsed.label_column or "label",
            id2label=None if name in DOMAINS else parsed.id2label,
            skip_unreadable=True,  # skipped and counted when it is read
        )
        for title, name, split, source in parsed.domains
    }
    for option, column in (("image", parsed.image_column), ("label", parsed.label_column)):
        if column and all(isinstance(domain.rows, DownloadRows) for domain in domains.values()):
            raise ValueError(f"--{option}-column is {column}; official downloads, as all of --domains are, have files")
    for domain in domains.values():
        check_classes(model.config.id2label, domain)
        domain.scored_classes(options.classes)  # raises ValueError if the domain lacks one
        options.evaluation_size(domain)  # raises ValueError if the options do not fit the split
        if parsed.save_predictions is not None:
            prediction_files(domain, parsed.save_predictions)
        elif not domain.rows.labelled:
            raise ValueError(f"{domain.name}: its split {domain.split} has no labels; give --save-predictions DIR")
        for option in ("corruptions", "examples"):
            if getattr(parsed, option) not in (None, 0) and not domain.rows.labelled:
                raise ValueError(f"{domain.name}: its split {domain.split} has no labels, which --{option} needs")
    return domains


def new_report(model, origin: dict[str, Any], options: EvaluationOptions, accelerator: Accelerator) -> dict[str, Any]:
    """A report without scores: the origin of the model, the protocol, the run and the versions of the libraries."""
    device = model.device
    return {
        "mean_iou": None,
        "complete": False,
        "domains": {},
        "model": origin,
        "protocol": {
            "name": options.protocol,
            "crop_size": model.config.crop_size,
            "crop_stride": model.config.crop_stride,
            "resizing": RESIZING,
            "flip": options.flip,
            "scales": list(options.scales),
            "classes": options.classes,
        },
        "run": {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "processes": accelerator.num_processes,
            "batch_size": options.batch_size,
            "windows_per_batch": model.config.windows_per_batch,
        },
        "versions": versions(),
    }


def finish(report: dict[str, Any]) -> None:
    """Adds the means over domains to a report that has the results of all domains."""
    report["complete"] = True
    results = report["domains"].values()
    scores = [result["mean_iou"] for result in results if result["mean_iou"] is not None]
    if scores:
        report["mean_iou"] = sum(scores) / len(scores)
    if "corruptions" in report["protocol"]:
        corrupted = [result["corruptions"]["mean_iou"] for result in results]
        report["mean_corrupted_iou"] = sum(corrupted) / len(corrupted)


def corruption_protocol(parsed: argparse.Namespace) -> CorruptionProtocol | None:
    """The requested corruptions, if there are any."""
    if parsed.corruptions is None:
        return None
    return CorruptionProtocol(
        corruption_names(parsed.corruptions),
        SEVERITIES if parsed.severities is None else tuple(parsed.severities),
        parsed.corruption_seed or 0,
    )


def evaluate(parsed: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Runs the whole evaluation, writes the report after every domain, and returns it."""
    leader = accelerator.is_main_process
    options = EvaluationOptions(
        protocol=parsed.protocol,
        flip=parsed.flip,
        scales=tuple(parsed.scales),
        batch_size=parsed.batch_size,
        workers=parsed.workers,
        classes=parsed.classes,
        mapillary_labels=parsed.mapillary_labels,
    )
    with_confidence = parsed.confidence or parsed.reliability_diagrams is not None
    if with_confidence:
        check_scores_are_those_of_the_model(options)
    if parsed.reliability_diagrams is not None:
        require_matplotlib()
    corruptions = corruption_protocol(parsed)
    check_processes(parsed, accelerator)
    device = accelerator.device if parsed.device is None else parsed.device
    folder, revision = model_folder(parsed.model)
    model, processor = load_for_inference(folder, device, parsed.dtype)
    quantize(model, parsed.quantize)
    domains = open_domains(parsed, model, options)
    accelerator.wait_for_everyone()

    hashes = weight_hashes(folder) if leader else None
    origin = {"name": parsed.model, "revision": revision, "sha256": hashes}
    if with_confidence:
        origin["confidence_temperature"] = model.config.confidence_temperature
    report = new_report(model, origin, options, accelerator)
    report["run"]["quantization"] = parsed.quantize
    if corruptions is not None:
        report["protocol"]["corruptions"] = corruptions.record()

    def scored(domain: EvaluationDomain, save_predictions: Path | None = None, examples: int = 0) -> dict[str, Any]:
        return evaluate_domain(
            model,
            processor,
            domain,
            options,
            save_predictions,
            accelerator,
            confidence=with_confidence,
            examples=examples,
        )

    def write_report() -> None:
        if leader:
            write_result(parsed.output, report, report["complete"])

    for title, domain in domains.items():
        began = time.monotonic()
        result = scored(domain, parsed.save_predictions, parsed.examples)
        report["domains"][title] = result
        examples = result.pop("examples", [])  # added when they are drawn
        # Written after every domain and every corruption, so that an interrupted run keeps the results it has.
        write_report()
        if leader:
            for line in shortfalls(title, result):
                tqdm.write(line, file=sys.stderr)
            if parsed.examples:
                result["examples"] = write_examples(parsed.output, title, model, processor, domain, options, examples)
                write_report()
        under_corruption: dict[str, dict[str, Any]] = {}
        for corruption in corruptions.all() if corruptions else ():
            each = corrupted_result(scored(corrupted_domain(domain, corruption)), result)
            under_corruption.setdefault(corruption.name, {})[str(corruption.severity)] = each
            result["corruptions"] = corruption_summary(under_corruption, result["mean_iou"])
            write_report()
        result["seconds"] = round(time.monotonic() - began, 1)
    if leader and parsed.reliability_diagrams is not None:
        for title, result in report["domains"].items():
            if "confidence" in result:
                write_reliability_diagram(parsed.reliability_diagrams, title, result["confidence"])
    finish(report)
    write_report()
    if leader:
        remove_replaced_examples(parsed.output, report)
    return report


@cli.reports_errors("evaluate")
def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    # Unless cpu=True is passed, Accelerate does not connect the processes on a machine without an accelerator.
    cpu = (parsed.device is not None and parsed.device.type == "cpu") or not torch.accelerator.is_available()
    # The precision is that of --dtype, not that of an Accelerate configuration on this machine.
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")
    check_result_file(parsed.output)
    for folder in (
        parsed.reliability_diagrams,
        parsed.save_predictions,
        examples_folder(parsed.output) if parsed.examples else None,
    ):
        if folder is not None:
            check_writable(folder)
    report = evaluate(parsed, accelerator)
    if accelerator.is_main_process:
        print(summary(report))
        print(f"written to {parsed.output}")
    accelerator.end_training()
    return (
        1 if any(result["skipped"] or skipped_when_corrupted(result) for result in report["domains"].values()) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
