"""`mfuser convert` converts or drops every tensor and writes a complete folder; on errors it writes nothing."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_convert_eva02_clip import published_shapes
from tiny_models import tiny_tokenizer
from transformers import SiglipConfig, SiglipModel
from transformers.core_model_loading import revert_weight_conversion

from mfuser import MFuserForSemanticSegmentation
from mfuser.scripts.checkpoint_names import convert_state_dict, convert_tensor, detect_variant, dropped_reason
from mfuser.scripts.convert_checkpoint import config_from_state_dict, main
from mfuser.scripts.convert_eva02_clip import SIGNATURE

FIXTURES = Path(__file__).parent / "fixtures"
VARIANTS = ("clip", "eva02_clip", "siglip")
# in millions: trainable in the authors' file, and without what their code never uses
TRAINABLE = {"clip": (170.1, 170.1), "eva02_clip": (118.6, 118.6), "siglip": (170.4, 119.0)}
PARAMETERS = {"clip": 902.8, "eva02_clip": 855.9, "siglip": 1127.5}


# --- full size, on the meta device -----------------------------------------------------------------------------------


def published(variant: str) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Returns the tensors of the authors' full-size file on the meta device, and the names of the trained ones."""
    keys = json.loads((FIXTURES / f"full_size_keys_{variant}.json").read_text())
    tensors = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype, _) in keys.items()
    }
    return tensors, {key for key, (_, _, trains) in keys.items() if trains}


@pytest.fixture(scope="module", params=VARIANTS)
def full_size(request):
    """(variant, the authors' tensors, the names that train, converted tensors, our model)"""
    tensors, trains = published(request.param)
    converted = convert_state_dict(tensors, request.param)
    known = {"class_token_ids": [[1] * 5] * 19} if request.param == "siglip" else None
    with torch.device("meta"):
        model = MFuserForSemanticSegmentation(config_from_state_dict(converted, request.param, known))
    return request.param, tensors, trains, converted, model


def in_files(model, names) -> dict[str, torch.Tensor]:
    """Returns tensors of a model under their names in files, which are the same in all versions of Transformers."""
    state_dict = model.state_dict()
    return revert_weight_conversion(model, {name: state_dict[name] for name in names})


def test_every_published_tensor_is_converted_or_dropped_for_a_reason(full_size):
    variant, tensors, _, converted, model = full_size
    assert detect_variant(tensors) == variant
    expected = in_files(model, model.state_dict())
    assert converted.keys() == expected.keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    # nothing twice, nothing lost
    kept = [key for key in tensors if dropped_reason(key, variant) is None]
    produced = [name for key in kept for name in convert_tensor(key, tensors[key], variant)]
    assert sorted(produced) == sorted(expected)
    assert sum(tensors[key].numel() for key in kept) == sum(tensor.numel() for tensor in expected.values())


def test_dropped_tensors_are_unused(full_size):
    variant, tensors, trains, _, _ = full_size
    dropped = {key: dropped_reason(key, variant) for key in tensors if dropped_reason(key, variant)}
    assert dropped["backbone.dinov2.mask_token"] == "used only by DINOv2's masked pretraining"
    assert all(len(reason) > 10 for reason in dropped.values())
    trained = {key for key in dropped if key in trains}
    assert (
        trained
        == {
            "clip": set(),
            "eva02_clip": {"random_text"},
            "siglip": {key for key in tensors if key.startswith("backbone.adapter_proj")},
        }[variant]
    )


def test_the_trainable_parameters_are_those_of_the_published_model(full_size):
    variant, tensors, trains, _, model = full_size
    kept = [key for key in trains if dropped_reason(key, variant) is None]
    expected = {name for key in kept for name in convert_tensor(key, tensors[key], variant)}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert set(in_files(model, trainable)) == expected
    counts = [sum(tensors[key].numel() for key in keys) for keys in (trains, kept)]
    assert tuple(round(count / 1e6, 1) for count in counts) == TRAINABLE[variant]
    assert counts[1] == sum(model.get_parameter(name).numel() for name in trainable)
    buffers = sum(tensors[key].numel() for key in tensors if key.rsplit(".", 1)[-1].startswith(("running_", "num_b")))
    unused = sum(tensors[key].numel() for key in tensors if key.endswith("mask_token"))
    total = sum(tensor.numel() for tensor in tensors.values()) - buffers - unused
    assert total / 1e6 == pytest.approx(PARAMETERS[variant], abs=0.2)


# --- small ones, through the command --------------------------------------------------------------------------------


def golden(variant: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Returns a small checkpoint under the authors' names, and the fields that can't be inferred from its shapes."""
    import check_golden

    folder = FIXTURES / "goldens" / variant
    description = json.loads((folder / "config.json").read_text())
    token_ids = load_file(folder / "inputs.safetensors")["text_input_ids"].tolist()
    return check_golden.original_state_dict(folder, description), check_golden.known_fields(description, token_ids)


class Checkpoint:
    """A .pth of a golden and the command on it."""

    def __init__(self, folder: Path, variant: str):
        self.folder = folder
        self.tensors, self.fields = golden(variant)

    def convert(self, *arguments: str) -> int:
        torch.save({"state_dict": self.tensors, "meta": {"epoch": 1}}, self.folder / "authors.pth")
        (self.folder / "fields.json").write_text(json.dumps(self.fields))
        files = [str(self.folder / "authors.pth"), "--config", str(self.folder / "fields.json")]
        return main([*files, "--output", str(self.output), *arguments])

    @property
    def output(self) -> Path:
        return self.folder / "converted"


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path, "clip")


def test_the_folder_is_complete(checkpoint, capsys):
    assert checkpoint.convert() == 0
    total = len(checkpoint.tensors)
    printed = capsys.readouterr().out
    assert f"clip: {total - 1} of {total} tensors converted" in printed
    assert "1 dropped: used only by DINOv2's masked pretraining" in printed
    root = Path(__file__).parent.parent
    code = {path.name for path in checkpoint.output.glob("*.py")}
    for name in code:
        assert (checkpoint.output / name).read_text() == (root / name).read_text()
        imported = set(re.findall(r"^\s*from \.(\w+) import", (root / name).read_text(), flags=re.MULTILINE))
        assert {f"{module}.py" for module in imported} <= code, name
    config = json.loads((checkpoint.output / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_mfuser.MFuserConfig",
        "AutoModel": "modeling_mfuser.MFuserModel",
        "AutoModelForSemanticSegmentation": "modeling_mfuser.MFuserForSemanticSegmentation",
    }
    assert config["architectures"] == ["MFuserForSemanticSegmentation"]
    processor = json.loads((checkpoint.output / "preprocessor_config.json").read_text())
    assert processor["auto_map"]["AutoImageProcessor"] == "image_processing_mfuser.MFuserImageProcessor"
    card = (checkpoint.output / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "`authors.pth`" in card
    assert "DINOv2 and CLIP" in card and all(name in card for name in checkpoint.fields["id2label"].values())
    assert not list(checkpoint.output.glob("*.bin"))


def test_the_class_embedding_that_counts_twice_is_folded_into_its_position(checkpoint):
    assert checkpoint.convert() == 0
    written = load_file(checkpoint.output / "model.safetensors")
    positions = checkpoint.tensors["backbone.positional_embedding"]
    token = checkpoint.tensors["backbone.class_embedding"]
    embeddings = "mfuser.vlm.vision.embeddings."
    assert torch.equal(written[f"{embeddings}class_embedding"], token)
    assert torch.equal(written[f"{embeddings}position_embedding.weight"][0], positions[0] + token)
    assert torch.equal(written[f"{embeddings}position_embedding.weight"][1:], positions[1:])
    assert token.abs().max() > 0


def damaged(name):
    """Returns a function that damages a checkpoint and returns the expected error."""

    def change(tensors):
        if name == "unknown":
            tensors["backbone.surprise.weight"] = tensors["decode_head.other"] = torch.zeros(2)
            return "unexpected tensors in an MFuser checkpoint (clip): backbone.surprise.weight, decode_head.other"
        if name == "missing":
            del tensors["gamma"], tensors["decode_head.cls_embed.bias"]
            return "missing: decoder.predictor.class_head.bias; missing: mfuser.enhancer.gamma"
        if name == "missing, and a size with it":
            del tensors["contexts"]
            return "mfuser.prompts is missing"
        if name == "missing, folded":
            del tensors["backbone.class_embedding"]
            return "missing: mfuser.vlm.vision.embeddings.class_embedding"
        if name == "of another shape":
            tensors["gamma"] = torch.zeros(7)
            tensors["backbone.dinov2.blocks.1.attn.qkv.bias"] = torch.zeros(2)
            return "mfuser.enhancer.gamma has shape (7,) and must have ("
        if name == "of another shape, folded":
            tensors["backbone.class_embedding"] = torch.zeros(7)
            return "mfuser.vlm.vision.embeddings.class_embedding has shape (7,) and must have ("
        if name == "of other dimensions":
            tensors["contexts"] = torch.zeros(7)
            return "mfuser.prompts has shape (7,); it must have 3 dimensions"
        if name == "of something else":
            tensors.clear()
            tensors["layer.weight"] = torch.zeros(2)
            return "this is not an MFuser checkpoint: it holds layer.weight ..., but none of backbone.conv1.weight,"
        raise ValueError(name)

    return pytest.param(change, id=name)


@pytest.mark.parametrize(
    "change",
    [
        damaged("unknown"),
        damaged("missing"),
        damaged("missing, and a size with it"),
        damaged("missing, folded"),
        damaged("of another shape"),
        damaged("of another shape, folded"),
        damaged("of other dimensions"),
        damaged("of something else"),
    ],
)
def test_tensors_that_do_not_fit_are_listed_and_nothing_is_written(change, checkpoint, capsys):
    message = change(checkpoint.tensors)
    assert checkpoint.convert() == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("mfuser convert: "))
    assert message in line
    assert not checkpoint.output.exists()


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {"gamma": torch.zeros(2)}, "meta": Malicious(tmp_path / "owned")}, tmp_path / "bad.pth")
    assert main([str(tmp_path / "bad.pth"), "--output", str(tmp_path / "converted")]) == 2
    printed = capsys.readouterr().err
    assert "can run code, so it is not read" in printed and len(printed.splitlines()) == 1
    assert not (tmp_path / "owned").exists() and not (tmp_path / "converted").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", pickle.dumps([1, 2]), b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(content, name, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / name), "--output", str(tmp_path / "converted")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"mfuser convert: {tmp_path / name} ") and len(printed.splitlines()) == 1


def test_a_file_without_a_state_dict_is_refused(tmp_path, capsys):
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    assert main([str(tmp_path / "list.pth"), "--output", str(tmp_path / "converted")]) == 2
    assert "holds no state_dict" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_num_head": 4}, "no field 'decoder_num_head'; did you mean 'decoder_num_heads'?"),
        ({"decoder_num_heads": "4"}, "'decoder_num_heads' expected int, got str"),
        ({"fusion_out_layers": [1, 2, 3, 99]}, "four ascending numbers"),
        ({"id2label": {"0": "road"}}, "but id2label has 1; pass id2label and class_token_ids with --config"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message, checkpoint, capsys):
    checkpoint.fields |= fields
    assert checkpoint.convert() == 2
    assert message in capsys.readouterr().err
    assert not checkpoint.output.exists()


def tiny_siglip(folder: Path) -> SiglipModel:
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = SiglipConfig(
        text_config=tower | dict(vocab_size=32, max_position_embeddings=8, projection_size=32),
        vision_config=tower | dict(image_size=32, patch_size=16),
    )
    model = SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(4.5)
        model.logit_bias.fill_(-12.25)
    model.save_pretrained(folder)
    tiny_tokenizer(clip=False).save_pretrained(folder)
    return model


def test_siglips_scale_bias_and_tokens_come_from_the_pretrained_one(tmp_path):
    checkpoint = Checkpoint(tmp_path, "siglip")
    for name in ("loss_logit_scale", "loss_logit_bias", "class_token_ids"):
        del checkpoint.fields[name]
    names = ["road", "traffic light", *(f"thing {index}" for index in range(len(checkpoint.fields["id2label"]) - 2))]
    checkpoint.fields["id2label"] = dict(enumerate(names))
    tiny_siglip(tmp_path / "siglip")
    assert checkpoint.convert("--siglip", str(tmp_path / "siglip")) == 0
    config = MFuserForSemanticSegmentation.from_pretrained(checkpoint.output).config
    assert (config.loss_logit_scale, config.loss_logit_bias) == (4.5, -12.25)
    vocabulary, end, pad = tiny_tokenizer(clip=False).get_vocab(), 2, 1
    assert config.class_token_ids[0] == [vocabulary["road"], end, pad, pad, pad]
    assert config.class_token_ids[1] == [vocabulary["traffic"], vocabulary["light"], end, pad, pad]


def test_a_missing_pretrained_siglip_is_reported(tmp_path, capsys):
    checkpoint = Checkpoint(tmp_path, "siglip")
    del checkpoint.fields["loss_logit_scale"]
    assert checkpoint.convert("--siglip", str(tmp_path / "nowhere")) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    assert not checkpoint.output.exists()


def test_a_published_eva02_clip_becomes_a_model_of_its_own(tmp_path):
    tensors = {name: torch.randn(shape) for name, shape in published_shapes(64, 1, 16, 2, 64, 1, 32).items()}
    torch.save({"module": tensors}, tmp_path / "EVA02.pt")
    assert main([str(tmp_path / "EVA02.pt"), "--output", str(tmp_path / "eva02")]) == 0
    assert json.loads((tmp_path / "eva02" / "config.json").read_text())["model_type"] == "eva02_clip"


def test_options_without_an_effect_are_refused(checkpoint, tmp_path, capsys):
    assert checkpoint.convert("--siglip", "nowhere") == 2
    assert "--siglip is for the SigLIP variant" in capsys.readouterr().err
    torch.save({SIGNATURE: torch.zeros(1)}, tmp_path / "EVA02.pt")
    for option in ("--config", "--siglip"):
        command = [str(tmp_path / "EVA02.pt"), "--output", str(tmp_path / "eva02"), option, "nowhere"]
        assert main(command) == 2
        assert f"{option} is for MFuser checkpoints" in capsys.readouterr().err


def test_a_published_eva02_clip_that_lacks_tensors_is_refused(tmp_path, capsys):
    tensors = {name: torch.randn(shape) for name, shape in published_shapes(64, 1, 16, 2, 64, 1, 32).items()}
    del tensors["visual.head.bias"]
    torch.save(tensors, tmp_path / "EVA02.pt")
    assert main([str(tmp_path / "EVA02.pt"), "--output", str(tmp_path / "eva02")]) == 2
    assert "tensors are missing from the checkpoint: visual_projection.bias" in capsys.readouterr().err
    assert not (tmp_path / "eva02").exists()


def test_sizes_of_the_published_models_are_read_off_their_shapes():
    config = config_from_state_dict(convert_state_dict(published("clip")[0], "clip"), "clip")
    assert config.vfm_config.image_size == config.vlm_config.image_size == 512
    assert config.vfm_config.mlp_ratio == 4 and config.patch_size == 16
    assert config.text_config.num_attention_heads == 12 and config.text_config.max_position_embeddings == 10
    config = config_from_state_dict(convert_state_dict(published("eva02_clip")[0], "eva02_clip"), "eva02_clip")
    assert config.vlm_config.image_size == 504 and config.patch_size == 14
    assert config.text_prompt_length == 8 and not config.fusion_project_vfm
