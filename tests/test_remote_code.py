"""A saved folder works with its own code where MFuser is not installed, and gives bit-identical scores."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CLASSES, tiny_model

from mfuser import MFuserForSemanticSegmentation, MFuserImageProcessor

# Run by a fresh interpreter, which can import neither the package nor anything that is not a dependency of the model.
FRESH_PROCESS = """
import sys
from importlib.machinery import PathFinder

BLOCKED = {"mfuser", "einops", "scipy", "datasets", "evaluate", "mamba_ssm", "causal_conv1d", "torchvision", "timm"}
BLOCKED.add("sklearn")  # Transformers imports it where it is installed, and it needs scipy

class WithoutPackages:
    finders = list(sys.meta_path)
    find_distributions = staticmethod(PathFinder.find_distributions)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in BLOCKED:
            return next((spec for finder in self.finders if (spec := finder.find_spec(name, path, target))), None)

sys.meta_path[:] = [WithoutPackages()]

import json
import numpy, torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor


def load(folder, output):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    image = Image.open(f"{folder}/image.png")
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        score_map = base(inputs["pixel_values"][..., :64, :64]).score_map
        outputs = model(inputs["pixel_values"][..., :64, :64], labels=torch.zeros(1, 64, 64, dtype=torch.long))
    ignored = ["loss", *model.config.keys_to_ignore_at_inference]
    segments = pipeline("image-segmentation", model=folder, trust_remote_code=True, device="cpu")(image)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    again = AutoModelForSemanticSegmentation.from_pretrained(output, trust_remote_code=True).eval()
    with torch.no_grad():
        logits_again = again(**inputs).logits
    return {
        "pixel_values": inputs["pixel_values"],
        "logits": logits,
        "logits_again": logits_again,
        "score_map": score_map,
        "modules": [type(part).__module__.split(".")[0] for part in (config, model, base, processor, again)],
        "segments": {segment["label"]: torch.from_numpy(numpy.array(segment["mask"])) for segment in segments},
        "gathered": [name for name in outputs if name not in ignored],
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "imported": [name for name in BLOCKED if name in sys.modules],
    }

folder = sys.argv[1]
output = f"{folder}.again"
found = load(folder, output)
torch.save(found, f"{output}/found.pt")
"""
PAIRS = ["dinov2+clip", "dinov3+siglip2", "dinov2+eva02_clip", "dinov2+siglip"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=PAIRS)
def fresh_process(request, tmp_path_factory):
    """
    A saved model that a fresh offline interpreter with empty caches loads and saves again.

    (model, folder it was saved to, folder the fresh process saved it to, what the fresh process found)
    """
    workspace = tmp_path_factory.mktemp("fresh_process")
    folder, output, elsewhere = (workspace / name for name in ("my.model-0", "my.model-0.again", "elsewhere"))
    tiny_model(request.param).save_pretrained(folder)
    MFuserImageProcessor().save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (72, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HOME": str(workspace / "hub"), "HF_HUB_OFFLINE": "1"}
    elsewhere.mkdir()
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder)]
    result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # loaded from the file as well, because rounding depends on the memory alignment of the weights
    model = MFuserForSemanticSegmentation.from_pretrained(folder)
    return model, folder, output, torch.load(output / "found.pt")


def test_auto_classes_give_bit_identical_scores(fresh_process):
    model, folder, _, found = fresh_process
    pixel_values = MFuserImageProcessor()(Image.open(folder / "image.png"), return_tensors="pt")["pixel_values"]
    assert torch.equal(found["pixel_values"], pixel_values)
    with torch.no_grad():
        assert torch.equal(found["logits"], model(pixel_values).logits)
        assert torch.equal(found["score_map"], model.mfuser(pixel_values[..., :64, :64]).score_map)


def test_the_code_is_the_folders_own(fresh_process):
    _, _, _, found = fresh_process
    assert found["modules"] == ["transformers_modules"] * 5
    assert found["imported"] == []


def test_the_pipeline_returns_the_classes_masks(fresh_process):
    _, _, _, found = fresh_process
    prediction = found["logits"].argmax(1)[0]
    expected = {CLASSES[index]: (prediction == index) for index in prediction.unique().tolist()}
    assert found["segments"].keys() == expected.keys()
    for name, mask in found["segments"].items():
        assert torch.equal(mask > 0, expected[name]), name


def test_trainers_gather_logits_alone_and_encoders_stay_frozen(fresh_process):
    model, _, _, found = fresh_process
    assert found["gathered"] == ["logits"]
    assert found["trainable"] == [name for name, p in model.named_parameters() if p.requires_grad]


def test_saving_what_was_loaded_copies_the_code(fresh_process):
    _, folder, output, found = fresh_process
    code = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert {"configuration_mfuser.py", "modeling_mfuser.py", "image_processing_mfuser.py"} <= code.keys()
    assert {path.name: path.read_text() for path in output.glob("*.py")} == code
    assert (output / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    maps = [json.loads((place / "config.json").read_text())["auto_map"] for place in (folder, output)]
    assert maps[0] == maps[1]
    assert torch.equal(found["logits_again"], found["logits"])


def test_what_a_fresh_process_saved_loads_with_the_class_itself(fresh_process):
    _, _, output, found = fresh_process
    loaded = MFuserForSemanticSegmentation.from_pretrained(output)
    with torch.no_grad():
        assert torch.equal(loaded(found["pixel_values"]).logits, found["logits"])
