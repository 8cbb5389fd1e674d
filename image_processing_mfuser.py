"""Images in, label maps out: the image processor of MFuser."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, logging

from .class_names_mfuser import IGNORE_INDEX

logger = logging.get_logger(__name__)

SUPPORTED_SIZES = (
    {"shortest_edge", "longest_edge"},
    {"shortest_edge"},
    {"longest_edge"},
    {"max_height", "max_width"},
    {"height", "width"},
)


class MFuserImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether label 0 means "no class", as in ADE20K: 0 becomes 255 (ignored), every other label moves down by one,
        255 stays.
    """

    do_reduce_labels: bool | None


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(height, width) times `scale`, rounded half up as mmcv's `imrescale` rounds, at least 1 pixel each."""
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resized_size(height: int, width: int, size: SizeDict | dict[str, int]) -> tuple[int, int]:
    """(height, width) in pixels to which an image of `height` x `width` is resized under `size`.

    `{"height", "width"}` is exact. All other forms keep the ratio and give the largest image within every limit they
    name, rounded half up as mmcv's `imrescale` does, which the published test protocols use.
    """
    size = size if isinstance(size, SizeDict) else SizeDict(**size)
    if size.height is not None:
        return size.height, size.width
    limits = (
        (size.shortest_edge, min(height, width)),
        (size.longest_edge, max(height, width)),
        (size.max_height, height),
        (size.max_width, width),
    )
    scale = min(limit / length for limit, length in limits if limit is not None)
    return scaled_size(height, width, scale)


class MFuserImageProcessor(PilBackend):
    r"""Turns images and label maps into what MFuser takes, and scores into label maps.

    One class on PIL and NumPy, so that an image gives the same pixels whether torchvision is installed or not.
    The defaults leave an image at its own size (a model in eval mode segments any size by sliding windows), scale
    it to [0, 1] and normalise it with CLIP's mean and standard deviation.

    - **Images** may be PIL images, NumPy arrays or torch tensors of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or
      4 channels, batches of such arrays, paths or URLs, or lists of these of different size. Grey images become RGB,
      an alpha channel is dropped, 16-bit values (modes `I;16` and `I`, dtype uint16) are scaled to 8 bit.
      Floating-point images hold 0 to 255, or 0 to 1 with `do_rescale=False`.
    - **Resizing** happens with `do_resize=True` or where a `size` is given, be it to the constructor, to
      `from_pretrained` or in a call. The published test protocols are a longest fit with the ratio kept:
      `size={"shortest_edge": 1024, "longest_edge": 2048}` for Cityscapes and Mapillary Vistas,
      `{"shortest_edge": 720, "longest_edge": 1280}` for BDD100K; see [`resized_size`] for the other forms. Images are
      resized by PIL's bilinear filter, which smooths when it shrinks; mmcv, used for the published numbers, doesn't.
      Label maps are resized to the nearest label.
    - **Batches**: images of different size are padded at the right and at the bottom to the largest (or to
      `pad_size`), with 0 after normalisation and label 255, as in training. The model can't tell padding from image,
      so that scores near it differ a little from those of the image alone: for exact results pass images one by one.
      `post_process_semantic_segmentation` cuts the padding off again.

    Args:
        do_resize (`bool`, defaults to `False`, or `True` where a `size` is given): Whether to resize.
        size (`dict`, defaults to `{"shortest_edge": 512}`): Size after resizing, in pixels. The default is used only
            when resizing is switched on without a size; it is the crop that the model is trained on.
        resample (`PILImageResampling`, defaults to `BILINEAR`): Filter for images.
        do_rescale (`bool`, defaults to `True`), rescale_factor (`float`, defaults to 1/255): Scale of the values.
        do_normalize (`bool`, defaults to `True`), image_mean, image_std: Normalisation, in units after rescaling.
        do_convert_rgb (`bool`, defaults to `True`): Whether to convert to RGB. Without it, an image that has not three
            channels raises.
        do_pad (`bool`, defaults to `True`), pad_size (`dict`, *optional*): Padding of batches, see above.
        do_reduce_labels (`bool`, defaults to `False`): Whether label 0 means "no class", see
            [`MFuserImageProcessorKwargs`].
    """

    valid_kwargs = MFuserImageProcessorKwargs
    do_resize = False
    size = {"shortest_edge": 512}
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    do_pad = True
    do_reduce_labels = False

    def __init__(self, **kwargs: Unpack[MFuserImageProcessorKwargs]):
        super().__init__(**_resize_if_size_is_given(kwargs))

    @classmethod
    def from_dict(cls, image_processor_dict: dict, **kwargs):
        return super().from_dict(image_processor_dict, **_resize_if_size_is_given(kwargs))

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[MFuserImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepares images, and optionally their label maps, for the model.

        Args:
            images: One image or several, see the class.
            segmentation_maps: As many label maps, each of its image's height and width: arrays or tensors of integers,
                (H, W) or (1, H, W), or PIL images of one channel (the indices of a palette image are its labels).
            kwargs: Any argument of the class, for this call alone, and `return_tensors`, `input_data_format`.

        Returns:
            `pixel_values`, float32 (B, 3, H, W), and `labels`, int64 (B, H, W), if maps were given; lists of arrays
            without `return_tensors`.

        Raises:
            ValueError: For an image, a map or a size that can't be used, with what would be right.
        """
        return super().preprocess(images, segmentation_maps, **_resize_if_size_is_given(kwargs))

    def _standardize_kwargs(self, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        for name, supported in (("size", SUPPORTED_SIZES), ("pad_size", ({"height", "width"},))):
            size = dict(kwargs[name]) if kwargs[name] is not None else None
            if size is not None and set(size) not in supported:
                forms = ", ".join(str(sorted(keys)) for keys in supported)
                raise ValueError(f"`{name}` must have the keys of one of {forms}, got {size}.")
            if size is not None and any(length < 1 for length in size.values()):
                raise ValueError(f"Lengths in `{name}` must be at least 1 pixel, got {size}.")
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs):
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs["do_center_crop"]:
            raise ValueError("MFuserImageProcessor does not crop: `do_center_crop` must be unset or False.")
        if kwargs["data_format"] not in (None, ChannelDimension.FIRST):
            raise ValueError(
                f"Images come out channels first, `data_format={kwargs['data_format']!r}` is not possible."
            )

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool | None,
        input_data_format: str | ChannelDimension | None,
        do_reduce_labels: bool | None,
        do_pad: bool | None,
        pad_size: SizeDict | None,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        images = [
            self.process_image(image, do_convert_rgb, input_data_format)
            for image in self._as_list(images, batch_ndim=4)
        ]
        maps = None
        if segmentation_maps is not None:
            maps = [
                _label_map(segmentation_map, do_reduce_labels)
                for segmentation_map in self._as_list(segmentation_maps, batch_ndim=3)
            ]
            image_sizes, map_sizes = [image.shape[1:] for image in images], [label_map.shape for label_map in maps]
            if image_sizes != map_sizes:
                raise ValueError(
                    "Every image needs a segmentation map of its own (height, width): "
                    f"the images have {image_sizes}, the maps {map_sizes}."
                )

        images = self._preprocess(images, **kwargs)
        if maps is not None and kwargs["do_resize"]:
            maps = [
                _resize(label_map, resized_size(*label_map.shape, kwargs["size"]), PILImageResampling.NEAREST)
                for label_map in maps
            ]
        if do_pad:
            images = self.pad(images, pad_size=pad_size)
            if maps is not None:
                maps = self.pad([label_map[None] for label_map in maps], pad_size=pad_size, fill_value=IGNORE_INDEX)
                maps = [label_map[0] for label_map in maps]
        elif return_tensors is not None and len({image.shape for image in images}) > 1:
            raise ValueError(
                f"Images of different size, {[image.shape[1:] for image in images]}, don't fit into one tensor: "
                'pad them (`do_pad=True`), resize them to one `size={"height": ..., "width": ...}`, '
                "or pass them one by one."
            )

        data = {"pixel_values": images}
        if maps is not None:
            data["labels"] = [label_map.astype(np.int64) for label_map in maps]
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _as_list(self, images: ImageInput, batch_ndim: int) -> list:
        """A flat list of images or maps; paths and URLs are opened, an array of `batch_ndim` dimensions is a batch."""
        images = self.fetch_images(images)
        if not isinstance(images, list):
            images = list(images) if getattr(images, "ndim", None) == batch_ndim else [images]
        if not images:
            raise ValueError("No image was given.")
        return images

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool | None,
        size: SizeDict | None,
        resample: PILImageResampling | int | None,
        do_rescale: bool | None,
        rescale_factor: float | None,
        do_normalize: bool | None,
        image_mean: float | Sequence[float] | None,
        image_std: float | Sequence[float] | None,
        **kwargs,
    ) -> list[np.ndarray]:
        processed = []
        for image in images:
            if do_rescale and image.dtype != np.uint8:
                _check_float_range(image)
            if do_resize:
                image = self.resize(image, size, resample)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            processed.append(image)
        return processed

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | int | None = None, **kwargs
    ) -> np.ndarray:
        """Resizes an image (C, H, W) under `size`, see [`resized_size`]."""
        new_size = resized_size(*image.shape[1:], size)
        resample = PILImageResampling.BILINEAR if resample is None else resample
        return np.stack([_resize(channel, new_size, resample) for channel in image])

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> np.ndarray:
        """One image of any accepted kind as an array (3, H, W) of uint8, or of float32 if it holds floats.

        The whole conversion is done here, not by the base class, whose treatment of alpha channels, grey images and
        16-bit images differs between releases of Transformers.
        """
        if isinstance(image, Image.Image):
            # Image.convert would clip 16-bit greys and 32-bit floats at 255.
            if do_convert_rgb and image.mode != "F" and not image.mode.startswith("I"):
                image = image.convert("RGB")
            if image.mode == "I" and image.getextrema()[0] >= 0 and image.getextrema()[1] <= 65535:
                # How older releases of Pillow open a 16-bit grey PNG.
                array = np.asarray(image).astype(np.uint16)
            else:
                array = np.asarray(image)
            input_data_format = ChannelDimension.LAST
        else:
            array = _to_numpy(image)

        if array.size == 0 or array.ndim not in (2, 3):
            raise ValueError(f"An image must have shape (H, W), (H, W, C) or (C, H, W), got {array.shape}.")
        array = _to_uint8_or_float32(array)
        if array.ndim == 2:
            array = array[None]
        else:
            if input_data_format is None:
                if array.shape[0] not in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
                    raise ValueError(f"An image must have 1, 3 or 4 channels, first or last, got shape {array.shape}.")
                input_data_format = infer_channel_dimension_format(array, num_channels=(1, 3, 4))
            if ChannelDimension(input_data_format) == ChannelDimension.LAST:
                array = array.transpose(2, 0, 1)

        channels = array.shape[0]
        if do_convert_rgb and channels == 1:
            array = np.repeat(array, 3, axis=0)
        elif do_convert_rgb and channels == 4:
            array = array[:3]
        if array.shape[0] != 3:
            raise ValueError(
                f"MFuser takes images of three channels, got {channels}"
                + ("." if do_convert_rgb else "; `do_convert_rgb=True` converts images of 1 and 4 channels.")
            )
        return array

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
        input_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Turns the scores of [`MFuserForSemanticSegmentation`] into label maps.

        Args:
            outputs: The model's output; `outputs.logits` are scores (B, K, H, W) at the size of `pixel_values`.
            target_sizes: (height, width) of each label map, usually of the original images. Scores are resized
                bilinearly before the arg-max. Without it, maps have the size of the scores, padding included.
            return_segmentation_scores: Whether to return the scores as well.
            input_sizes: (height, width) that each image had in `pixel_values` before padding. Needed only for a padded
                batch that was prepared with other settings than this processor's own: else, where `target_sizes` are
                the sizes of the original images, the padding is known.

        Returns:
            For each image a map (height, width) of class ids, int64; or, with `return_segmentation_scores`, an object
            with `segmentation`, that map, and `segmentation_scores` (K, height, width).

        Raises:
            ValueError: If there are not as many sizes as images, a size is no pair of positive integers, an input
                size exceeds the scores, or it can't be told where images of different size end in a padded batch.
        """
        logits = outputs.logits
        logits_size = tuple(logits.shape[-2:])
        if target_sizes is not None:
            target_sizes = _check_sizes("target_sizes", target_sizes, len(logits))
        if input_sizes is not None:
            input_sizes = _check_sizes("input_sizes", input_sizes, len(logits))
            if any(height > logits_size[0] or width > logits_size[1] for height, width in input_sizes):
                raise ValueError(f"`input_sizes` {input_sizes} exceed the scores, which are of size {logits_size}.")
        elif target_sizes is not None and self.do_pad:
            input_sizes = self._sizes_before_padding(target_sizes, logits_size)
        else:
            input_sizes = [logits_size] * len(logits)

        results = []
        for index, (height, width) in enumerate(input_sizes):
            scores = logits[index, :, :height, :width].float()
            if target_sizes is not None and target_sizes[index] != (height, width):
                scores = torch.nn.functional.interpolate(
                    scores[None], size=target_sizes[index], mode="bilinear", align_corners=False
                )[0]
            segmentation = scores.argmax(dim=0)
            if return_segmentation_scores:
                segmentation = SemanticSegmentationPostProcessorOutput(
                    data={"segmentation": segmentation, "segmentation_scores": scores}
                )
            results.append(segmentation)
        return results

    def _sizes_before_padding(
        self, image_sizes: list[tuple[int, int]], padded_size: tuple[int, int]
    ) -> list[tuple[int, int]]:
        """Sizes within `padded_size` of a batch made from images of `image_sizes` with this processor's settings.

        Where these settings don't lead to `padded_size`, the batch was made with others: then nothing was padded if
        the images are of one size, and nothing can be said if they are not.
        """
        sizes = [resized_size(*size, self.size) if self.do_resize else size for size in image_sizes]
        largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
        expected = largest if self.pad_size is None else (self.pad_size.height, self.pad_size.width)
        if expected == padded_size and largest[0] <= padded_size[0] and largest[1] <= padded_size[1]:
            return sizes
        if self.pad_size is None and len(set(sizes)) == 1:
            return [padded_size] * len(sizes)
        raise ValueError(
            f"Images of sizes {image_sizes} don't give the padded size {padded_size} with this processor's settings, "
            "so it can't be told where each image ends. Pass `input_sizes`, the (height, width) of each image in "
            f"`pixel_values` before padding ({padded_size} for an image without padding)."
        )


def _resize_if_size_is_given(kwargs: dict) -> dict:
    """A size that is given but not used would be a silent mistake."""
    if kwargs.get("size") is not None:
        kwargs.setdefault("do_resize", True)
    return kwargs


def _to_numpy(image: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        # NumPy has no bfloat16.
        return (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        return image
    raise ValueError(f"Expected a PIL image, an array, a tensor or a flat list of these, got {type(image).__name__}.")


def _to_uint8_or_float32(image: np.ndarray) -> np.ndarray:
    """Pixel values as uint8 if they are integers or booleans, as float32 if they are floats."""
    if image.dtype == np.uint8:
        return image
    if image.dtype == bool:
        return image.astype(np.uint8) * 255
    if image.dtype.kind == "f":
        if not np.isfinite(image).all():
            raise ValueError("The image holds NaN or infinite values.")
        return image.astype(np.float32)
    if image.dtype.kind == "u" and image.dtype.itemsize == 2:
        if 0 < image.max() <= 255:
            logger.warning(
                "A 16-bit image holds no value above 255 and is read as almost black. "
                "If it holds 8-bit values, convert it to uint8."
            )
        return ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if image.dtype.kind in "iu":
        if image.min() < 0 or image.max() > 255:
            raise ValueError(
                f"The image holds {image.dtype} values from {image.min()} to {image.max()}; integers must lie in "
                "0..255, or be of dtype uint16 for a 16-bit image."
            )
        return image.astype(np.uint8)
    raise ValueError(f"An image can't be of dtype {image.dtype}.")


def _check_float_range(image: np.ndarray):
    low, high = image.min(), image.max()
    if low < 0 or high > 255 or 0 < high <= 1:
        raise ValueError(
            f"With `do_rescale=True` a floating-point image must hold values in 0..255, got {low:g} to {high:g}. "
            "For values in 0..1 pass `do_rescale=False`; for normalised ones `do_normalize=False` as well."
        )


def _resize(array: np.ndarray, size: tuple[int, int], resample: PILImageResampling | int) -> np.ndarray:
    """Resizes (H, W) of uint8, int32 or float32, each of which PIL holds as it is, without rounding to 8 bit."""
    height, width = size
    return np.asarray(Image.fromarray(array).resize((width, height), resample))


def _label_map(segmentation_map: ImageInput, do_reduce_labels: bool | None) -> np.ndarray:
    """One label map as int32 (H, W)."""
    if isinstance(segmentation_map, Image.Image):
        labels = np.asarray(segmentation_map)
    else:
        labels = _to_numpy(segmentation_map)
        if labels.ndim == 3 and labels.shape[0] == 1:
            labels = labels[0]
    if labels.ndim != 2 or labels.size == 0:
        raise ValueError(
            f"A segmentation map must have one channel, got shape {labels.shape}. "
            "A colour-coded map must be turned into class ids first; open a palette PNG with `PIL.Image.open`."
        )
    if labels.dtype.kind not in "iub":
        raise ValueError(f"A segmentation map must hold integers, got {labels.dtype}.")
    labels = labels.astype(np.int32)
    if labels.min() < 0:
        raise ValueError(
            f"A segmentation map holds the label {labels.min()}; labels start at 0, ignored pixels are {IGNORE_INDEX}."
        )
    if do_reduce_labels:
        labels = np.where((labels == 0) | (labels == IGNORE_INDEX), IGNORE_INDEX, labels - 1)
    return labels


def _check_sizes(name: str, sizes: Sequence | torch.Tensor, batch_size: int) -> list[tuple[int, int]]:
    """`sizes` as a list of `batch_size` tuples (height, width)."""
    sizes = [tuple(int(length) for length in size) for size in sizes]
    if len(sizes) != batch_size:
        raise ValueError(f"`{name}` must hold one (height, width) per image: {len(sizes)} for {batch_size} images.")
    for size in sizes:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"`{name}` must hold pairs (height, width) of at least 1 pixel, got {size}.")
    return sizes


__all__ = ["MFuserImageProcessor"]

MFuserImageProcessor.register_for_auto_class()
