"""Errors of commands: one line that names what is wrong and exit code 2; bugs keep their traceback."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import fault_injection
import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_convert import golden
from tiny_models import DINOV2, save_tiny_encoders, tiny_model
from tiny_recipe import write_data, write_recipe
from transformers import Dinov2Config, Dinov2Model

from mfuser import MFuserForSemanticSegmentation
from mfuser.class_names_mfuser import pretrained_tokenizer
from mfuser.pretrained_mfuser import VFM_CLASSES, load_encoder
from mfuser.scripts import cli
from mfuser.scripts.convert_checkpoint import save_converted

# --- error reporting shared by all commands --------------------------------------------------------------------------

EXPECTED = [
    (ValueError("lr is -1;\n  it must be positive"), "mfuser test: lr is -1; it must be positive"),
    (OSError(28, "No space left on device", "weights"), "mfuser test: [Errno 28] No space left on device: 'weights'"),
    (SafetensorError("header too large"), "mfuser test: header too large"),
    (yaml.YAMLError("found a tab"), "mfuser test: found a tab"),
    (StrictDataclassFieldValidationError("depth", TypeError("not an int")), "mfuser test: Validation error for"),
    (torch.OutOfMemoryError("CUDA out of memory"), "mfuser test: CUDA out of memory"),
    (MemoryError(), "mfuser test: out of memory"),
    (ImportError("pip install datasets"), "mfuser test: pip install datasets"),
    (cli.CommandError("another run is writing"), "mfuser test: another run is writing"),
    (ValueError(), "mfuser test: ValueError"),
]


def command_that_raises(error: BaseException):
    @cli.reports_errors("test")
    def main(arguments):
        assert "--debug" not in arguments
        raise error

    return main


@pytest.mark.parametrize(("error", "line"), EXPECTED, ids=lambda value: type(value).__name__)
def test_an_error_that_input_can_cause_is_one_line_and_exit_code_2(error, line, capsys):
    assert command_that_raises(error)([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(line) and len(printed.err.splitlines()) == 1


def test_debug_shows_the_traceback_above_the_same_line(capsys):
    assert command_that_raises(ValueError("wrong"))(["a", "--debug", "b"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and printed.endswith("\nmfuser test: wrong\n")


@pytest.mark.parametrize("bug", [RuntimeError("bug"), TypeError("bug"), KeyError("bug"), AssertionError("bug")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        command_that_raises(bug)([])


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
    assert command_that_raises(KeyboardInterrupt())([]) == 130
    assert capsys.readouterr().err == "mfuser test: interrupted\n"


def test_debug_may_precede_the_command(capsys, tmp_path):
    arguments = ["convert", str(tmp_path / "missing.pth"), "--output", str(tmp_path / "out")]
    for place in (["--debug", *arguments], [*arguments, "--debug"]):
        with pytest.raises(SystemExit) as exit_code:
            cli.main(place)
        assert exit_code.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("mfuser convert: error: ")
    assert cli.main(["--debug"]) == 0 and "shows the traceback" in capsys.readouterr().out


# --- guarantee: damaged models -----------------------------------------------------------------------------------


def write(name: str, content: bytes | str):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def change_config(**fields):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return damage


def change_encoder(**fields):
    def damage(folder: Path) -> None:
        encoder = json.loads((folder / "config.json").read_text())["vfm_config"]
        change_config(vfm_config=encoder | fields)(folder)

    return damage


def change_processor(**settings):
    def damage(folder: Path) -> None:
        saved = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(saved | settings))

    return damage


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def set_weight(value: float):
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["mfuser.prompts"].view(-1)[3] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


# Damage, and the expected message on stderr. The exit code is 2, and nothing is written.
DAMAGED_MODELS = {
    "truncated weights": (truncate, "model.safetensors is damaged or not a safetensors file"),
    "garbage as weights": (write("model.safetensors", bytes(range(256)) * 40), "model.safetensors is damaged"),
    "text as weights": (write("model.safetensors", "no weights\n" * 9), "model.safetensors is damaged"),
    "no weights": (write("model.safetensors", b""), "model.safetensors is damaged"),
    "NaN as a weight": (set_weight(float("nan")), "1 tensors hold NaN or infinite values: mfuser.prompts"),
    "infinity as a weight": (set_weight(float("-inf")), "1 tensors hold NaN or infinite values: mfuser.prompts"),
    "text as configuration": (write("config.json", "crop_size: 64\n"), "config.json is not a JSON file"),
    "a list as configuration": (write("config.json", "[1]"), "config.json holds a list; it must hold a JSON object"),
    "a configuration of bytes": (write("config.json", b"\xff\xfe\x00"), "config.json is not a JSON file"),
    "nested too deeply": (write("config.json", "[" * 100_000), "config.json is not a usable JSON file"),
    "a field of another type": (change_config(crop_size="big"), "its configuration is invalid: .*'crop_size'"),
    "a misspelt field": (change_config(decoder_num_head=4), "did you mean 'decoder_num_heads'"),
    "a list of class names": (change_config(id2label=["road"]), "id2label is .*; it must be a dictionary from ids"),
    "ids that are not numbers": (change_config(id2label={"a": "road"}), "must be a dictionary from ids to names"),
    "names without ids": (change_config(label2id=4), "label2id is 4; it must be a dictionary from names to ids"),
    "another data type": (change_config(dtype="float7"), "dtype is 'float7'; it must be a data type such"),
    "an encoder's data type": (change_encoder(dtype="x"), "vfm_config .dinov2.: dtype is 'x'; it must be a data type"),
    "text in place of no": (change_config(return_dict="no"), "return_dict is 'no'; it must be true or false"),
    "text in place of yes": (change_config(output_hidden_states="yes"), "output_hidden_states is 'yes'; it must be"),
    "text as quantisation": (change_config(quantization_config="int8"), "quantization_config is 'int8'; it must be a"),
    "another width": (change_config(enhancer_hidden_size=16), "weights do not fit its config.json, such as .* of sh"),
    "another model": (change_config(model_type="bert"), "holds a model of type 'bert', not 'mfuser'"),
    "text as image processor": (write("preprocessor_config.json", "{"), "preprocessor_config.json is not a JSON file"),
    "a misspelt setting": (write("preprocessor_config.json", '{"do_rezise": true}'), "did you mean `do_resize`"),
    "a mean of one channel": (change_processor(image_mean=[0.5]), "must hold one number for each of three channels"),
    "a mean that is not a number": (change_processor(image_mean=[0.5, 0.5, float("nan")]), "it must be finite"),
    "a deviation of 0": (change_processor(image_std=[0.0, 1.0, 1.0]), "must be finite and positive"),
    "a factor that is not a number": (change_processor(rescale_factor=float("nan")), "must be finite and positive"),
    "another filter": (change_processor(resample=99), "`resample` is 99; it must be one of 0 .nearest., 4 .box."),
    "no image processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "Can't load image proc"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGED_MODELS.values(), ids=DAMAGED_MODELS)
def test_a_damaged_model_is_one_line_and_nothing_is_written(damage, message, saved_model, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(saved_model, model, copy_function=os.link)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (model / name).unlink()
        shutil.copy(saved_model / name, model / name)
    damage(model)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for arguments in (
        ["segment", tmp_path / "a.png", "--model", model, "--output", tmp_path / "out"],
        ["evaluate", "--model", model, "--domains", f"mine={tmp_path}", "--output", tmp_path / "out/report.json"],
    ):
        assert cli.main([str(argument) for argument in arguments]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"mfuser {arguments[0]}: ") and re.search(message, line), line
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_nonfinite_weights_are_refused_by_from_pretrained(saved_model, tmp_path):
    shutil.copytree(saved_model, tmp_path / "model")
    set_weight(float("nan"))(tmp_path / "model")
    for name_or_path in (tmp_path / "model", str(tmp_path / "model")):
        with pytest.raises(ValueError, match="NaN or infinite values: mfuser.prompts; the file"):
            MFuserForSemanticSegmentation.from_pretrained(name_or_path)
    encoder = Dinov2Model(Dinov2Config(**{name: value for name, value in DINOV2.items() if name != "model_type"}))
    with torch.no_grad():
        encoder.layernorm.bias[0] = float("inf")
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="encoder: 1 tensors hold NaN or infinite values: layernorm.bias"):
        load_encoder(str(tmp_path / "encoder"), VFM_CLASSES, "vision foundation model")


# --- guarantee: datasets that cannot be read -------------------------------------------------------------------------

# The file of a dataset, its content, and the expected message on stderr after the name of the dataset or the file.
DAMAGED_DATA = {
    "a truncated parquet file": (
        "train.parquet",
        lambda content: content[: len(content) // 2],
        "data cannot be read as",
    ),
    "an empty parquet file": ("train.parquet", lambda content: b"", "data cannot be read as a dataset"),
    "text as a parquet file": (
        "train.parquet",
        lambda content: b"image,label\n" * 9,
        "data cannot be read as a dataset",
    ),
    "half of the class names": ("id2label.json", lambda content: content[:9], "id2label.json is not a JSON file"),
    "a list of class names": (
        "id2label.json",
        lambda content: b'["road"]',
        "id2label.json holds a list; it must hold",
    ),
}


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGED_DATA.values(), ids=DAMAGED_DATA)
def test_a_dataset_that_cannot_be_read_is_one_line_that_names_it(
    file, damage, message, tmp_path, capsys, datasets_cache
):
    data = tmp_path / "data"
    data.mkdir()
    write_data(data)
    (data / file).write_bytes(damage((data / file).read_bytes()))
    assert cli.main(["train", str(write_recipe(tmp_path, data))]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"mfuser train: {data}") and re.search(message, line), line
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("[!.]*"))


def test_a_folder_that_is_no_dataset_is_one_line_that_says_what_is(tmp_path, capsys, datasets_cache):
    (tmp_path / "encoders").mkdir()
    save_tiny_encoders(tmp_path / "encoders")
    recipe = write_recipe(tmp_path, tmp_path / "encoders")
    assert cli.main(["train", str(recipe)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "must be a folder written by `mfuser prepare` or `save_to_disk`, parquet files" in line, line


# --- guarantee: code that comes with a tokenizer is never run --------------------------------------------------------


def test_code_that_comes_with_a_tokenizer_is_not_run(saved_model, tmp_path):
    folder, mark = tmp_path / "tokenizer", tmp_path / "was_run"
    folder.mkdir()
    (folder / "tokens.py").write_text(f"open({str(mark)!r}, 'w')\nclass Tokens: pass\n")
    auto_map = {"AutoTokenizer": ["tokens.Tokens", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "Tokens"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        pretrained_tokenizer(folder)
    with pytest.raises(ValueError, match="cannot be loaded as a tokenizer"):
        MFuserForSemanticSegmentation.from_pretrained(saved_model, class_names=["road"], tokenizer=str(folder))
    assert not mark.exists()


# --- guarantee: damaged checkpoints ----------------------------------------------------------------------------------


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def saved_with(**changes):
    """A checkpoint whose first tensors are replaced or added to; a function of the tensors gives each value."""

    def save(tensors: dict, file: Path) -> None:
        torch.save({"state_dict": tensors | {name: make(tensors) for name, make in changes.items()}}, file)

    return save


def damaged_file(damage):
    def save(tensors: dict, file: Path) -> None:
        torch.save({"state_dict": tensors}, file)
        damage(file)

    return save


NOT_CHECKPOINTS = {
    "a flipped byte": (damaged_file(flip_a_byte), "is corrupt: the checksum of .* is wrong"),
    "a truncated file": (damaged_file(lambda file: os.truncate(file, 9999)), "is corrupt or not a checkpoint"),
    "a text file": (lambda _, file: file.write_text("epoch 1\n" * 50), "is corrupt or not a checkpoint"),
    "another zip": (lambda _, file: zipfile.ZipFile(file, "w").writestr("a/b", "c"), "corrupt or not a checkpoint"),
    "twice, with and without a prefix": (
        saved_with(**{"module.gamma": lambda tensors: tensors["gamma"] + 1}),
        "gamma is in the checkpoint twice, with and without a prefix",
    ),
    "complex": (saved_with(gamma=lambda tensors: tensors["gamma"] * 1j), "gamma has dtype complex64; weights must be"),
    "booleans": (saved_with(gamma=lambda tensors: tensors["gamma"] > 0), "gamma has dtype bool; weights must be"),
    "integers": (saved_with(gamma=lambda tensors: tensors["gamma"].long()), "gamma has dtype int64; weights must be"),
    "sparse": (saved_with(gamma=lambda tensors: tensors["gamma"].to_sparse()), "gamma is sparse or quantised"),
    "NaN": (saved_with(gamma=lambda tensors: tensors["gamma"] * float("nan")), "gamma holds NaN or infinite values"),
    "infinity": (saved_with(gamma=lambda tensors: tensors["gamma"] + float("inf")), "gamma holds NaN or infinite"),
    "numbers as names": (lambda tensors, file: torch.save(dict(enumerate(tensors.values())), file), "no state_dict"),
}  # fmt: skip


@pytest.fixture(scope="module")
def published():
    return golden("clip")


@pytest.mark.parametrize(("save", "message"), NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS)
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_written(save, message, published, tmp_path, capsys):
    tensors, fields = published
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    save(dict(tensors), tmp_path / "a.pth")
    arguments = [tmp_path / "a.pth", "--config", tmp_path / "fields.json", "--output", tmp_path / "out"]
    assert cli.main(["convert", *map(str, arguments)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith((f"mfuser convert: {tmp_path / 'a.pth'}", "mfuser convert: gamma is in"))
    assert re.search(message, line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "fields.json"]


def test_tensors_that_are_there_twice_with_equal_values_are_converted(published, tmp_path):
    tensors, fields = published
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    saved_with(**{"module.gamma": lambda tensors: tensors["gamma"]})(tensors, tmp_path / "a.pth")
    arguments = [tmp_path / "a.pth", "--config", tmp_path / "fields.json", "--output", tmp_path / "out"]
    assert cli.main(["convert", *map(str, arguments)]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"SHA-256 `{hashlib.sha256((tmp_path / 'a.pth').read_bytes()).hexdigest()}`" in card


@pytest.mark.parametrize("content", ["README.md", "config.json", "notes/today.txt"])
def test_convert_never_writes_into_a_folder_that_holds_anything(content, tmp_path, capsys):
    kept = tmp_path / "out" / content
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    (tmp_path / "a.pth").write_bytes(b"is not even read")
    assert cli.main(["convert", str(tmp_path / "a.pth"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"mfuser convert: {tmp_path / 'out'} is not empty; choose a new folder, so that nothing is overwritten\n"
    )
    assert kept.read_text() == "mine" and len(list((tmp_path / "out").rglob("*.*"))) == 1
    assert cli.main(["convert", str(tmp_path / "a.pth"), "--output", str(tmp_path / "a.pth")]) == 2
    assert "is a file; choose a new folder" in capsys.readouterr().err


# --- killed, or the disk full, at any file operation -----------------------------------------------------------------


@pytest.mark.parametrize("fault", [fault_injection.kill, fault_injection.fill_disk])
@pytest.mark.slow
def test_a_conversion_that_ends_at_any_file_operation_leaves_nothing_or_a_complete_model(fault, tmp_path):
    model, work = tiny_model(), tmp_path / "work"
    (tmp_path / "authors.pth").write_bytes(b"weights")
    work.mkdir()
    output = work / "out"

    def convert() -> int:
        try:
            save_converted(model, output, tmp_path / "authors.pth")
        except OSError as error:
            return 2 if re.search(f"No space left on device.*{work}", str(error)) else 3
        return 0

    def assert_whole() -> None:
        reloaded = MFuserForSemanticSegmentation.from_pretrained(output).state_dict()
        assert all(torch.equal(reloaded[name], weight) for name, weight in model.state_dict().items())
        assert {"README.md", "config.json", "preprocessor_config.json", "modeling_mfuser.py"} <= set(
            os.listdir(output)
        )

    _, operations = fault_injection.run(convert, work)
    shutil.rmtree(output)
    assert operations > 30
    wholes = 0
    for at in range(operations):
        code, _ = fault_injection.run(convert, work, fault, at)
        assert code in ((-signal.SIGKILL,) if fault is fault_injection.kill else (2, 0))
        assert output.exists() or code != 0
        if output.exists():
            wholes += 1
            assert_whole()
            shutil.rmtree(output)
        if fault is fault_injection.fill_disk:
            assert os.listdir(work) == []
    assert wholes < 10  # operations that precede or follow the writing
    assert convert() == 0  # leftovers of a killed run do not prevent another run
    assert_whole()


@pytest.mark.parametrize("size", [500, 20_000, 2_000_000])
def test_a_disk_that_fills_within_a_file_leaves_nothing_of_a_conversion(size, tmp_path):
    model, work = tiny_model(), tmp_path / "work"
    (tmp_path / "authors.pth").write_bytes(b"weights")
    work.mkdir()

    def convert() -> int:
        with pytest.raises(OSError, match=f"{work}.*File too large|File too large.*{work}"):
            save_converted(model, work / "out", tmp_path / "authors.pth")
        return 2

    assert fault_injection.run(convert, work, file_size=size)[0] == 2
    assert os.listdir(work) == []


def test_a_name_that_the_output_cannot_encode_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["mfuser", "--help"])
    assert cli.main() == 0
    print("\xe9tude", file=stream, flush=True)
    assert stream.buffer.getvalue().endswith(b"\\xe9tude\n")
