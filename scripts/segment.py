"""`mfuser segment`: segments images and videos, and writes colour overlays, labels and a legend."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mfuser.confidence_mfuser import UNKNOWN, check_threshold
from mfuser.errors import CommandError, is_expected, one_line
from mfuser.files import make_folder
from mfuser.loading import load_for_inference
from mfuser.quantization import quantize
from mfuser.scripts import cli, palettes
from mfuser.scripts.segment_arguments import DEFAULT_RATE, parse_arguments
from mfuser.scripts.segment_images import segment_images
from mfuser.scripts.segment_inputs import Kind, Source, find_sources
from mfuser.scripts.segment_results import Drawing, Job, image_files, is_done, is_free, settings_of, write_legend
from mfuser.scripts.segment_score import read_labels, score
from mfuser.scripts.segment_video import VideoResult, segment_video, stopping_on_signals
from mfuser.scripts.video import import_av


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
        num_classes (`int`):
            Number of label values.
        skipped (`int`):
            Number of inputs that were skipped before.
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

    def add_video(self, source: Source, result: VideoResult) -> None:
        self.add(source, result.counts)
        print(f"{source}: {result.frames} frames{', stopped' if result.was_stopped else ''}")
        if result.note:
            print(f"{source}: {result.note}", file=sys.stderr)
        if result.problem:
            print(f"incomplete {source}: {result.problem}; the frames read are kept", file=sys.stderr)
            self.incomplete += 1

    def print(self, classes: dict[int, str], output: Path) -> None:
        if self.counts.any():
            print(share_table(list(classes.values()), self.counts[list(classes)]))
        parts = [f"segmented: {self.segmented}", f"skipped: {self.skipped}"]
        if self.incomplete:
            parts[0] += f" (incomplete: {self.incomplete})"
        if self.done:
            parts.append(f"already done: {self.done}")
        print(f"{', '.join(parts)}, results in {output}")


def check_options(parsed: argparse.Namespace, sources: list[Source]) -> None:
    """Raises `CommandError` if an option has no effect on any of the sources, or if videos cannot be read."""
    kinds = {source.kind for source in sources}
    if Kind.IMAGE not in kinds:
        for option in ("confidence", "panel"):
            if getattr(parsed, option):
                raise CommandError(f"--{option} applies to images, but the inputs are videos")
    if parsed.labels is not None and (kinds != {Kind.IMAGE} or len(sources) > 1):
        raise CommandError(f"--labels applies to one image, but the inputs are {len(sources)} images or videos")
    if kinds == {Kind.IMAGE} and parsed.smoothing:
        raise CommandError("--smoothing applies to videos, but the inputs are images; give frames as a pattern")
    if parsed.frame_rate is not None and Kind.FRAMES not in kinds:
        raise CommandError("--frame-rate applies to numbered frames; give them as a pattern, such as frames/%05d.png")
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
        classes[UNKNOWN] = palettes.UNKNOWN_NAME
        colours = palettes.label_colours(class_names)
    drawing = Drawing(
        classes, colours, parsed.alpha, parsed.confidence, parsed.panel, is_calibrated=settings["is_calibrated"]
    )
    truth = None if parsed.labels is None else read_labels(parsed.labels, sources[0].path, len(class_names))
    job = Job(model, processor, parsed.output, drawing, settings, threshold)
    make_folder(parsed.output)
    write_legend(parsed.output, drawing)

    summary = Summary(max(classes) + 1, len(problems))
    images = [source for source in sources if source.kind is Kind.IMAGE]
    segmented = segment_images(images, job, parsed.skip_existing)
    for image in tqdm(segmented, desc="segmenting", unit="image", total=len(images), disable=not images):
        if image.error is not None:
            summary.skip(image.source, image.error)
        elif image.is_done:
            summary.done += 1
        else:
            summary.add(image.source, image.counts)
    videos = [source for source in sources if source.kind is not Kind.IMAGE]
    was_stopped = run_videos(videos, job, parsed, summary)
    summary.print(classes, parsed.output)
    if truth is not None and not summary.skipped:
        print(score(image_files(parsed.output / sources[0].place)["labels"], truth, len(class_names)))
    if was_stopped:
        print("mfuser segment: interrupted; the files of the last video are complete up to there", file=sys.stderr)
        return cli.INTERRUPTED
    return 1 if summary.skipped or summary.incomplete else 0


def run_videos(sources: Iterable[Source], job: Job, parsed: argparse.Namespace, summary: Summary) -> bool:
    """Segments videos. Returns whether a signal ended one before its end."""
    rate = parsed.frame_rate or DEFAULT_RATE
    for source in sources:
        settings = {**job.settings, "smoothing": parsed.smoothing}
        if source.kind is Kind.FRAMES:
            settings["frame_rate"] = str(rate)
        video_job = replace(job, settings=settings)
        if parsed.skip_existing and is_done(source, video_job):
            summary.done += 1
            continue
        with stopping_on_signals() as stop:
            try:
                summary.add_video(source, segment_video(source, video_job, stop, parsed.smoothing, rate))
            except Exception as error:
                if not is_expected(error):
                    raise
                summary.skip(source, one_line(error))
        if stop.is_set() and not source.kind.is_live:  # a signal ends a live source, and the next one follows
            return True
    return False
