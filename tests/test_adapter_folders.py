"""A folder without the frozen encoders works like a complete one, but only with the encoders of its training."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from fake_hub import use_fake_hub
from PIL import Image
from safetensors.torch import load_file
from tiny_models import CLASSES, FUSION, save_tiny_encoders, tiny_batch
from transformers import Dinov2Model

from mfuser import MFuserForSemanticSegmentation, MFuserImageProcessor, MFuserModel
from mfuser.files import sha256
from mfuser.frozen_encoders_mfuser import ENCODERS_FILE, recorded_encoders
from mfuser.loading import saved_encoders
from mfuser.scripts import cli

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with a trained pyramid, and its folders `whole`, `part` (without encoders), `vfm` and `vlm`."""
    folder = tmp_path_factory.mktemp("saved")
    model = MFuserForSemanticSegmentation.from_vfm_vlm_pretrained(
        **save_tiny_encoders(folder), class_names=list(CLASSES), crop_size=64, **FUSION
    )
    model.train()(**tiny_batch()).loss.backward()  # moves the statistics of BatchNorm
    model.zero_grad()
    for name, fields in (("whole", {}), ("part", {"trainable_only": True})):
        model.save_pretrained(folder / name, **fields)
        MFuserImageProcessor().save_pretrained(folder / name)
    return model.eval(), folder


@pytest.fixture
def copied(saved, tmp_path):
    """Copies of all folders, which a test may change; the folder without encoders names the copies."""
    folder = tmp_path / "copied"
    shutil.copytree(saved[1], folder)
    entries = json.loads((folder / "part" / ENCODERS_FILE).read_text())
    for key in ("vfm", "vlm"):
        entries[key]["name_or_path"] = str(folder / key)
    (folder / "part" / ENCODERS_FILE).write_text(json.dumps(entries))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Returns a function that puts folders into an empty cache of the Hub, as the newest commits of repositories."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def add(folders):
        for name, folder in folders.items():
            repository = cache / f"models--{name.replace('/', '--')}"
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text(COMMIT)
            shutil.copytree(folder, repository / "snapshots" / COMMIT)

    return add


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def set_one_weight(folder):
    model = Dinov2Model.from_pretrained(folder)
    with torch.no_grad():
        model.layernorm.bias[0] += 1
    model.save_pretrained(folder)


# --- what is saved ---------------------------------------------------------------------------------------------------


def test_only_the_encoders_are_left_out(saved):
    _, folder = saved
    names = {kind: set(load_file(folder / kind / "model.safetensors")) for kind in ("whole", "part")}
    left_out = names["whole"] - names["part"]
    assert names["part"] < names["whole"]
    assert left_out == {name for name in names["whole"] if name.startswith(("mfuser.vfm.", "mfuser.vlm."))}


def test_the_encoders_are_named_with_the_hashes_of_their_files(saved):
    _, folder = saved
    assert recorded_encoders(folder / "part") == {
        key: {
            "name_or_path": str(folder / key),
            "revision": None,
            "sha256": {"model.safetensors": sha256(folder / key / "model.safetensors")},
        }
        for key in ("vfm", "vlm")
    }
    assert recorded_encoders(folder / "whole") is None


@pytest.mark.slow
def test_encoders_of_the_hub_are_named_with_their_revision(saved, hub, tmp_path):
    model, folder = saved
    hub({"me/vfm": folder / "vfm", "me/vlm": folder / "vlm"})
    model.save_pretrained(tmp_path / "part", trainable_only=True, encoders={"vfm": "me/vfm", "vlm": "me/vlm"})
    entries = recorded_encoders(tmp_path / "part")
    assert {key: (entry["name_or_path"], entry["revision"]) for key, entry in entries.items()} == {
        "vfm": ("me/vfm", COMMIT),
        "vlm": ("me/vlm", COMMIT),
    }
    assert_same_weights(MFuserForSemanticSegmentation.from_pretrained(tmp_path / "part"), model)
    hub({"me/part": tmp_path / "part"})
    loaded = MFuserForSemanticSegmentation.from_pretrained("me/part")
    assert_same_weights(loaded, model)
    assert loaded.name_or_path == "me/part"


def test_an_encoder_that_is_trained_is_saved(saved, tmp_path):
    model, folder = saved
    model = MFuserForSemanticSegmentation.from_pretrained(folder / "part", freeze_encoders=False)
    for weight in model.mfuser.vlm.parameters():
        weight.requires_grad_(False)
    with torch.no_grad():
        model.mfuser.vfm.vision.layernorm.bias += 1
    model.save_pretrained(tmp_path, trainable_only=True)
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("mfuser.vfm.") for name in names)
    assert not any(name.startswith("mfuser.vlm.") for name in names)
    assert_same_weights(MFuserForSemanticSegmentation.from_pretrained(tmp_path), model)


def test_other_frozen_weights_are_saved(saved, tmp_path):
    model = MFuserForSemanticSegmentation.from_pretrained(saved[1] / "part")
    model.pixel_decoder.requires_grad_(False)
    model.mfuser.store_class_embeddings()
    model.save_pretrained(tmp_path, trainable_only=True)
    assert_same_weights(MFuserForSemanticSegmentation.from_pretrained(tmp_path), model)


def test_encoders_that_have_changed_or_are_unknown_are_not_left_out(saved, tmp_path):
    _, folder = saved
    model = MFuserForSemanticSegmentation.from_pretrained(folder / "part")
    with torch.no_grad():
        model.mfuser.vfm.vision.layernorm.bias[0] += 0.01
    with pytest.raises(
        ValueError, match=r"foundation model is not .*vfm: 1 of its weights differ, such as vfm\.vision"
    ):
        model.save_pretrained(tmp_path / "changed", trainable_only=True)
    whole = MFuserForSemanticSegmentation.from_pretrained(folder / "whole")
    with pytest.raises(ValueError, match=r"their origin is unknown; give encoders=\{'vfm': ..., 'vlm': ...\}"):
        whole.save_pretrained(tmp_path / "unknown", trainable_only=True)
    assert not (tmp_path / "changed").exists() and not (tmp_path / "unknown").exists()
    whole.save_pretrained(tmp_path, trainable_only=True, encoders={key: str(folder / key) for key in ("vfm", "vlm")})
    assert recorded_encoders(tmp_path) == recorded_encoders(folder / "part")


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [MFuserForSemanticSegmentation, MFuserModel])
def test_the_folder_loads_like_that_of_the_whole_model(saved, model_class):
    _, folder = saved
    part, report = model_class.from_pretrained(folder / "part", output_loading_info=True)
    whole, expected = model_class.from_pretrained(folder / "whole", output_loading_info=True)
    assert_same_weights(part, whole)
    assert {name: set(report[name]) for name in report} == {name: set(expected[name]) for name in expected}
    assert not part.training and part.name_or_path == str(folder / "part")
    trainable = {name for name, weight in part.named_parameters() if weight.requires_grad}
    assert trainable == {name for name, weight in whole.named_parameters() if weight.requires_grad}


def test_arguments_of_from_pretrained_take_effect(saved):
    _, folder = saved
    arguments = dict(dtype=torch.bfloat16, crop_stride=21, device_map={"": "cpu"}, attn_implementation="eager")
    part, whole = (
        MFuserForSemanticSegmentation.from_pretrained(folder / kind, **arguments) for kind in ("part", "whole")
    )
    assert_same_weights(part, whole)
    assert part.dtype == torch.bfloat16 and part.config.crop_stride == 21
    assert part.config._attn_implementation == "eager"


def test_a_part_of_the_weights_can_stay_on_disk(saved, tmp_path):
    model, folder = saved
    limits = dict(device_map="auto", max_memory={"cpu": "500KB"}, offload_folder=tmp_path)
    loaded = MFuserForSemanticSegmentation.from_pretrained(folder / "part", **limits)
    assert "disk" in loaded.hf_device_map.values()
    with torch.no_grad():
        expected, found = (each(tiny_batch()["pixel_values"]).logits for each in (model, loaded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_other_classes_can_be_given(saved):
    _, folder = saved
    names = ["sky", "tree"]
    part, whole = (
        MFuserForSemanticSegmentation.from_pretrained(folder / kind, class_names=names, tokenizer=str(folder / "vlm"))
        for kind in ("part", "whole")
    )
    assert_same_weights(part, whole)
    assert list(part.config.id2label.values()) == names


def test_several_files_of_weights_are_read(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, trainable_only=True, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_weights(MFuserForSemanticSegmentation.from_pretrained(tmp_path), model)


def test_a_base_model_is_saved_and_loaded_too(saved, tmp_path):
    _, folder = saved
    model = MFuserModel.from_pretrained(folder / "part")
    model.save_pretrained(tmp_path, trainable_only=True)
    assert_same_weights(MFuserModel.from_pretrained(tmp_path), model)


def test_other_weights_of_an_encoder_are_refused(copied):
    set_one_weight(copied / "vfm")
    with pytest.raises(ValueError, match="these cannot be loaded") as error:
        MFuserForSemanticSegmentation.from_pretrained(copied / "part")
    expected = recorded_encoders(copied / "part")["vfm"]["sha256"]["model.safetensors"]
    for part in (
        f"{copied / 'part'} was saved without its encoders",
        f"the vision foundation model {copied / 'vfm'} is not the one that the model was trained with",
        f"{sha256(copied / 'vfm' / 'model.safetensors')} (model.safetensors); it must be {expected}",
    ):
        assert part in str(error.value)


def test_a_missing_encoder_is_named_and_can_be_given(saved, copied):
    (copied / "vlm").rename(copied / "elsewhere")
    with pytest.raises(OSError, match=rf"part was saved without its encoders.*{copied / 'vlm'}.*give encoders="):
        MFuserForSemanticSegmentation.from_pretrained(copied / "part")
    encoders = {"vlm": str(copied / "elsewhere")}
    loaded = MFuserForSemanticSegmentation.from_pretrained(copied / "part", encoders=encoders)
    assert_same_weights(loaded, saved[0])
    with pytest.raises(ValueError, match="is not the one that the model was trained with"):
        set_one_weight(copied / "vfm")
        MFuserForSemanticSegmentation.from_pretrained(copied / "part", encoders=encoders)


def test_folders_of_earlier_versions_name_encoders_without_hashes(saved, copied):
    names = {key: str(copied / key) for key in ("vfm", "vlm")}
    (copied / "part" / ENCODERS_FILE).write_text(json.dumps(names))
    assert saved_encoders(copied / "part") == names
    assert_same_weights(MFuserForSemanticSegmentation.from_pretrained(copied / "part"), saved[0])


def test_a_folder_that_does_not_name_its_encoders_is_refused(saved, copied):
    (copied / "part" / ENCODERS_FILE).unlink()
    with pytest.raises(ValueError, match=r"lacks the weights of the vision foundation model.* no encoders\.json"):
        MFuserForSemanticSegmentation.from_pretrained(copied / "part")
    encoders = {key: str(copied / key) for key in ("vfm", "vlm")}
    loaded = MFuserForSemanticSegmentation.from_pretrained(copied / "part", encoders=encoders)
    assert_same_weights(loaded, saved[0])


def test_encoders_without_a_meaning_are_refused(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="whole holds the weights of its encoders; encoders must not be given"):
        MFuserForSemanticSegmentation.from_pretrained(
            folder / "whole", encoders={key: str(folder / key) for key in ("vfm", "vlm")}
        )
    with pytest.raises(ValueError, match="encoders names vmf; it can name 'vfm' and 'vlm'"):
        MFuserForSemanticSegmentation.from_pretrained(folder / "part", encoders={"vmf": "x"})


# --- commands, auto classes and the Hub ------------------------------------------------------------------------------


STRANGER = """
import sys
sys.modules["mfuser"] = None
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForSemanticSegmentation, pipeline

found = {}
for kind in ("part", "whole"):
    folder = f"{sys.argv[1]}/{kind}"
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    segment = pipeline("image-segmentation", model=folder, trust_remote_code=True, device="cpu")
    segments = [(part["label"], part["mask"].tobytes()) for part in segment(Image.open(sys.argv[2]))]
    found[kind] = (model.state_dict(), base.state_dict(), segments)
model = AutoModelForSemanticSegmentation.from_pretrained(f"{sys.argv[1]}/part", trust_remote_code=True)
model.save_pretrained(sys.argv[3], trust_remote_code=True, trainable_only=True)
torch.save(found, sys.argv[4])
"""


@pytest.mark.slow
def test_auto_classes_and_the_pipeline_load_the_folder_where_mfuser_is_not_installed(saved, tmp_path):
    model, folder = saved
    Image.new("RGB", (80, 72), (90, 120, 30)).save(tmp_path / "image.png")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    places = [folder, tmp_path / "image.png", tmp_path / "again", tmp_path / "found.pt"]
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, *map(str, places)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    for part, whole in zip(found["part"][:2], found["whole"][:2], strict=True):
        assert part.keys() == whole.keys() and all(torch.equal(part[name], whole[name]) for name in part)
    assert found["part"][2] == found["whole"][2] != []
    assert_same_weights(MFuserForSemanticSegmentation.from_pretrained(tmp_path / "again"), model)
    assert (tmp_path / "again" / "frozen_encoders_mfuser.py").is_file()


def test_the_segment_command_works_on_the_folder(saved, tmp_path):
    _, folder = saved
    Image.new("RGB", (80, 72), (90, 120, 30)).save(tmp_path / "image.png")
    for kind in ("part", "whole"):
        arguments = [str(tmp_path / "image.png"), "--model", str(folder / kind), "--output", str(tmp_path / kind)]
        assert cli.main(["segment", *arguments]) == 0
    written = {kind: sorted(path.name for path in (tmp_path / kind).iterdir()) for kind in ("part", "whole")}
    assert written["part"] == written["whole"] != []
    for name in written["part"]:
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_the_model_is_uploaded_without_its_encoders(saved, how, monkeypatch, tmp_path):
    _, folder = saved
    model, hub = MFuserForSemanticSegmentation.from_pretrained(folder / "part"), use_fake_hub(monkeypatch)
    if how == "push_to_hub":
        model.push_to_hub("mine", trainable_only=True)
    else:
        model.save_pretrained(tmp_path / "mine", trainable_only=True, push_to_hub=True)
        assert recorded_encoders(tmp_path / "mine") == recorded_encoders(folder / "part")
    (uploaded,) = hub.repositories.values()
    assert hub.repositories.keys() == {"me/mine"}
    assert json.loads(uploaded[ENCODERS_FILE]) == recorded_encoders(folder / "part")
    assert uploaded["model.safetensors"] == (folder / "part" / "model.safetensors").read_bytes()
    assert {"config.json", "modeling_mfuser.py", "frozen_encoders_mfuser.py"} <= uploaded.keys()
