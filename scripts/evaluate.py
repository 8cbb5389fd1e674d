"""`mfuser evaluate`: one run, any number of domains; scores, and everything they depend on, as a table and as JSON.

    mfuser evaluate --model MODEL --domains cityscapes=DIR bdd100k=DIR mapillary=DIR acdc=DIR
    mfuser evaluate --model MODEL --domains camvid=DIR camvid:dusk=DIR --flip --output camvid.json
    mfuser evaluate --model MODEL --domains cityscapes:test=DIR --save-predictions submission
    accelerate launch -m mfuser.scripts.evaluate --model MODEL --domains ...

docs/evaluation.md explains the protocols and the JSON.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
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
from mfuser.data.domains import DOMAINS, MAPILLARY
from mfuser.evaluation.scoring import PROTOCOLS, check_classes, evaluate_domain, open_domain, prediction_files
from mfuser.loading import load_for_inference

# What resizes an image to the protocol's size, as mmcv did it for the published numbers.
RESIZING = "bilinear, sampled as OpenCV does, without smoothing"
VERSIONED = ("torch", "transformers", "accelerate", "datasets", "numpy", "pillow")

DESCRIPTION = """Scores a model on any number of domains, image by image at the size that a published protocol has, and
writes the scores with all they depend on as JSON.

A domain is named as NAME=SOURCE or NAME:SPLIT=SOURCE. Without SPLIT it is the validation split, or the only one.
  NAME    {domains},
          or any other name for a dataset of your own
  SOURCE  a folder written by `mfuser prepare`, the official download (its labels are mapped on the fly), parquet
          files, or a dataset's Hub id
Exit code: 0 if every image was scored, 1 if one was skipped, 2 if the command could not run."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mfuser evaluate",
        description=DESCRIPTION.format(domains=", ".join(DOMAINS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of an MFuser model")
    parser.add_argument(
        "--domains", required=True, nargs="+", type=_domain, metavar="NAME[:SPLIT]=SOURCE", help="see above"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="P2",
        help="test sizes; P1: Rein and its successors, P2: tqdm, MFuser, SoMA (default: P2)",
    )
    parser.add_argument(
        "--mapillary-map",
        choices=tuple(MAPILLARY.label_maps),
        help="Mapillary's map of 66 classes to 19 (default: A, or that of the prepared folder)",
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
        "--output", type=Path, default=Path("evaluation.json"), help="JSON file to write (default: evaluation.json)"
    )
    parser.add_argument(
        "--save-predictions",
        type=Path,
        metavar="DIR",
        help="write a PNG an image: labelIds as the Cityscapes test server takes them, train ids for other domains",
    )
    parser.add_argument("--image-column", default="image", help="column of images, of parquet and Hub datasets")
    parser.add_argument("--label-column", default="label", help="column of label maps, of parquet and Hub datasets")
    parser.add_argument("--id2label", help="class names of datasets of your own: JSON file, or a domain's name")
    parser.add_argument(
        "--device", help="e.g. cpu, cuda:1 (default: what Accelerate chooses; leave it out in several processes)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision to compute in (default: that of the saved weights)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images that go together (default: 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images, per device (default: 2)")
    parsed = parser.parse_args(arguments)
    titles = [title for title, *_ in parsed.domains]
    for title in titles:
        if titles.count(title) > 1:
            parser.error(
                f"--domains names {title} more than once; tell splits apart as {title.split(':')[0]}:SPLIT=SOURCE"
            )
    if parsed.id2label and all(name in DOMAINS for _, name, *_ in parsed.domains):
        parser.error("--id2label is for datasets of your own; those of --domains have their own class names")
    if parsed.mapillary_map and "mapillary" not in (name for _, name, *_ in parsed.domains):
        parser.error("--mapillary-map is for mapillary, which is not among the --domains")
    return parsed


def _domain(text: str) -> tuple[str, str, str | None, str]:
    """(title, domain, split, source) of NAME[:SPLIT]=SOURCE."""
    title, equals, source = text.partition("=")
    name, colon, split = title.partition(":")
    if not (name and equals and source and (split or not colon)) or "/" in title:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=SOURCE or NAME:SPLIT=SOURCE")
    return title, name, split or None, source


def model_folder(name: str) -> tuple[Path, str | None]:
    """The folder that holds a model, and its revision if it comes from the Hub."""
    if Path(name).is_dir():
        return Path(name), None
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except HFValidationError:
        raise FileNotFoundError(f"there is no model {name}: neither a folder nor a Hub id") from None
    return folder, folder.name


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each safetensors file of a model, which tells for good what was scored."""
    hashes = {}
    for file in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        hashes[file.name] = digest.hexdigest()
    return hashes


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "mfuser": __version__}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def write_report(file: Path, report: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def score_table(domains: dict[str, dict[str, Any]]) -> str:
    """Classes down, domains (and their conditions) across, IoU in percent; a dash where a class does not count."""
    columns: dict[str, dict[str, Any]] = {}
    for title, result in domains.items():
        if result["pooled"] is None:
            continue
        columns |= {f"{title} {condition}": scores for condition, scores in result["conditions"].items()}
        columns[f"{title} pooled" if result["conditions"] else title] = result["pooled"]
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores["per_class_iou"]))
    rows = [["class", *columns]]
    for name in names:
        counted = [
            scores["per_class_iou"][name] if name in scores["classes_averaged"] else None
            for scores in columns.values()
        ]
        rows.append([name, *("-" if iou is None else f"{100 * iou:.2f}" for iou in counted)])
    rows.append(["mean IoU", *(f"{100 * scores['mean_iou']:.2f}" for scores in columns.values())])
    rows.append(["images", *(str(scores["images"]) for scores in columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def summary(report: dict[str, Any]) -> str:
    """The table, and one line a domain with what its score is of."""
    domains = report["domains"]
    lines = [score_table(domains), ""] if any(result["pooled"] for result in domains.values()) else []
    for title, result in domains.items():
        if result["mean_iou"] is None:
            lines.append(f"{title}: {result['unlabelled_images']} images without labels, predicted only")
        else:
            score = f"{100 * result['mean_iou']:.2f} % mean IoU"
            if result["mean_iou_over"] == "conditions":
                score += (
                    f" (mean over {', '.join(result['conditions'])}; "
                    f"all pixels pooled: {100 * result['pooled']['mean_iou']:.2f} %)"
                )
            lines.append(f"{title}: {score}{describe(report['protocol'], result)}")
    if report["mean_iou"] is not None and len(domains) > 1:
        lines.append(f"mean over domains: {100 * report['mean_iou']:.2f} %")
    return "\n".join(lines)


def describe(protocol: dict[str, Any], result: dict[str, Any]) -> str:
    """What a score is under, in words: ', P2, segmented at 1024x2048, ...'."""
    at = result["segmented_at"]
    size = "the images' size" if at["fit"] is None else "x".join(map(str, at["fit"]))
    words = [protocol["name"], f"segmented at {size}{', halved first' if at['halve_first'] else ''}"]
    if result["domain"] == MAPILLARY.title:
        words.append(f"label map {result['label_map'] or 'unknown'}")
    if protocol["flip"]:
        words.append("flip")
    if protocol["scales"] != [1.0]:
        words.append(f"scales {' '.join(f'{scale:g}' for scale in protocol['scales'])}")
    return f", {', '.join(words)}"


def shortfalls(title: str, result: dict[str, Any]) -> list[str]:
    """What keeps a score from being that of the whole official split."""
    lines = []
    if result["skipped"]:
        first = result["skipped"][0]
        lines.append(f"{title}: skipped {len(result['skipped'])}, the first: {first['name']}: {first['reason']}")
    images = result["images"] + result["unlabelled_images"]
    if result["expected_images"] not in (None, images):
        lines.append(f"{title}: {images} images; the official {result['split']} split has {result['expected_images']}")
    if result["images"] and result["unlabelled_images"]:
        lines.append(f"{title}: {result['unlabelled_images']} images have no label and were not scored")
    return lines


def evaluate(parsed: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Runs the whole evaluation and returns the report it has written."""
    leader = accelerator.is_main_process
    if accelerator.num_processes != (started := int(os.environ.get("WORLD_SIZE", 1))):
        raise RuntimeError(f"{started} processes were started but don't find each other; on the CPU, add --device cpu")
    if parsed.device is not None and accelerator.num_processes > 1 and parsed.device != "cpu":
        raise ValueError("in several processes each has a device of its own: leave out --device")
    device = accelerator.device if parsed.device is None else torch.device(parsed.device)
    folder, revision = model_folder(parsed.model)
    model, processor = load_for_inference(folder, device, parsed.dtype)
    domains = {
        title: open_domain(
            name,
            source,
            split,
            label_map=parsed.mapillary_map if name == "mapillary" else None,
            image_column=parsed.image_column,
            label_column=parsed.label_column,
            id2label=None if name in DOMAINS else parsed.id2label,
        )
        for title, name, split, source in parsed.domains
    }
    # What can be known to be wrong is said now, not after hours.
    for domain in domains.values():
        check_classes(model.config.id2label, domain)
        if parsed.save_predictions is not None:
            prediction_files(domain, parsed.save_predictions)
        elif not domain.labelled:
            raise ValueError(f"{domain.name}: its split {domain.split} has no labels; name --save-predictions DIR")
    accelerator.wait_for_everyone()

    report = {
        "mean_iou": None,
        "complete": False,
        "domains": {},
        "model": {"name": parsed.model, "revision": revision, "sha256": weight_hashes(folder) if leader else None},
        "protocol": {
            "name": parsed.protocol,
            "crop_size": model.config.crop_size,
            "crop_stride": model.config.crop_stride,
            "resizing": RESIZING,
            "flip": parsed.flip,
            "scales": parsed.scales,
        },
        "run": {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "processes": accelerator.num_processes,
            "batch_size": parsed.batch_size,
            "windows_per_batch": model.config.windows_per_batch,
        },
        "versions": versions(),
    }
    for title, domain in domains.items():
        began = time.monotonic()
        result = evaluate_domain(
            model,
            processor,
            domain,
            protocol=parsed.protocol,
            flip=parsed.flip,
            scales=parsed.scales,
            batch_size=parsed.batch_size,
            workers=parsed.workers,
            save_predictions=parsed.save_predictions,
            accelerator=accelerator,
        )
        report["domains"][title] = result | {"seconds": round(time.monotonic() - began, 1)}
        report["complete"] = len(report["domains"]) == len(domains)
        scores = [each["mean_iou"] for each in report["domains"].values() if each["mean_iou"] is not None]
        if report["complete"] and scores:
            report["mean_iou"] = sum(scores) / len(scores)
        if leader:
            for line in shortfalls(title, result):
                tqdm.write(line, file=sys.stderr)
            # After every domain, so that a run that breaks off leaves what it has found.
            write_report(parsed.output, report)
    return report


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    # Without being told "cpu", Accelerate takes the processes of a machine without accelerator for runs of their own.
    cpu = parsed.device == "cpu" or not torch.accelerator.is_available()
    # Precision is what --dtype says, not what an Accelerate configuration on this machine happens to.
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")
    try:
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        report = evaluate(parsed, accelerator)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"mfuser evaluate: {error}", file=sys.stderr)
        return 2
    if accelerator.is_main_process:
        print(summary(report))
        print(f"written to {parsed.output}")
    accelerator.end_training()
    return 1 if any(result["skipped"] for result in report["domains"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
