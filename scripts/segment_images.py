"""`mfuser segment` on images: the next are read, and results of earlier ones written, while the model runs."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mfuser.errors import is_expected, one_line
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.overlap import in_order, model_threads
from mfuser.scripts.segment_inputs import Source
from mfuser.scripts.segment_results import Job, Segmented, is_done, write_image_results
from mfuser.scripts.segmentation import count_pixels, segment, segment_with_confidence

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


def segment_images(sources: Iterable[Source], job: Job, skip_existing: bool = False) -> Iterator[Segmented]:
    """
    Segments images and writes their results.

    Reading, the model and writing run concurrently, in threads; a small model segments several images in parallel, see
    [`~mfuser.overlap.model_threads`]. The number of images in memory is bounded.

    Args:
        sources (`Iterable[Source]`):
            The images.
        job (`Job`):
            The model, and how and where results are written.
        skip_existing (`bool`, *optional*, defaults to `False`):
            Whether to leave out images whose results exist.

    Returns:
        `Iterator[Segmented]`: Each image, in the order of `sources`, with the counts of its classes, with the reason
        why it was skipped, or with `is_done`.
    """
    drawing = job.drawing
    needs_confidence = drawing.confidence or drawing.panel or job.unknown_threshold is not None

    def read(segmented: Segmented) -> None:
        if skip_existing and is_done(segmented.source, job):
            segmented.is_done = True
        else:
            segmented.pixels = read_image(segmented.source.path, job.processor)

    def run_model(segmented: Segmented) -> None:
        if needs_confidence:
            segmented.labels, segmented.confidence = segment_with_confidence(
                segmented.pixels, job.model, job.processor, job.unknown_threshold
            )
        else:
            segmented.labels = segment(segmented.pixels, job.model, job.processor)

    def write(segmented: Segmented) -> None:
        write_image_results(segmented, job)
        segmented.counts = count_pixels(segmented.labels, max(drawing.classes) + 1)
        segmented.pixels = segmented.labels = np.empty(0)
        segmented.confidence = None

    with model_threads(job.model) as threads:
        images: Iterable[Segmented] = in_order(_step(read), map(Segmented, sources), threads=1, ahead=READ_AHEAD)
        if threads == 1:
            images = map(_step(run_model), images)
        else:
            images = in_order(_step(run_model), images, threads=threads, ahead=threads)
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
