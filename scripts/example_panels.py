"""Panels of example images: the image, its prediction, its label, and the pixels that are wrong."""

import hashlib
import io
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.evaluation.domains import EvaluationDomain
from mfuser.evaluation.image_scores import KINDS
from mfuser.evaluation.protocols import EvaluationOptions, ProtocolSamples
from mfuser.evaluation.scoring import image_scores
from mfuser.files import atomic_writer
from mfuser.postprocessing_mfuser import label_map_of_scores
from mfuser.scripts import palettes

TILE_WIDTH = 480  # larger images are reduced
OPACITY = 0.6
WRONG = (255, 23, 68)
CAPTION_HEIGHT, GAP = 24, 6
PANEL_NAME = re.compile(rf"({'|'.join(KINDS)})-\d+-[0-9a-f]{{8}}\.png")


def examples_folder(output: Path) -> Path:
    """The folder of the panels of a report whose JSON file is `output`."""
    return output.with_name(f"{output.stem}_examples")


def write_examples(
    output: Path,
    title: str,
    model,
    processor,
    domain: EvaluationDomain,
    options: EvaluationOptions,
    examples: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """
    Segments the chosen images of a domain again and writes their panels into a folder next to the report.

    Args:
        output (`Path`):
            The JSON file of the report, see [`examples_folder`].
        title (`str`):
            The name of the domain in the report, after which its subfolder is named.
        model, processor, domain, options:
            The arguments of `evaluate_domain`.
        examples (`list[dict]`):
            The examples that `evaluate_domain` chose.

    Returns:
        `list[dict]`: The examples, each with its `file` relative to the folder of the report.
    """
    samples = ProtocolSamples(domain, processor, options.evaluation_size(domain))
    folder = Path(examples_folder(output).name, title.replace(":", "-"))
    (output.parent / folder).mkdir(parents=True, exist_ok=True)
    colours = palettes.label_colours(list(domain.id2label.values()))  # also of ignored labels
    written, numbers = [], dict.fromkeys((each["kind"] for each in examples), 0)
    for example in examples:
        numbers[example["kind"]] += 1
        sample = samples[example["row"]]
        if sample.problem is not None or sample.label is None:
            raise ValueError(f"{title}: {example['name']} was scored, but can no longer be read: {sample.problem}")
        prediction = _prediction(model, sample.pixel_values, sample.size, options)
        height, width = sample.size  # half that of the image in one protocol
        image = domain.read(example["row"]).image.resize((width, height))
        stream = io.BytesIO()
        panel(image, prediction, sample.label.numpy(), colours).save(stream, format="png")
        # Named by its content: an evaluation that is interrupted changes no panel of an earlier one.
        digest = hashlib.sha256(stream.getvalue()).hexdigest()[:8]
        file = folder / f"{example['kind']}-{numbers[example['kind']]}-{digest}.png"
        with atomic_writer(output.parent / file) as target:
            target.write(stream.getvalue())
        written.append(example | {"file": file.as_posix()})
    return written


def remove_replaced_examples(output: Path, report: dict[str, Any]) -> None:
    """Deletes the panels of earlier evaluations, whose report a complete one has replaced."""
    results = report["domains"].values()
    named = {output.parent / each["file"] for result in results for each in result.get("examples", ())}
    for file in set(examples_folder(output).glob("*/*.png")) - named:
        if PANEL_NAME.fullmatch(file.name):
            with suppress(OSError):  # the evaluation itself is complete
                file.unlink()


@torch.inference_mode()
def _prediction(model, pixel_values: torch.Tensor, size: tuple[int, int], options: EvaluationOptions) -> np.ndarray:
    scores = image_scores(model, pixel_values[None].to(model.device, model.dtype), options)
    return label_map_of_scores(scores[0], size).cpu().numpy()


def panel(image: Image.Image, prediction: np.ndarray, label: np.ndarray, colours: np.ndarray) -> Image.Image:
    """
    Draws an image, its prediction, its label and its errors side by side, with captions.

    Args:
        image (`Image.Image`):
            An RGB image.
        prediction, label (`np.ndarray` of shape `(height, width)`):
            Class ids; 255 in the label is ignored.
        colours (`np.ndarray` of shape `(256, 3)`):
            RGB colours by id.

    Returns:
        `Image.Image`: The panel. Wrong pixels are red, ignored ones black.
    """
    known = label != IGNORE_INDEX
    wrong = known & (prediction != label)
    errors = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=-1) // 2 + 100
    errors[wrong] = WRONG
    errors[~known] = 0
    share = 100 * wrong.sum() / max(known.sum(), 1)
    tiles = {
        "image": image,
        "prediction": palettes.overlay(image, prediction, colours, OPACITY),
        "label": palettes.overlay(image, label, colours, OPACITY),
        f"errors, {share:.1f} % of the labelled pixels": Image.fromarray(errors),
    }
    width = min(image.width, TILE_WIDTH)
    height = max(round(image.height * width / image.width), 1)
    size = (len(tiles) * (width + GAP) - GAP, height + CAPTION_HEIGHT)
    picture, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=14)
    draw = ImageDraw.Draw(picture)
    for number, (caption, tile) in enumerate(tiles.items()):
        left = number * (width + GAP)
        draw.text((left + 2, CAPTION_HEIGHT // 2), caption, fill="black", font=font, anchor="lm")
        picture.paste(tile.resize((width, height), Image.Resampling.BOX), (left, CAPTION_HEIGHT))
    return picture
