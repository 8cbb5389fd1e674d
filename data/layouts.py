"""The image/label pairs of an official download, found by the known layouts of its dataset."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mfuser.data.domain import Domain, Layout

# Written next to the labels by the converters of other toolboxes. Only ACDC's download has such files itself.
CONVERTED_LABEL_SUFFIX = "_labelTrainIds.png"


class Pair(NamedTuple):
    """
    An image and its label.

    Args:
        name (`str`):
            The path of the image relative to the top folder of the dataset, with forward slashes. It is unique.
        image (`Path`):
            The image file.
        label (`Path`, *optional*):
            The label file; `None` where labels are not public.
        condition (`str`, *optional*):
            The condition (ACDC).
    """

    name: str
    image: Path
    label: Path | None
    condition: str | None


class Pairs(NamedTuple):
    """The content of one split of a download. Unmatched files and missing folders are relative to the top folder."""

    layout: Layout
    pairs: list[Pair]
    images_without_label: list[str]
    labels_without_image: list[str]
    missing_folders: list[str]


def has_split(domain: Domain, root: str | Path, split: str) -> bool:
    """Whether the download at `root` has images of the split and, where labels are public, labels."""
    return _locate(domain, Path(root), split) is not None


def find_pairs(domain: Domain, root: str | Path, split: str) -> Pairs:
    """
    Lists the image/label pairs of one split, matched by name and sorted. No file is opened.

    Args:
        domain (`Domain`):
            The dataset.
        root (`str` or `Path`):
            The folder in which the official archives were unpacked.
        split (`str`):
            A key of `domain.splits`.

    Returns:
        `Pairs`: The pairs, and what could not be paired.

    Raises:
        FileNotFoundError: If no known layout has both images and labels, or they hold no pair.
        ValueError: If the domain has no such split.
    """
    if split not in domain.splits:
        raise ValueError(f"{domain.title} has no split {split!r}; it has {', '.join(domain.splits) or 'none'}")
    located = _locate(domain, Path(root), split)
    if located is None:
        raise FileNotFoundError(_missing_download(domain, root, split))
    top, layout = located
    labelled = domain.splits[split].labelled
    found = Pairs(layout, [], [], [], [])
    for condition, image_folder, label_folder in _folders(domain, layout, split):
        required = [image_folder, label_folder] if labelled else [image_folder]
        missing = [folder for folder in required if not (top / folder).is_dir()]
        if missing:
            found.missing_folders.extend(missing)
            continue
        images = _files(top / image_folder, layout.image_prefix, layout.image_suffix, layout.recursive)
        labels = {}
        if labelled:
            labels = _files(top / label_folder, layout.label_prefix, layout.label_suffix, layout.recursive)
        for key, image in images.items():
            name = image.relative_to(top).as_posix()
            if key in labels or not labelled:
                found.pairs.append(Pair(name, image, labels.get(key), condition))
            else:
                found.images_without_label.append(name)
        found.labels_without_image.extend(
            label.relative_to(top).as_posix() for key, label in labels.items() if key not in images
        )
    if not found.pairs:
        image_files, label_files = _file_names(layout)
        raise FileNotFoundError(
            f"{domain.title}, split {split}: no image of {top} ({layout.name}: {image_files}) has a label "
            f"({label_files}); {len(found.images_without_label)} images and {len(found.labels_without_image)} labels "
            "are unmatched"
        )
    return found


def _missing_download(domain: Domain, root: str | Path, split: str) -> str:
    """The error message for a folder that holds no known layout of the domain."""
    expected = []
    for layout in _layouts(domain, split):
        image_files, label_files = _file_names(layout)
        for _, images, labels in _folders(domain, layout, split):
            expected.append(f"  {layout.name}: {images}/{image_files}, {labels}/{label_files}\n")
    folders = [folder for folder in domain.top_folders if folder]
    or_below = f" or below its folder {' or '.join(folders)}" if folders else ""
    known = "".join(expected)
    return f"{domain.title}, split {split}: {root} has none of the known pairs of files\n{known}below it{or_below}"


def _folders(domain: Domain, layout: Layout, split: str) -> list[tuple[str | None, str, str]]:
    """(condition, image folder, label folder) of a split, one per condition."""
    folder = domain.splits[split].folder
    return [
        (
            condition,
            layout.images.format(split=folder, condition=condition).rstrip("/"),
            layout.labels.format(split=folder, condition=condition).rstrip("/"),
        )
        for condition in domain.conditions or (None,)
    ]


def _file_names(layout: Layout) -> tuple[str, str]:
    """The patterns of the names of images and labels."""
    return f"{layout.image_prefix}*{layout.image_suffix}", f"{layout.label_prefix}*{layout.label_suffix}"


def _layouts(domain: Domain, split: str) -> list[Layout]:
    """The packages that hold a split, in order of preference."""
    return [layout for layout in domain.layouts if split in layout.splits or not layout.splits]


def _locate(domain: Domain, root: Path, split: str) -> tuple[Path, Layout] | None:
    """The top folder and the first layout with an image and, where labels are public, a label in a folder pair."""
    labelled = domain.splits[split].labelled
    for top in (root / folder for folder in domain.top_folders):
        for layout in _layouts(domain, split):
            for _, images, labels in _folders(domain, layout, split):
                image = _paths(top / images, layout.image_prefix, layout.image_suffix, layout.recursive)
                label = _paths(top / labels, layout.label_prefix, layout.label_suffix, layout.recursive)
                if next(image, None) and (not labelled or next(label, None)):
                    return top, layout
    return None


def _files(folder: Path, prefix: str, suffix: str, recursive: bool) -> dict[str, Path]:
    """The files below `folder` with that prefix and suffix, by their relative path without both, sorted."""
    files = {}
    for path in sorted(_paths(folder, prefix, suffix, recursive)):
        parent = path.relative_to(folder).parent.as_posix()
        files[f"{parent}/{path.name[len(prefix) : -len(suffix)]}"] = path
    return files


def _paths(folder: Path, prefix: str, suffix: str, recursive: bool) -> Iterator[Path]:
    """The files below `folder` with that prefix and suffix, except hidden ones and those of other toolboxes."""
    paths = folder.rglob(f"{prefix}*{suffix}") if recursive else folder.glob(f"{prefix}*{suffix}")
    keep_converted = suffix.endswith(CONVERTED_LABEL_SUFFIX)
    for path in paths:
        if not path.name.startswith(".") and (keep_converted or not path.name.endswith(CONVERTED_LABEL_SUFFIX)):
            yield path
