"""Exported artefacts are equal to the model, self-contained, and written completely or not at all."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fault_injection
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CLASSES, PAIRS, tiny_model
from torch import nn

from mfuser import MFuserForSemanticSegmentation, MFuserImageProcessor, MFuserModel
from mfuser.outputs_mfuser import MFuserForSemanticSegmentationOutput, MFuserModelOutput
from mfuser.scripts import cli, export, run_artefact
from mfuser.scripts.segment_images import read_image

DEMONSTRATION = Path(__file__).parents[1] / "checkpoints" / "mfuser-tiny-camvid"
# Modules that a process running an artefact must not import.
FOREIGN = {"torch-export": ("mfuser", "transformers", "onnxruntime"), "onnx": ("mfuser", "transformers", "torch")}
FOREIGN["aoti"] = FOREIGN["torch-export"]


def save(folder, model=None):
    (model or tiny_model()).save_pretrained(folder)
    MFuserImageProcessor().save_pretrained(folder)
    return str(folder)


def save_image(path, size=(100, 72), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces the model, whose export takes minutes, by a convolution and a bias that is a weight."""
    kernel = torch.randn(len(CLASSES), 3, 3, 3, generator=torch.Generator().manual_seed(0))

    def forward(model, pixel_values, *args, **kwargs):
        return MFuserModelOutput(last_hidden_state=pixel_values)

    def decode(model, features, *args, **kwargs):
        scores = nn.functional.conv2d(features.last_hidden_state, kernel, padding=1) + model.mfuser.enhancer.gamma[0]
        return MFuserForSemanticSegmentationOutput(logits=scores)

    monkeypatch.setattr(MFuserModel, "forward", forward)
    monkeypatch.setattr(MFuserForSemanticSegmentation, "decode", decode)


def run_elsewhere(folder, image, kind, code=0):
    """
    The labels that run.py writes, and its output, in a process without the packages that it must not need; with
    another exit code, its output on stderr.
    """
    program = "import sys, runpy; sys.modules.update(dict.fromkeys({!r})); sys.argv[0] = {!r}; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    program = program.format(FOREIGN[kind], str(folder / "run.py"))
    result = subprocess.run(
        [sys.executable, "-c", program, str(image), "out.png"], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == code, result.stderr
    return result.stderr if code else (np.asarray(Image.open(folder / "out.png")), result.stdout)


# run.py


@pytest.mark.parametrize(
    "size",
    [
        None,
        {"longest_edge": 480},
        {"shortest_edge": 360},
        {"longest_edge": 480, "shortest_edge": 360},
        {"max_height": 100, "max_width": 300},
        {"height": 48, "width": 64},
    ],
)
def test_the_script_resizes_as_the_processor(size):
    processor = MFuserImageProcessor(**({} if size is None else {"size": size}))
    described = export.description(export.Window(tiny_model(), argmax=False), processor, "onnx")
    assert json.loads(json.dumps(described)) == described
    for width, height in ((210, 190), (96, 640), (1, 3), (1920, 1080), (333, 333)):
        pixels = processor(Image.new("RGB", (width, height)), do_pad=False)["pixel_values"][0]
        assert run_artefact.model_size(width, height, described["size"]) == pixels.shape[:0:-1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.5, "image_std": 0.5},
        {"size": {"height": 48, "width": 64}, "resample": 0},
        {"size": {"longest_edge": 150}, "resample": 3},
    ],
)
def test_the_script_prepares_an_image_as_the_processor(settings):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 100, 3), dtype=np.uint8))
    processor = MFuserImageProcessor(**settings)
    artefact = export.description(export.Window(tiny_model(), argmax=False), processor, "onnx")
    expected = processor(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(run_artefact.prepare(image, artefact), expected, atol=2e-6)


def test_the_script_reads_an_image_as_mfuser_segment(tmp_path):
    generator = np.random.default_rng(0)
    values = generator.integers(0, 65536, (20, 30), dtype=np.uint16)
    colours = Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    colours.save(tmp_path / "rotated.png", exif=orientation)
    colours.convert("P").save(tmp_path / "palette.png")
    Image.fromarray(values).save(tmp_path / "16 bits.png")
    Image.fromarray(values).save(tmp_path / "16 bits.tiff", exif=orientation)
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "32 bits.tiff")
    for file in tmp_path.iterdir():
        expected = read_image(file, MFuserImageProcessor()).transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(run_artefact.read_image(file)), expected, str(file))
    for name, unknown in (("float", np.float32(values)), ("large", values.astype(np.int32) * 2)):
        Image.fromarray(unknown).save(tmp_path / f"{name}.tiff")
        with pytest.raises(ValueError, match=f"{name}.tiff has pixels of an unknown range; save it with 8 or 16"):
            run_artefact.read_image(tmp_path / f"{name}.tiff")


@pytest.mark.parametrize("settings", [{"do_rescale": False}, {"do_center_crop": True}])
def test_an_image_processor_that_refuses_8_bit_images_is_refused(settings, tmp_path, capsys):
    folder = save(tmp_path / "model")
    MFuserImageProcessor(**settings).save_pretrained(folder)
    assert cli.main(["export", folder, "--format", "torch-export", "--output", str(tmp_path / "artefact")]) == 2
    error = capsys.readouterr().err
    assert "the model's image processor refuses 8-bit images" in error and next(iter(settings)) in error
    assert not (tmp_path / "artefact").exists()


@pytest.mark.parametrize("size", [(64, 64), (150, 130), (66, 200)])
def test_the_script_segments_by_the_same_windows_as_the_model(size):
    model = tiny_model()
    window = export.Window(model, argmax=False)
    artefact = export.description(window, MFuserImageProcessor(), "onnx")
    pixel_values = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = run_artefact.segment(
            pixel_values.numpy(), lambda pixels: window(torch.from_numpy(pixels)).numpy(), artefact
        )
        expected = model(pixel_values).logits.argmax(dim=1)[0].numpy()
    assert (labels == expected).mean() > 0.999


def test_the_script_refuses_an_image_that_is_too_small():
    artefact = export.description(export.Window(tiny_model(), argmax=False), MFuserImageProcessor(), "onnx")
    with pytest.raises(ValueError, match="40 x 90 pixels; both sides must have at least 64"):
        run_artefact.segment(np.zeros((1, 3, 90, 40), np.float32), None, artefact)


# The command, with a stand-in for the model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch-export", "onnx", "aoti"])
def test_an_artefact_runs_where_mfuser_and_transformers_are_not(kind, tmp_path, stand_in, capsys):
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    folder, output = save(tmp_path / "model"), tmp_path / "new" / "artefact"
    assert cli.main(["export", folder, "--format", kind, "--output", str(output)]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "largest difference of scores" in printed and str(output / export.FILES[kind]) in printed
    assert {path.name for path in output.iterdir()} == {export.FILES[kind], "artefact.json", "run.py"}
    assert json.loads((output / "artefact.json").read_text())["classes"] == list(CLASSES)
    assert [path.name for path in output.parent.iterdir()] == ["artefact"]  # no temporary file remains

    pixels = save_image(tmp_path / "image.png")
    labels, text = run_elsewhere(output, tmp_path / "image.png", kind)
    pixel_values = MFuserImageProcessor()(pixels, return_tensors="pt")["pixel_values"]
    expected = MFuserForSemanticSegmentation.from_pretrained(folder)(pixel_values).logits
    assert (labels == expected.argmax(1)[0].numpy()).mean() > 0.999
    assert "%" in text and any(name in text for name in CLASSES)


@pytest.mark.slow
def test_argmax_gives_labels(tmp_path, stand_in, capsys):
    folder, output = save(tmp_path / "model"), tmp_path / "artefact"
    assert cli.main(["export", folder, "--format", "torch-export", "--output", str(output), "--argmax"]) == 0
    assert "share of labels that differ 0.0e+00" in capsys.readouterr().out
    labels = run_artefact.load(output)(np.random.default_rng(0).random((2, 3, 70, 90), np.float32))
    assert labels.shape == (2, 70, 90) and labels.dtype == np.int64
    image = np.zeros((1, 3, 100, 150), np.float32)
    assert run_artefact.segment(image, run_artefact.load(output), run_artefact.describe(output)).shape == (100, 150)


@pytest.mark.slow
def test_a_whole_image_artefact_equals_the_model_from_one_window_upwards(tmp_path, stand_in, capsys):
    folder, output = save(tmp_path / "model"), tmp_path / "artefact"
    command = ["export", folder, "--format", "torch-export", "--whole-image", "--output", str(output)]
    assert cli.main(command) == 0, capsys.readouterr().err
    model, run = MFuserForSemanticSegmentation.from_pretrained(folder), run_artefact.load(output)
    crop, stride = model.config.crop_size, model.config.crop_stride
    sides = (crop, crop + 1, crop + stride - 1, crop + stride, crop + stride + 1, 4 * crop + 3)
    for batch, height, width in [(1, crop, crop), *((2, *size) for size in zip(sides, sides[::-1], strict=True))]:
        pixel_values = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(pixel_values).logits
        torch.testing.assert_close(torch.from_numpy(run(pixel_values.numpy())), expected, rtol=0, atol=1e-5)
    save_image(tmp_path / "image.png")
    labels, _ = run_elsewhere(output, tmp_path / "image.png", "torch-export")
    assert labels.shape == (72, 100)
    save_image(tmp_path / "small.png", size=(100, crop - 1))
    assert run_elsewhere(output, tmp_path / "small.png", "torch-export", code=2) == (
        f"run.py: the image has 100 x {crop - 1} pixels; both sides must have at least {crop}\n"
    )


@pytest.mark.slow
def test_labels_of_whole_images_are_those_of_the_model(tmp_path, stand_in, capsys):
    folder, output = save(tmp_path / "model"), tmp_path / "artefact"
    command = ["export", folder, "--format", "torch-export", "--whole-image", "--argmax", "--output", str(output)]
    assert cli.main(command) == 0, capsys.readouterr().err
    pixel_values = torch.randn(1, 3, 100, 150)
    found = run_artefact.segment(pixel_values.numpy(), run_artefact.load(output), run_artefact.describe(output))
    expected = MFuserForSemanticSegmentation.from_pretrained(folder)(pixel_values).logits.argmax(1)[0].numpy()
    assert (found == expected).mean() > 0.999


@pytest.mark.parametrize("kind", ["onnx", "aoti"])
def test_whole_images_of_other_formats_are_refused(kind, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["export", "no/model", "--format", kind, "--whole-image", "--output", str(tmp_path)])
    assert exit_code.value.code == 2
    assert f"an artefact of --format {kind} is one window, and its run.py segments" in capsys.readouterr().err


@pytest.mark.slow
def test_an_artefact_that_differs_from_the_model_is_not_written(tmp_path, stand_in, monkeypatch, capsys):
    real = export.capture

    def changed(window):
        program = real(window)
        name = "model.mfuser.enhancer.gamma"
        program.state_dict[name] = nn.Parameter(program.state_dict[name] + 1e-3, False)
        return program

    monkeypatch.setattr(export, "capture", changed)
    output = tmp_path / "new" / "artefact"
    assert cli.main(["export", save(tmp_path / "model"), "--format", "torch-export", "--output", str(output)]) == 2
    assert "differs from the model by 1.0e-03; at most 5e-05" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []


def test_a_folder_that_holds_anything_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "run.py").write_text("mine")
    assert cli.main(["export", "no/model", "--format", "torch-export", "--output", str(tmp_path)]) == 2
    assert "is not empty; choose a new folder, so that nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "run.py").read_text() == "mine"


@pytest.mark.parametrize("fault", [fault_injection.kill, fault_injection.fill_disk])
def test_an_export_that_ends_at_any_file_operation_leaves_nothing_or_a_complete_artefact(fault, tmp_path, monkeypatch):
    model, processor = tiny_model(), MFuserImageProcessor()
    monkeypatch.setattr(export, "load_for_inference", lambda *_: (model, processor))
    monkeypatch.setattr(export, "capture", lambda window: b"graph")
    monkeypatch.setitem(export.WRITERS, "torch-export", lambda program, path: path.write_bytes(program))
    monkeypatch.setattr(export, "largest_difference", lambda *_: 0.0)
    work = tmp_path / "work"
    work.mkdir()
    output = work / "artefact"
    act = fault_injection.full_disk_is_an_exit_code(lambda: export.export("model", "torch-export", output))
    _, operations = fault_injection.run(act, work)
    shutil.rmtree(output)
    assert operations >= 6
    for at in range(operations):
        code, _ = fault_injection.run(act, work, fault, at)
        failed = -signal.SIGKILL if fault is fault_injection.kill else fault_injection.FULL
        assert code in (failed, fault_injection.FINISHED)
        assert output.exists() or code == failed
        if output.exists():
            assert {path.name for path in output.iterdir()} == {"model.pt2", "artefact.json", "run.py"}
            assert (output / "run.py").read_bytes() == Path(run_artefact.__file__).read_bytes()
            shutil.rmtree(output)
        if fault is fault_injection.fill_disk:
            assert list(work.iterdir()) == []


def test_without_a_compiler_aoti_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cli.main(["export", "no/model", "--format", "aoti", "--output", str(tmp_path / "artefact")]) == 2
    assert "needs a C++ compiler, and there is none: install g++ or clang++" in capsys.readouterr().err
    assert not (tmp_path / "artefact").exists()


def test_missing_onnx_packages_are_named(tmp_path, monkeypatch, capsys):
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    assert cli.main(["export", "no/model", "--format", "onnx", "--output", str(tmp_path / "artefact")]) == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


def test_quantisation_that_an_artefact_cannot_hold_is_refused(tmp_path, capsys):
    command = ["export", "no/model", "--format", "onnx", "--output", str(tmp_path), "--quantize", "int8-dynamic"]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "an artefact cannot hold; export with int8-weight-only" in capsys.readouterr().err


def test_torch_jit_trace_names_the_alternatives():
    with pytest.raises(NotImplementedError, match="cannot capture this model; use `mfuser export`"):
        torch.jit.trace(tiny_model(), torch.zeros(1, 3, 64, 64))


# Whole models


def subject(name):
    """A model by the name of its pair of encoders, and its image processor."""
    if name == "demonstration":
        return export.load_for_inference(DEMONSTRATION, torch.device("cpu"))
    model = tiny_model(name if name in PAIRS else "dinov2+clip")
    return export.quantize(model, name if name == "int8-weight-only" else None), MFuserImageProcessor()


def assert_artefact_equals_the_model(window, model, processor, program, kind, folder, tolerance=1e-5):
    """Compares scores, and the labels of an image by run.py in another process."""
    folder.mkdir()
    export.WRITERS[kind](program, folder / export.FILES[kind])
    (folder / "artefact.json").write_text(json.dumps(export.description(window, processor, kind)))
    (folder / "run.py").write_bytes(Path(run_artefact.__file__).read_bytes())
    assert export.largest_difference(window, folder) <= tolerance, kind
    save_image(folder / "image.png", size=(210, 190))
    labels, _ = run_elsewhere(folder, folder / "image.png", kind)
    with Image.open(folder / "image.png") as image, torch.no_grad():
        expected = model(processor(image, return_tensors="pt")["pixel_values"]).logits.argmax(1)[0].numpy()
    # Labels of the size at which the model runs are resized to that of the image.
    expected = np.asarray(Image.fromarray(expected.astype(np.uint8)).resize((210, 190), Image.Resampling.NEAREST))
    assert (labels == expected).mean() > 0.999, kind


SUBJECTS = ["demonstration", *PAIRS, "int8-weight-only"]


@pytest.mark.slow
@pytest.mark.exhaustive  # docs/works_with.md exports the demonstration to ONNX, which is compared as well
@pytest.mark.parametrize("name", SUBJECTS)
def test_artefacts_equal_the_model(name, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, processor = subject(name)
    window = export.Window(model, argmax=False)
    program = export.capture(window)
    operators = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert {operator.namespace for operator in operators} == {"aten"}
    for kind in ("torch-export", "onnx"):
        tolerance = export.TOLERANCE if (kind, name) == ("onnx", "demonstration") else 1e-5
        assert_artefact_equals_the_model(window, model, processor, program, kind, tmp_path / kind, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["dinov2+clip", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in SUBJECTS if name != "dinov2+clip")],
)
def test_artefacts_of_whole_images_equal_the_model(name, tmp_path):
    model, processor = subject(name)
    window = export.WholeImage(model, argmax=False)
    program = export.capture(window)
    assert_artefact_equals_the_model(window, model, processor, program, "torch-export", tmp_path / "artefact")
