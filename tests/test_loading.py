"""Saved models are loaded from complete folders, or together with the encoders that they were saved without."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, FUSION, save_tiny_encoders

from mfuser import MFuserForSemanticSegmentation
from mfuser.loading import load_model, saved_encoders
from mfuser.training.trainer import MFuserTrainer, MFuserTrainingArguments


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and folders of it: `whole`, and `part`, saved without its encoders."""
    folder = tmp_path_factory.mktemp("saved")
    encoders = save_tiny_encoders(folder)
    model = MFuserForSemanticSegmentation.from_vfm_vlm_pretrained(
        **encoders, class_names=list(CLASSES), crop_size=64, **FUSION
    )
    model.save_pretrained(folder / "whole")
    arguments = MFuserTrainingArguments(str(folder / "part"), save_trainable_only=True, use_cpu=True, report_to="none")
    MFuserTrainer(model, arguments).save_model()
    return model.eval(), folder


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert [name for name in first if first[name].dtype != second[name].dtype] == []


@pytest.mark.parametrize("kind", ["whole", "part"])
def test_every_weight_is_loaded_and_encoders_stay_frozen(saved, kind):
    model, folder = saved
    loaded = load_model(folder / kind)
    assert_same_weights(loaded, model)
    assert not loaded.training
    assert {name for name, weight in loaded.named_parameters() if weight.requires_grad} == {
        name for name, weight in model.named_parameters() if weight.requires_grad
    }


def test_a_model_saved_without_encoders_is_smaller_and_names_them(saved):
    _, folder = saved
    assert saved_encoders(folder / "part") == {"vfm": str(folder / "vfm"), "vlm": str(folder / "vlm")}
    assert saved_encoders(folder / "whole") is None
    sizes = [(folder / kind / "model.safetensors").stat().st_size for kind in ("part", "whole")]
    assert sizes[0] < sizes[1]


@pytest.mark.slow
def test_both_kinds_are_loaded_in_the_same_precision(saved):
    _, folder = saved
    part = load_model(folder / "part", "bfloat16")
    assert part.dtype == torch.bfloat16
    assert_same_weights(part, load_model(folder / "whole", "bfloat16"))
    load_model(folder / "whole", "bfloat16").save_pretrained(folder / "half")
    assert load_model(folder / "half").dtype == torch.bfloat16
    assert load_model(folder / "half", torch.float32).dtype == torch.float32


@pytest.mark.parametrize("kind", ["whole", "part"])
def test_fields_of_the_configuration_can_be_changed(saved, kind):
    _, folder = saved
    assert load_model(folder / kind, crop_stride=21).config.crop_stride == 21


@pytest.mark.parametrize("kind", ["whole", "part"])
def test_missing_weights_are_named(saved, tmp_path, kind):
    _, folder = saved
    shutil.copytree(folder / kind, tmp_path / kind)
    weights = load_file(tmp_path / kind / "model.safetensors")
    weights.pop("mfuser.prompts")
    save_file(weights, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="mfuser.prompts"):
        load_model(tmp_path / kind)
