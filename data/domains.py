"""What each dataset looks like: folders, label ids, class names, test sizes, one table a domain, and how to read it.

`find_pairs` lists the image/label pairs of an official download, `label_ids` and `LabelMap` turn a label image into
checked train ids, and `load_domain` opens what `mfuser prepare` wrote, or any other dataset with an image and a label
column, in one form. Reading needs `datasets` (in the `train` extra); the tables need only numpy and Pillow.

Sources of the tables: mcordts/cityscapesScripts (labelIds), lhoyer/HRDA (GTA5, SYNTHIA), bdd100k's format page
(BDD100K), shachoi/RobustNet and w1oves/Rein (the two Mapillary maps), arXiv 2104.13395 (ACDC).
"""

import json
import re
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from PIL import Image

from mfuser.class_names_mfuser import CITYSCAPES_CLASSES, IGNORE_INDEX
from mfuser.image_processing_mfuser import scaled_size

try:
    import datasets
except ImportError:
    datasets = None


EXIF_ORIENTATION = 0x0112
# Written beside a prepared dataset; names its domain, classes and label map, and what was skipped and why.
PREPARATION_FILE = "mfuser_preparation.json"
SPLIT_ALIASES = {"training": "train", "val": "validation", "valid": "validation", "testing": "test"}

CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "sidewalk",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)


class LabelMap:
    """A table from the ids in a dataset's label files to train ids.

    Args:
        targets (`dict[int, int]`): raw id -> train id. Raw ids that are valid but not listed become 255, ignored.
        valid_ids (iterable of `int`): every raw id a label file of this dataset may hold.

    Attributes:
        lookup (`np.ndarray` of shape (256,), uint8): train id of each raw id.
        valid (`np.ndarray` of shape (256,), bool): whether a raw id may occur.
    """

    def __init__(self, targets: dict[int, int], valid_ids):
        self.lookup = np.full(256, IGNORE_INDEX, dtype=np.uint8)
        self.lookup[list(targets)] = list(targets.values())
        self.valid = np.zeros(256, dtype=bool)
        self.valid[list(valid_ids)] = True

    @classmethod
    def identity(cls, num_labels: int) -> "LabelMap":
        """For labels that are train ids already: 0 to `num_labels` - 1, and 255 ignored."""
        return cls({index: index for index in range(num_labels)}, [*range(num_labels), IGNORE_INDEX])

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Train ids (H, W), uint8, of raw ids (H, W), uint8. Raises ValueError where a raw id may not occur."""
        # Pillow's histogram and table look-up are about four times as fast as numpy's and take no memory.
        image = Image.fromarray(ids)
        unexpected = np.flatnonzero((np.array(image.histogram()) > 0) & ~self.valid).tolist()
        if unexpected:
            raise ValueError(f"label values {unexpected} are not among the valid ids {_ranges(self.valid)}")
        return np.array(image.point(self.lookup.tolist()))


def _ranges(mask: np.ndarray) -> str:
    """The true positions of a boolean array in words: '0-18, 255'."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    spans = [(first, after - 1) for first, after in edges.reshape(-1, 2).tolist()]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


@dataclass(frozen=True)
class Layout:
    """How one packaging of a dataset arranges its files. `{split}` and `{condition}` are filled in.

    A label belongs to the image whose path below `images`, less `image_suffix`, equals the label's below `labels`,
    less `label_suffix`.
    """

    name: str
    images: str
    image_suffix: str
    labels: str
    label_suffix: str
    recursive: bool = False


@dataclass(frozen=True)
class Split:
    """`folder`: the split's name in the download. `pairs`: how many it should hold. `labelled`: labels are public."""

    folder: str
    pairs: int
    labelled: bool = True


@dataclass(frozen=True)
class EvaluationSize:
    """The size a protocol segments an image at; the prediction is resized back to the label's size for scoring.

    `fit` (height, width): the image is scaled, up or down, to the largest size of its own aspect whose long and short
    edges do not exceed those of `fit`; None keeps the image's size. `halve_first`: image (bicubic) and label (nearest)
    are first shrunk by 2, and scored at that size.
    """

    fit: tuple[int, int] | None = None
    halve_first: bool = False

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which an image of `height` x `width` pixels is segmented (rounded as mmcv does)."""
        if self.halve_first:
            height, width = height // 2, width // 2
        if self.fit is None:
            return height, width
        scale = min(max(self.fit) / max(height, width), min(self.fit) / min(height, width))
        return scaled_size(height, width, scale)


@dataclass(frozen=True)
class Domain:
    """One dataset.

    Attributes:
        name, title (`str`): as typed in commands, as printed.
        classes (`tuple[str]`): the name of each train id. All domains but CamVid share the Cityscapes 19, so that a
            model trained on one is scored on every other.
        label_maps (`dict[str, dict[int, str]]`): name of the map -> raw id -> class. The first is the default.
        raw_ids (`tuple[int]`): every id a label file may hold; any other marks a damaged or wrong file.
        layouts (`tuple[Layout]`): known packagings, the preferred first. Empty: no official folder to prepare.
        splits (`dict[str, Split]`): by the name it has once prepared.
        sizes (`tuple`): known image sizes (height, width); empty where they vary freely.
        evaluation_sizes (`dict[str, EvaluationSize]`): protocol "P1" (Rein, Causal-Tune, DepthForge) and "P2" (tqdm,
            MFuser, SoMA, GeCo).
        absent_classes (`tuple[str]`): classes that never occur; they are left out of this domain's mean IoU.
        conditions (`tuple[str]`): sub-domains, scored one by one.
        top_folders (`tuple[str]`): what the archives may unpack into, below the folder the user names.
        class_in_red_channel (`bool`): labels are colour PNGs whose red channel holds the class.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    label_maps: dict[str, dict[int, str]]
    raw_ids: tuple[int, ...]
    layouts: tuple[Layout, ...] = ()
    splits: dict[str, Split] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    evaluation_sizes: dict[str, EvaluationSize] = field(
        default_factory=lambda: {"P1": EvaluationSize(), "P2": EvaluationSize()}
    )
    absent_classes: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    top_folders: tuple[str, ...] = ("",)
    class_in_red_channel: bool = False

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.classes))

    @property
    def evaluation_classes(self) -> tuple[str, ...]:
        """The classes that count in this domain's mean IoU."""
        return tuple(name for name in self.classes if name not in self.absent_classes)

    def label_map(self, name: str | None = None) -> LabelMap:
        """The map of that name, by default the domain's first."""
        name = name or next(iter(self.label_maps))
        if name not in self.label_maps:
            raise ValueError(f"{self.title} has no label map {name!r}; it has {', '.join(self.label_maps)}")
        return LabelMap({raw: self.classes.index(of) for raw, of in self.label_maps[name].items()}, self.raw_ids)


# Ids of labels.py in cityscapesScripts. Its licence plate is -1, which no 8-bit file can hold.
_CITYSCAPES_LABEL_IDS = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_SYNTHIA_IDS = {
    1: "sky",
    2: "building",
    3: "road",
    4: "sidewalk",
    5: "fence",
    6: "vegetation",
    7: "pole",
    8: "car",
    9: "traffic sign",
    10: "person",
    11: "bicycle",
    12: "motorcycle",
    15: "traffic light",
    16: "terrain",
    17: "rider",
    18: "truck",
    19: "bus",
    20: "train",
    21: "wall",
}
_MAPILLARY_IDS = {
    2: "sidewalk",  # Curb
    3: "fence",
    6: "wall",
    13: "road",
    15: "sidewalk",
    17: "building",
    19: "person",
    20: "rider",  # Bicyclist
    21: "rider",  # Motorcyclist
    22: "rider",  # Other Rider
    24: "road",  # Lane Marking - General
    27: "sky",
    29: "terrain",
    30: "vegetation",
    45: "pole",
    47: "pole",  # Utility Pole
    48: "traffic light",
    50: "traffic sign",  # Traffic Sign (Front)
    52: "bicycle",
    54: "bus",
    55: "car",
    57: "motorcycle",
    58: "train",  # On Rails
    61: "truck",
}
# The two maps in use differ in eleven ids, so scores under A and B are not comparable.
_MAPILLARY_A_ONLY = {41: "road"}  # Manhole
_MAPILLARY_B_ONLY = {
    7: "road",  # Bike Lane
    8: "road",  # Crosswalk - Plain
    9: "sidewalk",  # Curb Cut
    10: "road",  # Parking
    11: "sidewalk",  # Pedestrian Area
    14: "road",  # Service Lane
    23: "road",  # Lane Marking - Crosswalk
    44: "pole",  # Street Light
    46: "traffic sign",  # Traffic Sign Frame
    49: "traffic sign",  # Traffic Sign (Back)
}
_TRAIN_IDS = dict(enumerate(CITYSCAPES_CLASSES))

GTA5 = Domain(
    name="gta5",
    title="GTA5",
    classes=CITYSCAPES_CLASSES,
    label_maps={"labelIds": _CITYSCAPES_LABEL_IDS},
    raw_ids=tuple(range(35)),
    # Flat folders, as the ten archives unpack. Copies are known with labels of another size than their image
    # (among them 15188, 17705 and 20801-20860): the size check finds them.
    layouts=(Layout("images and labels", "images", ".png", "labels", ".png"),),
    splits={"train": Split("", 24966)},
    sizes=((1052, 1914), (1046, 1914)),
)
SYNTHIA = Domain(
    name="synthia",
    title="SYNTHIA-RAND-CITYSCAPES",
    classes=CITYSCAPES_CLASSES,
    label_maps={"SYNTHIA ids": _SYNTHIA_IDS},
    raw_ids=tuple(range(23)),
    layouts=(Layout("RGB and GT/LABELS", "RGB", ".png", "GT/LABELS", ".png"),),
    splits={"train": Split("", 9400)},
    sizes=((760, 1280),),
    absent_classes=("terrain", "truck", "train"),
    top_folders=("", "RAND_CITYSCAPES"),
    class_in_red_channel=True,
)
CITYSCAPES = Domain(
    name="cityscapes",
    title="Cityscapes",
    classes=CITYSCAPES_CLASSES,
    label_maps={"labelIds": _CITYSCAPES_LABEL_IDS},
    raw_ids=tuple(range(34)),
    layouts=(
        Layout(
            "gtFine labelIds",
            "leftImg8bit/{split}",
            "_leftImg8bit.png",
            "gtFine/{split}",
            "_gtFine_labelIds.png",
            recursive=True,
        ),
    ),
    splits={
        "train": Split("train", 2975),
        "validation": Split("val", 500),
        "test": Split("test", 1525, labelled=False),
    },
    sizes=((1024, 2048),),
    evaluation_sizes={"P1": EvaluationSize((512, 1024)), "P2": EvaluationSize((1024, 2048))},
)
BDD100K = Domain(
    name="bdd100k",
    title="BDD100K (10k)",
    classes=CITYSCAPES_CLASSES,
    label_maps={"trainIds": _TRAIN_IDS},
    raw_ids=(*range(19), IGNORE_INDEX),
    # A colormap is the mask with a palette attached: its indices, not its colours, are the train ids.
    layouts=(
        Layout("sem_seg masks", "images/10k/{split}", ".jpg", "labels/sem_seg/masks/{split}", ".png"),
        Layout("sem_seg colormaps", "images/10k/{split}", ".jpg", "labels/sem_seg/colormaps/{split}", ".png"),
        Layout("seg (older package)", "seg/images/{split}", ".jpg", "seg/labels/{split}", "_train_id.png"),
    ),
    splits={
        "train": Split("train", 7000),
        "validation": Split("val", 1000),
        "test": Split("test", 2000, labelled=False),
    },
    sizes=((720, 1280),),
    evaluation_sizes={"P1": EvaluationSize((720, 1280)), "P2": EvaluationSize((720, 1280))},
    top_folders=("", "bdd100k"),
)
MAPILLARY = Domain(
    name="mapillary",
    title="Mapillary Vistas v1.2",
    classes=CITYSCAPES_CLASSES,
    label_maps={"A": _MAPILLARY_IDS | _MAPILLARY_A_ONLY, "B": _MAPILLARY_IDS | _MAPILLARY_B_ONLY},
    raw_ids=tuple(range(66)),
    layouts=(
        Layout("v2.0 package, v1.2 labels", "{split}/images", ".jpg", "{split}/v1.2/labels", ".png"),
        Layout("v1.2 package", "{split}/images", ".jpg", "{split}/labels", ".png"),
    ),
    splits={
        "train": Split("training", 18000),
        "validation": Split("validation", 2000),
        "test": Split("testing", 5000, labelled=False),
    },
    evaluation_sizes={"P1": EvaluationSize((512, 1024), halve_first=True), "P2": EvaluationSize((1024, 2048))},
)
ACDC = Domain(
    name="acdc",
    title="ACDC",
    classes=CITYSCAPES_CLASSES,
    label_maps={"trainIds": _TRAIN_IDS},
    raw_ids=(*range(19), IGNORE_INDEX),
    # The exact split name leaves out the `*_ref` folders of the same places in normal conditions.
    layouts=(
        Layout(
            "gt labelTrainIds",
            "rgb_anon/{condition}/{split}",
            "_rgb_anon.png",
            "gt/{condition}/{split}",
            "_gt_labelTrainIds.png",
            recursive=True,
        ),
    ),
    splits={
        "train": Split("train", 1600),
        "validation": Split("val", 406),
        "test": Split("test", 2000, labelled=False),
    },
    sizes=((1080, 1920),),
    # Rein's 512 models; its larger ones and, as far as is published, the P2 group use the full size.
    evaluation_sizes={"P1": EvaluationSize((540, 960)), "P2": EvaluationSize((1080, 1920))},
    conditions=("fog", "night", "rain", "snow"),
)
# The SegNet tutorial's 11-class version, repacked as parquet with train ids: loads as it is.
CAMVID = Domain(
    name="camvid",
    title="CamVid (11 classes)",
    classes=CAMVID_CLASSES,
    label_maps={"trainIds": dict(enumerate(CAMVID_CLASSES))},
    raw_ids=(*range(11), IGNORE_INDEX),
    sizes=((360, 480),),
)
DOMAINS = {domain.name: domain for domain in (GTA5, SYNTHIA, CITYSCAPES, BDD100K, MAPILLARY, ACDC, CAMVID)}


class Pair(NamedTuple):
    """`name`: the image's path below the dataset's top folder, with forward slashes: the row's key. `label` is None
    where labels are not public."""

    name: str
    image: Path
    label: Path | None
    condition: str | None


class Pairs(NamedTuple):
    """What one split of a download holds. Unmatched files and missing folders are named relative to the top folder."""

    layout: Layout
    pairs: list[Pair]
    images_without_label: list[str]
    labels_without_image: list[str]
    missing_folders: list[str]


def has_split(domain: Domain, root: str | Path, split: str) -> bool:
    """Whether the download at `root` has that split's image folder, and its label folder where labels are public."""
    return _locate(domain, Path(root), split) is not None


def find_pairs(domain: Domain, root: str | Path, split: str) -> Pairs:
    """Lists one split's image/label pairs, matched by name, sorted; nothing is opened.

    Args:
        domain (`Domain`): which dataset.
        root (`str` or `Path`): where the official archives were unpacked.
        split (`str`): a key of `domain.splits`.

    Raises:
        FileNotFoundError: no known layout's folders are there, or they hold no pair.
        ValueError: the domain has no such split.
    """
    if split not in domain.splits:
        raise ValueError(f"{domain.title} has no split {split!r}; it has {', '.join(domain.splits) or 'none'}")
    located = _locate(domain, Path(root), split)
    if located is None:
        expected = "\n".join(
            f"  {layout.name}: {images}, {labels}"
            for layout in domain.layouts
            for _, images, labels in _folders(domain, layout, split)
        )
        raise FileNotFoundError(
            f"{domain.title}, split {split}: {root} has none of the known folder pairs\n{expected}\n"
            f"below it{_or_below(domain)}"
        )
    top, layout = located
    labelled = domain.splits[split].labelled
    found = Pairs(layout, [], [], [], [])
    for condition, image_folder, label_folder in _folders(domain, layout, split):
        missing = [
            folder
            for folder in ([image_folder, label_folder] if labelled else [image_folder])
            if not (top / folder).is_dir()
        ]
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
            f"{len(found.labels_without_image)} labels are alone"
        )
    return found


def _or_below(domain: Domain) -> str:
    folders = [folder for folder in domain.top_folders if folder]
    return f" or below its folder {' or '.join(folders)}" if folders else ""


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
    """The files below `folder` that end in `suffix`, by their path relative to it without the suffix, sorted."""
    # Converters of other toolboxes leave 00001_labelTrainIds.png beside 00001.png: not part of the download.
    derived = "_labelTrainIds.png"
    paths = folder.rglob(f"*{suffix}") if recursive else folder.glob(f"*{suffix}")
    return {
        path.relative_to(folder).as_posix()[: -len(suffix)]: path
        for path in sorted(paths)
        if not path.name.startswith(".") and (suffix.endswith(derived) or not path.name.endswith(derived))
    }


def image_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image as readers see it, that is, turned as its EXIF tag says."""
    width, height = image.size
    turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    return (width, height) if turned else (height, width)


def check_sizes(image: tuple[int, int], label: tuple[int, int]) -> None:
    """Raises ValueError unless an image and its label, (height, width) each, have the same size."""
    if image != label:
        raise ValueError(
            f"the image has {image[0]}x{image[1]} pixels, its label {label[0]}x{label[1]} (height x width)"
        )


def label_ids(label: Image.Image) -> np.ndarray:
    """The ids (H, W), uint8, of a label image: its values, or its palette indices. Colour images raise ValueError."""
    if label.format == "JPEG":
        raise ValueError("the label is a JPEG; lossy compression changes ids, so labels must be PNG")
    if label.mode in ("L", "P", "1"):
        return np.asarray(label).astype(np.uint8, copy=False)
    if label.mode.startswith("I"):
        ids = np.asarray(label)
        if ids.min() < 0 or ids.max() > 255:
            raise ValueError(f"label values go from {ids.min()} to {ids.max()}; ids must lie in 0-255")
        return ids.astype(np.uint8)
    raise ValueError(f"the label has mode {label.mode}; expected one channel of ids (mode L, P or I), not colours")


def read_label(data: bytes, class_in_red_channel: bool = False) -> np.ndarray:
    """The ids (H, W), uint8, in an encoded label file; with `class_in_red_channel`, of an RGB PNG of 8 or 16 bits.

    SYNTHIA's labels have 16 bits a sample, the class in red and the instance in green. Pillow has no such mode and
    keeps only the high byte, which is zero. Unpacking the samples as if they were little-endian keeps the low one.
    """
    with Image.open(BytesIO(data)) as label:
        if not class_in_red_channel:
            return label_ids(label)
        if label.mode != "RGB" or label.format != "PNG":
            raise ValueError(f"the label is a {label.format} of mode {label.mode}; expected an RGB PNG, ids in red")
        codec, extents, offset, raw_mode = label.tile[0]
        red = np.asarray(label.getchannel("R"))
    if raw_mode != "RGB;16B":
        return red
    if red.any():
        raise ValueError(f"label values reach {int(red.max()) << 8} and more; ids must lie in 0-255")
    with Image.open(BytesIO(data)) as label:
        label.tile = [(codec, extents, offset, "RGB;16L")]
        return np.asarray(label.getchannel("R"))


class LoadedDomain(NamedTuple):
    """`dataset` has columns `image` and `label` (decoded to PIL images; label values are train ids, 255 ignored) and,
    where the source has them, `name` and `condition`. `id2label` names the train ids. `preparation` is the record
    `mfuser prepare` left, empty for other sources."""

    dataset: Any
    id2label: dict[int, str]
    preparation: dict[str, Any]


def load_domain(
    source: str | Path,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    id2label: dict[int, str] | str | Path | None = None,
    streaming: bool = False,
) -> LoadedDomain:
    """Opens a dataset with an image and a label column, wherever it lies, in one form.

    Args:
        source (`str` or `Path`): a folder written by `mfuser prepare`, any other folder of `save_to_disk`, a parquet
            file, a folder of parquet files named after their splits, or what else `datasets.load_dataset` takes, such
            as a Hub id.
        split (`str`, *optional*): which split. Needed where the source has several.
        image_column, label_column (`str`): the source's names of the two columns.
        id2label (*optional*): class names: a dictionary, a JSON file, or the name of a domain of this module. Not
            needed for what `mfuser prepare` wrote, nor where an `id2label.json` lies beside the data.
        streaming (`bool`): return an `IterableDataset`; nothing is copied or downloaded beforehand.

    Raises:
        FileNotFoundError: `source` is a path and is not there.
        ValueError: the split is missing or ambiguous, a column is missing or of the wrong kind, the class names are
            unknown or not numbered 0 to n - 1, or one of a few probed labels holds colours or values without a name.
    """
    source = str(source)
    dataset, split = open_columns(source, split, image_column, label_column, streaming)
    preparation = _side_file(source, PREPARATION_FILE) or {}
    names = class_names(source, id2label, preparation)
    _probe(dataset, LabelMap.identity(len(names)), f"{source}, split {split}")
    return LoadedDomain(dataset, names, preparation)


def parse_id2label(names: dict | str | Path) -> dict[int, str]:
    """Class names from a dictionary (keys int or digits), a JSON file of one, or the name of a domain. Raises
    ValueError unless the ids are 0 to n - 1, at most 255 of them."""
    if isinstance(names, (str, Path)):
        if str(names) in DOMAINS:
            return DOMAINS[str(names)].id2label
        if not Path(names).is_file():
            raise ValueError(f"class names: {names} is neither a JSON file nor a domain ({', '.join(DOMAINS)})")
        names = json.loads(Path(names).read_text(encoding="utf-8"))
    try:
        ordered = {int(index): str(name) for index, name in sorted(names.items(), key=lambda item: int(item[0]))}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"class names must be a dictionary from ids to names, not {names!r}") from None
    if list(ordered) != list(range(len(ordered))) or not 1 <= len(ordered) <= IGNORE_INDEX:
        raise ValueError(
            f"class ids must be 0 to n - 1 with n of 1 to {IGNORE_INDEX} (255 is ignored), not {list(ordered)}"
        )
    return ordered


def pick_split(available: list[str], wanted: str | None, source: str) -> str:
    """The split of that name (`val` and Mapillary's folder names are understood), or the only one."""
    if wanted is None and len(available) == 1:
        return available[0]
    for candidate in (wanted, SPLIT_ALIASES.get(wanted)):
        if candidate in available:
            return candidate
    problem = "has several splits; name one of them" if wanted is None else f"has no split {wanted!r}; it has"
    raise ValueError(f"{source} {problem}: {', '.join(available)}")


def parquet_splits(source: str | Path) -> dict[str, list[str]]:
    """Split name -> files, of a parquet file or of the parquet files directly in a folder (train.parquet,
    train-00000-of-00002.parquet, ...)."""
    source = Path(source)
    files = [source] if source.suffix == ".parquet" else sorted(source.glob("*.parquet"))
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(re.sub(r"-\d+-of-\d+$", "", file.stem), []).append(str(file))
    return splits


def available_splits(source: str | Path) -> list[str]:
    """The splits of anything `load_domain` opens. Raises FileNotFoundError for a path that is not there and ValueError
    for a folder that first needs `mfuser prepare`."""
    _require_datasets()
    source, path = str(source), Path(source)
    if not path.exists() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise FileNotFoundError(f"{source} does not exist")
    if (path / "dataset_dict.json").is_file():
        return json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if (path / "state.json").is_file():
        return [json.loads((path / "state.json").read_text(encoding="utf-8"))["_split"] or path.name]
    if path.is_dir() and _side_file(source, PREPARATION_FILE):
        raise ValueError(f"{source} is not completely prepared: run the same `mfuser prepare` command again")
    if files := parquet_splits(path):
        return list(files)
    for domain in DOMAINS.values():
        if path.is_dir() and any(has_split(domain, path, split) for split in domain.splits):
            raise ValueError(
                f"{source} looks like the download of {domain.title}: "
                f"run `mfuser prepare {domain.name} {source} OUTPUT` once and load OUTPUT"
            )
    return datasets.get_dataset_split_names(source)


def open_columns(source: str | Path, split: str | None, image_column: str, label_column: str, streaming: bool = False):
    """(dataset, split name): a source of `load_domain` with columns `image` and `label`, cast to `datasets.Image`, and
    `name` and `condition` where it has them. Label values are not looked at."""
    source = str(source)
    split = pick_split(available_splits(source), split, source)
    path = Path(source)
    folder = path / split if (path / "dataset_dict.json").is_file() else path
    if (folder / "state.json").is_file():
        dataset = datasets.load_from_disk(str(folder))
        if streaming:
            files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
            dataset = dataset.to_iterable_dataset(num_shards=max(1, min(len(files), len(dataset))))
    elif folder != path:
        raise ValueError(f"{folder} is not completely prepared: run the same `mfuser prepare` command again")
    elif files := parquet_splits(path):
        dataset = datasets.load_dataset("parquet", data_files={split: files[split]}, split=split, streaming=streaming)
    else:
        dataset = datasets.load_dataset(source, split=split, streaming=streaming)
    return _normalise(dataset, image_column, label_column, source), split


def _require_datasets() -> None:
    if datasets is None:
        raise ImportError("this needs the library datasets: pip install 'mfuser[train]'")


def _side_file(source: str, file_name: str) -> dict | None:
    """A JSON file beside the data: in the folder or the one above (a split was named), or in the Hub repository."""
    path = Path(source)
    if path.exists():
        for folder in (path, path.parent):
            if (folder / file_name).is_file():
                return json.loads((folder / file_name).read_text(encoding="utf-8"))
        return None
    try:
        path = hf_hub_download(source, file_name, repo_type="dataset")
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))


def class_names(source: str, id2label=None, preparation: dict | None = None) -> dict[int, str]:
    """The class names a source of `load_domain` has of its own, or those given (see there)."""
    prepared = parse_id2label(dict(enumerate(preparation["classes"]))) if preparation else None
    if id2label is None:
        names = prepared or _side_file(source, "id2label.json")
        if names is None:
            raise ValueError(
                f"{source} does not name its classes: give id2label, a dictionary, a JSON file or one of "
                f"{', '.join(DOMAINS)}"
            )
        return parse_id2label(names)
    names = parse_id2label(id2label)
    if prepared and names != prepared:
        raise ValueError(f"{source} was prepared with classes {prepared}; id2label says {names}")
    return names


def _normalise(dataset, image_column: str, label_column: str, source: str):
    """The dataset with its image and label columns cast to `datasets.Image` and called `image` and `label`."""
    if image_column == label_column:
        raise ValueError(f"image and label cannot both be column {image_column!r} of {source}")
    features = dataset.features or dataset._resolve_features().features
    for role, column in (("image", image_column), ("label", label_column)):
        if column not in features:
            raise ValueError(f"{source} has no {role} column {column!r}; its columns are {', '.join(features)}")
        if not _holds_files(features[column]):
            raise ValueError(f"column {column!r} of {source} holds {features[column]}, not {role} images")
        dataset = dataset.cast_column(column, datasets.Image())
    optional = [column for column in ("name", "condition") if column in features]
    kept = [column for column in optional if column not in (image_column, label_column)]
    dataset = dataset.select_columns([image_column, label_column, *kept])
    # One mapping, so that swapped names (image_column="label") work too.
    renamed = {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    return dataset.rename_columns(renamed) if renamed else dataset


def _holds_files(feature) -> bool:
    """Whether a column holds images, or what can be cast to them: encoded bytes, paths, or {bytes, path}."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary", "string", "large_string")
    return isinstance(feature, datasets.Image)


def _probe(dataset, label_map: LabelMap, source: str) -> None:
    """Looks at a few rows, so that wrong columns, colour labels and unnamed classes are found before anything runs."""
    if isinstance(dataset, datasets.Dataset):
        positions = sorted({0, len(dataset) // 2, len(dataset) - 1}) if len(dataset) else []
        rows = (dataset[position] for position in positions)
    else:
        rows = iter(dataset.take(1))
    probed = 0
    try:
        for row in rows:
            if row["label"] is not None:
                check_sizes(image_size(row["image"]), label_map(label_ids(row["label"])).shape)
            probed += 1
    except (ValueError, OSError) as error:
        raise ValueError(f"{source}: row {probed} of a few probed: {error}") from error
    if not probed:
        raise ValueError(f"{source} is empty")
