"""Tests of the model over every pair of encoders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, PAIRS, enable_checkpointing, tiny_batch, tiny_config, tiny_model
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.utils import find_labels

from mfuser import MFuserForSemanticSegmentation, MFuserModel
from mfuser.pyramid_mfuser import MFuserUpsampling, PyramidLevel

PAIR = pytest.mark.parametrize("pair", PAIRS)


@PAIR
def test_scores_at_the_images_size_and_a_finite_loss(pair):
    model, batch = tiny_model(pair), tiny_batch((60, 60))
    outputs = model(**batch)
    assert outputs.logits.shape == (2, len(CLASSES), 60, 60)
    assert outputs.logits.isfinite().all() and outputs.logits.min() >= 0
    assert outputs.loss.isfinite()
    assert outputs.loss.item() == pytest.approx(sum(loss.item() for loss in outputs.loss_components.values()))


@PAIR
def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(pair):
    model = tiny_model(pair).train()
    model(**tiny_batch()).loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert frozen and frozen == {name for name in frozen if name.startswith(("mfuser.vfm.", "mfuser.vlm."))}
    assert reached == {name for name, _ in model.named_parameters()} - frozen
    unmoved = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.abs().max() > 0]
    # a constant added to all keys changes no softmax
    assert [name for name in unmoved if not name.endswith("k_proj.bias")] == []


@PAIR
def test_save_load_save_is_bit_identical_and_keeps_the_encoders_frozen(pair, tmp_path):
    model, batch = tiny_model(pair), tiny_batch()
    model.save_pretrained(tmp_path / "once")
    loaded, report = MFuserForSemanticSegmentation.from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    trainable, expected = (
        {name for name, parameter in each.named_parameters() if parameter.requires_grad} for each in (loaded, model)
    )
    assert trainable == expected
    for name, buffer in model.named_buffers():  # those that are not saved are filled as well
        assert torch.equal(buffer, loaded.get_buffer(name)), name
    loaded.save_pretrained(tmp_path / "twice")
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("once", "twice")]
    assert weights[0] == weights[1]
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("once", "twice")]
    for config in configs:
        for part in ("vfm_config", "vlm_config", "text_config"):
            config[part].pop("dtype", None)  # added to each encoder by loading
    assert configs[0] == configs[1]
    again = MFuserForSemanticSegmentation.from_pretrained(tmp_path / "twice")
    with torch.no_grad():
        scores = [each(batch["pixel_values"]).logits for each in (model, loaded, again)]
    assert torch.equal(scores[1], scores[2])
    # rounding in matrix products depends on the memory alignment of the weights
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (17, 100), (64, 64), (48, 200), (300, 64), (65, 64)])
def test_any_size_from_one_patch_up(size):
    outputs = tiny_model()(**tiny_batch(size))
    assert outputs.logits.shape == (2, len(CLASSES), *size)
    assert outputs.loss.isfinite()


def test_batching_changes_nothing():
    model, pixel_values = tiny_model(), tiny_batch(batch=3)["pixel_values"]
    with torch.no_grad():
        together = model(pixel_values).logits
        alone = torch.cat([model(image[None]).logits for image in pixel_values])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_train_mode_leaves_frozen_encoders_in_eval_mode():
    model = tiny_model().train()
    assert model.training and model.mfuser.training and model.decoder.training
    assert not any(module.training for tower in (model.mfuser.vfm, model.mfuser.vlm) for module in tower.modules())


def test_encoders_train_when_asked_to():
    model = tiny_model(freeze_encoders=False).train()
    model(**tiny_batch()).loss.backward()
    for tower in (model.mfuser.vfm, model.mfuser.vlm):
        assert all(module.training for module in tower.modules())
        assert tower.vision.embeddings.get_parameter(tower.kernel.name.removeprefix("embeddings.")).grad is not None
    assert model.mfuser.vlm.text.embeddings.token_embedding.weight.grad.abs().max() > 0


def test_stochastic_depth_acts_in_training_alone_and_keeps_the_mean():
    from mfuser.towers_mfuser import drop_path

    torch.manual_seed(0)
    for axis, dropped in (
        ("token", drop_path(torch.ones(3, 20000, 2), 0.25, "token")[0, :, 0]),
        ("sample", drop_path(torch.ones(20000, 3, 2), 0.25, "sample")[:, 0, 0]),
    ):
        assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1 / 0.75]), axis
        assert dropped.mean().item() == pytest.approx(1, abs=0.02), axis
    model, batch = tiny_model(vlm_drop_path_rate=0.9, fusion_dropout=0.0, enhancer_dropout=0.0), tiny_batch()
    with torch.no_grad():
        first, second = (model.mfuser(batch["pixel_values"]).score_map for _ in range(2))
        assert torch.equal(first, second)
        model.mfuser.train()
        first, second = (model.mfuser(batch["pixel_values"]).score_map for _ in range(2))
        assert not torch.equal(first, second)


@torch.no_grad()
def test_the_fusions_dropout_acts_in_training_alone_and_at_its_rate():
    model, dropped = tiny_model(fusion_dropout=0.25), []
    for layer in model.mfuser.fusion_layers:
        layer.mvfuser.register_forward_hook(lambda module, inputs, output: dropped.append((output == 0).float()))
    pixel_values = tiny_batch(batch=8)["pixel_values"]
    model(pixel_values)
    assert len(dropped) == 4 and not any(zeros.any() for zeros in dropped)
    dropped.clear()
    torch.manual_seed(0)
    model.train()(pixel_values)
    assert [zeros.mean().item() for zeros in dropped] == pytest.approx([0.25] * 4, abs=0.02)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(vlm_drop_path_rate=0.3).train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant=use_reentrant)
        torch.manual_seed(1)
        model(**tiny_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_gradient_checkpointing_keeps_fewer_activations():
    def saved_elements(checkpointing):
        model = tiny_model().train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant=False)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            model.mfuser(tiny_batch()["pixel_values"])
        return sum(kept)

    assert saved_elements(True) < 0.5 * saved_elements(False)


@PAIR
def test_eager_and_sdpa_attention_agree(pair):
    scores = []
    for implementation in ("eager", "sdpa"):
        model = tiny_model(pair)
        model.set_attn_implementation(implementation)
        assert model.mfuser.vlm.vision.config._attn_implementation == implementation
        with torch.no_grad():
            scores.append(model(tiny_batch()["pixel_values"]).logits)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov2+eva02_clip", "dinov3+siglip2"])
def test_half_precision_is_near_float32(pair, dtype, tmp_path):
    model, batch = tiny_model(pair), tiny_batch()
    model.save_pretrained(tmp_path)
    half = MFuserForSemanticSegmentation.from_pretrained(tmp_path, dtype=dtype)
    assert half.mfuser.fusion_layers[0].mvfuser.A_log.dtype == torch.float32
    assert half.decoder.predictor.class_head.weight.dtype == dtype
    with torch.no_grad():
        scores, reference = half(batch["pixel_values"]).logits, model(batch["pixel_values"]).logits
    assert scores.dtype == torch.float32
    assert (scores - reference).abs().mean() < 0.05
    assert half(**batch).loss.isfinite()


@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov2+eva02_clip", "dinov3+siglip2"])
def test_loads_on_the_meta_device_with_every_buffer_filled(pair, tmp_path):
    model = tiny_model(pair)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = MFuserForSemanticSegmentation(tiny_config(pair))
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    loaded = MFuserForSemanticSegmentation.from_pretrained(tmp_path, device_map={"": "cpu"})
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, loaded.get_buffer(name)), name


def test_weights_offloaded_to_disk_give_the_same_scores(tmp_path):
    model, batch = tiny_model(), tiny_batch()
    model.save_pretrained(tmp_path / "model")
    device_map = {"mfuser": "cpu", "pixel_decoder": "disk", "decoder": "cpu"}
    loaded = MFuserForSemanticSegmentation.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        offloaded, expected = (m(batch["pixel_values"]).logits for m in (loaded, model))
    torch.testing.assert_close(offloaded, expected, rtol=1e-4, atol=1e-6)


def test_initial_values_are_the_papers():
    model = MFuserForSemanticSegmentation(tiny_config())
    mvfusers = [layer.mvfuser for layer in model.mfuser.fusion_layers]
    for mvfuser in mvfusers:
        torch.testing.assert_close(mvfuser.A_log.exp(), torch.arange(1.0, 17.0).expand(16, -1))
        assert torch.equal(mvfuser.D, torch.ones(16))
        assert mvfuser.scale.item() == pytest.approx(1e-3)
        assert mvfuser.dt_proj.weight.abs().max() <= mvfuser.time_step_rank**-0.5
    # steps are log-uniform between 1e-3 and 1e-1
    steps = torch.cat([F.softplus(mvfuser.dt_bias) for mvfuser in mvfusers])
    assert 0.99e-3 <= steps.min() < 3e-3 and 3e-2 < steps.max() <= 1.01e-1
    assert 5e-3 < steps.log().mean().exp() < 2e-2
    gamma = model.mfuser.enhancer.gamma
    assert 0.3 < gamma.std() < 1.5 and gamma.abs().max() <= 2


@pytest.mark.parametrize("pair", ["dinov2+clip", "dinov2_with_registers+eva02_clip", "dinov3+siglip2"])
def test_missing_weights_of_encoders_get_the_initial_values_of_their_encoder(pair, tmp_path):
    # In remote code, Transformers skips modules that initialise the weights of their submodules.
    assert MFuserForSemanticSegmentation.is_remote_code()
    model = MFuserForSemanticSegmentation(tiny_config(pair))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    towers = ("mfuser.vfm.", "mfuser.vlm.")
    kept = {min(name for name in weights if name.startswith(tower)) for tower in towers}  # without any, it is an error
    found = {name: weight for name, weight in weights.items() if name in kept or not name.startswith(towers)}
    save_file(found, tmp_path / "model.safetensors")
    loaded = MFuserForSemanticSegmentation.from_pretrained(tmp_path)
    for (name, expected), found in zip(model.named_parameters(), loaded.parameters(), strict=True):
        if name in kept or not name.startswith(towers) or expected.std() == 0:
            assert torch.equal(found, expected), name
        elif expected.numel() > 500:
            assert not torch.equal(found, expected), name
            assert found.std().item() == pytest.approx(expected.std().item(), rel=0.25), name


def test_deformable_attention_starts_with_each_heads_samples_along_its_own_direction_and_of_one_weight():
    attention = MFuserForSemanticSegmentation(tiny_config()).pixel_decoder.layers[0].self_attention
    offsets = attention.sampling_offsets.bias.view(4, 3, 4, 2)  # heads, levels, points, xy
    for head, direction in enumerate(((1, 0), (0, 1), (-1, 0), (0, -1))):
        for level in range(3):
            expected = torch.tensor([[distance * side for side in direction] for distance in (1.0, 2.0, 3.0, 4.0)])
            torch.testing.assert_close(offsets[head, level], expected)
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any() and not attention.attention_weights.bias.any()


def test_a_query_attends_inside_its_mask_or_everywhere_if_its_mask_is_empty():
    model = tiny_model()
    logits = torch.full((1, 3, 4, 4), -1.0)
    logits[0, 0, :2, :2] = 1.0  # the upper left quarter
    logits[0, 1, 3, 3] = 1.0  # one cell of four, fewer than half
    mask = model.decoder.attention_mask(logits, (2, 2))
    assert mask.tolist() == [[[[True, False, False, False], [True] * 4, [True] * 4]]]
    logits[0, 1, 2:, 2:] = 0.0  # a probability of one half is inside
    assert model.decoder.attention_mask(logits, (2, 2))[0, 0, 1].tolist() == [False, False, False, True]


def test_hidden_states_of_both_encoders():
    model, batch = tiny_model("deeper dinov2+clip"), tiny_batch()
    outputs = model(batch["pixel_values"], output_hidden_states=True)
    assert len(outputs.hidden_states) == len(outputs.vfm_hidden_states) == 5
    assert all(states.shape == (2, 17, 32) for states in outputs.hidden_states + outputs.vfm_hidden_states)
    assert model(batch["pixel_values"]).hidden_states is None


@torch.no_grad()
def test_a_tuple_holds_the_outputs_in_their_order():
    model, pixel_values = tiny_model(), tiny_batch()["pixel_values"]
    for part in (model, model.mfuser):
        outputs = part(pixel_values, output_hidden_states=True)
        as_tuple = part(pixel_values, output_hidden_states=True, return_dict=False)
        assert type(as_tuple) is tuple
        torch.testing.assert_close(as_tuple, outputs.to_tuple(), rtol=0, atol=0)


def test_weights_that_change_are_seen_by_the_next_image():
    model, pixel_values = tiny_model(), tiny_batch()["pixel_values"]
    changes = {
        "in place": lambda weight: weight.mul_(2),
        "moved": lambda weight: setattr(weight, "data", weight.data * 2),
        "replaced": lambda weight: model.mfuser.pyramid.stride8.register_parameter("weight", nn.Parameter(weight * 2)),
    }
    with torch.no_grad():
        for change in changes.values():
            model(pixel_values)
            change(model.mfuser.pyramid.stride8.weight)
            cached = model(pixel_values).logits
            torch.testing.assert_close(cached, model.train().eval()(pixel_values).logits)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(pixel_values).logits
        assert not torch.equal(low, model(pixel_values).logits)
        assert torch.equal(cached, model(pixel_values).logits)


class Upsamplings(TorchFunctionMode):
    """Records the weights of every transposed convolution."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv_transpose2d:
            self.weights.append(args[1])
        return function(*args, **(kwargs or {}))

    def of(self, model, pixel_values) -> list[torch.Tensor]:
        self.weights = []
        with self:
            model(pixel_values)
        return self.weights


def test_upsampling_goes_straight_to_the_decoders_channels():
    model, pixel_values = tiny_model(decoder_hidden_size=96), tiny_batch()["pixel_values"]
    kernels = Upsamplings().of(model, pixel_values)
    # Stride 4: the first doubling, which a norm follows; then the last doubling of strides 4 and 8, from 64 channels.
    assert [tuple(kernel.shape) for kernel in kernels] == [(64, 64, 2, 2), (64, 96, 2, 2), (64, 96, 2, 2)]


def test_an_upsampling_and_its_projection_are_one_linear_map():
    torch.manual_seed(0)
    upsampling, projection = MFuserUpsampling(8), nn.Conv2d(8, 5, 1)
    maps = torch.randn(2, 8, 3, 4)
    expected = projection(upsampling(maps))
    level = PyramidLevel(maps, upsampling)
    torch.testing.assert_close(level.project(projection), expected)
    with torch.no_grad():  # the projected kernel is cached
        torch.testing.assert_close(level.project(projection), expected)
        projection.weight.mul_(2)
        torch.testing.assert_close(level.project(projection), projection(upsampling(maps)))
    torch.testing.assert_close(PyramidLevel(maps, upsampling).feature_map(), upsampling(maps))


def test_the_base_model_loads_from_the_same_folder(tmp_path):
    model, batch = tiny_model(), tiny_batch()
    model.save_pretrained(tmp_path)
    base = MFuserModel.from_pretrained(tmp_path)
    with torch.no_grad():
        outputs, expected = base(batch["pixel_values"]), model(batch["pixel_values"])
    assert torch.equal(outputs.score_map, expected.score_map)
    assert [tuple(feature.shape[-2:]) for feature in outputs.feature_maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert outputs.dense_embedding.shape == (2, 24, 4, 4) and outputs.global_embedding.shape == (2, 1, 24)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(1, 1, 64, 64), r"shape \(batch, 3, height, width\)"),
        (torch.zeros(3, 64, 64), r"shape \(batch, 3, height, width\)"),
        (torch.zeros(3, 100, 100), r"shape \(batch, 3, height, width\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "pixel_values are torch.uint8; they must be a floating-point"),
        (None, "pixel_values are NoneType; they must be a floating-point tensor of normalised images"),
        (torch.zeros(1, 3, 15, 64), "both sides must be at least one patch, 16 pixels"),
    ],
)
def test_impossible_pixels_are_refused(pixel_values, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(pixel_values)


@pytest.mark.parametrize(
    ("size", "labels", "message"),
    [
        ((64, 64), torch.full((2, 64, 64), 4), r"labels hold \[4\]; they must be class ids from 0 to 3, or 255"),
        ((64, 64), torch.full((2, 64, 64), -1), r"labels hold \[-1\]; they must be class ids from 0 to 3"),
        ((64, 64), torch.zeros(2, 64, 64), "dtype torch.float32; they must be class ids, that is integers"),
        ((64, 64), torch.zeros(1, 64, 64, dtype=torch.long), r"shape \(1, 64, 64\); it must be \(2, height, width\)"),
        ((64, 64), torch.zeros(2, 32, 64, dtype=torch.long), r"labels have \(32, 64\) pixels .* of its own size"),
        ((64, 128), torch.zeros(2, 32, 64, dtype=torch.long), r"labels have \(32, 64\) pixels .* of its own size"),
    ],
)
def test_impossible_labels_are_refused(size, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(tiny_batch(size)["pixel_values"], labels=labels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "size"),
    [
        ("dinov2+clip", (88, 100)),
        ("dinov3+siglip2", (64, 64)),
        ("dinov2_with_registers+eva02_clip", (64, 64)),
    ],
)
def test_the_eval_forward_is_one_graph_without_breaks(pair, size):
    model, pixel_values = tiny_model(pair, decoder_num_layers=1), tiny_batch(size)["pixel_values"]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits, rtol=1e-4, atol=1e-5)


def test_the_trainer_takes_only_labels_for_labels():
    # Every argument whose name contains "label" would have to be in each evaluation batch.
    assert find_labels(MFuserForSemanticSegmentation) == ["labels"]
