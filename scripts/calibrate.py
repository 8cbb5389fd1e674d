"""
`mfuser calibrate`: fits the confidences of a model on the validation split of its source.

    mfuser calibrate --model MODEL --domain cityscapes:validation=DIR
    mfuser calibrate --model MODEL --domain camvid:validation=DIR --output CALIBRATED_MODEL

docs/confidence.md describes the method.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mfuser.confidence_mfuser import confidence_map
from mfuser.evaluation.calibration import PixelSample, confidence_metrics, fit_temperature, halves, sample_pixels
from mfuser.evaluation.domains import check_classes, open_domain
from mfuser.evaluation.protocols import PROTOCOLS, EvaluationOptions
from mfuser.files import atomic_folder, check_new_folder, read_json, write_text
from mfuser.loading import load_for_inference
from mfuser.scripts import cli
from mfuser.scripts.arguments import add_device_argument
from mfuser.scripts.evaluate import domain_argument, model_folder
from mfuser.scripts.results import check_writable

CONFIG = "config.json"

DESCRIPTION = """Fits the confidences of a model, and stores the result in its config.json as confidence_temperature.

Give the validation split of the source, the domain that the model was trained on. Its images are segmented as they
are and distorted, so that confidences remain valid under other conditions. Never give a domain on which confidences
are to be measured: a fit to a target domain says nothing about other targets.
An image that cannot be read or segmented is named, counted and left out.
Exit code: 0 if the model was calibrated on every image, 1 if one was skipped, 2 if the command could not run."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mfuser calibrate", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of an MFuser model")
    parser.add_argument(
        "--domain",
        required=True,
        type=domain_argument,
        metavar="NAME[:SPLIT]=SOURCE",
        help="the validation split of the source, as in mfuser evaluate",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="a new folder for a calibrated copy of the model (default: the config.json of --model is changed)",
    )
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default="P2", help="image sizes, as in mfuser evaluate (default: P2)"
    )
    parser.add_argument("--id2label", help="class names of your own dataset: a JSON file, or the name of a domain")
    parser.add_argument(
        "--pixels", type=int, default=1000, help="most pixels drawn from each view of an image (default: 1000)"
    )
    parser.add_argument("--distortions", type=int, default=2, help="distorted copies of each image (default: 2)")
    add_device_argument(parser)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (default: 2)")
    parsed = parser.parse_args(arguments)
    for name, minimum in (("pixels", 1), ("distortions", 0), ("workers", 0)):
        if getattr(parsed, name) < minimum:
            parser.error(f"--{name} is {getattr(parsed, name)}; it must be at least {minimum}")
    return parsed


def figures(metrics: dict[str, Any]) -> str:
    """Calibration error and detection of wrong pixels, as cells of a table."""
    areas = ("    -" if metrics[name] is None else f"{metrics[name]:5.3f}" for name in ("auroc", "aupr"))
    return "  ".join([f"{100 * metrics['ece']:6.2f}", *areas, f"{100 * metrics['accuracy']:8.2f}"])


def before_and_after(samples: list[PixelSample]) -> str:
    """A table of the confidences without and with calibration, which is measured on images it is not fitted to."""
    temperature_of: dict[int, float] = {}  # of each image, by its row
    for fitted, measured in halves(samples):
        temperature_of |= dict.fromkeys((sample.row for sample in measured), fit_temperature(fitted))
    lines = [f"{'':<25} ECE %  AUROC   AUPR  accuracy %"]
    for kind, distorted in (("undistorted", False), ("distorted", True)):
        chosen = [sample for sample in samples if bool(sample.distortions) is distorted]
        if chosen:
            before = confidence_metrics(chosen, lambda sample: confidence_map(sample.scores))
            after = confidence_metrics(
                chosen, lambda sample: confidence_map(sample.scores, temperature_of[sample.row])
            )
            lines.append(f"{kind}, uncalibrated".ljust(25) + figures(before))
            lines.append(f"{kind}, calibrated".ljust(25) + figures(after))
    return "\n".join([*lines, "(each half of the images is measured by a fit to the other half)"])


def save(folder: Path, temperature: float, output: Path | None) -> Path:
    """Stores a temperature in the configuration of a model, or in that of a copy, and returns the file."""
    config = read_json(folder / CONFIG) | {"confidence_temperature": temperature}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if output is None:
        write_text(folder / CONFIG, text)
        return folder / CONFIG
    with atomic_folder(output) as new:
        left_out = shutil.ignore_patterns("__pycache__", f"{PREFIX_CHECKPOINT_DIR}-*")
        shutil.copytree(folder, new, dirs_exist_ok=True, ignore=left_out)
        write_text(new / CONFIG, text)
    return output / CONFIG


@cli.reports_errors("calibrate")
def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    folder, revision = model_folder(parsed.model, patterns=None)  # a copy has the code and the tokenizer
    if parsed.output is not None:
        check_new_folder(parsed.output)
        if parsed.output.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--output {parsed.output} is inside --model {parsed.model}; choose a folder elsewhere")
    elif revision is not None:
        raise ValueError(f"{parsed.model} is a model on the Hub; give --output DIR for its calibrated copy")
    check_writable(folder if parsed.output is None else parsed.output.parent)
    model, processor = load_for_inference(folder, parsed.device)
    _, name, split, source = parsed.domain
    domain = open_domain(name, source, split, id2label=parsed.id2label, skip_unreadable=True)
    check_classes(model.config.id2label, domain)
    if not domain.rows.labelled:
        raise ValueError(f"{domain.name}: its split {domain.split} has no labels, which confidences are fitted to")
    options = EvaluationOptions(protocol=parsed.protocol, workers=parsed.workers)
    skipped = list(domain.skipped)
    samples = sample_pixels(model, processor, domain, options, parsed.pixels, parsed.distortions, skipped=skipped)
    for each in skipped:
        print(f"{domain.name}: skipped {each['name']}: {each['reason']}", file=sys.stderr)
    images = len({sample.row for sample in samples})
    if images < 2:
        raise ValueError(f"{domain.name}: {images} images with labels can be used; at least 2 are needed")
    drawn = len(samples[0].labels)
    if drawn < parsed.pixels:
        print(f"{domain.name}: {drawn} pixels of each view instead of {parsed.pixels}, for memory", file=sys.stderr)
    temperature = fit_temperature(samples)
    try:
        print(before_and_after(samples))
    except ValueError as error:  # for instance, all pixels of one half are right
        print(f"{domain.name}: not measured, since one half of the images cannot be fitted: {error}", file=sys.stderr)
    left_out = f", {len(skipped)} skipped" if skipped else ""
    print(f"fitted to {images} images of {domain.name}{left_out}: temperature {temperature:.4f}")
    print(f"written to {save(folder, temperature, parsed.output)}")
    return 1 if skipped else 0
