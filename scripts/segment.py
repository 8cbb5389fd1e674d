"""`mfuser segment`: segments images and writes colour overlays, label images and a legend."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from mfuser.confidence_mfuser import UNKNOWN, check_threshold
from mfuser.errors import is_expected, one_line
from mfuser.evaluation.large_images import label_map_by_bands
from mfuser.files import make_folder, write_image, write_text
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.loading import load_for_inference
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.postprocessing_mfuser import label_map_of_scores
from mfuser.quantization import quantize
from mfuser.scripts import cli, palettes
from mfuser.scripts.segment_arguments import parse_arguments

IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
}  # fmt: skip
JPEG_LIMIT = 65_500  # pixels on a side
SOURCE = "Source"  # text of a label PNG: a hash of the path of its image


def find_images(inputs: Sequence[Path], output: Path) -> tuple[dict[Path, Path], list[str]]:
    """
    Finds the images to segment, and names their results.

    Folders are searched recursively. Files are accepted with any suffix. A file that is found twice is returned once.
    Images in `output` are results of an earlier run and are not returned.

    Args:
        inputs (`Sequence[Path]`):
            Images and folders.
        output (`Path`):
            Folder of the results.

    Returns:
        `tuple[dict[Path, Path], list[str]]`: The path of the results of each image, relative to `output` and without
        suffix (images of a folder keep their subfolder; duplicate names are numbered), and an error message for each
        input without images.
    """
    images, problems, seen, taken = {}, [], set(), set()
    output = output.resolve()
    for given in inputs:
        if given.is_dir():
            found = sorted(
                path for path in given.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
            )
            found = [path for path in found if output not in path.resolve().parents]
            if not found:
                problems.append(f"{given}: the folder contains no image")
        elif given.is_file():
            found = [given]
        else:
            found = []
            problems.append(f"{given}: the file or folder does not exist")
        for path in found:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            place = path.relative_to(given).with_suffix("") if given.is_dir() else Path(path.stem)
            numbered, number = place, 1
            # Some file systems ignore case.
            while str(numbered).lower() in taken or not _is_free(output / numbered, path):
                number += 1
                numbered = place.with_name(f"{place.name}-{number}")
            taken.add(str(numbered).lower())
            images[path] = numbered
    return images, problems


def result_files(results: Path) -> tuple[Path, Path, Path]:
    """The label image, the overlay and the confidence of an image."""
    labels, overlay, confidence = (
        f"{results.name}_{kind}" for kind in ("labels.png", "overlay.jpg", "confidence.png")
    )
    return results.with_name(labels), results.with_name(overlay), results.with_name(confidence)


def _source(path: Path) -> str:
    return hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()


def _is_free(results: Path, path: Path) -> bool:
    """Whether the results of an image may be written to `results`: nothing is there, or earlier results of it."""
    labels, *others = result_files(results)
    try:
        if not labels.exists():
            return not any(file.exists() for file in others)
    except OSError:
        return True  # writing will fail too, and say why
    try:
        with Image.open(labels) as image:
            return image.info.get(SOURCE) == _source(path)
    except Exception:  # not a label image
        return False


@torch.inference_mode()
def segment(image: np.ndarray, model: MFuserForSemanticSegmentation, processor: MFuserImageProcessor) -> np.ndarray:
    """
    Segments an image.

    Without resizing, the memory in use grows with the pixels of the image, by less than 40 bytes each, and not with
    pixels times classes. With resizing, the scores of all classes at the size after resizing come in addition.

    Args:
        image (`np.ndarray` of shape `(3, height, width)`):
            RGB, of uint8.
        model ([`MFuserForSemanticSegmentation`]):
            The model, in eval mode.
        processor ([`MFuserImageProcessor`]):
            Resizes and normalises the image.

    Returns:
        `np.ndarray` of shape `(height, width)`: Class ids.

    Raises:
        ValueError: If the image is smaller than a patch, or scores are not finite.
    """
    height, width = image.shape[1:]
    if processor.do_resize:
        image = processor.resize(image, processor.size, processor.resample)

    def pixel_rows(rows: slice) -> torch.Tensor:
        inputs = processor(
            image[:, rows], do_resize=False, do_pad=False, input_data_format="channels_first", return_tensors="pt"
        )
        return inputs["pixel_values"].to(model.device, model.dtype)

    if image.shape[1:] == (height, width):
        labels = label_map_by_bands(model, pixel_rows, (height, width))
    else:
        scores = model(pixel_values=pixel_rows(slice(0, image.shape[1]))).logits[0]
        labels = label_map_of_scores(scores, (height, width))
    return labels.cpu().numpy()


@torch.inference_mode()
def segment_with_confidence(
    image: np.ndarray,
    model: MFuserForSemanticSegmentation,
    processor: MFuserImageProcessor,
    unknown_threshold: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Segments an image, in memory that grows with pixels times classes: a confidence depends on the whole image.

    Args:
        image, model, processor:
            See [`segment`].
        unknown_threshold (`float`, *optional*):
            Pixels of lower confidence than this get the label 255.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Class ids and confidences, both of shape `(height, width)`.
    """
    inputs = processor(image, input_data_format="channels_first", return_tensors="pt")
    outputs = model(pixel_values=inputs["pixel_values"].to(model.device, model.dtype), output_confidence=True)
    results: list[Any] = processor.post_process_semantic_segmentation(
        outputs, inputs=inputs, return_confidence=True, unknown_threshold=unknown_threshold
    )
    result = results[0]
    return result["segmentation"].cpu().numpy(), result["confidence"].cpu().numpy()


def read_image(path: Path, processor: MFuserImageProcessor) -> np.ndarray:
    """
    Reads an image as uint8 RGB of shape (3, H, W), rotated as its EXIF orientation says.

    Raises:
        OSError: If the file cannot be opened.
        MemoryError: If there is too little memory.
        ValueError: If it is not an image that can be read, for whatever reason.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            upright.load()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise almost anything for damaged files
        raise ValueError(f"it is not an image that can be read: {one_line(error)}") from error
    pixels = processor.process_image(upright, do_convert_rgb=True)
    if pixels.dtype != np.uint8:
        raise ValueError(f"its pixels have dtype {pixels.dtype} and an unknown range; save it with 8 or 16 bits")
    return pixels


def share_table(class_names: Sequence[str], counts: np.ndarray) -> str:
    """Formats the share of each class in all pixels, the largest first, and the names of absent classes."""
    shares = 100 * counts / counts.sum()
    width = max(len(name) for name in class_names)
    order = np.argsort(-counts, kind="stable")
    lines = [f"{class_names[index]:<{width}}  {shares[index]:6.2f} %" for index in order if counts[index]]
    absent = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    if absent:
        lines.append(f"absent: {', '.join(absent)}")
    return "\n".join(lines)


def write_legend(output: Path, classes: dict[int, str], colours: np.ndarray):
    """
    Writes `legend.json` and `legend.png` with the names of `classes` and their rows in `colours`.

    Raises:
        ValueError: If the folder holds another legend.
    """
    entries = {index: {"name": name, "colour": colours[index].tolist()} for index, name in classes.items()}
    lines = ",\n".join(f'  "{index}": {json.dumps(entry)}' for index, entry in entries.items())
    text, file, picture = f"{{\n{lines}\n}}\n", output / "legend.json", output / "legend.png"
    # The JSON is written first, so a picture alone is not from this command.
    if picture.exists() if not file.exists() else file.read_bytes() != text.encode("utf-8"):
        raise ValueError(
            f"{output} holds the legend of other classes; choose another --output, so that its results keep theirs"
        )
    write_text(file, text)
    write_image(picture, palettes.legend(classes, colours))


def write_results(
    results: Path,
    path: Path,
    image: np.ndarray,
    label_map: np.ndarray,
    colours: np.ndarray,
    alpha: float,
    confidence: np.ndarray | None = None,
) -> None:
    """Writes the label image, the overlay and, if there is one, the confidence of the image in `path`."""
    height, width = label_map.shape
    if max(height, width) > JPEG_LIMIT:
        raise ValueError(
            f"it has {width} x {height} pixels; the overlay, a JPEG, can have at most {JPEG_LIMIT} on a side"
        )
    make_folder(results.parent)
    labels, overlay, grey = result_files(results)
    text = PngImagePlugin.PngInfo()
    text.add_text(SOURCE, _source(path))
    write_image(labels, palettes.label_image(label_map, colours), pnginfo=text)
    picture = palettes.overlay(Image.fromarray(image.transpose(1, 2, 0)), label_map, colours, alpha)
    write_image(overlay, picture, quality=95)
    if confidence is not None:
        write_image(grey, Image.fromarray((255 * confidence).round().astype(np.uint8)))


@cli.reports_errors("segment")
def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    images, problems = find_images(parsed.inputs, parsed.output)
    for problem in problems:
        print(f"skipped {problem}", file=sys.stderr)
    if not images:
        return 1
    model, processor = load_for_inference(parsed.model, parsed.device, parsed.dtype, parsed.size)
    quantize(model, parsed.quantize)
    class_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    colours, classes = palettes.class_colours(class_names), dict(enumerate(class_names))
    threshold = parsed.unknown_threshold
    if threshold is not None:
        check_threshold(threshold, len(class_names))
        classes[UNKNOWN] = "unknown"
        colours = np.concatenate([colours, np.zeros((UNKNOWN + 1 - len(colours), 3), dtype=np.uint8)])
    make_folder(parsed.output)
    write_legend(parsed.output, classes, colours)

    counts = np.zeros(max(classes) + 1, dtype=np.int64)
    skipped = len(problems)
    for path, place in tqdm(images.items(), desc="segmenting", unit="image"):
        try:
            image = read_image(path, processor)
            confidence = None
            if parsed.confidence or threshold is not None:
                label_map, confidence = segment_with_confidence(image, model, processor, threshold)
            else:
                label_map = segment(image, model, processor)
            saved = confidence if parsed.confidence else None
            write_results(parsed.output / place, path, image, label_map, colours, parsed.alpha, saved)
        except Exception as error:
            if not is_expected(error):
                raise
            tqdm.write(f"skipped {path}: {one_line(error)}", file=sys.stderr)
            skipped += 1
            continue
        for row in label_map:  # by rows, because `bincount` copies to int64
            counts += np.bincount(row, minlength=len(counts))
        if place.name != path.stem:
            tqdm.write(f"{path}: the results are named {place}", file=sys.stderr)

    if counts.any():
        print(share_table(list(classes.values()), counts[list(classes)]))
    print(f"segmented: {len(images) + len(problems) - skipped}, skipped: {skipped}, results in {parsed.output}")
    return 1 if skipped else 0
