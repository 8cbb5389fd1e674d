"""A panel of an image, its overlay with a legend, and its confidence."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mfuser.confidence_mfuser import UNKNOWN
from mfuser.scripts.palettes import UNKNOWN_NAME, confidence_indices, confidence_table
from mfuser.scripts.segmentation import count_pixels

WIDTH, MAX_HEIGHT = 560, 1120  # of each part, in pixels
GAP, MARGIN = 14, 18  # between and around the parts
TITLE, LINE, SWATCH = 46, 38, 36
COLUMNS = 3  # of the legend, which is as wide as two parts
TITLE_SIZE, TEXT_SIZE = 30, 26  # readable when the panel is reduced to half its size
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
BACKGROUND, INK, SECOND_INK = (255, 255, 255), (25, 25, 25), (95, 95, 95)


def draw_panel(
    image: Image.Image,
    overlay: Image.Image,
    labels: np.ndarray,
    confidence: np.ndarray,
    classes: dict[int, str],
    colours: np.ndarray,
    is_calibrated: bool,
) -> Image.Image:
    """
    Draws an image, its overlay and its confidence side by side, with a legend of the classes that occur.

    Args:
        image, overlay (`Image.Image`):
            The image and its overlay, RGB and of one size.
        labels (`np.ndarray` of shape `(height, width)`):
            Class ids.
        confidence (`np.ndarray` of shape `(height, width)`):
            Confidence of each pixel, from 0 to 1.
        classes (`dict[int, str]`):
            Names of the classes by id.
        colours (`np.ndarray` of shape `(ids, 3)`):
            RGB colours by id.
        is_calibrated (`bool`):
            Whether the confidence is calibrated; otherwise the title of the third part states that it is not.

    Returns:
        `Image.Image`: The panel.
    """
    has_unknown = classes.get(UNKNOWN) == UNKNOWN_NAME  # of 256 classes, one has the same id
    colours_of_confidence = confidence_table()[confidence_indices(confidence, has_unknown & (labels == UNKNOWN))]
    scale = min(WIDTH / image.width, MAX_HEIGHT / image.height)
    width, height = (max(1, round(scale * side)) for side in image.size)
    parts = {
        "Image": image,
        "Classes": overlay,
        "Confidence" if is_calibrated else "Confidence (not calibrated)": Image.fromarray(colours_of_confidence),
    }
    entries = _legend_entries(labels, classes)
    rows = -(-len(entries) // COLUMNS)
    panel = Image.new(
        "RGB", (3 * WIDTH + 2 * (GAP + MARGIN), 2 * MARGIN + TITLE + height + GAP + rows * LINE), BACKGROUND
    )
    draw = ImageDraw.Draw(panel)
    font, title_font = ImageFont.load_default(size=TEXT_SIZE), ImageFont.load_default(size=TITLE_SIZE)
    for position, (title, part) in enumerate(parts.items()):
        left = MARGIN + position * (WIDTH + GAP)
        draw.text((left, MARGIN + TITLE // 2 - 4), title, fill=INK, font=title_font, anchor="lm")
        panel.paste(part.resize((width, height), Image.Resampling.LANCZOS), (left, MARGIN + TITLE))
    top = MARGIN + TITLE + height + GAP
    _draw_scale(panel, draw, MARGIN + 2 * (WIDTH + GAP), top, font)
    column_width = (2 * WIDTH + GAP) // COLUMNS
    for number, (index, share) in enumerate(entries):
        left, line = MARGIN + number % COLUMNS * column_width, top + number // COLUMNS * LINE
        draw.rectangle(
            (left, line + 6, left + SWATCH, line + LINE - 7), fill=tuple(colours[index].tolist()), outline=INK
        )
        left += SWATCH + 10
        text = _shortened(classes[index], font, column_width - SWATCH - 130)
        draw.text((left, line + LINE // 2), text, INK, font, anchor="lm")
        left += round(font.getlength(text)) + 10
        draw.text((left, line + LINE // 2), f"{100 * share:.1f} %", SECOND_INK, font, anchor="lm")
    return panel


def _legend_entries(labels: np.ndarray, classes: dict[int, str]) -> list[tuple[int, float]]:
    """The classes that occur with their shares, the largest first."""
    counts = count_pixels(labels, max(classes) + 1)
    order = np.argsort(-counts, kind="stable").tolist()
    return [(index, counts[index] / labels.size) for index in order if counts[index]]


def _draw_scale(panel: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, font: Font) -> None:
    """Draws the colours of confidences from 0 to 1."""
    ramp = np.broadcast_to(confidence_table()[None, 1:], (LINE - 13, 255, 3))
    bar = Image.fromarray(np.ascontiguousarray(ramp)).resize((WIDTH - 60, LINE - 13))
    draw.text((left, top + LINE // 2), "0", INK, font, anchor="lm")
    panel.paste(bar, (left + 30, top + 6))
    draw.text((left + WIDTH, top + LINE // 2), "1", INK, font, anchor="rm")


def _shortened(text: str, font: Font, width: int) -> str:
    """A name that fits into `width` pixels, with an ellipsis if it was too long."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
