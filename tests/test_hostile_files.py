"""One bad image never stops `mfuser segment` or `mfuser evaluate`: it is reported, counted and skipped."""

import io
import json
import os
import re
import shutil
import signal
import struct
import zlib
from pathlib import Path

import datasets
import fault_injection
import numpy as np
import pytest
import torch
from colour_scorer import NAMES, Colours, pixels_and_labels
from peak_memory import segment_peak_mebibytes
from PIL import Image
from test_segment import ThresholdModel, files, run, write_image
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from mfuser import MFuserImageProcessor
from mfuser.evaluation import scoring
from mfuser.evaluation.domains import open_domain
from mfuser.evaluation.large_images import label_map_by_bands
from mfuser.scripts import segment


@pytest.fixture
def model(monkeypatch):
    model = ThresholdModel()
    monkeypatch.setattr(segment, "load_for_inference", lambda *_: (model, MFuserImageProcessor()))
    return model


def encoded(kind: str, height: int = 24, width: int = 32, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(stream, kind, **options)
    return stream.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    content = bytearray(encoded("PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


# --- guarantee: a bad file in a folder of good ones, and the reason that is given ------------------------------------

BAD_FILES = {
    "bomb.png": (png_that_claims(60_000, 60_000), "exceeds limit of .* pixels, could be decompression bomb"),
    "claims.png": (png_that_claims(5_000, 5_000), "truncated|broken|not an image that can be read"),
    "cut.jpg": (encoded("JPEG")[:300], "(?i)truncated"),
    "cut.avif": (encoded("AVIF")[:-40], "Failed to decode|not an image that can be read|cannot identify"),
    "broken.avif": (encoded("AVIF")[:60] + bytes(200), "not an image that can be read|cannot identify"),
    "text.webp": (b"no image", "cannot identify image file"),
    "empty.tif": (b"", "cannot identify image file"),
    "f" * 250 + ".jpg": (encoded("JPEG"), "File name too long"),
    "wide.jpg": (encoded("JPEG", 8, 65_500), None),  # the widest possible JPEG is segmented
    "wider.png": (
        encoded("PNG", 4, 70_000),
        "70000 x 4 pixels; the overlay, a JPEG, can have at most 65500 on a side",
    ),  # its overlay is no longer possible
}


def test_a_bad_file_is_named_and_counted_and_the_rest_is_segmented(model, tmp_path, capsys):
    images = tmp_path / "images"
    classes = write_image(images / "aaa.png")
    write_image(images / "zzz.png")
    for name, (content, _) in BAD_FILES.items():
        (images / name).write_bytes(content)
    (images / "loop.png").symlink_to("loop.png")
    assert run(images, "--output", tmp_path / "out") == 1
    printed = capsys.readouterr()
    skipped = {name: reason for name, (_, reason) in BAD_FILES.items() if reason is not None}
    lines = dict(re.findall(r"skipped \S*/([^/\s]+?\.\w{3,4}): (.*)", printed.err))
    assert lines.keys() == skipped.keys()
    for name, reason in skipped.items():
        assert re.search(reason, lines[name]), (name, lines[name])
    assert f"segmented: 3, skipped: {len(skipped)}," in printed.out
    for name in ("aaa", "zzz"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{name}_labels.png")), classes)
    assert not [name for name in files(tmp_path / "out") if name.endswith(".tmp")]


def test_an_image_that_exhausts_the_memory_or_gives_nan_is_skipped(model, tmp_path, monkeypatch, capsys):
    errors = {
        "a.png": MemoryError(),
        "b.png": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        "c.png": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    }  # fmt: skip
    for name in (*errors, "d.png", "e.png"):
        write_image(tmp_path / name)
    pending = iter([*errors.values(), None, None])
    called = ThresholdModel.__call__

    def fail(self, pixel_values):
        outputs, error = called(self, pixel_values), next(pending)
        if error is not None:
            raise error
        outputs.logits[0, 0, 0, 0] = float("nan") if len(self.sizes) == 4 else 0
        return outputs

    monkeypatch.setattr(ThresholdModel, "__call__", fail)
    assert run(tmp_path, "--output", tmp_path / "out") == 1
    printed = capsys.readouterr()
    for name in errors:
        assert re.search(f"skipped .*{name}: .*out of memory", printed.err)
    assert "d.png: The scores of an image hold NaN or infinite values" in printed.err
    assert "segmented: 1, skipped: 4" in printed.out


def test_a_bug_is_not_taken_for_a_bad_image(model, tmp_path, monkeypatch):
    def bug(*_):
        raise TypeError("bug")

    write_image(tmp_path / "a.png")
    monkeypatch.setattr(ThresholdModel, "__call__", bug)
    with pytest.raises(TypeError):
        run(tmp_path / "a.png", "--output", tmp_path / "out")


def test_results_of_another_image_are_never_replaced_also_by_a_later_run(model, tmp_path, capsys):
    output = tmp_path / "out"
    for folder in ("one", "two"):
        write_image(tmp_path / folder / "street.png")
    write_image(tmp_path / "one" / "street.jpg", 12, 16)
    assert run(tmp_path / "one" / "street.png", "--output", output) == 0
    first = {name: (output / name).read_bytes() for name in files(output)}
    for later in (tmp_path / "two", tmp_path / "one" / "street.jpg"):
        assert run(later, "--output", output) == 0
        assert re.search("street.*: the results are named street-", capsys.readouterr().err)
        assert all((output / name).read_bytes() == content for name, content in first.items())
    labels = [name for name in files(output) if name.endswith("_labels.png")]
    assert labels == ["street-2_labels.png", "street-3_labels.png", "street_labels.png"]
    assert Image.open(output / "street-3_labels.png").size == (16, 12)
    assert run(tmp_path / "one", tmp_path / "two", "--output", output) == 0  # its own results are replaced
    assert [name for name in files(output) if name.endswith("_labels.png")] == labels


@pytest.mark.parametrize("name", ["street_labels.png", "street_overlay.jpg"])
@pytest.mark.parametrize("folder", [True, False])
def test_files_and_folders_of_other_origin_are_kept(model, tmp_path, name, folder):
    write_image(tmp_path / "street.png")
    kept = tmp_path / "out" / name / "kept" if folder else tmp_path / "out" / name
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    assert run(tmp_path / "street.png", "--output", tmp_path / "out") == 0
    assert kept.read_text() == "mine" and (tmp_path / "out" / "street-2_labels.png").is_file()


def test_a_file_in_place_of_a_folder_is_reported(model, tmp_path, capsys):
    for name in ("images/deep/a.png", "images/b.png"):
        write_image(tmp_path / name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deep").write_text("mine")
    assert run(tmp_path / "images", "--output", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert re.search("skipped .*a.png: .*out/deep cannot be created: .* is a file", printed.err)
    assert "segmented: 1, skipped: 1" in printed.out and (tmp_path / "out" / "deep").read_text() == "mine"
    assert run(tmp_path / "images", "--output", tmp_path / "out" / "deep") == 2
    assert "mfuser segment: " in (error := capsys.readouterr().err) and "is a file; choose another folder" in error


def test_the_legend_of_other_classes_is_never_replaced(model, tmp_path, capsys, monkeypatch):
    write_image(tmp_path / "a.png")
    assert run(tmp_path / "a.png", "--output", tmp_path / "out") == 0
    before = (tmp_path / "out" / "legend.json").read_bytes()
    classes = dict(enumerate(["cat", "dog", "cow"]))
    monkeypatch.setattr(model.config, "id2label", classes)
    assert run(tmp_path / "a.png", "--output", tmp_path / "out") == 2
    assert "holds the legend of other classes; choose another --output" in capsys.readouterr().err
    assert (tmp_path / "out" / "legend.json").read_bytes() == before


# --- killed, or the disk full, at any file operation -----------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [fault_injection.kill, pytest.param(fault_injection.fill_disk, marks=pytest.mark.slow)]
)
def test_results_are_complete_whenever_a_run_ends(model, tmp_path, fault):
    images, output = tmp_path / "images", tmp_path / "out"
    for name in ("a.png", "deep/b.png"):
        write_image(images / name)
    old = {}

    def segmented() -> int:
        return run(images, "--output", output)

    assert segmented() == 0
    old = {name: (output / name).read_bytes() for name in files(output)}
    write_image(images / "a.png", 40, 40)  # the next run replaces its results and adds others
    write_image(images / "c.png")
    shutil.copytree(output, tmp_path / "before")
    assert segmented() == 0
    new = {name: (output / name).read_bytes() for name in files(output)}
    assert new.keys() > old.keys()

    def restore() -> None:
        shutil.rmtree(output)
        shutil.copytree(tmp_path / "before", output)

    restore()
    _, operations = fault_injection.run(segmented, output)
    assert operations >= 16  # two for each of eight files
    for at in range(operations):
        restore()
        code, _ = fault_injection.run(segmented, output, fault, at)
        assert code in ((-signal.SIGKILL,) if fault is fault_injection.kill else (0, 1, 2))
        found = {name: (output / name).read_bytes() for name in files(output) if not name.endswith(".tmp")}
        assert found.keys() >= old.keys(), "a result is lost"
        for name, content in found.items():
            assert content in (old.get(name), new.get(name)), f"{name} is half-written"
        if fault is fault_injection.fill_disk:
            assert not [name for name in files(output) if name.endswith(".tmp")]


@pytest.mark.parametrize("size", [1500, 20_000])
def test_a_disk_that_fills_within_a_file_keeps_the_results_of_an_earlier_run(model, tmp_path, size, capfd):
    write_image(tmp_path / "a.png")
    assert run(tmp_path / "a.png", "--output", tmp_path / "out") == 0
    old = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    code, _ = fault_injection.run(
        lambda: run(tmp_path / "a.png", "--output", tmp_path / "out"), tmp_path, file_size=size
    )
    assert code in (1, 2) and re.search("File too large: '.*out/(legend|a_labels).png'", capfd.readouterr().err)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == old


# --- memory ----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("size", [(64, 64), (50, 30), (150, 200), (64, 171), (333, 64), (40, 200), (193, 193)])
@pytest.mark.parametrize("windows_per_batch", [None, 3])
def test_labels_found_band_by_band_are_those_of_the_whole_image(size, windows_per_batch):
    model = tiny_model(windows_per_batch=windows_per_batch)
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(1)
    while len(expected.unique()) == 1:  # a newly initialised model predicts a single class
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            expected = model(pixel_values=pixels).logits[0].argmax(0)
    batches = []
    model.mfuser.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    with torch.no_grad():
        model(pixels)
    together, batches[:] = list(batches), []
    assert torch.equal(label_map_by_bands(model, lambda rows: pixels[:, :, rows], size).long(), expected)
    assert batches == together


def test_no_tensor_but_the_label_map_grows_with_the_image():
    model, width, elements = tiny_model(), 150, {}

    def pixel_rows(rows: slice) -> torch.Tensor:
        return torch.zeros(1, 3, rows.stop - rows.start, width)

    for height in (1250, 2500):
        with LargestTensor() as largest:
            assert label_map_by_bands(model, pixel_rows, (height, width)).shape == (height, width)
        elements[height] = largest.elements
    assert elements[1250] == elements[2500] < model.config.num_labels * 2500 * width


@pytest.mark.slow
def test_4000_x_6000_pixels_are_segmented_within_1400_mib(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((6000, 4000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg")
    assert segment_peak_mebibytes(tmp_path / "large.jpg", "--output", tmp_path / "out") < 1400


# --- fuzz ------------------------------------------------------------------------------------------------------------

KINDS = {
    "jpg": ("JPEG", {}), "png": ("PNG", {}), "tif": ("TIFF", {"compression": "tiff_lzw"}), "webp": ("WEBP", {}),
    "gif": ("GIF", {}), "avif": ("AVIF", {"speed": 10}),
}  # fmt: skip


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes flipped, removed, repeated, inserted or set to an extreme, often in the header."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        reach = len(data) if rng.random() < 0.5 else min(len(data), 64)
        start, length = int(rng.integers(reach)), int(rng.integers(1, 9))
        match rng.integers(6):
            case 0:
                data[start] ^= 1 << int(rng.integers(8))
            case 1:
                data[start : start + length] = rng.bytes(length)
            case 2:
                del data[start : start + length]
            case 3:
                data[start:start] = data[start : start + length]
            case 4:
                data[start : start + length] = bytes([int(rng.choice([0, 255, 127, 128]))]) * length
            case 5:
                del data[max(start, 16) :]
        if not data:
            break
    return bytes(data)


def check_fuzzed(folder: Path, output: Path, number: int, seed: int, capfd, monkeypatch) -> None:
    """Segments `number` damaged files of each kind; each must be segmented or skipped with a reason."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)  # larger ones are refused, as decompression bombs are
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for suffix, (kind, options) in KINDS.items():
        content = encoded(kind, 60, 80, **options)
        for index in range(number):
            (folder / f"{index}.{suffix}").write_bytes(mutated(content, rng))
    code, _ = fault_injection.run(lambda: run(folder, "--output", output), output)
    printed = capfd.readouterr()
    assert code == 1, printed.err[-2000:]  # a negative code is a crash, and 70 an exception
    total = number * len(KINDS)
    skipped = re.findall(r"skipped (\S+?): (.+)", printed.err)
    segmented = [name for name in files(output) if name.endswith("_labels.png")]
    assert len(skipped) + len(segmented) == total and len({name for name, _ in skipped}) == len(skipped)
    assert f"segmented: {len(segmented)}, skipped: {len(skipped)}" in printed.out
    assert min(len(skipped), len(segmented)) > total / 10
    for suffix in KINDS:
        assert any(name.endswith(suffix) for name, _ in skipped)


def test_every_damaged_image_is_read_or_skipped_with_a_reason(model, tmp_path, capfd, monkeypatch):
    check_fuzzed(tmp_path / "images", tmp_path / "out", 50, 0, capfd, monkeypatch)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_thousands_of_damaged_images_are_read_or_skipped_with_a_reason(model, tmp_path, capfd, monkeypatch, seed):
    check_fuzzed(tmp_path / "images", tmp_path / "out", 250, seed, capfd, monkeypatch)


# --- evaluate --------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "smaller than a patch": (encoded("PNG", 6, 40), (6, 40), "a side has 6; a patch has 8"),
    "no image": (None, (24, 32), "the image is missing or empty"),
    "another size": (encoded("PNG"), (24, 31), "24"),
    "broken AVIF": (BAD_FILES["broken.avif"][0], (24, 32), "cannot identify|cannot be read"),
    "cut JPEG": (BAD_FILES["cut.jpg"][0], (24, 32), "(?i)truncated"),
    "text": (b"no image", (24, 32), "cannot identify"),
    "a bomb": (BAD_FILES["bomb.png"][0], (24, 32), "decompression bomb"),
    "scores of NaN": (encoded("PNG", 30, 30), (30, 30), "hold NaN or infinite values"),
    "too large for the memory": (encoded("PNG", 33, 33), (33, 33), "33 x 33 pixels, 1 at once: out of memory"),
}


class FragileColours(Colours):
    def forward(self, pixel_values):
        if pixel_values.shape[-1] == 33:
            raise MemoryError
        outputs = super().forward(pixel_values)
        if pixel_values.shape[-1] == 30:
            outputs.logits[..., 3, 3] = float("nan")
        return outputs


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_row_is_named_and_counted_and_the_score_is_that_of_the_rest(tmp_path, first, monkeypatch):
    def png(array: np.ndarray) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "PNG")
        return stream.getvalue()

    good = [("good", png(image), png(label)) for image, label in pixels_and_labels(3, sizes=((20, 28),))]
    bad = [(name, image, png(np.zeros(size, dtype=np.uint8))) for name, (image, size, _) in BAD_ROWS.items()]

    def evaluated(name: str, rows: list) -> dict:
        columns = {
            "name": [row[0] for row in rows],
            "image": [None if row[1] is None else {"bytes": row[1], "path": None} for row in rows],
            "label": [{"bytes": row[2], "path": None} for row in rows],
        }
        features = datasets.Features(name=datasets.Value("string"), image=datasets.Image(), label=datasets.Image())
        file = tmp_path / name / "validation.parquet"
        file.parent.mkdir()
        datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
        (file.parent / "id2label.json").write_text(json.dumps(NAMES))
        model = FragileColours()
        model.config.patch_size = 8
        domain = open_domain("mine", file, skip_unreadable=True)
        return scoring.evaluate_domain(model, MFuserImageProcessor(), domain, progress=False)

    result = evaluated("all", bad + good if first else good + bad)
    reasons = {item["name"]: item["reason"] for item in result["skipped"]}
    assert reasons.keys() == BAD_ROWS.keys()
    for name, (_, _, reason) in BAD_ROWS.items():
        assert re.search(reason, reasons[name]), (name, reasons[name])
    assert result["images"] == 3 and result["pooled"] == evaluated("good", good)["pooled"]
    assert os.listdir(tmp_path) and not list(tmp_path.rglob("*.tmp"))
