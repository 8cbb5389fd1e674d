"""The packages that `mfuser segment` imports, which determine its start time. No test depends on execution times."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from tiny_models import tiny_model
from torch import nn

from mfuser import MFuserImageProcessor
from mfuser.quantization import quantized_layers

# Runs the command as its process does, and prints what it has imported instead of ending the process.
RUN = """
import json, os, sys
from mfuser.scripts import cli
os._exit = lambda code: print("exit code", code)
try:
    cli.main()
finally:
    print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
UNUSED = {"torchao", "scipy", "sklearn", "pandas", "pyarrow", "datasets", "evaluate", "peft", "matplotlib", "gradio"}
UNUSED |= {"torchvision", "tensorboard", "onnx", "onnxruntime", "bitsandbytes", "IPython"}


def run(*arguments):
    code = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(code, capture_output=True, text=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    MFuserImageProcessor(do_resize=False).save_pretrained(folder)
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "image.png")
    return folder


@pytest.mark.slow
def test_segment_imports_no_package_that_it_does_not_use(saved, tmp_path):
    done = run("segment", saved / "image.png", "--model", saved, "--output", tmp_path)
    *_, code, imported = done.stdout.splitlines()
    assert code == "exit code 0", done.stderr
    assert (tmp_path / "image_labels.png").exists()
    assert not UNUSED & set(json.loads(imported))


@pytest.mark.parametrize("arguments", [["--help"], ["segment", "--help"]])
def test_help_needs_neither_torch_nor_transformers(arguments):
    done = run(*arguments)
    assert "usage: mfuser" in done.stdout + done.stderr
    assert not {"torch", "transformers", "numpy", "PIL"} & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_model_that_torchao_quantised_is_segmented_too(saved, tmp_path):
    """torchao is imported only for such a model."""
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model = type(tiny_model()).from_pretrained(saved)
    layers = set(quantized_layers(model))
    kept = [name for name, module in model.named_modules() if type(module) is nn.Linear and name not in layers]
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    quantised = type(model).from_pretrained(saved, quantization_config=config)
    quantised.save_pretrained(tmp_path / "model")
    MFuserImageProcessor.from_pretrained(saved).save_pretrained(tmp_path / "model")
    done = run("segment", saved / "image.png", "--model", tmp_path / "model", "--output", tmp_path / "out")
    assert "exit code 0" in done.stdout, done.stdout + done.stderr
