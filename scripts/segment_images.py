"""`mfuser segment` on images: the next are read, and results of earlier ones written, while the model runs."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mfuser.errors import is_expected, one_line
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.overlap import in_order
from mfuser.scripts.segment_inputs import Source
from mfuser.scripts.segment_results import Drawing, Segmented, is_done, write_image_results
from mfuser.scripts.segmentation import count_pixels, images_at_once, segment, segment_with_confidence

READ_AHEAD = WRITE_BEHIND = 2  # images that wait for the model, and for the disk


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
    except Exception as error:  # PIL's decoders raise exceptions of almost any type for damaged files
        raise ValueError(f"it is not an image that can be read: {one_line(error)}") from error
    pixels = processor.process_image(upright, do_convert_rgb=True)
    if pixels.dtype != np.uint8:
        raise ValueError(f"its pixels have dtype {pixels.dtype} and an unknown range; save it with 8 or 16 bits")
    return pixels


def segment_images(
    sources: Iterable[Source],
    output: Path,
    model: MFuserForSemanticSegmentation,
    processor: MFuserImageProcessor,
    drawing: Drawing,
    settings: dict[str, Any],
    unknown_threshold: float | None = None,
    skip_existing: bool = False,
) -> Iterator[Segmented]:
    """
    Segments images and writes their results.

    Reading, the model and writing run concurrently, in threads; a small model segments several images in parallel, see
    [`images_at_once`]. The number of images in memory is bounded.

    Args:
        sources (`Iterable[Source]`):
            The images.
        output (`Path`):
            Folder of the results.
        model ([`MFuserForSemanticSegmentation`]):
            The model, in eval mode.
        processor ([`MFuserImageProcessor`]):
            Resizes and normalises the images.
        drawing (`Drawing`):
            How results are drawn.
        settings (`dict`):
            What results depend on, see [`settings_of`].
        unknown_threshold (`float`, *optional*):
            Pixels of lower confidence than this get the label 255.
        skip_existing (`bool`, *optional*, defaults to `False`):
            Whether to leave out images whose results exist.

    Returns:
        `Iterator[Segmented]`: Each image, in the order of `sources`, with the counts of its classes, with the reason
        why it was skipped, or with `is_done`.
    """
    needs_confidence = drawing.confidence or drawing.panel or unknown_threshold is not None

    def read(segmented: Segmented) -> None:
        if skip_existing and is_done(segmented.source, output, drawing, settings):
            segmented.is_done = True
        else:
            segmented.pixels = read_image(segmented.source.path, processor)

    def run_model(segmented: Segmented) -> None:
        if needs_confidence:
            segmented.labels, segmented.confidence = segment_with_confidence(
                segmented.pixels, model, processor, unknown_threshold
            )
        else:
            segmented.labels = segment(segmented.pixels, model, processor)

    def write(segmented: Segmented) -> None:
        write_image_results(segmented, output, drawing, settings)
        segmented.counts = count_pixels(segmented.labels, max(drawing.classes) + 1)
        segmented.pixels = segmented.labels = np.empty(0)
        segmented.confidence = None

    with images_at_once(model) as together:
        images: Iterable[Segmented] = in_order(_step(read), map(Segmented, sources), threads=1, ahead=READ_AHEAD)
        if together == 1:
            images = map(_step(run_model), images)
        else:
            images = in_order(_step(run_model), images, threads=together, ahead=together)
        yield from in_order(_step(write), images, threads=1, ahead=WRITE_BEHIND)


def _step(function: Callable[[Segmented], None]) -> Callable[[Segmented], Segmented]:
    """A step that passes on images that were skipped before, and records the reason if it fails."""

    def run(segmented: Segmented) -> Segmented:
        if segmented.error is None and not segmented.is_done:
            try:
                function(segmented)
            except Exception as error:
                if not is_expected(error):
                    raise
                segmented.error = one_line(error)
        return segmented

    return run
