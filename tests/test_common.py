"""
Transformers' own tests of models and image processors, run on the classes of this repository.

They are part of Transformers' source distribution, not of the installed package:

    pip download --no-deps --no-binary transformers "transformers==$(python -c 'import transformers as t; print(t.__version__)')"
    tar xf transformers-*.tar.gz
    TRANSFORMERS_TESTS=$(echo transformers-*/tests) python -m pytest -m slow tests/test_common.py

They need the packages `parameterized` and must be those of the installed version. Without them, this file is skipped.
"""

import os
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from tiny_models import CLASSES, tiny_batch, tiny_config, tiny_tokenizer
from torch import nn

from mfuser import MFuserForSemanticSegmentation, MFuserImageProcessor, MFuserModel
from mfuser.configuration_eva02_clip import Eva02ClipConfig
from mfuser.modeling_eva02_clip import Eva02ClipModel, Eva02ClipTextModel, Eva02ClipVisionModel

pytestmark = pytest.mark.slow


def folder_of_tests() -> Path | None:
    """The folder that `TRANSFORMERS_TESTS` names, or `tests` beside the package in a source checkout."""
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

    return test_modeling_common.ModelTesterMixin, test_image_processing_common.ImageProcessingTestMixin


ModelTesterMixin, ImageProcessingTestMixin = import_tests(FOLDER)


# Tests that cannot pass, and why.
NEEDS_FOUR_LAYERS = "four levels of the feature pyramid need encoders of at least four layers"
NEEDS_VOCABULARY = "CLIP's token ids need its vocabulary of 49408 words"


class MFuserTester:
    batch_size, num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 2, 32
    num_hidden_states_types = 2  # those of both encoders
    is_training = True

    def __init__(self, pair: str):
        self.pair = pair
        self.seq_length = 16 if "siglip" in pair else 17

    def prepare_config_and_inputs_for_common(self):
        config = tiny_config(self.pair, freeze_encoders=False)  # for hidden states with gradients
        return config, {"pixel_values": tiny_batch(batch=self.batch_size)["pixel_values"]}


class MFuserCommonTests(ModelTesterMixin):
    pair: str
    all_model_classes = (MFuserModel, MFuserForSemanticSegmentation)
    test_resize_embeddings = False
    _is_composite = True

    def setUp(self):
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

    @unittest.skip(NEEDS_FOUR_LAYERS)
    def test_num_layers_is_small(self):
        pass


class TestClipVariant(MFuserCommonTests, unittest.TestCase):
    pair = "dinov2+clip"

    @unittest.skip(NEEDS_VOCABULARY)
    def test_model_is_small(self):
        pass


class TestEva02ClipVariant(MFuserCommonTests, unittest.TestCase):
    pair = "dinov2_with_registers+eva02_clip"

    @unittest.skip(NEEDS_VOCABULARY)
    def test_model_is_small(self):
        pass


class TestSiglipVariant(MFuserCommonTests, unittest.TestCase):
    pair = "dinov2+siglip"
