"""Tests of `mfuser app`: the images and files that it creates, and the page, driven in headless Chromium."""

import configparser
import copy
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from tiny_models import CLASSES, tiny_model, tiny_tokenizer

from mfuser import MFuserForSemanticSegmentation, MFuserImageProcessor
from mfuser.confidence_mfuser import confidence_map
from mfuser.scripts import app_model, app_view, cli, palettes
from mfuser.scripts.app_model import Segmenter
from mfuser.scripts.app_view import CONFIDENCE, SegmentedImage, View
from mfuser.scripts.arguments import DEFAULT_MODEL
from mfuser.scripts.segment import main as segment_command

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "street.jpg"
CHROMIUM = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
RUN = "import sys; from mfuser.scripts import cli; sys.exit(cli.main())"
NAMES = ["street", "tree", "traffic light"]


# Drawing


def result_of_two_classes() -> SegmentedImage:
    """Left half: road, of confidence 0.9; right half: sky, of confidence 0.4."""
    labels = np.zeros((4, 6), dtype=np.uint8)
    labels[:, 3:] = 1
    confidence = np.where(labels == 0, np.float32(0.9), np.float32(0.4))
    return SegmentedImage("a", np.full((4, 6, 3), 100, np.uint8), labels, confidence, ["road", "sky", "car"])


def drawn(**settings) -> np.ndarray:
    return np.asarray(app_view.draw(result_of_two_classes(), View(**settings))).astype(int)


def test_classes_are_drawn_as_mfuser_segment_draws_them():
    result = result_of_two_classes()
    expected = palettes.overlay(
        Image.fromarray(result.pixels), result.labels, palettes.class_colours(result.class_names), 0.3
    )
    assert np.array_equal(drawn(opacity=0.3), np.asarray(expected))


def test_hidden_classes_show_the_image():
    pixels = drawn(opacity=1, shown=["road", "car"])
    assert (pixels[:, :3] == (128, 64, 128)).all() and (pixels[:, 3:] == 100).all()
    assert (drawn(opacity=1, shown=[]) == 100).all()


def test_pixels_below_the_threshold_are_unknown():
    result = result_of_two_classes()
    assert (result.labels_above(0.5) == np.where(result.labels == 1, 255, 0)).all()
    assert (result.labels_above(0.4) == result.labels).all()  # a confidence equal to the threshold is not unknown
    pixels = drawn(opacity=1, threshold=0.5)
    assert (pixels[:, :3] == (128, 64, 128)).all() and (pixels[:, 3:] == 0).all()
    assert (drawn(opacity=1, threshold=0.5, shown=[])[:, 3:] == 0).all()


def test_confidence_is_drawn_from_dark_to_bright_and_unknown_pixels_are_black():
    pixels = drawn(kind=CONFIDENCE, opacity=1)
    assert pixels[0, 0].sum() > pixels[0, 5].sum()
    table = app_view.confidence_table()
    assert tuple(table[1]) == app_view.CONFIDENCE_COLOURS[0] and tuple(table[255]) == app_view.CONFIDENCE_COLOURS[-1]
    assert (drawn(kind=CONFIDENCE, opacity=1, threshold=0.5)[:, 3:] == 0).all()


def test_the_legend_lists_shares_and_escapes_names():
    result = result_of_two_classes()
    result.class_names[2] = "<script>"
    legend = app_view.legend_html(result, View(threshold=0.5, shown=["road", "<script>"]))
    assert "road</th><td>50.0 %" in legend and "unknown</th><td>50.0 %" in legend
    assert "sky (hidden)</th><td>0.0 %" in legend
    assert "<script>" not in legend and "&lt;script&gt;" in legend
    assert "unknown" not in app_view.legend_html(result, View())


def test_the_files_hold_labels_with_unknown_pixels_and_the_legend():
    result = result_of_two_classes()
    overlay, labels, legend = map(Path, app_view.write_results(result, View(threshold=0.5, opacity=0.5)))
    assert [path.name for path in (overlay, labels, legend)] == ["a_overlay.jpg", "a_labels.png", "a_legend.json"]
    with Image.open(labels) as image:
        assert np.array_equal(np.asarray(image), result.labels_above(0.5))
    entries = json.loads(legend.read_text())
    assert {index: entry["share"] for index, entry in entries.items()} == {"0": 0.5, "1": 0, "2": 0, "255": 0.5}
    assert entries["255"] == {"name": "unknown", "colour": [0, 0, 0], "share": 0.5}
    folder = overlay.parent
    del result
    assert not folder.exists()


def test_the_preview_is_bounded():
    result = result_of_two_classes()
    for name in ("pixels", "labels", "confidence"):
        setattr(result, name, np.repeat(getattr(result, name), 500, axis=1))
    assert app_view.draw(result, View()).size == (3000, 4)
    assert app_view.draw_preview(result, View()).size == (1280, 2)


# The model


def test_images_are_reduced_to_the_limits_of_memory(monkeypatch):
    monkeypatch.setattr(app_model, "MAX_PIXELS", 2000)
    monkeypatch.setattr(app_model, "MAX_SCORES", 16000)
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 50), dtype=np.uint8)
    assert app_model.reduced(image, 8) is image
    assert app_model.reduced(image, 32).shape == (3, 20, 25)
    monkeypatch.setattr(app_model, "MAX_PIXELS", 500)
    assert app_model.reduced(image, 8).shape == (3, 20, 25)


def test_huge_files_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("L", (60, 60)).save(tmp_path / "a.png")
    app_model.check_number_of_pixels(tmp_path / "a.png")
    monkeypatch.setattr(app_model, "MAX_FILE_PIXELS", 3599)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="60 x 60 pixels"):
        app_model.check_number_of_pixels(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses more than twice as many by itself
    with pytest.raises(ValueError, match="3600 pixels"):
        app_model.check_number_of_pixels(tmp_path / "a.png")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A saved model with a text encoder, which predicts several classes, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-mfuser")
    model = tiny_model()
    torch.manual_seed(0)
    pixel_values = MFuserImageProcessor()(noise_image(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        while len(model(pixel_values).logits.argmax(1).unique()) == 1:
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    MFuserImageProcessor().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def noise_image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def tiny_segmenter(folder: Path, **options) -> Segmenter:
    model = MFuserForSemanticSegmentation.from_pretrained(folder).eval()
    return Segmenter(model, MFuserImageProcessor.from_pretrained(folder), **options)


@pytest.mark.parametrize("temperature", [None, 1.6])
def test_the_confidence_is_the_models_and_the_page_knows_whether_it_is_calibrated(tiny_folder, temperature):
    segmenter = tiny_segmenter(tiny_folder)
    segmenter.model.config.confidence_temperature = temperature
    result = segmenter.segment("noise", noise_image().transpose(2, 0, 1), segmenter.class_names)
    with torch.no_grad():
        scores = segmenter.model(**MFuserImageProcessor()(noise_image(), return_tensors="pt")).logits
    np.testing.assert_allclose(result.confidence, confidence_map(scores, temperature)[0], atol=1e-5)
    assert result.is_calibrated is (temperature is not None)
    assert ("not calibrated" in app_view.legend_html(result, View())) is (temperature is None)


def renamed_labels(folder: Path, class_names: list[str]) -> np.ndarray:
    """The labels of the noise image by a separate model, whose class names are set."""
    model = MFuserForSemanticSegmentation.from_pretrained(folder).eval()
    model.set_class_names(class_names, tiny_tokenizer())
    with torch.no_grad():
        logits = model(**MFuserImageProcessor()(noise_image(), return_tensors="pt")).logits
    return logits[0].argmax(0).numpy()


def test_edited_names_leave_the_model_of_other_visitors_unchanged(tiny_folder):
    segmenter = tiny_segmenter(tiny_folder)
    image = noise_image().transpose(2, 0, 1)
    before = segmenter.segment("noise", image, list(CLASSES))
    weights = copy.deepcopy(segmenter.model.state_dict())
    renamed = segmenter.segment("noise", image, NAMES)
    assert renamed.class_names == NAMES
    assert np.array_equal(renamed.labels, renamed_labels(tiny_folder, NAMES))

    after = segmenter.segment("noise", image, list(CLASSES))
    assert after.class_names == list(CLASSES) and np.array_equal(after.labels, before.labels)
    for name, weight in segmenter.model.state_dict().items():
        assert torch.equal(weight, weights[name])
    shared = segmenter.model_with(NAMES).mfuser.vfm.state_dict()
    assert all(
        weight.data_ptr() == shared[name].data_ptr()
        for name, weight in segmenter.model.mfuser.vfm.state_dict().items()
    )


def test_only_a_few_lists_of_names_are_cached(tiny_folder):
    segmenter = tiny_segmenter(tiny_folder)
    first = segmenter.model_with(["road"])
    assert segmenter.model_with(["road"]) is first
    for name in ("street", "tree", "sky", "car"):
        segmenter.model_with([name])
    assert segmenter.model_with(["road"]) is not first


def test_names_that_cannot_be_used_are_explained(tiny_folder):
    segmenter = tiny_segmenter(tiny_folder)
    assert segmenter.parse_names(" road \n\nsky\n") == ["road", "sky"]
    for text, message in (
        ("", "non-empty"),
        ("road\nroad", "more than once"),
        ("\n".join(f"class {index}" for index in range(256)), "at most 255"),
    ):
        with pytest.raises(ValueError, match=message):
            segmenter.parse_names(text)


def test_names_are_fixed_without_text_encoder_or_tokenizer(tiny_folder, tmp_path):
    model = tiny_model()
    fixed = Segmenter(model, MFuserImageProcessor())
    with pytest.raises(ValueError, match="--tokenizer"):
        fixed.parse_names("road")
    assert Segmenter(model, MFuserImageProcessor(), str(tiny_folder)).parse_names("road") == ["road"]
    with pytest.raises(ValueError, match="cannot be loaded"):
        Segmenter(model, MFuserImageProcessor(), str(tmp_path))
    model.config.use_text_encoder = False
    with pytest.raises(ValueError, match="edited"):
        Segmenter(model, MFuserImageProcessor()).parse_names("road")
    with pytest.raises(ValueError, match="--tokenizer is for models with a text encoder"):
        Segmenter(model, MFuserImageProcessor(), str(tiny_folder))


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "'0' must be a whole number from 1 to 65535"),
        (["--port", "{taken}"], "cannot listen on --host 127.0.0.1 --port {taken}"),
        (["--device", "gpu"], "'gpu' must be an available device"),
    ],
)
def test_usage_errors_are_explained_with_exit_code_2(capsys, arguments, message):
    pytest.importorskip("gradio", reason="gradio is not installed (the extra [app])")
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(SystemExit) as error:
            cli.main(["app", *(argument.format(taken=taken) for argument in arguments)])
    assert error.value.code == 2
    assert message.format(taken=taken) in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "mfuser.scripts.app", raising=False)
    assert cli.main(["app"]) == 2
    assert capsys.readouterr().err == 'mfuser app needs the package gradio: pip install "mfuser[app]"\n'


# The Space


def test_the_space_serves_the_same_page(monkeypatch, tmp_path):
    app = pytest.importorskip("mfuser.scripts.app", reason="gradio is not installed (the extra [app])")
    monkeypatch.setattr(app, "main", lambda arguments: vars(app.parse_arguments(arguments)))
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(free_port()))
    monkeypatch.delenv("MFUSER_MODEL", raising=False)
    for model in (DEFAULT_MODEL, "someone/a-model"):
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "space" / "app.py"))
        assert stop.value.code["model"] == str(model) and stop.value.code["host"] == "0.0.0.0"
        monkeypatch.setenv("MFUSER_MODEL", "someone/a-model")


def test_the_space_requires_what_the_package_requires():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = (ROOT / "space" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if line[0] not in "#-"]
    assert listed == setup["options"]["install_requires"].split()
    (version,) = re.findall(r"^sdk_version: (\S+)$", (ROOT / "space" / "README.md").read_text(), flags=re.MULTILINE)
    (gradio,) = setup["options.extras_require"]["app"].split()
    assert Requirement(gradio).specifier.contains(version)


# The page in a browser


def wait_for(condition, what: str, seconds: float = 60):
    """Polls until `condition()` is true, and returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Browser:
    """Chromium, and the actions of a visitor on the page."""

    def __init__(self, profile: Path):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking"):
            options.add_argument(f"--{argument}")
        options.add_argument(f"--user-data-dir={profile}")
        options.add_argument("--window-size=1280,1600")
        options.add_argument("--use-fake-device-for-media-stream")
        options.add_argument("--use-fake-ui-for-media-stream")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, address: str):
        self.driver.get_log("performance"), self.driver.get_log("browser")
        self.driver.get(address)
        wait_for(lambda: self.all("#image input[type=file]"), "the page")

    def all(self, selector: str):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def click(self, selector: str):
        self.all(selector)[0].click()

    def buttons(self, name: str):
        """The buttons of the image that have this name."""
        return [button for button in self.all("#image button") if button.accessible_name == name]

    def remove_image(self):
        if buttons := self.buttons("Remove Image"):
            buttons[0].click()
            wait_for(lambda: self.text("#status").startswith("Upload an image"), "the page without an image")

    def upload(self, path: Path):
        """Uploads a file in place of the current image, and waits for the status message."""
        self.remove_image()
        self.all("#image input[type=file]")[0].send_keys(str(path))
        wait_for(lambda: path.stem in self.text("#status"), "the status")

    def overlay(self) -> np.ndarray:
        """The overlay that the page shows now."""
        with urllib.request.urlopen(self.overlay_address()) as response:
            return np.asarray(Image.open(response)).astype(int)

    def overlay_address(self) -> str | None:
        images = self.all("#overlay img")
        return images[0].get_attribute("src") if images else None

    def change(self, action) -> np.ndarray:
        """Runs an action that changes the overlay, and returns the new one."""
        before = self.overlay_address()
        action()
        wait_for(lambda: self.overlay_address() not in (None, before), "the new overlay")
        return self.overlay()

    def slide(self, selector: str, value: float):
        from selenium.webdriver.common.keys import Keys

        field = self.all(f"{selector} input[type=number]")[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.ENTER, Keys.TAB)

    def toggle(self, class_name: str):
        (label,) = [label for label in self.all("#shown label") if label.text.strip() == class_name]
        label.click()

    def write(self, selector: str, text: str):
        from selenium.webdriver.common.keys import Keys

        field = self.all(selector)[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def shares(self) -> dict[str, float]:
        """The legend of the page: the share of each class in percent."""
        rows = [row.rsplit(None, 2) for row in self.text("#legend tbody").splitlines()]
        return {name: float(share) for name, share, _ in rows}

    def download(self) -> dict[str, bytes]:
        """Prepares the files to download, and follows their links."""
        self.click("#save")
        wait_for(lambda: len(self.all("#files a[download]")) == 3, "the files")
        files = {}
        for link in self.all("#files a[download]"):
            with urllib.request.urlopen(link.get_attribute("href")) as response:
                files[link.get_attribute("download")] = response.read()
        return files

    def foreign_requests(self) -> list[str]:
        """Addresses on other machines that the page asked for since it was opened."""
        addresses = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                addresses.append(message["params"].get("request", message["params"])["url"])
        assert any(address.startswith("http://127.0.0.1:") for address in addresses)
        web = [address for address in addresses if address.startswith(("http", "ws"))]
        return [address for address in web if address.split("/")[2].split(":")[0] != "127.0.0.1"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed (the extra [dev])")
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium or chromedriver is not installed (apt-get install chromium chromium-driver)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`mfuser app` with the demonstration model, in a separate process: its address, and its temporary folder."""
    pytest.importorskip("gradio", reason="gradio is not installed (the extra [app])")
    port, folder = free_port(), tmp_path_factory.mktemp("temporary")
    log = folder.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, "app", "--port", str(port), "--device", "cpu"],
            env=os.environ | {"TMPDIR": str(folder)},
            cwd=log.parent,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}/"
        wait_for(lambda: address in log.read_text() or process.poll() is not None, "the server", 120)
        assert process.poll() is None, log.read_text()
        yield address, folder, process
    finally:
        process.terminate()
        process.wait()


def near(pixels: np.ndarray, expected: np.ndarray) -> bool:
    """Whether a JPEG file shows the expected picture."""
    return abs(pixels - expected).mean() < 6


@pytest.fixture(scope="module")
def demonstration(browser, command):
    browser.open(command[0])
    return browser


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """The example's pixels, and its labels and their colours by `mfuser segment`."""
    folder = tmp_path_factory.mktemp("segmented")
    assert segment_command([str(EXAMPLE), "--output", str(folder), "--device", "cpu"]) == 0
    with Image.open(EXAMPLE) as image, Image.open(folder / "street_labels.png") as labels:
        pixels, colours = np.asarray(image).astype(int), np.asarray(labels.convert("RGB")).astype(int)
        return pixels, np.asarray(labels), colours, json.loads((folder / "legend.json").read_text())


@pytest.mark.slow
def test_an_uploaded_image_is_segmented_as_by_mfuser_segment(demonstration, segmented):
    pixels, labels, colours, legend = segmented
    demonstration.upload(EXAMPLE)
    assert "street: 960 x 720 pixels, segmented in" in demonstration.text("#status")
    assert near(demonstration.overlay(), (pixels + colours) / 2)
    expected = {entry["name"]: 100 * (labels == int(index)).mean() for index, entry in legend.items()}
    shown = demonstration.shares()
    assert shown == pytest.approx(expected, abs=0.051) and list(shown.values()) == sorted(shown.values())[::-1]

    files = demonstration.download()
    assert sorted(files) == ["street_labels.png", "street_legend.json", "street_overlay.jpg"]
    downloaded = Image.open(io.BytesIO(files["street_labels.png"]))
    assert downloaded.mode == "P" and np.array_equal(np.asarray(downloaded), labels)
    assert np.array_equal(np.asarray(downloaded.convert("RGB")), colours)
    assert near(np.asarray(Image.open(io.BytesIO(files["street_overlay.jpg"]))), (pixels + colours) / 2)
    entries = json.loads(files["street_legend.json"])
    assert {index: {"name": entry["name"], "colour": entry["colour"]} for index, entry in entries.items()} == legend
    assert sum(entry["share"] for entry in entries.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_the_controls_redraw_the_result(demonstration, segmented, tmp_path):
    page, (pixels, labels, colours, legend) = demonstration, segmented
    page.upload(EXAMPLE)
    assert near(page.change(lambda: page.slide("#opacity", 1)), colours)
    sky = next(int(index) for index, entry in legend.items() if entry["name"] == "sky")
    without_sky = np.where((labels == sky)[..., None], pixels, colours)
    assert near(page.change(lambda: page.toggle("sky")), without_sky)
    assert "sky (hidden)" in page.shares()
    assert near(page.change(lambda: page.click("#hide-all")), pixels)
    assert near(page.change(lambda: page.click("#show-all")), colours)

    unknown = page.change(lambda: page.slide("#threshold", 0.6))
    share = page.shares()["unknown"]
    assert 1 < share < 99 and 100 * (unknown.max(axis=-1) < 20).mean() == pytest.approx(share, abs=2)
    saved = np.asarray(Image.open(io.BytesIO(page.download()["street_labels.png"])))
    assert 100 * (saved == 255).mean() == pytest.approx(share, abs=0.051)
    arguments = [str(EXAMPLE), "--output", str(tmp_path), "--device", "cpu", "--unknown-threshold", "0.6"]
    assert segment_command(arguments) == 0
    with Image.open(tmp_path / "street_labels.png") as image:
        assert np.array_equal(saved, np.asarray(image))

    page.change(lambda: page.slide("#threshold", 0))
    assert "unknown" not in page.shares() and not page.all("#files a")
    page.change(lambda: page.all("#kind input")[1].click())
    assert "confidence" in page.text("#legend")
    page.change(lambda: page.all("#kind input")[0].click())
    assert near(page.change(lambda: page.slide("#opacity", 0)), pixels)
    page.change(lambda: page.slide("#opacity", 0.5))


@pytest.mark.slow
def test_the_example_image_can_be_selected(demonstration, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    demonstration.upload(tmp_path / "black.png")
    demonstration.change(lambda: demonstration.click("#example"))
    assert demonstration.text("#status").startswith("street: 960 x 720")


@pytest.mark.slow
def test_a_picture_of_the_camera_is_segmented(demonstration):
    page = demonstration
    page.remove_image()
    for button in ("Capture from camera", "Click to Access Webcam"):
        wait_for(lambda name=button: page.buttons(name), button)[0].click()
    video_has_a_frame = "return document.querySelector('#image video')?.readyState >= 2"
    wait_for(lambda: page.driver.execute_script(video_has_a_frame), "the camera")
    wait_for(lambda: page.buttons("capture photo"), "the button")[0].click()
    assert "segmented in" in wait_for(
        lambda: page.text("#status").startswith("image: ") and page.text("#status"), "the result"
    )
    page.remove_image()
    page.buttons("Upload file")[0].click()


@pytest.mark.slow
def test_files_that_cannot_be_read_are_reported_on_the_page(demonstration, tmp_path):
    demonstration.upload(EXAMPLE)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(EXAMPLE.read_bytes()[:5000])
    for name, message in (("text.png", "not an image of a known format"), ("cut.jpg", "cannot be read")):
        demonstration.upload(tmp_path / name)
        assert f"{name}" in demonstration.text("#status") and message in demonstration.text("#status .error")
        assert not demonstration.all("#overlay img") and not demonstration.text("#legend")
    demonstration.slide("#opacity", 0.4)
    wait_for(lambda: "There is no result" in demonstration.text("#status"), "the status")
    demonstration.slide("#opacity", 0.5)
    demonstration.upload(EXAMPLE)
    assert "segmented in" in demonstration.text("#status")


@pytest.mark.slow
def test_a_model_without_text_encoder_says_that_its_names_are_fixed(demonstration):
    demonstration.click("#naming button")
    wait_for(lambda: "has no text encoder" in demonstration.text("#names"), "the reason")
    assert not demonstration.all("#apply")[0].is_enabled() and not demonstration.all("#reset")[0].is_enabled()
    assert not demonstration.all("#names textarea")[0].is_enabled()


@pytest.mark.slow
def test_every_control_has_a_name_for_screen_readers(demonstration):
    controls = [
        control for control in demonstration.all("input, button, textarea, select, a") if control.is_displayed()
    ]
    assert len(controls) > 20
    assert [control.get_attribute("outerHTML") for control in controls if not control.accessible_name] == []


@pytest.mark.slow
def test_the_page_loads_nothing_from_other_machines(demonstration, command):
    demonstration.open(command[0])
    demonstration.click("#example")
    wait_for(lambda: demonstration.text("#legend"), "the legend")
    assert demonstration.foreign_requests() == []
    errors = [entry["message"] for entry in demonstration.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


@pytest.fixture(scope="module")
def tiny_page(browser, tiny_folder):
    """The page of a model with a text encoder, served by this process: the model, and the hosts it connected to."""
    app = pytest.importorskip("mfuser.scripts.app", reason="gradio is not installed (the extra [app])")
    hosts, connect = set(), socket.socket.connect

    def recorded_connect(self, address):
        hosts.add(address[0])
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", recorded_connect)
        segmenter = tiny_segmenter(tiny_folder)
        blocks = app.build(segmenter, "tiny")
        browser.open(app.launch(blocks, "127.0.0.1", free_port()))
        yield browser, segmenter.model, hosts
        blocks.close()


@pytest.mark.slow
def test_class_names_can_be_edited(tiny_page, tiny_folder, tmp_path):
    page, _, _ = tiny_page
    Image.fromarray(noise_image()).save(tmp_path / "noise.png")
    page.upload(tmp_path / "noise.png")
    assert set(page.shares()) == set(CLASSES)
    page.click("#naming button")
    wait_for(lambda: page.all("#names textarea") and page.all("#names textarea")[0].is_displayed(), "the names")

    page.write("#names textarea", "car\ncar")
    page.click("#apply")
    wait_for(lambda: "more than once" in page.text("#status .error"), "the error")
    assert set(page.shares()) == set(CLASSES)

    page.write("#names textarea", "\n".join(NAMES))
    page.click("#apply")
    wait_for(lambda: set(page.shares()) == set(NAMES), "the new legend")
    assert [label.text.strip() for label in page.all("#shown label")] == NAMES
    labels = np.asarray(Image.open(io.BytesIO(page.download()["noise_labels.png"])))
    assert np.array_equal(labels, renamed_labels(tiny_folder, NAMES))

    page.click("#reset")
    wait_for(lambda: set(page.shares()) == set(CLASSES), "the old legend")


@pytest.mark.slow
def test_the_model_runs_once_per_image(tiny_page, tmp_path):
    page, model, _ = tiny_page
    Image.fromarray(noise_image()[:40]).save(tmp_path / "b.png")
    runs = []
    hook = model.register_forward_hook(lambda *_: runs.append(1))
    page.upload(tmp_path / "b.png")
    page.change(lambda: page.slide("#opacity", 0.8))
    page.change(lambda: page.slide("#threshold", 0.99))
    page.download()
    hook.remove()
    assert len(runs) == 1


@pytest.mark.slow
def test_the_server_connects_to_no_other_machine(tiny_page):
    page, _, hosts = tiny_page
    assert page.foreign_requests() == []
    assert hosts <= {"127.0.0.1"}


@pytest.mark.slow
def test_a_stopped_server_leaves_no_files(browser, command):
    address, folder, process = command
    browser.open(address)
    browser.upload(EXAMPLE)
    browser.download()
    assert {"street.jpg", "street_labels.png"} <= {path.name for path in folder.rglob("*") if path.is_file()}
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert [path for path in folder.rglob("*") if path.is_file()] == []
