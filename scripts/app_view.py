"""The results that `mfuser app` shows: the overlay, the legend and the files to download."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from mfuser.confidence_mfuser import UNKNOWN
from mfuser.scripts import palettes
from mfuser.scripts.palettes import (
    CONFIDENCE_COLOURS,
    UNKNOWN_COLOUR,
    UNKNOWN_NAME,
    confidence_indices,
    confidence_table,
)

# Longer edge of the overlay on the page; the file to download has the size of the image.
PREVIEW_EDGE = 1280

CLASSES, CONFIDENCE = "Classes", "Confidence"


@dataclass(frozen=True)
class View:
    """
    The settings of the page.

    Args:
        kind (`str`):
            Whether colours are those of the classes, `CLASSES`, or of their confidence, `CONFIDENCE`.
        opacity (`float`):
            Opacity of the colours, from 0 to 1.
        threshold (`float`):
            Pixels of lower confidence are unknown.
        shown (`Sequence[str]`, *optional*):
            Names of the classes that are coloured; by default all.
    """

    kind: str = CLASSES
    opacity: float = 0.5
    threshold: float = 0.0
    shown: Sequence[str] | None = None


@dataclass
class SegmentedImage:
    """
    An image and what the model found in it; eight bytes per pixel.

    Args:
        name (`str`):
            Name of the image file, without suffix.
        pixels (`np.ndarray` of shape `(height, width, 3)` and type `uint8`):
            The image.
        labels (`np.ndarray` of shape `(height, width)` and type `uint8`):
            Class ids.
        confidence (`np.ndarray` of shape `(height, width)` and type `float32`):
            Confidence, from 0 to 1.
        class_names (`list[str]`):
            Names of the classes.
        is_calibrated (`bool`, *optional*, defaults to `False`):
            Whether the model's confidence is calibrated.
    """

    name: str
    pixels: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray
    class_names: list[str]
    is_calibrated: bool = False
    # Deleted with this object.
    folder: TemporaryDirectory = field(default_factory=lambda: TemporaryDirectory(prefix="mfuser-app-"))

    def labels_above(self, threshold: float) -> np.ndarray:
        """The class ids, or `UNKNOWN` where the confidence is below `threshold`."""
        return np.where(self.confidence < threshold, np.uint8(UNKNOWN), self.labels)

    def shares(self, threshold: float) -> np.ndarray:
        """The share of each class id, from 0 to 255, in all pixels."""
        return np.bincount(self.labels_above(threshold).ravel(), minlength=256) / self.labels.size


def draw(result: SegmentedImage, view: View) -> Image.Image:
    """Draws the image, overlaid with the colours of the classes that are shown, or of their confidence."""
    labels = result.labels_above(view.threshold)
    if view.kind == CONFIDENCE:
        indices, table = confidence_indices(result.confidence, labels == UNKNOWN), confidence_table()
    else:
        indices, table = labels, palettes.label_colours(result.class_names)
    overlay = palettes.overlay(Image.fromarray(result.pixels), indices, table, view.opacity)
    hidden = np.zeros(256, dtype=bool)
    if view.shown is not None:
        hidden[: len(result.class_names)] = [name not in view.shown for name in result.class_names]
    return Image.fromarray(np.where(hidden[labels][..., None], result.pixels, np.asarray(overlay)))


def draw_preview(result: SegmentedImage, view: View) -> Image.Image:
    """[`draw`], reduced to `PREVIEW_EDGE`."""
    picture = draw(result, view)
    picture.thumbnail((PREVIEW_EDGE, PREVIEW_EDGE), Image.Resampling.BILINEAR)
    return picture


def legend_html(result: SegmentedImage, view: View) -> str:
    """The legend as an HTML table: colour, name and share of each class, the largest share first."""
    shares, table = result.shares(view.threshold), palettes.label_colours(result.class_names)
    rows = []
    for index in np.argsort(-shares[: len(result.class_names)], kind="stable").tolist():
        name = result.class_names[index]
        hidden = view.shown is not None and name not in view.shown
        rows.append(_legend_row(name, table[index].tolist(), shares[index], hidden))
    if view.threshold > 0:
        rows.append(_legend_row(UNKNOWN_NAME, UNKNOWN_COLOUR, shares[UNKNOWN]))
    stops = ", ".join(f"rgb{colour}" for colour in CONFIDENCE_COLOURS)
    scale = (
        f'<div class="scale">confidence 0<span style="background: linear-gradient(to right, {stops})"></span>1</div>'
    )
    return (
        "<table><caption>Share of the pixels</caption>"
        '<thead><tr><th scope="col">Class</th><th scope="col">Share</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
        f"{scale if view.kind == CONFIDENCE else ''}"
        f"<p>Mean confidence: {result.confidence.mean():.2f}{'' if result.is_calibrated else ', not calibrated'}</p>"
    )


def _legend_row(name: str, colour: Sequence[int], share: float, hidden: bool = False) -> str:
    return (
        f'<tr{" class=hidden" if hidden else ""}><th scope="row">'
        f'<span class="swatch" style="background: rgb({", ".join(map(str, colour))})"></span>'
        f"{escape(name)}{' (hidden)' if hidden else ''}</th><td>{100 * share:.1f} %</td></tr>"
    )


def legend_entries(result: SegmentedImage, threshold: float) -> dict[str, dict]:
    """The legend as written to a file: name, colour and share of each label value."""
    names = dict(enumerate(result.class_names))
    if threshold > 0:
        names[UNKNOWN] = UNKNOWN_NAME
    shares, table = result.shares(threshold), palettes.label_colours(result.class_names)
    return {
        str(index): {"name": name, "colour": table[index].tolist(), "share": round(float(shares[index]), 6)}
        for index, name in names.items()
    }


def write_results(result: SegmentedImage, view: View) -> list[str]:
    """
    Writes the overlay, the labels and the legend into the result's temporary folder.

    Args:
        result ([`SegmentedImage`]):
            The segmented image.
        view ([`View`]):
            The settings of the page. In the labels, unknown pixels are 255; hidden classes are included.

    Returns:
        `list[str]`: The paths of the files.
    """
    folder = Path(result.folder.name)
    overlay, labels = folder / f"{result.name}_overlay.jpg", folder / f"{result.name}_labels.png"
    legend = folder / f"{result.name}_legend.json"
    draw(result, view).save(overlay, quality=95)
    palettes.label_image(result.labels_above(view.threshold), palettes.label_colours(result.class_names)).save(labels)
    entries = json.dumps(legend_entries(result, view.threshold), indent=2, ensure_ascii=False)
    legend.write_text(f"{entries}\n", encoding="utf-8")
    return [str(overlay), str(labels), str(legend)]
