"""The model of `mfuser app`: images of limited size, confidence, and class names that visitors can edit."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from mfuser.class_names_mfuser import checked_class_names, label_names, load_tokenizer
from mfuser.confidence_mfuser import UNKNOWN
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.images_mfuser import scaled_size
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.scripts.app_view import SegmentedImage
from mfuser.scripts.segmentation import segment_with_confidence

# Larger files are refused before they are decoded.
MAX_FILE_PIXELS = 2**26
# Larger images are reduced. The second limit applies to all classes together: 256 MiB of scores.
MAX_PIXELS, MAX_SCORES = 2**22, 2**26
MAX_NAMED_MODELS = 4


def check_class_count(class_names: Sequence[str]):
    """Raises `ValueError` if there are more classes than label images have ids, besides that of unknown pixels."""
    if len(class_names) > UNKNOWN:
        raise ValueError(
            f"There are {len(class_names)} classes; at most {UNKNOWN} are possible, because label images have 8 "
            "bits and one value for unknown pixels."
        )


def check_number_of_pixels(path: Path):
    """Raises `ValueError` if an image file has more than `MAX_FILE_PIXELS` pixels, without decoding it."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error} At most {MAX_FILE_PIXELS / 1e6:.0f} million pixels are accepted.") from error
    if width * height > MAX_FILE_PIXELS:
        raise ValueError(
            f"The image has {width} x {height} pixels, {width * height / 1e6:.0f} million; at most "
            f"{MAX_FILE_PIXELS / 1e6:.0f} million are accepted."
        )


def reduced(image: np.ndarray, num_classes: int) -> np.ndarray:
    """
    Reduces an image whose pixels or scores would exceed the limits of the page.

    Args:
        image (`np.ndarray` of shape `(3, height, width)` and type `uint8`):
            An RGB image.
        num_classes (`int`):
            Number of classes, each of which has a score per pixel.

    Returns:
        `np.ndarray` of type `uint8`: The image, of the same shape if it is within the limits.
    """
    excess = image[0].size / min(MAX_PIXELS, MAX_SCORES // num_classes)
    if excess <= 1:
        return image
    height, width = scaled_size(image.shape[1], image.shape[2], excess**-0.5)
    picture = Image.fromarray(image.transpose(1, 2, 0)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1)


class Segmenter:
    """
    A model and its image processor, with class names that each visitor may edit.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model, which is not changed.
        processor ([`MFuserImageProcessor`]):
            Its image processor.
        tokenizer (*optional*):
            Tokenizer of its text encoder, or its folder or Hub id.

    Raises:
        ValueError: If the model has too many classes, or if `tokenizer` cannot be loaded or the model
            has no text encoder for it.
    """

    def __init__(self, model: MFuserForSemanticSegmentation, processor: MFuserImageProcessor, tokenizer=None):
        self.model, self.processor, self.tokenizer = model, processor, None
        self.class_names = label_names(model.config.id2label)
        check_class_count(self.class_names)
        self.names_are_fixed_because = ""
        self._named_models: OrderedDict[tuple[str, ...], MFuserForSemanticSegmentation] = OrderedDict()
        if not model.config.use_text_encoder:
            if tokenizer is not None:
                raise ValueError("--tokenizer is for models with a text encoder, which this model does not have")
            self.names_are_fixed_because = (
                "This model has no text encoder: it stores the embeddings of its class names, which cannot be edited."
            )
            return
        try:
            self.tokenizer = load_tokenizer(tokenizer, model.name_or_path)
        except ValueError:
            if tokenizer is not None:
                raise
            self.names_are_fixed_because = (
                "Class names cannot be edited, because the model's folder contains no tokenizer: start "
                "mfuser app with --tokenizer, the folder or Hub id of the tokenizer of its text encoder."
            )

    def model_with(self, class_names: list[str]) -> MFuserForSemanticSegmentation:
        """Returns the model with these class names; it shares all weights but those of the classes."""
        if class_names == self.class_names:
            return self.model
        key = tuple(class_names)
        if key not in self._named_models:
            shared = {id(tensor): tensor for tensor in chain(self.model.parameters(), self.model.buffers())}
            named = copy.deepcopy(self.model, shared)
            named.set_class_names(class_names, self.tokenizer)
            self._named_models[key] = named
        self._named_models.move_to_end(key)
        while len(self._named_models) > MAX_NAMED_MODELS:
            self._named_models.popitem(last=False)
        return self._named_models[key]

    def segment(self, name: str, image: np.ndarray, class_names: list[str]) -> SegmentedImage:
        """Segments an RGB image of shape (3, H, W), which is reduced if it exceeds the limits of the page."""
        image = reduced(image, len(class_names))
        model = self.model_with(class_names)
        labels, confidence = segment_with_confidence(image, model, self.processor)
        return SegmentedImage(
            name=name,
            pixels=image.transpose(1, 2, 0),
            labels=labels.astype(np.uint8),
            confidence=confidence,
            class_names=class_names,
            is_calibrated=model.config.confidence_temperature is not None,
        )

    def parse_names(self, text: str) -> list[str]:
        """
        Returns the class names in a text, one per line.

        Raises:
            ValueError: If there are none or too many, or if one occurs more than once.
        """
        if self.names_are_fixed_because:
            raise ValueError(self.names_are_fixed_because)
        class_names = checked_class_names([line.strip() for line in text.splitlines() if line.strip()])
        check_class_count(class_names)
        return class_names
