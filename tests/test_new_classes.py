"""Loading a model with other classes than the saved ones: `from_pretrained`, checks of names, training."""

import copy
import logging

import pytest
import torch
from tiny_models import CLASSES, CLIP, EVA02, tiny_batch, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from mfuser import MFuserForSemanticSegmentation, MFuserModel, class_names_mfuser
from mfuser.scripts.train import ModelArguments, build_model

PAIRS = ["dinov2+clip", "dinov2+eva02_clip", "dinov2+siglip"]
NAMES = ["car", "tree", "street", "road", "traffic light"]  # two known, three new
KEPT = {0: 2, 3: 0}  # row of each known class in the saved model
LABELS = {"num_labels": 5, "id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
TABLES = {
    "decoder.predictor.class_head.weight",
    "decoder.predictor.class_head.bias",
    "decoder.query_position_embedding",
    "pixel_decoder.text_position_embedding",
}


@pytest.fixture(autouse=True)
def warnings_of_transformers(monkeypatch):
    for name in ("mfuser", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


def tokenizer_of(pair):
    return tiny_tokenizer(clip="siglip" not in pair)


def saved(pair, folder, stored=False, with_tokenizer=False):
    model = tiny_model(pair)
    if stored:
        model.mfuser.store_class_embeddings()
    model.save_pretrained(folder)
    if with_tokenizer:
        tokenizer_of(pair).save_pretrained(folder)
    return model


def assert_kept(model, trained, names=TABLES):
    old, new = trained.state_dict(), model.state_dict()
    for name in names:
        for row, source in KEPT.items():
            assert torch.equal(new[name][row], old[name][source]), name
    for name in ("weight", "bias"):  # "no object"
        name = f"decoder.predictor.class_head.{name}"
        assert torch.equal(new[name][-1], old[name][-1])
    for name in old.keys() - names:
        assert torch.equal(new[name], old[name]), name


def assert_learns(model):
    """Every new row changes in one training step."""
    model.train()
    batch = tiny_batch()
    batch["labels"] = torch.randint(0, 5, batch["labels"].shape, generator=torch.Generator().manual_seed(0))
    model(**batch).loss.backward()
    names = TABLES | ({"mfuser.stored_class_embeddings"} if model.mfuser.prompts is None else set())
    for name, weight in model.named_parameters():
        if name in names:
            assert weight.requires_grad and (weight.grad.reshape(len(weight), -1) != 0).any(dim=1).all(), name


def from_class_names(folder, tokenizer, **kwargs):
    return MFuserForSemanticSegmentation.from_pretrained(folder, class_names=NAMES, tokenizer=tokenizer, **kwargs)


def from_labels(folder, tokenizer, **kwargs):
    return MFuserForSemanticSegmentation.from_pretrained(
        folder, tokenizer=tokenizer, ignore_mismatched_sizes=True, **LABELS, **kwargs
    )


def from_config(folder, tokenizer, **kwargs):
    """As in the example scripts of Transformers."""
    labels = {name: LABELS[name] for name in ("id2label", "label2id")}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, **labels)
    return AutoModelForSemanticSegmentation.from_pretrained(
        folder, config=config, tokenizer=tokenizer, ignore_mismatched_sizes=True, trust_remote_code=True, **kwargs
    )


def from_auto_class(folder, tokenizer, **kwargs):
    return AutoModelForSemanticSegmentation.from_pretrained(
        folder, tokenizer=tokenizer, ignore_mismatched_sizes=True, trust_remote_code=True, **LABELS, **kwargs
    )


def from_auto_class_with_names(folder, tokenizer, **kwargs):
    return AutoModelForSemanticSegmentation.from_pretrained(
        folder, class_names=NAMES, tokenizer=tokenizer, trust_remote_code=True, **kwargs
    )


WAYS = [from_class_names, from_labels, from_config, from_auto_class, from_auto_class_with_names]
PAIRS_AND_WAYS = [(pair, way) for pair in PAIRS for way in WAYS[:2]] + [(PAIRS[0], way) for way in WAYS[2:]]


@pytest.mark.parametrize(("pair", "way"), PAIRS_AND_WAYS)
def test_a_model_with_a_text_encoder_loads_with_new_classes(pair, way, tmp_path, caplog):
    trained = saved(pair, tmp_path)
    model, report = way(tmp_path, tokenizer_of(pair), output_loading_info=True)
    assert list(model.config.id2label.values()) == NAMES and model.config.label2id == LABELS["label2id"]
    assert len(model.config.class_token_ids) == 5 and not model.config.queries_vote_for_own_class
    assert {name for name, *_ in report["mismatched_keys"]} == TABLES and not report["missing_keys"]
    assert_kept(model, trained)
    (warning,) = [record.getMessage() for record in caplog.records if "other classes" in record.getMessage()]
    assert "kept: car, road;" in warning and "discarded: sky, person" in warning
    assert all(f"{name} (" in warning for name in ("tree", "street", "traffic light"))
    frozen = {name for name, weight in trained.named_parameters() if not weight.requires_grad}
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == frozen
    assert_learns(model)


@pytest.mark.parametrize(("pair", "way"), PAIRS_AND_WAYS)
def test_a_model_with_stored_embeddings_loads_with_new_classes(pair, way, tmp_path, caplog):
    trained = saved(pair, tmp_path, stored=True)
    model, report = way(tmp_path, None, output_loading_info=True)
    stored = {"mfuser.stored_class_embeddings"}
    assert {name for name, *_ in report["mismatched_keys"]} == TABLES | stored
    assert_kept(model, trained, TABLES | stored)
    (warning,) = [record.getMessage() for record in caplog.records if "other classes" in record.getMessage()]
    assert "new, randomly initialised, to be trained: tree, street, traffic light;" in warning
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert not model.mfuser.vfm.vision.embeddings.patch_embeddings.projection.weight.requires_grad
    assert_learns(model)


@pytest.mark.parametrize("pair", PAIRS)
def test_what_was_loaded_with_new_classes_is_saved_with_them(pair, tmp_path):
    saved(pair, tmp_path / "a")
    model = from_class_names(tmp_path / "a", tokenizer_of(pair))
    model.save_pretrained(tmp_path / "b")
    again = MFuserForSemanticSegmentation.from_pretrained(tmp_path / "b")
    pixels = tiny_batch()["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-6)


def test_with_own_votes_a_loaded_model_scores_as_after_set_class_names(tmp_path):
    saved("dinov2+clip", tmp_path)
    loaded = from_class_names(tmp_path, tiny_tokenizer(), queries_vote_for_own_class=True)
    model = MFuserForSemanticSegmentation.from_pretrained(tmp_path)
    model.set_class_names(NAMES, tiny_tokenizer())
    assert loaded.config.to_dict() == model.config.to_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_the_encoder_model_takes_new_classes_too(tmp_path):
    saved("dinov2+clip", tmp_path)
    model = MFuserModel.from_pretrained(tmp_path, class_names=NAMES, tokenizer=tiny_tokenizer())
    assert model(tiny_batch()["pixel_values"]).score_map.shape[1] == 5


def test_the_tokenizer_in_the_folder_is_the_default(tmp_path):
    saved("dinov2+clip", tmp_path / "a", with_tokenizer=True)
    expected = from_class_names(tmp_path / "a", tiny_tokenizer()).config.class_token_ids
    assert from_labels(tmp_path / "a", None).config.class_token_ids == expected
    assert from_class_names(tmp_path / "a", str(tmp_path / "a")).config.class_token_ids == expected


def test_a_tokenizer_of_its_own_is_downloaded_with_the_arguments_that_are_not_of_the_model(monkeypatch):
    given = []

    def download(name, **kwargs):
        given.append((name, kwargs))
        return tiny_tokenizer()

    monkeypatch.setattr(class_names_mfuser, "pretrained_tokenizer", download)
    hub_kwargs = dict(token="secret", cache_dir="cache", local_files_only=True)
    class_names_mfuser.load_tokenizer("my/tokenizer", "my/model", revision="v1", subfolder="a", **hub_kwargs)
    assert given == [("my/tokenizer", hub_kwargs)]


@pytest.mark.parametrize("way", WAYS)
def test_without_a_tokenizer_old_queries_are_never_used_for_new_names(way, tmp_path):
    saved("dinov2+clip", tmp_path)
    with pytest.raises(ValueError, match="new class names need a tokenizer, and .* contains none; give tokenizer="):
        way(tmp_path, None)


def test_labels_of_the_same_number_are_new_classes_as_well(tmp_path):
    saved("dinov2+clip", tmp_path)
    names = dict(enumerate(["car", "tree", "street", "road"]))
    with pytest.raises(ValueError, match="To rename classes only, change model.config.id2label"):
        MFuserForSemanticSegmentation.from_pretrained(tmp_path, id2label=names)
    with pytest.raises(ValueError, match="need a tokenizer"):
        MFuserForSemanticSegmentation.from_pretrained(tmp_path, id2label=names, ignore_mismatched_sizes=True)


def test_a_number_without_names_is_refused_where_names_are_queries(tmp_path):
    saved("dinov2+clip", tmp_path / "a")
    with pytest.raises(ValueError, match="num_labels is 5, and the saved model has 4 labels; its queries"):
        MFuserForSemanticSegmentation.from_pretrained(tmp_path / "a", num_labels=5, ignore_mismatched_sizes=True)
    saved("dinov2+clip", tmp_path / "b", stored=True)
    model = MFuserForSemanticSegmentation.from_pretrained(tmp_path / "b", num_labels=5, ignore_mismatched_sizes=True)
    assert model.config.id2label[4] == "LABEL_4" and model.decoder.predictor.class_head.out_features == 6


def test_contradicting_arguments_are_refused(tmp_path):
    saved("dinov2+clip", tmp_path)
    load = MFuserForSemanticSegmentation.from_pretrained
    with pytest.raises(ValueError, match="num_labels is 3, but id2label has 5 labels"):
        load(tmp_path, num_labels=3, id2label=LABELS["id2label"], ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match=r"class_names is \['car'\], but num_labels, id2label or config give"):
        load(tmp_path, class_names=["car"], id2label=LABELS["id2label"], tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"id2label has the ids \[0, 2\]; they must be 0 to 1"):
        load(tmp_path, num_labels=2, id2label={0: "road", 2: "sky"}, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="without the folder of a saved model"):
        load(None, class_names=["car"], config=tiny_config(), state_dict=tiny_model().state_dict())


def test_the_saved_classes_need_no_tokenizer_and_change_nothing(tmp_path, caplog):
    trained = saved("dinov2+clip", tmp_path)
    model = MFuserForSemanticSegmentation.from_pretrained(tmp_path, class_names=list(CLASSES))
    assert model.config.class_token_ids == trained.config.class_token_ids
    assert not [record for record in caplog.records if "other classes" in record.getMessage()]


# --- checks ----------------------------------------------------------------------------------------------------------

LONG = "way of life light"  # 6 tokens with start and end


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("road", {}, "class_names is 'road'; it must be a list"),
        ([], {}, r"class_names is \[\]; it must be a list"),
        (["road", ""], {}, "it must be a list of different, non-empty names"),
        (["road", 3], {}, r"class_names is \['road', 3\]"),
        (["road", "sky", "road"], {}, "class_names contains 'road' more than once"),
        (["road", "Road "], {}, "class_names contains 'road' more than once"),
        (["road"], {"tokenizer": "no/such/folder"}, "tokenizer is 'no/such/folder', which cannot be loaded"),
        (["road"], {"tokenizer": 5}, "tokenizer is of type int; it must be a tokenizer"),
        (["road"], {"tokenizer": None}, "new class names need a tokenizer, and none was given"),
        (["road"], {"tokenizer": "other"}, "the tokenizer does not belong to the text encoder"),
        ([LONG], {}, "class names longer than 5 tokens: "),
        (["road"], {"class_token_length": 6}, "class_token_length is 6; it must be between 1 and 5"),
        (["road"], {"class_token_length": "5"}, "class_token_length is '5'"),
        ([f"car {i}" for i in range(256)], {"class_token_length": 5}, "semantic_loss_ignore_index is 255"),
    ],
)
@pytest.mark.parametrize("pair", PAIRS)
def test_after_a_refused_call_the_model_is_unchanged(pair, names, options, message):
    model = tiny_model(pair)
    options = {"tokenizer": tokenizer_of(pair)} | options
    if options["tokenizer"] == "other":
        options["tokenizer"] = tiny_tokenizer(clip="siglip" in pair)
    if names == [LONG] and "siglip" in pair:
        names = [LONG + " of"]
    config, weights = copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.set_class_names(names, **options)
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(("pair", "encoders"), [("dinov2+clip", CLIP), ("dinov2+eva02_clip", EVA02)])
def test_the_advice_on_long_names_works(pair, encoders):
    with pytest.raises(ValueError, match="positions for 5 tokens only.*from_vfm_vlm_pretrained.*class_token_length=6"):
        tiny_model(pair).set_class_names([LONG, "car"], tiny_tokenizer())
    text = encoders["text_config"] | {"max_position_embeddings": 12}
    model = tiny_model(pair, text_config=text)
    with pytest.raises(ValueError, match="give shorter names or class_token_length=6$"):
        model.set_class_names([LONG, "car"], tiny_tokenizer())
    model.set_class_names([LONG, "car"], tiny_tokenizer(), class_token_length=6)
    assert model(tiny_batch()["pixel_values"]).logits.shape[1] == 2


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_mfuser_train_gives_a_saved_model_the_classes_of_the_data(stored, tmp_path, caplog):
    trained = saved("dinov2+clip", tmp_path / "model", stored)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = ModelArguments(model=str(tmp_path / "model"), tokenizer=str(tmp_path / "tokenizer"))
    model = build_model(options, LABELS["id2label"])
    assert_kept(model, trained, TABLES | ({"mfuser.stored_class_embeddings"} if stored else set()))
    assert "kept: car, road; new" in caplog.text
    assert_learns(model)
    if not stored:
        with pytest.raises(ValueError, match="contains none; give tokenizer="):
            build_model(ModelArguments(model=str(tmp_path / "model")), LABELS["id2label"])


def test_new_classes_of_a_model_in_a_subfolder_use_its_configuration_and_tokenizer(tmp_path):
    model = saved("dinov2+clip", tmp_path / "models" / "small", with_tokenizer=True)
    loaded = MFuserForSemanticSegmentation.from_pretrained(
        tmp_path / "models", subfolder="small", class_names=NAMES, ignore_mismatched_sizes=True
    )
    assert [loaded.config.id2label[index] for index in range(5)] == NAMES
    assert_kept(loaded, model)
