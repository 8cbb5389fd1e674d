"""Class embeddings are cached or stored as a tensor; class names can be replaced without training."""

import pytest
import torch
from by_hand import bilinear, segmentation_scores
from tiny_models import CLASSES, tiny_batch, tiny_config, tiny_model, tiny_tokenizer
from torch.nn import functional as F

from mfuser import MFuserForSemanticSegmentation

NEW_NAMES = ["street", "tree", "sky", "car", "person", "light", "traffic light"]


def test_class_embeddings_are_computed_once_and_again_after_a_change(monkeypatch):
    model, batch = tiny_model(), tiny_batch()
    calls = []
    encode = model.mfuser.vlm.encode_text
    monkeypatch.setattr(model.mfuser.vlm, "encode_text", lambda *args: calls.append(1) or encode(*args))
    with torch.no_grad():
        before = model(batch["pixel_values"]).logits
        model(tiny_batch((88, 130))["pixel_values"])
        assert len(calls) == 1
        model.mfuser.prompts.add_(1)
        assert not torch.equal(model(batch["pixel_values"]).logits, before)
    assert len(calls) == 2


@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov2+siglip"])
def test_stored_class_embeddings_replace_the_text_encoder(pair, tmp_path):
    model, batch = tiny_model(pair), tiny_batch()
    with torch.no_grad():
        expected = model(batch["pixel_values"]).logits
        model.mfuser.store_class_embeddings()
        assert not model.mfuser.stored_class_embeddings.requires_grad
        assert torch.equal(model(batch["pixel_values"]).logits, expected)
        model.save_pretrained(tmp_path)
        loaded = MFuserForSemanticSegmentation.from_pretrained(tmp_path)
        assert not [name for name, _ in loaded.named_parameters() if ".text" in name and "mfuser.vlm" in name]
        torch.testing.assert_close(loaded(batch["pixel_values"]).logits, expected, rtol=1e-4, atol=1e-6)
    assert not loaded.mfuser.stored_class_embeddings.requires_grad


@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov2+eva02_clip", "dinov2+siglip"])
def test_new_class_names_without_training(pair, tmp_path):
    model, batch = tiny_model(pair), tiny_batch()
    model.decoder.query_position_embedding.requires_grad_(False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        before = model(batch["pixel_values"])
        rows = model.decoder.predictor.class_head.weight[: len(CLASSES)].clone()
        model.set_class_names(
            ["street", "tree", "sky", "car", "person", "light"], tiny_tokenizer("siglip" not in pair)
        )
        after = model(batch["pixel_values"])
        large = model(tiny_batch((88, 100))["pixel_values"])
    assert after.logits.shape == (2, 6, 64, 64) and large.logits.shape == (2, 6, 88, 100)
    assert after.score_map.shape[1] == 6 and before.score_map.shape[1] == 4
    assert model.config.num_labels == 6 and model.config.id2label[1] == "tree"
    assert all((row == rows).all(1).any() for row in model.decoder.predictor.class_head.weight[:-1])
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    # the scores of all classes differ, although some share a row of the class head
    scores = after.logits.transpose(0, 1).flatten(1)
    assert all(not torch.equal(scores[i], scores[j]) for i in range(6) for j in range(i))
    model.save_pretrained(tmp_path)
    loaded = MFuserForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch["pixel_values"]).logits, after.logits, rtol=1e-4, atol=1e-6)
    assert loaded(**batch).loss.isfinite()


def test_new_class_names_need_a_text_encoder_and_few_tokens():
    model = tiny_model()
    with pytest.raises(ValueError, match="'way of life light' needs 6"):
        model.set_class_names(["way of life light", "car"], tiny_tokenizer())
    assert model.config.num_labels == len(CLASSES)
    model.mfuser.store_class_embeddings()
    with pytest.raises(ValueError, match="needs a text encoder"):
        model.set_class_names(["car"], tiny_tokenizer())


def test_another_number_of_labels_on_loading_reports_what_is_new(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    names = {0: "road", 1: "sky"}
    config = tiny_config(id2label=names, label2id={"road": 0, "sky": 1}, class_token_ids=[[5] * 5, [6] * 5])
    with pytest.raises(RuntimeError, match="size mismatch|mismatch"):
        MFuserForSemanticSegmentation.from_pretrained(tmp_path, config=config)
    model, report = MFuserForSemanticSegmentation.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in report["mismatched_keys"]} == {
        "decoder.predictor.class_head.weight",
        "decoder.predictor.class_head.bias",
        "decoder.query_position_embedding",
        "pixel_decoder.text_position_embedding",
    }
    assert model(tiny_batch()["pixel_values"]).logits.shape[1] == 2


def test_other_labels_without_ignore_mismatched_sizes_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has the 4 labels road, .* 2 other labels were given \(road, sky\): give class_names="
    ):
        MFuserForSemanticSegmentation.from_pretrained(tmp_path, id2label={0: "road", 1: "sky"})


@torch.no_grad()
@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov2+eva02_clip", "dinov2+siglip"])
def test_a_new_class_takes_over_from_the_most_similar_trained_one_and_shares_its_probability(pair):
    model = tiny_model(pair)
    head = model.decoder.predictor.class_head
    trained = {
        "embeddings": model.mfuser.class_embeddings().clone(),
        "text": model.pixel_decoder.text_position_embedding.clone(),
        "query": model.decoder.query_position_embedding.clone(),
    }
    queries = torch.randn(50, head.in_features, generator=torch.Generator().manual_seed(0))
    logits = head(queries)
    model.set_class_names(NEW_NAMES, tiny_tokenizer("siglip" not in pair))
    sources = []
    for name, embedding in zip(NEW_NAMES, model.mfuser.class_embeddings(), strict=True):
        if name in CLASSES:
            sources.append(CLASSES.index(name))
            continue
        similarity = [F.cosine_similarity(embedding, known, dim=0).item() for known in trained["embeddings"]]
        sources.append(similarity.index(max(similarity)))
    assert len(set(sources)) < len(sources)  # seven names for four trained classes: some share
    for index, source in enumerate(sources):
        assert torch.equal(model.pixel_decoder.text_position_embedding[index], trained["text"][source])
        assert torch.equal(model.decoder.query_position_embedding[index], trained["query"][source])
    found = model.decoder.predictor.class_head(queries).softmax(dim=-1)
    taken = sorted(set(sources))
    expected = logits[:, [*taken, len(CLASSES)]].softmax(dim=-1)  # "no object" is last
    for column, source in enumerate(taken):
        heirs = [index for index, origin in enumerate(sources) if origin == source]
        for heir in heirs:
            torch.testing.assert_close(found[:, heir], expected[:, column] / len(heirs))
    torch.testing.assert_close(found[:, -1], expected[:, -1])


@torch.no_grad()
def test_after_new_class_names_each_query_votes_for_its_own_class():
    model = tiny_model()
    model.set_class_names(NEW_NAMES, tiny_tokenizer())
    outputs = model(tiny_batch((50, 60))["pixel_values"])
    scores = segmentation_scores(outputs.class_queries_logits, outputs.masks_queries_logits, own_class=True)
    torch.testing.assert_close(outputs.logits, bilinear(scores, (50, 60)), rtol=1e-4, atol=1e-5)
