"""
Transformers' own tests of models and image processors, run on the classes of this repository.

They are part of Transformers' source distribution, not of the installed package. `tools/transformers_tests.sh`
downloads those of the installed version and prints their folder:

    export TRANSFORMERS_TESTS=$(bash tools/transformers_tests.sh)
    python -m pytest -m "slow and not exhaustive" tests/test_common.py

Without them, or without the package `parameterized`, this file is skipped. `-m slow` adds tests that repeat others.
"""

import copy
import os
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from tiny_models import PAIRS, tiny_batch, tiny_config
from torch import nn

from mfuser import MFuserForSemanticSegmentation, MFuserImageProcessor, MFuserModel
from mfuser.configuration_eva02_clip import Eva02ClipConfig, Eva02ClipTextConfig, Eva02ClipVisionConfig
from mfuser.modeling_eva02_clip import Eva02ClipModel, Eva02ClipTextModel, Eva02ClipVisionModel

pytestmark = pytest.mark.slow


def folder_of_tests() -> Path | None:
    """The folder that `TRANSFORMERS_TESTS` names, or `tests` next to the package in a source checkout."""
    source = Path(transformers.__file__).parents[2]
    folder = Path(os.environ.get("TRANSFORMERS_TESTS") or source / "tests")
    return folder.resolve() if (folder / "test_modeling_common.py").is_file() else None


FOLDER = folder_of_tests()
if FOLDER is None:
    pytest.skip("Transformers' tests are not here; see the head of this file", allow_module_level=True)
pytest.importorskip("parameterized")


def import_tests(folder: Path):
    """Imports the tests as a package. What they import from folders that the distribution lacks is empty."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(folder)]
    sys.modules["transformers_tests"] = package
    for name, content in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        sys.modules[f"transformers_tests.{name.split('.')[0]}"] = types.ModuleType(name)
        module = types.ModuleType(name)
        setattr(module, content, type(content, (), {}))
        sys.modules[f"transformers_tests.{name}"] = module
    downloads = types.ModuleType("fetch_hub_objects_for_ci")
    downloads.url_to_local_path = lambda url: url
    sys.modules.setdefault("fetch_hub_objects_for_ci", downloads)
    from transformers_tests import test_image_processing_common, test_modeling_common

    return test_modeling_common.ModelTesterMixin, test_image_processing_common


ModelTesterMixin, image_processing_common = import_tests(FOLDER)


# Run for every combination of padding, attention mask and kernels, which images do not have: one per dtype is left.
SDPA, ONE_OF_EACH_DTYPE = "test_eager_matches_sdpa_inference", ("fp32_pad_left", "fp16_pad_left", "bf16_pad_left")
# Prints every weight of 28 models, to test the former name of an argument.
SLOWEST = "test_bc_torch_dtype"
for name, test in vars(ModelTesterMixin).items():
    if name == SLOWEST or (name.startswith(SDPA) and not name.endswith(ONE_OF_EACH_DTYPE)):
        pytest.mark.exhaustive(test)

# Tests that do not apply, and why.
MODEL_EXCEPTIONS = {
    "test_num_layers_is_small": "four levels of the pyramid need encoders of at least four layers",
    "test_model_weights_reload_no_missing_tied_weights": "the test expects a warning; a folder without the "
    "weights of the encoders is an error, unless it names them",
}
BOTH_ENCODERS = "hidden states, attentions and their implementations are those of two encoders, tested above"
EVA02_CLIP_EXCEPTIONS = dict.fromkeys(
    (
        "test_attention_outputs",
        "test_eager_matches_sdpa_inference",
        "test_hidden_states_output",
        "test_retain_grad_hidden_states_attentions",
    ),
    BOTH_ENCODERS,
)
IMAGE_PROCESSOR_EXCEPTIONS = {
    "test_call_numpy_4_channels": "the encoders take images of three channels",
    "test_image_processor_save_load_with_autoimageprocessor": "remote code needs trust_remote_code=True",
    "test_new_models_require_torchvision_backend": "images are resized by Pillow, in training as in evaluation",
}


class WithExceptions:
    exceptions: dict[str, str] = {}

    def setUp(self):
        super().setUp()
        for name, reason in self.exceptions.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)


class MFuserTester:
    batch_size, num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 2, 32
    num_hidden_states_types = 2  # those of both encoders
    is_training = True

    def __init__(self, pair: str):
        self.pair = pair
        self.seq_length = 16 if "siglip" in pair else 17

    def prepare_config_and_inputs_for_common(self):
        text = PAIRS[self.pair]["text_config"] | {"hidden_size": 8}  # few weights for the vocabulary of CLIP
        config = tiny_config(self.pair, text_config=text, freeze_encoders=False)  # for hidden states with gradients
        return config, {"pixel_values": tiny_batch(batch=self.batch_size)["pixel_values"]}


class MFuserCommonTests(WithExceptions, ModelTesterMixin):
    pair: str
    all_model_classes = (MFuserModel, MFuserForSemanticSegmentation)
    exceptions = MODEL_EXCEPTIONS
    test_resize_embeddings = False
    _is_composite = True

    def setUp(self):
        super().setUp()
        self.model_tester = MFuserTester(self.pair)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels and model_class is MFuserForSemanticSegmentation:
            inputs["labels"] = tiny_batch(batch=self.model_tester.batch_size)["labels"]
        return inputs

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        self.all_model_classes = (MFuserForSemanticSegmentation,)  # which has a loss
        super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_training(self):
        self.all_model_classes = (MFuserForSemanticSegmentation,)
        super().test_training()

    def test_model_outputs_equivalence(self):
        forward = MFuserForSemanticSegmentation.forward

        def forward_with_the_same_loss_points(model, *args, **kwargs):
            torch.manual_seed(0)
            return forward(model, *args, **kwargs)

        with mock.patch.object(MFuserForSemanticSegmentation, "forward", forward_with_the_same_loss_points):
            super().test_model_outputs_equivalence()

    def test_model_get_set_embeddings(self):  # the inputs are images
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model, embedding = model_class(config), nn.Conv2d(3, 8, 16, 16)
            model.set_input_embeddings(embedding)
            assert model.get_input_embeddings() is embedding


class TestClipVariant(MFuserCommonTests, unittest.TestCase):
    pair = "dinov2+clip"


class TestEva02ClipVariant(MFuserCommonTests, unittest.TestCase):
    pair = "dinov2_with_registers+eva02_clip"


class TestSiglipVariant(MFuserCommonTests, unittest.TestCase):
    pair = "dinov2+siglip"


class Eva02ClipTester:
    batch_size, num_hidden_layers, num_attention_heads = 2, 2, 2
    is_training = False  # of the encoders alone, which have no loss
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24}
    vision = Eva02ClipVisionConfig(**tower, hidden_size=32, image_size=32, patch_size=8)
    text = Eva02ClipTextConfig(**tower, hidden_size=16, intermediate_size=24)

    def __init__(self, kind: str):
        self.kind = kind
        self.seq_length, self.hidden_size = (9, 16) if kind == "text" else (17, 32)

    def prepare_config_and_inputs_for_common(self):
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(1, 49406, (2, 9))}
        inputs["input_ids"][:, -1] = 49407
        if self.kind == "vision":
            return copy.deepcopy(self.vision), {"pixel_values": inputs["pixel_values"]}
        if self.kind == "text":
            return copy.deepcopy(self.text), {"input_ids": inputs["input_ids"]}
        config = Eva02ClipConfig(
            projection_dim=24, vision_config=self.vision.to_dict(), text_config=self.text.to_dict()
        )
        return config, inputs


class Eva02ClipCommonTests(WithExceptions, ModelTesterMixin):
    kind: str
    test_resize_embeddings = False

    def setUp(self):
        super().setUp()
        self.model_tester = Eva02ClipTester(self.kind)


class TestEva02ClipVisionModel(Eva02ClipCommonTests, unittest.TestCase):
    kind = "vision"
    all_model_classes = (Eva02ClipVisionModel,)
    test_model_get_set_embeddings = MFuserCommonTests.test_model_get_set_embeddings


class TestEva02ClipTextModel(Eva02ClipCommonTests, unittest.TestCase):
    kind = "text"
    all_model_classes = (Eva02ClipTextModel,)


class TestEva02ClipModel(Eva02ClipCommonTests, unittest.TestCase):
    kind = "both"
    all_model_classes = (Eva02ClipModel,)
    exceptions = EVA02_CLIP_EXCEPTIONS
    _is_composite = True


class MFuserImageProcessorTester(image_processing_common.ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        super().__init__(parent, do_resize=True, size={"height": 20, "width": 30}, num_labels=4, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": MFuserImageProcessor}


class TestImageProcessor(
    WithExceptions,
    image_processing_common.ImageProcessingTestMixin,
    image_processing_common.PostProcessSemanticSegmentationTestMixin,
    unittest.TestCase,
):
    image_processor_tester_class = MFuserImageProcessorTester
    exceptions = IMAGE_PROCESSOR_EXCEPTIONS
