"""`mfuser segment` on videos: frames are decoded, segmented and encoded concurrently, in bounded memory."""

import json
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mfuser.files import atomic_writer, make_folder, write_text
from mfuser.overlap import in_order, model_threads, read_ahead
from mfuser.scripts import palettes
from mfuser.scripts.label_archive import LabelArchive
from mfuser.scripts.segment_arguments import DEFAULT_RATE
from mfuser.scripts.segment_images import read_image
from mfuser.scripts.segment_inputs import Source
from mfuser.scripts.segment_results import Job, check_still_free, record_of, source_hash, video_files
from mfuser.scripts.segmentation import (
    class_scores,
    count_pixels,
    frames_at_once,
    labels_of_scores,
    segment,
)
from mfuser.scripts.video import Frame, Video, VideoWriter, container_format, open_video

FRAMES_AHEAD = 4  # that are decoded before the model needs them


@dataclass
class Batch:
    """Frames of one size, the audio packets that precede the last of them, and the results of the model."""

    frames: list[Frame] = field(default_factory=list)
    packets: list[Any] = field(default_factory=list)
    scores: torch.Tensor | None = None
    labels: list[np.ndarray] = field(default_factory=list)


@dataclass
class VideoResult:
    """
    What was segmented of a video.

    Args:
        frames (`int`):
            Number of frames.
        counts (`np.ndarray`):
            Number of pixels by class id.
        note (`str`):
            What was left out, if anything.
        problem (`str`):
            What is wrong with the video, if anything.
        was_stopped (`bool`):
            Whether a signal ended it early.
    """

    frames: int
    counts: np.ndarray
    note: str
    problem: str
    was_stopped: bool


@contextmanager
def stopping_on_signals() -> Iterator[threading.Event]:
    """
    An event that Ctrl-C and SIGTERM set within the block, so that files can be finished. A second one interrupts.

    In a thread other than the main one, which cannot handle signals, the event is never set.
    """
    stop = threading.Event()

    def handle(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nfinishing the files; interrupt again to discard them", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def segment_video(
    source: Source, job: Job, stop: threading.Event, smoothing: float = 0.0, rate: Fraction = DEFAULT_RATE
) -> VideoResult:
    """
    Segments a video and writes its overlay, its label maps and its record.

    The memory in use does not grow with the number of frames.

    Args:
        source (`Source`):
            The video.
        job (`Job`):
            The model, and how and where results are written.
        stop (`threading.Event`):
            Ends the video at the next frame.
        smoothing (`float`, *optional*, defaults to 0.0):
            Weight of earlier frames in the scores, from 0 to less than 1.
        rate (`Fraction`, *optional*, defaults to 25):
            Frames per second of numbered frames.

    Returns:
        `VideoResult`: What was segmented.

    Raises:
        OSError, ValueError: If the video cannot be opened, a frame of it cannot be segmented or a file not be written.
            The results of an earlier run are kept.
    """
    with (
        closing(open_video(source, rate, partial(read_image, processor=job.processor))) as video,
        ExitStack() as files,
    ):
        results = VideoResults(source, video, job, files)
        finish = _Finisher(job, smoothing, results)
        run_model = partial(_run_model, job=job, keeps_scores=smoothing > 0)
        with ExitStack() as workers:  # they end before the files are closed
            threads = workers.enter_context(model_threads(job.model))
            progress = workers.enter_context(
                tqdm(total=video.num_frames, desc=source.place.name, unit="frame", dynamic_ncols=True)
            )
            items = workers.enter_context(closing(read_ahead(_until(stop, video), FRAMES_AHEAD)))
            batches: Iterable[Batch] = _batches(items, job, source.kind.is_live)
            if threads == 1:
                batches = map(run_model, batches)
            else:
                batches = workers.enter_context(closing(in_order(run_model, batches, threads, ahead=threads)))
            # One thread: smoothing, the encoder and the archive need the frames in order.
            for number in workers.enter_context(closing(in_order(finish, batches, threads=1, ahead=1))):
                progress.update(number)
        result = VideoResult(finish.frames, finish.counts, video.note, video.problem, stop.is_set())
        results.finish(result)
    return result


def _until(stop: threading.Event, video: Video) -> Iterator[Any]:
    for item in video:
        yield item
        if stop.is_set():
            return


def _batches(items: Iterable[Any], job: Job, is_live: bool) -> Iterator[Batch]:
    """Groups frames of one size that are segmented in one forward pass, with the audio packets in between."""
    batch, number = Batch(), 1
    for item in items:
        if not isinstance(item, Frame):
            batch.packets.append(item)
            continue
        if batch.frames and item.pixels.shape != batch.frames[0].pixels.shape:
            yield batch
            batch = Batch()
        batch.frames.append(item)
        if len(batch.frames) == 1:
            # Waiting for more frames of a live stream would delay it.
            number = 1 if is_live else frames_at_once(item.pixels.shape[1:], job.model, job.processor)
        if len(batch.frames) == number:
            yield batch
            batch = Batch()
    if batch.frames or batch.packets:
        yield batch


def _run_model(batch: Batch, job: Job, keeps_scores: bool) -> Batch:
    pixels = [frame.pixels for frame in batch.frames]
    if not pixels:
        return batch
    if keeps_scores:
        batch.scores = class_scores(pixels, job.model, job.processor)
    elif len(pixels) == 1 and job.unknown_threshold is None:
        batch.labels = [segment(pixels[0], job.model, job.processor)]
    else:
        scores = class_scores(pixels, job.model, job.processor)
        batch.labels = [_labels(of_frame, pixels[0].shape[1:], job) for of_frame in scores]
    return batch


def _labels(scores: torch.Tensor, size: tuple[int, int], job: Job) -> np.ndarray:
    return labels_of_scores(scores, size, job.model.config.confidence_temperature, job.unknown_threshold)


class _Finisher:
    """Smooths scores, draws overlays and writes both files, frame by frame."""

    def __init__(self, job: Job, smoothing: float, results: "VideoResults"):
        self.job, self.smoothing, self.results = job, smoothing, results
        self.smoothed: torch.Tensor | None = None
        self.frames, self.counts = 0, np.zeros(max(job.drawing.classes) + 1, dtype=np.int64)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> int:
        for packet in batch.packets:
            self.results.copy(packet)
        for index, frame in enumerate(batch.frames):
            size = frame.pixels.shape[1:]
            if batch.scores is None:
                labels = batch.labels[index]
            else:
                labels = _labels(self._smooth(batch.scores[index]), size, self.job)
            self.counts += count_pixels(labels, len(self.counts))
            self.results.write(frame, labels)
            self.frames += 1
        return len(batch.frames)

    def _smooth(self, scores: torch.Tensor) -> torch.Tensor:
        """Exponential moving average; a frame of another size starts a new one."""
        if self.smoothed is None or self.smoothed.shape != scores.shape:
            self.smoothed = scores.float().clone()
        else:
            self.smoothed.lerp_(scores.float(), 1 - self.smoothing)
        return self.smoothed


class VideoResults:
    """
    The files of a video. They are opened at the first frame, and replace earlier ones together once they are complete.

    Args:
        source (`Source`):
            The video.
        video (`Video`):
            The open video.
        job (`Job`):
            How and where results are written.
        stack (`ExitStack`):
            Closes the files; if an exception is raised in its block, it deletes them.
    """

    def __init__(self, source: Source, video: Video, job: Job, stack: ExitStack):
        self.source, self.video, self.drawing, self.stack = source, video, job.drawing, stack
        self.output = job.output
        self.files = video_files(job.output / source.place)
        self.record = record_of(source, job.settings)
        self.waiting: list[Any] = []  # audio packets before the first frame
        self.writer: VideoWriter | None = None

    def _open(self, frame: Frame) -> None:
        make_folder(self.files["record"].parent)
        check_still_free(self.source, self.output)
        if not self.files["record"].exists():
            self._write_record(complete=False)  # the files next to it belong to this video
        self.format = container_format(self.video)
        stream = self.stack.enter_context(atomic_writer(self.files[self.format]))
        labels = self.stack.enter_context(atomic_writer(self.files["labels"]))
        self.archive = self.stack.enter_context(closing(LabelArchive(labels)))
        self.writer = VideoWriter(stream, self.video, frame.pixels.shape[1:])
        for packet in self.waiting:
            self.writer.copy(packet)
        self.waiting = []

    def _write_record(self, complete: bool, **entries: Any) -> None:
        record = {
            "source": source_hash(self.source),
            "complete": complete,
            **entries,
            "record": json.loads(self.record),
        }
        write_text(self.files["record"], json.dumps(record, indent=2) + "\n")

    def copy(self, packet: Any) -> None:
        """Copies an audio packet."""
        if self.writer is None:
            self.waiting.append(packet)
        else:
            self.writer.copy(packet)

    def write(self, frame: Frame, labels: np.ndarray) -> None:
        """Writes the overlay and the labels of a frame."""
        if self.writer is None:
            self._open(frame)
        assert self.writer is not None
        image = Image.fromarray(frame.pixels.transpose(1, 2, 0))
        overlay = palettes.overlay(image, labels, self.drawing.colours, self.drawing.alpha)
        self.writer.write(np.asarray(overlay), frame.time)
        self.archive.write(labels.astype(np.uint8), float(frame.time * self.video.time_base))

    def finish(self, result: VideoResult) -> None:
        """
        Finishes the files. The record says that they are complete only after both are in place.

        Raises:
            ValueError: If there was no frame.
        """
        if self.writer is None:
            raise ValueError("it was stopped before its first frame")
        self.writer.close()
        self.archive.close()
        self._write_record(complete=False)
        self.stack.close()
        for kind in {"mp4", "matroska"} - {self.format}:
            self.files[kind].unlink(missing_ok=True)  # of an earlier run, with audio of another codec
        shares = result.counts / result.counts.sum()
        self._write_record(
            complete=not (result.problem or result.was_stopped),
            frames=result.frames,
            overlay=self.files[self.format].name,
            frames_per_second=float(self.video.rate),
            problem=result.problem or ("stopped" if result.was_stopped else ""),
            shares={name: round(float(shares[index]), 6) for index, name in self.drawing.classes.items()},
        )


__all__ = ["VideoResult", "segment_video", "stopping_on_signals"]
