"""Arguments of `mfuser segment`, parsed without PyTorch, so that `--help` is fast."""

import argparse
from fractions import Fraction
from pathlib import Path

from mfuser.scripts.arguments import DEFAULT_MODEL, add_device_argument, add_quantize_argument

DEFAULT_RATE = Fraction(25)  # frames per second, if the video does not specify them

DESCRIPTION = """Segments images and videos. For each image, it writes into the output folder
  NAME_overlay.jpg   the image, overlaid with the colours of its classes
  NAME_labels.png    a palette PNG whose indices are the class ids
  NAME_confidence.png   with --confidence: the confidence of each pixel, from 0 (black) to 1 (white)
  NAME_panel.jpg     with --panel: the image, its overlay and its confidence side by side, with a legend
for each video
  NAME_overlay.mp4   the video, overlaid with the colours of its classes, with its timestamps and its audio
  NAME_labels.npz    the label map of each frame
  NAME_video.json    the number of frames, the share of each class, and whether the results are complete
and once
  legend.png, legend.json   the classes with their ids and colours
It prints the share of each class in all pixels. Classes with the name of a Cityscapes class have its colour.
A file that cannot be read, segmented or written is named and skipped. Results of one image never replace those of
another, also of an earlier run: they are numbered, NAME-2. Results of the same image are replaced.
Ctrl-C or SIGTERM during a video finalises its files with the frames so far.
Exit code: 0 if everything was segmented, 1 if an image was skipped or a video is damaged, 2 if the command could not
run, 130 if it was interrupted (0 for a camera or a URL, which have no end)."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mfuser segment", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE_OR_FOLDER_OR_VIDEO",
        help="images and videos; folders that are searched for both; frames of one video as a pattern, such as "
        "frames/%%05d.png; the index of a camera, such as 0; a URL, such as rtsp://...",
    )
    parser.add_argument(
        "--model",
        help="folder or Hub id of an MFuser model (default: the demonstration checkpoint of the repository)",
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
        help="pixels of lower confidence than this get the label 255, unknown, and are black in the overlay",
    )
    parser.add_argument(
        "--panel",
        action="store_true",
        help="write the image, its overlay with a legend and its confidence side by side as NAME_panel.jpg (images)",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="the true labels of an image, a PNG of class ids with 255 for pixels that do not count; its mean IoU is "
        "printed (one image; `mfuser evaluate` scores a dataset)",
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
