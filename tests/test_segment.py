"""Tests of `mfuser segment`: the files that it writes, their contents, and its exit code."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_models import tiny_model
from transformers import SegformerConfig

from mfuser import MFuserImageProcessor
from mfuser.loading import load_for_inference
from mfuser.scripts import cli, palettes, panel, segment, segment_arguments, segment_images, segmentation

CLASS_NAMES = ["road", "sky", "unicorn"]


class ThresholdModel:
    """Replaces a model: it predicts class 0, 1 or 2 where the red channel is dark, medium or bright."""

    config = SimpleNamespace(num_labels=3, id2label=dict(enumerate(CLASS_NAMES)), crop_size=1 << 20)
    config.crop_stride, config.windows_per_batch, config.confidence_temperature = 1 << 20, 1, None
    config.to_dict = dict
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.sizes, self.dtypes = [], []

    def __call__(self, pixel_values, output_confidence=False):
        self.sizes.append(tuple(pixel_values.shape[-2:]))
        self.dtypes.append(pixel_values.dtype)
        red = pixel_values[:, 0] * 0.26862954 + 0.48145466
        scores = torch.stack([-(red - centre).abs() for centre in (0.0, 0.5, 1.0)], dim=1)
        return SimpleNamespace(logits=scores, confidence=red.sigmoid())

    def parameters(self):
        return iter(())

    def state_dict(self):
        return {}


@pytest.fixture
def model(monkeypatch):
    model = ThresholdModel()

    def load_for_inference(name, device, dtype, size):
        model.loaded_with = name, size, device, dtype
        return model, MFuserImageProcessor(**({} if size is None else {"size": size}))

    monkeypatch.setattr(segment, "load_for_inference", load_for_inference)
    return model


def write_image(path, height=24, width=32, **save):
    """An image whose left half is black (road), the right half grey (sky) above and white (unicorn) below."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, width // 2 :] = 128
    pixels[height // 2 :, width // 2 :] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **save)
    return pixels[..., 0].astype(int) // 127


def run(*arguments):
    return cli.main(["segment", "--model", "stand-in", *map(str, arguments)])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_image_gives_labels_an_overlay_and_a_legend(model, tmp_path, capsys):
    classes = write_image(tmp_path / "street.png")
    output = tmp_path / "out"
    assert run(tmp_path / "street.png", "--output", output) == 0
    assert files(output) == ["legend.json", "legend.png", "street_labels.png", "street_overlay.jpg"]

    legend = json.loads((output / "legend.json").read_text())
    assert [legend[str(index)]["name"] for index in range(3)] == CLASS_NAMES
    colours = np.array([legend[str(index)]["colour"] for index in range(3)])
    assert tuple(colours[0]) == (128, 64, 128) and tuple(colours[1]) == (70, 130, 180)

    labels = Image.open(output / "street_labels.png")
    assert labels.mode == "P" and np.asarray(labels).dtype == np.uint8
    assert np.array_equal(np.asarray(labels), classes)
    assert np.array_equal(np.asarray(labels.convert("RGB")), colours[classes])

    overlay = np.asarray(Image.open(output / "street_overlay.jpg")).astype(float)
    image = np.asarray(Image.open(tmp_path / "street.png")).astype(float)
    assert abs(overlay[6, 8] - (image[6, 8] + colours[0]) / 2).max() < 4
    assert abs(overlay[18, 26] - (image[18, 26] + colours[2]) / 2).max() < 12  # JPEG blurs colours at the border

    legend = np.asarray(Image.open(output / "legend.png")).reshape(-1, 3)
    for colour in colours:
        assert (legend == colour).all(axis=1).sum() > 100


def test_the_share_of_each_class_is_printed_largest_first(model, tmp_path, capsys):
    write_image(tmp_path / "a.png")
    Image.new("RGB", (32, 24)).save(tmp_path / "b.png")
    assert run(tmp_path, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    shares = re.findall(r"^(\w+) +([\d.]+) %$", printed, flags=re.MULTILINE)
    assert shares == [("road", "75.00"), ("sky", "12.50"), ("unicorn", "12.50")]
    run(tmp_path / "b.png", "--output", tmp_path / "out")
    assert "absent: sky, unicorn" in capsys.readouterr().out


def test_opacity_runs_from_the_image_to_its_colours(model, tmp_path):
    write_image(tmp_path / "a.png")
    for alpha, expected in ((0, (0, 0, 0)), (1, (128, 64, 128))):
        run(tmp_path / "a.png", "--output", tmp_path / "out", "--alpha", alpha)
        overlay = np.asarray(Image.open(tmp_path / "out" / "a_overlay.jpg")).astype(int)
        assert abs(overlay[4, 4] - expected).max() < 4


def test_results_have_the_image_size_whatever_the_size_of_the_model_input(model, tmp_path):
    classes = write_image(tmp_path / "a.png", 24, 32)
    assert run(tmp_path / "a.png", "--output", tmp_path / "out", "--size", "64x60") == 0
    assert model.sizes == [(48, 64)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a_labels.png")), classes)


def test_the_model_is_loaded_as_the_options_say(model, tmp_path):
    write_image(tmp_path / "a.png")
    arguments = ["--output", tmp_path / "out", "--size", "2048x1024", "--device", "meta", "--dtype", "bfloat16"]
    assert run(tmp_path / "a.png", *arguments) == 0
    size = {"longest_edge": 2048, "shortest_edge": 1024}
    assert model.loaded_with == ("stand-in", size, torch.device("meta"), "bfloat16")
    assert run(tmp_path / "a.png", "--output", tmp_path / "out") == 0
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert model.loaded_with == ("stand-in", None, default, None)


def test_pixels_reach_the_model_in_its_dtype(model, tmp_path):
    write_image(tmp_path / "a.png")
    model.dtype = torch.bfloat16
    assert run(tmp_path / "a.png", "--output", tmp_path / "out") == 0
    assert model.dtypes == [torch.bfloat16]


def test_photographs_are_rotated_upright(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    stored = write_image(tmp_path / "a.png", 24, 32, exif=exif)
    assert run(tmp_path / "a.png", "--output", tmp_path / "out") == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a_labels.png")), np.rot90(stored, -1))
    assert Image.open(tmp_path / "out" / "a_overlay.jpg").size == (24, 32)


def test_grey_16_bit_and_transparent_images_are_segmented(model, tmp_path):
    classes = write_image(tmp_path / "rgb.png")
    image = Image.open(tmp_path / "rgb.png")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert run(tmp_path, "--output", tmp_path / "out") == 0
    for name in ("rgb", "grey", "rgba", "deep"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}_labels.png")), classes)
        assert Image.open(tmp_path / "out" / f"{name}_overlay.jpg").mode == "RGB"


def test_folders_are_searched_and_names_that_collide_are_kept_apart(model, tmp_path):
    for name in ("one/a.png", "one/a.jpg", "one/deep/er/b.PNG", "two/a.png", "two/A-2.png"):
        write_image(tmp_path / name)
    (tmp_path / "one" / "notes.txt").write_text("not looked at")
    output = tmp_path / "one" / "results"
    for _ in range(2):  # the second time, the results of the first lie in the searched folder
        assert run(tmp_path / "one", tmp_path / "two", tmp_path / "one" / "a.png", "--output", output) == 0
    labels = [name for name in files(output) if name.endswith("_labels.png")]
    assert labels == [f"{name}_labels.png" for name in ("A-2-2", "a-2", "a-3", "a", "deep/er/b")]
    assert len(files(output)) == 2 * len(labels) + 2


def test_files_that_are_not_images_are_reported_and_skipped(model, tmp_path, capsys, monkeypatch):
    write_image(tmp_path / "good.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (60, 60)).save(tmp_path / "bomb.png")  # more than twice as many pixels as PIL allows
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "empty").mkdir()
    missing = tmp_path / "missing.jpg"
    assert run(tmp_path, tmp_path / "empty", missing, "--output", tmp_path / "out") == 1
    printed = capsys.readouterr()
    for name in ("bomb.png", "text.png", "cut.png", "float.tif", "empty", "missing.jpg"):
        assert f"skipped {tmp_path / name}: " in printed.err
    assert "segmented: 1, skipped: 6" in printed.out
    assert "good_labels.png" in files(tmp_path / "out")
    assert run(missing, "--output", tmp_path / "out") == 1


def test_an_image_that_the_model_refuses_is_skipped_too(model, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise ValueError("holds no patch")

    write_image(tmp_path / "a.png")
    monkeypatch.setattr(segment_images, "segment", refuse)
    assert run(tmp_path / "a.png", "--output", tmp_path / "out") == 1
    assert "a.png: holds no patch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "IMAGE_OR_FOLDER"),
        (["a.png", "--size", "1024"], "LONGxSHORT"),
        (["a.png", "--size", "1024x2048"], "longer edge first"),
        (["a.png", "--alpha", "2"], "between 0 and 1"),
        (["a.png", "--alpha", "x"], "between 0 and 1"),
        (["a.png", "--device", "gpu"], "'gpu' must be an available device"),
        (["{folder}", "--output", "{folder}"], "choose a folder without input images"),
        (["{folder}/sub", "--output", "{folder}"], "choose a folder without input images"),
    ],
)
def test_usage_errors_are_explained_with_exit_code_2(tmp_path, capsys, arguments, message):
    (tmp_path / "sub").mkdir()
    with pytest.raises(SystemExit) as error:
        run(*(argument.format(folder=tmp_path) for argument in arguments))
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_model_the_demonstration_checkpoint_is_taken(model, tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "a.png")
    monkeypatch.setattr(segment_arguments, "DEFAULT_MODEL", tmp_path / "demo")
    with pytest.raises(SystemExit) as error:
        segment.main([str(tmp_path / "a.png")])
    assert error.value.code == 2 and "--model" in capsys.readouterr().err
    (tmp_path / "demo").mkdir()
    assert segment.main([str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]) == 0


# With a real model


def noise_image():
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@torch.no_grad()
def arg_max(model, image):
    return model(**MFuserImageProcessor()(image, return_tensors="pt")).logits[0].argmax(0).numpy()


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-mfuser")
    model = tiny_model()
    with torch.no_grad():
        while len(np.unique(arg_max(model, noise_image()))) == 1:  # a newly initialised model predicts a single class
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    MFuserImageProcessor().save_pretrained(folder)
    return model, folder


def test_a_saved_model_gives_its_own_arg_max(saved_model, tmp_path):
    model, folder = saved_model
    Image.fromarray(noise_image()).save(tmp_path / "noise.png")
    assert segment.main([str(tmp_path / "noise.png"), "--model", str(folder), "--output", str(tmp_path / "out")]) == 0
    written = np.asarray(Image.open(tmp_path / "out" / "noise_labels.png"))
    assert np.array_equal(written, arg_max(model, noise_image()))


def test_labels_do_not_depend_on_the_confidence_with_a_processor_that_pads(saved_model):
    model, _ = saved_model
    image = noise_image().transpose(2, 0, 1)
    height, width = image.shape[1:]
    padding = MFuserImageProcessor(pad_size={"height": height + 20, "width": width + 40})
    labels, _ = segmentation.segment_with_confidence(image, model, padding)
    assert np.array_equal(labels, segmentation.segment(image, model, padding))
    assert np.array_equal(labels, segmentation.segment(image, model, MFuserImageProcessor()))


@torch.no_grad()
def test_a_loaded_model_has_channels_last_and_the_same_scores(saved_model):
    model, folder = saved_model
    loaded, processor = load_for_inference(folder, torch.device("cpu"))
    assert loaded.mfuser.pyramid.stride8.weight.is_contiguous(memory_format=torch.channels_last)
    inputs = processor(noise_image(), return_tensors="pt")
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_precision_can_be_chosen(saved_model):
    _, folder = saved_model
    model, _ = load_for_inference(folder, torch.device("cpu"), "bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training


def test_models_that_cannot_be_used_are_refused(tmp_path, capsys):
    write_image(tmp_path / "a.png")

    def error_with(model):
        assert segment.main([str(tmp_path / "a.png"), "--model", str(model), "--output", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    SegformerConfig().save_pretrained(tmp_path / "segformer")
    assert "'segformer', not 'mfuser'" in error_with(tmp_path / "segformer")
    (tmp_path / "nothing").mkdir()
    assert "config.json" in error_with(tmp_path / "nothing")

    model = tiny_model()
    weights = model.state_dict()
    weights.pop("mfuser.prompts")
    model.save_pretrained(tmp_path / "incomplete", state_dict=weights)
    MFuserImageProcessor().save_pretrained(tmp_path / "incomplete")
    assert "mfuser.prompts" in error_with(tmp_path / "incomplete")
    assert not (tmp_path / "out").exists()


# Colours


def test_cityscapes_classes_have_their_colours_however_they_are_written():
    names = ["Traffic_Light", "tree", "bus", "bicyclist"]
    assert palettes.class_colours(names).tolist() == [[250, 170, 30], [107, 142, 35], [0, 60, 100], [255, 0, 0]]
    both = palettes.class_colours(["vegetation", "tree"])
    assert both[0].tolist() == [107, 142, 35] and (both[0] != both[1]).any()


def test_other_classes_get_distinct_colours_and_always_the_same():
    names = ["road", *(f"class {index}" for index in range(254)), "sky"]
    colours = palettes.class_colours(names)
    assert colours.dtype == np.uint8 and len(np.unique(colours, axis=0)) == 256
    few = palettes.class_colours(names[:12]).astype(int)
    closest = min(abs(few[i] - few[j]).max() for i in range(12) for j in range(i))
    assert closest >= 64
    assert np.array_equal(palettes.class_colours(names), colours)
    with pytest.raises(ValueError, match="at most 256 classes"):
        palettes.class_colours([*names, "one more"])


def test_a_legend_has_room_for_every_class():
    names = [f"a rather long class name {index}" for index in range(45)]
    colours = palettes.class_colours(names)
    legend = np.asarray(palettes.legend(dict(enumerate(names)), colours))
    assert all((legend == colour).all(axis=-1).any() for colour in colours)
    assert (legend[:, -5:] == 255).all() and (legend[-5:] == 255).all()


# Several images in parallel, and existing results


def test_images_segmented_in_parallel_give_the_results_and_messages_of_sequential_ones(model, tmp_path, capsys):
    images = tmp_path / "images"
    for index in range(12):
        write_image(images / f"{index:02}.png", 24 + index, 32)
        if index % 3 == 1:
            (images / f"{index:02}.png").write_bytes(b"damaged")
    results = {}
    threads = torch.get_num_threads()
    for number in (1, 4):
        torch.set_num_threads(number)
        try:
            assert run(images, "--output", tmp_path / "out") == 1
        finally:
            torch.set_num_threads(threads)
        written = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
        printed = capsys.readouterr()
        skipped = re.findall(r"skipped \S*/(\d\d).png", printed.err)
        results[number] = written, printed.out, skipped
    assert results[1] == results[4] and results[1][2] == ["01", "04", "07", "10"]


def test_images_with_complete_results_are_skipped_and_others_are_not(model, tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        write_image(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "c.png").write_bytes(b"damaged")
    output = tmp_path / "out"

    def segmented(*arguments) -> int:
        """The number of images that were segmented and not skipped."""
        before = len(model.sizes)
        assert run(tmp_path / "images", "--output", output, "--skip-existing", *arguments) == 1
        number = len(model.sizes) - before
        done = f", already done: {2 - number}," if number < 2 else ","
        assert f"segmented: {number}, skipped: 1{done}" in capsys.readouterr().out
        return number

    assert segmented() == 2
    written = {name: (output / name).stat().st_mtime_ns for name in files(output) if "legend" not in name}
    assert segmented() == 0
    assert {name: (output / name).stat().st_mtime_ns for name in written} == written
    # Every result must exist, undamaged, and of the same settings, model and image.
    (output / "a_overlay.jpg").unlink()
    assert segmented() == 1 and segmented() == 0
    (output / "a_labels.png").write_bytes((output / "a_labels.png").read_bytes()[:40])
    assert segmented() == 1
    for option in (["--alpha", "0.3"], ["--confidence"], ["--size", "20x20"], ["--unknown-threshold", "0"]):
        monkeypatch.setattr(segment, "write_legend", lambda *_: None)  # the threshold adds a class
        assert segmented(*option) == 2 and segmented(*option) == 0
    monkeypatch.setattr(model.config, "to_dict", lambda: {"another": "configuration"})
    assert segmented() >= 2 and segmented() == 0
    monkeypatch.setattr(model, "state_dict", lambda: {"weight": torch.ones(2)})
    assert segmented() >= 2 and segmented() == 0
    monkeypatch.setattr(model, "state_dict", lambda: {"weight": torch.tensor([1.0, 2.0])})
    assert segmented() >= 2 and segmented() == 0
    write_image(tmp_path / "images" / "b.png", 30, 40)
    assert segmented() == 1 and segmented() == 0


def test_an_overlay_left_by_a_killed_run_does_not_count_as_complete(model, tmp_path):
    write_image(tmp_path / "a.png")
    output = tmp_path / "out"
    assert run(tmp_path / "a.png", "--output", output, "--alpha", "0.9") == 0
    overlay = (output / "a_overlay.jpg").read_bytes()
    assert run(tmp_path / "a.png", "--output", output) == 0
    expected = (output / "a_overlay.jpg").read_bytes()
    (output / "a_overlay.jpg").write_bytes(overlay)  # killed between the labels and the overlay
    assert run(tmp_path / "a.png", "--output", output, "--skip-existing") == 0
    assert (output / "a_overlay.jpg").read_bytes() == expected


# The panel


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_panel_shows_the_image_its_overlay_and_its_confidence(saved_model, tmp_path, calibrated, monkeypatch):
    model, _ = saved_model
    Image.fromarray(noise_image()).save(tmp_path / "noise.png")
    monkeypatch.setattr(model.config, "confidence_temperature", 1.6 if calibrated else None)
    monkeypatch.setattr(segment, "load_for_inference", lambda *_: (model, MFuserImageProcessor()))
    drawn = {}
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, *_, **__: drawn.setdefault(text, xy))
    assert run(tmp_path / "noise.png", "--output", tmp_path / "out", "--panel") == 0
    assert files(tmp_path / "out") == [
        "legend.json", "legend.png", "noise_labels.png", "noise_overlay.jpg", "noise_panel.jpg"
    ]  # fmt: skip
    title = "Confidence" if calibrated else "Confidence (not calibrated)"
    assert {"Image", "Classes", title} <= set(drawn)
    labels = np.asarray(Image.open(tmp_path / "out" / "noise_labels.png"))
    names = [model.config.id2label[index] for index in np.unique(labels)]
    assert set(names) <= set(drawn)
    picture = np.asarray(Image.open(tmp_path / "out" / "noise_panel.jpg")).astype(int)
    part = np.asarray(Image.fromarray(noise_image()).resize((panel.WIDTH, 400), Image.Resampling.LANCZOS))
    top, left = panel.MARGIN + panel.TITLE, panel.MARGIN
    assert abs(picture[top : top + 400, left : left + panel.WIDTH] - part).mean() < 8


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (700, 30)])
def test_a_panel_of_an_image_of_any_shape_has_a_bounded_size(size):
    image = Image.new("RGB", size[::-1])
    labels, confidence = np.zeros(size, dtype=np.uint8), np.ones(size, dtype=np.float32)
    classes = {index: f"a class with a name that is far too long for its column {index}" for index in range(40)}
    drawn = panel.draw_panel(image, image, labels, confidence, classes, palettes.class_colours(classes.values()), True)
    assert drawn.width < 2000 and drawn.height < 2000


@pytest.mark.parametrize("last", ["class 255", "unknown"])
def test_only_unknown_pixels_have_no_colour_of_confidence_in_a_panel(last):
    image, classes = Image.new("RGB", (64, 64)), {index: f"class {index}" for index in range(255)} | {255: last}
    labels, confidence = np.full((64, 64), 255, dtype=np.uint8), np.ones((64, 64), dtype=np.float32)
    colours = palettes.class_colours(classes.values())
    drawn = np.asarray(panel.draw_panel(image, image, labels, confidence, classes, colours, True))
    middle = panel.MARGIN + panel.TITLE + panel.WIDTH // 2
    expected = palettes.UNKNOWN_COLOUR if last == "unknown" else palettes.CONFIDENCE_COLOURS[-1]
    assert tuple(drawn[middle, -panel.MARGIN - panel.WIDTH // 2]) == expected


def test_the_score_of_an_image_is_printed_and_unusable_labels_are_refused_before_segmenting(model, tmp_path, capsys):
    output, truth = tmp_path / "out", tmp_path / "truth.png"
    write_image(tmp_path / "street.png")
    assert run(tmp_path / "street.png", "--output", output) == 0
    labels = np.asarray(Image.open(output / "street_labels.png")).copy()
    wrong = labels.copy()
    wrong[:, : labels.shape[1] // 2] = (wrong[:, : labels.shape[1] // 2] + 1) % 3
    for values, right in ((labels, "100.0 %"), (wrong, "50.0 %")):
        Image.fromarray(values).save(truth)
        capsys.readouterr()
        assert run(tmp_path / "street.png", "--output", output, "--labels", truth) == 0
        assert f"{right} of the pixels right" in capsys.readouterr().out
    Image.fromarray(np.minimum(labels, 1)).save(truth)  # without unicorns, which the model finds
    assert run(tmp_path / "street.png", "--output", output, "--labels", truth) == 0
    sky = (labels == 1).sum() / (labels > 0).sum()
    assert f"mean IoU {100 * (1 + sky) / 2:.1f} % over the 2 classes in the labels" in capsys.readouterr().out
    for values, message in (
        (labels[1:], "height x width"),
        (np.full_like(labels, 7), "neither classes"),
        (np.full_like(labels, 255), "no pixel has a class"),
    ):
        Image.fromarray(values).save(truth)
        assert run(tmp_path / "street.png", "--output", tmp_path / "new", "--labels", truth) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert run(tmp_path / "street.png", "--labels", tmp_path / "none.png") == 2
    write_image(tmp_path / "other.png")
    assert run(tmp_path / "street.png", tmp_path / "other.png", "--labels", truth) == 2
    assert "--labels applies to one image" in capsys.readouterr().err


def test_results_that_another_process_wrote_in_the_meantime_are_kept(model, tmp_path, capsys, monkeypatch):
    write_image(tmp_path / "ours/a.png", 24, 32)
    write_image(tmp_path / "theirs/a.png", 48, 40)
    output, load = tmp_path / "out", segment.load_for_inference

    def meanwhile(*arguments):  # after the places of the results are chosen
        monkeypatch.setattr(segment, "load_for_inference", load)
        assert run(tmp_path / "theirs", "--output", output) == 0
        return load(*arguments)

    monkeypatch.setattr(segment, "load_for_inference", meanwhile)
    assert run(tmp_path / "ours", "--output", output) == 1
    assert "a holds results that another process has written for another source" in capsys.readouterr().err
    assert Image.open(output / "a_labels.png").size == (40, 48)
    assert run(tmp_path / "ours", "--output", output) == 0  # numbered, as the place is known to be taken
    assert Image.open(output / "a-2_labels.png").size == (32, 24)


def test_an_image_that_cannot_be_read_is_not_blamed_on_its_labels(model, tmp_path, capsys):
    write_image(tmp_path / "labels.png")
    (tmp_path / "a.png").write_bytes(b"no image")
    assert run(tmp_path / "a.png", "--labels", tmp_path / "labels.png", "--output", tmp_path / "out") == 2
    assert re.search(r"mfuser segment: .*a.png: cannot identify image file", capsys.readouterr().err)
