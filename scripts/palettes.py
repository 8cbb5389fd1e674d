"""Colours of classes, and images drawn with them: label images, overlays and legends."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# cityscapesScripts, helpers/labels.py: the 19 classes that are evaluated.
CITYSCAPES_COLOURS = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
# CamVid's names of Cityscapes classes.
SYNONYMS = {"tree": "vegetation", "sign": "traffic sign", "pedestrian": "person", "bicyclist": "rider"}
# Weights of the squared differences in red, green and blue in a perceptual distance ("redmean" at medium red).
CHANNEL_WEIGHTS = np.array([2.5, 4.0, 2.5])
MAX_CLASSES = 256
UNKNOWN_NAME, UNKNOWN_COLOUR = "unknown", (0, 0, 0)
# Viridis at five points, from confidence 0 to 1.
CONFIDENCE_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def class_colours(class_names: Sequence[str]) -> np.ndarray:
    """
    Chooses a distinct colour for each class; the same names always give the same colours.

    Classes of Cityscapes, also under the names that CamVid gives them, have their Cityscapes colours. Each other class
    gets the colour of a coarse grid that is farthest from all colours chosen before.

    Args:
        class_names (`Sequence[str]`):
            Names of the classes, at most 256.

    Returns:
        `np.ndarray` of shape `(num_classes, 3)` and type `uint8`: RGB colours.

    Raises:
        ValueError: If there are more classes than an 8-bit label image can hold.
    """
    if len(class_names) > MAX_CLASSES:
        raise ValueError(
            f"The model has {len(class_names)} classes; an 8-bit label image holds at most {MAX_CLASSES} classes."
        )
    names = [name.lower().replace("_", " ").replace("-", " ") for name in class_names]
    names = [SYNONYMS[name] if name in SYNONYMS and SYNONYMS[name] not in names else name for name in names]
    known = [CITYSCAPES_COLOURS.get(name) for name in names]
    levels = np.linspace(0, 255, 8).round()
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    # Black and white are excluded: black is commonly used for "no class", and white is the background of the legend.
    taken = [(0, 0, 0), (255, 255, 255), *filter(None, known)]
    distance = np.min([_distance(grid, colour) for colour in taken], axis=0)
    colours = []
    for colour in known:
        if colour is None:
            colour = grid[distance.argmax()]
            distance = np.minimum(distance, _distance(grid, colour))
        colours.append(colour)
    return np.array(colours, dtype=np.uint8)


def label_colours(class_names: Sequence[str]) -> np.ndarray:
    """RGB colours of all 256 label values, of shape (256, 3): those of the classes, then that of unknown pixels."""
    table = np.full((MAX_CLASSES, 3), UNKNOWN_COLOUR, dtype=np.uint8)
    table[: len(class_names)] = class_colours(class_names)
    return table


def _distance(colours: np.ndarray, colour: Sequence[float]) -> np.ndarray:
    return ((colours - np.asarray(colour)) ** 2 * CHANNEL_WEIGHTS).sum(axis=-1)


def confidence_table() -> np.ndarray:
    """RGB colours of confidence, of shape (256, 3): index 0 for unknown pixels, then 0 to 1 in equal steps."""
    points = np.linspace(1, 255, len(CONFIDENCE_COLOURS))
    channels = [np.interp(np.arange(256), points, channel) for channel in zip(*CONFIDENCE_COLOURS, strict=True)]
    table = np.stack(channels, axis=-1).round().astype(np.uint8)
    table[0] = UNKNOWN_COLOUR
    return table


def confidence_indices(confidence: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Indices into [`confidence_table`] of a map of confidences and a mask of unknown pixels, both (height, width)."""
    return np.where(unknown, 0, (1 + 254 * confidence).round()).astype(np.uint8)


def label_image(label_map: np.ndarray, colours: np.ndarray) -> Image.Image:
    """
    Makes a palette image: its pixel values are class ids, which image viewers show in the classes' colours.

    Args:
        label_map (`np.ndarray` of shape `(height, width)`):
            Class ids.
        colours (`np.ndarray` of shape `(num_classes, 3)`):
            RGB colours of the classes.

    Returns:
        `Image.Image`: The label image, in mode "P".
    """
    image = Image.fromarray(label_map.astype(np.uint8))
    image.putpalette(colours.tobytes())
    return image


def overlay(image: Image.Image, label_map: np.ndarray, colours: np.ndarray, alpha: float) -> Image.Image:
    """
    Blends an image with the colours of its label map.

    Args:
        image (`Image.Image`):
            An RGB image.
        label_map (`np.ndarray` of shape `(height, width)`):
            Class ids.
        colours (`np.ndarray` of shape `(num_classes, 3)`):
            RGB colours of the classes.
        alpha (`float`):
            Opacity of the colours, from 0 (invisible) to 1 (opaque).

    Returns:
        `Image.Image`: The blended image.
    """
    return Image.blend(image, label_image(label_map, colours).convert("RGB"), alpha)


def legend(classes: dict[int, str], colours: np.ndarray, rows: int = 20) -> Image.Image:
    """
    Draws the colour, id and name of every class.

    Args:
        classes (`dict[int, str]`):
            Names of the classes by id.
        colours (`np.ndarray` of shape `(ids, 3)`):
            RGB colours by id.
        rows (`int`, *optional*, defaults to 20):
            Largest number of classes in a column.

    Returns:
        `Image.Image`: The legend.
    """
    font = ImageFont.load_default(size=16)
    line, swatch, margin = 26, 36, 10
    texts = [f"{index}  {name}" for index, name in classes.items()]
    column = swatch + round(max(font.getlength(text) for text in texts)) + 3 * margin
    columns = -(-len(texts) // rows)
    picture = Image.new("RGB", (columns * column + margin, min(len(texts), rows) * line + 2 * margin), "white")
    draw = ImageDraw.Draw(picture)
    for index, (text, colour) in enumerate(zip(texts, colours[list(classes)], strict=True)):
        left, top = margin + index // rows * column, margin + index % rows * line
        draw.rectangle((left, top + 3, left + swatch, top + line - 4), fill=tuple(colour.tolist()), outline="black")
        draw.text((left + swatch + margin, top + line // 2), text, fill="black", font=font, anchor="lm")
    return picture
