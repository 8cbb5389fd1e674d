"""`mfuser segment`: segments images and videos, and writes colour overlays, labels and a legend."""

import argparse
import sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mfuser.confidence_mfuser import UNKNOWN, check_threshold
from mfuser.errors import CommandError, is_expected, one_line
from mfuser.files import make_folder
from mfuser.loading import load_for_inference
from mfuser.quantization import add_quantize_argument, quantize
from mfuser.scripts import cli, palettes
from mfuser.scripts.segment_images import segment_images
from mfuser.scripts.segment_inputs import Kind, Source, find_sources
from mfuser.scripts.segment_results import Drawing, is_done, is_free, settings_of, write_legend
from mfuser.scripts.segment_video import VideoOptions, segment_video, stopping_on_signals
from mfuser.scripts.video import DEFAULT_RATE, import_av

# Included in the repository, so that the command runs offline.
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "mfuser-tiny-camvid"

DESCRIPTION = """Segments images and videos. For each image, it writes into the output folder
  NAME_overlay.jpg   the image, overlaid with the colours of its classes
  NAME_labels.png    a palette PNG whose indices are the class ids
  NAME_confidence.png   with --confidence: the confidence of each pixel, from 0 (black) to 1 (white)
  NAME_panel.jpg     with --panel: the image, its overlay and its confidence side by side, with a legend
for each video
  NAME_overlay.mp4   the video, overlaid with the colours of its classes, with its times and its sound
  NAME_labels.npz    the label map of each frame
  NAME_video.json    the number of frames, the share of each class, and whether the results are complete
and once
  legend.png, legend.json   the classes with their ids and colours
It prints the share of each class in all pixels. Classes with the name of a Cityscapes class have its colour.
A file that cannot be read, segmented or written is named and skipped. Results of one image never replace those of
another, also of an earlier run: they are numbered, NAME-2. Results of the same image are replaced.
Ctrl-C or SIGTERM during a video finishes its files with the frames so far.
Exit code: 0 if everything was segmented, 1 if an image was skipped or a video is damaged, 2 if the command could not
run, 130 if it was interrupted (a camera or an address, which have no end: 0)."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mfuser segment", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE_OR_FOLDER_OR_VIDEO",
        help="images and videos; folders that are searched for both; frames of one video as a pattern, such as "
        "frames/%%05d.png; the index of a camera, such as 0; an address, such as rtsp://...",
    )
    parser.add_argument(
        "--model",
        help="folder or Hub name of an MFuser model (default: the demonstration checkpoint of the repository)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("segmented"), help="folder to write to (default: segmented)"
    )
    parser.add_argument(
        "--size",
        type=_size,
        metavar="LONGxSHORT",
        help="resize each image to the largest size within LONG x SHORT pixels, with the aspect ratio kept, e.g. "
        "2048x1024 as published for Cityscapes; results always have the size of the image "
        "(default: the saved setting of the model, usually no resizing)",
    )
    parser.add_argument(
        "--alpha", type=_fraction, default=0.5, help="opacity of the colours, from 0 to 1 (default: 0.5)"
    )
    parser.add_argument(
        "--confidence",
        action="store_true",
        help="write the confidence of each pixel as NAME_confidence.png (images)",
    )
    parser.add_argument(
        "--unknown-threshold",
        type=_fraction,
        metavar="T",
        help=f"pixels of lower confidence than this get the label {UNKNOWN}, unknown, and are black in the overlay",
    )
    parser.add_argument(
        "--panel",
        action="store_true",
        help="write the image, its overlay with a legend and its confidence side by side as NAME_panel.jpg (images)",
    )
    parser.add_argument(
        "--smoothing",
        type=_weight,
        default=0.0,
        metavar="A",
        help="smooth the scores of a video over time: A times the smoothed scores of the frame before, plus 1 - A "
        "times those of the frame; from 0 to less than 1 (default: 0)",
    )
    parser.add_argument(
        "--frame-rate",
        type=_rate,
        default=DEFAULT_RATE,
        metavar="FPS",
        help="frames per second of a pattern, e.g. 30 or 30000/1001 (default: 25)",
    )
    parser.add_argument(
        "--skip-existing",
        action="store_true",
        help="leave out images and videos whose results an earlier run wrote completely, with the same model and "
        "settings",
    )
    add_device_argument(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights and the computation (default: the dtype of the saved weights)",
    )
    add_quantize_argument(parser)
    parsed = parser.parse_args(arguments)
    if parsed.model is None:
        if not DEFAULT_MODEL.is_dir():
            parser.error(f"--model is required, because the demonstration checkpoint {DEFAULT_MODEL} does not exist")
        parsed.model = str(DEFAULT_MODEL)
    for folder in filter(Path.is_dir, map(Path, parsed.inputs)):
        if parsed.output.resolve() in (folder.resolve(), *folder.resolve().parents):
            parser.error(
                f"--output {parsed.output} contains the images of {folder}; choose a folder without input images"
            )
    return parsed


def _size(text: str) -> dict[str, int]:
    try:
        long_edge, short_edge = (int(length) for length in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must have the form LONGxSHORT, e.g. 2048x1024") from None
    if not 0 < short_edge <= long_edge:
        raise argparse.ArgumentTypeError(f"{text!r} must give the longer edge first, and at least one pixel")
    return {"longest_edge": long_edge, "shortest_edge": short_edge}


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number between 0 and 1")
    return value


def _weight(text: str) -> float:
    value = _fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be less than 1, so that a frame has an effect")
    return value


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number or a fraction above 0, at most 1000")
    return rate.limit_denominator(1_000_000)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`, a device that is available."""
    parser.add_argument(
        "--device",
        type=_available_device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="e.g. cpu, cuda, cuda:1 (default: cuda if available)",
    )


def _available_device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be an available device: {str(error).splitlines()[0]}"
        ) from None


def share_table(class_names: list[str], counts: np.ndarray) -> str:
    """Formats the share of each class in all pixels, the largest first, and the names of absent classes."""
    shares = 100 * counts / counts.sum()
    width = max(len(name) for name in class_names)
    order = np.argsort(-counts, kind="stable")
    lines = [f"{class_names[index]:<{width}}  {shares[index]:6.2f} %" for index in order if counts[index]]
    absent = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    if absent:
        lines.append(f"absent: {', '.join(absent)}")
    return "\n".join(lines)


class Summary:
    """
    What a run has done so far, and its messages.

    Args:
        num_classes (`int`): Number of label values.
        skipped (`int`): Number of inputs that were skipped before.
    """

    def __init__(self, num_classes: int, skipped: int):
        self.counts = np.zeros(num_classes, dtype=np.int64)
        self.segmented, self.skipped, self.done, self.incomplete = 0, skipped, 0, 0

    def skip(self, source: Source, reason: str) -> None:
        tqdm.write(f"skipped {source}: {reason}", file=sys.stderr)
        self.skipped += 1

    def add(self, source: Source, counts: np.ndarray) -> None:
        self.counts += counts
        self.segmented += 1
        if source.kind in (Kind.IMAGE, Kind.VIDEO) and source.place.name != source.path.stem:
            tqdm.write(f"{source}: the results are named {source.place}", file=sys.stderr)

    def print(self, classes: dict[int, str], output: Path) -> None:
        if self.counts.any():
            print(share_table(list(classes.values()), self.counts[list(classes)]))
        parts = [f"segmented: {self.segmented}", f"skipped: {self.skipped}"]
        if self.incomplete:
            parts.insert(1, f"of these incomplete: {self.incomplete}")
        if self.done:
            parts.append(f"done before: {self.done}")
        print(f"{', '.join(parts)}, results in {output}")


def check_options(parsed: argparse.Namespace, sources: list[Source]) -> None:
    """Raises `CommandError` if an option has no effect on any of the sources, or if videos cannot be read."""
    kinds = {source.kind for source in sources}
    if Kind.IMAGE not in kinds:
        for option in ("confidence", "panel"):
            if getattr(parsed, option):
                raise CommandError(f"--{option} is for images, and the inputs are videos")
    if kinds == {Kind.IMAGE} and parsed.smoothing:
        raise CommandError("--smoothing is for videos, and the inputs are images; give frames as a pattern")
    if kinds != {Kind.IMAGE}:
        import_av()


@cli.reports_errors("segment")
def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    sources, problems = find_sources(parsed.inputs, parsed.output, lambda source: is_free(source, parsed.output))
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    if not sources:
        return 1
    check_options(parsed, sources)
    model, processor = load_for_inference(parsed.model, parsed.device, parsed.dtype, parsed.size)
    threshold = parsed.unknown_threshold
    options = {"alpha": parsed.alpha, "unknown_threshold": threshold, "quantize": parsed.quantize}
    settings = settings_of(model, processor, options)
    quantize(model, parsed.quantize)
    class_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    colours, classes = palettes.class_colours(class_names), dict(enumerate(class_names))
    if threshold is not None:
        check_threshold(threshold, len(class_names))
        classes[UNKNOWN] = "unknown"
        colours = np.concatenate([colours, np.zeros((UNKNOWN + 1 - len(colours), 3), dtype=np.uint8)])
    drawing = Drawing(
        classes, colours, parsed.alpha, parsed.confidence, parsed.panel, is_calibrated=settings["is_calibrated"]
    )
    make_folder(parsed.output)
    write_legend(parsed.output, drawing)

    summary = Summary(max(classes) + 1, len(problems))
    images = [source for source in sources if source.kind is Kind.IMAGE]
    segmented = segment_images(
        images, parsed.output, model, processor, drawing, settings, threshold, parsed.skip_existing
    )
    for image in tqdm(segmented, desc="segmenting", unit="image", total=len(images), disable=not images):
        if image.error is not None:
            summary.skip(image.source, image.error)
        elif image.is_done:
            summary.done += 1
        else:
            summary.add(image.source, image.counts)
    was_stopped = run_videos(
        [source for source in sources if source.kind is not Kind.IMAGE],
        parsed,
        summary,
        model=model,
        processor=processor,
        drawing=drawing,
        settings=settings,
    )
    summary.print(classes, parsed.output)
    if was_stopped:
        print("mfuser segment: interrupted; the files of the last video are complete up to there", file=sys.stderr)
        return cli.INTERRUPTED
    return 1 if summary.skipped or summary.incomplete else 0


def run_videos(sources: Iterable[Source], parsed: argparse.Namespace, summary: Summary, **common: Any) -> bool:
    """Segments videos. Returns whether a signal ended one before its end."""
    options = VideoOptions(parsed.smoothing, parsed.frame_rate, parsed.unknown_threshold)
    for source in sources:
        made_with = {**common["settings"], "smoothing": parsed.smoothing}
        if source.kind is Kind.FRAMES:
            made_with["frame_rate"] = str(parsed.frame_rate)
        if parsed.skip_existing and is_done(source, parsed.output, common["drawing"], made_with):
            summary.done += 1
            continue
        try:
            with stopping_on_signals() as stop:
                result = segment_video(
                    source, parsed.output, **{**common, "settings": made_with}, options=options, stop=stop
                )
        except Exception as error:
            if not is_expected(error):
                raise
            summary.skip(source, one_line(error))
            continue
        summary.add(source, result.counts)
        print(f"{source}: {result.frames} frames{', stopped' if result.was_stopped else ''}")
        if result.note:
            print(f"{source}: {result.note}", file=sys.stderr)
        if result.problem:
            print(f"incomplete {source}: {result.problem}; the frames read are kept", file=sys.stderr)
            summary.incomplete += 1
        if result.was_stopped:
            return not source.kind.is_live
    return False
