"""Attention weights, hidden states and attention implementations behave as in Transformers."""

import pytest
import torch
from tiny_models import DINOV2, PAIRS, enable_checkpointing, tiny_batch, tiny_config, tiny_model
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mfuser import MFuserForSemanticSegmentation, MFuserModel

PAIR = pytest.mark.parametrize("pair", PAIRS)


def eager(model):
    model.set_attn_implementation("eager")
    return model


@PAIR
@torch.no_grad()
def test_attention_weights_of_every_layer_of_both_encoders(pair):
    model, pixel_values = eager(tiny_model(pair)), tiny_batch((60, 60))["pixel_values"]
    config = model.config
    outputs = model(pixel_values, output_attentions=True, output_hidden_states=True)
    for attentions, states, encoder in (
        (outputs.attentions, outputs.hidden_states, config.vlm_config),
        (outputs.vfm_attentions, outputs.vfm_hidden_states, config.vfm_config),
    ):
        tokens = states[0].shape[1]
        assert len(attentions) == encoder.num_hidden_layers
        for weights in attentions:
            assert weights.shape == (2, encoder.num_attention_heads, tokens, tokens)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not torch.equal(outputs.attentions[0], outputs.vfm_attentions[0][..., : outputs.attentions[0].shape[-1]])
    config.output_attentions = True
    by_config = model.mfuser(pixel_values)
    torch.testing.assert_close(by_config.attentions, outputs.attentions)
    torch.testing.assert_close(by_config.vfm_attentions, outputs.vfm_attentions)
    config.output_attentions = False
    assert model(pixel_values).attentions is None and model(pixel_values).vfm_attentions is None


@torch.no_grad()
def test_attention_weights_are_those_of_their_encoder():
    model, pixel_values = eager(tiny_model("deeper dinov2+clip")), tiny_batch()["pixel_values"]
    for layer in model.mfuser.fusion_layers:  # without fusion, the encoders are independent
        layer.mvfuser.scale.zero_()
        layer.vfm_out_proj.bias.zero_()
    outputs = model.mfuser(pixel_values, output_attentions=True)
    alone = model.mfuser.vlm.vision(pixel_values, output_attentions=True, interpolate_pos_encoding=True)
    torch.testing.assert_close(outputs.attentions, alone.attentions, rtol=1e-4, atol=1e-6)
    recorded = []
    for layer in model.mfuser.vfm.layers:
        layer.attention.register_forward_hook(lambda module, inputs, output: recorded.append(output[1]))
    outputs = model.mfuser(pixel_values, output_attentions=True)
    assert len(recorded) == 6
    torch.testing.assert_close(outputs.vfm_attentions, tuple(recorded))


@torch.no_grad()
def test_attention_weights_that_are_not_computed_are_empty_with_a_warning(caplog):
    model, pixel_values = tiny_model(), tiny_batch()["pixel_values"]
    outputs = model(pixel_values, output_attentions=True)
    assert outputs.attentions == outputs.vfm_attentions == ()
    assert 'set_attn_implementation("eager")' in caplog.text


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_an_image_of_several_windows_has_no_attentions_and_hidden_states(name):
    model, pixel_values = eager(tiny_model()), tiny_batch((64, 100))["pixel_values"]
    with pytest.raises(ValueError, match=f"{name} is not available for an image of 64 x 100"):
        model(pixel_values, **{name: True})
    setattr(model.config, name, True)
    with pytest.raises(ValueError, match=f"{name} is not available for an image of 64 x 100"):
        model(pixel_values)
    assert model(pixel_values, **{name: False}).logits.shape[-2:] == (64, 100)


@torch.no_grad()
@pytest.mark.parametrize(("selection", "kept"), [([0, -1], {0, 4}), ([2], {2}), (0, {0}), ([7, -9], set())])
def test_hidden_states_of_some_layers(selection, kept):
    model, pixel_values = tiny_model(), tiny_batch()["pixel_values"]
    everything = model(pixel_values, output_hidden_states=True)
    outputs = model(pixel_values, output_hidden_states=selection)
    for name in ("hidden_states", "vfm_hidden_states"):
        assert len(outputs[name]) == 5
        for index, (found, expected) in enumerate(zip(outputs[name], everything[name], strict=True)):
            assert torch.equal(found, expected) if index in kept else found is None


class Attentions(TorchFunctionMode):
    """Counts the calls of scaled_dot_product_attention, also within `nn.MultiheadAttention`."""

    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function in (F.scaled_dot_product_attention, F.multi_head_attention_forward)
        return function(*args, **(kwargs or {}))


@PAIR
@torch.no_grad()
def test_the_attention_implementation_is_that_of_the_whole_model(pair):
    model, pixel_values = tiny_model(pair), tiny_batch()["pixel_values"]
    with Attentions() as sdpa:
        expected = model(pixel_values).logits
    config = model.config
    layers = config.vfm_config.num_hidden_layers + config.vlm_config.num_hidden_layers
    pooling = 2 * ("siglip" in pair)  # of the whole image, and of every patch
    decoders = 1 + 1 + 2 * 2  # enhancer, pixel decoder, two layers of the decoder
    assert sdpa.calls == layers + config.text_config.num_hidden_layers + pooling + decoders
    eager(model).train().eval()  # without a cache
    with Attentions() as sdpa:
        found = model(pixel_values).logits
    assert sdpa.calls == 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_implementation_without_masks_is_refused():
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        MFuserForSemanticSegmentation._from_config(tiny_config(), attn_implementation="flash_attention_2")


@torch.no_grad()
def test_tuples_by_configuration():
    model, pixel_values = tiny_model(), tiny_batch((64, 100))["pixel_values"]
    expected = model(pixel_values).logits
    model.config.return_dict = False
    (found,) = model(pixel_values)
    assert torch.equal(found, expected)
    assert torch.equal(model.augmented_scores(pixel_values, flip=False), expected.softmax(dim=1))
    assert isinstance(model.mfuser(pixel_values[..., :64])[0], torch.Tensor)


@pytest.mark.parametrize("model_class", [MFuserModel, MFuserForSemanticSegmentation])
def test_the_patch_embedding_can_be_replaced(model_class):
    model, embedding = model_class(tiny_config()), nn.Conv2d(3, 32, 16, 16, bias=False)
    model.set_input_embeddings(embedding)
    assert model.get_input_embeddings() is embedding
    assert model.base_model.vlm.vision.embeddings.patch_embedding is embedding


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("freeze_encoders", [False, True])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_gradient_checkpointing_recomputes_every_layer_once(use_reentrant, freeze_encoders, drop_path_rate):
    def calls(checkpointing):
        model = tiny_model(freeze_encoders=freeze_encoders, vlm_drop_path_rate=drop_path_rate).train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant=use_reentrant)
        counts = dict.fromkeys(("vfm", "vlm", "mvfuser"), 0)

        def count(name):
            return lambda *_: counts.update({name: counts[name] + 1})

        for name, module in (
            ("vfm", model.mfuser.vfm.layers[1].attention),
            ("vlm", model.mfuser.vlm.layers[1].self_attn),
            ("mvfuser", model.mfuser.fusion_layers[1].mvfuser),
        ):
            module.register_forward_hook(count(name))
        model(**tiny_batch()).loss.backward()
        return counts

    assert calls(False) == {"vfm": 1, "vlm": 1, "mvfuser": 1}
    assert calls(True) == {"vfm": 2, "vlm": 2, "mvfuser": 2}


@pytest.mark.parametrize(
    ("pair", "fields"),
    [
        *((pair, {}) for pair in PAIRS),
        ("dinov2+clip", dict(vfm_config=DINOV2 | dict(use_mask_token=True))),
        ("deeper dinov2+clip", dict(fusion_layer_pairs=[[2, 1], [3, 2], [4, 3], [5, 4]])),
    ],
)
def test_every_trainable_parameter_of_unfrozen_encoders_gets_a_gradient(pair, fields, tmp_path):
    tiny_model(pair, freeze_encoders=False, **fields).save_pretrained(tmp_path)
    for model in (
        tiny_model(pair, freeze_encoders=False, **fields),
        MFuserForSemanticSegmentation.from_pretrained(tmp_path),
    ):
        model.train()(**tiny_batch()).loss.backward()
        trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert trainable == {name for name, weight in model.named_parameters() if weight.grad is not None}
        frozen = {name for name, _ in model.named_parameters()} - trainable
        unused = ("vfm.vision.layernorm.", "vfm.vision.norm.", "mask_token", "encoder.layer.5.")
        assert all(any(part in name for part in unused) for name in frozen)
