"""Every example of docs/works_with.md runs unchanged."""

import os
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import use_fake_hub
from PIL import Image
from safetensors.torch import load_file
from tiny_models import CLIP, DINOV2, save_tiny_encoders, tiny_model

from mfuser import MFuserForSemanticSegmentation, MFuserImageProcessor
from mfuser.frozen_encoders_mfuser import recorded_encoders

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "works_with.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", GUIDE, re.DOTALL))
pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function that runs examples one after the other, with datasets of two crops, and returns its names."""
    for name in ("checkpoints", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.manual_seed(0)

    def run(*examples, **names):
        generator = torch.Generator().manual_seed(0)
        rows = [
            {
                "pixel_values": torch.randn(3, 64, 64, generator=generator),
                "labels": torch.randint(0, 11, (64, 64), generator=generator),
            }
            for _ in range(2)
        ]
        names |= {"train_dataset": rows, "validation_dataset": rows}
        for example in ("start", *examples):
            exec(compile(EXAMPLES[example], f"docs/works_with.md: {example}", "exec"), names)
        return names

    return run


def share_of_equal_labels(names) -> float:
    with torch.no_grad():
        expected = names["model"](**names["inputs"]).logits.argmax(dim=1)
    return (names["logits"].argmax(dim=1) == expected).float().mean().item()


def has_changed(folder) -> bool:
    before = MFuserForSemanticSegmentation.from_pretrained(ROOT / "checkpoints" / "mfuser-tiny-camvid")
    after = MFuserForSemanticSegmentation.from_pretrained(folder)
    return any(not torch.equal(old, new) for old, new in zip(before.parameters(), after.parameters(), strict=True))


def test_pipeline(run):
    first, second = run("pipeline")["parts"]
    assert {part["label"] for part in first} >= {"road", "building"} and len(first) == len(second)
    assert all(part["mask"].size == (960, 720) for part in first)


def test_pipeline_of_batches(run):
    sizes = [(960, 720), (300, 200)]
    for parts, size in zip(run("pipeline", "batches")["parts"], sizes, strict=True):
        assert parts and {part["mask"].size for part in parts} == {size}


def test_trainer(run):
    names = run("trainer")
    assert 0 <= names["metrics"]["eval_mean_iou"] <= 1
    assert has_changed("runs/plain") and MFuserImageProcessor.from_pretrained("runs/plain").do_resize


def test_accelerate(run):
    assert run("accelerate")["loss"].isfinite()
    assert has_changed("runs/accelerate")


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao(run):
    names = run("torchao")
    assert share_of_equal_labels(names) > 0.99
    sizes = [Path(folder, "model.safetensors").stat().st_size for folder in ("runs/int8", names["folder"])]
    assert sizes[0] < 0.6 * sizes[1]
    with torch.no_grad():
        torch.testing.assert_close(names["loaded"](**names["inputs"]).logits, names["logits"], rtol=0, atol=1e-5)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_bitsandbytes(run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert share_of_equal_labels(run("bitsandbytes")) > 0.99


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_bitsandbytes_in_4_bits(run, tmp_path):
    wide = {"hidden_size": 128, "intermediate_size": 128, "projection_dim": 64}
    encoders = {name: CLIP[name] | wide for name in ("vlm_config", "text_config")}
    tiny_model(vfm_config=DINOV2 | {"hidden_size": 128}, crop_size=256, crop_stride=170, **encoders).save_pretrained(
        tmp_path / "wide"
    )
    names = run("bitsandbytes", "bitsandbytes_4bit", wide_folder=tmp_path / "wide")
    assert sum(type(module).__name__ == "Linear4bit" for module in names["quantized"].modules()) > 50
    with torch.no_grad():
        model = MFuserForSemanticSegmentation.from_pretrained(tmp_path / "wide")
        expected = model(**names["inputs"]).logits
    torch.testing.assert_close(names["logits"], expected, rtol=0, atol=0.1)


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
def test_peft(run):
    names = run("peft")
    assert len(load_file("runs/lora/adapter_model.safetensors")) > 0
    with torch.no_grad():
        expected = names["adapted"].eval()(**names["inputs"]).logits
        plain = MFuserForSemanticSegmentation.from_pretrained(names["folder"])(**names["inputs"]).logits
    torch.testing.assert_close(names["logits"], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_offload(run):
    names = run("offload")
    assert "disk" in names["offloaded"].hf_device_map.values()
    with torch.no_grad():
        expected = names["model"](**names["inputs"]).logits
    torch.testing.assert_close(names["logits"], expected, rtol=0, atol=1e-5)


def test_quantize(run):
    assert share_of_equal_labels(run("quantize")) > 0.99


def test_export(run, tmp_path):
    commands = re.search(r"<!-- commands: export -->\n```bash\n(.*?)```", GUIDE, re.DOTALL)[1]
    names = run()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-e", "-c", commands], check=True, env=os.environ | {"PATH": path})
    labels = torch.from_numpy(np.asarray(Image.open("labels.png")).astype(np.int64))
    assert labels.shape == (720, 960)
    with torch.no_grad():
        outputs = names["model"](**names["processor"](Image.open("examples/street.jpg"), return_tensors="pt"))
    expected = Image.fromarray(outputs.logits.argmax(dim=1)[0].numpy().astype(np.uint8))
    expected = np.asarray(expected.resize((960, 720), Image.Resampling.NEAREST))
    assert (torch.from_numpy(expected.astype(np.int64)) == labels).float().mean() > 0.99


def test_compile(run):
    names = run("compile")
    with torch.no_grad():
        expected = names["model"](names["inputs"]["pixel_values"][..., :256, :256]).logits
    torch.testing.assert_close(names["logits"], expected, rtol=1e-3, atol=1e-3)


def test_hub(run, monkeypatch):
    hub = use_fake_hub(monkeypatch)
    run("hub")
    assert {"config.json", "model.safetensors", "modeling_mfuser.py", "preprocessor_config.json"} <= hub.repositories[
        "me/mfuser-streets"
    ].keys()


def test_hub_without_encoders(run, tmp_path):
    encoders = save_tiny_encoders(tmp_path)
    names = run("trainable_only", **encoders)
    assert not any(
        name.startswith(("mfuser.vfm.", "mfuser.vlm.")) for name in load_file("runs/part/model.safetensors")
    )
    assert {key: entry["name_or_path"] for key, entry in recorded_encoders("runs/part").items()} == encoders
    for name, weight in names["loaded"].state_dict().items():
        assert torch.equal(weight, names["model"].state_dict()[name]), name


def test_every_example_has_a_test():
    calls = re.findall(r'run\(("\w+"(?:, "\w+")*)', Path(__file__).read_text())
    tested = {name.strip('"') for names in calls for name in names.split(", ")}
    assert tested | {"start"} == set(EXAMPLES)
