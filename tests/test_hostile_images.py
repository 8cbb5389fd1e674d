"""Ambiguous images and label maps are refused with a reason; those that are accepted are interpreted correctly."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn import functional as F

from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.postprocessing_mfuser import label_map_of_scores

# --- guarantee: input, settings of the call, message -----------------------------------------------------------------


def floats(low: float, high: float, dtype=np.float32) -> np.ndarray:
    """A floating-point image with values from `low` to `high`."""
    return np.linspace(low, high, 75, dtype=dtype).reshape(5, 5, 3)


BYTES = np.arange(75, dtype=np.uint8).reshape(5, 5, 3) * 3
REFUSED = {
    "0 to 1": (floats(0, 1), {}, "from 0 to 1; with `do_rescale=True` they must lie in 0..255"),
    "0 to slightly above 1": (floats(0, 1.02), {}, "below which they could be 0..1"),
    "0 to 3": (floats(0, 3), {}, "below which they could be 0..1"),
    "slightly below 0": (floats(-0.02, 200), {}, "must lie in 0..255"),
    "above 255": (floats(0, 256), {}, "must lie in 0..255"),
    "normalised": (floats(-1.8, 2.2), {}, "must lie in 0..255"),
    "0 to 255, not rescaled": (floats(0, 255), {"do_rescale": False}, "`do_rescale=False` they must lie in 0..1"),
    "bytes, not rescaled": (BYTES, {"do_rescale": False}, "integer image .* they must lie in 0..1"),
    "normalised twice": (floats(-1.8, 2.2), {"do_rescale": False}, "they must lie in 0..1"),
    "0 to 255, taken as normalised": (
        floats(0, 255), {"do_rescale": False, "do_normalize": False}, "at most 10 in absolute value"
    ),
    "NaN": (np.where(np.eye(5)[..., None] > 0, np.nan, floats(0, 255)), {}, "NaN or infinite"),
    "infinite": (floats(0, np.inf), {}, "NaN or infinite"),
    "infinite as float32": (floats(0, 1e300, np.float64), {"do_rescale": False}, "NaN or infinite"),
    "NaN, not rescaled": (torch.full((3, 4, 4), float("nan")), {"do_rescale": False}, "NaN or infinite"),
    "a misspelt setting": (BYTES, {"do_rezise": True}, "no setting `do_rezise`; did you mean `do_resize`"),
    "an unknown setting": (BYTES, {"flip": True}, "no setting `flip`; it has .*do_resize"),
    "a size of three numbers": (BYTES, {"size": [4, 5, 6]}, "`size` is .4, 5, 6.; a list must hold height and width"),
    "another filter": (BYTES, {"resample": 9}, "`resample` is 9; it must be one of 0 .nearest."),
    "a standard deviation of 0": (BYTES, {"image_std": [1.0, 0.0, 1.0]}, "`image_std` is .*; it must be finite"),
    "a mean of NaN": (BYTES, {"image_mean": [float("nan"), 0.0, 0.0]}, "`image_mean` is .*; it must be finite"),
    "a factor of infinity": (BYTES, {"rescale_factor": float("inf")}, "`rescale_factor` is inf; it must be finite"),
}  # fmt: skip


@pytest.mark.parametrize(("image", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_pixel_that_could_be_misread_is_refused(image, options, message):
    with pytest.raises(ValueError, match=message):
        MFuserImageProcessor()(image, **options)


@pytest.mark.parametrize(
    ("image", "options", "factor"),
    [
        (floats(0, 255), {}, 1 / 255),
        (floats(0, 0), {}, 1 / 255),  # black in every range
        (floats(0, 1.02), {"do_rescale": False}, 1),  # overshoot of bicubic resampling
        (floats(-0.02, 1), {"do_rescale": False}, 1),
        (BYTES // 50, {}, 1 / 255),  # nearly black, but bytes
    ],
)
def test_a_named_range_is_taken_as_it_is(image, options, factor):
    (pixels,) = MFuserImageProcessor(do_normalize=True, image_mean=[0.0] * 3, image_std=[1.0] * 3)(image, **options)[
        "pixel_values"
    ]
    np.testing.assert_allclose(pixels, image.transpose(2, 0, 1) * factor, rtol=1e-6)


def test_a_misspelt_setting_is_refused_at_construction_and_when_loading(tmp_path):
    with pytest.raises(ValueError, match="did you mean `do_resize`"):
        MFuserImageProcessor(do_rezise=True)
    MFuserImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did you mean `do_resize`"):
        MFuserImageProcessor.from_pretrained(tmp_path, do_rezise=True)
    _, unused = MFuserImageProcessor.from_pretrained(tmp_path, do_rezise=True, return_unused_kwargs=True)
    assert unused == {"do_rezise": True}
    # Arguments that Transformers passes to every part of a pipeline are not settings.
    MFuserImageProcessor.from_pretrained(tmp_path, trust_remote_code=True, _from_auto=True, low_cpu_mem_usage=True)


@given(value=st.integers(-(2**63), 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_labels_are_kept_or_refused_but_never_wrap(value):
    dtype = np.uint64 if value > np.iinfo(np.int64).max else np.int64
    labels = np.full((2, 2), value, dtype=dtype)
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    if 0 <= value < 2**31:
        assert (MFuserImageProcessor()(image, labels)["labels"][0] == value).all()
    else:
        with pytest.raises(
            ValueError, match=f"holds the label {value}; labels must be class ids from 0 to {2**31 - 1}"
        ):
            MFuserImageProcessor()(image, labels)


NUMBERS = [np.uint8, np.int8, np.uint16, np.int32, np.int64, np.float16, np.float32, np.float64, bool]


@given(
    image=arrays.arrays(st.sampled_from(NUMBERS), st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3))),
    options=st.fixed_dictionaries({"do_rescale": st.booleans(), "do_normalize": st.booleans()}),
)
@settings(max_examples=200, deadline=None)
def test_any_array_gives_plausible_pixels_or_an_error(image, options):
    try:
        (pixels,) = MFuserImageProcessor()(image, input_data_format="channels_last", **options)["pixel_values"]
    except ValueError as error:
        assert "must" in str(error)  # noqa: PT017
        return
    assert pixels.shape == (3, *image.shape[:2]) and np.isfinite(pixels).all() and abs(pixels).max() <= 10


# --- a batch records how each image was resized and padded -----------------------------------------------------------

SIZES = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=3)
CALLS = st.one_of(
    st.just({}),
    st.builds(lambda edge: {"size": {"shortest_edge": edge, "longest_edge": 30}}, st.integers(1, 30)),
    st.builds(lambda side: {"size": {"height": side, "width": 31 - side}}, st.integers(1, 30)),
    st.just({"pad_size": {"height": 40, "width": 41}}),
)  # fmt: skip


def batch_of(processor, sizes, call):
    """A batch, and the output of a "model" that finds class 1 in every image and class 2 in its padding."""
    images = [np.full((*size, 3), 200, dtype=np.uint8) for size in sizes]
    inputs = processor(images, input_data_format="channels_last", return_tensors="pt", **call)
    inside = inputs["pixel_values"].abs().sum(1) > 0
    return inputs, SimpleNamespace(logits=F.one_hot(torch.where(inside, 1, 2), 3).permute(0, 3, 1, 2).float())


@given(sizes=SIZES, own=CALLS, call=CALLS)
@settings(max_examples=150, deadline=None)
def test_padding_never_reaches_a_label_map_whatever_a_call_changes(sizes, own, call):
    processor = MFuserImageProcessor(**own)
    inputs, outputs = batch_of(processor, sizes, call)
    maps = processor.post_process_semantic_segmentation(outputs, inputs=inputs)
    assert [tuple(label_map.shape) for label_map in maps] == sizes
    assert all((label_map == 1).all() for label_map in maps)
    try:  # without the batch, the result is the same, or an error
        inferred = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    except ValueError as error:
        assert "pass `inputs`" in str(error)  # noqa: PT017
    else:
        assert all(torch.equal(*pair) for pair in zip(maps, inferred, strict=True))


def test_a_batch_stretched_by_a_call_is_not_cropped():
    processor, sizes = MFuserImageProcessor(), [(10, 30), (20, 15)]
    inputs, outputs = batch_of(processor, sizes, {"size": {"height": 20, "width": 30}})
    assert inputs.image_sizes == sizes and inputs.input_sizes == [(20, 30)] * 2
    with pytest.raises(ValueError, match="pass `inputs`"):  # it looks like images that were padded to 20 x 30
        processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    outputs.logits[:, 0, :, 15:] = 5  # class 0 in the right half
    maps = processor.post_process_semantic_segmentation(outputs, inputs=inputs)
    assert [(label_map == 0).sum().item() for label_map in maps] == [10 * 15, 20 * 8]  # class 0 has the higher scores


def test_the_record_survives_moving_copying_and_pickling_and_is_not_given_to_the_model():
    inputs, _ = batch_of(MFuserImageProcessor(), [(10, 30), (20, 15)], {})
    assert list(inputs) == ["pixel_values"]
    for other in (
        inputs.to(torch.float16),
        copy.copy(inputs),
        copy.deepcopy(inputs),
        pickle.loads(pickle.dumps(inputs)),
    ):
        assert other.image_sizes == other.input_sizes == [(10, 30), (20, 15)]
    outputs = SimpleNamespace(logits=torch.rand(1, 2, 3, 3))
    with pytest.raises(ValueError, match="must be what this processor returned"):
        MFuserImageProcessor().post_process_semantic_segmentation(outputs, inputs={})


# --- scores to label maps --------------------------------------------------------------------------------------------

SIZE = st.tuples(st.integers(1, 90), st.integers(1, 90))


@given(classes=st.integers(1, 20), shape=SIZE, size=SIZE, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_labels_found_class_by_class_are_those_of_an_arg_max(classes, shape, size, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(classes, *shape, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        expected = F.interpolate(scores[None].to(dtype).float(), size=size, mode="bilinear", align_corners=False)[0]
        best, second = torch.cat([expected, torch.full((1, *size), -9.0)]).topk(2, dim=0).values
        clear = best - second > 1e-6  # PyTorch rounds the last bit of one class and of several differently
        assert torch.equal(label_map_of_scores(scores.to(dtype), size)[clear].long(), expected.argmax(0)[clear])
    tied = torch.randint(0, 3, (classes, *shape), generator=generator).float()
    assert torch.equal(label_map_of_scores(tied).long(), tied.argmax(0))  # ties are resolved to the first class


def test_more_classes_than_a_byte_holds_keep_their_ids():
    scores = torch.zeros(300, 2, 2)
    scores[299] = 1
    assert (label_map_of_scores(scores) == 299).all() and (label_map_of_scores(scores, (3, 3)) == 299).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [(4, 4), (9, 9)])
def test_nonfinite_scores_are_an_error(value, size):
    scores = torch.rand(3, 4, 4)
    scores[1, 2, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite values: its pixels or the model's weights are not finite"):
        label_map_of_scores(scores, size)
    with pytest.raises(ValueError, match="NaN or infinite"):
        MFuserImageProcessor().post_process_semantic_segmentation(SimpleNamespace(logits=scores[None]), [size])
