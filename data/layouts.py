"""The image/label pairs of an official download, found by the known layouts of its dataset."""

from pathlib import Path
from typing import NamedTuple

from mfuser.data.domain import Domain, Layout

# Written next to the labels by the converters of other toolboxes; not part of any download but ACDC's.
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
    """Whether the download at `root` has the split's image folder and, where labels are public, its label folder."""
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
        FileNotFoundError: If the folders of no known layout exist, or they hold no pair.
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
        images = _files(top / image_folder, layout.image_suffix, layout.recursive)
        labels = _files(top / label_folder, layout.label_suffix, layout.recursive) if labelled else {}
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
        raise FileNotFoundError(
            f"{domain.title}, split {split}: no image of {top} ({layout.name}: *{layout.image_suffix}) has a label "
            f"(*{layout.label_suffix}); {len(found.images_without_label)} images and "
            f"{len(found.labels_without_image)} labels are unmatched"
        )
    return found


def _missing_download(domain: Domain, root: str | Path, split: str) -> str:
    """The error message for a folder that holds no known layout of the domain."""
    expected = "\n".join(
        f"  {layout.name}: {images}, {labels}"
        for layout in domain.layouts
        for _, images, labels in _folders(domain, layout, split)
    )
    folders = [folder for folder in domain.top_folders if folder]
    or_below = f" or below its folder {' or '.join(folders)}" if folders else ""
    return f"{domain.title}, split {split}: {root} has none of the known folder pairs\n{expected}\nbelow it{or_below}"


def _folders(domain: Domain, layout: Layout, split: str) -> list[tuple[str | None, str, str]]:
    """(condition, image folder, label folder) of a split, one per condition."""
    folder = domain.splits[split].folder
    return [
        (
            condition,
            layout.images.format(split=folder, condition=condition),
            layout.labels.format(split=folder, condition=condition),
        )
        for condition in domain.conditions or (None,)
    ]


def _locate(domain: Domain, root: Path, split: str) -> tuple[Path, Layout] | None:
    """The top folder and the first layout of which at least one folder pair exists."""
    for top in (root / folder for folder in domain.top_folders):
        for layout in domain.layouts:
            for _, images, labels in _folders(domain, layout, split):
                if (top / images).is_dir() and ((top / labels).is_dir() or not domain.splits[split].labelled):
                    return top, layout
    return None


def _files(folder: Path, suffix: str, recursive: bool) -> dict[str, Path]:
    """The files below `folder` that end in `suffix`, by their relative path without the suffix, sorted."""
    paths = folder.rglob(f"*{suffix}") if recursive else folder.glob(f"*{suffix}")
    keep_converted = suffix.endswith(CONVERTED_LABEL_SUFFIX)
    return {
        path.relative_to(folder).as_posix()[: -len(suffix)]: path
        for path in sorted(paths)
        if not path.name.startswith(".") and (keep_converted or not path.name.endswith(CONVERTED_LABEL_SUFFIX))
    }
