"""Small videos, written by PyAV, for the tests of `mfuser segment`."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LEVELS = (0, 128, 255)  # of the classes of the stand-in model: dark, medium, bright


def moving_bar(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Class ids of a frame: a bright bar that moves right by 4 pixels a frame, on grey above dark."""
    classes = np.zeros((height, width), dtype=np.uint8)
    classes[: height // 2] = 1
    left = 4 * number % (width - 8)
    classes[:, left : left + 8] = 2
    return classes


def picture(classes: np.ndarray) -> np.ndarray:
    """The RGB picture in which the stand-in model finds `classes`."""
    return np.repeat(np.array(LEVELS, dtype=np.uint8)[classes][..., None], 3, axis=-1)


def write_video(
    path: Path,
    frames: list[np.ndarray],
    rate: Fraction = Fraction(25),
    times: list[int] | None = None,
    time_base: Fraction | None = None,
    sound: str | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    **options: str,
) -> None:
    """
    Writes the RGB pictures `frames` to `path`.

    Args:
        times (`list[int]`, *optional*):
            When each is shown, in units of `time_base`; by default evenly.
        sound (`str`, *optional*):
            Codec of an audio track with a tone, which is added.
        codec, pix_fmt (`str`):
            How pictures are encoded.
        options (`str`):
            Of the container.
    """
    time_base = time_base or 1 / rate
    with av.open(str(path), "w", options=options) as container:
        quality = {"crf": "4", "g": "6"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options=quality)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = time_base
        times = list(range(len(frames))) if times is None else times
        if sound is not None:
            add_tone(container, sound, seconds=float((times[-1] + 1) * time_base))
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels).reformat(format=pix_fmt)
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def add_tone(container, codec: str, seconds: float) -> None:
    """Adds a tone of 440 Hz as the next stream."""
    stream = container.add_stream(codec, rate=48_000)
    stream.layout = "mono"
    tone = np.sin(2 * np.pi * 440 / 48_000 * np.arange(int(48_000 * seconds), dtype=np.float32))
    size = stream.codec_context.frame_size or 1024
    for start in range(0, len(tone) - size + 1, size):
        samples = tone[None, start : start + size]
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48_000, start
        for resampled in av.AudioResampler(stream.codec_context.format, "mono", 48_000).resample(frame):
            container.mux(stream.encode(resampled))
    container.mux(stream.encode(None))


def read_video(path: Path) -> tuple[list[np.ndarray], list[Fraction], list[bytes]]:
    """The RGB pictures of a video as they are stored, their times in seconds, and its packets of sound."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        pictures = [frame.to_ndarray(format="rgb24") for frame in frames]
        times = [frame.pts * stream.time_base for frame in frames]
    with av.open(str(path)) as container:
        sound = [bytes(packet) for packet in container.demux(container.streams.audio) if packet.size]
    return pictures, times, sound


def rotate_clockwise(path: Path) -> None:
    """Marks an MP4 file as rotated by 90 degrees clockwise for display, as phones do."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    matrix = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    content[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(content)
