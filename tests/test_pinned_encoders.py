"""Encoders and tokenizers of a training run: pinned revisions are downloaded and recorded, tokenizers are saved."""

import json
import shutil

import pytest
import torch
import yaml
from tiny_models import CLASSES, FUSION, save_tiny_encoders
from tiny_recipe import write_data, write_recipe
from transformers import AutoTokenizer, Dinov2Model

from mfuser import MFuserForSemanticSegmentation
from mfuser.scripts import train

NEWEST, OLDER = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def encoders(tmp_path):
    return save_tiny_encoders(tmp_path)


@pytest.fixture
def hub(tmp_path, encoders, monkeypatch):
    """A cache of the Hub with two commits of `me/vfm`, of different weights, and one of `me/vlm`."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("vfm", "vlm"):
        repository = cache / f"models--me--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(NEWEST)
        shutil.copytree(encoders[name], repository / "snapshots" / NEWEST)
    older = Dinov2Model.from_pretrained(encoders["vfm"])
    with torch.no_grad():
        older.layernorm.bias.fill_(3)
    older.save_pretrained(cache / "models--me--vfm" / "snapshots" / OLDER)
    shutil.copy(
        cache / "models--me--vfm/snapshots" / NEWEST / "config.json", cache / "models--me--vfm/snapshots" / OLDER
    )


@pytest.mark.parametrize("key", ["vfm", "vlm"])
def test_a_revision_of_a_folder_is_refused(key, encoders):
    with pytest.raises(ValueError, match=f"{key}_revision is 'v2', but {key} is the folder .*; only Hub ids have"):
        MFuserForSemanticSegmentation.from_vfm_vlm_pretrained(**encoders, **{f"{key}_revision": "v2"})


def recipe_of(tmp_path, data, **settings):
    recipe = write_recipe(tmp_path, data)
    common = yaml.safe_load(recipe.read_text()) | {"model_config": {**FUSION, "crop_size": 64, "crop_stride": 42}}
    common |= {"eval_strategy": "no", "save_strategy": "no", "max_steps": 1}
    recipe.write_text(yaml.safe_dump(common | settings))
    return recipe


def final_bias(folder):
    return MFuserForSemanticSegmentation.from_pretrained(folder).mfuser.vfm.vision.layernorm.bias.unique().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("save_trainable_only", [False, True])
def test_the_commit_of_each_encoder_can_be_given_and_is_recorded(hub, data, tmp_path, save_trainable_only):
    settings = dict(vfm="me/vfm", vlm="me/vlm", vfm_revision=OLDER, save_trainable_only=save_trainable_only)
    assert train.main([str(recipe_of(tmp_path, data, **settings))]) == 0
    run = tmp_path / "run"
    expected = {
        "vfm": {"name_or_path": "me/vfm", "revision": OLDER},
        "vlm": {"name_or_path": "me/vlm", "revision": NEWEST},
    }
    assert json.loads((run / "mfuser_run.json").read_text())["encoders"] == expected
    if save_trainable_only:
        saved = json.loads((run / "encoders.json").read_text())
        assert {key: {name: entry[name] for name in expected[key]} for key, entry in saved.items()} == expected
    assert final_bias(run) == [3]


def test_a_revision_needs_a_hub_id(encoders, data, tmp_path, capsys):
    recipe = recipe_of(tmp_path, data, **encoders, vfm_revision="main")
    assert train.main([str(recipe)]) == 2
    assert "; a revision needs a Hub id" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tokenizer_is_saved_with_the_model_so_that_it_can_be_given_other_classes(encoders, data, tmp_path):
    recipe = recipe_of(tmp_path, data, **encoders)
    assert train.main([str(recipe), "save_strategy=steps"]) == 0
    shutil.rmtree(encoders["vlm"])
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert AutoTokenizer.from_pretrained(folder)("road").input_ids
        model = MFuserForSemanticSegmentation.from_pretrained(folder)
        model.set_class_names(["tree", *CLASSES])
        assert model.config.num_labels == 5
