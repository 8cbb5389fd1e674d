"""The inputs of `mfuser segment` (images, videos, numbered frames, cameras, URLs) and the names of results."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from PIL import Image

IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
}  # fmt: skip
VIDEO_SUFFIXES = {
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm",
    ".wmv",
}  # fmt: skip
NUMBER = re.compile(r"%0?\d*d")


class Kind(Enum):
    """The kind of an input."""

    IMAGE = "image"
    VIDEO = "video"
    FRAMES = "frames"  # numbered images that are the frames of one video
    CAMERA = "camera"
    URL = "URL"

    @property
    def is_live(self) -> bool:
        """Whether its end is unknown."""
        return self in (Kind.CAMERA, Kind.URL)


@dataclass(frozen=True)
class Source:
    """
    An image, or a video of any kind, to segment.

    Args:
        kind (`Kind`):
            The kind of the source.
        place (`Path`):
            Path of its results, relative to the folder of the results and without suffix.
        path (`Path`, *optional*):
            The file of an image or a video.
        given (`str`, *optional*):
            The pattern, index or URL of any other source.
        frames (`tuple[Path, ...]`, *optional*):
            The files of numbered frames.
    """

    kind: Kind
    place: Path
    path: Path = Path()
    given: str = field(default="", repr=False)  # it may hold a password
    frames: tuple[Path, ...] = ()

    def __str__(self) -> str:
        match self.kind:
            case Kind.IMAGE | Kind.VIDEO:
                return str(self.path)
            case Kind.CAMERA:
                return f"camera {self.given}"
            case _:
                return re.sub(r"(?<=://)[^/@]*@", "", self.given)

    def identity(self) -> str:
        """A text that identifies the source. It contains no password, since results record its hash."""
        return str(self.path.resolve()) if self.kind in (Kind.IMAGE, Kind.VIDEO) else str(self)


def find_sources(
    inputs: Sequence[str], output: Path, is_free: Callable[[Source], bool]
) -> tuple[list[Source], list[str]]:
    """
    Finds the images and videos to segment, and names their results.

    Folders are searched recursively for files whose suffix is that of an image or a video. A file that is given by
    name may have any suffix. A file that is found twice is returned once. Files in `output` are results of an earlier
    run and are not returned.

    Args:
        inputs (`Sequence[str]`):
            Files, folders, patterns such as `frames/%05d.png`, indices of cameras, and URLs.
        output (`Path`):
            Folder of the results.
        is_free (`Callable`):
            Whether the results of a source may be written to its `place`.

    Returns:
        `tuple[list[Source], list[str]]`: The sources (results of files in a folder keep their subfolder; duplicate
        names are numbered), and an error message for each input without any.
    """
    sources: list[Source] = []
    problems: list[str] = []
    seen, taken = set(), set()
    output = output.resolve()
    for given in inputs:
        found = _found(given, output)
        if isinstance(found, str):
            problems.append(f"{given}: {found}")
            continue
        for source in found:
            if source.identity() in seen:
                continue
            seen.add(source.identity())
            place, number = source.place, 1
            # Some file systems ignore case.
            while str(source.place).lower() in taken or not is_free(source):
                number += 1
                numbered = place.with_name(f"{place.name}-{number}")
                source = Source(source.kind, numbered, source.path, source.given, source.frames)
            taken.add(str(source.place).lower())
            sources.append(source)
    return sources, problems


def _found(given: str, output: Path) -> list[Source] | str:
    """The sources of one input, or why there are none."""
    path = Path(given)
    if path.is_dir():
        found = [
            Source(_kind_by_suffix(file) or Kind.IMAGE, file.relative_to(path).with_suffix(""), file)
            for file in sorted(path.rglob("*"))
            if _kind_by_suffix(file) and file.is_file() and output not in file.resolve().parents
        ]
        return found or "the folder contains no image and no video"
    if path.is_file():
        return [Source(_kind_by_suffix(path) or _kind_by_content(path), Path(path.stem), path)]
    if re.match(r"[a-z][a-z0-9+.-]+://", given, flags=re.IGNORECASE):
        return [Source(Kind.URL, Path(_file_name(re.split(r"[?#]", given)[0].rstrip("/"))), given=given)]
    if given.isdecimal():
        return [Source(Kind.CAMERA, Path(f"camera-{given}"), given=given)]
    if len(NUMBER.findall(path.name)) == 1 and path.parent.is_dir():
        numbered = re.compile(r"(\d+)".join(map(re.escape, NUMBER.split(path.name))))
        matches = [(numbered.fullmatch(file.name), file) for file in path.parent.iterdir()]
        number_format = NUMBER.findall(path.name)[0]
        files = sorted(
            (int(match[1]), file) for match, file in matches if match and match[1] == number_format % int(match[1])
        )
        name = NUMBER.sub("", path.stem).strip("-_. ") or path.parent.resolve().name or "frames"
        frames = tuple(file for _, file in files)
        return [Source(Kind.FRAMES, Path(name), given=given, frames=frames)] if files else "no file has such a name"
    return "the file or folder does not exist"


def _kind_by_suffix(path: Path) -> Kind | None:
    suffix = path.suffix.lower()
    return Kind.IMAGE if suffix in IMAGE_SUFFIXES else Kind.VIDEO if suffix in VIDEO_SUFFIXES else None


def _kind_by_content(path: Path) -> Kind:
    try:
        with Image.open(path):
            return Kind.IMAGE
    except Exception:  # PIL's decoders raise exceptions of almost any type
        pass
    try:
        import av

        with av.open(str(path.absolute())) as container:
            if container.streams.video and container.format.name != "tty":  # FFmpeg reads text as a terminal recording
                return Kind.VIDEO
    except Exception:  # without PyAV, videos are known by their suffix
        pass
    return Kind.IMAGE  # it cannot be read as an image either, which is reported


def _file_name(address: str) -> str:
    """A file name for the results of a stream: the last part of its URL, without suffix."""
    host, _, path = address.partition("://")[2].rpartition("@")[2].partition("/")
    name = re.sub(r"\.\w{1,5}$", "", path.rpartition("/")[2]) or host
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "stream"
