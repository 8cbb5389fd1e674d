"""EVA02-CLIP gives the outputs of the reference implementation and behaves as a Transformers model.

`fixtures/eva02_clip_reference.safetensors` holds one vision layer and a whole text tower of the reference
implementation, small and random, under the published names (`weights.*`), with inputs and outputs. The token embedding
is reduced to the rows `token_ids`.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import enable_checkpointing
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.masking_utils import create_causal_mask

from mfuser.configuration_eva02_clip import Eva02ClipConfig, Eva02ClipTextConfig, Eva02ClipVisionConfig
from mfuser.modeling_eva02_clip import Eva02ClipModel, Eva02ClipTextModel, Eva02ClipVisionModel
from mfuser.scripts import convert_eva02_clip as convert

REFERENCE = Path(__file__).parent / "fixtures" / "eva02_clip_reference.safetensors"
VISION_HEAD_WIDTH, TEXT_HEAD_WIDTH, PRETRAINED_GRID = 8, 4, 3  # of the fixture


def tiny_config(**vision):
    return Eva02ClipConfig(
        projection_dim=24,
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "initializer_range": 0.2,
            **vision,
        },
        text_config={
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 50,
            "max_position_embeddings": 12,
            "bos_token_id": 48,
            "eos_token_id": 49,
            "initializer_factor": 4.0,
        },
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Eva02ClipModel(tiny_config()).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 48, (2, 9), generator=generator)
    input_ids[0, 4:], input_ids[1, 8] = 49, 49
    return {"pixel_values": torch.randn(3, 3, 56, 56, generator=generator), "input_ids": input_ids}


@pytest.fixture(scope="module")
def reference():
    return load_file(REFERENCE)


def published_weights() -> dict[str, torch.Tensor]:
    """The reference's weights under the published names, with a token embedding of full size."""
    reference = load_file(REFERENCE)
    weights = {key.removeprefix("weights."): tensor for key, tensor in reference.items() if key.startswith("weights.")}
    rows = weights["text.token_embedding.weight"]
    weights["text.token_embedding.weight"] = torch.zeros(49408, rows.shape[1]).index_copy(
        0, reference["token_ids"], rows
    )
    return weights


@pytest.fixture(scope="module")
def published():
    return published_weights()


@pytest.fixture(scope="module")
def reference_model(published):
    model = convert.eva02_clip_from_state_dict(published, VISION_HEAD_WIDTH, TEXT_HEAD_WIDTH)
    model.vision_model.config.rope_pretrained_grid = PRETRAINED_GRID
    return model


# Comparison with the reference


def test_rotary_table_is_the_reference_table_after_a_row_for_the_class_token(reference, reference_model):
    rotary = reference_model.vision_model.rotary_embedding(4, 4)
    for part, name in ((rotary.real, "cos"), (rotary.imag, "sin")):  # the reference has one number per channel
        table = reference[f"weights.visual.rope.freqs_{name}"]
        torch.testing.assert_close(part[1:].repeat_interleave(2, dim=-1), table, atol=1e-6, rtol=0)
    assert (rotary[0] == 1).all()


@torch.no_grad()
def test_vision_embeddings_and_layer_equal_the_reference(reference, reference_model):
    # Images of 60 pixels at patch 14: the reference ignores the last four as well.
    vision = reference_model.vision_model
    hidden_states = vision.encoder.layers[0](
        vision.embeddings(reference["pixel_values"]), vision.rotary_embedding(4, 4)
    )
    torch.testing.assert_close(hidden_states, reference["vision_layer_output"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_tower_stepped_like_clip_equals_the_reference(reference, reference_model):
    """The learned context is inserted after the first token, so the tower is run on embeddings."""
    text, ids = reference_model.text_model, reference["text_input_ids"]
    tokens, context = text.embeddings.token_embedding(ids), reference["text_contexts"].expand(len(ids), -1, -1)
    hidden_states = text.embeddings(inputs_embeds=torch.cat([tokens[:, :1], context, tokens[:, 1:]], dim=1))
    mask = create_causal_mask(text.config, hidden_states, None, None)
    hidden_states = text.encoder(inputs_embeds=hidden_states, attention_mask=mask, is_causal=True).last_hidden_state
    end = ids.argmax(dim=-1) + context.shape[1]
    embeddings = reference_model.text_projection(text.final_layer_norm(hidden_states)[torch.arange(len(ids)), end])
    torch.testing.assert_close(embeddings, reference["text_embeddings"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_vision_layer_on_a_non_square_grid_equals_its_definition(published, reference_model):
    height, width, heads = 2, 5, 4
    torch.manual_seed(0)
    hidden_states = torch.randn(2, 1 + height * width, 32)
    weights = {key.removeprefix("visual.blocks.0."): tensor for key, tensor in published.items()}

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def turn(x):
        """Rotates two channel pairs of each head by the row and two by the column."""
        states = split(x).clone()
        for row in range(height):
            for column in range(width):
                token = states[:, :, 1 + row * width + column]
                y, x = row / height * PRETRAINED_GRID, column / width * PRETRAINED_GRID
                for pair, angle in enumerate((y, y / 100, x, x / 100)):  # 10000 ** (-2j / 4)
                    a, b = token[..., 2 * pair].clone(), token[..., 2 * pair + 1].clone()
                    token[..., 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                    token[..., 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
        return states

    normed = norm("norm1", hidden_states)
    query = turn(linear("attn.q_proj", normed) + weights["attn.q_bias"])
    key = turn(linear("attn.k_proj", normed))
    value = split(linear("attn.v_proj", normed) + weights["attn.v_bias"])
    attention = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) @ value
    expected = hidden_states + linear("attn.proj", norm("attn.inner_attn_ln", attention.transpose(1, 2).flatten(2)))
    normed = norm("norm2", expected)
    gated = F.silu(linear("mlp.w1", normed)) * linear("mlp.w2", normed)
    expected = expected + linear("mlp.w3", norm("mlp.ffn_ln", gated))

    vision = reference_model.vision_model
    output = vision.encoder.layers[0](hidden_states, vision.rotary_embedding(height, width))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_every_norm_has_the_published_epsilon():
    """Checked directly, since a wrong epsilon would hardly change the outputs."""
    model = Eva02ClipModel(tiny_config())
    for tower, eps in ((model.vision_model, 1e-6), (model.text_model, 1e-5)):
        assert {module.eps for module in tower.modules() if isinstance(module, torch.nn.LayerNorm)} == {eps}


# Image sizes


@torch.no_grad()
def test_pixels_beyond_the_last_patch_are_ignored(model):
    pixel_values = torch.randn(1, 3, 69, 83)  # 4 x 5 patches of 14 and 13 pixels over
    inside = model.vision_model(pixel_values[..., :56, :70]).last_hidden_state
    assert inside.shape == (1, 1 + 4 * 5, 32)
    pixel_values[..., 56:, :] = torch.nan
    pixel_values[..., 70:] = torch.nan
    assert torch.equal(model.vision_model(pixel_values).last_hidden_state, inside)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(2, 7), (7, 2), (5, 5), (1, 1)])
def test_position_table_is_resampled_bicubically_to_any_grid(model, grid):
    embeddings = model.vision_model.embeddings
    height, width = (side * 14 for side in grid)
    positions = embeddings(torch.zeros(1, 3, height, width))[0]
    table = embeddings.position_embedding.weight
    torch.testing.assert_close(positions[0], table[0] + embeddings.class_embedding)
    expected = F.interpolate(table[1:].T.reshape(1, -1, 4, 4), size=grid, mode="bicubic", align_corners=False)
    positions = (positions[1:] - embeddings.patch_embedding.bias).T.reshape(1, -1, *grid)
    torch.testing.assert_close(positions, expected, atol=1e-5, rtol=1e-4)


def test_positions_are_stretched_to_the_pretrained_grid_on_each_axis():
    model = Eva02ClipVisionModel(Eva02ClipVisionConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    rotary = model.rotary_embedding(2, 32)  # one pair an axis, its frequency 1
    row, column = 1, 31
    expected = torch.tensor([row / 2 * 16, column / 32 * 16])
    torch.testing.assert_close(rotary[-1], torch.complex(expected.cos(), expected.sin()))


def test_pixels_of_a_wrong_shape_raise(model):
    with pytest.raises(ValueError, match=r"shape \(1, 4, 56, 56\); it must be \(batch, 3, height, width\)"):
        model.vision_model(torch.zeros(1, 4, 56, 56))
    with pytest.raises(ValueError, match=r"\(56, 13\) pixels; both sides must be at least the patch size, 14"):
        model.vision_model(torch.zeros(1, 3, 56, 13))


# Behaviour of a Transformers model


@torch.no_grad()
def test_similarity_is_a_scaled_cosine_and_symmetric(model, inputs):
    outputs = model(**inputs)
    assert outputs.logits_per_image.shape == (3, 2)
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_image.T)
    cosine = F.cosine_similarity(
        model.get_image_features(inputs["pixel_values"]).pooler_output[:, None],
        model.get_text_features(inputs["input_ids"]).pooler_output[None],
        dim=-1,
    )
    torch.testing.assert_close(outputs.logits_per_image, cosine / 0.07, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(outputs.image_embeds.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(outputs.text_embeds.norm(dim=-1), torch.ones(2))


def test_contrastive_loss_pairs_images_and_texts(model, inputs):
    outputs = model(inputs["input_ids"], inputs["pixel_values"][:2], return_loss=True)
    logits, pairs = outputs.logits_per_image, torch.arange(2)
    torch.testing.assert_close(outputs.loss, (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2)
    outputs.loss.backward()
    # The last hidden states of the patches are not used, but all weights have gradients through attention.
    without_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without_gradient == []
    with pytest.raises(ValueError, match="3 images and 2 texts"):
        model(**inputs, return_loss=True)


@torch.no_grad()
def test_text_attends_to_no_later_token_and_no_padding(model, inputs):
    ids = inputs["input_ids"]
    other = ids.clone()
    other[0, 5:] = 7  # after the end of the first text
    features = model.get_text_features(ids).pooler_output
    torch.testing.assert_close(model.get_text_features(other).pooler_output[0], features[0])
    other[0, 2] = 11
    assert not torch.allclose(model.get_text_features(other).pooler_output[0], features[0], atol=1e-3)


@torch.no_grad()
def test_eager_and_sdpa_attention_agree(model, inputs):
    outputs = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert model.vision_model.config._attn_implementation == implementation
        outputs[implementation] = model(**inputs).logits_per_image
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_and_attentions_are_recorded(model, inputs):
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    vision, text = outputs.vision_model_output, outputs.text_model_output
    assert [tuple(states.shape) for states in vision.hidden_states] == [(3, 17, 32)] * 4
    assert torch.equal(vision.hidden_states[0], model.vision_model.embeddings(inputs["pixel_values"]))
    assert torch.equal(vision.hidden_states[-1], vision.last_hidden_state)
    assert [tuple(weights.shape) for weights in vision.attentions] == [(3, 2, 17, 17)] * 3
    assert [tuple(states.shape) for states in text.hidden_states] == [(2, 9, 16)] * 3
    assert [tuple(weights.shape) for weights in text.attentions] == [(2, 2, 9, 9)] * 2
    torch.testing.assert_close(vision.attentions[0].sum(-1), torch.ones(3, 2, 17))


@torch.no_grad()
def test_stepping_through_the_layers_equals_forward(model, inputs):
    vision = model.vision_model
    hidden_states = vision.embeddings(inputs["pixel_values"])
    rotary = vision.rotary_embedding(4, 4)
    for layer in vision.encoder.layers:
        hidden_states = layer(hidden_states, rotary)
    outputs = vision(inputs["pixel_values"])
    assert torch.equal(hidden_states, outputs.last_hidden_state)
    torch.testing.assert_close(vision.post_layernorm(hidden_states)[:, 0], outputs.pooler_output)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_leaves_gradients_as_they_are(model, inputs, use_reentrant):
    def gradients():
        model.zero_grad()
        model(**inputs).logits_per_image.square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.train()
    expected = gradients()
    enable_checkpointing(model, use_reentrant=use_reentrant)
    assert all(layer.gradient_checkpointing for layer in model.vision_model.encoder.layers)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@torch.no_grad()
def test_bfloat16_keeps_the_rotary_table_in_float32_and_stays_close(model, inputs):
    expected = model.vision_model(inputs["pixel_values"]).pooler_output
    model = model.to(torch.bfloat16)
    assert model.vision_model.rotary_embedding(4, 4).dtype == torch.complex64
    output = model.vision_model(inputs["pixel_values"]).pooler_output
    assert output.dtype == torch.bfloat16
    assert F.cosine_similarity(output.float(), expected, dim=-1).min() > 0.999


def test_model_holds_no_rotary_table(model):
    """Buffers that are not saved come back uninitialised from `from_pretrained`, which builds on the meta device."""
    assert [name for name, _ in model.named_buffers()] == ["text_model.embeddings.position_ids"]


@torch.no_grad()
def test_saving_and_loading_gives_the_same_bits(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = Eva02ClipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for name in ("vision_config", "text_config"):
        expected, config = getattr(model.config, name).to_diff_dict(), getattr(loaded.config, name).to_diff_dict()
        assert config == {**expected, "dtype": "float32"}
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded.text_model.embeddings.position_ids, model.text_model.embeddings.position_ids)
    inputs["pixel_values"] = torch.randn(3, 3, 42, 70)
    assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


@torch.no_grad()
def test_one_tower_loads_from_the_folder_of_both(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    vision, report = Eva02ClipVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    expected = model.vision_model(inputs["pixel_values"]).pooler_output
    assert torch.equal(vision(inputs["pixel_values"]).pooler_output, expected)
    text, report = Eva02ClipTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    expected = model.text_model(inputs["input_ids"]).pooler_output
    assert torch.equal(text(inputs["input_ids"]).pooler_output, expected)


@torch.no_grad()
def test_saved_folder_loads_as_remote_code(model, inputs, tmp_path):
    folder = tmp_path / "eva02-clip.tiny"
    model.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.vision_config.intermediate_size == int(32 * 2.6667)
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules")
    assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


def test_all_new_weights_are_initialised():
    torch.manual_seed(0)
    model = Eva02ClipModel.from_pretrained(None, config=tiny_config(initializer_range=0.02), state_dict={})
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    embeddings = model.vision_model.embeddings
    assert 0.01 < embeddings.class_embedding.std() < 0.03
    assert 0.018 < embeddings.position_embedding.weight.std() < 0.022
    assert 0.018 < model.vision_model.encoder.layers[2].mlp.up_proj.weight.std() < 0.022
    assert model.logit_scale.item() == pytest.approx(2.6592)


@pytest.mark.parametrize(
    ("config_class", "values", "message"),
    [
        (Eva02ClipVisionConfig, {"hidden_size": 1000}, "must be a multiple of 4 \\* num_attention_heads"),
        (Eva02ClipVisionConfig, {"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be positive"),
        (Eva02ClipVisionConfig, {"num_attention_heads": 0}, "num_attention_heads is 0; it must be positive"),
        (Eva02ClipVisionConfig, {"rope_pretrained_grid": 0}, "rope_pretrained_grid is 0; it must be positive"),
        (Eva02ClipVisionConfig, {"image_size": 13}, r"image_size is 13; it must be at least patch_size \(14\)"),
        (
            Eva02ClipTextConfig,
            {"vocab_size": 100, "bos_token_id": 1},
            "eos_token_id is 49407; it must be a token of the vocabulary",
        ),
        (Eva02ClipTextConfig, {"max_position_embeddings": 0}, "max_position_embeddings is 0; it must be positive"),
        (
            Eva02ClipConfig,
            {"projection_dim": 512, "text_config": {"projection_dim": 768}},
            r"projection_dim is 768; it must be projection_dim \(512\)",
        ),
    ],
)
def test_impossible_configurations_raise(config_class, values, message):
    with pytest.raises(ValueError, match=message):
        config_class(**values)
