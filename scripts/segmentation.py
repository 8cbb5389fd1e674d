"""Segmentation of images by a model and its image processor: label maps and confidences, also of several frames."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mfuser.confidence_mfuser import confidence_map, mark_unknown, resize_maps
from mfuser.evaluation.large_images import label_map_by_bands, windows_at_once
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.images_mfuser import resized_size
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.postprocessing_mfuser import label_map_of_scores
from mfuser.windows_mfuser import sliding_windows

# Frames in one forward pass: at most this many, and at most this many bytes of pixels and of scores.
MAX_FRAMES_AT_ONCE, MAX_PIXEL_BYTES, MAX_SCORE_BYTES = 8, 2**23, 2**26


@torch.inference_mode()
def segment(image: np.ndarray, model: MFuserForSemanticSegmentation, processor: MFuserImageProcessor) -> np.ndarray:
    """
    Segments an image.

    Without resizing, the memory in use grows with the number of pixels, by less than 40 bytes each, and not with
    pixels times classes. With resizing, it also includes the scores of all classes at the size after resizing.

    Args:
        image (`np.ndarray` of shape `(3, height, width)`):
            RGB, of uint8.
        model ([`MFuserForSemanticSegmentation`]):
            The model, in eval mode.
        processor ([`MFuserImageProcessor`]):
            Resizes and normalises the image.

    Returns:
        `np.ndarray` of shape `(height, width)`: Class ids.

    Raises:
        ValueError: If the image is smaller than a patch, or scores are not finite.
    """
    height, width = image.shape[1:]
    if processor.do_resize:
        image = processor.resize(image, processor.size, processor.resample)

    def pixel_rows(rows: slice) -> torch.Tensor:
        inputs = processor(
            image[:, rows], do_resize=False, do_pad=False, input_data_format="channels_first", return_tensors="pt"
        )
        return inputs["pixel_values"].to(model.device, model.dtype)

    if image.shape[1:] == (height, width):
        labels = label_map_by_bands(model, pixel_rows, (height, width))
    else:
        scores = model(pixel_values=pixel_rows(slice(0, image.shape[1]))).logits[0]
        labels = label_map_of_scores(scores, (height, width))
    return labels.cpu().numpy()


@torch.inference_mode()
def segment_with_confidence(
    image: np.ndarray,
    model: MFuserForSemanticSegmentation,
    processor: MFuserImageProcessor,
    unknown_threshold: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Segments an image, with its confidences; the scores of all classes at the size of the image are kept.

    Args:
        image, model, processor:
            See [`segment`].
        unknown_threshold (`float`, *optional*):
            Pixels of lower confidence than this get the label 255.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Class ids and confidences, both of shape `(height, width)`.
    """
    inputs = processor(image, do_pad=False, input_data_format="channels_first", return_tensors="pt")
    outputs = model(pixel_values=inputs["pixel_values"].to(model.device, model.dtype), output_confidence=True)
    results: list[Any] = processor.post_process_semantic_segmentation(
        outputs, inputs=inputs, return_confidence=True, unknown_threshold=unknown_threshold
    )
    result = results[0]
    return result["segmentation"].cpu().numpy(), result["confidence"].cpu().numpy()


@torch.inference_mode()
def class_scores(
    frames: list[np.ndarray], model: MFuserForSemanticSegmentation, processor: MFuserImageProcessor
) -> torch.Tensor:
    """
    Computes the class scores of several images of one size in one forward pass, which batches windows of all of them.

    Args:
        frames (`list[np.ndarray]`):
            RGB images of shape `(3, height, width)`, of uint8.
        model, processor:
            See [`segment`].

    Returns:
        `torch.Tensor` of shape `(len(frames), num_labels, resized_height, resized_width)`: The scores, at the size
        that the processor resizes to.
    """
    inputs = processor(frames, do_pad=False, input_data_format="channels_first", return_tensors="pt")
    return model(pixel_values=inputs["pixel_values"].to(model.device, model.dtype)).logits


@torch.inference_mode()
def labels_of_scores(
    scores: torch.Tensor, size: tuple[int, int], temperature: float | None, unknown_threshold: float | None
) -> np.ndarray:
    """
    Turns the class scores of an image into its label map.

    Args:
        scores (`torch.Tensor` of shape `(num_labels, scores_height, scores_width)`):
            Class scores.
        size (`tuple[int, int]`):
            (height, width) of the image.
        temperature (`float`, *optional*):
            `confidence_temperature` of the model's configuration.
        unknown_threshold (`float`, *optional*):
            Pixels of lower confidence than this get the label 255.

    Returns:
        `np.ndarray` of shape `size`: Class ids.

    Raises:
        ValueError: If scores are not finite.
    """
    labels = label_map_of_scores(scores, size)
    if unknown_threshold is not None:
        confidence = resize_maps(confidence_map(scores[None].float(), temperature), size)[0]
        labels = mark_unknown(labels, confidence, unknown_threshold)
    return labels.cpu().numpy()


def frames_at_once(
    size: tuple[int, int], model: MFuserForSemanticSegmentation, processor: MFuserImageProcessor
) -> int:
    """
    Number of frames to segment in one forward pass.

    It is more than 1 if the windows of several frames fit into one batch of windows and take little memory.

    Args:
        size (`tuple[int, int]`):
            (height, width) of a frame.
        model, processor:
            See [`segment`].
    """
    height, width = resized_size(*size, processor.size) if processor.do_resize else size
    config = model.config
    windows = len(sliding_windows(height, width, config.crop_size, config.crop_stride))
    frames = windows_at_once(model, (height, width)) // windows
    by_memory = min(
        MAX_SCORE_BYTES // (4 * config.num_labels * height * width), MAX_PIXEL_BYTES // (3 * size[0] * size[1])
    )
    return max(1, min(MAX_FRAMES_AT_ONCE, frames, by_memory))


def count_pixels(labels: np.ndarray, number: int) -> np.ndarray:
    """Number of pixels of each class id below `number`, in a label map."""
    counts = np.zeros(number, dtype=np.int64)
    for row in labels:  # by rows, because `bincount` copies to int64
        counts += np.bincount(row, minlength=number)
    return counts


def weights_hash(model: MFuserForSemanticSegmentation) -> str:
    """SHA-256, in hexadecimal, of the names, shapes and values of a model's weights, before quantisation."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for part in _plain_tensors(tensor.detach()):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors that a tensor of a quantised model consists of; a plain tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):  # the protocol of tensor subclasses, such as torchao's
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_tensors(getattr(tensor, name))
