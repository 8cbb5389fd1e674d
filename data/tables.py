"""
The datasets: their label tables, packages, splits, image sizes and test sizes.

Each label table has one row per id: the id, the dataset's own name for it, and the class it is mapped to (`None`:
ignored). A label file that holds any other id is damaged or belongs to another dataset.
"""

from mfuser.class_names_mfuser import CITYSCAPES_CLASSES, IGNORE_INDEX
from mfuser.data.domain import Domain, EvaluationSize, Layout, Split

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "sidewalk", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip

# fmt: off

# https://github.com/mcordts/cityscapesScripts, helpers/labels.py. The licence plate has id -1 there, which an 8-bit
# file cannot hold.
CITYSCAPES_LABELS = (
    (0, "unlabeled", None),
    (1, "ego vehicle", None),
    (2, "rectification border", None),
    (3, "out of roi", None),
    (4, "static", None),
    (5, "dynamic", None),
    (6, "ground", None),
    (7, "road", "road"),
    (8, "sidewalk", "sidewalk"),
    (9, "parking", None),
    (10, "rail track", None),
    (11, "building", "building"),
    (12, "wall", "wall"),
    (13, "fence", "fence"),
    (14, "guard rail", None),
    (15, "bridge", None),
    (16, "tunnel", None),
    (17, "pole", "pole"),
    (18, "polegroup", None),
    (19, "traffic light", "traffic light"),
    (20, "traffic sign", "traffic sign"),
    (21, "vegetation", "vegetation"),
    (22, "terrain", "terrain"),
    (23, "sky", "sky"),
    (24, "person", "person"),
    (25, "rider", "rider"),
    (26, "car", "car"),
    (27, "truck", "truck"),
    (28, "bus", "bus"),
    (29, "caravan", None),
    (30, "trailer", None),
    (31, "train", "train"),
    (32, "motorcycle", "motorcycle"),
    (33, "bicycle", "bicycle"),
)
# The palette indices of GTA5 are those of Cityscapes, with an id for the licence plate. lhoyer/HRDA, gta.py.
GTA5_LABELS = (*CITYSCAPES_LABELS, (34, "license plate", None))

# SYNTHIA-RAND-CITYSCAPES' README; classes as in lhoyer/HRDA, synthia.py.
SYNTHIA_LABELS = (
    (0, "void", None),
    (1, "sky", "sky"),
    (2, "building", "building"),
    (3, "road", "road"),
    (4, "sidewalk", "sidewalk"),
    (5, "fence", "fence"),
    (6, "vegetation", "vegetation"),
    (7, "pole", "pole"),
    (8, "car", "car"),
    (9, "traffic sign", "traffic sign"),
    (10, "pedestrian", "person"),
    (11, "bicycle", "bicycle"),
    (12, "motorcycle", "motorcycle"),
    (13, "parking slot", None),
    (14, "road work", None),
    (15, "traffic light", "traffic light"),
    (16, "terrain", "terrain"),
    (17, "rider", "rider"),
    (18, "truck", "truck"),
    (19, "bus", "bus"),
    (20, "train", "train"),
    (21, "wall", "wall"),
    (22, "lane marking", None),
)

# UrbanSyn's README (huggingface.co/datasets/UrbanSyn/UrbanSyn): the 19 train ids of Cityscapes, and 19 for unlabelled
# pixels. Copies that were converted for MMSegmentation hold 255 instead.
URBANSYN_LABELS = (
    *((train_id, name, name) for train_id, name in enumerate(CITYSCAPES_CLASSES)),
    (19, "unlabeled", None),
    (IGNORE_INDEX, "unlabeled", None),
)

# Mapillary Vistas v1.2, config.json. Two mappings to the 19 classes are in use, which differ in eleven ids, so scores
# under one cannot be compared with scores under the other:
#   A: shachoi/RobustNet, HRDA, CLOUDS, VLTSeg;  B: w1oves/Rein, SoMA, GeCo, Causal-Tune, DepthForge
MAPILLARY_LABELS = (
    # id  name                        map A            map B
    (0, "Bird", None, None),
    (1, "Ground Animal", None, None),
    (2, "Curb", "sidewalk", "sidewalk"),
    (3, "Fence", "fence", "fence"),
    (4, "Guard Rail", None, None),
    (5, "Barrier", None, None),
    (6, "Wall", "wall", "wall"),
    (7, "Bike Lane", None, "road"),
    (8, "Crosswalk - Plain", None, "road"),
    (9, "Curb Cut", None, "sidewalk"),
    (10, "Parking", None, "road"),
    (11, "Pedestrian Area", None, "sidewalk"),
    (12, "Rail Track", None, None),
    (13, "Road", "road", "road"),
    (14, "Service Lane", None, "road"),
    (15, "Sidewalk", "sidewalk", "sidewalk"),
    (16, "Bridge", None, None),
    (17, "Building", "building", "building"),
    (18, "Tunnel", None, None),
    (19, "Person", "person", "person"),
    (20, "Bicyclist", "rider", "rider"),
    (21, "Motorcyclist", "rider", "rider"),
    (22, "Other Rider", "rider", "rider"),
    (23, "Lane Marking - Crosswalk", None, "road"),
    (24, "Lane Marking - General", "road", "road"),
    (25, "Mountain", None, None),
    (26, "Sand", None, None),
    (27, "Sky", "sky", "sky"),
    (28, "Snow", None, None),
    (29, "Terrain", "terrain", "terrain"),
    (30, "Vegetation", "vegetation", "vegetation"),
    (31, "Water", None, None),
    (32, "Banner", None, None),
    (33, "Bench", None, None),
    (34, "Bike Rack", None, None),
    (35, "Billboard", None, None),
    (36, "Catch Basin", None, None),
    (37, "CCTV Camera", None, None),
    (38, "Fire Hydrant", None, None),
    (39, "Junction Box", None, None),
    (40, "Mailbox", None, None),
    (41, "Manhole", "road", None),
    (42, "Phone Booth", None, None),
    (43, "Pothole", None, None),
    (44, "Street Light", None, "pole"),
    (45, "Pole", "pole", "pole"),
    (46, "Traffic Sign Frame", None, "traffic sign"),
    (47, "Utility Pole", "pole", "pole"),
    (48, "Traffic Light", "traffic light", "traffic light"),
    (49, "Traffic Sign (Back)", None, "traffic sign"),
    (50, "Traffic Sign (Front)", "traffic sign", "traffic sign"),
    (51, "Trash Can", None, None),
    (52, "Bicycle", "bicycle", "bicycle"),
    (53, "Boat", None, None),
    (54, "Bus", "bus", "bus"),
    (55, "Car", "car", "car"),
    (56, "Caravan", None, None),
    (57, "Motorcycle", "motorcycle", "motorcycle"),
    (58, "On Rails", "train", "train"),
    (59, "Other Vehicle", None, None),
    (60, "Trailer", None, None),
    (61, "Truck", "truck", "truck"),
    (62, "Wheeled Slow", None, None),
    (63, "Car Mount", None, None),
    (64, "Ego Vehicle", None, None),
    (65, "Unlabeled", None, None),
)

# fmt: on


def _label_map(labels: tuple[tuple, ...], column: int = 2) -> dict[int, str | None]:
    """The class of every id of a label table, from one of its columns."""
    return {row[0]: row[column] for row in labels}


def _train_ids(classes: tuple[str, ...]) -> dict[int, str | None]:
    """The label map of files that hold train ids."""
    return {**dict(enumerate(classes)), IGNORE_INDEX: None}


GTA5 = Domain(
    name="gta5",
    title="GTA5",
    classes=CITYSCAPES_CLASSES,
    label_maps={"labelIds": _label_map(GTA5_LABELS)},
    # Flat folders, as the ten archives unpack. Some labels differ in size from their image (15188, 17705 and
    # 20801-20860 among others); preparation and evaluation skip them.
    layouts=(
        Layout("images and labels", "images", ".png", "labels", ".png"),
        Layout("labelTrainIds", "images", ".png", "labels", "_labelTrainIds.png", converted_by="labelIds"),
    ),
    splits={"train": Split("", 24966)},
    sizes=((1052, 1914), (1046, 1914)),
)
SYNTHIA = Domain(
    name="synthia",
    title="SYNTHIA-RAND-CITYSCAPES",
    classes=CITYSCAPES_CLASSES,
    label_maps={"SYNTHIA ids": _label_map(SYNTHIA_LABELS)},
    layouts=(
        Layout("RGB and GT/LABELS", "RGB/{split}", ".png", "GT/LABELS/{split}", ".png"),
        Layout(
            "labelTrainIds",
            "RGB/{split}",
            ".png",
            "GT/LABELS/{split}",
            "_labelTrainIds.png",
            converted_by="SYNTHIA ids",
        ),
    ),
    # Two of MFuser's three configurations of SYNTHIA read RGB/train, the third reads all of RGB. Those folders are not
    # part of the download; the sizes are those of the file lists in shachoi/RobustNet, which divide it the same way.
    splits={
        "train": Split("", 9400),
        "source_train": Split("train", 6580),
        "source_validation": Split("val", 2820),
    },
    sizes=((760, 1280),),
    absent_classes=("terrain", "truck", "train"),
    top_folders=("", "RAND_CITYSCAPES"),
    class_in_red_channel=True,
)
CITYSCAPES = Domain(
    name="cityscapes",
    title="Cityscapes",
    classes=CITYSCAPES_CLASSES,
    label_maps={"labelIds": _label_map(CITYSCAPES_LABELS)},
    layouts=(
        Layout(
            "gtFine labelIds",
            "leftImg8bit/{split}",
            "_leftImg8bit.png",
            "gtFine/{split}",
            "_gtFine_labelIds.png",
            recursive=True,
        ),
        Layout(
            "gtFine labelTrainIds",
            "leftImg8bit/{split}",
            "_leftImg8bit.png",
            "gtFine/{split}",
            "_gtFine_labelTrainIds.png",
            recursive=True,
            converted_by="labelIds",
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
    label_maps={"trainIds": _train_ids(CITYSCAPES_CLASSES)},
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
    label_maps={"A": _label_map(MAPILLARY_LABELS, 2), "B": _label_map(MAPILLARY_LABELS, 3)},
    layouts=(
        Layout("v2.0 package, v1.2 labels", "{split}/images", ".jpg", "{split}/v1.2/labels", ".png"),
        Layout("v1.2 package", "{split}/images", ".jpg", "{split}/labels", ".png"),
        # Written by the converters of lhoyer/HRDA and of w1oves/Rein.
        Layout("labelTrainIds", "{split}/images", ".jpg", "{split}/labels", "_labelTrainIds.png", converted_by="A"),
        Layout(
            "half",
            "half/{split}_img",
            ".jpg",
            "half/{split}_label",
            ".png",
            converted_by="B",
            splits=("validation_half",),
        ),
    ),
    splits={
        "train": Split("training", 18000),
        "validation": Split("validation", 2000),
        "test": Split("testing", 5000, labelled=False),
        "validation_half": Split("val", 2000, halved=True),
    },
    evaluation_sizes={"P1": EvaluationSize((512, 1024), halve_first=True), "P2": EvaluationSize((1024, 2048))},
)
ACDC = Domain(
    name="acdc",
    title="ACDC",
    classes=CITYSCAPES_CLASSES,
    label_maps={"trainIds": _train_ids(CITYSCAPES_CLASSES)},
    # The exact split name excludes the `*_ref` folders, which show the same places in normal conditions.
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
    # P1: Rein's models for 512 x 512 crops. Its larger models and, as far as is published, the P2 group use the full
    # size. Split sizes: arXiv 2104.13395.
    evaluation_sizes={"P1": EvaluationSize((540, 960)), "P2": EvaluationSize((1080, 1920))},
    conditions=("fog", "night", "rain", "snow"),
)
URBANSYN = Domain(
    name="urbansyn",
    title="UrbanSyn",
    classes=CITYSCAPES_CLASSES,
    label_maps={"UrbanSyn ids": _label_map(URBANSYN_LABELS)},
    layouts=(
        Layout("rgb and ss", "rgb", ".png", "ss", ".png", image_prefix="rgb_", label_prefix="ss_"),
        Layout("rgb and ss of equal names", "rgb", ".png", "ss", ".png"),
    ),
    splits={"train": Split("", 7539)},
    sizes=((1024, 2048),),
)
# The 11-class version of the SegNet tutorial, as parquet files with train ids: there is no download to prepare.
CAMVID = Domain(
    name="camvid",
    title="CamVid (11 classes)",
    classes=CAMVID_CLASSES,
    label_maps={"trainIds": _train_ids(CAMVID_CLASSES)},
    sizes=((360, 480),),
)
# The sets of classes over which published tables average, whatever the target: those of SYNTHIA, and these without the
# three that domain adaptation to Cityscapes leaves out.
CLASS_SETS = {
    "synthia16": SYNTHIA.evaluation_classes,
    "synthia13": tuple(name for name in SYNTHIA.evaluation_classes if name not in ("wall", "fence", "pole")),
}
DOMAINS = {domain.name: domain for domain in (GTA5, SYNTHIA, URBANSYN, CITYSCAPES, BDD100K, MAPILLARY, ACDC, CAMVID)}
