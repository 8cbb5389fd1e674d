"""Tests of the image processor: the pixels that the model receives, and the label maps computed from its scores."""

import base64
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import bilinear
from PIL import Image

# Without torchvision, `transformers.AutoImageProcessor` is a dummy in some releases.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.images_mfuser import resized_size

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture
def processor():
    return MFuserImageProcessor()


def random_image(height=20, width=30, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def normalised(image: np.ndarray) -> np.ndarray:
    """Normalises an RGB image (H, W, 3) of uint8 without the use of Transformers."""
    return ((image / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


def assert_pixels(inputs, *expected, atol=1e-6):
    assert len(inputs["pixel_values"]) == len(expected)
    for pixel_values, image in zip(inputs["pixel_values"], expected, strict=True):
        np.testing.assert_allclose(np.asarray(pixel_values), normalised(image), atol=atol)


# Pixels


def test_an_image_keeps_its_size_and_is_normalised_with_clip_statistics(processor):
    image = random_image()
    inputs = processor(Image.fromarray(image), return_tensors="pt")
    assert list(inputs) == ["pixel_values"]
    assert inputs["pixel_values"].shape == (1, 3, 20, 30)
    assert inputs["pixel_values"].dtype == torch.float32
    assert_pixels(inputs, image)


def test_resizing_gives_the_pixels_of_pil_whatever_is_installed(processor):
    # The expected values are computed with PIL and NumPy only, so they hold with and without torchvision.
    image = Image.fromarray(random_image(40, 61))
    expected = np.asarray(image.resize((31, 20), Image.Resampling.BILINEAR))
    assert processor.backend == "pil"
    assert_pixels(processor(image, size={"shortest_edge": 20}), expected)
    bicubic = np.asarray(image.resize((31, 20), Image.Resampling.BICUBIC))
    assert_pixels(processor(image, size={"shortest_edge": 20}, resample=Image.Resampling.BICUBIC), bicubic)


@pytest.mark.parametrize("form", ["PIL", "HWC", "CHW", "tensor", "bfloat16", "batch", "list"])
def test_every_form_of_an_image_gives_the_same_pixels(processor, tmp_path, form):
    image = random_image()
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    forms = {
        "PIL": Image.fromarray(image),
        "HWC": image,
        "CHW": planes,
        "tensor": torch.from_numpy(planes),
        "bfloat16": torch.from_numpy(planes).to(torch.bfloat16),  # exact for integers up to 256
        "batch": torch.from_numpy(planes)[None],
        "list": [image],
    }
    assert_pixels(processor(forms[form], return_tensors="pt"), image)


def test_a_path_is_opened(processor, tmp_path):
    image = random_image()
    Image.fromarray(image).save(tmp_path / "image.png")
    assert_pixels(processor(str(tmp_path / "image.png")), image)


def test_a_url_is_opened_upright_and_what_is_no_image_is_named(processor, tmp_path, monkeypatch):
    image, exif = random_image(), Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    Image.fromarray(np.rot90(image)).save(tmp_path / "image.png", exif=exif)
    response = SimpleNamespace(content=(tmp_path / "image.png").read_bytes(), raise_for_status=lambda: None)
    session = SimpleNamespace(get={"https://host/image.png": response}.__getitem__)
    monkeypatch.setattr("mfuser.images_mfuser.get_session", lambda: session)
    assert_pixels(processor("https://host/image.png"), image)
    assert_pixels(processor([str(tmp_path / "image.png")]), image)
    for source in (__file__, "missing.png"):
        with pytest.raises(ValueError, match=f"^{source} is neither an image file, nor the URL of one"):
            processor(source)


def test_grey_images_become_rgb(processor):
    grey = random_image(channels=1)
    rgb = np.stack([grey] * 3, axis=-1)
    for form in (Image.fromarray(grey), grey, grey[None], grey[..., None], torch.from_numpy(grey), [grey, rgb][:1]):
        assert_pixels(processor(form), rgb)
    with_alpha = Image.merge("LA", (Image.fromarray(grey), Image.new("L", (30, 20), 7)))
    assert_pixels(processor(with_alpha), rgb)
    black_and_white = grey > 127
    rgb = np.repeat(black_and_white[..., None] * np.uint8(255), 3, axis=-1)
    assert_pixels(processor([Image.fromarray(black_and_white), black_and_white]), rgb, rgb)


def test_an_alpha_channel_is_dropped(processor):
    image = random_image(channels=4)
    for form in (Image.fromarray(image), image, image.transpose(2, 0, 1), torch.from_numpy(image)):
        assert_pixels(processor(form), image[..., :3])


def test_the_colours_of_a_palette_image_are_used(processor):
    image = Image.fromarray(random_image()).quantize(16)
    assert_pixels(processor(image), np.asarray(image.convert("RGB")))


def test_16_bit_images_are_scaled_to_8_bit(processor, tmp_path):
    deep = np.linspace(0, 65535, 600, dtype=np.uint16).reshape(20, 30)
    expected = np.repeat(np.round(deep[..., None] / 257), 3, axis=-1)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    deep_colours = np.stack([deep] * 3, axis=-1)
    for form in (
        Image.open(tmp_path / "deep.png"),
        str(tmp_path / "deep.png"),
        "data:image/png;base64," + base64.b64encode((tmp_path / "deep.png").read_bytes()).decode(),
        Image.fromarray(deep.astype(np.int32)),  # mode I, as older releases of Pillow open it
        deep,
        deep_colours,
        deep.astype(">u2"),
        torch.from_numpy(deep),
    ):
        assert_pixels(processor(form), expected)


def test_a_16_bit_image_that_holds_8_bit_values_is_warned_of(processor, caplog):
    logger = logging.getLogger("mfuser.images_mfuser")
    logger.addHandler(caplog.handler)
    try:
        processor(np.full((4, 4), 256, dtype=np.uint16))
        processor(np.zeros((4, 4), dtype=np.uint16))
        assert not caplog.text
        processor(np.full((4, 4), 255, dtype=np.uint16))
        assert "convert it to uint8" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_floats_are_taken_in_either_range_but_never_scaled_twice(processor):
    image = random_image()
    assert_pixels(processor(image.astype(np.float64)), image)
    assert_pixels(processor((image / 255).astype(np.float32), do_rescale=False), image)
    exact = processor(image / 255, do_rescale=False, size={"height": 20, "width": 30})
    assert_pixels(exact, image)  # resizing must not round floats to 8 bit
    with pytest.raises(ValueError, match="do_rescale=False"):
        processor(image / 255)
    with pytest.raises(ValueError, match="0..255"):
        processor(processor(image)["pixel_values"])
    with pytest.raises(ValueError, match=r"from 0 to 300; .* 0\.\.255"):
        processor(np.linspace(0, 300, 75).reshape(5, 5, 3))
    with pytest.raises(ValueError, match="NaN"):
        processor(np.full((5, 5, 3), np.nan))
    assert_pixels(processor(np.zeros((5, 5, 3))), np.zeros((5, 5, 3)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), 300, dtype=np.int64), r"int64 values from 300 to 300.*0\.\.255"),
        (np.full((4, 4, 3), -1, dtype=np.int16), r"0\.\.255"),
        (np.zeros((5, 6, 7), dtype=np.uint8), r"\(5, 6, 7\).*1, 3 or 4 channels"),
        (np.zeros(7, dtype=np.uint8), r"\(7,\).*\(H, W, C\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"\(0, 4, 3\)"),
        (np.zeros((4, 4, 3), dtype=complex), "complex"),
        ([[Image.new("RGB", (4, 4))]], "flat list"),
        ([], "No image"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor(image)


def test_without_conversion_only_three_channels_pass(processor):
    image = random_image()
    assert_pixels(processor(image, do_convert_rgb=False), image)
    for refused in (random_image(channels=1), random_image(channels=4), Image.fromarray(image).quantize(4)):
        with pytest.raises(ValueError, match="do_convert_rgb=True"):
            processor(refused, do_convert_rgb=False)


def test_an_ambiguous_layout_can_be_named(processor):
    image = random_image(height=3)
    assert_pixels(processor(image, input_data_format="channels_last"), image)


@pytest.mark.parametrize("option", [{"do_center_crop": True, "crop_size": 8}, {"data_format": "channels_last"}])
def test_options_that_would_be_ignored_are_refused(processor, option):
    with pytest.raises(ValueError, match="does not crop|channels_first"):
        processor(random_image(), **option)


# Size


@pytest.mark.parametrize(
    ("image_size", "size", "expected"),
    [
        # The published protocols, for wide and high images; halves are rounded up, as mmcv does (3 x 0.5 to 2).
        ((1024, 2048), {"shortest_edge": 1024, "longest_edge": 2048}, (1024, 2048)),
        ((1080, 1920), {"shortest_edge": 1024, "longest_edge": 2048}, (1024, 1820)),
        ((4000, 3000), {"shortest_edge": 1024, "longest_edge": 2048}, (1365, 1024)),
        ((2448, 3264), {"shortest_edge": 720, "longest_edge": 1280}, (720, 960)),
        ((1024, 4096), {"shortest_edge": 720, "longest_edge": 1280}, (320, 1280)),
        ((3, 10), {"longest_edge": 5}, (2, 5)),
        ((100, 200), {"shortest_edge": 50}, (50, 100)),
        ((100, 200), {"longest_edge": 400}, (200, 400)),
        ((200, 100), {"max_height": 50, "max_width": 90}, (50, 25)),
        ((100, 200), {"max_height": 50, "max_width": 90}, (45, 90)),
        ((100, 200), {"height": 30, "width": 30}, (30, 30)),
        ((1, 5000), {"longest_edge": 100}, (1, 100)),
    ],
)
def test_size_is_the_longest_fit_with_the_ratio_kept(processor, image_size, size, expected):
    assert resized_size(*image_size, size) == expected
    if max(image_size) < 500:
        inputs = processor(np.zeros((3, *image_size), dtype=np.uint8), size=size, input_data_format="channels_first")
        assert inputs["pixel_values"][0].shape == (3, *expected)


def test_a_size_that_is_given_is_used(processor, tmp_path):
    image = random_image(40, 60)
    assert processor(image, size={"shortest_edge": 20})["pixel_values"][0].shape == (3, 20, 30)
    assert processor(image, size=20)["pixel_values"][0].shape == (3, 20, 30)
    assert processor(image, size={"shortest_edge": 20}, do_resize=False)["pixel_values"][0].shape == (3, 40, 60)
    assert MFuserImageProcessor(size={"longest_edge": 30})(image)["pixel_values"][0].shape == (3, 20, 30)
    processor.save_pretrained(tmp_path)
    loaded = MFuserImageProcessor.from_pretrained(tmp_path, size={"longest_edge": 30})
    assert loaded(image)["pixel_values"][0].shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 512}, "shortest_edge"),
        ({"min_pixels": 10, "max_pixels": 100}, "max_height"),
        ({"shortest_edge": 512, "width": 3}, "shortest_edge"),
        ({"shortest_edge": 0}, "at least 1 pixel"),
        ({"height": -1, "width": 10}, "at least 1 pixel"),
    ],
)
def test_an_impossible_size_is_refused_at_construction_and_in_a_call(processor, size, message):
    with pytest.raises(ValueError, match=message):
        MFuserImageProcessor(size=size)
    with pytest.raises(ValueError, match=message):
        processor(random_image(), size=size)


def test_the_stock_training_script_finds_its_crop_in_size(processor):
    assert "shortest_edge" in processor.size
    assert processor.size["shortest_edge"] == 512


# Segmentation maps


def test_maps_become_int64_labels_resized_to_the_nearest_and_nothing_else(processor):
    labels = np.array([[0, 1, 2, 255], [3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]], dtype=np.uint8)
    palette = Image.fromarray(labels).convert("P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    for form in (Image.fromarray(labels), palette, labels, labels[None], torch.from_numpy(labels).long(), [labels]):
        inputs = processor(Image.new("RGB", (4, 4)), form, return_tensors="pt")
        assert inputs["labels"].dtype == torch.int64
        assert inputs["labels"].tolist() == [labels.tolist()]
    halved = processor(Image.new("RGB", (4, 4)), segmentation_maps=labels, size={"height": 2, "width": 2})
    assert halved["labels"][0].tolist() == [[4, 6], [12, 14]]


def test_class_ids_above_255_survive(processor):
    labels = np.full((6, 6), 3688, dtype=np.uint16)
    labels[:, 3:] = 300
    inputs = processor(random_image(6, 6), labels, size={"height": 2, "width": 2})
    assert inputs["labels"][0].tolist() == [[3688, 300]] * 2


def test_reduced_labels_turn_zero_into_ignored(processor):
    labels = np.array([[0, 1], [150, 255]], dtype=np.uint8)
    image = random_image(2, 2)
    assert processor(image, labels)["labels"][0].tolist() == [[0, 1], [150, 255]]
    assert processor(image, labels, do_reduce_labels=True)["labels"][0].tolist() == [[255, 0], [149, 255]]
    assert MFuserImageProcessor(do_reduce_labels=True)(image, labels)["labels"][0].tolist() == [[255, 0], [149, 255]]
    assert labels.tolist() == [[0, 1], [150, 255]]


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((4, 5), dtype=np.uint8), r"\[\(4, 4\)\].*\[\(4, 5\)\].*the image's \(height, width\)"),
        ([np.zeros((4, 4), dtype=np.uint8)] * 2, r"\[\(4, 4\), \(4, 4\)\].*one map per image"),
        (Image.new("RGB", (4, 4)), "one channel"),
        (np.zeros((4, 4), dtype=np.float32), "integers"),
        (np.full((4, 4), -1), "label -1.*255"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_with_a_reason(processor, maps, message):
    with pytest.raises(ValueError, match=message):
        processor(Image.new("RGB", (4, 4)), maps)


# Batches


def test_a_jpeg_is_no_label_map(processor, tmp_path):
    image = random_image()
    for form in ("png", "jpeg"):
        Image.fromarray(random_image(channels=1) % 4).save(tmp_path / f"labels.{form}")
    expected = random_image(channels=1) % 4
    for labels in (str(tmp_path / "labels.png"), Image.open(tmp_path / "labels.png")):
        np.testing.assert_array_equal(processor(image, labels)["labels"][0], expected)
    for labels in (str(tmp_path / "labels.jpeg"), Image.open(tmp_path / "labels.jpeg")):
        with pytest.raises(ValueError, match="the label is a JPEG; lossy compression changes ids"):
            processor(image, labels)


def test_images_of_different_size_are_padded_right_and_below(processor):
    small, large = random_image(10, 30), random_image(20, 15, seed=1)
    inputs = processor([small, Image.fromarray(large)], [small[..., 0], large[..., 0]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 20, 30)
    assert_pixels({"pixel_values": inputs["pixel_values"][:1, :, :10]}, small)
    assert_pixels({"pixel_values": inputs["pixel_values"][1:, :, :, :15]}, large)
    assert (inputs["pixel_values"][0, :, 10:] == 0).all() and (inputs["pixel_values"][1, :, :, 15:] == 0).all()
    assert (inputs["labels"][0, 10:] == 255).all() and (inputs["labels"][1, :, 15:] == 255).all()
    assert inputs["labels"][0, :10].tolist() == small[..., 0].tolist()


def test_padding_has_the_given_size_or_is_disabled(processor):
    assert processor(random_image(), pad_size={"height": 32, "width": 40})["pixel_values"][0].shape == (3, 32, 40)
    with pytest.raises(ValueError, match="pad_size"):
        processor(random_image(), pad_size={"height": 8, "width": 40})
    images = [random_image(10, 30), random_image(20, 15)]
    assert [array.shape for array in processor(images, do_pad=False)["pixel_values"]] == [(3, 10, 30), (3, 20, 15)]
    with pytest.raises(ValueError, match="do_pad=True"):
        processor(images, do_pad=False, return_tensors="pt")


# Scores to label maps


def scores_of(label_map: torch.Tensor, num_classes: int = 4) -> torch.Tensor:
    return torch.nn.functional.one_hot(label_map, num_classes).permute(2, 0, 1).float()


def test_scores_are_resized_bilinearly_before_the_arg_max(processor):
    scores = torch.tensor([[[0.9, 0.0]], [[0.0, 0.6]]])[None]  # (1, 2, 1, 2): class 0 wins by 0.9, class 1 by 0.6
    (label_map,) = processor.post_process_semantic_segmentation(SimpleNamespace(logits=scores), [(2, 20)])
    assert label_map.shape == (2, 20) and label_map.dtype == torch.int64
    assert (label_map[0] == 0).sum() == 11  # the tie lies at 0.6 of the way between the two centres
    (label_map,) = processor.post_process_semantic_segmentation(SimpleNamespace(logits=scores))
    assert label_map.tolist() == [[0, 1]]


def test_scores_are_returned_on_request(processor):
    outputs = SimpleNamespace(logits=torch.rand(2, 4, 6, 8).bfloat16())
    results = processor.post_process_semantic_segmentation(
        outputs, target_sizes=torch.tensor([[12, 16], [12, 16]]), return_segmentation_scores=True
    )
    results += processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    for result, size in zip(results, [(12, 16)] * 2 + [(6, 8)] * 2, strict=True):
        assert result.segmentation_scores.shape == (4, *size)
        assert result.segmentation_scores.dtype == torch.float32
        assert torch.equal(result.segmentation, result.segmentation_scores.argmax(0))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(6, 8)], "1 for 2 images"),
        ([(6, 8), (6, 0)], "at least 1 pixel"),
        ([(6, 8), (6, 8, 3)], "pairs"),
    ],
)
@pytest.mark.parametrize("name", ["target_sizes", "input_sizes"])
def test_wrong_sizes_are_refused(processor, name, sizes, message):
    outputs = SimpleNamespace(logits=torch.rand(2, 4, 6, 8))
    with pytest.raises(ValueError, match=f"`{name}`.*{message}"):
        processor.post_process_semantic_segmentation(outputs, **{name: sizes})


@pytest.mark.parametrize("settings", [{}, {"size": {"shortest_edge": 10}}, {"pad_size": {"height": 40, "width": 64}}])
def test_padding_is_cut_off_the_maps(settings):
    processor = MFuserImageProcessor(**settings)
    images = [random_image(10, 30), random_image(20, 15)]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    # A "model" that predicts class 1 within an image and class 2 on its padding.
    scores = torch.stack([scores_of(torch.where(image.abs().sum(0) > 0, 1, 2)) for image in pixel_values])
    maps = processor.post_process_semantic_segmentation(SimpleNamespace(logits=scores), [(10, 30), (20, 15)])
    assert [tuple(label_map.shape) for label_map in maps] == [(10, 30), (20, 15)]
    assert all((label_map == 1).all() for label_map in maps)


def test_padding_by_settings_of_a_call_must_be_named(processor):
    scores = scores_of(torch.ones(40, 60, dtype=torch.long)).repeat(2, 1, 1, 1)
    scores[0, 2, 20:] = scores[1, 2, :, 30:] = 2.0
    outputs, originals = SimpleNamespace(logits=scores), [(10, 30), (20, 15)]
    with pytest.raises(ValueError, match="`input_sizes`"):
        processor.post_process_semantic_segmentation(outputs, originals)
    maps = processor.post_process_semantic_segmentation(outputs, originals, input_sizes=[(20, 60), (40, 30)])
    assert [tuple(label_map.shape) for label_map in maps] == originals
    assert all((label_map == 1).all() for label_map in maps)
    maps = processor.post_process_semantic_segmentation(outputs, input_sizes=[(20, 60), (40, 30)])
    assert [tuple(label_map.shape) for label_map in maps] == [(20, 60), (40, 30)]
    with pytest.raises(ValueError, match="exceed"):
        processor.post_process_semantic_segmentation(outputs, input_sizes=[(41, 60), (40, 30)])


def test_images_of_one_size_can_be_mapped_to_any_other(processor):
    outputs = SimpleNamespace(logits=torch.rand(2, 4, 6, 8))
    maps = processor.post_process_semantic_segmentation(outputs, [(60, 7), (60, 7)])
    assert [tuple(label_map.shape) for label_map in maps] == [(60, 7)] * 2


def test_a_processor_that_does_not_pad_takes_scores_as_they_are():
    outputs = SimpleNamespace(logits=torch.rand(2, 4, 6, 8))
    maps = MFuserImageProcessor(do_pad=False).post_process_semantic_segmentation(outputs, [(60, 7), (12, 16)])
    assert [tuple(label_map.shape) for label_map in maps] == [(60, 7), (12, 16)]
    for scores, label_map in zip(outputs.logits, maps, strict=True):
        assert torch.equal(bilinear(scores, tuple(label_map.shape)).argmax(0), label_map)


# Saving and loading


def test_settings_survive_saving_and_the_code_is_saved_with_them(tmp_path):
    processor = MFuserImageProcessor(
        size={"shortest_edge": 720, "longest_edge": 1280}, do_reduce_labels=True, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_mfuser.MFuserImageProcessor"}
    assert saved["size"] == {"shortest_edge": 720, "longest_edge": 1280}
    assert (tmp_path / "image_processing_mfuser.py").is_file()

    image = random_image()
    for loaded in (
        MFuserImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        settings = loaded.to_dict()
        settings.pop("auto_map")
        assert {name: saved[name] for name in settings} == json.loads(json.dumps(settings))
        expected = processor(image, image[..., 0], return_tensors="pt")
        inputs = loaded(image, image[..., 0], return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(inputs["labels"], expected["labels"])
