"""PEFT adapters give the same scores after training, saving and reloading."""

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

from mfuser import MFuserForSemanticSegmentation

peft = pytest.importorskip("peft")

# Projections of the attention of both vision encoders and of the text encoder, under the names of each of them.
ENCODERS = r".*\.(vision|text)\..*\.(q|k|v|o|out)_proj"


@torch.no_grad()
def scores(model) -> torch.Tensor:
    return model(tiny_batch(batch=1)["pixel_values"]).logits


@pytest.fixture
def saved(tmp_path):
    def save(pair):
        tiny_model(pair).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def load(folder) -> MFuserForSemanticSegmentation:
    return MFuserForSemanticSegmentation.from_pretrained(folder)


def trained_adapter(folder, **config):
    torch.manual_seed(0)
    model = peft.get_peft_model(load(folder), peft.LoraConfig(r=2, **config)).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for step in range(2):
        model(**tiny_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    ("pair", "config"),
    [
        ("dinov2+clip", dict(target_modules=ENCODERS)),
        ("dinov2+clip", dict(target_modules="all-linear")),
        ("dinov2+siglip", dict(target_modules=ENCODERS, use_dora=True)),
        ("dinov3+siglip2", dict(target_modules=ENCODERS)),
        ("dinov2_with_registers+eva02_clip", dict(target_modules=ENCODERS, use_dora=True)),
        ("dinov2+clip", dict(target_modules=ENCODERS, modules_to_save=["pyramid", "pixel_decoder", "decoder"])),
    ],
)
def test_a_reloaded_adapter_gives_bit_identical_scores(pair, config, saved, tmp_path):
    folder = saved(pair)
    model = trained_adapter(folder, **config)
    expected = scores(model)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert torch.equal(scores(reloaded), expected)
    plain = scores(load(folder))
    assert not torch.allclose(plain, expected, atol=1e-3)
    with reloaded.disable_adapter():  # caches do not depend on the adapter
        assert torch.equal(scores(reloaded), plain)
    assert torch.equal(scores(reloaded), expected)
    torch.testing.assert_close(scores(reloaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_auto_peft_model_loads_an_adapter_on_its_model(saved, tmp_path):
    model = trained_adapter(saved("dinov2+clip"), target_modules=ENCODERS)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["mfuser.modeling_mfuser"])
    assert torch.equal(scores(loaded.eval()), scores(model))


def test_statistics_of_a_frozen_pyramid_stay_as_they_are():
    model = tiny_model()
    norm = model.mfuser.pyramid.stride4[1]
    before = norm.running_mean.clone()
    model.train().mfuser.pyramid.requires_grad_(False)  # in the order of `get_peft_model` on a model in training mode
    model(**tiny_batch())
    assert torch.equal(norm.running_mean, before)
    model.mfuser.pyramid.requires_grad_(True)
    model.train()(**tiny_batch())
    assert not torch.equal(norm.running_mean, before)


def test_a_changed_scale_of_an_adapter_of_the_text_encoder_is_seen_by_the_next_image(saved):
    model = trained_adapter(saved("dinov2+clip"), target_modules=r".*\.text\..*\.(q|v)_proj")
    expected = scores(model)
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 2  # no weight changes
    assert not torch.equal(scores(model), expected)
