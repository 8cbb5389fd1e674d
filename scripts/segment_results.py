"""The files that `mfuser segment` writes: their names, their source, and the model and settings that produced them."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from mfuser.files import make_folder, read_json, write_image, write_text
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.loading import config_content
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.scripts import palettes
from mfuser.scripts.panel import draw_panel
from mfuser.scripts.segment_inputs import Kind, Source
from mfuser.scripts.segmentation import weights_hash

JPEG_LIMIT = 65_500  # pixels on a side
# Text chunks of a label PNG: a hash of the path of its image, and the record of the model and settings.
SOURCE, RECORD = "Source", "Record"


@dataclass(frozen=True)
class Drawing:
    """
    How results are drawn.

    Args:
        classes (`dict[int, str]`):
            Names of the classes by id.
        colours (`np.ndarray` of shape `(ids, 3)`):
            RGB colours by id.
        alpha (`float`):
            Opacity of the colours, from 0 to 1.
        confidence (`bool`):
            Whether to write the confidence of each pixel.
        panel (`bool`):
            Whether to write a panel of the image, its overlay and its confidence.
        is_calibrated (`bool`):
            Whether the model's confidence is calibrated.
    """

    classes: dict[int, str]
    colours: np.ndarray
    alpha: float
    confidence: bool = False
    panel: bool = False
    is_calibrated: bool = False


@dataclass(frozen=True)
class Job:
    """
    What inputs are segmented with, and where their results go.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model, in eval mode.
        processor ([`MFuserImageProcessor`]):
            Resizes and normalises images and frames.
        output (`Path`):
            Folder of the results.
        drawing (`Drawing`):
            How results are drawn.
        settings (`dict`, *optional*):
            What results depend on, see [`settings_of`].
        unknown_threshold (`float`, *optional*):
            Pixels of lower confidence than this get the label 255.
    """

    model: MFuserForSemanticSegmentation
    processor: MFuserImageProcessor
    output: Path
    drawing: Drawing
    settings: dict[str, Any] = field(default_factory=dict)
    unknown_threshold: float | None = None


@dataclass
class Segmented:
    """
    An image and its results, passed from one step of the command to the next.

    Args:
        source (`Source`):
            The image.
        pixels (`np.ndarray` of shape `(3, height, width)`, *optional*):
            RGB, of uint8.
        labels (`np.ndarray` of shape `(height, width)`, *optional*):
            Class ids.
        confidence (`np.ndarray` of shape `(height, width)`, *optional*):
            The confidence of each pixel, if it is needed.
        counts (`np.ndarray`, *optional*):
            Number of pixels by class id, once the results are written.
        error (`str`, *optional*):
            Why the image was skipped.
        is_done (`bool`, *optional*, defaults to `False`):
            Whether an earlier run has written the same results.
    """

    source: Source
    pixels: np.ndarray = field(default_factory=lambda: np.empty(0))
    labels: np.ndarray = field(default_factory=lambda: np.empty(0))
    confidence: np.ndarray | None = None
    counts: np.ndarray | None = None
    error: str | None = None
    is_done: bool = False


def image_files(results: Path) -> dict[str, Path]:
    """The files of an image by kind: `labels`, `overlay`, `confidence` and `panel`."""
    suffixes = {"labels": "png", "overlay": "jpg", "confidence": "png", "panel": "jpg"}
    return {kind: results.with_name(f"{results.name}_{kind}.{suffix}") for kind, suffix in suffixes.items()}


def video_files(results: Path) -> dict[str, Path]:
    """The files of a video by kind: `record`, `labels`, and `overlay` as MP4 or as Matroska."""
    names = {"record": "video.json", "labels": "labels.npz", "mp4": "overlay.mp4", "matroska": "overlay.mkv"}
    return {kind: results.with_name(f"{results.name}_{name}") for kind, name in names.items()}


def source_hash(source: Source) -> str:
    """SHA-256 of the text that identifies a source; its results contain it."""
    return hashlib.sha256(source.identity().encode("utf-8", "surrogateescape")).hexdigest()


def settings_of(
    model: MFuserForSemanticSegmentation, processor: MFuserImageProcessor, options: dict[str, Any]
) -> dict[str, Any]:
    """
    What results depend on, besides the source.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model, before quantisation.
        processor ([`MFuserImageProcessor`]):
            Its image processor, with the size in use.
        options (`dict`):
            The options of the command that have an effect on results.

    Returns:
        `dict`: Values of JSON: the options, and a hash of the weights and one of both configurations.
    """
    config = config_content(model.config)
    text = json.dumps([config, processor.to_dict()], sort_keys=True, default=str)
    is_calibrated = config.get("confidence_temperature") is not None
    hashes = {"weights": weights_hash(model), "config": hashlib.sha256(text.encode()).hexdigest()}
    return {**hashes, "dtype": str(model.dtype), "is_calibrated": is_calibrated, **options}


def record_of(source: Source, settings: dict[str, Any]) -> str:
    """The record of the results of a source: a hash of its files' sizes and times of change, and the settings."""
    files = [source.path] if source.path != Path() else list(source.frames)
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    state = hashlib.sha256(json.dumps(states).encode("utf-8", "surrogateescape")).hexdigest()
    return json.dumps({"source": state, **settings}, sort_keys=True)


def is_free(source: Source, output: Path) -> bool:
    """Whether the results of a source may be written to its place: it is empty, or holds earlier results of it."""
    files = image_files(output / source.place) if source.kind is Kind.IMAGE else video_files(output / source.place)
    owner, *others = files.values()
    try:
        if not owner.exists():
            return not any(file.exists() for file in others)
    except OSError:
        return True  # writing will fail as well, with a message
    try:
        if source.kind is not Kind.IMAGE:
            return read_json(owner)["source"] == source_hash(source)
        with Image.open(owner) as image:
            return image.info.get(SOURCE) == source_hash(source)
    except Exception:  # not a result
        return False


def check_still_free(source: Source, output: Path) -> None:
    """Raises `ValueError` if another process has written results to the place of a source."""
    if not is_free(source, output):
        raise ValueError(
            f"{output / source.place} holds results that another process has written for another source; run the "
            "command again, or with another --output"
        )


def is_done(source: Source, job: Job) -> bool:
    """Whether an earlier run with the same model and settings has written all results of a source."""
    results = job.output / source.place
    if source.kind.is_live:
        return False
    try:
        record = record_of(source, job.settings)
        if source.kind is not Kind.IMAGE:
            files = video_files(results)
            written = read_json(files["record"])
            exist = files["labels"].is_file() and results.with_name(written["overlay"]).is_file()
            return exist and written["record"] == json.loads(record) and written["complete"] is True
        for kind, file in _wanted(results, job.drawing).items():
            with Image.open(file) as image:
                name = "comment" if kind in ("overlay", "panel") else RECORD
                found = image.info.get(name, "")
            if (found.decode("utf-8", "replace") if isinstance(found, bytes) else found) != record:
                return False
    except Exception:  # missing, or damaged
        return False
    return True


def _wanted(results: Path, drawing: Drawing) -> dict[str, Path]:
    written = {"labels": True, "overlay": True, "confidence": drawing.confidence, "panel": drawing.panel}
    return {kind: file for kind, file in image_files(results).items() if written[kind]}


def write_legend(output: Path, drawing: Drawing) -> None:
    """
    Writes `legend.json` and `legend.png` with the names and colours of the classes.

    Raises:
        ValueError: If the folder holds another legend.
    """
    classes, colours = drawing.classes, drawing.colours
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


def write_image_results(segmented: Segmented, job: Job) -> None:
    """
    Writes the results of an image.

    The label image is written first, since it identifies the source of the others. Each file contains the record of
    the model and settings, so that incomplete results are detected if a run ended between two files.

    Args:
        segmented (`Segmented`):
            The image, with its labels and, if needed, its confidence.
        job (`Job`):
            How and where they are written.

    Raises:
        ValueError: If the image is too large for a JPEG, or its place holds the results of another image.
        OSError: If a file cannot be written.
    """
    source, labels, confidence = segmented.source, segmented.labels, segmented.confidence
    drawing, results = job.drawing, job.output / segmented.source.place
    height, width = labels.shape
    if max(height, width) > JPEG_LIMIT:
        raise ValueError(
            f"it has {width} x {height} pixels; the overlay, a JPEG, can have at most {JPEG_LIMIT} on a side"
        )
    make_folder(results.parent)
    check_still_free(source, job.output)
    files = _wanted(results, drawing)
    record = record_of(source, job.settings)
    made, label_text = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    for text in (made, label_text):
        text.add_text(RECORD, record)
    label_text.add_text(SOURCE, source_hash(source))
    write_image(files["labels"], palettes.label_image(labels, drawing.colours), pnginfo=label_text)
    image = Image.fromarray(segmented.pixels.transpose(1, 2, 0))
    overlay = palettes.overlay(image, labels, drawing.colours, drawing.alpha)
    write_image(files["overlay"], overlay, quality=95, comment=record.encode())
    if drawing.confidence and confidence is not None:
        grey = Image.fromarray((255 * confidence).round().astype(np.uint8))
        write_image(files["confidence"], grey, pnginfo=made)
    if drawing.panel and confidence is not None:
        panel = draw_panel(image, overlay, labels, confidence, drawing.classes, drawing.colours, drawing.is_calibrated)
        write_image(files["panel"], panel, quality=92, comment=record.encode())
