"""The description of one dataset: label tables, download layouts, splits, classes and test sizes."""

from dataclasses import dataclass, field

from mfuser.data.label_maps import LabelMap
from mfuser.images_mfuser import scaled_size


@dataclass(frozen=True)
class Layout:
    """
    The arrangement of a dataset's files in one of its packages.

    A label belongs to the image whose path below `images`, without `image_suffix`, equals the label's path below
    `labels`, without `label_suffix`. Folder names may contain the placeholders `{split}` and `{condition}`.

    Args:
        name (`str`):
            The name of the package, recorded with what is prepared from it.
        images, labels (`str`):
            Folders of the images and the labels, relative to the top folder of the download.
        image_suffix, label_suffix (`str`):
            How the file names of images and labels end.
        recursive (`bool`, *optional*, defaults to `False`):
            Whether the files lie in subfolders.
        image_prefix, label_prefix (`str`, *optional*, defaults to `""`):
            How the file names of images and labels start. Like the suffixes, they are not part of the common name.
        converted_by (`str`, *optional*):
            The label map by which another toolbox converted the label files to train ids. By default the files hold
            the ids of the dataset.
        splits (`tuple[str]`, *optional*):
            The splits that the package holds. By default all.
    """

    name: str
    images: str
    image_suffix: str
    labels: str
    label_suffix: str
    recursive: bool = False
    image_prefix: str = ""
    label_prefix: str = ""
    converted_by: str | None = None
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """
    One split of a dataset.

    Args:
        folder (`str`):
            The name of the split in the download.
        pairs (`int`):
            The official number of image/label pairs.
        labelled (`bool`, *optional*, defaults to `True`):
            Whether the labels are public.
        halved (`bool`, *optional*, defaults to `False`):
            Whether the files have half the size of the original images and labels.
    """

    folder: str
    pairs: int
    labelled: bool = True
    halved: bool = False


@dataclass(frozen=True)
class EvaluationSize:
    """
    The size at which a protocol segments an image. The scores are resized to the size of the label.

    Args:
        fit (`tuple[int, int]`, *optional*):
            (height, width). The image is scaled up or down, keeping its aspect ratio, to the largest size whose long
            and short edges do not exceed those of `fit`. By default the image keeps its size.
        halve_first (`bool`, *optional*, defaults to `False`):
            Whether the image (bicubic) and the label (nearest) are halved first, and scored at that size.
    """

    fit: tuple[int, int] | None = None
    halve_first: bool = False

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which an image of `height` x `width` pixels is segmented, rounded as mmcv does."""
        if self.halve_first:
            height, width = height // 2, width // 2
        if self.fit is None:
            return height, width
        scale = min(max(self.fit) / max(height, width), min(self.fit) / min(height, width))
        return scaled_size(height, width, scale)


@dataclass(frozen=True)
class LabelReading:
    """
    How label files become train ids.

    Args:
        label_map (`LabelMap`):
            The map from the ids in the files to train ids.
        name (`str`):
            The name of the domain's label map that gives the train ids.
        class_in_red_channel (`bool`):
            Whether the files are colour PNGs with the class in the red channel.
    """

    label_map: LabelMap
    name: str
    class_in_red_channel: bool


@dataclass(frozen=True)
class Domain:
    """
    One dataset.

    Args:
        name (`str`):
            The name used in commands.
        title (`str`):
            The name used in messages and results.
        classes (`tuple[str]`):
            The name of each train id. All domains except CamVid share the 19 Cityscapes classes, so that a model
            trained on one domain can be scored on the others.
        label_maps (`dict[str, dict[int, str | None]]`):
            For each label map, the class of every id that a label file may hold, or `None` for an ignored id. Any
            other id in a file is an error. The first map is the default.
        layouts (`tuple[Layout]`, *optional*):
            The known packages, in order of preference. Empty if there is no official download to prepare.
        splits (`dict[str, Split]`, *optional*):
            The splits, by the name they have once prepared.
        sizes (`tuple[tuple[int, int]]`, *optional*):
            The known image sizes (height, width). Empty if they vary freely.
        evaluation_sizes (`dict[str, EvaluationSize]`, *optional*):
            The sizes of the protocols "P1" (Rein, Causal-Tune, DepthForge) and "P2" (tqdm, MFuser, SoMA, GeCo). By
            default images keep their size.
        absent_classes (`tuple[str]`, *optional*):
            Classes that never occur. They are left out of the domain's mean IoU.
        conditions (`tuple[str]`, *optional*):
            Sub-domains that are scored separately.
        top_folders (`tuple[str]`, *optional*, defaults to `("",)`):
            Folders into which the archives may unpack, relative to the folder that the user names.
        class_in_red_channel (`bool`, *optional*, defaults to `False`):
            Whether labels are colour PNGs with the class in the red channel.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    label_maps: dict[str, dict[int, str | None]]
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

    def label_map_name(self, name: str | None = None) -> str:
        """`name` if the domain has a label map of that name; the first map's name for `None`."""
        name = name or next(iter(self.label_maps))
        if name not in self.label_maps:
            raise ValueError(f"{self.title} has no label map {name!r}; it has {', '.join(self.label_maps)}")
        return name

    def label_map(self, name: str | None = None) -> LabelMap:
        """The label map of that name, by default the first."""
        ids = self.label_maps[self.label_map_name(name)]
        train_ids = {raw: self.classes.index(of) for raw, of in ids.items() if of is not None}
        return LabelMap(train_ids, ids)

    def label_reading(self, layout: Layout, label_map: str | None = None) -> LabelReading:
        """
        How the label files of a package are read.

        Args:
            layout (`Layout`):
                The package.
            label_map (`str`, *optional*):
                One of the domain's label maps. By default the first, or the one by which the files were converted.

        Raises:
            ValueError: If there is no such map, or the files were converted by another one.
        """
        if layout.converted_by is None:
            return LabelReading(self.label_map(label_map), self.label_map_name(label_map), self.class_in_red_channel)
        if label_map not in (None, layout.converted_by):
            raise ValueError(
                f"{self.title}: the labels ({layout.name}) were converted by label map {layout.converted_by}, not "
                f"{label_map}; label map {label_map} requires the original files"
            )
        return LabelReading(LabelMap.identity(len(self.classes)), layout.converted_by, False)
