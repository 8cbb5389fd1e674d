"""The domains that are scored: finding their images and labels, and checking their classes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mfuser.data.domain import Domain
from mfuser.data.label_maps import LabelMap
from mfuser.data.layouts import find_pairs, has_split
from mfuser.data.loading import SPLIT_ALIASES, LoadedDomain, available_splits, load_domain, pick_split
from mfuser.data.rows import DatasetRows, DownloadRows, Rows
from mfuser.data.tables import CLASS_SETS, DOMAINS
from mfuser.errors import one_line

DEFAULT_SPLIT = "validation"


class LabelledImage(NamedTuple):
    """
    An image and its label.

    Args:
        image (`Image.Image`):
            The image as RGB, rotated as its EXIF tag says.
        label (`np.ndarray` of shape `(height, width)`, uint8, *optional*):
            Train ids; `None` without a label.
    """

    image: Image.Image
    label: np.ndarray | None


@dataclass(frozen=True)
class EvaluationDomain:
    """
    One split of a domain, as `open_domain` returns it.

    Args:
        name (`str`):
            The name in results: the domain, and the split if one was requested ("camvid:dusk").
        domain (`Domain`, *optional*):
            The description of the dataset; `None` for an unknown dataset.
        source, split (`str`):
            Where the images come from.
        rows (`Rows`):
            The images and labels.
        id2label (`dict[int, str]`):
            The name of each train id.
        label_map (`LabelMap`):
            The map from the ids in the labels to train ids.
        label_map_name (`str`, *optional*):
            The name of the domain's label map that gives the train ids; `None` if it is unknown.
        skipped (`tuple[dict]`, *optional*):
            `name` and `reason` of the pairs that were left out so far.
        distortion (`Callable`, *optional*):
            Takes the image of a row as RGB, in its own size, and returns the image to segment, in the same size.
    """

    name: str
    domain: Domain | None
    source: str
    split: str
    rows: Rows
    id2label: dict[int, str]
    label_map: LabelMap
    label_map_name: str | None
    skipped: tuple[dict[str, str], ...] = ()
    distortion: Callable[[Image.Image], Image.Image] | None = None

    @property
    def expected_images(self) -> int | None:
        """The official number of images of the split, if it is known."""
        known = self.domain.splits.get(self.split) if self.domain else None
        return known.pairs if known else None

    @property
    def halved(self) -> bool:
        """Whether the files have half the size of the original images and labels."""
        known = self.domain.splits.get(self.split) if self.domain else None
        return known is not None and known.halved

    def scored_classes(self, classes: str = "domain") -> list[int]:
        """
        The ids of the classes that count in the mean IoU.

        Args:
            classes (`str`, *optional*, defaults to `"domain"`):
                "domain" for all classes but those that never occur in the domain (three of SYNTHIA), "all", or a key
                of `CLASS_SETS`.

        Raises:
            ValueError: If the domain lacks a class of the set.
        """
        if classes in CLASS_SETS:
            missing = [name for name in CLASS_SETS[classes] if name not in self.id2label.values()]
            if missing:
                raise ValueError(f"{self.name} has no class {', '.join(missing)}, which {classes} contains")
            return [index for index, name in self.id2label.items() if name in CLASS_SETS[classes]]
        absent = self.domain.absent_classes if self.domain and classes == "domain" else ()
        return [index for index, name in self.id2label.items() if name not in absent]

    @property
    def conditions(self) -> list[str | None]:
        """The conditions that occur, in the order of the domain; `None` stands for rows without a condition."""
        present = set(self.rows.conditions)
        official = self.domain.conditions if self.domain else ()
        return [name for name in official if name in present] + sorted(present - set(official), key=str)

    def read(self, index: int) -> LabelledImage:
        """
        The image of one row and its train ids.

        Raises:
            MemoryError: If there is too little memory.
            ValueError: If the row cannot be used for any other reason.
        """
        try:
            image, ids = self.rows.read(index)
            if self.distortion is not None:
                image = self.distortion(image)
            return LabelledImage(image, None if ids is None else self.label_map(ids))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise almost anything for damaged files
            raise ValueError(self._problem(index, error)) from error

    def _problem(self, index: int, error: Exception) -> str:
        try:
            if not next(self.rows.slice(index, index + 1).encoded()).image:
                return "the image is missing or empty"
        except OSError:
            pass  # the file cannot be read, as `error` states
        return one_line(error) if isinstance(error, (OSError, ValueError)) else f"cannot be read: {one_line(error)}"


def open_domain(
    name: str,
    source: str | Path,
    split: str | None = None,
    label_map: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    id2label: dict[int, str] | str | Path | None = None,
    skip_unreadable: bool = False,
) -> EvaluationDomain:
    """
    Finds the images and labels of a domain.

    Args:
        name (`str`):
            A domain of `mfuser.data.tables`, or any other name for another dataset.
        source (`str` or `Path`):
            The official download of the domain, whose labels are then mapped to train ids on the fly, or anything that
            `load_domain` opens.
        split (`str`, *optional*):
            The split. By default "validation" if there is one, otherwise the only split.
        label_map (`str`, *optional*):
            One of the domain's label maps (Mapillary's "A" or "B"). By default the first, or that of the preparation.
        image_column, label_column (`str`, *optional*, defaults to `"image"` and `"label"`):
            The names of the two columns, if the source is not a download.
        id2label (`dict[int, str]`, `str` or `Path`, *optional*):
            The class names of an unknown dataset, see `load_domain`.
        skip_unreadable (`bool`, *optional*, defaults to `False`):
            Whether a sampled row that cannot be read is a warning, see `load_domain`.

    Returns:
        `EvaluationDomain`: The domain.

    Raises:
        FileNotFoundError: If the source does not exist, or holds no pair.
        ValueError: If an argument does not fit the domain, `source` was prepared as another domain or with another
            label map, or `load_domain` cannot open it.
    """
    domain, source = DOMAINS.get(name), str(source)
    _check_arguments(name, domain, label_map, id2label)
    title = name if split is None else f"{name}:{split}"
    if domain and Path(source).is_dir():
        downloaded = [each for each in domain.splits if has_split(domain, source, each)]
        if downloaded:
            return _open_download(title, domain, source, _pick_split(downloaded, split, source), label_map)
    if split is None:
        split = _pick_split(available_splits(source), None, source)
    names = name if domain else id2label
    loaded = load_domain(source, split, image_column, label_column, names, skip_unreadable=skip_unreadable)
    return _from_dataset(title, domain, source, SPLIT_ALIASES.get(split, split), label_map, loaded)


def _check_arguments(name: str, domain: Domain | None, label_map: str | None, id2label) -> None:
    """Raises ValueError if the arguments of `open_domain` do not fit the domain."""
    if domain and id2label is not None:
        raise ValueError(f"{domain.title} has its own class names; id2label is for other datasets")
    if domain:
        domain.label_map_name(label_map)  # raises ValueError if there is no such map
    elif label_map:
        raise ValueError(f"{name} is not a known domain ({', '.join(DOMAINS)}), so it has no label map {label_map!r}")


def _pick_split(available: list[str], split: str | None, source: str) -> str:
    """The requested split; by default "validation" if there is one, otherwise the only split."""
    default = DEFAULT_SPLIT if DEFAULT_SPLIT in available else None
    return pick_split(available, split or default, source)


def _open_download(title: str, domain: Domain, source: str, split: str, label_map: str | None) -> EvaluationDomain:
    """A split of an official download as a domain."""
    found = find_pairs(domain, source, split)
    reading = domain.label_reading(found.layout, label_map)
    unpaired = [{"name": name, "reason": "no label belongs to this image"} for name in found.images_without_label]
    unpaired += [{"name": name, "reason": "no image belongs to this label"} for name in found.labels_without_image]
    unpaired += [{"name": folder, "reason": "the folder is missing"} for folder in found.missing_folders]
    return EvaluationDomain(
        name=title,
        domain=domain,
        source=source,
        split=split,
        rows=DownloadRows(found.pairs, reading.class_in_red_channel),
        id2label=domain.id2label,
        label_map=reading.label_map,
        label_map_name=reading.name,
        skipped=tuple(unpaired),
    )


def _from_dataset(
    title: str, domain: Domain | None, source: str, split: str, label_map: str | None, loaded: LoadedDomain
) -> EvaluationDomain:
    """A dataset of train ids as a domain, if its preparation fits the domain and the label map."""
    prepared_as = loaded.preparation.get("domain")
    prepared_map = loaded.preparation.get("label_map")
    if domain and prepared_as not in (None, domain.name):
        raise ValueError(f"{source} was prepared as {prepared_as}, not {domain.name}")
    if label_map and label_map != prepared_map:
        origin = f"made with label map {prepared_map}" if prepared_map else "train ids of an unknown label map"
        raise ValueError(
            f"{source}: its labels are {origin}; label map {label_map} requires the download, or a folder prepared "
            "with it"
        )
    return EvaluationDomain(
        name=title,
        domain=domain,
        source=source,
        split=split,
        rows=DatasetRows(loaded.dataset),
        id2label=loaded.id2label,
        label_map=LabelMap.identity(len(loaded.id2label)),
        label_map_name=prepared_map,
        skipped=tuple(loaded.preparation.get("splits", {}).get(split, {}).get("skipped", ())),
    )


def check_classes(model_classes: dict[int, str], domain: EvaluationDomain) -> None:
    """
    Checks that a model's classes are those of a domain, id by id.

    Args:
        model_classes (`dict[int, str]`):
            `config.id2label` of the model.
        domain (`EvaluationDomain`):
            The domain.

    Raises:
        ValueError: If they differ, with the differences.
    """
    if model_classes == domain.id2label:
        return
    model_names, domain_names = list(model_classes.values()), list(domain.id2label.values())
    differences = []
    for owner, names, others in (
        ("the model", model_names, domain_names),
        (domain.name, domain_names, model_names),
    ):
        alone = [name for name in names if name not in others]
        if alone:
            differences.append(f"only {owner} has {', '.join(alone)}")
    moved = [
        f"{index} is {model_classes[index]} in the model and {name} in {domain.name}"
        for index, name in domain.id2label.items()
        if model_classes.get(index, name) != name
    ]
    if not differences:
        differences = ["the names are the same in another order: " + ", ".join(moved)]
    raise ValueError(
        f"the model's {len(model_names)} classes are not the {len(domain_names)} of {domain.name}: "
        f"{'; '.join(differences)}"
    )
