"""Reading and writing of frames and audio: video files and URLs by PyAV, numbered images by PIL, cameras by OpenCV."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from mfuser.errors import CommandError, is_expected, one_line
from mfuser.scripts.segment_arguments import DEFAULT_RATE
from mfuser.scripts.segment_inputs import Kind, Source

# Audio codecs that an MP4 file can hold; Matroska can hold any.
MP4_SOUND = {"aac", "ac3", "alac", "eac3", "flac", "mp3", "mp3float", "opus"}  # names of FFmpeg's decoders
MISSING_SECONDS = 1.0  # a video that ends earlier than its header says, by more than this, is truncated
NETWORK_TIMEOUT = (20.0, 20.0)  # seconds to open a stream, and without data
CAMERA_TIME_BASE = Fraction(1, 90_000)
ENCODER, ENCODER_OPTIONS = "libx264", {"preset": "veryfast", "crf": "18"}
ITU709 = 1  # the code of this colour space, of its primaries and of its transfer function in a video


def import_av() -> ModuleType:
    """Imports PyAV. Raises `CommandError` if it is not installed."""
    try:
        import av
    except ModuleNotFoundError:
        raise CommandError('videos need the package av: pip install "mfuser[video]"') from None
    return av


@dataclass(frozen=True)
class Frame:
    """
    A frame of a video.

    Args:
        pixels (`np.ndarray` of shape `(3, height, width)`):
            RGB, of uint8, upright.
        time (`int`):
            When it is shown, in units of the video's `time_base`.
    """

    pixels: np.ndarray
    time: int


class Video:
    """
    A video that is read once, from start to end.

    Attributes:
        time_base (`Fraction`):
            Unit of time of the frames, in seconds.
        rate (`Fraction`):
            Frames per second, on average.
        num_frames (`int`, *optional*):
            Number of frames, if the source says.
        pixel_aspect (`Fraction`):
            Width of a pixel in relation to its height.
        sound (`list`):
            PyAV's audio streams, whose packets are part of the iteration.
        note (`str`):
            What is left out, if anything.
        problem (`str`):
            What was found wrong after the iteration, if anything.
    """

    time_base: Fraction
    rate: Fraction
    num_frames: int | None = None
    pixel_aspect = Fraction(1)
    sound: list[Any]
    note = ""
    problem = ""

    def __iter__(self) -> Iterator[Any]:
        """Yields every [`Frame`], and every audio packet in between."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the file or the device."""


def open_video(source: Source, rate: Fraction, read_image: Callable[[Any], np.ndarray]) -> Video:
    """
    Opens a video of any kind.

    Args:
        source (`Source`):
            The video.
        rate (`Fraction`):
            Frames per second of numbered frames.
        read_image (`Callable`):
            Reads the file of a numbered frame as uint8 RGB of shape (3, H, W).

    Raises:
        CommandError: If a package is not installed.
        OSError, ValueError: If it cannot be opened or holds no video.
    """
    if source.kind is Kind.FRAMES:
        return NumberedFrames(source, rate, read_image)
    if source.kind is Kind.CAMERA:
        return Camera(int(source.given))
    return StoredVideo(str(source.path.absolute()) if source.kind is Kind.VIDEO else source.given, source.kind.is_live)


class StoredVideo(Video):
    """
    A video file, or a stream at a URL.

    Args:
        location (`str`):
            Path or URL.
        is_live (`bool`):
            Whether waiting for data is bounded.
    """

    def __init__(self, location: str, is_live: bool):
        self.av = import_av()
        try:
            self.container = self.av.open(location, timeout=NETWORK_TIMEOUT if is_live else None)
        except self.av.error.FFmpegError as error:
            # Not its own message, which contains the URL with its password.
            problem = "cannot be opened" if isinstance(error, OSError) else "is not a video that can be read"
            raise ValueError(f"it {problem}: {error.strerror}") from error
        cover = self.av.stream.Disposition.attached_pic
        streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not streams:
            self.container.close()
            raise ValueError("it contains no video, only audio or other data")
        self.stream = streams[0]
        if self.stream.codec_context is None:
            self.container.close()
            raise ValueError("its video is encoded in a way that FFmpeg does not know")
        self.stream.thread_type = "AUTO"
        self.time_base = self.stream.time_base or Fraction(1, 1000)
        self.rate = self.stream.average_rate or self.stream.guessed_rate or DEFAULT_RATE
        self.pixel_aspect = self.stream.sample_aspect_ratio or Fraction(1)
        tracks = self.container.streams.audio
        self.sound = [track for track in tracks if track.codec_context is not None]
        if len(self.sound) < len(tracks):
            self.note = f"{len(tracks) - len(self.sound)} audio tracks of an unknown codec are left out"
        duration = self.container.duration
        self.seconds = duration / self.av.time_base if duration and not is_live else None
        self.stated_packets = self.stream.frames or None
        self.num_frames = self.stated_packets
        if self.num_frames is None and self.seconds:
            self.num_frames = max(1, round(self.seconds * self.rate))
        # Streams often start at an arbitrary time. A negative one belongs to audio that is not played.
        self.start = Fraction(max(self.container.start_time or 0, 0), self.av.time_base)

    def __iter__(self) -> Iterator[Any]:
        damaged, packets, frames, last, end = 0, 0, 0, -1, Fraction(0)
        one_frame = max(1, round(1 / (self.rate * self.time_base)))
        trouble = ""
        demuxed = self.container.demux(self.stream, *self.sound)
        while True:
            try:
                packet = next(demuxed)
            except StopIteration:
                break
            except self.av.error.FFmpegError as error:
                trouble = f"reading fails after {frames} frames: {error.strerror}"
                break
            if packet.pts is not None and packet.time_base:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream is not self.stream:
                if packet.dts is not None and packet.pts is not None:
                    shift = round(self.start / packet.time_base)
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                    yield packet
                continue
            packets += packet.size > 0
            damaged += packet.is_corrupt
            try:
                decoded = packet.decode()
            except self.av.error.FFmpegError:
                damaged += not packet.is_corrupt
                continue
            for frame in decoded:
                time_shown = last + one_frame if frame.pts is None else frame.pts - self._shift()
                last = max(time_shown, last + 1)
                quarter_turns = round(frame.rotation / 90) % 4
                if frames == 0 and quarter_turns % 2:
                    self.pixel_aspect = 1 / self.pixel_aspect
                frames += 1
                damaged += frame.is_corrupt and not packet.is_corrupt
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns)
                yield Frame(pixels.transpose(2, 0, 1), last)
        missing = self.stated_packets is not None and packets < self.stated_packets
        if not missing and self.stated_packets is None and self.seconds and self._states_its_length():
            missing = end - self.start < self.seconds - MISSING_SECONDS
        if trouble:
            self.problem = trouble
        elif missing:
            of = f" of {self.num_frames}" if self.num_frames else ""
            self.problem = f"it is truncated: it ends after {frames}{of} frames"
        elif damaged:
            self.problem = f"{damaged} of its frames are damaged"
        if frames == 0:
            raise ValueError(f"it contains no frame that can be decoded{f'; {self.problem}' if self.problem else ''}")

    def _shift(self) -> int:
        return round(self.start / self.time_base)

    def _states_its_length(self) -> bool:
        return "matroska" in self.container.format.name

    def close(self) -> None:
        self.container.close()


class NumberedFrames(Video):
    """
    Numbered images, in the order of their numbers. One that cannot be read is left out.

    Args:
        source (`Source`):
            The frames.
        rate (`Fraction`):
            Frames per second.
        read_image (`Callable`):
            Reads an image.
    """

    def __init__(self, source: Source, rate: Fraction, read_image: Callable[[Any], np.ndarray]):
        import_av()  # needed for the overlay
        self.files, self.read_image = source.frames, read_image
        self.num_frames, self.rate, self.time_base, self.sound = len(self.files), rate, 1 / rate, []

    def __iter__(self) -> Iterator[Frame]:
        unread: list[str] = []
        for index, file in enumerate(self.files):
            try:
                pixels = self.read_image(file)
            except Exception as error:
                if not is_expected(error):
                    raise
                unread.append(f"{file.name}: {one_line(error)}")
                continue
            yield Frame(pixels, index)
        if unread:
            more = f", and {len(unread) - 1} more" if len(unread) > 1 else ""
            self.problem = f"frames that cannot be read are left out: {unread[0]}{more}"
        if len(unread) == len(self.files):
            raise ValueError(f"it contains no frame that can be decoded; {self.problem}")


class Camera(Video):
    """
    A camera, by OpenCV: PyAV's wheels contain no devices. A frame has the time at which it was read.

    Args:
        index (`int`):
            Number of the camera.
    """

    def __init__(self, index: int):
        import_av()  # needed for the overlay
        try:
            import cv2
        except ModuleNotFoundError:
            raise CommandError('cameras need the package opencv: pip install "mfuser[camera]"') from None
        self.capture = cv2.VideoCapture(index)
        if not self.capture.isOpened():
            raise ValueError(f"camera {index} cannot be opened")
        stated = self.capture.get(cv2.CAP_PROP_FPS)
        self.rate = Fraction(stated).limit_denominator(1001) if stated > 0 else DEFAULT_RATE
        self.time_base, self.sound = CAMERA_TIME_BASE, []

    def __iter__(self) -> Iterator[Frame]:
        start, last = time.monotonic(), -1
        while True:
            found, pixels = self.capture.read()
            if not found:
                self.problem = "the camera gives no more frames"
                break
            last = max(last + 1, round((time.monotonic() - start) / self.time_base))
            yield Frame(np.ascontiguousarray(pixels[..., ::-1]).transpose(2, 0, 1), last)
        if last < 0:
            raise ValueError("the camera gives no frame")

    def close(self) -> None:
        self.capture.release()


def container_format(video: Video) -> str:
    """`mp4`, or `matroska` if MP4 cannot hold the audio."""
    return "mp4" if all(stream.codec_context.name in MP4_SOUND for stream in video.sound) else "matroska"


class VideoWriter:
    """
    Writes an H.264 video with the same timestamps and the same audio as another video.

    A picture of another size than the first is resized to it. As H.264 halves the resolution of colours, an odd width
    or height grows by one pixel, which repeats the last.

    Args:
        stream (`BinaryIO`):
            Where to write; it must be seekable.
        video (`Video`):
            The video, whose timestamps and audio are kept.
        size (`tuple[int, int]`):
            (height, width) of the first picture.
    """

    def __init__(self, stream: BinaryIO, video: Video, size: tuple[int, int]):
        self.av = import_av()
        self.container = self.av.open(stream, "w", format=container_format(video))
        height, width = (side + side % 2 for side in size)
        self.stream = self.container.add_stream(ENCODER, rate=video.rate, options=ENCODER_OPTIONS)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        self.stream.time_base = self.stream.codec_context.time_base = video.time_base
        context = self.stream.codec_context
        context.sample_aspect_ratio = video.pixel_aspect
        context.colorspace = context.color_primaries = context.color_trc = ITU709
        self.time_base = video.time_base
        self.sound = {track.index: self.container.add_stream_from_template(track) for track in video.sound}

    def write(self, picture: np.ndarray, time_shown: int) -> None:
        """Encodes an RGB picture of shape (height, width, 3)."""
        frame = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(_even(picture)))
        frame = frame.reformat(
            self.stream.width, self.stream.height, format="yuv420p", src_colorspace="ITU709", dst_colorspace="ITU709"
        )
        frame.pts, frame.time_base = time_shown, self.time_base
        self.container.mux(self.stream.encode(frame))

    def copy(self, packet: Any) -> None:
        """Copies an audio packet."""
        packet.stream = self.sound[packet.stream.index]
        self.container.mux(packet)

    def close(self) -> None:
        """Writes the frames that the encoder has buffered, and the index."""
        self.container.mux(self.stream.encode(None))
        self.container.close()


def _even(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
