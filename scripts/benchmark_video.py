"""Images and videos through `mfuser segment`, to be measured: one by one, overlapped, and as one video."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.loading import load_for_inference
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.scripts import palettes
from mfuser.scripts.arguments import DEFAULT_MODEL
from mfuser.scripts.benchmark_measuring import in_turns
from mfuser.scripts.segment_arguments import DEFAULT_RATE
from mfuser.scripts.segment_images import read_image, segment_images
from mfuser.scripts.segment_inputs import Kind, Source
from mfuser.scripts.segment_results import Drawing, Job, Segmented, write_image_results
from mfuser.scripts.segment_video import segment_video
from mfuser.scripts.segmentation import segment
from mfuser.scripts.video import NumberedFrames, VideoWriter

NUM_FRAMES = 48
SIZES = ((360, 480), (720, 960))


def frame(index: int, height: int, width: int) -> np.ndarray:
    """A smooth picture with the noise of a camera, RGB, that moves from frame to frame."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (9, 24, 3), dtype=np.uint8)
    left = index * 12 / NUM_FRAMES
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC, box=(left, 0, left + 12, 9))
    noisy = np.asarray(picture, dtype=np.int16) + rng.integers(-6, 7, (height, width, 1))
    return noisy.clip(0, 255).astype(np.uint8)


@contextmanager
def segment_candidates(device: str, size: tuple[int, int]) -> Iterator[dict[str, Callable[[], object]]]:
    """
    The ways to segment the same frames with the demonstration model.

    Args:
        device (`str`):
            Where the model runs.
        size (`tuple[int, int]`):
            (height, width) of the frames.

    Returns:
        `Iterator[dict[str, Callable]]`: Each segments all frames and writes the results: `one by one`, reading, the
        model and writing in turn; `images`, as `mfuser segment` does it; `video`, as it does with the frames as MP4.
    """
    model, processor = load_for_inference(DEFAULT_MODEL, torch.device(device))
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    with tempfile.TemporaryDirectory(prefix="mfuser-benchmark-") as temporary:
        folder = Path(temporary)
        drawing = Drawing(dict(enumerate(names)), palettes.class_colours(names), alpha=0.5)
        job = Job(model, processor, folder / "out", drawing)
        images = tuple(folder / f"{index:03}.jpg" for index in range(NUM_FRAMES))
        for index, path in enumerate(images):
            Image.fromarray(frame(index, *size)).save(path, quality=92)
        sources = [Source(Kind.IMAGE, Path(path.stem), path) for path in images]
        video = Source(Kind.VIDEO, Path("video"), folder / "video.mp4")
        frames = NumberedFrames(Source(Kind.FRAMES, Path(), frames=images), DEFAULT_RATE, np.asarray)
        with open(video.path, "wb") as stream:
            writer = VideoWriter(stream, frames, size)
            for index in range(NUM_FRAMES):
                writer.write(frame(index, *size), index)
            writer.close()

        def one_by_one() -> None:
            for source in sources:
                write_image_results(segmented(source, model, processor), job)

        def overlapped() -> None:
            for result in segment_images(sources, job):
                assert result.error is None, result.error

        def as_video() -> None:
            segment_video(video, job, threading.Event())

        yield {"one by one": one_by_one, "images": overlapped, "video": as_video}


def segmented(source: Source, model: MFuserForSemanticSegmentation, processor: MFuserImageProcessor) -> Segmented:
    """An image, read and segmented."""
    pixels = read_image(source.path, processor)
    return Segmented(source, pixels, segment(pixels, model, processor))


def benchmark_video(options: Any) -> list[dict]:
    """
    Measures `mfuser segment` with the demonstration model: images one by one, overlapped, and as one video.

    Args:
        options (`argparse.Namespace`):
            Those of the command.
    """
    rows = []
    for size in SIZES:
        with segment_candidates(options.device, size) as candidates:
            seconds = in_turns(candidates, options.rounds, options.device)
        for name, value in seconds.items():
            row = {"frames": f"{size[1]} x {size[0]}", "segmented": name, "frames/s": NUM_FRAMES / value}
            rows.append(row | {"speedup over one by one": seconds["one by one"] / value})
    return rows
