"""Image processor of MFuser: prepares images and label maps, and turns scores into label maps."""

import difflib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
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
from .confidence_mfuser import check_threshold, mark_unknown, resize_maps, resized_confidences
from .images_mfuser import (
    SUPPORTED_SIZES,
    MFuserBatchFeature,
    check_range,
    label_array,
    open_image,
    resize,
    resized_size,
    rgb_image,
    to_numpy,
    to_uint8_or_float32,
)
from .postprocessing_mfuser import check_sizes, label_map_of_scores

logger = logging.get_logger(__name__)

# Other fields of the file of a saved image processor, and arguments that Transformers passes when it loads one.
SAVED_ALONG = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}


class MFuserImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # ImagesKwargs is a TypedDict
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether label 0 means "no class", as in ADE20K: 0 becomes 255 (ignored), every other label is decreased by
        one, and 255 is kept.
    """

    do_reduce_labels: bool | None


CHECKED_VALUES = ("rescale_factor", "image_mean", "image_std", "resample")
SETTINGS = frozenset({**ImagesKwargs.__annotations__, **MFuserImageProcessorKwargs.__annotations__})


class MFuserImageProcessor(PilBackend):
    r"""
    Constructs an MFuser image processor.

    It uses only PIL and NumPy, so that an image gives the same pixels with and without torchvision. By default, an
    image keeps its size (in eval mode the model segments images of any size by sliding windows), is scaled to [0, 1]
    and is normalised with CLIP's mean and standard deviation.

    - **Images** may be PIL images, NumPy arrays or torch tensors of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or
      4 channels, batches of such arrays, paths or URLs, or lists of these with different sizes. Greyscale images are
      converted to RGB, an alpha channel is dropped, and 16-bit values (modes `I;16` and `I`, dtype uint16) are scaled
      to 8 bits (except in Transformers' pipelines, which clip them at 255 before the processor). Floating-point images
      hold values from 0 to 255, or from 0 to 1 with `do_rescale=False`.
    - **Resizing** is enabled by `do_resize=True` or by passing a `size` to the constructor, to `from_pretrained` or to
      a call. The published test protocols resize to the largest fit with the aspect ratio kept:
      `size={"shortest_edge": 1024, "longest_edge": 2048}` for Cityscapes and Mapillary Vistas,
      `{"shortest_edge": 720, "longest_edge": 1280}` for BDD100K; see [`resized_size`] for the other forms. Images are
      resized with PIL's bilinear filter, which antialiases when it downsamples; mmcv, used for the published numbers,
      does not. Label maps are resized by nearest neighbour.
    - **Batches** of images with different sizes are padded at the right and at the bottom to the largest size (or to
      `pad_size`), with 0 after normalisation and with label 255, as in training. The model does not mask the padding,
      so scores close to it differ slightly from those of the unpadded image; pass images one by one for exact results.
      `post_process_semantic_segmentation` removes the padding.

    Args:
        do_resize (`bool`, *optional*, defaults to `False`):
            Whether to resize. Defaults to `True` if a `size` is passed.
        size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 512}`):
            Size after resizing, in pixels. The default, the training crop, is used with `do_resize=True` alone.
        resample (`PILImageResampling`, *optional*, defaults to `PILImageResampling.BILINEAR`):
            Filter with which images are resized.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether to multiply the pixel values by `rescale_factor`, 1/255 by default.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to normalise the rescaled values with `image_mean` and `image_std`, CLIP's by default.
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Whether to convert images to RGB. If `False`, images without exactly three channels raise an error.
        do_pad (`bool`, *optional*, defaults to `True`):
            Whether to pad the images of a batch to `pad_size`, by default the largest height and width among them.
        do_reduce_labels (`bool`, *optional*, defaults to `False`):
            Whether label 0 means "no class", see [`MFuserImageProcessorKwargs`].
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
        own = {name: value for name, value in kwargs.items() if name not in SAVED_ALONG and not name.startswith("_")}
        _check_settings(own)
        validate_typed_dict(self.valid_kwargs, own)
        super().__init__(**_resize_if_size_is_given(kwargs))
        _check_values({name: getattr(self, name) for name in CHECKED_VALUES})
        self._changed_in_a_call: set[str] = set()

    @classmethod
    def from_dict(cls, image_processor_dict: dict, **kwargs):
        # Any other name may be an argument of the download or of the pipeline, as `device_map` is.
        misspelt = [n for n in kwargs if n not in SETTINGS and n != "device_map" and _nearest_setting(n)]
        if not kwargs.get("return_unused_kwargs"):
            _check_settings(misspelt)
        return super().from_dict(image_processor_dict, **_resize_if_size_is_given(kwargs))

    def to_dict(self) -> dict:
        settings = super().to_dict()
        settings.pop("_changed_in_a_call", None)
        return settings

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[MFuserImageProcessorKwargs],
    ) -> BatchFeature:
        """
        Prepares images, and optionally their label maps, for the model.

        Args:
            images (`ImageInput`):
                One image or several, see the class.
            segmentation_maps (`ImageInput`, *optional*):
                One label map per image, with the same height and width: integer arrays or tensors of shape (H, W) or
                (1, H, W), or PIL images of one channel (for a palette image, its indices are the labels).
            kwargs:
                Any argument of the class, for this call only, and `return_tensors` and `input_data_format`.

        Returns:
            [`MFuserBatchFeature`]: `pixel_values`, float32 of shape (B, 3, H, W), and `labels`, int64 of shape
            (B, H, W), if label maps were passed. Lists of arrays if `return_tensors` is `None`. Its attributes
            `image_sizes` and `input_sizes` say what was done to each image; pass it to
            `post_process_semantic_segmentation` as `inputs`.

        Raises:
            ValueError: If an image, a label map or a setting is invalid.
        """
        _check_settings(kwargs)
        return super().preprocess(images, segmentation_maps, **_resize_if_size_is_given(kwargs))

    def _standardize_kwargs(self, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        for name, supported in (("size", SUPPORTED_SIZES), ("pad_size", ({"height", "width"},))):
            size = dict(kwargs[name]) if kwargs[name] is not None else None
            if size is not None and set(size) not in supported:
                forms = ", ".join(str(sorted(keys)) for keys in supported)
                raise ValueError(f"`{name}` is {size}; its keys must be one of {forms}.")
            if size is not None and any(length < 1 for length in size.values()):
                raise ValueError(f"`{name}` is {size}; every length must be at least 1 pixel.")
            if size is not None and not all(isinstance(length, int) for length in size.values()):
                raise ValueError(f"`{name}` is {size}; every length must be an integer.")
        size = kwargs["size"]
        if size is not None and set(dict(size)) == {"longest_edge"}:
            # An equivalent form of the size that Transformers' example scripts can read.
            kwargs["size"] = SizeDict(shortest_edge=size.longest_edge, longest_edge=size.longest_edge)
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs):
        super()._validate_preprocess_kwargs(**kwargs)
        _check_values(kwargs)
        if kwargs["do_center_crop"]:
            raise ValueError("`do_center_crop` is True; it must be unset or False: the processor does not crop.")
        if kwargs["data_format"] not in (None, ChannelDimension.FIRST):
            raise ValueError(f"`data_format` is {kwargs['data_format']!r}; it must be unset or 'channels_first'.")

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
                label_array(segmentation_map, do_reduce_labels)
                for segmentation_map in self._as_list(segmentation_maps, batch_ndim=3)
            ]
            image_sizes, map_sizes = [image.shape[1:] for image in images], [label_map.shape for label_map in maps]
            if image_sizes != map_sizes:
                raise ValueError(
                    f"The images have the sizes {image_sizes} and the segmentation maps {map_sizes}; there must be "
                    "one map per image, with the image's (height, width)."
                )

        image_sizes = [image.shape[1:] for image in images]
        for name, value in (("do_resize", kwargs["do_resize"]), ("size", kwargs["size"]), ("pad_size", pad_size)):
            if value != getattr(self, name):
                self._changed_in_a_call.add(name)
        images = self._preprocess(images, **kwargs)
        input_sizes = [image.shape[1:] for image in images]
        if maps is not None and kwargs["do_resize"]:
            size, nearest = kwargs["size"], PILImageResampling.NEAREST
            maps = [resize(rows, resized_size(rows.shape[0], rows.shape[1], size), nearest) for rows in maps]
        if do_pad:
            images = self.pad(images, pad_size=pad_size)
            if maps is not None:
                maps = self.pad([label_map[None] for label_map in maps], pad_size=pad_size, fill_value=IGNORE_INDEX)
                maps = [label_map[0] for label_map in maps]
        elif return_tensors is not None and len({image.shape for image in images}) > 1:
            raise ValueError(
                f"Images of the sizes {[image.shape[1:] for image in images]} can't be stacked: pad them "
                '(`do_pad=True`), resize them to one `size={"height": ..., "width": ...}` or pass them one by one.'
            )

        data = {"pixel_values": images}
        if maps is not None:
            data["labels"] = [label_map.astype(np.int64) for label_map in maps]
        return MFuserBatchFeature(data, return_tensors, image_sizes=image_sizes, input_sizes=input_sizes)

    def fetch_images(self, image_url_or_urls):
        if isinstance(image_url_or_urls, str):
            return open_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def _as_list(self, images: ImageInput, batch_ndim: int) -> list:
        """Returns a flat list; opens paths and URLs, and splits arrays of `batch_ndim` dimensions."""
        images = self.fetch_images(images)
        if not isinstance(images, list):
            images = list(images) if getattr(images, "ndim", None) == batch_ndim else [images]
        if not images:
            raise ValueError("No image was passed.")
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
            check_range(image, do_rescale, do_normalize)
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
        """Resizes an image of shape (C, H, W) to `size`, see [`resized_size`]."""
        _, height, width = image.shape
        new_size = resized_size(height, width, size)
        resample = PILImageResampling.BILINEAR if resample is None else resample
        return np.stack([resize(channel, new_size, resample) for channel in image])

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Converts an image of any accepted kind to an array of shape (3, H, W), of uint8 or float32.

        The base class is not used, because its treatment of alpha channels, greyscale images and 16-bit images differs
        between releases of Transformers.
        """
        if isinstance(image, Image.Image):
            # The range of floating-point values is checked against the settings, see `check_range`.
            array = np.asarray(rgb_image(image) if do_convert_rgb and image.mode != "F" else image)
            input_data_format = ChannelDimension.LAST
        else:
            array = to_numpy(image)

        if array.size == 0 or array.ndim not in (2, 3):
            raise ValueError(f"An image has the shape {array.shape}; it must be (H, W), (H, W, C) or (C, H, W).")
        array = to_uint8_or_float32(array)
        if array.ndim == 2:
            array = array[None]
        else:
            if input_data_format is None:
                if array.shape[0] not in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
                    raise ValueError(f"An image has the shape {array.shape}; it must have 1, 3 or 4 channels.")
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
                f"An image has {channels} channels; MFuser takes images of three channels"
                + ("." if do_convert_rgb else " (`do_convert_rgb=True` converts images of 1 and 4 channels).")
            )
        return array

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
        input_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        inputs: MFuserBatchFeature | None = None,
        return_confidence: bool = False,
        unknown_threshold: float | None = None,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """
        Converts the output of [`MFuserForSemanticSegmentation`] into label maps.

        Args:
            outputs ([`MFuserForSemanticSegmentationOutput`]):
                Output of the model; `outputs.logits` are scores of shape (B, K, H, W) at the size of `pixel_values`.
            target_sizes (`list[tuple[int, int]]` or `torch.Tensor`, *optional*):
                (height, width) of each label map, usually the size of the original image. Scores are resized
                bilinearly before the argmax. By default that of the images in `inputs`, or without `inputs` the size
                of the scores, padding included.
            return_segmentation_scores (`bool`, *optional*, defaults to `False`):
                Whether to also return the scores.
            input_sizes (`list[tuple[int, int]]` or `torch.Tensor`, *optional*):
                (height, width) of each image in `pixel_values` before padding. By default that of `inputs`; without
                `inputs` they are inferred from `target_sizes` and the settings of this processor.
            inputs ([`MFuserBatchFeature`], *optional*):
                What this processor returned for the images, which records how each was resized and padded. Required
                for a batch of several images if a call changed the size or the padding.
            return_confidence (`bool`, *optional*, defaults to `False`):
                Whether to also return the confidences, which the model gives with `output_confidence=True`.
            unknown_threshold (`float`, *optional*):
                Pixels of lower confidence than this are labelled 255 (unknown); needs `output_confidence=True` too.

        Returns:
            `list[torch.Tensor]`: For each image a label map of shape (height, width), int64; or, if scores or
            confidences are returned, an object with `segmentation`, `segmentation_scores` of shape (K, height, width)
            and `confidence` of shape (height, width).

        Raises:
            ValueError: If a size is invalid or missing, the padding of a batch can't be inferred, scores are not
                finite, the threshold is not in [0, 1], or `outputs` lack confidences that are needed.
        """
        check_threshold(unknown_threshold, num_labels=outputs.logits.shape[1])
        logits = outputs.logits
        logits_size = tuple(logits.shape[-2:])
        if inputs is not None:
            if not isinstance(inputs, MFuserBatchFeature):
                raise ValueError(f"`inputs` is a {type(inputs).__name__}; it must be what this processor returned.")
            target_sizes = inputs.image_sizes if target_sizes is None else target_sizes
            input_sizes = inputs.input_sizes if input_sizes is None else input_sizes
        if target_sizes is not None:
            target_sizes = check_sizes("target_sizes", target_sizes, len(logits))
        if input_sizes is not None:
            input_sizes = check_sizes("input_sizes", input_sizes, len(logits))
            if any(height > logits_size[0] or width > logits_size[1] for height, width in input_sizes):
                raise ValueError(f"`input_sizes` {input_sizes} must not exceed the scores' size, {logits_size}.")
        elif target_sizes is not None and self.do_pad:
            input_sizes = self._sizes_before_padding(target_sizes, logits_size)
        else:
            input_sizes = [logits_size] * len(logits)

        confidences: list[torch.Tensor] = []
        if return_confidence or unknown_threshold is not None:
            confidences = resized_confidences(outputs, input_sizes, target_sizes)
        results = []
        for index, (height, width) in enumerate(input_sizes):
            data = {}
            scores = logits[index, :, :height, :width]
            size = (height, width) if target_sizes is None else target_sizes[index]
            if return_segmentation_scores:
                scores = data["segmentation_scores"] = resize_maps(scores.float(), size)
            data["segmentation"] = label_map_of_scores(scores, size).long()
            if unknown_threshold is not None:
                data["segmentation"] = mark_unknown(data["segmentation"], confidences[index], unknown_threshold)
            if return_confidence:
                data["confidence"] = confidences[index]
            results.append(
                SemanticSegmentationPostProcessorOutput(data=data) if len(data) > 1 else data["segmentation"]
            )
        return results

    def _sizes_before_padding(
        self, image_sizes: list[tuple[int, int]], padded_size: tuple[int, int]
    ) -> list[tuple[int, int]]:
        """Returns the size of each image of a batch before padding, inferred from this processor's settings."""
        sizes = [resized_size(*size, self.size) if self.do_resize else size for size in image_sizes]
        largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
        expected = largest if self.pad_size is None else (self.pad_size.height, self.pad_size.width)
        same_size = len(set(image_sizes)) == 1
        # Images of one size are padded only to a `pad_size`, whatever they were resized to.
        relevant = {"pad_size"} if same_size and self.pad_size is None else {"do_resize", "size", "pad_size"}
        if not self._changed_in_a_call & relevant:
            if expected == padded_size and largest[0] <= padded_size[0] and largest[1] <= padded_size[1]:
                return sizes
            # The batch was prepared with other settings: images of one size were not padded.
            if self.pad_size is None and same_size:
                return [padded_size] * len(sizes)
        elif set(sizes) == {padded_size}:
            return sizes
        raise ValueError(
            f"Images of the sizes {image_sizes} may have been resized and padded to {padded_size} in several ways: "
            "pass `inputs`, the batch that this processor returned, or `input_sizes`, the (height, width) of each "
            f"image in `pixel_values` before padding ({padded_size} for an image without padding)."
        )


def _nearest_setting(name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.75)), None)


def _check_settings(names: Iterable[str]) -> None:
    """Raises `ValueError` if a name is not a setting of the image processor."""
    for name in names:
        if name not in SETTINGS:
            nearest = _nearest_setting(name)
            hint = f"did you mean `{nearest}`?" if nearest else f"it has {', '.join(sorted(SETTINGS))}."
            raise ValueError(f"MFuserImageProcessor has no setting `{name}`; {hint}")


def _check_values(settings: dict) -> None:
    """Raises `ValueError` for a number that no image can be processed with."""
    for name, positive in (("rescale_factor", True), ("image_mean", False), ("image_std", True)):
        value = settings[name]
        values = [] if value is None else list(value) if isinstance(value, Iterable) else [value]
        if not all(math.isfinite(each) and (each > 0 or not positive) for each in values):
            raise ValueError(f"`{name}` is {value}; it must be finite{' and positive' if positive else ''}.")
        if isinstance(value, Iterable) and len(values) != 3:
            raise ValueError(f"`{name}` is {value}; it must hold one number for each of three channels.")
    if settings["resample"] is not None and settings["resample"] not in list(PILImageResampling):
        accepted = ", ".join(f"{each.value} ({each.name.lower()})" for each in PILImageResampling)
        raise ValueError(f"`resample` is {settings['resample']}; it must be one of {accepted}.")


def _resize_if_size_is_given(kwargs: dict) -> dict:
    """Enables resizing if a size is passed, so that it is not silently ignored."""
    size = kwargs.get("size")
    if size is not None:
        kwargs.setdefault("do_resize", True)
        if isinstance(size, (list, tuple)) and len(size) != 2:
            raise ValueError(f"`size` is {size}; a list must hold height and width.")
    return kwargs


__all__ = ["MFuserBatchFeature", "MFuserImageProcessor"]

MFuserImageProcessor.register_for_auto_class()
